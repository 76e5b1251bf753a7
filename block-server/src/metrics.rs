//! What a volume did, counted; and how Prometheus wants to read it.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::nbd::Command;

/// The kinds that are counted apart; the rest (trim, zeroes, status) is `other`.
const KINDS: [&str; 4] = ["read", "write", "flush", "other"];

/// Upper bounds of the latency classes, in microseconds. Each is twice to two and
/// a half times the one before: fine enough for a p99, few enough for a scrape.
const BOUNDS_US: [u64; 14] = [
    50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000, 200_000, 500_000,
    1_000_000,
];

#[derive(Debug, Default)]
struct Kind {
    operations: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    time_us: AtomicU64,
    /// One more than bounds: the last has none.
    classes: [AtomicU64; BOUNDS_US.len() + 1],
}

/// Written by the volume's worker, read by anyone.
#[derive(Debug, Default)]
pub struct Counters {
    kinds: [Kind; KINDS.len()],
}

impl Counters {
    /// `took`: from the request's arrival to its reply being queued.
    pub fn count(&self, command: Command, length: u64, took: Duration, failed: bool) {
        let kind = &self.kinds[match command {
            Command::Read => 0,
            Command::Write => 1,
            Command::Flush => 2,
            _ => 3,
        }];
        let took_us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let class = BOUNDS_US.iter().position(|b| took_us <= *b).unwrap_or(BOUNDS_US.len());
        let add = |counter: &AtomicU64, by| {
            counter.fetch_add(by, Ordering::Relaxed);
        };
        add(&kind.operations, 1);
        add(&kind.bytes, if failed { 0 } else { length });
        add(&kind.errors, u64::from(failed));
        add(&kind.time_us, took_us);
        add(&kind.classes[class], 1);
    }
}

/// The text format of Prometheus, for these volumes.
pub fn text<'a>(volumes: impl Iterator<Item = (String, &'a Counters)>) -> String {
    let volumes: Vec<_> = volumes.collect();
    let mut out = String::new();
    type Read = fn(&Kind) -> &AtomicU64;
    let simple: [(&str, &str, Read); 3] = [
        ("operations", "Requests answered.", |k| &k.operations),
        ("bytes", "Bytes read or changed.", |k| &k.bytes),
        ("errors", "Requests answered with an error.", |k| &k.errors),
    ];
    for (name, help, read) in simple {
        let metric = format!("hostplane_volume_{name}_total");
        let _ = writeln!(out, "# HELP {metric} {help}\n# TYPE {metric} counter");
        for (volume, counters) in &volumes {
            for (kind, label) in counters.kinds.iter().zip(KINDS) {
                let value = read(kind).load(Ordering::Relaxed);
                let _ = writeln!(out, "{metric}{{volume=\"{volume}\",kind=\"{label}\"}} {value}");
            }
        }
    }
    let metric = "hostplane_volume_request_seconds";
    let _ = writeln!(out, "# HELP {metric} From arrival to answer.\n# TYPE {metric} histogram");
    for (volume, counters) in &volumes {
        for (kind, label) in counters.kinds.iter().zip(KINDS) {
            let labels = format!("volume=\"{volume}\",kind=\"{label}\"");
            let mut sum = 0;
            for (class, count) in kind.classes.iter().enumerate() {
                sum += count.load(Ordering::Relaxed);
                let bound = BOUNDS_US
                    .get(class)
                    .map_or("+Inf".to_owned(), |us| (*us as f64 / 1e6).to_string());
                let _ = writeln!(out, "{metric}_bucket{{{labels},le=\"{bound}\"}} {sum}");
            }
            let seconds = kind.time_us.load(Ordering::Relaxed) as f64 / 1e6;
            let _ = writeln!(out, "{metric}_sum{{{labels}}} {seconds}");
            let _ = writeln!(out, "{metric}_count{{{labels}}} {sum}");
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_counted_once_in_its_class_and_all_above() {
        let counters = Counters::default();
        counters.count(Command::Read, 4096, Duration::from_micros(70), false);
        counters.count(Command::Read, 4096, Duration::from_secs(3), true);
        let text = text([("vol-1".to_owned(), &counters)].into_iter());
        for line in [
            "hostplane_volume_operations_total{volume=\"vol-1\",kind=\"read\"} 2",
            "hostplane_volume_bytes_total{volume=\"vol-1\",kind=\"read\"} 4096",
            "hostplane_volume_errors_total{volume=\"vol-1\",kind=\"read\"} 1",
            "hostplane_volume_request_seconds_bucket{volume=\"vol-1\",kind=\"read\",le=\"0.00005\"} 0",
            "hostplane_volume_request_seconds_bucket{volume=\"vol-1\",kind=\"read\",le=\"0.0001\"} 1",
            "hostplane_volume_request_seconds_bucket{volume=\"vol-1\",kind=\"read\",le=\"+Inf\"} 2",
            "hostplane_volume_request_seconds_count{volume=\"vol-1\",kind=\"write\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\n{text}");
        }
    }
}
