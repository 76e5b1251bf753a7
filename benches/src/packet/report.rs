//! The answer as text.

use crate::machine;
use crate::packet::alone::Alone;
use crate::packet::change::Change;
use crate::packet::contender::Contender;
use crate::packet::nftables::Shape;
use crate::packet::{Figures, Flows, Place, Plan, Results};
use crate::statistic::ratio;
use crate::table::{Table, figure, times};

/// What a reader must know beside the figures.
const NOTES: &str = "\
Nanoseconds a packet over the whole way: uplink's receive path, verdict, translation, forwarding, the veth to the
instance's namespace; 60-byte UDP frames sent by BPF_F_TEST_XDP_LIVE_FRAMES on one core, timed by the kernel, every one
counted where it was delivered (a run that lost one is no figure). Medians of the rounds; spread is the least round by
the greatest: under 0.8 the machine was not quiet enough to trust a small difference.
\"of nft\" is against the faster of nftables' set shapes with as many rules; \"of plain\" against plain forwarding,
which neither judges nor translates. nftables does connection tracking, anti-spoofing, 1:1 DNAT and SNAT by map, and
the rules, state first. Both have at most 1000 rules an instance; of 10000 rules there are ten instances, and
\"a line a rule\" comes to the measured instance last. \"of ours\" is against hostplane by tcx with as many rules: how many
times as long a peer takes. \"of least\" is against the same contender with the fewest rules: whether their number is felt.
At 100000 rules there are a hundred instances, each with rules of its own. iptables is iptables-legacy.
This kernel has no nftables flowtable (CONFIG_NF_FLOW_TABLE is off): where there is one, nftables' established flows
cost less than here. \"to a namespace\" is the way to an instance that is a namespace and no guest (bpf_redirect_peer); \"XDP early drop
too\" is what ours adds on an uplink whose driver is a network card's. On a veth that stage is off unless asked for.
";

/// What was measured, on what; taken before the run.
pub fn header(plan: &Plan) -> String {
    let nft = machine::version("nft", "--version").unwrap_or_else(|| "nft: not installed".into());
    let jit = std::fs::read_to_string("/proc/sys/net/core/bpf_jit_enable").unwrap_or_default();
    format!(
        "Nanoseconds a packet, side by side\n\ncommand: {}\nrevision: {}\n{}versions: {nft}; \
         BPF JIT {}\nrounds: {} and one to warm up, alternating; up to {} frames a measurement\n",
        machine::command_line("network"),
        machine::revision(),
        machine::describe(),
        if jit.trim() == "0" { "off" } else { "on" },
        plan.rounds,
        plan.frames,
    )
}

/// Our programs alone.
pub fn alone(rows: &[Alone]) -> String {
    let mut table = Table::new(["program alone, 1000 rules", "ns", "min", "max", "spread"]);
    for row in rows {
        let Some(ns) = row.ns.summary() else { continue };
        let figures = [ns.median, ns.min, ns.max].map(|ns| figure(Some(ns), 0));
        let [median, min, max] = figures;
        table.row([row.what.to_owned(), median, min, max, figure(Some(ns.spread()), 2)]);
    }
    format!("\nour programs alone (BPF_PROG_TEST_RUN, hot)\n\n{}", table.text())
}

/// When a change of the rules is seen by packets.
pub fn changes(rows: &[Change]) -> String {
    let heading =
        ["one rule of 1000 changes", "visible after, us", "min", "max", "compiled too, ms"];
    let mut table = Table::new(heading);
    for row in rows {
        let Some(us) = row.visible_us.summary() else { continue };
        let name = match row.interfaces {
            1 => "for one interface".to_owned(),
            n => format!("for {n} interfaces that share the group, the last of them"),
        };
        let [median, min, max] = [us.median, us.min, us.max].map(|us| figure(Some(us), 0));
        table.row([name, median, min, max, figure(row.whole_ms.median(), 1)]);
    }
    format!("\na change of the rules, until a packet is judged by it\n\n{}", table.text())
}

/// The tables, and what a reader must know of them.
pub fn text(plan: &Plan, results: &Results) -> String {
    let mut text = String::new();
    for &flows in &plan.flows {
        text.push_str(&format!("\n{flows}\n\n{}", table(plan, results, flows).text()));
    }
    text.push_str(&format!("\n{NOTES}"));
    text
}

fn table(plan: &Plan, results: &Results, flows: Flows) -> Table {
    let here = |contender| results.get(&Place { flows, contender });
    let median = |contender| here(contender).and_then(|f: &Figures| f.ns.median());
    let plain = median(Contender::Plain);
    let best_nft = |rules| {
        let shapes = [Shape::Set, Shape::Sets].into_iter();
        shapes.filter_map(|s| median(Contender::Nft(s, rules))).min_by(f64::total_cmp)
    };
    // The same with the least number of rules: whether their number is felt.
    let least = |contender: Contender| {
        let kind = contender.kind();
        let alike = plan.contenders.iter().filter(|c| c.kind() == kind);
        alike.min_by_key(|c| c.rules()).filter(|c| **c != contender).and_then(|c| median(*c))
    };
    let ours = |contender: Contender| match contender {
        Contender::Nft(..) | Contender::Iptables(_) => {
            median(Contender::OursOnTcx(contender.rules()))
        }
        _ => None,
    };
    let mut table = Table::new([
        "contender",
        "ns",
        "min",
        "max",
        "spread",
        "of nft",
        "of plain",
        "of ours",
        "of least",
    ]);
    for &contender in &plan.contenders {
        let Some(figures) = here(contender) else { continue };
        let Some(ns) = figures.ns.summary() else {
            let why = figures.failure.clone().unwrap_or_else(|| "not measured".into());
            table.remark(contender.to_string(), why);
            continue;
        };
        let nft = match contender {
            Contender::Plain => None,
            // Nobody measures the peers at so many.
            _ => best_nft(contender.rules()),
        };
        table.row([
            contender.to_string(),
            figure(Some(ns.median), 0),
            figure(Some(ns.min), 0),
            figure(Some(ns.max), 0),
            figure(Some(ns.spread()), 2),
            times(ratio(Some(ns.median), nft)),
            times(ratio(Some(ns.median), plain)),
            times(ratio(Some(ns.median), ours(contender))),
            times(ratio(Some(ns.median), least(contender))),
        ]);
        if let Some(failure) = &figures.failure {
            table.remark("", format!("(not in every round: {failure})"));
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ours_stands_against_the_faster_set_shape_with_as_many_rules() {
        let contenders = vec![
            Contender::Plain,
            Contender::Nft(Shape::Set, 10),
            Contender::Nft(Shape::Set, 1000),
            Contender::Nft(Shape::Sets, 1000),
            Contender::Nft(Shape::Lines, 1000),
            Contender::Ours(1000),
        ];
        let ns = [500.0, 100.0, 800.0, 1000.0, 1.0, 400.0];
        let flows = Flows::New;
        let results = contenders
            .iter()
            .zip(ns)
            .map(|(&contender, ns)| {
                let ns = [ns].into_iter().collect();
                (Place { flows, contender }, Figures { ns, failure: None })
            })
            .collect();
        let plan = Plan { flows: vec![flows], contenders, rounds: 1, frames: 1 };
        let text = table(&plan, &results, flows).text();
        let ours = text.lines().find(|l| l.starts_with("hostplane")).unwrap();
        assert!(ours.contains("0.50x     0.80x"), "{text}");
    }
}
