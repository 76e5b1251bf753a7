//! The answer as text.

use super::{Carried, Flooded, Replaced};
use crate::statistic::{Sample, ratio};
use crate::table::{Table, figure, times};

const NOTES: &str = "\
Openings of TCP connections from 2^30 pairs of address and port arrive on the uplink by BPF_F_TEST_XDP_LIVE_FRAMES, as
quickly as one core can send them, for a port that a rule permits; the flooded instance drops them. All other traffic
shares the other core. A connection is lost if it broke or heard nothing for 20 s; half of those that spoke and half of
those that were silent are the flooded instance's own. Newcomers want a connection to the neighbour every 100 ms and
wait 3 s. MB/s are of one bulk transfer to the neighbour, medians of seconds. nftables does connection tracking, DNAT
and SNAT by map and the same rules; its table has as many places as the kernel gives it by default.
The guest is a real one under QEMU's emulation, with virtio-net's default offloads, over the same tap both times;
plainly routed means by the kernel alone: nothing judged, nothing translated.
The daemon is `dataplane serve`; \"another layout\" means that it finds maps that are not its own, makes new ones, carries
over flows and exchanges the programs, as an upgrade does.
";

pub fn text(
    floods: &[anyhow::Result<Flooded>],
    carried: &anyhow::Result<Carried>,
    replaced: &Replaced,
) -> String {
    let mut text = flooded(floods) + &self::carried(carried) + &self::replaced(replaced);
    text.push_str(&format!("\n{NOTES}"));
    text
}

fn flooded(floods: &[anyhow::Result<Flooded>]) -> String {
    let mut table = Table::new([
        "keeper",
        "openings/s",
        "in all",
        "talkers lost",
        "sleepers lost",
        "newcomers let in",
        "MB/s quiet",
        "flooded",
        "least",
        "kept",
    ]);
    for flood in floods {
        let f = match flood {
            Ok(flood) => flood,
            Err(error) => {
                table.remark("", format!("not measured: {error:#}"));
                continue;
            }
        };
        let least = f.flooded.summary().map(|s| s.min);
        table.row([
            f.keeper.to_string(),
            figure(Some(f.rate), 0),
            f.frames.to_string(),
            format!("{} of {}", f.talkers_lost.len(), f.connections),
            format!("{} of {}", f.sleepers_lost.len(), f.connections),
            format!("{} of {}", f.opened, f.tried),
            figure(f.quiet.median(), 0),
            figure(f.flooded.median(), 0),
            figure(least, 0),
            times(ratio(f.flooded.median(), f.quiet.median())),
        ]);
    }
    let seconds = floods.iter().flatten().map(|f| f.seconds).max().unwrap_or(0);
    format!("\na flood of openings for {seconds} s\n\n{}", table.text())
}

fn carried(carried: &anyhow::Result<Carried>) -> String {
    let mut table = Table::new([
        "a guest's TCP, MB/s",
        "plainly routed",
        "spread",
        "elastic address",
        "spread",
        "of plain",
    ]);
    match carried {
        Err(error) => table.remark("", format!("not measured: {error:#}")),
        Ok(carried) => {
            for (name, ways) in [("to", &carried.to_guest), ("from", &carried.from_guest)] {
                let spread = |sample: &Sample| figure(sample.summary().map(|s| s.spread()), 2);
                table.row([
                    format!("{name} the guest"),
                    figure(ways.plain.median(), 1),
                    spread(&ways.plain),
                    figure(ways.elastic.median(), 1),
                    spread(&ways.elastic),
                    times(ratio(ways.elastic.median(), ways.plain.median())),
                ]);
            }
        }
    }
    format!("\n{}", table.text())
}

fn replaced(r: &Replaced) -> String {
    let mut table = Table::new(["the daemon is replaced under traffic", "count"]);
    table.row(["kill -9 and a new start".to_owned(), r.kills.to_string()]);
    table.row(["another layout of the maps takes over".to_owned(), r.layouts.to_string()]);
    table.row([
        format!("of {} TCP connections that spoke, lost", r.connections),
        r.connections_lost.len().to_string(),
    ]);
    table.row([
        format!("of {} datagrams, unanswered", r.sent),
        r.sent.saturating_sub(r.heard).to_string(),
    ]);
    if let Some(ready) = r.ready_ms.summary() {
        let name = format!("ms until it is ready again ({:.0} to {:.0})", ready.min, ready.max);
        table.row([name, figure(Some(ready.median), 0)]);
    }
    format!("\n{}", table.text())
}
