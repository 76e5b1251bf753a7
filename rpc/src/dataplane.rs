//! `dataplane.sock`: packets. It knows interfaces, security groups and elastic
//! addresses, and nothing of EC2 or QEMU.
//!
//! | call | body → answer |
//! |---|---|
//! | `GET /v1/status` | → [`Status`] |
//! | `PUT /v1/desired` | [`Desired`] → [`Applied`]: the whole state, never a part |
//! | `GET /v1/desired` | → [`Desired`] as last accepted |
//! | `POST /v1/why` | [`Question`] → [`Verdict`]: runs the loaded program |

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnet::{IpNet, Ipv4Net};
use model::{Direction, GroupId, InterfaceId, Mac, SecurityGroup, VpcId};
use serde::{Deserialize, Serialize};

use crate::{Client, Error};

/// The whole wish, at once. What is not in it is removed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Desired {
    /// Grows with each change; an older one than the applied is refused.
    pub generation: u64,
    pub uplink: Option<Uplink>,
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    #[serde(default)]
    pub groups: Vec<SecurityGroup>,
    /// Sources dropped on the uplink before anything else looks at them.
    #[serde(default)]
    pub blocklist: Vec<IpNet>,
    /// Where elastic addresses are taken from: what arrives on the uplink for
    /// one of these that no interface holds is dropped early.
    #[serde(default)]
    pub elastic_ranges: Vec<Ipv4Net>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    /// The host's device towards the world.
    pub device: String,
    /// The next hop for all that leaves by it.
    pub gateway: Ipv4Addr,
    /// Whether packets for nobody and from blocked sources are dropped by XDP in the
    /// device's driver, and not only by the program after it. `None`: unless the
    /// device is a veth, which has nothing to gain by it.
    #[serde(default)]
    pub early_drop: Option<bool>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    pub id: InterfaceId,
    pub device: Device,
    pub mac: Mac,
    pub vpc: VpcId,
    /// The interface's private address, inside `subnet`.
    pub address: Ipv4Addr,
    pub subnet: Ipv4Net,
    /// The 1:1 public address, answered for on the uplink.
    pub elastic: Option<Ipv4Addr>,
    pub groups: Vec<GroupId>,
    /// Off for guests that route for others.
    pub source_check: bool,
    pub dhcp: Dhcp,
    /// What the metadata service answers: path below `/latest/` (or a dated
    /// version) → document, such as `meta-data/instance-id` → `i-…`. Folders
    /// are implied. `None`: no metadata service on this interface.
    ///
    /// - A path that is a document *and* a folder is a labelled folder: with
    ///   `meta-data/public-keys/0` → `my-key` and
    ///   `meta-data/public-keys/0/openssh-key` → `ssh-…`, `public-keys/` lists
    ///   `0=my-key` and `public-keys/0/` lists `openssh-key`.
    /// - A value that begins with `base64:` is served as the bytes that the rest
    ///   stands for; user data belongs into one, whatever it holds.
    pub metadata: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// A tap that the dataplane makes, and removes when the interface goes.
    Tap { name: String, owner_uid: u32 },
    /// A device that someone else made, named as this host sees it.
    Existing { name: String },
}

impl Device {
    pub fn name(&self) -> &str {
        match self {
            Self::Tap { name, .. } | Self::Existing { name } => name,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dhcp {
    pub hostname: String,
    pub domain: String,
    pub dns: Vec<Ipv4Addr>,
    pub mtu: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    pub generation: u64,
    /// Map writes, devices made and removed.
    pub changes: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    /// Where the eBPF object came from, and its digest.
    pub object: ObjectOrigin,
    /// Of the state in force; 0 while an accepted one is not applied whole.
    pub generation: u64,
    /// Whether the programs were found pinned at start, and taken over.
    pub adopted: bool,
    pub flows: u64,
    pub interfaces: Vec<InterfaceStatus>,
    /// Packets by reason, all interfaces and the uplink's early drops together.
    pub reasons: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectOrigin {
    /// `built`, `prebuilt`, or the path that the environment named.
    pub origin: String,
    pub sha256: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    pub id: InterfaceId,
    pub device: String,
    pub address: Ipv4Addr,
    pub elastic: Option<Ipv4Addr>,
    /// Packets by reason, drops and accepts alike.
    pub reasons: BTreeMap<String, u64>,
}

/// "What would you do with this packet?"
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    pub interface: InterfaceId,
    pub direction: Direction,
    pub protocol: u8,
    pub remote: Ipv4Addr,
    pub remote_port: u16,
    pub local_port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub allowed: bool,
    pub reason: String,
    pub rule: Option<model::RuleId>,
}

impl Client {
    pub async fn dataplane_status(&self) -> Result<Status, Error> {
        self.get("/v1/status").await
    }

    pub async fn dataplane_apply(&self, desired: &Desired) -> Result<Applied, Error> {
        self.put("/v1/desired", desired).await
    }

    pub async fn dataplane_why(&self, question: &Question) -> Result<Verdict, Error> {
        self.post("/v1/why", question).await
    }
}
