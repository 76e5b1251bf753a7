//! What stands in the store: one record a resource, desired and observed apart.
//!
//! Called by the core, which reads and writes them as plain data; `state` holds
//! them in memory. A record is JSON under `<region>/<kind>/<key>`
//! (`docs/formats/store.md`). A field that arrives later has a default, so that
//! an older record reads.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use model::{
    AllocationId, AssociationId, AttachmentState, GroupId, ImageId, InstanceId, InstanceState,
    InterfaceId, KeyPairId, Mac, ReservationId, Rule, SubnetId, VolumeId, VolumeState, VpcId,
};
use rpc::host::Run;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

/// The one account of a deployment, as the API shows it.
pub const OWNER_ID: &str = "100000000001";

pub type Tags = BTreeMap<String, String>;

pub trait Record: Serialize + DeserializeOwned + Clone + PartialEq {
    const KIND: &'static str;
    /// Whether a host's desired state may depend on it.
    const DESIRED: bool;

    fn key(&self) -> String;
}

macro_rules! records {
    ($($name:ident $kind:literal $desired:literal $key:ident;)*) => {$(
        impl Record for $name {
            const KIND: &'static str = $kind;
            const DESIRED: bool = $desired;

            fn key(&self) -> String {
                self.$key.to_string()
            }
        }
    )*};
}

records! {
    Instance "instance" true id;
    ObservedInstance "observed-instance" false id;
    Volume "volume" true id;
    ObservedVolume "observed-volume" false id;
    Image "image" false id;
    KeyPair "key-pair" true id;
    Group "group" true id;
    Address "address" true allocation;
    Vpc "vpc" true id;
    Subnet "subnet" true id;
    Host "host" false name;
    AccessKey "access-key" false id;
    Token "token" false token;
    Name "name" false name;
    Meta "meta" true name;
}

/// What a user asked an instance to be, and what the API must tell of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Instance {
    pub id: InstanceId,
    pub reservation: ReservationId,
    pub launch_index: u32,
    pub image: ImageId,
    /// The image's name on the host.
    pub image_name: String,
    pub instance_type: String,
    pub key: Option<KeyPairId>,
    pub key_name: Option<String>,
    pub host: String,
    pub zone: String,
    pub launched_ms: u64,
    pub run: Run,
    pub starts: u64,
    pub reboots: u64,
    /// The user that its QEMU runs as, and that owns its tap.
    pub uid: u32,
    /// In the order of their device indices; the first is the primary one. None once terminated.
    #[serde(default, alias = "interface", deserialize_with = "one_or_many")]
    pub interfaces: Vec<Interface>,
    pub attachments: Vec<Attachment>,
    pub root_device: String,
    /// base64, as it was given.
    pub user_data: Option<String>,
    #[serde(default)]
    pub tags: Tags,
    pub client_token: Option<String>,
    #[serde(default)]
    pub metadata_options: MetadataOptions,
    pub disable_api_termination: bool,
    pub disable_api_stop: bool,
    pub terminate_on_shutdown: bool,
    /// The last user's deed, for people: `User initiated (2026-…)`.
    pub transition: String,
    pub reason: Option<Reason>,
    pub deleted_ms: Option<u64>,
    /// Who must still let go before the record may be removed.
    #[serde(default)]
    pub finalizers: BTreeSet<Finalizer>,
    pub terminated_ms: Option<u64>,
}

/// How the metadata service is reached. As it was before there were options, unless told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MetadataOptions {
    pub disabled: bool,
    /// Whether version 1 is answered too.
    pub tokens_optional: bool,
    /// Routers that an answer may pass, from 1 to 64.
    pub hop_limit: u8,
    /// Whether it is reached over IPv6 too.
    #[serde(default)]
    pub ipv6: bool,
}

impl Default for MetadataOptions {
    fn default() -> Self {
        Self { disabled: false, tokens_optional: false, hop_limit: 1, ipv6: false }
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Reason {
    pub code: String,
    pub message: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Finalizer {
    /// The host still has a process or data of it.
    Host,
}

/// A network interface of an instance. It goes when the instance is terminated.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Interface {
    pub id: InterfaceId,
    pub attachment: String,
    /// 0 is the primary one's.
    #[serde(default)]
    pub device_index: u32,
    pub mac: Mac,
    pub vpc: VpcId,
    pub subnet: SubnetId,
    /// The primary one.
    pub address: Ipv4Addr,
    #[serde(default)]
    pub secondary: Vec<Ipv4Addr>,
    pub groups: Vec<GroupId>,
    pub source_check: bool,
    pub description: String,
    pub attached_ms: u64,
    #[serde(default)]
    pub tags: Tags,
}

impl Instance {
    pub fn primary(&self) -> Option<&Interface> {
        self.interfaces.first()
    }
}

impl Interface {
    /// The primary one first.
    pub fn addresses(&self) -> impl Iterator<Item = Ipv4Addr> {
        std::iter::once(self.address).chain(self.secondary.iter().copied())
    }
}

/// Instances had one interface or none, under the name `interface`.
fn one_or_many<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Interface>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Held {
        None,
        One(Box<Interface>),
        Many(Vec<Interface>),
    }
    Ok(match Held::deserialize(from)? {
        Held::None => Vec::new(),
        Held::One(interface) => vec![*interface],
        Held::Many(interfaces) => interfaces,
    })
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    pub volume: VolumeId,
    pub device: String,
    pub generation: u64,
    pub boot: bool,
    pub delete_on_termination: bool,
    pub attached_ms: u64,
    /// Asked to go; the record stays until the host says that it is gone.
    pub detaching: bool,
}

/// What the host last said of an instance.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ObservedInstance {
    pub id: InstanceId,
    pub state: InstanceState,
    pub starts: u64,
    pub reboots: u64,
    pub reason: Option<String>,
    pub attachments: BTreeMap<VolumeId, AttachmentState>,
    pub since_ms: u64,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Volume {
    pub id: VolumeId,
    pub size_gib: u64,
    pub zone: String,
    pub host: String,
    /// The image's name on the host that it begins as.
    pub image_name: Option<String>,
    pub kind: String,
    pub iops: Option<u64>,
    pub throughput: Option<u64>,
    pub created_ms: u64,
    /// Of the writer; raised at each attach.
    pub generation: u64,
    pub client_token: Option<String>,
    #[serde(default)]
    pub tags: Tags,
    pub deleted_ms: Option<u64>,
    /// The last one, where there was any.
    #[serde(default)]
    pub modification: Option<Modification>,
}

/// What a volume was before it became what it is.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Modification {
    pub started_ms: u64,
    pub ended_ms: Option<u64>,
    pub size_gib: u64,
    pub kind: String,
    pub iops: Option<u64>,
    pub throughput: Option<u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ObservedVolume {
    pub id: VolumeId,
    pub state: VolumeState,
    pub reason: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Image {
    pub id: ImageId,
    pub name: String,
    pub description: String,
    /// The image's name on the hosts.
    pub location: String,
    pub size_bytes: u64,
    pub architecture: String,
    pub root_device: String,
    pub created_ms: u64,
    #[serde(default)]
    pub tags: Tags,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KeyPair {
    pub id: KeyPairId,
    pub name: String,
    /// `rsa` or `ed25519`.
    pub kind: String,
    pub fingerprint: String,
    /// As it stands in `authorized_keys`.
    pub public_key: String,
    pub created_ms: u64,
    #[serde(default)]
    pub tags: Tags,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Group {
    pub id: GroupId,
    pub vpc: VpcId,
    pub name: String,
    pub description: String,
    pub ingress: Vec<GroupRule>,
    pub egress: Vec<GroupRule>,
    #[serde(default)]
    pub tags: Tags,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GroupRule {
    pub rule: Rule,
    pub description: Option<String>,
    #[serde(default)]
    pub tags: Tags,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Address {
    pub allocation: AllocationId,
    pub address: Ipv4Addr,
    pub association: Option<Association>,
    #[serde(default)]
    pub tags: Tags,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Association {
    pub id: AssociationId,
    pub instance: InstanceId,
    pub interface: InterfaceId,
    pub private: Ipv4Addr,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Vpc {
    pub id: VpcId,
    pub cidr: Ipv4Net,
    pub default: bool,
    #[serde(default)]
    pub tags: Tags,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Subnet {
    pub id: SubnetId,
    pub vpc: VpcId,
    pub cidr: Ipv4Net,
    pub zone: String,
    pub default: bool,
    #[serde(default)]
    pub tags: Tags,
}

/// What a host offers, by its own word.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Host {
    pub name: String,
    pub accelerator: String,
    pub vcpus: u32,
    pub memory_mib: u64,
    pub images: Vec<rpc::agent::Image>,
}

/// Who may call. The secret is not here: see `credentials`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct AccessKey {
    pub id: String,
    /// SEC1, uncompressed, hexadecimal: what SigV4A is checked with.
    pub public_key: String,
    pub created_ms: u64,
}

/// What a client token has brought about; swept after a day.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Token {
    pub token: String,
    /// Of the action's name and its parameters.
    pub fingerprint: String,
    pub made: String,
    pub created_ms: u64,
}

/// A row that makes a name or an address unique: it is created in the
/// transaction that takes the name, and only where it is missing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Name {
    /// `key-pair/web`, `group/vpc-…/web`, `private/subnet-…/172.31.0.4`.
    pub name: String,
    pub owner: String,
}

/// What the deployment is, written when the daemon's settings change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Meta {
    pub name: String,
    pub value: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Held {
        #[serde(default, alias = "interface", deserialize_with = "one_or_many")]
        interfaces: Vec<Interface>,
    }

    #[test]
    fn an_instance_of_the_time_of_one_interface_reads() {
        let interface = r#"{
            "id": "eni-00000000000000001", "attachment": "eni-attach-00000000000000001",
            "mac": "02:00:00:00:00:01", "vpc": "vpc-00000000000000001",
            "subnet": "subnet-00000000000000001", "address": "172.31.0.4", "groups": [],
            "source_check": true, "description": "", "attached_ms": 1
        }"#;
        let read = |text: &str| serde_json::from_str::<Held>(text).unwrap().interfaces;
        let held = read(&format!(r#"{{"interface": {interface}}}"#));
        assert_eq!((held.len(), held[0].device_index), (1, 0));
        assert_eq!(held[0].addresses().collect::<Vec<_>>(), [Ipv4Addr::new(172, 31, 0, 4)]);
        assert_eq!(read(r#"{"interface": null}"#), []);
        assert_eq!(read(&format!(r#"{{"interfaces": [{interface}]}}"#)), held);
    }
}
