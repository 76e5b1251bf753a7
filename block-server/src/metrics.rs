//! What a volume did, counted: by its worker alone, without a lock or an
//! allocation, to be read by anyone at any time.
//!
//! Latencies go to classes that grow with them: eight in each doubling, so that a
//! percentile is known to an eighth. From them come Prometheus' coarser histogram
//! ([`text`]) and the figures of `netctl volume top` ([`Counters::look`]).

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rpc::block::{KindStatistics, VolumeStatistics};

use crate::nbd::{self, Command};

/// The kinds that are counted apart; `other` is status and prefetch.
const KINDS: [&str; 6] = ["read", "write", "flush", "trim", "zeroes", "other"];

const ERRORS: [&str; 6] =
    ["perm", "io", "no_memory", "no_space", "not_supported", "shutdown_or_invalid"];

/// Classes in each doubling: 2^3.
const PRECISION: u32 = 3;

/// The longest latency that is told apart: 2^26 us, about a minute.
const LONGEST: u32 = 26;

const CLASSES: usize = ((LONGEST - PRECISION + 2) << PRECISION) as usize;

/// The bounds that Prometheus sees: 2^4 us to 2^26 us.
const COARSE: std::ops::RangeInclusive<u32> = 4..=LONGEST;

fn class_of(us: u64) -> usize {
    if us < 1 << PRECISION {
        return us as usize;
    }
    let doubling = 63 - us.leading_zeros();
    let within = (us >> (doubling - PRECISION)) & ((1 << PRECISION) - 1);
    let class = (u64::from(doubling - PRECISION + 1) << PRECISION) + within;
    (class as usize).min(CLASSES - 1)
}

/// The first latency, in us, above a class.
const fn end_of(class: usize) -> u64 {
    if class < 1 << PRECISION {
        return class as u64 + 1;
    }
    let doubling = (class >> PRECISION) as u32 - 1;
    let within = (class & ((1 << PRECISION) - 1)) as u64;
    ((1 << PRECISION) + within + 1) << doubling
}

/// One writer: a load and a store, where `fetch_add` would lock the bus.
fn add(counter: &AtomicU64, by: u64) {
    counter.store(counter.load(Ordering::Relaxed).wrapping_add(by), Ordering::Relaxed);
}

#[derive(Debug)]
struct Kind {
    bytes: AtomicU64,
    time_us: AtomicU64,
    errors: [AtomicU64; ERRORS.len()],
    classes: [AtomicU64; CLASSES],
}

impl Default for Kind {
    fn default() -> Self {
        Self {
            bytes: AtomicU64::default(),
            time_us: AtomicU64::default(),
            errors: Default::default(),
            classes: [const { AtomicU64::new(0) }; CLASSES],
        }
    }
}

impl Kind {
    fn operations(&self) -> u64 {
        self.classes.iter().map(|c| c.load(Ordering::Relaxed)).sum()
    }
}

/// Written by the volume's worker, read by anyone.
#[derive(Debug, Default)]
pub struct Counters {
    kinds: [Kind; KINDS.len()],
    in_flight: AtomicU64,
    throttled: AtomicU64,
    throttled_us: AtomicU64,
    syncs: AtomicU64,
    fences: AtomicU64,
    slow: AtomicU64,
}

impl Counters {
    /// A request came in whole.
    pub fn arrived(&self) {
        add(&self.in_flight, 1);
    }

    /// It is answered; `took` since it arrived.
    pub fn answered(
        &self,
        command: Command,
        length: u64,
        took: Duration,
        error: Option<nbd::Error>,
    ) {
        let kind = &self.kinds[match command {
            Command::Read => 0,
            Command::Write => 1,
            Command::Flush => 2,
            Command::Trim => 3,
            Command::WriteZeroes { .. } => 4,
            Command::Cache | Command::BlockStatus { .. } => 5,
        }];
        add(&self.in_flight, u64::MAX);
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        add(&kind.classes[class_of(took_us)], 1);
        add(&kind.time_us, took_us);
        match error {
            None => add(&kind.bytes, length),
            Some(error) => add(&kind.errors[place_of(error)], 1),
        }
    }

    /// A request waited for its limit or its turn.
    pub fn throttled(&self, waited: Duration) {
        add(&self.throttled, 1);
        add(&self.throttled_us, u64::try_from(waited.as_micros()).unwrap_or(u64::MAX));
    }

    pub fn synced(&self) {
        add(&self.syncs, 1);
    }

    /// A greater generation took the volume over.
    pub fn fenced(&self) {
        add(&self.fences, 1);
    }

    pub fn was_slow(&self) {
        add(&self.slow, 1);
    }

    pub fn look(&self, volume: String) -> VolumeStatistics {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let kinds = self.kinds.iter().zip(KINDS).map(|(kind, name)| {
            let errors = kind.errors.iter().zip(ERRORS);
            let classes = kind.classes.iter().enumerate();
            let statistics = KindStatistics {
                operations: kind.operations(),
                bytes: read(&kind.bytes),
                time_us: read(&kind.time_us),
                errors: errors
                    .map(|(count, name)| (name.to_owned(), read(count)))
                    .filter(|(_, count)| *count > 0)
                    .collect(),
                latencies_us: classes
                    .map(|(class, count)| (end_of(class), read(count)))
                    .filter(|(_, count)| *count > 0)
                    .collect(),
            };
            (name.to_owned(), statistics)
        });
        VolumeStatistics {
            volume,
            in_flight: read(&self.in_flight),
            throttled: read(&self.throttled),
            throttled_us: read(&self.throttled_us),
            syncs: read(&self.syncs),
            fences: read(&self.fences),
            slow: read(&self.slow),
            kinds: kinds.filter(|(_, kind)| kind.operations > 0).collect::<BTreeMap<_, _>>(),
        }
    }
}

const fn place_of(error: nbd::Error) -> usize {
    match error {
        nbd::Error::Perm => 0,
        nbd::Error::Io => 1,
        nbd::Error::NoMemory => 2,
        nbd::Error::NoSpace => 3,
        nbd::Error::NotSupported => 4,
        _ => 5,
    }
}

/// A label's value as the text format wants it.
fn escape(value: &str) -> String {
    value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

struct Family<'a> {
    out: &'a mut String,
    name: &'static str,
}

impl<'a> Family<'a> {
    fn begin(out: &'a mut String, name: &'static str, kind: &str, help: &str) -> Self {
        let _ = writeln!(out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        Self { out, name }
    }

    fn line(&mut self, suffix: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = writeln!(self.out, "{}{suffix}{{{labels}}} {value}", self.name);
    }
}

/// The text format of Prometheus. A kind appears once it was asked for, reads,
/// writes and flushes always.
pub fn text<'a>(volumes: impl Iterator<Item = (String, &'a Counters)>) -> String {
    let volumes: Vec<_> = volumes
        .map(|(name, counters)| (format!("volume=\"{}\"", escape(&name)), counters))
        .collect();
    let kinds: Vec<(String, &Kind)> = volumes
        .iter()
        .flat_map(|(label, counters)| {
            let named = counters.kinds.iter().zip(KINDS).enumerate();
            named
                .filter(|(index, (kind, _))| *index < 3 || kind.operations() > 0)
                .map(move |(_, (kind, name))| (format!("{label},kind=\"{name}\""), kind))
        })
        .collect();
    let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    let mut out = String::new();
    let (counter, gauge) = ("counter", "gauge");
    let mut family =
        Family::begin(&mut out, "hostplane_volume_operations_total", counter, "Requests answered.");
    kinds.iter().for_each(|(labels, kind)| family.line("", labels, kind.operations()));
    let mut family =
        Family::begin(&mut out, "hostplane_volume_bytes_total", counter, "Bytes read or changed.");
    kinds.iter().for_each(|(labels, kind)| family.line("", labels, read(&kind.bytes)));
    let name = "hostplane_volume_errors_total";
    let mut family = Family::begin(&mut out, name, counter, "Requests answered with an error.");
    for (labels, kind) in &kinds {
        for (count, error) in kind.errors.iter().zip(ERRORS) {
            let count = read(count);
            if count > 0 || error == "io" {
                family.line("", &format!("{labels},error=\"{error}\""), count);
            }
        }
    }
    type Of = fn(&Counters) -> f64;
    let simple: [(&str, &str, &str, Of); 6] = [
        ("hostplane_volume_requests_in_flight", gauge, "Requests not answered yet.", |c| {
            c.in_flight.load(Ordering::Relaxed) as f64
        }),
        (
            "hostplane_volume_throttled_operations_total",
            counter,
            "Requests that waited for a limit or their turn.",
            |c| c.throttled.load(Ordering::Relaxed) as f64,
        ),
        (
            "hostplane_volume_throttled_seconds_total",
            counter,
            "Time that requests waited for a limit or their turn.",
            |c| c.throttled_us.load(Ordering::Relaxed) as f64 / 1e6,
        ),
        ("hostplane_volume_syncs_total", counter, "Syncs of the file.", |c| {
            c.syncs.load(Ordering::Relaxed) as f64
        }),
        ("hostplane_volume_fences_total", counter, "Times a new writer took over.", |c| {
            c.fences.load(Ordering::Relaxed) as f64
        }),
        ("hostplane_volume_slow_operations_total", counter, "Requests over the threshold.", |c| {
            c.slow.load(Ordering::Relaxed) as f64
        }),
    ];
    for (name, kind, help, of) in simple {
        let mut family = Family::begin(&mut out, name, kind, help);
        volumes.iter().for_each(|(labels, counters)| family.line("", labels, of(counters)));
    }
    let (name, help) = ("hostplane_volume_request_seconds", "From arrival to answer.");
    let mut family = Family::begin(&mut out, name, "histogram", help);
    for (labels, kind) in &kinds {
        let (mut sum, mut class) = (0, 0);
        for power in COARSE {
            while class < CLASSES && end_of(class) <= 1 << power {
                sum += read(&kind.classes[class]);
                class += 1;
            }
            let bound = (1_u64 << power) as f64 / 1e6;
            family.line("_bucket", &format!("{labels},le=\"{bound}\""), sum);
        }
        sum += kind.classes[class..].iter().map(read).sum::<u64>();
        family.line("_bucket", &format!("{labels},le=\"+Inf\""), sum);
        family.line("_sum", labels, read(&kind.time_us) as f64 / 1e6);
        family.line("_count", labels, sum);
    }
    out
}

/// Connections by export, in the same format.
pub fn connections<'a>(exports: impl Iterator<Item = (&'a str, u32)>) -> String {
    let mut out = String::new();
    let (name, help) = ("hostplane_export_connections", "Clients that use the export now.");
    let mut family = Family::begin(&mut out, name, "gauge", help);
    for (export, count) in exports {
        family.line("", &format!("export=\"{}\"", escape(export)), count);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_counted_once_in_its_class_and_all_above() {
        let counters = Counters::default();
        counters.arrived();
        counters.arrived();
        counters.answered(Command::Read, 4096, Duration::from_micros(70), None);
        counters.arrived();
        let error = Some(nbd::Error::Io);
        counters.answered(Command::Read, 4096, Duration::from_secs(300), error);
        let text = text([("a\"b".to_owned(), &counters)].into_iter());
        for line in [
            "hostplane_volume_operations_total{volume=\"a\\\"b\",kind=\"read\"} 2",
            "hostplane_volume_bytes_total{volume=\"a\\\"b\",kind=\"read\"} 4096",
            "hostplane_volume_errors_total{volume=\"a\\\"b\",kind=\"read\",error=\"io\"} 1",
            "hostplane_volume_requests_in_flight{volume=\"a\\\"b\"} 1",
            "hostplane_volume_request_seconds_bucket{volume=\"a\\\"b\",kind=\"read\",le=\"0.000064\"} 0",
            "hostplane_volume_request_seconds_bucket{volume=\"a\\\"b\",kind=\"read\",le=\"0.000128\"} 1",
            "hostplane_volume_request_seconds_bucket{volume=\"a\\\"b\",kind=\"read\",le=\"67.108864\"} 1",
            "hostplane_volume_request_seconds_bucket{volume=\"a\\\"b\",kind=\"read\",le=\"+Inf\"} 2",
            "hostplane_volume_request_seconds_count{volume=\"a\\\"b\",kind=\"write\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
        assert!(!text.contains("kind=\"trim\""), "nobody asked for it");
        let look = counters.look("v".to_owned());
        assert_eq!(look.kinds["read"].latencies_us[0], (72, 1));
    }

    #[test]
    fn each_latency_is_in_the_one_class_that_bounds_it_within_an_eighth() {
        let mut last = 0;
        for us in (0..5000).chain((12..27).flat_map(|p| [(1 << p) - 1, 1 << p, (1 << p) + 1])) {
            let class = class_of(us);
            assert!(class >= last || us < 5000, "{us}");
            last = class;
            if us < 1 << LONGEST {
                assert!(us < end_of(class) && end_of(class) - us <= us / 8 + 1, "{us}");
                assert!(class == 0 || us >= end_of(class - 1), "{us}");
            }
        }
        assert_eq!(class_of(u64::MAX), CLASSES - 1);
    }
}
