//! 4 KiB over NBD, side by side with nbdkit and qemu-nbd on the same file:
//! arguments and signals.

use std::path::PathBuf;

use benches::block::contender::Transport;
use benches::block::{Plan, fio, report, run};
use benches::machine;
use clap::Parser;

/// 4 KiB random reads and writes over NBD, side by side with nbdkit and qemu-nbd
/// on the same file. The answer goes to standard output, progress to standard error.
#[derive(Debug, Parser)]
#[command(name = "block", version)]
struct Arguments {
    /// How often each measurement is repeated.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// Size of the file, in MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    size_mib: u64,
    /// Folder for the file, on the disk in question. Without it: beside this program.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// One short round on a small file, to see that all works.
    #[arg(long)]
    quick: bool,
}

impl Arguments {
    fn plan(self) -> anyhow::Result<Plan> {
        let directory = match self.directory {
            Some(directory) => directory,
            None => machine::own_folder()?,
        };
        let (rounds, seconds, size_mib) =
            if self.quick { (1, 1, 64) } else { (self.rounds, self.seconds, self.size_mib) };
        Ok(Plan {
            workloads: fio::RANDOM_4K.to_vec(),
            transports: vec![Transport::Unix, Transport::Tcp],
            rounds: rounds as usize,
            seconds,
            size_mib,
            directory,
        })
    }
}

fn main() -> anyhow::Result<()> {
    let plan = Arguments::parse().plan()?;
    anyhow::ensure!(machine::version("fio", "--version").is_some(), "fio is not installed");
    benches::process::watch_signals()?;
    let header = report::header(&plan);
    let results = run(&plan, |line| eprintln!("{line}"))?;
    print!("{header}{}", report::text(&plan, &results));
    Ok(())
}
