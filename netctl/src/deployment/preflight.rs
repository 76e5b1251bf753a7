//! What this machine must have before anything is started. Everything that is
//! missing is said at once, a line each, with what to do.

use std::fs;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use rpc::Deployment;

use super::config::Config;
use super::place::{DAEMONS, Files};
use crate::failure::{Failure, Outcome};

/// tcx came with Linux 6.6.
pub const KERNEL_MIN: (u32, u32) = (6, 6);

pub const BPFFS: &str = "/sys/fs/bpf";

/// Checks that both directories are ours or free to take. It comes before all
/// else, since a lock needs a directory.
pub fn check_directories(deployment: &Deployment) -> Outcome {
    let lines: Vec<String> = [
        directory("run", deployment.run_dir(), &deployment.config_file()),
        directory("state", deployment.state_dir(), &deployment.state_marker()),
    ]
    .into_iter()
    .flatten()
    .collect();
    if lines.is_empty() { Ok(()) } else { Err(Failure::Unfit(lines)) }
}

/// Checks everything that `up` needs before it changes anything.
pub fn check(config: &Config) -> Outcome {
    let mut lines: Vec<String> = [
        kernel(),
        tun(),
        program("qemu-system-x86_64", "qemu-system-x86"),
        program("ip", "iproute2"),
        bpffs(),
        port(config.listen),
    ]
    .into_iter()
    .flatten()
    .collect();
    lines.extend(DAEMONS.iter().filter_map(|d| executable(&config.executable(d))));
    if config.uplink.own_subnet.is_none() && !super::uplink::has_device(&config.uplink.device) {
        lines.push(format!(
            "uplink {}: there is no such device; see `ip link`, or leave --uplink out",
            config.uplink.device
        ));
    }
    if lines.is_empty() { Ok(()) } else { Err(Failure::Unfit(lines)) }
}

pub fn not_root() -> Option<String> {
    (!nix::unistd::geteuid().is_root()).then(|| "must be run as root: use sudo".to_owned())
}

pub fn kernel() -> Option<String> {
    let release = release();
    (parse_release(&release)? < KERNEL_MIN).then(|| {
        format!(
            "kernel {release} is too old: tcx needs Linux {}.{}; boot a newer kernel \
             (Debian: bookworm-backports, Ubuntu: linux-generic-hwe)",
            KERNEL_MIN.0, KERNEL_MIN.1
        )
    })
}

pub fn release() -> String {
    nix::sys::utsname::uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// `6.6.0-rc1-amd64` → (6, 6). A release that nobody can read is not held
/// against the kernel: loading the programs will tell.
fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

pub fn tun() -> Option<String> {
    (!Path::new("/dev/net/tun").exists()).then(|| {
        "no /dev/net/tun: guests' interfaces are taps; `modprobe tun`, or give this container the device"
            .to_owned()
    })
}

pub fn find_program(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).map(|d| d.join(name)).find(|p| p.is_file())
}

fn program(name: &str, package: &str) -> Option<String> {
    find_program(name).is_none().then(|| format!("no {name} in PATH: `apt-get install {package}`"))
}

pub fn is_bpffs() -> bool {
    statfs(BPFFS).is_ok_and(|fs| fs.filesystem_type() == BPF_FS_MAGIC)
}

/// Mounts bpffs where it is missing. It stays mounted after `down`, as every
/// init system mounts it too.
fn bpffs() -> Option<String> {
    if is_bpffs() {
        return None;
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), Some("mode=0700")).err().map(|e| {
        format!(
            "bpffs cannot be mounted at {BPFFS}: {e}; it keeps the programs over a restart: \
             `mount -t bpf bpf {BPFFS}`, and CONFIG_BPF_SYSCALL in the kernel"
        )
    })
}

/// A directory is fit if it can be written, and is empty or bears our mark; one
/// that is not there yet, if it can be made. Nothing is changed.
fn directory(which: &str, dir: &Path, mark: &Path) -> Option<String> {
    let unfit = |e: &dyn std::fmt::Display| {
        format!("{which} directory {}: {e}; choose another with --{which}-dir", dir.display())
    };
    let existing = dir.ancestors().find(|a| a.exists()).unwrap_or(Path::new("/"));
    if let Err(e) = rustix::fs::access(existing, rustix::fs::Access::WRITE_OK) {
        return Some(unfit(&format_args!("{} cannot be written: {e}", existing.display())));
    }
    if existing != dir || mark.exists() {
        return None;
    }
    match fs::read_dir(dir) {
        Ok(mut entries) => {
            entries.next().is_some().then(|| unfit(&"it holds files that are not Hostplane's"))
        }
        Err(e) => Some(unfit(&e)),
    }
}

fn port(listen: SocketAddr) -> Option<String> {
    match TcpListener::bind(listen) {
        Ok(_) => None,
        Err(e) if e.kind() == ErrorKind::AddrInUse => Some(format!(
            "address {listen} is in use by another program: choose another with --listen"
        )),
        Err(e) => Some(format!("address {listen}: {e}; choose another with --listen")),
    }
}

fn executable(path: &Path) -> Option<String> {
    (!path.is_file()).then(|| {
        format!(
            "no {}: build the daemons (`./x build`), or name their folder in HOSTPLANE_LIBEXEC",
            path.display()
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_kernel_is_judged_by_its_first_two_numbers() {
        assert_eq!(parse_release("6.6.0-rc1-amd64"), Some((6, 6)));
        assert_eq!(parse_release("6.18.5"), Some((6, 18)));
        assert!(parse_release("6.1.0-18-cloud-amd64").unwrap() < KERNEL_MIN);
        assert!(parse_release("5.15").unwrap() < KERNEL_MIN);
        assert_eq!(parse_release("strange"), None);
    }

    #[test]
    fn a_directory_with_strangers_in_it_is_refused_and_one_with_our_mark_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let mark = dir.path().join("deployment.json");
        assert_eq!(directory("run", dir.path(), &mark), None);
        fs::write(dir.path().join("thesis.tex"), b"x").unwrap();
        assert!(directory("run", dir.path(), &mark).unwrap().contains("not Hostplane's"));
        fs::write(&mark, b"{}").unwrap();
        assert_eq!(directory("run", dir.path(), &mark), None);
    }

    #[test]
    fn a_port_in_use_is_named() {
        let holder = TcpListener::bind("127.0.0.1:0").unwrap();
        let line = port(holder.local_addr().unwrap()).unwrap();
        assert!(line.contains("in use") && line.contains("--listen"), "{line}");
    }
}
