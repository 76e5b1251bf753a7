//! What does a guest's disk cost, by which front and by whose server?
//!
//! Called by `src/bin/block.rs` for the rows whose names begin with `guest`. One guest
//! of a real QEMU (emulated, one processor) has a disk from every contender at once; a
//! small program of ours in it ([`inside`]) loads one of them at a time, as it is told
//! over its console.
//!
//! ```text
//!   QEMU ── NBD, unix socket ──▶ ours, qemu-nbd, nbdkit        one file each, of the
//!    │  └─── vhost-user-blk ───▶ ours, qemu-storage-daemon     same size on one disk
//!    └ console: "10 read 4096 32 1000" ▶  ◀ "load: done 34000 …"
//! ```
//! CPU is read on the host, around each order, of the server and of QEMU: what
//! vhost-user saves is mostly QEMU's.

pub mod contender;
pub mod inside;
pub mod report;
mod scene;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use super::contender::Medium;
use super::load::{Deed, Done, Load};
use crate::process::interrupted;
use crate::statistic::Sample;
use contender::Contender;
use scene::Scene;

#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// For `--rows`.
    pub id: &'static str,
    pub load: Load,
    pub medium: Medium,
}

const fn row(id: &'static str, deed: Deed, block_bytes: u32, depth: u32, medium: Medium) -> Row {
    Row { id, load: Load { deed, block_bytes, depth, connections: 1 }, medium }
}

pub const ROWS: [Row; 7] = [
    row("guest-one", Deed::Read, 4096, 1, Medium::Disk),
    row("guest-read", Deed::Read, 4096, 32, Medium::Disk),
    row("guest-write", Deed::Write, 4096, 32, Medium::Disk),
    row("guest-large-read", Deed::Read, 1 << 20, 4, Medium::Disk),
    row("guest-large-write", Deed::Write, 1 << 20, 4, Medium::Disk),
    row("guest-cached", Deed::Read, 4096, 32, Medium::PageCache),
    row("guest-cached-large", Deed::Read, 1 << 20, 4, Medium::PageCache),
];

#[derive(Debug, Clone)]
pub struct Plan {
    pub rows: Vec<Row>,
    pub rounds: usize,
    pub duration: Duration,
    /// Of each contender's file.
    pub size_mib: u64,
    pub directory: PathBuf,
}

/// What was measured of one contender in one row.
#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub iops: Sample,
    /// As the guest sees it.
    pub p50_us: Sample,
    pub p99_us: Sample,
    /// CPU an operation.
    pub server_us: Sample,
    pub qemu_us: Sample,
    pub both_us: Sample,
    pub failure: Option<String>,
}

/// By row's place in the plan.
pub type Results = BTreeMap<(usize, Contender), Figures>;

/// Measures all of the plan: one guest for each medium, in it rounds, rows and
/// contenders in turn. `tell` gets a line for each measurement.
pub fn run(plan: &Plan, mut tell: impl FnMut(&str)) -> anyhow::Result<Results> {
    let mut results = Results::new();
    for medium in [Medium::Disk, Medium::PageCache] {
        if plan.rows.iter().any(|row| row.medium == medium) {
            measure(plan, medium, &mut results, &mut tell)?;
        }
    }
    Ok(results)
}

fn measure(
    plan: &Plan,
    medium: Medium,
    results: &mut Results,
    tell: &mut dyn FnMut(&str),
) -> anyhow::Result<()> {
    let rows = || plan.rows.iter().enumerate().filter(|(_, row)| row.medium == medium);
    let mut present = Vec::new();
    for contender in Contender::of(medium) {
        match contender.missing() {
            None => present.push(*contender),
            Some(missing) => {
                for (at, _) in rows() {
                    results.entry((at, *contender)).or_default().failure = Some(missing.clone());
                }
            }
        }
    }
    let mut scene = Scene::build(plan, medium, &present)?;
    for round in 0..plan.rounds {
        for (at, row) in rows() {
            for turn in 0..present.len() {
                anyhow::ensure!(!interrupted(), "interrupted");
                let place = (turn + round) % present.len();
                let used = scene.load(place, row.load, plan.duration)?;
                let contender = present[place];
                let (id, iops) = (row.id, used.done.iops);
                tell(&format!("round {}: {id}, {contender}: {iops:.0} a second", round + 1));
                results.entry((at, contender)).or_default().add(&used);
            }
        }
    }
    Ok(())
}

/// One measurement.
struct Used {
    done: Done,
    server_seconds: f64,
    qemu_seconds: f64,
}

impl Figures {
    fn add(&mut self, used: &Used) {
        let each = |seconds: f64| seconds * 1e6 / used.done.operations as f64;
        self.iops.push(used.done.iops);
        self.p50_us.push(used.done.p50_us);
        self.p99_us.push(used.done.p99_us);
        self.server_us.push(each(used.server_seconds));
        self.qemu_us.push(each(used.qemu_seconds));
        self.both_us.push(each(used.server_seconds + used.qemu_seconds));
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let medium = match self.medium {
            Medium::Disk => "past the host's page cache",
            Medium::PageCache => "from the host's page cache",
        };
        write!(f, "{}: {} in the guest, {medium}", self.id, self.load)
    }
}
