//! The answer as text.

use super::contender::Contender;
use super::frames::{FRAME_BYTES, Traffic};
use super::{Place, Plan, Results};
use crate::machine;
use crate::statistic::ratio;
use crate::table::{Table, figure, times};

const NOTES: &str = "\
Nanoseconds of the kernel's own timer for one packet over the whole path: received on the uplink, looked up, its
elastic address translated, sent out to the guest, received by the guest's namespace, counted, dropped. Medians of the
rounds; spread is the least round by the greatest: under 0.8 the machine was not quiet enough to trust a small difference.
nftables: connection tracking accepts established flows first; addresses in maps, rules in one set of concatenated
intervals, anti-spoofing in a set. Plain forwarding has no rules, no translation, no tracking, and one destination less.
The same generator runs on every frame, and in our case calls our own XDP program after it, which is on our path.
";

pub fn header(plan: &Plan) -> String {
    let nft = machine::version("nft", "--version").unwrap_or_else(|| "nft: not installed".into());
    format!(
        "Nanoseconds a packet, side by side\n\ncommand: {}\nrevision: {}\n{}versions: {nft}\n{}\n\
         {} rounds of {} frames of {FRAME_BYTES} bytes (UDP), alternating\n",
        machine::command_line("network"),
        machine::revision(),
        machine::describe(),
        flowtable(),
        plan.rounds,
        plan.frames,
    )
}

/// nftables' own fast path for established flows is a module of its own.
fn flowtable() -> &'static str {
    let configuration = std::process::Command::new("zcat").arg("/proc/config.gz").output();
    let configuration = configuration.map(|o| o.stdout).unwrap_or_default();
    let configuration = String::from_utf8_lossy(&configuration);
    let has = |option: &str| configuration.lines().any(|l| l.starts_with(option));
    if configuration.is_empty() {
        "flowtable: not known (no /proc/config.gz); the rules here do not use one"
    } else if has("CONFIG_NF_FLOW_TABLE=") {
        "flowtable: this kernel has nftables' flowtable; the rules here do not use it"
    } else {
        "flowtable: this kernel has none (CONFIG_NF_FLOW_TABLE is off), so nftables shows its path without it"
    }
}

pub fn text(plan: &Plan, results: &Results) -> String {
    let mut text = String::new();
    for traffic in Traffic::ALL {
        for &rules in &plan.rules {
            text.push_str(&format!("\n{traffic}, {rules} rules\n\n"));
            text.push_str(&table(results, traffic, rules).text());
        }
    }
    text.push_str(&format!("\n{NOTES}"));
    text
}

fn table(results: &Results, traffic: Traffic, rules: usize) -> Table {
    let median = |contender| {
        let figures = results.get(&Place { traffic, rules, contender })?.as_ref().ok()?;
        figures.ns_a_packet.median()
    };
    let ours = median(Contender::Ours);
    let mut table = Table::new(["path", "ns/packet", "spread", "ours by it", "lost"]);
    for contender in Contender::ALL {
        match results.get(&Place { traffic, rules, contender }) {
            Some(Ok(figures)) => {
                let summary = figures.ns_a_packet.summary();
                table.row([
                    contender.to_string(),
                    figure(summary.map(|s| s.median), 0),
                    figure(summary.map(|s| s.spread()), 2),
                    times(ratio(ours, median(contender))),
                    figures.lost.to_string(),
                ]);
            }
            Some(Err(why)) => table.remark(contender.to_string(), why.clone()),
            None => table.remark(contender.to_string(), "not measured"),
        }
    }
    table
}
