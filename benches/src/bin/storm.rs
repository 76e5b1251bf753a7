//! `storm`: what do connections lose while the host is flooded, its daemon killed and
//! its programs exchanged?

use std::time::Duration;

use benches::machine;
use benches::packet::namespace;
use benches::storm::{self, Keeper};
use clap::Parser;
use nix::unistd::geteuid;

/// What connections lose in a flood, and while the dataplane's daemon is replaced
#[derive(Debug, Parser)]
#[command(
    name = "storm",
    after_help = "EXAMPLES:\n  sudo ./x bench storm\n  sudo ./x bench storm --seconds 5"
)]
struct Arguments {
    /// Length of the flood
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Rounds of a guest's TCP, and one to warm up
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Leave nftables out
    #[arg(long)]
    alone: bool,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    anyhow::ensure!(geteuid().is_root(), "not root: namespaces and eBPF need it");
    let nft = machine::version("nft", "--version").unwrap_or_else(|| "nft: not installed".into());
    print!(
        "What connections lose in a storm\n\ncommand: {}\nrevision: {}\n{}versions: {nft}\n",
        machine::command_line("storm"),
        machine::revision(),
        machine::describe(),
    );
    // Namespaces and mounts are this process's own and end with it.
    namespace::own_mounts()?;
    let length = Duration::from_secs(arguments.seconds);
    let mut floods = Vec::new();
    for keeper in [Keeper::Ours, Keeper::Nftables] {
        if keeper == Keeper::Nftables && arguments.alone {
            continue;
        }
        eprintln!("{keeper}: a flood of {} s", arguments.seconds);
        let flooded = storm::flood(keeper, length);
        match &flooded {
            Ok(f) => eprintln!("{keeper}: lost: {:?} {:?}", f.talkers_lost, f.sleepers_lost),
            Err(error) => eprintln!("{keeper}: {error:#}"),
        }
        floods.push(flooded);
    }
    let carried = storm::carry(arguments.rounds, Duration::from_secs(3));
    eprintln!("hostplane: the daemon is replaced");
    let replaced = storm::replace()?;
    eprintln!("hostplane: lost: {:?}", replaced.connections_lost);
    print!("{}", storm::text(&floods, &carried, &replaced));
    Ok(())
}
