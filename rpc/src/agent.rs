//! `agent.sock`: what runs on this host, and the images that it can run.
//!
//! | call | body → answer |
//! |---|---|
//! | `GET /v1/status` | → [`Status`] |
//! | `GET /v1/instances/{id}/console` | → [`Console`] |
//! | `GET /v1/images` | → `[`[`Image`]`]` |
//! | `POST /v1/images/build` | [`BuildImage`] → [`Image`] |
//! | `POST /v1/images/import` | [`ImportImage`] → [`Image`] |
//! | `DELETE /v1/images/{name}` | → `null`; a missing one is no error |
//!
//! A new image is answered once control has heard of it, so that it can be
//! registered at once; where control is away, a few seconds later.

use std::path::PathBuf;
use std::time::Duration;

use model::{InstanceId, InstanceState};
use serde::{Deserialize, Serialize};

use crate::{Client, Error};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    /// `kvm` or `tcg`, and why.
    pub accelerator: String,
    pub accelerator_reason: String,
    pub instances: Vec<InstanceStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceStatus {
    pub id: InstanceId,
    pub state: InstanceState,
    pub pid: Option<u32>,
    /// Whether this QEMU was started by an earlier agent and taken over.
    pub adopted: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Console {
    /// The last 64 KiB of the serial console, base64.
    pub output_base64: String,
    /// Seconds since the epoch of its last change.
    pub changed_at_s: u64,
}

/// A machine image on this host. `name` is what `RegisterImage` takes as `ImageLocation`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    pub name: String,
    /// Of its root disk.
    pub size_bytes: u64,
    /// Whether it brings a kernel and an initrd of its own, or boots from its disk's boot loader.
    pub direct_boot: bool,
    pub sha256: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BuildImage {
    /// What to build: `tiny`.
    pub recipe: String,
    pub name: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImportImage {
    /// A raw or qcow2 file on this host.
    pub file: PathBuf,
    pub name: String,
}

/// Making an image reads packages and writes a disk: it may take minutes.
const IMAGE_TIMEOUT: Duration = Duration::from_secs(900);

impl Client {
    pub async fn agent_status(&self) -> Result<Status, Error> {
        self.get("/v1/status").await
    }

    pub async fn console(&self, id: InstanceId) -> Result<Console, Error> {
        self.get(&format!("/v1/instances/{id}/console")).await
    }

    pub async fn images(&self) -> Result<Vec<Image>, Error> {
        self.get("/v1/images").await
    }

    pub async fn build_image(&self, build: &BuildImage) -> Result<Image, Error> {
        self.with_timeout(IMAGE_TIMEOUT).post("/v1/images/build", build).await
    }

    pub async fn import_image(&self, import: &ImportImage) -> Result<Image, Error> {
        self.with_timeout(IMAGE_TIMEOUT).post("/v1/images/import", import).await
    }

    pub async fn delete_image(&self, name: &str) -> Result<(), Error> {
        self.delete(&format!("/v1/images/{name}")).await
    }
}
