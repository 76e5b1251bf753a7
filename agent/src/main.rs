//! The agent's command line and signals.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(version, about = "Brings this host to what control wants: guests, volumes, network")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Becomes a guest's QEMU without privileges (the daemon runs this).
    #[command(hide = true)]
    Confine { plan: PathBuf },
}

fn main() -> ExitCode {
    match Arguments::parse().command {
        Command::Confine { plan } => confine(&plan),
    }
}

fn confine(plan: &std::path::Path) -> ExitCode {
    let error = match agent::qemu::confine_from(plan) {
        Ok(error) => error,
        Err(error) => {
            eprintln!("agent confine: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("agent confine: {error}");
    match error {
        agent::qemu::ConfineError::Locked(_) => ExitCode::from(agent::qemu::EXIT_LOCKED),
        agent::qemu::ConfineError::Failed { .. } => ExitCode::FAILURE,
    }
}
