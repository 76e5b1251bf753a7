//! Nanoseconds a packet, side by side with nftables and plain forwarding.

use clap::Parser;

/// Nanoseconds a packet on its whole path, side by side with nftables and plain forwarding.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// How often each measurement is repeated.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    println!("{}", benches::machine::describe());
    println!("{} rounds: {}", arguments.rounds, benches::machine::command_line("network"));
    Ok(())
}
