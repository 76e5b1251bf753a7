//! `netctl top`: traffic a second, by interface, live.

use std::collections::BTreeMap;
use std::io::IsTerminal as _;
use std::time::Duration;

use clap::Args;
use rpc::dataplane::{Allowance, Credits, InterfaceStatus, Rates, Status, Traffic};
use serde_json::json;

use crate::api::Session;
use crate::failure::Outcome;
use crate::output::{self, Format};

/// What is no drop, of the names that the dataplane counts under.
const PASSED: &[&str] = &[
    "established",
    "established-early",
    "new-flow",
    "untracked",
    "fragment-follows",
    "icmp-error-sent",
    "dns",
    "related",
    "arp-answered",
    "dhcp",
    "metadata",
    "time",
    "neighbour-answered",
    "router-solicitation",
    "responder-reply",
    "not-ours",
];

#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:
  netctl top
  netctl top --rounds 1 -o json")]
pub struct Top {
    /// Seconds between two looks
    #[arg(long, short, default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub seconds: u64,
    /// End after so many rounds; else at an interrupt
    #[arg(long, short = 'n')]
    pub rounds: Option<u64>,
}

pub fn run(session: &Session, top: &Top) -> Outcome {
    let look = || {
        crate::wait_for(session.daemon("dataplane").dataplane_status())
            .map_err(|e| session.unreachable("top", e))
    };
    let mut before = look()?;
    let mut round = 0;
    while top.rounds.is_none_or(|rounds| round < rounds) {
        std::thread::sleep(Duration::from_secs(top.seconds));
        let after = look()?;
        let rates = rates(&before, &after, top.seconds);
        if session.format == Format::Json {
            output::json(&json!(rates.iter().map(Rate::json).collect::<Vec<_>>()))?;
        } else {
            if std::io::stdout().is_terminal() {
                output::line("\x1b[2J\x1b[H");
            }
            let rows: Vec<Vec<String>> = rates.iter().map(Rate::row).collect();
            output::table(
                &[
                    "INTERFACE",
                    "ADDRESS",
                    "FLOWS",
                    "OUT B/s",
                    "OUT P/s",
                    "IN B/s",
                    "IN P/s",
                    "CREDIT",
                    "DROPS/s",
                ],
                &rows,
            );
        }
        (before, round) = (after, round + 1);
    }
    Ok(())
}

/// One interface's, a second.
#[derive(Debug, PartialEq, Eq)]
struct Rate {
    interface: String,
    address: String,
    flows: u64,
    traffic: Traffic,
    limits: Rates,
    credits: Credits,
    drops: BTreeMap<String, u64>,
}

/// The busiest first.
fn rates(before: &Status, after: &Status, seconds: u64) -> Vec<Rate> {
    let earlier: BTreeMap<_, _> = before.interfaces.iter().map(|i| (i.id, i)).collect();
    let mut rates: Vec<Rate> =
        after.interfaces.iter().map(|i| rate(earlier.get(&i.id).copied(), i, seconds)).collect();
    rates.sort_by_key(|r| std::cmp::Reverse(r.traffic.from_bytes + r.traffic.to_bytes));
    rates
}

fn rate(before: Option<&InterfaceStatus>, after: &InterfaceStatus, seconds: u64) -> Rate {
    // One that is new, or whose device was made anew, has no past.
    let a_second = |now: u64, then: u64| now.saturating_sub(then) / seconds;
    let then = before.map_or(after.traffic, |b| b.traffic);
    let now = after.traffic;
    let drops = after
        .reasons
        .iter()
        .filter(|(name, _)| !PASSED.contains(&name.as_str()) && !name.starts_with("respond-"));
    let drops = drops.map(|(name, count)| {
        let earlier = before.map_or(*count, |b| b.reasons.get(name).copied().unwrap_or(0));
        (name.clone(), a_second(*count, earlier))
    });
    Rate {
        interface: after.id.to_string(),
        address: after.address.to_string(),
        flows: after.flows,
        limits: after.rates,
        credits: after.credits,
        traffic: Traffic {
            from_packets: a_second(now.from_packets, then.from_packets),
            from_bytes: a_second(now.from_bytes, then.from_bytes),
            to_packets: a_second(now.to_packets, then.to_packets),
            to_bytes: a_second(now.to_bytes, then.to_bytes),
        },
        drops: drops.filter(|(_, count)| *count > 0).collect(),
    }
}

impl Rate {
    fn row(&self) -> Vec<String> {
        let Traffic { from_packets, from_bytes, to_packets, to_bytes } = self.traffic;
        let drops: Vec<String> = self.drops.iter().map(|(name, n)| format!("{name} {n}")).collect();
        let numbers = [self.flows, from_bytes, from_packets, to_bytes, to_packets];
        let mut row = vec![self.interface.clone(), self.address.clone()];
        row.extend(numbers.iter().map(ToString::to_string));
        row.push(self.credit());
        row.push(if drops.is_empty() { "0".into() } else { drops.join(", ") });
        row
    }

    /// What is left of the credits that are nearest to their end.
    fn credit(&self) -> String {
        let share = |allowance: Option<Allowance>, left: Option<u64>| {
            let whole = allowance?.credit;
            if whole == 0 { None } else { Some(left?.min(whole) as u128 * 100 / whole as u128) }
        };
        let (limits, left) = (&self.limits, &self.credits);
        let shares = [
            share(limits.outgoing, left.outgoing),
            share(limits.incoming, left.incoming),
            share(limits.packets, left.packets),
        ];
        shares.into_iter().flatten().min().map_or_else(|| "-".into(), |s| format!("{s}%"))
    }

    fn json(&self) -> serde_json::Value {
        json!({
            "interface": self.interface,
            "address": self.address,
            "flows": self.flows,
            "a_second": self.traffic,
            "drops_a_second": self.drops,
            "rates": self.limits,
            "credits": self.credits,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(from_bytes: u64, denied: u64) -> InterfaceStatus {
        InterfaceStatus {
            id: model::InterfaceId::from_random(1),
            device: "tap".into(),
            address: [10, 0, 0, 1].into(),
            elastic: None,
            secondary: vec![],
            reasons: [("ingress-denied".into(), denied), ("established".into(), 9)].into(),
            traffic: Traffic { from_bytes, ..Traffic::default() },
            flows: 3,
            rates: Rates::default(),
            credits: Credits::default(),
        }
    }

    #[test]
    fn what_grew_between_two_looks_is_told_a_second() {
        let rate = rate(Some(&status(1000, 4)), &status(5000, 24), 2);
        assert_eq!(rate.traffic.from_bytes, 2000);
        assert_eq!(rate.drops, [("ingress-denied".to_owned(), 10)].into());
        assert_eq!(rate.credit(), "-");
        let allowance = Allowance { baseline: 1, peak: 2, credit: 1000 };
        let mut limited = status(0, 0);
        limited.rates = Rates { outgoing: Some(allowance), ..Rates::default() };
        limited.credits.outgoing = Some(420);
        assert_eq!(super::rate(None, &limited, 1).credit(), "42%");
        // A device made anew counts from zero, and one that is new has no past.
        assert_eq!(super::rate(Some(&status(9000, 4)), &status(10, 4), 1).traffic.from_bytes, 0);
        assert_eq!(super::rate(None, &status(9000, 4), 1).traffic.from_bytes, 0);
    }
}
