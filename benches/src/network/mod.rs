//! Nanoseconds a packet on its whole path through a host, ours beside
//! nftables and plain forwarding.
//!
//! ```text
//!  client namespace        router namespace                    guest namespace
//!  eth0 198.51.100.1 ─veth─ uplink0 ─▶ tcx | nftables | nothing ─▶ g1 ─veth─ eth0 10.0.0.5
//!                           ▲                                           │
//!                  frames injected here, as if                every frame counted
//!                  the device had received them               and dropped here
//! ```
//! Frames are made by `BPF_F_TEST_XDP_LIVE_FRAMES`: the kernel runs a program on
//! each and lets it go on into the stack, and times the whole, the far end's
//! reception included, by its own clock (it leaves out what it yields to others,
//! so that a busy machine disturbs it little).
//!
//! [`kernel`] is bpf(2) by hand, [`frames`] the frames and the program that
//! varies them, [`topology`] the namespaces, [`contender`] what each sets up in
//! the router, [`report`] the answer as text.

use std::collections::BTreeMap;

pub mod contender;
pub mod frames;
pub mod kernel;
pub mod report;
pub mod topology;

use contender::{Contender, Ready};
use frames::Traffic;

use crate::statistic::Sample;

#[derive(Debug, Clone)]
pub struct Plan {
    pub rounds: usize,
    /// Frames a measurement.
    pub frames: u32,
    /// Rules that the guest's group has; the last one matches.
    pub rules: Vec<usize>,
}

/// One row of the table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    pub traffic: Traffic,
    pub rules: usize,
    pub contender: Contender,
}

#[derive(Debug, Clone, Default)]
pub struct Figures {
    pub ns_a_packet: Sample,
    /// Frames that were sent and did not arrive, over all rounds.
    pub lost: u64,
}

/// What was measured, or why it could not be.
pub type Results = BTreeMap<Place, Result<Figures, String>>;

/// Measures all places in alternating rounds.
pub fn run(plan: &Plan, mut progress: impl FnMut(String)) -> anyhow::Result<Results> {
    let mut results = Results::new();
    for &rules in &plan.rules {
        let mut ready: Vec<(Contender, Result<Ready, String>)> = Vec::new();
        for contender in Contender::ALL {
            progress(format!("{contender}, {rules} rules: set up"));
            let made = Ready::set_up(contender, rules).map_err(|e| format!("{e:#}"));
            ready.push((contender, made));
        }
        for round in 0..plan.rounds {
            for traffic in Traffic::ALL {
                for (contender, ready) in &mut ready {
                    let place = Place { traffic, rules, contender: *contender };
                    let figures = results.entry(place).or_insert_with(|| Ok(Figures::default()));
                    measure(ready, traffic, plan.frames, figures);
                    progress(format!("round {}: {contender}, {rules} rules, {traffic}", round + 1));
                    anyhow::ensure!(!crate::process::interrupted(), "interrupted");
                }
            }
        }
    }
    Ok(results)
}

fn measure(
    ready: &mut Result<Ready, String>,
    traffic: Traffic,
    frames: u32,
    figures: &mut Result<Figures, String>,
) {
    let measured = match ready {
        Ok(ready) => ready.measure(traffic, frames).map_err(|e| format!("{e:#}")),
        Err(why) => Err(why.clone()),
    };
    match (measured, &mut *figures) {
        (Ok(measured), Ok(figures)) => {
            figures.ns_a_packet.push(measured.ns_a_packet);
            figures.lost += measured.lost;
        }
        (Err(why), figures) => *figures = Err(why),
        (Ok(_), Err(_)) => {}
    }
}
