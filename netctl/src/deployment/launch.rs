//! The moment between a process's birth and its program.
//!
//! The supervisor starts `netctl launch` rather than the daemon: it writes down
//! its own identity and then becomes the daemon (the pid and the start time stay
//! the same over `execve`). So there is no instant in which a daemon runs that
//! no file names, whoever is killed when.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use clap::Args;

use super::process::Identity;
use crate::failure::{Failure, Outcome};

#[derive(Debug, Args)]
pub struct Launch {
    #[arg(long)]
    pub pid_file: PathBuf,
    #[arg(required = true, last = true)]
    pub command: Vec<OsString>,
}

/// Returns only if the program could not be executed.
pub fn run(launch: &Launch) -> Outcome {
    let Some((program, arguments)) = launch.command.split_first() else {
        return Err(Failure::unfit("launch: names no program"));
    };
    let failed = |e: std::io::Error| {
        Failure::failed(format!("program {}: start: {e}", PathBuf::from(program).display()))
    };
    Identity::own(Some(program.as_ref())).map_err(failed)?.write(&launch.pid_file)?;
    Err(failed(Command::new(program).args(arguments).exec()))
}
