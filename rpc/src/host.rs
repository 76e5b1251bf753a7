//! `control.sock`, the agents' part: a host asks what it should be and tells
//! what it is. Level-triggered: each side always says the whole.
//!
//! | call | body → answer |
//! |---|---|
//! | `GET /host/v1/{host}/desired?after=N&wait_ms=M` | → [`Desired`]; waits up to M ms for a revision above N, then answers with what there is |
//! | `PUT /host/v1/{host}/observed` | [`Observed`] → `null` |

use model::{AttachmentState, InstanceId, InstanceState, InterfaceId, Mac, VolumeId, VolumeState};
use serde::{Deserialize, Serialize};

use crate::agent::Image;
use crate::block::Quality;
use crate::{Client, Error, dataplane};

/// Everything that one host should be.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Desired {
    pub revision: u64,
    pub instances: Vec<Instance>,
    /// Volumes in this host's care, root volumes included. One that is missing
    /// here is left alone: only `deleted` removes data.
    pub volumes: Vec<Volume>,
    pub network: dataplane::Desired,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    pub id: InstanceId,
    pub run: Run,
    /// Grows by one for each start asked for; a guest that powered itself off
    /// stays off until this grows.
    pub starts: u64,
    /// Grows by one for each reboot asked for.
    pub reboots: u64,
    pub vcpus: u32,
    pub memory_mib: u64,
    /// Name of the image on the host, for its kernel where it brings one.
    pub image: String,
    /// The first is the primary one.
    pub interfaces: Vec<AttachedInterface>,
    /// The one with `boot` is the root.
    pub volumes: Vec<Attachment>,
    /// Hot-plug slots kept free for further volumes.
    pub volumes_max: u32,
}

/// Lasting intent. A reboot is a count, so that none is lost or done twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Run {
    Running,
    Stopped,
    Terminated,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedInterface {
    pub id: InterfaceId,
    /// The tap that the dataplane makes for it (`network.interfaces`).
    pub device: String,
    pub mac: Mac,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    pub volume: VolumeId,
    /// As the user named it: `/dev/sdf`. The guest sees the volume's id as the disk's serial.
    pub device: String,
    /// Of the writer; raised at each attach.
    pub generation: u64,
    pub boot: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub id: VolumeId,
    /// Grows when a volume is resized; a running guest sees it.
    pub size_bytes: u64,
    /// Name of the image that it begins as.
    pub image: Option<String>,
    /// How fast it may be.
    #[serde(default)]
    pub quality: Quality,
    pub deleted: bool,
}

/// Everything that one host is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Observed {
    /// The desired revision that was last looked at.
    pub revision: u64,
    pub accelerator: String,
    pub vcpus: u32,
    pub memory_mib: u64,
    pub instances: Vec<ObservedInstance>,
    pub volumes: Vec<ObservedVolume>,
    pub images: Vec<Image>,
    /// The network generation that the dataplane has applied.
    pub network_generation: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedInstance {
    pub id: InstanceId,
    pub state: InstanceState,
    /// The `starts` and `reboots` that this state answers.
    pub starts: u64,
    pub reboots: u64,
    /// Why it is not what was asked for, for people: `Server.InternalError: …`.
    pub reason: Option<String>,
    pub attachments: Vec<ObservedAttachment>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedAttachment {
    pub volume: VolumeId,
    pub state: AttachmentState,
}

/// `state` is `creating`, `available` (its data is there, attached or not),
/// `deleting` or `error`. A deleted volume is missing from the list.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObservedVolume {
    pub id: VolumeId,
    pub state: VolumeState,
    pub reason: Option<String>,
    /// The size that it has; 0 while that is not known.
    #[serde(default)]
    pub size_bytes: u64,
}

impl Client {
    pub async fn host_desired(
        &self,
        host: &str,
        after: u64,
        wait_ms: u64,
    ) -> Result<Desired, Error> {
        self.get(&format!("/host/v1/{host}/desired?after={after}&wait_ms={wait_ms}")).await
    }

    pub async fn host_observed(&self, host: &str, observed: &Observed) -> Result<(), Error> {
        self.put(&format!("/host/v1/{host}/observed"), observed).await
    }
}
