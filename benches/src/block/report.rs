//! The answer as text.

use crate::block::contender::{Contender, Transport};
use crate::block::fio::Workload;
use crate::block::{Figures, Place, Plan, Results};
use crate::machine;
use crate::statistic::{Sample, ratio};
use crate::table::{Table, figure, thousands, times};

/// What a reader must know before the figures.
const NOTES: &str = "\
One connection, fio on the same cores as the server. Medians of the rounds; spread is the least round by the greatest:
under 0.8 the machine was not quiet enough to trust a small difference.
CPU is the server's user and system time (all its threads, io_uring's workers included) by operations done.
\"of peer\" is against the best of the qemu-nbd rows of the same table (most operations; least CPU; least p99).
* nbdkit's file plugin knows no O_DIRECT: it serves a file that lies wholly in the page cache, writes go to
  memory, and it stands beside the others for orientation, not as a peer in these ratios.
";

/// The tables, and what a reader must know of them.
pub fn text(plan: &Plan, results: &Results) -> String {
    let mut text = String::new();
    for &workload in &plan.workloads {
        let raw = raw_iops(results, workload);
        for &transport in &plan.transports {
            text.push_str(&format!("\n{workload}, {transport}\n\n"));
            text.push_str(&table(results, workload, transport, raw).text());
        }
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
        "4 KiB over NBD, side by side\n\ncommand: {}\nrevision: {}\n{}versions: {}; {}; {}\n\
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
        plan.seconds,
    )
}

fn raw_iops(results: &Results, workload: Workload) -> Option<f64> {
    results
        .iter()
        .find(|(p, _)| p.workload == workload && p.contender == Contender::RawFile)
        .and_then(|(_, figures)| figures.iops.median())
}

/// The best of the peers: most operations, least CPU, least p99, each for itself.
#[derive(Debug, Default, PartialEq)]
struct Best {
    iops: Option<f64>,
    cpu_us: Option<f64>,
    p99_us: Option<f64>,
}

impl Best {
    fn of<'a>(peers: impl Iterator<Item = &'a Figures> + Clone) -> Self {
        let medians = |sample: fn(&Figures) -> &Sample| {
            peers.clone().filter_map(move |figures| sample(figures).median())
        };
        Self {
            iops: medians(|f| &f.iops).max_by(f64::total_cmp),
            cpu_us: medians(|f| &f.cpu_us).min_by(f64::total_cmp),
            p99_us: medians(|f| &f.p99_us).min_by(f64::total_cmp),
        }
    }
}

fn table(results: &Results, workload: Workload, transport: Transport, raw: Option<f64>) -> Table {
    let here = |contender| results.get(&Place { workload, transport, contender });
    let best = Best::of(Contender::ALL.into_iter().filter(|c| c.is_peer()).filter_map(here));
    let mut table = Table::new([
        "server",
        "IOPS",
        "min",
        "max",
        "spread",
        "of peer",
        "of raw",
        "p99 µs",
        "of peer",
        "CPU µs/op",
        "of peer",
    ]);
    for contender in Contender::ALL {
        let Some(figures) = here(contender) else { continue };
        let Some(iops) = figures.iops.summary() else {
            let why = figures.failure.clone().unwrap_or_else(|| "not measured".into());
            table.remark(contender.to_string(), why);
            continue;
        };
        let compared = contender == Contender::Ours || contender.is_peer();
        let of_peer = |own: Option<f64>, peer| times(ratio(own, peer).filter(|_| compared));
        let (p99, cpu) = (figures.p99_us.median(), figures.cpu_us.median());
        table.row([
            contender.to_string(),
            thousands(Some(iops.median)),
            thousands(Some(iops.min)),
            thousands(Some(iops.max)),
            figure(Some(iops.spread()), 2),
            of_peer(Some(iops.median), best.iops),
            times(ratio(Some(iops.median), raw)),
            figure(p99, 0),
            of_peer(p99, best.p99_us),
            figure(cpu, 1),
            of_peer(cpu, best.cpu_us),
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
    use crate::block::fio::RANDOM_4K;

    fn figures(iops: &[f64], p99_us: f64, cpu_us: f64) -> Figures {
        Figures {
            iops: iops.iter().copied().collect(),
            p99_us: [p99_us].into_iter().collect(),
            cpu_us: [cpu_us].into_iter().collect(),
            failure: None,
        }
    }

    fn results(entries: Vec<(Contender, Figures)>) -> Results {
        let place =
            |contender| Place { workload: RANDOM_4K[0], transport: Transport::Unix, contender };
        entries.into_iter().map(|(contender, figures)| (place(contender), figures)).collect()
    }

    #[test]
    fn ours_stands_against_the_best_peer_of_each_column() {
        let results = results(vec![
            (Contender::RawFile, figures(&[100_000.0], 900.0, 0.0)),
            (Contender::QemuUring, figures(&[50_000.0, 52_000.0, 40_000.0], 3000.0, 14.0)),
            (Contender::QemuNative, figures(&[40_000.0], 2000.0, 10.0)),
            (Contender::Nbdkit, figures(&[200_000.0], 800.0, 5.0)),
            (Contender::Ours, figures(&[75_000.0], 1000.0, 4.0)),
        ]);
        let raw = raw_iops(&results, RANDOM_4K[0]);
        let text = table(&results, RANDOM_4K[0], Transport::Unix, raw).text();
        let line = |name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap().to_owned();
            line.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let ours = line("hostplane");
        assert_eq!(
            ours[2..],
            ["75.0k", "75.0k", "75.0k", "1.00", "1.50x", "0.75x", "1000", "0.50x", "4.0", "0.40x"]
        );
        assert!(line("nbdkit").iter().filter(|c| *c == "–").count() == 3, "{text}");
        assert_eq!(line("qemu-nbd cache=none aio=io_uring")[6], "0.77");
    }

    #[test]
    fn a_missing_peer_is_a_row_that_says_so() {
        let missing =
            Figures { failure: Some("nbdkit is not installed".into()), ..Figures::default() };
        let results = results(vec![(Contender::Nbdkit, missing)]);
        let text = table(&results, RANDOM_4K[0], Transport::Unix, None).text();
        assert!(text.contains("nbdkit is not installed"), "{text}");
    }
}
