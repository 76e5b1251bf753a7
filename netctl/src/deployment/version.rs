//! `netctl version`: what is installed and what runs, the eBPF object included.

use std::process::Command;
use std::time::Duration;

use rpc::Client;
use rpc::dataplane::ObjectOrigin;
use serde::Serialize;

use super::place::{DAEMONS, Place};
use super::up::libexec;
use crate::failure::Outcome;
use crate::output::{self, Format};

/// A daemon that is well answers at once.
const ASK_WITHIN: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize)]
struct Versions {
    netctl: &'static str,
    daemons: Vec<DaemonVersion>,
    /// The eBPF object that the running dataplane has loaded.
    ebpf_object: Option<ObjectOrigin>,
}

#[derive(Debug, Serialize)]
struct DaemonVersion {
    name: &'static str,
    installed: Option<String>,
    running: Option<String>,
}

pub fn run(place: &Place, format: Format) -> Outcome {
    let deployment = place.deployment()?;
    let client = |daemon: &str| Client::new(deployment.socket_of(daemon)).with_timeout(ASK_WITHIN);
    let dataplane = crate::wait_for(client("dataplane").dataplane_status()).ok();
    let running = |daemon: &str| match daemon {
        "dataplane" => dataplane.as_ref().map(|s| s.version.clone()),
        "block-server" => crate::wait_for(client(daemon).block_status()).ok().map(|s| s.version),
        "control" => crate::wait_for(client(daemon).control_status()).ok().map(|s| s.version),
        _ => crate::wait_for(client(daemon).agent_status()).ok().map(|s| s.version),
    };
    let versions = Versions {
        netctl: env!("CARGO_PKG_VERSION"),
        daemons: DAEMONS
            .iter()
            .map(|name| DaemonVersion { name, installed: installed(name), running: running(name) })
            .collect(),
        ebpf_object: dataplane.as_ref().map(|s| s.object.clone()),
    };
    if format == Format::Json {
        return output::json(&versions);
    }
    let or_none = |text: Option<&str>| text.unwrap_or("-").to_owned();
    let mut rows =
        vec![vec!["netctl".to_owned(), versions.netctl.to_owned(), versions.netctl.to_owned()]];
    rows.extend(versions.daemons.iter().map(|d| {
        vec![d.name.to_owned(), or_none(d.installed.as_deref()), or_none(d.running.as_deref())]
    }));
    output::table(&["PROGRAM", "INSTALLED", "RUNNING"], &rows);
    output::line(&match &versions.ebpf_object {
        Some(object) => format!("eBPF object: {}, sha256 {}", object.origin, object.sha256),
        None => {
            "eBPF object: none is loaded by this deployment (the dataplane does not run)".to_owned()
        }
    });
    Ok(())
}

/// `DAEMON --version` prints `name version`.
fn installed(daemon: &str) -> Option<String> {
    let output = Command::new(libexec().join(daemon)).arg("--version").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.split_ascii_whitespace().nth(1)?.to_owned())
}
