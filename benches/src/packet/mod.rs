//! What does a packet cost on its whole way through the host?
//!
//! Called by `src/bin/network.rs`. Frames arrive at the router's uplink, are
//! judged, translated and forwarded by one contender, and are counted where they
//! are delivered, in the instance's namespace. The kernel's own timer tells what
//! one of them took, all softirqs of its way included.
//!
//! ```text
//! each round, each flow pattern, each contender:
//!   forget flows ─▶ make the flows known (one packet, one answer each)
//!   ─▶ send live frames, timed ─▶ all delivered? ─▶ a figure
//! ```

pub mod alone;
pub mod bpf;
pub mod change;
pub mod contender;
pub mod frame;
pub mod iptables;
pub mod namespace;
pub mod nftables;
pub mod ours;
pub mod plot;
pub mod program;
pub mod report;
pub mod scene;
pub mod world;

use std::collections::BTreeMap;
use std::fmt;

use contender::{Contender, Stage};

use crate::statistic::Sample;

/// Which flows the packets belong to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Flows {
    /// So many flows in turn (a power of two), each answered before.
    Established(u32),
    /// Each packet is the first of its flow.
    New,
}

#[derive(Debug, Clone)]
pub struct Plan {
    pub flows: Vec<Flows>,
    pub contenders: Vec<Contender>,
    pub rounds: usize,
    /// Frames in one measurement, at most.
    pub frames: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub flows: Flows,
    pub contender: Contender,
}

#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub ns: Sample,
    /// Why there is no figure, or not in each round.
    pub failure: Option<String>,
}

pub type Results = BTreeMap<Place, Figures>;

/// Measures all of the plan; the first round warms up and is not told. The
/// process must have mounts of its own (`namespace::own_mounts`).
pub fn run(plan: &Plan, mut tell: impl FnMut(&str)) -> anyhow::Result<Results> {
    let mut results = Results::new();
    let mut stages = build_stages(plan, &mut results, &mut tell);
    for round in 0..=plan.rounds {
        for &flows in &plan.flows {
            for turn in 0..stages.len() {
                let index = (turn + round) % stages.len();
                let stage = &mut stages[index];
                let place = Place { flows, contender: stage.contender() };
                let figures = results.entry(place).or_default();
                match stage.measure(flows, plan.frames) {
                    Ok(ns) if round > 0 => {
                        tell(&format!("round {round}: {place}: {ns:.0} ns"));
                        figures.ns.push(ns);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        tell(&format!("round {round}: {place}: failed: {error:#}"));
                        figures.failure = Some(format!("failed: {error:#}"));
                    }
                }
            }
        }
    }
    Ok(results)
}

/// A contender that cannot be built has its reason in every table.
fn build_stages(plan: &Plan, results: &mut Results, tell: &mut impl FnMut(&str)) -> Vec<Stage> {
    let mut stages = Vec::new();
    for &contender in &plan.contenders {
        match Stage::build(contender) {
            Ok(stage) => stages.push(stage),
            Err(error) => {
                tell(&format!("{contender}: {error:#}"));
                for &flows in &plan.flows {
                    let failure = Some(format!("not measured: {error:#}"));
                    let figures = Figures { failure, ..Figures::default() };
                    results.insert(Place { flows, contender }, figures);
                }
            }
        }
    }
    stages
}

impl fmt::Display for Flows {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Established(1) => f.write_str("one established flow"),
            Self::Established(count) => write!(f, "{count} established flows in turn"),
            Self::New => f.write_str("every packet a new flow"),
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, {}", self.flows, self.contender)
    }
}
