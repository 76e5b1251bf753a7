//! `netctl down`: ends everything of a deployment and removes what it made, from
//! whatever state a crash has left it in.
//!
//! ```text
//!  supervisor lets go ─▶ agent ends ─▶ guests end ─▶ control ends ─▶ dataplane ends
//!      ─▶ pins, taps removed ─▶ block-server ends ─▶ uplink, run directory removed ─▶ look round
//! ```
//! Guests end before the block server, so that their last writes find it.
//! Each step does what is still to do and none needs another to have been done:
//! `down` twice, or after `kill -9` of anything, is the same walk.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Args;
use rpc::Deployment;
use rustix::process::Signal;

use super::config::Config;
use super::place::{Files, Place};
use super::process::{Identity, end_by_file};
use super::{leftovers, preflight, replace, up, uplink};
use crate::failure::{Failure, Outcome};
use crate::output;

/// The supervisor has nothing to do but to end when it is told to let go.
const RELEASE_WITHIN: Duration = Duration::from_secs(5);

/// Guests get to end by themselves before the agent pulls their plug; it bounds
/// that itself, and this is for an agent that hangs.
const TEARDOWN_WITHIN_S: u32 = 120;

#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:
  netctl down
  netctl down --purge
  netctl down --name test")]
pub struct Down {
    /// Remove the state directory too: volumes, images, records
    #[arg(long)]
    pub purge: bool,
}

pub fn run(place: &Place, down: &Down) -> Outcome {
    let deployment = place.deployment()?;
    if let Some(line) = preflight::not_root() {
        return Err(Failure::unfit(line));
    }
    if down.purge {
        check_state_is_ours(&deployment)?;
    }
    // Without a state directory nothing was ever up, so nobody to wait for.
    let alone = deployment.state_dir().exists().then(|| up::lock(&deployment)).transpose()?;
    let before = leftovers::find(&deployment)?;
    if before.is_empty() {
        output::note("nothing is up");
    } else {
        stop(&deployment)?;
        output::note("down");
    }
    drop(alone);
    if down.purge { purge(&deployment) } else { Ok(()) }
}

fn stop(deployment: &Deployment) -> Outcome {
    let mut troubles = Vec::new();
    let mut walk = |step: Outcome| {
        if let Err(failure) = step {
            troubles.push(failure.to_string());
        }
    };
    walk(release_supervisor(deployment));
    walk(end_by_file(&deployment.pid_file("agent")).map(drop));
    walk(tear_down(deployment, "agent"));
    walk(end_by_file(&deployment.pid_file("control")).map(drop));
    walk(end_by_file(&deployment.pid_file("dataplane")).map(drop));
    walk(tear_down(deployment, "dataplane"));
    walk(end_by_file(&replace::pid_file_of_next(deployment)).map(drop));
    walk(end_by_file(&deployment.pid_file("block-server")).map(drop));
    walk(uplink::remove(deployment));
    // The logs and the pid files are worth keeping while something is amiss.
    let left = leftovers::find(deployment)?;
    let run_dir = format!("directory {}", deployment.run_dir().display());
    if troubles.is_empty() && left.iter().all(|l| l.what == run_dir) {
        return remove_run_dir(deployment);
    }
    let mut lines = troubles;
    if !left.is_empty() {
        lines.push("left behind, with what removes it:".to_owned());
        lines.extend(left.iter().map(|l| format!("  {:<50} {}", l.what, l.remove)));
    }
    Err(Failure::failed(lines.join("\n")).hint("mend that, then netctl down again"))
}

/// Tells the supervisor to leave the daemons to us, or ends it.
fn release_supervisor(deployment: &Deployment) -> Outcome {
    let file = deployment.pid_file("supervisor");
    // An unreadable file is no supervisor's; it goes with the run directory.
    let Ok(Some(identity)) = Identity::read(&file) else { return Ok(()) };
    let Some(process) = identity.find() else { return Ok(()) };
    let failed = |e: io::Error| Failure::failed(format!("supervisor: end: {e}"));
    process.signal(Signal::USR1).map_err(failed)?;
    if process.ends_within(RELEASE_WITHIN) {
        return Ok(());
    }
    // SIGTERM would make it end the daemons in its own order, so not that.
    process.signal(Signal::KILL).map_err(failed)?;
    if process.ends_within(RELEASE_WITHIN) {
        return Ok(());
    }
    Err(failed(io::Error::other("it outlives SIGKILL")))
}

/// Runs `DAEMON teardown`, which removes what the daemon made and keeps over
/// its own restarts: guests, or pins and taps.
fn tear_down(deployment: &Deployment, daemon: &str) -> Outcome {
    let program = match Config::read(deployment) {
        Ok(Some(config)) => config.executable(daemon),
        Ok(None) | Err(_) => up::libexec().join(daemon),
    };
    let failed = |cause: String| {
        Failure::failed(format!("daemon {daemon}: tear down ({}): {cause}", program.display()))
    };
    // `timeout` of coreutils bounds it, and kills what does not heed it.
    let output = Command::new("timeout")
        .args(["--kill-after=10", &TEARDOWN_WITHIN_S.to_string()])
        .arg(&program)
        .arg("teardown")
        .args(["--name", deployment.name()])
        .arg("--state-dir")
        .arg(deployment.state_dir())
        .arg("--run-dir")
        .arg(deployment.run_dir())
        .stdin(Stdio::null())
        .output()
        .map_err(|e| failed(e.to_string()))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().rev().take(5).collect::<Vec<_>>();
    let last = last.into_iter().rev().collect::<Vec<_>>().join("\n    ");
    Err(failed(match output.status.code() {
        Some(124 | 137) => format!("not done within {TEARDOWN_WITHIN_S} s\n    {last}"),
        _ => format!("{}\n    {last}", output.status),
    }))
}

/// Removes the run directory, which bears our mark: `up` takes no other.
fn remove_run_dir(deployment: &Deployment) -> Outcome {
    let dir = deployment.run_dir();
    if !dir.exists() {
        return Ok(());
    }
    let failed = |cause: &dyn std::fmt::Display| {
        Failure::failed(format!("run directory {}: remove: {cause}", dir.display()))
    };
    let is_empty = fs::read_dir(dir).map_err(|e| failed(&e))?.next().is_none();
    if !is_empty && !deployment.config_file().exists() {
        return Err(failed(
            &"it holds files, and no deployment.json says that they are Hostplane's",
        ));
    }
    // The mark goes last: an interrupted removal can be taken up again.
    remove_all_but(dir, &deployment.config_file())
        .and_then(|()| remove_if_there(fs::remove_file(deployment.config_file())))
        .and_then(|()| fs::remove_dir(dir))
        .map_err(|e| failed(&e))
}

fn check_state_is_ours(deployment: &Deployment) -> Outcome {
    let dir = deployment.state_dir();
    if !dir.exists() || deployment.state_marker().exists() {
        return Ok(());
    }
    Err(Failure::unfit(format!(
        "state directory {}: purge: no hostplane.json says that it is Hostplane's; nothing was removed",
        dir.display()
    )))
}

fn purge(deployment: &Deployment) -> Outcome {
    let dir = deployment.state_dir();
    if !dir.exists() {
        return Ok(());
    }
    check_state_is_ours(deployment)?;
    remove_all_but(dir, &deployment.state_marker())
        .and_then(|()| remove_if_there(fs::remove_file(deployment.state_marker())))
        .and_then(|()| fs::remove_dir(dir))
        .map_err(|e| Failure::failed(format!("state directory {}: purge: {e}", dir.display())))?;
    output::note(&format!("removed {}", dir.display()));
    Ok(())
}

fn remove_all_but(dir: &Path, kept: &Path) -> io::Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if path == kept {
            continue;
        }
        remove_if_there(if entry.file_type()?.is_dir() {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        })?;
    }
    Ok(())
}

fn remove_if_there(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn deployment(dir: &Path) -> Deployment {
        Deployment::new("hp", dir.join("state"), dir.join("run")).unwrap()
    }

    #[test]
    fn a_state_directory_without_our_mark_is_never_purged() {
        let dir = tempfile::tempdir().unwrap();
        let deployment = deployment(dir.path());
        fs::create_dir(deployment.state_dir()).unwrap();
        let thesis = deployment.state_dir().join("thesis.tex");
        fs::write(&thesis, b"x").unwrap();
        assert_eq!(purge(&deployment).unwrap_err().exit_code(), 2);
        assert!(thesis.exists());
        fs::write(deployment.state_marker(), b"{}").unwrap();
        purge(&deployment).unwrap();
        assert!(!deployment.state_dir().exists());
    }

    #[test]
    fn a_run_directory_without_our_mark_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let deployment = deployment(dir.path());
        fs::create_dir(deployment.run_dir()).unwrap();
        remove_run_dir(&deployment).unwrap();
        assert!(!deployment.run_dir().exists());
        fs::create_dir(deployment.run_dir()).unwrap();
        fs::write(deployment.run_dir().join("x.sock"), b"").unwrap();
        assert!(remove_run_dir(&deployment).is_err());
        fs::write(deployment.config_file(), b"{}").unwrap();
        remove_run_dir(&deployment).unwrap();
        assert!(!deployment.run_dir().exists());
    }
}
