//! What a deployment may have left on this host: looked for where such things
//! live, not where our records say, so that it also finds what no record names.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use rpc::Deployment;

use super::uplink::{has_namespace, ip};
use crate::failure::Outcome;

/// One thing that is left, and how to remove it by hand.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Leftover {
    pub what: String,
    pub remove: String,
}

impl Leftover {
    fn new(what: impl Into<String>, remove: impl Into<String>) -> Self {
        Self { what: what.into(), remove: remove.into() }
    }
}

/// Everything that is there, the state directory apart.
pub fn find(deployment: &Deployment) -> Outcome<BTreeSet<Leftover>> {
    let mut left = BTreeSet::new();
    left.extend(processes(deployment));
    left.extend(devices(deployment)?);
    left.extend(loop_devices(deployment));
    let namespace = deployment.internet_namespace();
    if has_namespace(&namespace) {
        left.insert(Leftover::new(
            format!("namespace {namespace}"),
            format!("ip netns del {namespace}"),
        ));
    }
    for dir in [deployment.bpf_dir(), deployment.run_dir().to_owned()] {
        if dir.exists() {
            let dir = dir.display();
            left.insert(Leftover::new(format!("directory {dir}"), format!("rm -r {dir}")));
        }
    }
    Ok(left)
}

/// Processes whose command line names our run directory: daemons, guests. They
/// are only told of: a command line is no proof, so nothing is ended for it.
fn processes(deployment: &Deployment) -> Vec<Leftover> {
    let own = std::process::id();
    let ours = deployment.run_dir().to_string_lossy().into_owned();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else {
            continue;
        };
        // One that ended meanwhile, and the kernel's own, have no command line.
        let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let words: Vec<_> =
            line.split(|b| *b == 0).map(|w| String::from_utf8_lossy(w).into_owned()).collect();
        let program = Path::new(&words[0]).file_name().unwrap_or_default().to_string_lossy();
        let is_ours = super::place::DAEMONS.contains(&program.as_ref())
            || program == "netctl" && words.iter().any(|w| w == "supervise" || w == "launch")
            || program.starts_with("qemu-");
        if pid != own && is_ours && words.iter().any(|w| names(w, &ours)) {
            found.push(Leftover::new(format!("process {pid} ({program})"), format!("kill {pid}")));
        }
    }
    found
}

/// Whether `word` speaks of the directory itself or of something below it, and
/// not of one whose name merely begins alike.
fn names(word: &str, dir: &str) -> bool {
    word.match_indices(dir).any(|(at, _)| {
        matches!(word.as_bytes().get(at + dir.len()), None | Some(b'/' | b',' | b':' | b'"'))
    })
}

/// Devices named after the deployment: `<name>-…`.
fn devices(deployment: &Deployment) -> Outcome<Vec<Leftover>> {
    let prefix = format!("{}-", deployment.name());
    Ok(device_names(&ip(&["-o", "link", "show"])?)
        .filter(|device| device.starts_with(&prefix))
        .map(|device| Leftover::new(format!("device {device}"), format!("ip link del {device}")))
        .collect())
}

/// From `ip -o link`: `7: hp-up@if2: <BROADCAST,…`.
fn device_names(listing: &str) -> impl Iterator<Item = &str> {
    listing.lines().filter_map(|line| {
        let name = line.split(": ").nth(1)?;
        name.split('@').next()
    })
}

fn loop_devices(deployment: &Deployment) -> Vec<Leftover> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let file = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        let file = Path::new(file.trim_end());
        if file.starts_with(deployment.run_dir()) || file.starts_with(deployment.state_dir()) {
            let device = format!("/dev/{}", entry.file_name().to_string_lossy());
            found.push(Leftover::new(
                format!("loop device {device} on {}", file.display()),
                format!("losetup -d {device}"),
            ));
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_whose_name_begins_alike_is_another() {
        assert!(names("/run/hostplane", "/run/hostplane"));
        assert!(names("unix:/run/hostplane/nbd/a.sock", "/run/hostplane"));
        assert!(names("path=/run/hostplane,server=on", "/run/hostplane"));
        assert!(!names("/run/hostplane-two/agent.sock", "/run/hostplane"));
    }

    #[test]
    fn device_names_lose_their_peer() {
        let listing = "1: lo: <LOOPBACK,UP> mtu 65536\n7: hp-up@if2: <BROADCAST> mtu 1500\n";
        assert_eq!(device_names(listing).collect::<Vec<_>>(), ["lo", "hp-up"]);
    }
}
