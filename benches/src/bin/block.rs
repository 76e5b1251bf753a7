//! 4 KiB over NBD, side by side with nbdkit and qemu-nbd on the same file.

use clap::Parser;

/// 4 KiB random reads and writes over NBD, side by side with nbdkit and qemu-nbd.
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
    println!("{} rounds: {}", arguments.rounds, benches::machine::command_line("block"));
    Ok(())
}
