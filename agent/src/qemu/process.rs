//! Which process is the QEMU of an instance, for good: a pid alone is reused, so
//! a pid file names the start time and the boot too, and signals go through a pidfd.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub pid: u32,
    /// Field 22 of /proc/PID/stat, in clock ticks since boot. Exec keeps it.
    pub start_ticks: u64,
    /// Another boot has other processes.
    pub boot_id: String,
    /// That QEMU was told (`-uuid`).
    pub uuid: String,
}

impl Identity {
    pub fn of_self(uuid: &str) -> io::Result<Self> {
        Self::of(std::process::id(), uuid)
    }

    pub fn of(pid: u32, uuid: &str) -> io::Result<Self> {
        Ok(Self { pid, start_ticks: start_ticks(pid)?, boot_id: boot_id()?, uuid: uuid.to_owned() })
    }

    /// Written whole or not at all.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        let pending = path.with_extension("new");
        fs::write(&pending, serde_json::to_vec(self)?)?;
        fs::rename(&pending, path)
    }

    pub fn read(path: &Path) -> io::Result<Option<Self>> {
        match fs::read(path) {
            Ok(bytes) => Ok(Some(serde_json::from_slice(&bytes)?)),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// A handle on the process if it still is the one that was written down.
    pub fn open(&self) -> io::Result<Option<Process>> {
        if self.boot_id != boot_id()? {
            return Ok(None);
        }
        let Some(pid) = Pid::from_raw(self.pid.cast_signed()) else { return Ok(None) };
        let pidfd = match rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK) {
            Ok(pidfd) => pidfd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        // After the handle is held the number cannot be reused, so this check stays true.
        match start_ticks(self.pid) {
            Ok(ticks) if ticks == self.start_ticks => Ok(Some(Process { pid: self.pid, pidfd })),
            Ok(_) => Ok(None),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
            // /proc answers ESRCH when the process ends during the read.
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => Ok(None),
            Err(e) => Err(e),
        }
    }
}

#[derive(Debug)]
pub struct Process {
    pid: u32,
    pidfd: OwnedFd,
}

impl Process {
    pub const fn pid(&self) -> u32 {
        self.pid
    }

    pub fn pidfd(&self) -> io::Result<OwnedFd> {
        self.pidfd.try_clone()
    }

    /// A process that has ended already is no error.
    pub fn kill(&self) -> io::Result<()> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether it has ended; waits up to `timeout_ms`.
    pub fn ended(&self, timeout_ms: u32) -> io::Result<bool> {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let timeout = Timespec {
            tv_sec: i64::from(timeout_ms / 1000),
            tv_nsec: i64::from(timeout_ms % 1000) * 1_000_000,
        };
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        Ok(rustix::io::retry_on_intr(|| poll(&mut fds, Some(&timeout)))? > 0)
    }
}

pub fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// The 22nd field; the second is the program's name in parentheses and may hold anything.
fn start_ticks(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest);
    let field = after_name.and_then(|rest| rest.split(' ').nth(19)?.parse().ok());
    field.ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat has no start time")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_itself_and_a_reused_number_is_not() {
        let me = Identity::of_self("u").unwrap();
        assert!(me.open().unwrap().is_some());
        let other = Identity { start_ticks: me.start_ticks + 1, ..me.clone() };
        assert!(other.open().unwrap().is_none());
        let before = Identity { boot_id: "another".into(), ..me };
        assert!(before.open().unwrap().is_none());
    }

    #[test]
    fn a_killed_process_is_seen_to_have_ended() {
        let mut child = std::process::Command::new("sleep").arg("100").spawn().unwrap();
        let identity = Identity::of(child.id(), "u").unwrap();
        let process = identity.open().unwrap().unwrap();
        assert!(!process.ended(0).unwrap());
        process.kill().unwrap();
        assert!(process.ended(5000).unwrap());
        child.wait().unwrap();
        assert!(identity.open().unwrap().is_none());
        process.kill().unwrap();
    }
}
