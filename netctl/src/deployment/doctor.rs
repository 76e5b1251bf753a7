//! `netctl doctor`: what this host offers, feature by feature, each with what
//! to do where it is missing. It changes nothing.

use std::fs;
use std::path::Path;
use std::process::Command;

use rustix::process::{Resource, getrlimit};
use serde::Serialize;

use super::preflight;
use crate::failure::{Failure, Outcome};
use crate::output::{self, Format};

/// QEMU 7.2 is Debian 12's, and the oldest that is tried.
const QEMU_MIN: (u32, u32) = (7, 2);

/// CAP_NET_ADMIN is capability 12, CAP_BPF 39 (linux/capability.h).
const CAPABILITIES: [(&str, u32); 2] = [("CAP_NET_ADMIN", 12), ("CAP_BPF", 39)];

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
enum Health {
    Good,
    /// It works, less well.
    Fair,
    /// Hostplane does not run without it.
    Bad,
}

#[derive(Debug, Serialize)]
struct Finding {
    what: &'static str,
    health: Health,
    found: String,
    fix: Option<String>,
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Self { what, health: Health::Good, found: found.into(), fix: None }
    }

    fn fair(what: &'static str, found: impl Into<String>, fix: &str) -> Self {
        Self { what, health: Health::Fair, found: found.into(), fix: Some(fix.to_owned()) }
    }

    fn bad(what: &'static str, found: impl Into<String>, fix: &str) -> Self {
        Self { what, health: Health::Bad, found: found.into(), fix: Some(fix.to_owned()) }
    }
}

pub fn run(format: Format) -> Outcome {
    let findings = vec![
        kernel(),
        capabilities(&fs::read_to_string("/proc/self/status").unwrap_or_default()),
        there("tun", "/dev/net/tun", "modprobe tun; in a container, pass the device in"),
        bpffs(),
        there("btf", "/sys/kernel/btf/vmlinux", "boot a kernel with CONFIG_DEBUG_INFO_BTF=y"),
        kvm(),
        io_uring(),
        memlock(),
        qemu(),
        iproute(),
        cgroup(),
    ];
    let bad = findings.iter().filter(|f| f.health == Health::Bad).count();
    if format == Format::Json {
        output::json(&findings)?;
    } else {
        let rows: Vec<Vec<String>> = findings
            .iter()
            .map(|f| {
                let mark = match f.health {
                    Health::Good => "good",
                    Health::Fair => "fair",
                    Health::Bad => "BAD",
                };
                let fix = f.fix.clone().unwrap_or_default();
                vec![f.what.to_owned(), mark.to_owned(), f.found.clone(), fix]
            })
            .collect();
        output::table(&["FEATURE", "HEALTH", "FOUND", "FIX"], &rows);
    }
    match bad {
        0 => Ok(()),
        n => Err(Failure::failed(format!(
            "this host: {n} feature{} missing that Hostplane does not run without",
            if n == 1 { " is" } else { "s are" }
        ))),
    }
}

fn kernel() -> Finding {
    match preflight::kernel() {
        None => Finding::good("kernel", preflight::release()),
        Some(line) => Finding::bad("kernel", line, "boot Linux 6.6 or newer"),
    }
}

/// From /proc/self/status: `CapEff:\t000001ffffffffff`.
fn capabilities(status: &str) -> Finding {
    let effective = status
        .lines()
        .find_map(|l| l.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .unwrap_or(0);
    let missing: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(_, bit)| effective & (1 << bit) == 0)
        .map(|(name, _)| *name)
        .collect();
    if missing.is_empty() {
        Finding::good("capabilities", "CAP_NET_ADMIN, CAP_BPF")
    } else {
        Finding::bad("capabilities", format!("no {}", missing.join(", ")), "sudo netctl doctor")
    }
}

fn there(what: &'static str, path: &str, fix: &str) -> Finding {
    if Path::new(path).exists() {
        Finding::good(what, path)
    } else {
        Finding::bad(what, format!("no {path}"), fix)
    }
}

fn bpffs() -> Finding {
    if preflight::is_bpffs() {
        Finding::good("bpffs", preflight::BPFFS)
    } else {
        Finding::fair("bpffs", "not mounted; `netctl up` mounts it", "mount -t bpf bpf /sys/fs/bpf")
    }
}

/// That the device is there proves nothing (a KVM in software hangs a stock
/// guest), so a hardware module must be loaded too; the agent goes on to boot a
/// probe guest.
fn kvm() -> Finding {
    let modules = ["kvm_intel", "kvm_amd"];
    let loaded = modules.iter().find(|m| Path::new("/sys/module").join(m).exists());
    match (Path::new("/dev/kvm").exists(), loaded) {
        (true, Some(module)) => Finding::good("kvm", format!("/dev/kvm, {module}")),
        (true, None) => Finding::fair(
            "kvm",
            "/dev/kvm without kvm_intel or kvm_amd: guests are emulated",
            "modprobe kvm_intel or kvm_amd; in a virtual machine, turn on nested virtualisation",
        ),
        (false, _) => Finding::fair(
            "kvm",
            "no /dev/kvm: guests are emulated, ten times slower",
            "turn on VT-x or AMD-V in the firmware, then modprobe kvm_intel or kvm_amd",
        ),
    }
}

/// kernel.io_uring_disabled, admin-guide/sysctl/kernel.rst: 2 forbids it to all.
fn io_uring() -> Finding {
    match fs::read_to_string("/proc/sys/kernel/io_uring_disabled").unwrap_or_default().trim() {
        "" | "0" | "1" => Finding::good("io_uring", "enabled"),
        _ => Finding::fair(
            "io_uring",
            "disabled: the block server uses threads, and is slower",
            "sysctl kernel.io_uring_disabled=0",
        ),
    }
}

/// The ring's buffers and, before Linux 5.11, eBPF maps are counted against it.
fn memlock() -> Finding {
    let limit = getrlimit(Resource::Memlock);
    match limit.current {
        None => Finding::good("memlock", "unlimited"),
        Some(bytes) if bytes >= 8 << 20 => Finding::good("memlock", format!("{} MiB", bytes >> 20)),
        Some(bytes) => Finding::fair(
            "memlock",
            format!("{} KiB: fewer registered buffers", bytes >> 10),
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit",
        ),
    }
}

fn qemu() -> Finding {
    let install = "apt-get install qemu-system-x86";
    let Ok(output) = Command::new("qemu-system-x86_64").arg("--version").output() else {
        return Finding::bad("qemu", "no qemu-system-x86_64 in PATH", install);
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default().to_owned();
    match qemu_version(&line) {
        Some(version) if version < QEMU_MIN => Finding::bad("qemu", line, install),
        Some((major, minor)) => Finding::good("qemu", format!("{major}.{minor}")),
        None => Finding::fair("qemu", format!("unknown version: {line}"), install),
    }
}

/// `QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)`.
fn qemu_version(line: &str) -> Option<(u32, u32)> {
    let mut numbers = line.split("version ").nth(1)?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn iproute() -> Finding {
    match preflight::find_program("ip") {
        Some(path) => Finding::good("iproute2", path.display().to_string()),
        None => Finding::bad("iproute2", "no ip in PATH", "apt-get install iproute2"),
    }
}

fn cgroup() -> Finding {
    let v2 = fs::read_to_string("/sys/fs/cgroup/cgroup.controllers").unwrap_or_default();
    if v2.split_ascii_whitespace().any(|c| c == "memory") {
        Finding::good("cgroup", format!("v2: {}", v2.trim()))
    } else if Path::new("/sys/fs/cgroup/memory").exists() {
        Finding::good("cgroup", "v1: memory, cpu")
    } else {
        Finding::fair(
            "cgroup",
            "no memory controller: guests share without limits",
            "mount cgroup2, or boot with systemd.unified_cgroup_hierarchy=1",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn qemu_says_its_version_in_its_first_line() {
        let debian = "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)";
        assert_eq!(qemu_version(debian), Some((7, 2)));
        assert_eq!(qemu_version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(qemu_version("something else"), None);
    }

    #[test]
    fn a_missing_capability_is_named() {
        assert_eq!(capabilities("CapEff:\t000001ffffffffff\n").health, Health::Good);
        let finding = capabilities("Name:\tx\nCapEff:\t0000000000001000\n");
        assert_eq!(finding.found, "no CAP_BPF");
        assert_eq!(capabilities("").health, Health::Bad);
    }
}
