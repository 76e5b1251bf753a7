//! Nanoseconds a packet, side by side with nftables and plain forwarding: arguments.

use std::path::PathBuf;

use anyhow::Context as _;
use benches::packet::contender::Contender;
use benches::packet::nftables::Shape;
use benches::packet::{Flows, Plan, alone, change, namespace, plot, report, run};
use clap::Parser;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::{Pid, geteuid};

/// Rules while the programs are measured alone.
const ALONE_RULES: usize = 1000;
/// Interfaces whose rules change at once.
const CHANGED: [usize; 2] = [1, 1000];

/// Nanoseconds a packet on its whole way, side by side with nftables and plain
/// forwarding. The answer goes to standard output, progress to standard error.
#[derive(Debug, Parser)]
#[command(name = "network", version)]
struct Arguments {
    /// How often each measurement is repeated.
    #[arg(long, default_value_t = 9, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Frames in one measurement, at most.
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u32).range(512..=10_000_000))]
    frames: u32,
    /// Numbers of rules to measure with.
    #[arg(long, value_delimiter = ',', default_value = "10,1000,10000",
          value_parser = clap::value_parser!(u32).range(1..=200_000))]
    rules: Vec<u32>,
    /// Numbers of established flows to measure with (powers of two); 0: each packet a new flow.
    #[arg(long, value_delimiter = ',', default_value = "1,4096,0", value_parser = flows)]
    flows: Vec<Flows>,
    /// Only contenders whose name has this in it.
    #[arg(long, default_value = "")]
    only: String,
    /// The processor that sends and forwards.
    #[arg(long, default_value_t = 0)]
    cpu: usize,
    /// Draw the cost over the number of rules to this file (SVG).
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Numbers of rules that only ours is measured with, by tcx.
    #[arg(long, value_delimiter = ',', default_value = "100000",
          value_parser = clap::value_parser!(u32).range(1..=200_000))]
    many_rules: Vec<u32>,
    /// One short round, to see that all works.
    #[arg(long)]
    quick: bool,
}

impl Arguments {
    fn plan(&self) -> Plan {
        let (rounds, frames) = if self.quick { (1, 5_000) } else { (self.rounds, self.frames) };
        let counts = || self.rules.iter().map(|&rules| rules as usize);
        let mut contenders = vec![Contender::Plain];
        for shape in [Shape::Set, Shape::Sets, Shape::Lines] {
            contenders.extend(counts().map(|rules| Contender::Nft(shape, rules)));
        }
        contenders.extend(counts().map(Contender::Iptables));
        let many = || counts().chain(self.many_rules.iter().map(|&rules| rules as usize));
        contenders.extend(many().map(Contender::OursOnTcx));
        contenders.extend(counts().map(Contender::OursToNamespace));
        contenders.extend(counts().map(Contender::Ours));
        contenders.extend(counts().map(Contender::OursFast));
        contenders.retain(|contender| contender.to_string().contains(&self.only));
        Plan { flows: self.flows.clone(), contenders, rounds: rounds as usize, frames }
    }
}

fn flows(text: &str) -> Result<Flows, String> {
    match text.parse::<u32>() {
        Ok(0) => Ok(Flows::New),
        Ok(count) if count.is_power_of_two() && count <= 1 << 14 => Ok(Flows::Established(count)),
        _ => Err("neither 0 nor a power of two up to 16384".to_owned()),
    }
}

fn main() -> anyhow::Result<()> {
    let arguments = Arguments::parse();
    anyhow::ensure!(geteuid().is_root(), "not root: namespaces and eBPF need it");
    let plan = arguments.plan();
    let header = report::header(&plan);
    // Namespaces and mounts are this process's own and end with it, however it
    // ends: there is nothing to tidy up, and no signal to wait for.
    namespace::own_mounts()?;
    let mut cpu = CpuSet::new();
    cpu.set(arguments.cpu)?;
    sched_setaffinity(Pid::from_raw(0), &cpu)?;
    let alone = alone::run(ALONE_RULES, plan.rounds.min(9))?;
    for row in &alone {
        eprintln!("{}: {:?} ns", row.what, row.ns.median());
    }
    let mut changes = Vec::new();
    for interfaces in CHANGED {
        let change = change::run(interfaces, plan.rounds.min(9))?;
        eprintln!("{interfaces} interfaces: visible after {:?} us", change.visible_us.median());
        changes.push(change);
    }
    let results = run(&plan, |line| eprintln!("{line}"))?;
    let (alone, changes) = (report::alone(&alone), report::changes(&changes));
    print!("{header}{alone}{changes}{}", report::text(&plan, &results));
    if let Some(path) = &arguments.plot {
        std::fs::write(path, plot::svg(&plan, &results))
            .with_context(|| format!("plot {}: write", path.display()))?;
    }
    Ok(())
}
