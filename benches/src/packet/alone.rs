//! What do our programs cost alone, without the kernel's way to them and from them?
//!
//! A frame is written anew before each run (the programs rewrite it), by a small
//! program that then hands over to ours; what the small one takes by itself is
//! taken off.

use anyhow::Context;

use crate::packet::bpf::Sender;
use crate::packet::contender::{Contender, Stage};
use crate::packet::frame::Template;
use crate::packet::program::Hook;
use crate::packet::scene::UPLINK_INDEX;
use crate::statistic::Sample;

const TIMES: u32 = 200_000;
const TC_REDIRECT: u32 = 7;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;

#[derive(Debug, Clone)]
pub struct Alone {
    pub what: &'static str,
    pub ns: Sample,
}

/// With `rules` rules, `rounds` times.
pub fn run(rules: usize, rounds: usize) -> anyhow::Result<Vec<Alone>> {
    let stage = Stage::build(Contender::Ours(rules))?;
    stage.establish_one()?;
    let (tc, xdp) = stage.programs()?;
    let unknown = stage.unknown();
    let questions = [
        ("uplink_ingress, established", Hook::Tc, tc, stage.template(), TC_REDIRECT),
        ("uplink_early, passed on", Hook::Xdp, xdp, stage.template(), XDP_PASS),
        ("uplink_early, unknown elastic address dropped", Hook::Xdp, xdp, &unknown, XDP_DROP),
    ];
    let mut answers = Vec::new();
    for (what, hook, program, template, answer) in questions {
        let ns = stage.within(|| one(hook, program, template, answer, rounds)).context(what)?;
        answers.push(Alone { what, ns });
    }
    Ok(answers)
}

fn one(
    hook: Hook,
    program: u32,
    template: &Template,
    answer: u32,
    rounds: usize,
) -> anyhow::Result<Sample> {
    let base = Sender::for_alone(hook, template, None)?;
    let whole = Sender::for_alone(hook, template, Some(program))?;
    let mut sample = Sample::default();
    for round in 0..=rounds {
        let (base, _) = base.alone(hook, UPLINK_INDEX, TIMES)?;
        let (whole, got) = whole.alone(hook, UPLINK_INDEX, TIMES)?;
        anyhow::ensure!(got == answer, "the program answered {got} instead of {answer}");
        if round > 0 {
            sample.push(f64::from(whole.saturating_sub(base)));
        }
    }
    Ok(sample)
}
