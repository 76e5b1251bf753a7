//! The one definition of the command line: the parser, `--help`, the man pages,
//! the completions and the guide's reference all come from here.

use clap::{Parser, Subcommand};

use crate::deployment::place::Place;
use crate::deployment::{doctor, down, launch, logs, report, supervise, up, version};
use crate::failure::Outcome;
use crate::output::Format;

/// EC2 on your own Linux host
///
/// netctl starts and stops a Hostplane on this host (up, down, status), and
/// drives it in the terms of EC2 (instance, volume, address, …).
#[derive(Debug, Parser)]
#[command(
    name = "netctl",
    version,
    disable_help_subcommand = true,
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "EXIT STATUS: 0 done; 1 tried and failed; 2 not tried: a wrong argument, or this host lacks something.
Data goes to stdout, messages to stderr."
)]
pub struct Cli {
    #[command(flatten)]
    pub place: Place,

    /// How answers are shown
    #[arg(long, short, global = true, value_enum, default_value_t)]
    pub output: Format,

    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start Hostplane on this host
    Up(up::Up),
    /// Stop it, and leave nothing behind but its state
    Down(down::Down),
    /// Show the daemons, what is wrong, and what to do about it
    Status(report::Status),
    /// Show what this host offers, and how to get what is missing
    #[command(after_help = "EXAMPLES:\n  netctl doctor\n  netctl doctor -o json")]
    Doctor,
    /// Show what a daemon wrote
    Logs(logs::Logs),
    /// Show the versions of what is installed and of what runs
    #[command(after_help = "EXAMPLES:\n  netctl version\n  netctl version -o json")]
    Version,
    /// Write a completion script for a shell
    #[command(
        after_help = "EXAMPLES:\n  netctl completion bash > /etc/bash_completion.d/netctl\n  netctl completion zsh > ~/.zfunc/_netctl"
    )]
    Completion {
        #[arg(value_enum)]
        shell: clap_complete::Shell,
    },
    /// Keep the daemons running (started by `up`)
    #[command(hide = true)]
    Supervise(supervise::Supervise),
    /// Become a daemon (started by the supervisor)
    #[command(hide = true)]
    Launch(launch::Launch),
}

impl Cli {
    pub fn run(&self) -> Outcome {
        let Self { place, output, command } = self;
        match command {
            Command::Up(up) => up::run(place, up),
            Command::Down(down) => down::run(place, down),
            Command::Status(_) => report::run(place, *output),
            Command::Doctor => doctor::run(*output),
            Command::Logs(logs) => logs::run(place, logs),
            Command::Version => version::run(place, *output),
            Command::Completion { shell } => {
                let mut command = <Self as clap::CommandFactory>::command();
                clap_complete::generate(*shell, &mut command, "netctl", &mut std::io::stdout());
                Ok(())
            }
            Command::Supervise(supervise) => supervise::run(supervise),
            Command::Launch(launch) => launch::run(launch),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }
}
