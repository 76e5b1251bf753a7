//! Leaves nothing behind: guests of this deployment, their control groups, their
//! run files. Works without a daemon, and a second time.
//!
//! A guest is known by its pid file and start time, never by its name: another
//! deployment's QEMU looks the same.

use std::fs;
use std::io;

use rpc::Deployment;

use crate::qemu::{Cgroups, Identity, runs};

/// How long a killed QEMU may take to be gone.
const KILL_PATIENCE_MS: u32 = 10_000;

/// Under the run directory: held by the daemon that runs; what the probe found.
pub const LOCK_FILE: &str = "agent.lock";
pub const ACCELERATOR_FILE: &str = "agent.accelerator";

/// Gives the number of guests that were ended.
pub fn teardown(deployment: &Deployment) -> io::Result<usize> {
    let mut ended = 0;
    let folder = runs(deployment);
    match fs::read_dir(&folder) {
        Ok(entries) => {
            for entry in entries {
                let path = entry?.path();
                if end_guest(&path.join("pid"))? {
                    ended += 1;
                }
            }
            fs::remove_dir_all(&folder)?;
        }
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(e),
    }
    Cgroups::new(deployment.name()).remove_all()?;
    let run = deployment.run_dir();
    for file in [deployment.socket_of("agent"), run.join(LOCK_FILE), run.join(ACCELERATOR_FILE)] {
        match fs::remove_file(file) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(ended)
}

fn end_guest(pid_file: &std::path::Path) -> io::Result<bool> {
    let Some(identity) = Identity::read(pid_file)? else { return Ok(false) };
    let Some(process) = identity.open()? else { return Ok(false) };
    process.kill()?;
    if process.ended(KILL_PATIENCE_MS)? {
        return Ok(true);
    }
    Err(io::Error::other(format!("process {} does not end although killed", identity.pid)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_ends_what_the_pid_file_names_and_nothing_that_reused_the_number() {
        let dir = tempfile::tempdir().unwrap();
        let deployment =
            Deployment::new("tdwn", dir.path().join("state"), dir.path().join("run")).unwrap();
        let mut guests: Vec<_> = (0..2)
            .map(|_| std::process::Command::new("sleep").arg("100").spawn().unwrap())
            .collect();
        for (i, guest) in guests.iter().enumerate() {
            let folder = runs(&deployment).join(format!("g{i}"));
            fs::create_dir_all(&folder).unwrap();
            let mut identity = Identity::of(guest.id(), "u").unwrap();
            // The second pid file is of an earlier process with the same number.
            identity.start_ticks -= i as u64;
            identity.write(&folder.join("pid")).unwrap();
        }
        assert_eq!(teardown(&deployment).unwrap(), 1);
        assert_eq!(teardown(&deployment).unwrap(), 0);
        assert!(!runs(&deployment).exists());
        assert!(!guests[0].wait().unwrap().success());
        assert!(guests[1].try_wait().unwrap().is_none());
        guests[1].kill().unwrap();
        guests[1].wait().unwrap();
    }
}
