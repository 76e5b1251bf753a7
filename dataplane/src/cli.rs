//! The one definition of the command line: the parser, `--help` and the man pages.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};

use crate::alone::{Folders, file::NAME_DEFAULT};

/// A firewall and NAT at kernel speed for taps, veths and containers
///
/// Alone, it takes a TOML file of interfaces, groups and addresses (check,
/// apply, show, remove, serve); in a Hostplane it is one of four daemons
/// (daemon, teardown). What it puts in force stays in the kernel when it ends.
#[derive(Debug, Parser)]
#[command(
    name = "dataplane",
    version,
    disable_help_subcommand = true,
    after_help = "EXIT STATUS: 0 done; 1 tried and failed, or the file is wrong; 2 a wrong argument.
Data goes to stdout, messages to stderr."
)]
pub struct Arguments {
    #[command(subcommand)]
    pub deed: Deed,
}

#[derive(Debug, Subcommand)]
pub enum Deed {
    /// Say whether a file is right, and if not, where and what to write
    #[command(after_help = "EXAMPLES:\n  dataplane check firewall.toml")]
    Check {
        /// The file
        file: PathBuf,
    },
    /// Put a file in force; what the file no longer names is removed
    #[command(
        after_help = "EXAMPLES:\n  dataplane apply firewall.toml --dry-run\n  dataplane apply firewall.toml"
    )]
    Apply(Apply),
    /// Show what is in force, with flows and packets by reason
    #[command(after_help = "EXAMPLES:\n  dataplane show\n  dataplane show --json")]
    Show(Alone),
    /// Take everything of one name out of force
    #[command(after_help = "EXAMPLES:\n  dataplane remove")]
    Remove(Alone),
    /// Put a file in force and stay: answer DHCP, age flows, apply it again on SIGHUP
    #[command(after_help = "EXAMPLES:\n  dataplane serve firewall.toml")]
    Serve {
        /// The file
        file: PathBuf,
        #[command(flatten)]
        folders: Folders,
    },
    /// Serve `dataplane.sock` until SIGTERM. What is in the kernel stays when it ends.
    Daemon(Place),
    /// With no daemon alive: remove every device, program and map of this deployment.
    Teardown(Place),
}

#[derive(Debug, Args)]
pub struct Apply {
    /// The file
    pub file: PathBuf,
    /// Only say what would change
    #[arg(long)]
    pub dry_run: bool,
    /// Answer in JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub folders: Folders,
}

#[derive(Debug, Args)]
pub struct Alone {
    /// The name that the file gave
    #[arg(long, default_value = NAME_DEFAULT)]
    pub name: String,
    /// Answer in JSON
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub folders: Folders,
}

#[derive(Debug, Args)]
pub struct Place {
    /// The deployment's name.
    #[arg(long)]
    pub name: String,
    /// What must outlive a reboot.
    #[arg(long)]
    pub state_dir: PathBuf,
    /// Sockets; gone after a reboot.
    #[arg(long)]
    pub run_dir: PathBuf,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    #[test]
    fn the_definition_is_sound() {
        super::Arguments::command().debug_assert();
    }
}
