//! `control.sock`, the administrators' part. The EC2 Query API is served at `/`
//! of the same socket, without a signature: the kernel vouches for the caller.
//!
//! | call | body → answer |
//! |---|---|
//! | `GET /admin/v1/status` | → [`Status`] |
//! | `GET /admin/v1/access-key` | → [`AccessKey`]: the first one, made with the store |

use serde::{Deserialize, Serialize};

use crate::{Client, Error};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub region: String,
    pub zone: String,
    /// `http://127.0.0.1:8773`.
    pub endpoint: String,
    /// The store's last revision.
    pub revision: u64,
    pub store: String,
    pub hosts: Vec<HostStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostStatus {
    pub host: String,
    /// The desired revision that it last reported on; `None` before its first report.
    pub observed_revision: Option<u64>,
    pub desired_revision: u64,
    pub last_report_ms_ago: Option<u64>,
}

#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessKey {
    pub access_key_id: String,
    pub secret_access_key: String,
    pub region: String,
}

/// Never shows the secret.
impl std::fmt::Debug for AccessKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AccessKey")
            .field("access_key_id", &self.access_key_id)
            .finish_non_exhaustive()
    }
}

impl Client {
    pub async fn control_status(&self) -> Result<Status, Error> {
        self.get("/admin/v1/status").await
    }

    pub async fn access_key(&self) -> Result<AccessKey, Error> {
        self.get("/admin/v1/access-key").await
    }
}
