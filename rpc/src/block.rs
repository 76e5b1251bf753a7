//! `block-server.sock`: volumes and their exports. It knows nothing of
//! instances or images; a volume's first content is a file.
//!
//! | call | body → answer |
//! |---|---|
//! | `GET /v1/status` | → [`Status`] |
//! | `GET /v1/volumes` | → `[`[`Volume`]`]` |
//! | `PUT /v1/volumes/{id}` | [`NewVolume`] → [`Volume`]; the same again is no error |
//! | `DELETE /v1/volumes/{id}` | → `null`; refused while exported; a missing one is no error |
//! | `PUT /v1/volumes/{id}/quality` | [`Quality`] → [`Volume`]; at once, for what waits too |
//! | `PUT /v1/volumes/{id}/size` | [`NewSize`] → [`Volume`]; grows only; the same again is no error |
//! | `PUT /v1/volumes/{id}/quiesced` | [`Quiesce`] → `null`, once all that was acknowledged is durable; changes wait until the deadline |
//! | `DELETE /v1/volumes/{id}/quiesced` | → `null`; changes go on |
//! | `GET /v1/exports` | → `[`[`Export`]`]` |
//! | `PUT /v1/exports/{name}` | [`NewExport`] → [`Export`]; a higher generation takes the volume over |
//! | `DELETE /v1/exports/{name}` | → `null`; drains, then closes; a missing one is no error |
//! | `PUT /v1/exports/{name}/drained` | → `null`, once what is in flight is answered and no connection is left; new ones are refused |
//! | `DELETE /v1/exports/{name}/drained` | → `null`; connections are accepted again |
//! | `GET /v1/connections` | → `[`[`Connection`]`]` |
//! | `DELETE /v1/connections/{id}` | → `null`; answers what is in flight, then closes; a missing one is no error |
//! | `GET /v1/statistics` | → `[`[`VolumeStatistics`]`]`, of the volumes that are exported |
//! | `PUT /v1/slow-log` | [`SlowLog`] → `null` |
//! | `GET /metrics` | → Prometheus' text |

use std::collections::BTreeMap;
use std::path::PathBuf;

use model::{Limits, Rate, VolumeId, VolumeKind};
use serde::{Deserialize, Serialize};

use crate::{Client, Error};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewVolume {
    /// A multiple of 4096.
    pub size_bytes: u64,
    /// A raw file whose bytes the volume begins with; the rest reads as zeros.
    pub source: Option<PathBuf>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub id: VolumeId,
    pub size_bytes: u64,
    /// Bytes that the volume occupies in the store.
    pub allocated_bytes: u64,
    pub state: VolumeHealth,
    #[serde(default)]
    pub quality: Quality,
    /// What follows from it, and from the size.
    #[serde(default)]
    pub limits: Limits,
}

/// How fast a volume may be. With a kind: that kind's, with what it lets one ask
/// for. Without: the figures as they are, and no limit where none is given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quality {
    #[serde(default)]
    pub kind: Option<VolumeKind>,
    /// Operations a second.
    #[serde(default)]
    pub iops: Option<u64>,
    /// MiB a second.
    #[serde(default)]
    pub throughput_mib: Option<u64>,
}

impl Quality {
    /// The limits for a volume of that size, or why there are none.
    pub fn limits(&self, size_bytes: u64) -> Result<Limits, String> {
        if let Some(kind) = self.kind {
            let gib = size_bytes.div_ceil(1 << 30);
            return kind
                .limits(gib, self.iops, self.throughput_mib)
                .map_err(|unfit| format!("{kind}: {unfit}"));
        }
        let steady = |rate: Option<u64>, unit: u64, what| match rate {
            None => Ok(None),
            Some(rate) if (1..=u64::MAX >> 32).contains(&rate) => {
                Ok(Some(Rate::steady(rate * unit)))
            }
            Some(rate) => {
                Err(format!("{what} {rate}: it must be between 1 and {}", u64::MAX >> 32))
            }
        };
        Ok(Limits {
            operations: steady(self.iops, 1, "IOPS")?,
            bytes: steady(self.throughput_mib, 1 << 20, "throughput")?,
            unit_bytes: Limits::UNIT,
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewSize {
    /// A multiple of 4096, not below the present size.
    pub size_bytes: u64,
    /// Ends the volume's connections when what they have in flight is answered:
    /// a client that reconnects sees the new size.
    #[serde(default)]
    pub reconnect: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Quiesce {
    /// Changes go on after that time even if nobody says so; at most 60 000.
    pub deadline_ms: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlowLog {
    /// Requests that take as long are logged; 0: none.
    pub threshold_ms: u64,
}

/// One NBD connection.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Connection {
    pub id: u64,
    /// `None` while it has chosen none.
    pub export: Option<String>,
    /// `uid 64000 pid 1234`, or an address.
    pub peer: String,
    pub read_only: bool,
    pub in_flight: u64,
    /// Its next request waits for a limit, its turn, or the end of a quiesce.
    pub waits: bool,
    pub age_ms: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KindStatistics {
    pub operations: u64,
    pub bytes: u64,
    pub time_us: u64,
    pub errors: BTreeMap<String, u64>,
    /// Latencies below this, and at or above the one before, with their number.
    pub latencies_us: Vec<(u64, u64)>,
}

/// What a volume did since it was opened.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeStatistics {
    pub volume: String,
    pub in_flight: u64,
    /// Requests that waited for a limit or their turn, and how long in sum.
    pub throttled: u64,
    pub throttled_us: u64,
    pub syncs: u64,
    pub fences: u64,
    pub slow: u64,
    pub kinds: BTreeMap<String, KindStatistics>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeHealth {
    /// Its content is being copied in.
    Filling,
    Ready,
    /// Stopped to keep what is there; says why.
    Failed(String),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NewExport {
    pub volume: VolumeId,
    pub read_only: bool,
    /// Of the writer: a greater one fences the smaller, whose requests fail from then on.
    pub generation: u64,
    /// The user, beside root, that may connect.
    pub owner_uid: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    /// Also the NBD export name.
    pub name: String,
    pub volume: VolumeId,
    pub read_only: bool,
    pub generation: u64,
    pub owner_uid: Option<u32>,
    /// The NBD socket: `<run directory>/nbd/<name>.sock`.
    pub socket: PathBuf,
    /// The same disk for a guest whose memory its QEMU shares:
    /// `<run directory>/vhost/<name>.sock`.
    #[serde(default)]
    pub vhost_user: Option<PathBuf>,
    pub connections: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    /// `io_uring` or `threads`.
    pub engine: String,
    pub volumes: u64,
    pub exports: u64,
    pub connections: u64,
}

impl Client {
    pub async fn block_status(&self) -> Result<Status, Error> {
        self.get("/v1/status").await
    }

    pub async fn volumes(&self) -> Result<Vec<Volume>, Error> {
        self.get("/v1/volumes").await
    }

    pub async fn put_volume(&self, id: VolumeId, new: &NewVolume) -> Result<Volume, Error> {
        self.put(&format!("/v1/volumes/{id}"), new).await
    }

    pub async fn delete_volume(&self, id: VolumeId) -> Result<(), Error> {
        self.delete(&format!("/v1/volumes/{id}")).await
    }

    pub async fn set_quality(&self, id: VolumeId, quality: &Quality) -> Result<Volume, Error> {
        self.put(&format!("/v1/volumes/{id}/quality"), quality).await
    }

    pub async fn resize_volume(&self, id: VolumeId, size: NewSize) -> Result<Volume, Error> {
        self.put(&format!("/v1/volumes/{id}/size"), &size).await
    }

    pub async fn quiesce_volume(&self, id: VolumeId, quiesce: Quiesce) -> Result<(), Error> {
        self.put(&format!("/v1/volumes/{id}/quiesced"), &quiesce).await
    }

    pub async fn resume_volume(&self, id: VolumeId) -> Result<(), Error> {
        self.delete(&format!("/v1/volumes/{id}/quiesced")).await
    }

    pub async fn drain_export(&self, name: &str) -> Result<(), Error> {
        self.put(&format!("/v1/exports/{name}/drained"), &()).await
    }

    pub async fn undrain_export(&self, name: &str) -> Result<(), Error> {
        self.delete(&format!("/v1/exports/{name}/drained")).await
    }

    pub async fn connections(&self) -> Result<Vec<Connection>, Error> {
        self.get("/v1/connections").await
    }

    pub async fn disconnect(&self, id: u64) -> Result<(), Error> {
        self.delete(&format!("/v1/connections/{id}")).await
    }

    pub async fn volume_statistics(&self) -> Result<Vec<VolumeStatistics>, Error> {
        self.get("/v1/statistics").await
    }

    pub async fn set_slow_log(&self, slow: SlowLog) -> Result<(), Error> {
        self.put("/v1/slow-log", &slow).await
    }

    pub async fn exports(&self) -> Result<Vec<Export>, Error> {
        self.get("/v1/exports").await
    }

    pub async fn put_export(&self, name: &str, new: &NewExport) -> Result<Export, Error> {
        self.put(&format!("/v1/exports/{name}"), new).await
    }

    pub async fn delete_export(&self, name: &str) -> Result<(), Error> {
        self.delete(&format!("/v1/exports/{name}")).await
    }
}
