//! Processes that we started, known beyond doubt.
//!
//! A pid is used again after its process has ended. So what is written down is
//! the pid, the boot, the start time in it, and the executables that the process
//! may show; and it is held by a pidfd before these are compared, so that the
//! process that is signalled is the one that was looked at.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

use super::config::{read_json, write_json};
use crate::failure::{Failure, Outcome};

/// How long a process may take to end after SIGTERM, before it is killed. A
/// daemon has nothing to finish that a crash would not finish too.
pub const END_WITHIN: Duration = Duration::from_secs(10);

/// SIGKILL takes effect once the process leaves the kernel; a disk that hangs
/// may hold it there longer than this, which is then reported.
pub const KILL_WITHIN: Duration = Duration::from_secs(10);

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    pub pid: i32,
    pub boot_id: String,
    /// Field 22 of /proc/PID/stat: clock ticks from boot to its start.
    pub start_ticks: u64,
    /// What /proc/PID/exe may show: the launcher, then the program itself.
    pub executables: Vec<PathBuf>,
}

impl Identity {
    /// This very process, which may go on to execute `program`.
    pub fn own(program: Option<&Path>) -> io::Result<Self> {
        let pid = i32::try_from(std::process::id()).map_err(io::Error::other)?;
        let stat = Stat::read(pid)?;
        let mut executables =
            vec![executable(pid).ok_or_else(|| io::Error::other("/proc/self/exe cannot be read"))?];
        if let Some(program) = program {
            executables.push(fs::canonicalize(program)?);
        }
        Ok(Self { pid, boot_id: boot_id()?, start_ticks: stat.start_ticks, executables })
    }

    pub fn read(path: &Path) -> Outcome<Option<Self>> {
        read_json(path)
    }

    pub fn write(&self, path: &Path) -> Outcome {
        write_json(path, self)
    }

    /// The process, if it is still there and still the same.
    pub fn find(&self) -> Option<Process> {
        let fd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        let stat = Stat::read(self.pid).ok()?;
        let same = stat.is_alive
            && stat.start_ticks == self.start_ticks
            && boot_id().is_ok_and(|b| b == self.boot_id)
            && executable(self.pid).is_some_and(|e| self.executables.contains(&e));
        same.then_some(Process { fd, pid: self.pid })
    }

    pub fn is_alive(&self) -> bool {
        self.find().is_some()
    }
}

/// A live process of ours, held.
#[derive(Debug)]
pub struct Process {
    fd: OwnedFd,
    pid: i32,
}

impl Process {
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        match pidfd_send_signal(&self.fd, signal) {
            // It has ended by itself, which is what a signal is for here.
            Err(rustix::io::Errno::SRCH) | Ok(()) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    /// Whether it has ended within `patience`. A pidfd is readable from then on.
    pub fn ends_within(&self, patience: Duration) -> bool {
        let timeout = Timespec {
            tv_sec: i64::try_from(patience.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        let mut fds = [PollFd::new(&self.fd, PollFlags::IN)];
        matches!(poll(&mut fds, Some(&timeout)), Ok(n) if n > 0)
    }

    /// Ends it: asks, waits, kills, waits.
    pub fn end(&self) -> io::Result<()> {
        self.signal(Signal::TERM)?;
        if self.ends_within(END_WITHIN) {
            return Ok(());
        }
        self.signal(Signal::KILL)?;
        if self.ends_within(KILL_WITHIN) {
            return Ok(());
        }
        Err(io::Error::other(format!("process {} outlives SIGKILL", self.pid)))
    }
}

/// Ends the process that `pid_file` names, if it is still that one, and removes
/// the file. Says whether there was one to end.
pub fn end_by_file(pid_file: &Path) -> Outcome<bool> {
    let ended = match Identity::read(pid_file) {
        Ok(Some(identity)) => match identity.find() {
            Some(process) => process.end().map(|()| true).map_err(|e| {
                Failure::failed(format!("process of {}: end: {e}", pid_file.display()))
            })?,
            None => false,
        },
        // A file that nobody can read names no process; its write was atomic,
        // so it is not ours.
        Ok(None) | Err(_) => false,
    };
    match fs::remove_file(pid_file) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            Err(Failure::failed(format!("file {}: remove: {e}", pid_file.display())))
        }
        _ => Ok(ended),
    }
}

struct Stat {
    is_alive: bool,
    start_ticks: u64,
}

impl Stat {
    /// /proc/PID/stat, proc(5): `pid (comm) state ppid … starttime …`; the name
    /// may hold anything, so fields are counted from its last parenthesis.
    fn read(pid: i32) -> io::Result<Self> {
        let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        Self::parse(&text).ok_or_else(|| io::Error::other(format!("/proc/{pid}/stat: {text}")))
    }

    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.get(text.rfind(')')? + 1..)?.split_ascii_whitespace();
        // A zombie has ended; only its parent has not looked yet.
        let is_alive = !matches!(fields.next()?, "Z" | "X");
        // The state is field 3, so field 22 is the nineteenth after it.
        let start_ticks = fields.nth(18)?.parse().ok()?;
        Some(Self { is_alive, start_ticks })
    }
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// What a process runs. A program that was replaced on disk while it runs (an
/// upgrade, a new build) shows as deleted, and is the same for us.
fn executable(pid: i32) -> Option<PathBuf> {
    let link = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    match link.to_str().and_then(|text| text.strip_suffix(" (deleted)")) {
        Some(path) => Some(path.into()),
        None => Some(link),
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_name_with_parentheses_and_blanks_does_not_shift_the_fields() {
        let stat = Stat::parse(
            "7 (a) Z (b) S 1 7 7 0 -1 4194560 1 0 0 0 1 2 0 0 20 0 1 0 4242 1 1 18446744073709551615",
        )
        .unwrap();
        assert!(stat.is_alive);
        assert_eq!(stat.start_ticks, 4242);
    }

    #[test]
    fn this_process_is_found_and_one_with_another_start_or_program_is_not() {
        let own = Identity::own(None).unwrap();
        assert!(own.is_alive());
        let other = Identity { start_ticks: own.start_ticks + 1, ..own.clone() };
        assert!(!other.is_alive());
        let other = Identity { executables: vec!["/bin/other".into()], ..own.clone() };
        assert!(!other.is_alive());
        let other = Identity { boot_id: "another boot".into(), ..own };
        assert!(!other.is_alive());
    }

    #[test]
    fn a_stranger_that_took_the_pid_is_not_ended() {
        let mut stranger = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("agent.json");
        let own = Identity::own(None).unwrap();
        Identity { pid: i32::try_from(stranger.id()).unwrap(), ..own }.write(&file).unwrap();
        assert!(!end_by_file(&file).unwrap());
        assert!(stranger.try_wait().unwrap().is_none(), "the stranger was ended");
        assert!(!file.exists());
        stranger.kill().unwrap();
        stranger.wait().unwrap();
    }
}
