//! Nanoseconds a packet, side by side with nftables and plain forwarding.

use benches::network::frames::NEW_FLOWS_MAX;
use benches::network::{Plan, report, run};
use clap::Parser;

/// Nanoseconds a packet on its whole path, side by side with nftables and plain forwarding.
///
/// Needs root; works in network namespaces of its own and removes them.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// How often each measurement is repeated.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=101))]
    rounds: u32,
    /// Frames a measurement.
    #[arg(long, default_value_t = 50_000, value_parser = clap::value_parser!(u32).range(1000..=60_000))]
    frames: u32,
    /// Rules that the guest's group has, one table each.
    #[arg(long, value_delimiter = ',', default_values_t = [10, 1000])]
    rules: Vec<usize>,
    /// A short run which shows that all works, and whose figures mean nothing.
    #[arg(long)]
    quick: bool,
}

const _: () = assert!(60_000 < NEW_FLOWS_MAX);

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    anyhow::ensure!(nix::unistd::Uid::effective().is_root(), "namespaces and BPF need root");
    let (rounds, frames) =
        if arguments.quick { (1, 5_000) } else { (arguments.rounds as usize, arguments.frames) };
    let plan = Plan { rounds, frames, rules: arguments.rules };
    benches::process::watch_signals()?;
    let header = report::header(&plan);
    let results = run(&plan, |line| eprintln!("{line}"))?;
    print!("{header}{}", report::text(&plan, &results));
    Ok(())
}
