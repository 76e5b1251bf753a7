//! The answer as text.

use super::contender::Contender;
use super::{Figures, Plan, Results};
use crate::block::load::Load;
use crate::machine;
use crate::statistic::{Sample, ratio};
use crate::table::{Table, figure, thousands, times};

const NOTES: &str = "\
One emulated guest (TCG, one processor) has all disks of a medium at once, each with a server and a file of its own, and
loads one at a time by Linux AIO past its own page cache; contenders take turns within each round. Medians of the
rounds; spread is the least round by the greatest: under 0.8 the machine was not quiet enough to trust a small
difference. CPU is user and system time by operations done: of the server (all its threads, io_uring's workers
included), of QEMU (which emulates the guest, too: the same guest for all), and of both. \"of peer\" is against the best
of the others on the same front; \"of our NBD\" says what vhost-user saves. Operations are bounded by the emulated
processor: read the CPU first. nbdkit's file plugin knows no O_DIRECT, and takes part from the page cache only.
";

pub fn header(plan: &Plan) -> String {
    let version = |program: &str| {
        machine::version(program, "--version")
            .unwrap_or_else(|| format!("{program}: not installed"))
    };
    format!(
        "A guest's disk, by NBD and by vhost-user\n\ncommand: {}\nrevision: {}\n{}versions: {}; {}; {}; {}\n\
         files: {} MiB each, fully written, {}\nrounds: {}, of {} s a measurement, alternating\n",
        machine::command_line("block"),
        machine::revision(),
        machine::describe(),
        version("qemu-system-x86_64"),
        version("qemu-nbd"),
        version("nbdkit"),
        version("qemu-storage-daemon"),
        plan.size_mib,
        machine::file_system(&plan.directory),
        plan.rounds,
        plan.duration.as_secs_f64(),
    )
}

pub fn text(plan: &Plan, results: &Results) -> String {
    let mut text = String::new();
    for (at, row) in plan.rows.iter().enumerate() {
        text.push_str(&format!("\n{row}\n\n{}", table(row.load, results, at).text()));
    }
    format!("{text}\n{NOTES}")
}

/// The best of the others on the contender's front, in one column.
fn best(
    results: &Results,
    at: usize,
    contender: Contender,
    sample: fn(&Figures) -> &Sample,
    better: fn(f64, f64) -> f64,
) -> Option<f64> {
    let is_peer = |c: Contender| !c.is_ours() && c.is_vhost_user() == contender.is_vhost_user();
    let peers = results.iter().filter(|((row, c), _)| *row == at && is_peer(*c));
    peers.filter_map(|(_, figures)| sample(figures).median()).reduce(better)
}

fn amount(load: Load, iops: Option<f64>) -> String {
    if load.block_bytes >= 1 << 20 {
        figure(iops.map(|iops| iops * f64::from(load.block_bytes) / 1e6), 0)
    } else {
        thousands(iops)
    }
}

fn table(load: Load, results: &Results, at: usize) -> Table {
    let amounts = if load.block_bytes >= 1 << 20 { "MB/s" } else { "IOPS" };
    let mut table = Table::new([
        "disk",
        amounts,
        "min",
        "max",
        "spread",
        "of peer",
        "of our NBD",
        "p50 µs",
        "p99 µs",
        "server µs/op",
        "of peer",
        "QEMU µs/op",
        "both µs/op",
        "of peer",
        "of our NBD",
    ]);
    let nbd = results.get(&(at, Contender::OursNbd));
    let here = results.iter().filter(|((row, _), _)| *row == at);
    for (contender, figures) in here.map(|((_, contender), figures)| (*contender, figures)) {
        let Some(iops) = figures.iops.summary() else {
            let why = figures.failure.clone().unwrap_or_else(|| "not measured".into());
            table.remark(contender.to_string(), why);
            continue;
        };
        let of_peer = |sample: fn(&Figures) -> &Sample, better: fn(f64, f64) -> f64| {
            times(ratio(sample(figures).median(), best(results, at, contender, sample, better)))
        };
        let of_nbd = |sample: fn(&Figures) -> &Sample| {
            times(ratio(sample(figures).median(), nbd.and_then(|nbd| sample(nbd).median())))
        };
        table.row([
            contender.to_string(),
            amount(load, Some(iops.median)),
            amount(load, Some(iops.min)),
            amount(load, Some(iops.max)),
            figure(Some(iops.spread()), 2),
            of_peer(|f| &f.iops, f64::max),
            of_nbd(|f| &f.iops),
            figure(figures.p50_us.median(), 0),
            figure(figures.p99_us.median(), 0),
            figure(figures.server_us.median(), 2),
            of_peer(|f| &f.server_us, f64::min),
            figure(figures.qemu_us.median(), 2),
            figure(figures.both_us.median(), 2),
            of_peer(|f| &f.both_us, f64::min),
            of_nbd(|f| &f.both_us),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::guest::ROWS;

    fn figures(iops: f64, server_us: f64, qemu_us: f64) -> Figures {
        let one = |value: f64| [value].into_iter().collect();
        Figures {
            iops: one(iops),
            p50_us: one(1.0),
            p99_us: one(2.0),
            server_us: one(server_us),
            qemu_us: one(qemu_us),
            both_us: one(server_us + qemu_us),
            failure: None,
        }
    }

    #[test]
    fn each_front_has_its_peers_and_vhost_user_is_held_against_our_nbd() {
        let missing = Figures { failure: Some("not installed".into()), ..Figures::default() };
        let results: Results = [
            (Contender::QemuNbd, figures(20_000.0, 16.0, 30.0)),
            (Contender::Nbdkit, missing),
            (Contender::OursNbd, figures(30_000.0, 8.0, 32.0)),
            (Contender::StorageDaemon, figures(32_000.0, 5.0, 20.0)),
            (Contender::OursVhostUser, figures(33_000.0, 4.0, 16.0)),
        ]
        .into_iter()
        .map(|(contender, figures)| ((0, contender), figures))
        .collect();
        let text = table(ROWS[1].load, &results, 0).text();
        let line = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap();
            line.split_whitespace().skip(3).map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(
            line("NBD: hostplane"),
            [
                "30.0k", "30.0k", "30.0k", "1.00", "1.50x", "1.00x", "1", "2", "8.00", "0.50x",
                "32.00", "40.00", "0.87x", "1.00x"
            ]
        );
        assert_eq!(
            line("vhost-user: hostplane"),
            [
                "33.0k", "33.0k", "33.0k", "1.00", "1.03x", "1.10x", "1", "2", "4.00", "0.80x",
                "16.00", "20.00", "0.80x", "0.50x"
            ]
        );
        assert!(text.contains("not installed"), "{text}");
    }
}
