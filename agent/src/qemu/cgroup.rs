//! A control group for each guest, so that none takes more memory, time or
//! threads than it was given. Serves version 2 and version 1; a controller that
//! the host does not offer is a warning, because a guest without that limit is
//! better than none.
//!
//! ```text
//!   v2: /sys/fs/cgroup/hostplane-<name>/<instance>/            memory.max cpu.max pids.max
//!   v1: /sys/fs/cgroup/<controller>/hostplane-<name>/<instance>/
//! ```

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where the hierarchies are mounted, by every distribution.
const ROOT: &str = "/sys/fs/cgroup";

/// QEMU's own memory beside the guest's: translated code, I/O buffers, device state.
const OVERHEAD_MIB: u64 = 512;

/// CPU time beside the vCPUs', for QEMU's own threads, in hundredths of a core.
const OVERHEAD_CPU_PERCENT: u64 = 50;

/// Threads and processes; a guest has about four and one a vCPU.
const PIDS_MAX: u64 = 1024;

const PERIOD_US: u64 = 100_000;

/// How long a group may take to become removable after its last process ended.
const REMOVE_TRIES: u32 = 20;

const CONTROLLERS: [&str; 3] = ["memory", "cpu", "pids"];

#[derive(Debug, Clone, Copy)]
pub struct Limits {
    pub vcpus: u32,
    pub memory_mib: u64,
}

#[derive(Debug, Clone)]
pub struct Cgroups {
    /// `hostplane-<name>`.
    parent: String,
}

enum Version {
    One,
    Two,
}

fn version() -> Version {
    if Path::new(ROOT).join("cgroup.controllers").exists() { Version::Two } else { Version::One }
}

impl Cgroups {
    pub fn new(deployment: &str) -> Self {
        Self { parent: format!("hostplane-{deployment}") }
    }

    fn parents(&self) -> Vec<PathBuf> {
        let root = Path::new(ROOT);
        match version() {
            Version::Two => vec![root.join(&self.parent)],
            Version::One => CONTROLLERS.iter().map(|c| root.join(c).join(&self.parent)).collect(),
        }
    }

    /// Makes the group of `instance` and gives the files by which to enter it.
    pub fn make(&self, instance: &str, limits: Limits) -> Vec<PathBuf> {
        let mut entries = Vec::new();
        for parent in self.parents() {
            match make(&parent, instance, limits) {
                Ok(procs) => entries.push(procs),
                Err(error) => {
                    tracing::warn!(cgroup = %parent.display(), instance, %error, "guest runs without this group");
                }
            }
        }
        entries
    }

    /// A missing group is no error.
    pub fn remove(&self, instance: &str) -> io::Result<()> {
        for parent in self.parents() {
            remove(&parent.join(instance))?;
        }
        Ok(())
    }

    /// Removes the deployment's own group; its guests' must be gone.
    pub fn remove_all(&self) -> io::Result<()> {
        for parent in self.parents() {
            let Ok(entries) = fs::read_dir(&parent) else { continue };
            for entry in entries.flatten().filter(|e| e.path().is_dir()) {
                remove(&entry.path())?;
            }
            remove(&parent)?;
        }
        Ok(())
    }
}

fn make(parent: &Path, instance: &str, limits: Limits) -> io::Result<PathBuf> {
    let group = parent.join(instance);
    fs::create_dir_all(&group)?;
    let memory = (limits.memory_mib + OVERHEAD_MIB) << 20;
    let quota = (u64::from(limits.vcpus) * 100 + OVERHEAD_CPU_PERCENT) * PERIOD_US / 100;
    let settings: Vec<(&str, String)> = match version() {
        Version::Two => {
            // A controller serves children only where each ancestor hands it down.
            for controller in CONTROLLERS {
                for folder in [Path::new(ROOT), parent] {
                    let _ =
                        fs::write(folder.join("cgroup.subtree_control"), format!("+{controller}"));
                }
            }
            vec![
                ("memory.max", memory.to_string()),
                ("cpu.max", format!("{quota} {PERIOD_US}")),
                ("pids.max", PIDS_MAX.to_string()),
            ]
        }
        Version::One => vec![
            ("memory.limit_in_bytes", memory.to_string()),
            ("cpu.cfs_period_us", PERIOD_US.to_string()),
            ("cpu.cfs_quota_us", quota.to_string()),
            ("pids.max", PIDS_MAX.to_string()),
        ],
    };
    let mut set = 0;
    for (file, value) in settings {
        let path = group.join(file);
        if path.exists() {
            fs::write(&path, value)?;
            set += 1;
        }
    }
    if set == 0 {
        tracing::warn!(cgroup = %group.display(), "no limit can be set here: the controllers are missing");
    }
    Ok(group.join("cgroup.procs"))
}

/// The kernel may hold a group for a moment after its last process has ended.
fn remove(group: &Path) -> io::Result<()> {
    for _ in 0..REMOVE_TRIES {
        match fs::remove_dir(group) {
            Ok(()) => return Ok(()),
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                std::thread::sleep(std::time::Duration::from_millis(10));
            }
            Err(e) => return Err(e),
        }
    }
    fs::remove_dir(group)
}
