//! `block-server.sock`: volumes and their exports. It knows nothing of
//! instances or images; a volume's first content is a file.
//!
//! | call | body → answer |
//! |---|---|
//! | `GET /v1/status` | → [`Status`] |
//! | `GET /v1/volumes` | → `[`[`Volume`]`]` |
//! | `PUT /v1/volumes/{id}` | [`NewVolume`] → [`Volume`]; the same again is no error |
//! | `DELETE /v1/volumes/{id}` | → `null`; refused while exported; a missing one is no error |
//! | `GET /v1/exports` | → `[`[`Export`]`]` |
//! | `PUT /v1/exports/{name}` | [`NewExport`] → [`Export`]; a higher generation takes the volume over |
//! | `DELETE /v1/exports/{name}` | → `null`; drains, then closes; a missing one is no error |

use std::path::PathBuf;

use model::VolumeId;
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
