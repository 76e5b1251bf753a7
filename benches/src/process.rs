//! Programs that a benchmark starts: ended with it, and their CPU time read.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use nix::sys::prctl;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{SysconfVar, sysconf};

/// A program in the background. Dropping it ends it; it also ends when the
/// benchmark dies in whatever way.
#[derive(Debug)]
pub struct Background {
    child: Child,
    name: String,
    /// What it writes to its standard error; a file, since a pipe that nobody
    /// reads would stop it once it is full.
    said: File,
}

impl Background {
    pub fn start(mut command: Command) -> anyhow::Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let said = tempfile::tempfile().with_context(|| format!("{name}: file for its errors"))?;
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(said.try_clone()?);
        end_with_us(&mut command);
        let child = command.spawn().with_context(|| format!("{name}: start"))?;
        Ok(Self { child, name, said })
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// What it said before it ended by itself; `None` while it lives.
    pub fn epitaph(&mut self) -> io::Result<Option<String>> {
        let Some(status) = self.child.try_wait()? else { return Ok(None) };
        let mut said = Vec::new();
        self.said.rewind()?;
        self.said.read_to_end(&mut said)?;
        let said = String::from_utf8_lossy(&said);
        Ok(Some(format!("{} ended with {status}: {}", self.name, said.trim())))
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing left to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lets this process have so many files open.
pub fn allow_files(count: u64) -> anyhow::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < count {
        setrlimit(Resource::RLIMIT_NOFILE, count, hard.max(count))
            .with_context(|| format!("cannot have {count} files open"))?;
    }
    Ok(())
}

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on, SIGINT and SIGTERM no longer end this process: [`interrupted`]
/// answers `true` after the first, so that the caller can tidy up; a second one
/// ends the process as it stands. Programs started later take signals as usual.
pub fn watch_signals() -> anyhow::Result<()> {
    let signals = SigSet::from_iter([Signal::SIGINT, Signal::SIGTERM]);
    signals.thread_block().context("signals: block")?;
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        while signals.wait().is_ok() {
            if INTERRUPTED.swap(true, Ordering::Relaxed) {
                std::process::exit(130);
            }
            eprintln!("interrupted: tidying up");
        }
    })?;
    Ok(())
}

pub fn interrupted() -> bool {
    INTERRUPTED.load(Ordering::Relaxed)
}

/// Has the kernel end the command's process when the thread that starts it ends.
pub fn end_with_us(command: &mut Command) {
    // SAFETY: between fork and exec the closure makes one prctl(2) call and
    // neither allocates nor takes a lock.
    unsafe {
        command.pre_exec(|| prctl::set_pdeathsig(Signal::SIGKILL).map_err(io::Error::from));
    }
}

/// CPU time that a process has used by now, all its threads together, those
/// that ended and io_uring's workers included; in seconds, counted in ticks.
pub fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{pid}/stat");
    let stat = std::fs::read_to_string(&path).with_context(|| format!("{path}: read"))?;
    let ticks = cpu_ticks(&stat).with_context(|| format!("{path}: `{stat}`: no times in it"))?;
    let ticks_a_second = sysconf(SysconfVar::CLK_TCK)?.context("sysconf: no CLK_TCK")?;
    Ok(ticks as f64 / ticks_a_second as f64)
}

/// `utime + stime` of proc_pid_stat(5). The second field, the name, may hold
/// blanks and parentheses; what follows its last `)` has fixed places.
fn cpu_ticks(stat: &str) -> Option<u64> {
    let after_name = &stat[stat.rfind(')')? + 1..];
    let mut fields = after_name.split_ascii_whitespace();
    // `state` is field 3; utime is field 14, stime field 15.
    let utime: u64 = fields.nth(14 - 3)?.parse().ok()?;
    let stime: u64 = fields.next()?.parse().ok()?;
    Some(utime + stime)
}

/// Runs a program to its end; its standard output, or what it complained of.
pub fn output(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    end_with_us(command);
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("{name}: start"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        anyhow::bail!("{command:?}: {}: {}", output.status, complaint.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_found_behind_a_name_with_blanks_and_parentheses() {
        let stat = "77 (a) b (c) S 1 77 77 0 -1 4194560 10 0 0 0 250 31 4 5 20 0 9 0 1 2 3";
        assert_eq!(cpu_ticks(stat), Some(281));
        assert_eq!(cpu_ticks("77 (short) S 1"), None);
        assert_eq!(cpu_ticks(""), None);
    }

    #[test]
    fn our_own_cpu_time_can_be_read() {
        assert!(cpu_seconds(std::process::id()).unwrap() >= 0.0);
    }

    #[test]
    fn a_background_program_ends_when_dropped_and_has_an_epitaph_when_it_failed() {
        let mut sleep = Command::new("sleep");
        sleep.arg("600");
        let mut background = Background::start(sleep).unwrap();
        let stat = format!("/proc/{}/stat", background.id());
        assert_eq!(background.epitaph().unwrap(), None);
        drop(background);
        assert!(!std::path::Path::new(&stat).exists());

        let mut failing = Command::new("sh");
        failing.args(["-c", "echo no such disk >&2; exit 3"]);
        let mut background = Background::start(failing).unwrap();
        background.child.wait().unwrap();
        assert!(background.epitaph().unwrap().unwrap().contains("no such disk"));
    }

    #[test]
    fn output_tells_what_the_program_complained_of() {
        let mut command = Command::new("sh");
        command.args(["-c", "echo bad address >&2; exit 1"]);
        assert!(output(&mut command).unwrap_err().to_string().contains("bad address"));
    }
}
