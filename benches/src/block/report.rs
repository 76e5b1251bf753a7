//! The answer as text.

use crate::block::contender::{Contender, Medium};
use crate::block::load::Load;
use crate::block::row::{Ratio, Row};
use crate::block::{Figures, Plan, Results};
use crate::machine;
use crate::statistic::{Sample, ratio};
use crate::table::{Table, figure, thousands, times};

/// What a reader must know before the figures.
const NOTES: &str = "\
The client runs on the same cores as the server; it is our own (benches/src/block/client), one thread, simple replies,
except in the rows that name fio. Medians of the rounds; spread is the least round by the greatest: under 0.8 the
machine was not quiet enough to trust a small difference, and the row was measured anew while there was time.
CPU is the server's user and system time (all its threads, io_uring's workers included) by operations done; client is
the load's own. \"of peer\" is against the best of the others' rows of the same table (most operations; least of the rest).
\"of raw\" is against fio on the file itself (io_uring, O_DIRECT), without any server. Ours runs as it is by default, with
its metrics on; from the page cache with `--cache writeback`. nbdkit's file plugin knows no O_DIRECT, and so is a peer
only there.
";

/// The tables, how the goals stand, and what a reader must know of them.
pub fn text(plan: &Plan, results: &Results) -> String {
    let mut text = format!("\nGoals\n\n{}", goals(plan, results).text());
    for (at, row) in plan.rows.iter().enumerate() {
        text.push_str(&format!("\n{row}\n\n"));
        text.push_str(&table(plan, results, at).text());
    }
    text.push_str(&format!("\n{NOTES}"));
    text
}

/// What was measured, on what, with what; taken before the run, so that the load
/// is the machine's own.
pub fn header(plan: &Plan) -> String {
    let version = |program: &str| {
        machine::version(program, "--version")
            .unwrap_or_else(|| format!("{program}: not installed"))
    };
    format!(
        "Blocks over NBD, side by side\n\ncommand: {}\nrevision: {}\n{}versions: {}; {}; {}\n\
         file: {} MiB, fully written, {}\nrounds: {}, of {} s a measurement, alternating\n",
        machine::command_line("block"),
        machine::revision(),
        machine::describe(),
        version("fio"),
        version("qemu-nbd"),
        version("nbdkit"),
        plan.size_mib,
        machine::file_system(&plan.directory),
        plan.rounds,
        plan.duration.as_secs_f64(),
    )
}

/// Of fio on the file, under the same load, in whatever row it was measured.
fn raw_iops(plan: &Plan, results: &Results, row: &Row) -> Option<f64> {
    let is_same = |r: &Row| r.load == row.load && r.medium == row.medium;
    let mut same = plan.rows.iter().enumerate().filter(|(_, r)| is_same(r));
    same.find_map(|(at, _)| results.get(&(at, Contender::RawFile))?.iops.median())
}

/// The best of the peers: most operations, least of the rest, each for itself.
#[derive(Debug, Default, PartialEq)]
pub struct Best {
    pub iops: Option<f64>,
    pub cpu_us: Option<f64>,
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
}

impl Best {
    pub fn of(results: &Results, at: usize, medium: Medium) -> Self {
        let peers = || results.iter().filter(|((row, c), _)| *row == at && c.is_peer(medium));
        let medians = |sample: fn(&Figures) -> &Sample| {
            peers().filter_map(move |(_, figures)| sample(figures).median())
        };
        Self {
            iops: medians(|f| &f.iops).max_by(f64::total_cmp),
            cpu_us: medians(|f| &f.cpu_us).min_by(f64::total_cmp),
            p50_us: medians(|f| &f.p50_us).min_by(f64::total_cmp),
            p99_us: medians(|f| &f.p99_us).min_by(f64::total_cmp),
        }
    }
}

/// What a goal speaks of, as measured.
fn measured(plan: &Plan, results: &Results, at: usize, goal: Ratio) -> Option<f64> {
    let row = &plan.rows[at];
    let ours = results.get(&(at, Contender::Ours))?;
    let best = Best::of(results, at, row.medium);
    match goal {
        Ratio::Operations => ratio(ours.iops.median(), best.iops),
        Ratio::OfRaw => ratio(ours.iops.median(), raw_iops(plan, results, row)),
        Ratio::Cpu => ratio(ours.cpu_us.median(), best.cpu_us),
        Ratio::P50 => ratio(ours.p50_us.median(), best.p50_us),
        Ratio::P99 => ratio(ours.p99_us.median(), best.p99_us),
    }
}

fn goals(plan: &Plan, results: &Results) -> Table {
    let mut table = Table::new(["row", "figure", "goal", "measured", ""]);
    for (at, row) in plan.rows.iter().enumerate() {
        for (goal, bound) in row.goals {
            let measured = measured(plan, results, at, *goal);
            let least = goal.is_at_least();
            let is_met = measured.map(|m| if least { m >= *bound } else { m <= *bound });
            table.row([
                row.id.to_owned(),
                goal.to_string(),
                format!("{} {}", if least { "≥" } else { "≤" }, times(Some(*bound))),
                times(measured),
                is_met.map_or("", |met| if met { "met" } else { "short" }).to_owned(),
            ]);
        }
    }
    table
}

/// Small blocks are counted, large ones weighed.
fn amount(load: Load, iops: Option<f64>) -> String {
    if is_weighed(load) {
        figure(iops.map(|iops| iops * f64::from(load.block_bytes) / 1e6), 0)
    } else {
        thousands(iops)
    }
}

fn is_weighed(load: Load) -> bool {
    load.block_bytes >= 1 << 20
}

fn table(plan: &Plan, results: &Results, at: usize) -> Table {
    let row = &plan.rows[at];
    let load = row.load;
    let best = Best::of(results, at, row.medium);
    let raw = raw_iops(plan, results, row);
    let amounts = if is_weighed(load) { "MB/s" } else { "IOPS" };
    let mut table = Table::new([
        "server",
        amounts,
        "min",
        "max",
        "spread",
        "of peer",
        "of raw",
        "p50 µs",
        "of peer",
        "p99 µs",
        "of peer",
        "CPU µs/op",
        "of peer",
        "client",
    ]);
    let here = results.iter().filter(|((row, _), _)| *row == at);
    for (contender, figures) in here.map(|((_, contender), figures)| (*contender, figures)) {
        let Some(iops) = figures.iops.summary() else {
            let why = figures.failure.clone().unwrap_or_else(|| "not measured".into());
            table.remark(contender.to_string(), why);
            continue;
        };
        let of_peer = |own: Option<f64>, peer| {
            times(ratio(own, peer).filter(|_| contender != Contender::RawFile))
        };
        let [p50, p99, cpu, client] =
            [&figures.p50_us, &figures.p99_us, &figures.cpu_us, &figures.client_us]
                .map(Sample::median);
        table.row([
            contender.to_string(),
            amount(load, Some(iops.median)),
            amount(load, Some(iops.min)),
            amount(load, Some(iops.max)),
            figure(Some(iops.spread()), 2),
            of_peer(Some(iops.median), best.iops),
            times(ratio(Some(iops.median), raw)),
            figure(p50, 0),
            of_peer(p50, best.p50_us),
            figure(p99, 0),
            of_peer(p99, best.p99_us),
            figure(cpu, 2),
            of_peer(cpu, best.cpu_us),
            figure(client, 2),
        ]);
        if let Some(failure) = &figures.failure {
            table.remark("", format!("(not in every round: {failure})"));
        }
    }
    table
}

impl std::fmt::Display for Ratio {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Operations => "operations, of peer",
            Self::OfRaw => "operations, of raw",
            Self::Cpu => "CPU, of peer",
            Self::P50 => "p50, of peer",
            Self::P99 => "p99, of peer",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::row::ROWS;

    fn figures(iops: &[f64], p99_us: f64, cpu_us: f64) -> Figures {
        Figures {
            iops: iops.iter().copied().collect(),
            p50_us: [p99_us / 2.0].into_iter().collect(),
            p99_us: [p99_us].into_iter().collect(),
            cpu_us: [cpu_us].into_iter().collect(),
            ..Figures::default()
        }
    }

    fn plan() -> Plan {
        Plan {
            rows: ROWS[..1].to_vec(),
            rounds: 1,
            duration: std::time::Duration::from_secs(1),
            size_mib: 1,
            directory: std::path::PathBuf::new(),
            time_max: std::time::Duration::ZERO,
            against: None,
            alone: false,
        }
    }

    fn results(rows: Vec<(Contender, Figures)>) -> Results {
        rows.into_iter().map(|(contender, figures)| ((0, contender), figures)).collect()
    }

    #[test]
    fn ours_stands_against_the_best_peer_of_each_column() {
        let results = results(vec![
            (Contender::RawFile, figures(&[100_000.0], 900.0, 0.0)),
            (Contender::QemuUring, figures(&[50_000.0, 52_000.0, 40_000.0], 3000.0, 14.0)),
            (Contender::QemuNative, figures(&[40_000.0], 2000.0, 10.0)),
            (Contender::Ours, figures(&[75_000.0], 1000.0, 4.0)),
        ]);
        let text = table(&plan(), &results, 0).text();
        let line = |text: &str, name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(
            line(&text, "hostplane")[2..],
            [
                "75.0k", "75.0k", "75.0k", "1.00", "1.50x", "0.75x", "500", "0.50x", "1000",
                "0.50x", "4.00", "0.40x", "–"
            ]
        );
        assert_eq!(line(&text, "qemu-nbd aio=io_uring")[5], "0.77");
        let text = goals(&plan(), &results).text();
        let met: Vec<String> =
            text.lines().skip(2).map(|l| line(l, "read-unix").join(" ")).collect();
        assert_eq!(
            met,
            [
                "read-unix operations, of peer ≥ 1.40x 1.50x met",
                "read-unix CPU, of peer ≤ 0.33x 0.40x short",
                "read-unix operations, of raw ≥ 0.75x 0.75x met",
                "read-unix p99, of peer ≤ 0.85x 0.50x met",
            ]
        );
    }

    #[test]
    fn a_missing_peer_is_a_row_that_says_so() {
        let missing =
            Figures { failure: Some("qemu-nbd is not installed".into()), ..Figures::default() };
        let results = results(vec![(Contender::QemuUring, missing)]);
        let text = table(&plan(), &results, 0).text();
        assert!(text.contains("qemu-nbd is not installed"), "{text}");
    }
}
