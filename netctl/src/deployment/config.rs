//! What `up` was asked for, written down for the supervisor, `status` and the
//! next `up`.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use ipnet::Ipv4Net;
use rpc::Deployment;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::place::{DAEMONS, Files};
use super::replace::TAKES_OVER;
use crate::failure::{Failure, Outcome};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    pub name: String,
    pub state_dir: PathBuf,
    pub run_dir: PathBuf,
    /// The folder that the daemons' executables are taken from.
    pub libexec: PathBuf,
    /// This host's name, under which it reports to `control`.
    pub host: String,
    pub listen: SocketAddr,
    pub region: String,
    pub zone: String,
    pub uplink: Uplink,
    /// Further options of `control`.
    #[serde(default)]
    pub packets: Vec<String>,
    /// How long a daemon may take until it says `ready`.
    pub ready_within_s: u64,
    /// By which front of the block server guests reach their volumes. A
    /// deployment that an older netctl started has none written down.
    #[serde(default)]
    pub block_front: BlockFront,
}

/// What the agent is asked for; see its `--block-front`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum BlockFront {
    /// vhost-user where QEMU has it, NBD otherwise
    #[default]
    Auto,
    Nbd,
    /// vhost-user, and an error where it cannot be
    VhostUser,
}

impl BlockFront {
    const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Nbd => "nbd",
            Self::VhostUser => "vhost-user",
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    pub device: String,
    pub gateway: Ipv4Addr,
    pub elastic_range: Ipv4Net,
    /// The subnet of the uplink that `up` made for itself; `None` where the
    /// user named a device.
    pub own_subnet: Option<Ipv4Net>,
}

impl Config {
    pub fn deployment(&self) -> Outcome<Deployment> {
        Deployment::new(&self.name, &self.state_dir, &self.run_dir)
            .map_err(|e| Failure::unfit(e.message))
    }

    pub fn read(deployment: &Deployment) -> Outcome<Option<Self>> {
        read_json(&deployment.config_file())
    }

    pub fn executable(&self, daemon: &str) -> PathBuf {
        self.libexec.join(daemon)
    }

    /// `ACT --name … --state-dir … --run-dir …`: every daemon's acts take these.
    pub fn arguments(&self, act: &str) -> Vec<OsString> {
        let mut arguments: Vec<OsString> = vec![act.into()];
        arguments.extend(["--name".into(), self.name.clone().into()]);
        arguments.extend(["--state-dir".into(), self.state_dir.clone().into()]);
        arguments.extend(["--run-dir".into(), self.run_dir.clone().into()]);
        arguments
    }

    /// What `daemon` is started with.
    pub fn daemon_arguments(&self, daemon: &str) -> Vec<OsString> {
        debug_assert!(DAEMONS.contains(&daemon));
        let mut arguments = self.arguments("daemon");
        if daemon == TAKES_OVER {
            arguments.push("--take-over".into());
        }
        if daemon == "control" {
            for (option, value) in [
                ("--listen", self.listen.to_string()),
                ("--region", self.region.clone()),
                ("--zone", self.zone.clone()),
                ("--uplink", self.uplink.device.clone()),
                ("--uplink-gateway", self.uplink.gateway.to_string()),
                ("--elastic-range", self.uplink.elastic_range.to_string()),
                ("--host", self.host.clone()),
            ] {
                arguments.extend([option.into(), value.into()]);
            }
            arguments.extend(self.packets.iter().map(Into::into));
        }
        if daemon == "agent" {
            arguments.extend(["--host".into(), self.host.clone().into()]);
            arguments.extend(["--block-front".into(), self.block_front.name().into()]);
        }
        arguments
    }
}

/// Reads a file of ours; `None` where there is none.
pub fn read_json<T: DeserializeOwned>(path: &Path) -> Outcome<Option<T>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(Failure::failed(format!("file {}: read: {e}", path.display()))),
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|e| Failure::failed(format!("file {}: parse: {e}", path.display())))
}

/// Writes a file so that a reader finds the old content or the new, never a part.
pub fn write_json<T: Serialize>(path: &Path, value: &T) -> Outcome {
    let failed =
        |e: &dyn std::fmt::Display| Failure::failed(format!("file {}: write: {e}", path.display()));
    let bytes = serde_json::to_vec_pretty(value).map_err(|e| failed(&e))?;
    let pending = path.with_extension(format!("new.{}", std::process::id()));
    fs::write(&pending, bytes).and_then(|()| fs::rename(&pending, path)).map_err(|e| failed(&e))
}
