//! Blocks over NBD, side by side with nbdkit and qemu-nbd on the same file:
//! arguments and signals.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use benches::block::row::{ROWS, Row};
use benches::block::{Plan, guest, plot, report, run};
use benches::machine;
use clap::Parser;

/// Random reads and writes over NBD, side by side with nbdkit and qemu-nbd on the
/// same file. The answer goes to standard output, progress to standard error.
#[derive(Debug, Parser)]
#[command(name = "block", version)]
struct Arguments {
    /// Only these rows, by name or by the beginning of their names; `help` lists them. Those
    /// of a guest (`guest`) are measured only when they are asked for.
    #[arg(long, value_delimiter = ',')]
    rows: Vec<String>,
    /// How often each measurement is repeated.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// How long each measurement takes.
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    seconds: f64,
    /// Size of the file, in MiB.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    size_mib: u64,
    /// Folder for the file, on the disk in question. Without it: beside this program.
    #[arg(long)]
    directory: Option<PathBuf>,
    /// Rows whose rounds disagree are measured anew until so many seconds have gone.
    #[arg(long, default_value_t = 470)]
    seconds_max: u64,
    /// Another build of block-server, to be measured beside this one.
    #[arg(long)]
    against: Option<PathBuf>,
    /// Without the peers: to compare builds, or to look at one.
    #[arg(long)]
    alone: bool,
    /// Also draw the answer, as SVG, into this file.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// One short round on a small file, to see that all works.
    #[arg(long)]
    quick: bool,
}

fn seconds(text: &str) -> Result<f64, String> {
    let seconds: f64 = text.parse().map_err(|e| format!("{e}"))?;
    if (0.1..=3600.0).contains(&seconds) { Ok(seconds) } else { Err("0.1 to 3600".into()) }
}

impl Arguments {
    fn is_asked_for(&self, id: &str) -> bool {
        self.rows.iter().any(|wanted| id.starts_with(&**wanted))
    }

    fn rows(&self) -> Vec<Row> {
        let is_wanted = |row: &Row| self.rows.is_empty() || self.is_asked_for(row.id);
        ROWS.into_iter().filter(is_wanted).collect()
    }

    fn guest_rows(&self) -> Vec<guest::Row> {
        guest::ROWS.into_iter().filter(|row| self.is_asked_for(row.id)).collect()
    }

    fn plan(&self) -> anyhow::Result<Plan> {
        let directory = match &self.directory {
            Some(directory) => directory.clone(),
            None => machine::own_folder()?,
        };
        let (rounds, seconds, size_mib) =
            if self.quick { (1, 0.3, 64) } else { (self.rounds, self.seconds, self.size_mib) };
        Ok(Plan {
            rows: self.rows(),
            rounds: rounds as usize,
            duration: Duration::from_secs_f64(seconds),
            size_mib,
            directory,
            time_max: Duration::from_secs(if self.quick { 0 } else { self.seconds_max }),
            against: self.against.clone(),
            alone: self.alone,
        })
    }
}

/// The rows over NBD.
fn ask_servers(arguments: &Arguments, plan: &Plan) -> anyhow::Result<()> {
    anyhow::ensure!(machine::version("fio", "--version").is_some(), "fio is not installed");
    let header = report::header(plan);
    let results = run(plan, |line| eprintln!("{line}"))?;
    print!("{header}{}", report::text(plan, &results));
    if let Some(path) = &arguments.plot {
        std::fs::write(path, plot::svg(plan, &results))
            .with_context(|| format!("{}: write", path.display()))?;
    }
    Ok(())
}

/// The rows of a guest.
fn ask_guest(plan: &guest::Plan) -> anyhow::Result<()> {
    let header = guest::report::header(plan);
    let results = guest::run(plan, |line| eprintln!("{line}"))?;
    print!("{header}{}", guest::report::text(plan, &results));
    Ok(())
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    let plan = arguments.plan()?;
    let guest = guest::Plan {
        rows: arguments.guest_rows(),
        rounds: plan.rounds,
        duration: plan.duration,
        size_mib: plan.size_mib,
        directory: plan.directory.clone(),
    };
    if plan.rows.is_empty() && guest.rows.is_empty() {
        let ids = ROWS.iter().map(|r| r.id).chain(guest::ROWS.iter().map(|r| r.id));
        anyhow::bail!("the rows are: {}", ids.collect::<Vec<_>>().join(", "));
    }
    benches::process::watch_signals()?;
    if !plan.rows.is_empty() {
        ask_servers(&arguments, &plan)?;
    }
    if !guest.rows.is_empty() {
        ask_guest(&guest)?;
    }
    Ok(())
}
