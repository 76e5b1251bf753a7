//! The one definition of the command line: the parser, `--help`, the man pages,
//! the completions and the guide's reference all come from here.

use clap::{Parser, Subcommand};

use crate::api::Session;
use crate::deployment::place::Place;
use crate::deployment::{doctor, down, launch, logs, report, supervise, up, version};
use crate::failure::Outcome;
use crate::output::Format;
use crate::{
    address, flow, group, image, instance, instance_type, interface, key, subnet, tag, top, volume,
    vpc, why, zone,
};

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

    /// How answers are shown: table, wide (more columns), json (a stable shape) or id (only the ids)
    #[arg(
        long,
        short,
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORMAT",
        hide_possible_values = true
    )]
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
    /// Launch, watch and end instances
    #[command(subcommand, alias = "i")]
    Instance(instance::Instance),
    /// Build, import and register machine images
    #[command(subcommand)]
    Image(image::Image),
    /// Create, attach and delete volumes
    #[command(subcommand, alias = "vol")]
    Volume(volume::Volume),
    /// Allocate elastic addresses and give them to instances
    #[command(subcommand, visible_alias = "eip")]
    Address(address::Address),
    /// Say who may reach which instances: security groups
    #[command(subcommand, visible_alias = "sg")]
    Group(group::Group),
    /// Create and import key pairs
    #[command(subcommand)]
    Key(key::Key),
    /// Put tags on resources
    #[command(subcommand)]
    Tag(tag::Tag),
    /// Show instance types
    #[command(subcommand)]
    Type(instance_type::InstanceType),
    /// Show availability zones
    #[command(subcommand)]
    Zone(zone::Zone),
    /// Show VPCs
    #[command(subcommand)]
    Vpc(vpc::Vpc),
    /// Show subnets
    #[command(subcommand)]
    Subnet(subnet::Subnet),
    /// Show network interfaces
    #[command(subcommand, alias = "eni")]
    Interface(interface::Interface),
    /// Say whether a packet would pass, and by which rule
    Why(why::Why),
    /// Observe drops and new flows, and count what rules let in
    #[command(subcommand)]
    Flow(flow::Flow),
    /// Show traffic, flows and drops a second
    Top(top::Top),
    /// Write a completion script for a shell
    #[command(
        after_help = "EXAMPLES:\n  netctl completion bash > /etc/bash_completion.d/netctl\n  netctl completion zsh > ~/.zfunc/_netctl"
    )]
    Completion {
        /// The shell that it is for
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
        let session = || Session::new(place, *output);
        match command {
            Command::Up(up) => up::run(place, up, *output),
            Command::Down(down) => down::run(place, down),
            Command::Status(_) => report::run(place, *output),
            Command::Doctor => doctor::run(*output),
            Command::Logs(logs) => logs::run(place, logs),
            Command::Version => version::run(place, *output),
            Command::Instance(noun) => instance::run(&session()?, noun),
            Command::Image(noun) => image::run(&session()?, noun),
            Command::Volume(noun) => volume::run(&session()?, noun),
            Command::Address(noun) => address::run(&session()?, noun),
            Command::Group(noun) => group::run(&session()?, noun),
            Command::Key(noun) => key::run(&session()?, noun),
            Command::Tag(noun) => tag::run(&session()?, noun),
            Command::Type(noun) => instance_type::run(&session()?, noun),
            Command::Zone(noun) => zone::run(&session()?, noun),
            Command::Vpc(noun) => vpc::run(&session()?, noun),
            Command::Subnet(noun) => subnet::run(&session()?, noun),
            Command::Interface(noun) => interface::run(&session()?, noun),
            Command::Why(why) => why::run(&session()?, why),
            Command::Flow(noun) => flow::run(&session()?, noun),
            Command::Top(top) => top::run(&session()?, top),
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
