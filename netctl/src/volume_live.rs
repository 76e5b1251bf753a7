//! `netctl volume top` and its kin: what the block server of this host does now,
//! and what only it can be asked for.

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use model::VolumeId;
use rpc::block::{Quiesce, VolumeStatistics};
use serde_json::{Value, json};

use crate::api::Session;
use crate::failure::{Failure, Outcome};
use crate::output::{self, Format};

const DAEMON: &str = "block-server";

#[derive(Debug, Args)]
pub struct Top {
    /// Only volumes whose id contains one of these
    #[arg(value_name = "VOLUME")]
    pub volumes: Vec<String>,
    /// One look, over one interval
    #[arg(long)]
    pub once: bool,
    /// Seconds between two looks
    #[arg(long, default_value_t = 1.0, value_name = "SECONDS", value_parser = interval)]
    pub interval: f64,
    /// What comes first
    #[arg(long, value_enum, default_value_t = Order::Iops)]
    pub sort: Order,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Order {
    Volume,
    Iops,
    Bytes,
    P99,
    Queue,
    Throttled,
}

fn interval(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=3600.0).contains(&seconds) => Ok(seconds),
        _ => Err("it is between 0.1 and 3600 seconds".to_owned()),
    }
}

/// What a volume did between two looks.
#[derive(Debug, Clone, PartialEq)]
struct Row {
    volume: String,
    read_iops: f64,
    write_iops: f64,
    read_bytes: f64,
    write_bytes: f64,
    p50_us: Option<u64>,
    p99_us: Option<u64>,
    queue: u64,
    /// Of the requests, how many waited for a limit or their turn.
    throttled: f64,
    errors: f64,
}

impl Row {
    fn iops(&self) -> f64 {
        self.read_iops + self.write_iops
    }

    fn between(before: Option<&VolumeStatistics>, now: &VolumeStatistics, seconds: f64) -> Self {
        let nothing = VolumeStatistics::default();
        // One that was opened anew in between counts from nothing again.
        let is_same = |b: &&VolumeStatistics| {
            b.throttled <= now.throttled && operations(b) <= operations(now)
        };
        let before = before.filter(is_same).unwrap_or(&nothing);
        let of = |kind: &str| {
            let pick = |s: &VolumeStatistics| {
                s.kinds.get(kind).map_or((0, 0), |k| (k.operations, k.bytes))
            };
            let (was, is) = (pick(before), pick(now));
            let rate = |was: u64, is: u64| is.saturating_sub(was) as f64 / seconds;
            (rate(was.0, is.0), rate(was.1, is.1))
        };
        let errors =
            |s: &VolumeStatistics| s.kinds.values().flat_map(|k| k.errors.values()).sum::<u64>();
        let mut latencies: BTreeMap<u64, u64> = BTreeMap::new();
        for (bound, count) in now.kinds.values().flat_map(|k| &k.latencies_us) {
            *latencies.entry(*bound).or_default() += count;
        }
        for (bound, count) in before.kinds.values().flat_map(|k| &k.latencies_us) {
            let left = latencies.entry(*bound).or_default();
            *left = left.saturating_sub(*count);
        }
        let done = operations(now).saturating_sub(operations(before));
        let waited = now.throttled.saturating_sub(before.throttled);
        let (reads, writes) = (of("read"), of("write"));
        Self {
            volume: now.volume.clone(),
            read_iops: reads.0,
            write_iops: writes.0,
            read_bytes: reads.1,
            write_bytes: writes.1,
            p50_us: percentile(&latencies, 0.5),
            p99_us: percentile(&latencies, 0.99),
            queue: now.in_flight,
            throttled: if done == 0 { 0.0 } else { (waited as f64 / done as f64).min(1.0) },
            errors: errors(now).saturating_sub(errors(before)) as f64 / seconds,
        }
    }

    fn cells(&self) -> Vec<String> {
        let number = |value: f64| format!("{value:.0}");
        let mb = |bytes: f64| format!("{:.1}", bytes / 1e6);
        let ms = |us: Option<u64>| us.map_or("-".into(), |us| format!("{:.2}", us as f64 / 1e3));
        vec![
            self.volume.clone(),
            number(self.read_iops),
            number(self.write_iops),
            mb(self.read_bytes),
            mb(self.write_bytes),
            ms(self.p50_us),
            ms(self.p99_us),
            self.queue.to_string(),
            format!("{:.0}%", self.throttled * 100.0),
            number(self.errors),
        ]
    }

    fn json(&self) -> Value {
        let rounded = |value: f64| (value * 10.0).round() / 10.0;
        json!({
            "volume": self.volume,
            "read_iops": rounded(self.read_iops),
            "write_iops": rounded(self.write_iops),
            "read_bytes_per_second": rounded(self.read_bytes),
            "write_bytes_per_second": rounded(self.write_bytes),
            "p50_us": self.p50_us,
            "p99_us": self.p99_us,
            "queue": self.queue,
            "throttled_share": (self.throttled * 1000.0).round() / 1000.0,
            "errors_per_second": rounded(self.errors),
        })
    }
}

const HEADER: &[&str] = &[
    "VOLUME",
    "R/S",
    "W/S",
    "R MB/S",
    "W MB/S",
    "P50 MS",
    "P99 MS",
    "QUEUE",
    "THROTTLED",
    "ERR/S",
];

fn operations(statistics: &VolumeStatistics) -> u64 {
    statistics.kinds.values().map(|k| k.operations).sum()
}

/// The bound of the class in which it lies.
fn percentile(latencies: &BTreeMap<u64, u64>, share: f64) -> Option<u64> {
    let all: u64 = latencies.values().sum();
    let wanted = (all as f64 * share).ceil() as u64;
    let mut seen = 0;
    latencies.iter().filter(|_| all > 0).find_map(|(bound, count)| {
        seen += count;
        (seen >= wanted).then_some(*bound)
    })
}

fn rows(
    top: &Top,
    before: &[VolumeStatistics],
    now: &[VolumeStatistics],
    seconds: f64,
) -> Vec<Row> {
    let wanted = |volume: &str| {
        top.volumes.is_empty() || top.volumes.iter().any(|part| volume.contains(part.as_str()))
    };
    let mut rows: Vec<Row> = now
        .iter()
        .filter(|s| wanted(&s.volume))
        .map(|s| Row::between(before.iter().find(|b| b.volume == s.volume), s, seconds))
        .collect();
    rows.sort_by(|a, b| a.volume.cmp(&b.volume));
    let key = |row: &Row| match top.sort {
        Order::Volume => 0.0,
        Order::Iops => row.iops(),
        Order::Bytes => row.read_bytes + row.write_bytes,
        Order::P99 => row.p99_us.unwrap_or(0) as f64,
        Order::Queue => row.queue as f64,
        Order::Throttled => row.throttled,
    };
    // A stable sort: among equals, by id.
    rows.sort_by(|a, b| key(b).total_cmp(&key(a)));
    rows
}

pub fn run_top(session: &Session, top: &Top) -> Outcome {
    let look = || {
        crate::wait_for(session.daemon(DAEMON).volume_statistics())
            .map_err(|e| session.unreachable("volume: top", e))
    };
    let is_live = session.format != Format::Json && !top.once && std::io::stdout().is_terminal();
    let (mut before, mut at) = (look()?, now());
    loop {
        std::thread::sleep(Duration::from_secs_f64(top.interval));
        let (present, then) = (look()?, now());
        let rows = rows(top, &before, &present, (then - at).as_secs_f64());
        if session.format == Format::Json {
            let rows: Vec<Value> = rows.iter().map(Row::json).collect();
            if top.once {
                return output::json(&rows);
            }
            output::line(&Value::from(rows).to_string());
        } else {
            if is_live {
                // Home, and clear what is below (ECMA-48).
                output::line("\x1b[H\x1b[J");
            }
            output::table(HEADER, &rows.iter().map(Row::cells).collect::<Vec<_>>());
        }
        if top.once {
            return Ok(());
        }
        (before, at) = (present, then);
    }
}

#[expect(clippy::disallowed_methods, reason = "the command line measures what people see")]
fn now() -> Instant {
    Instant::now()
}

fn id_of(volume: &str, deed: &str) -> Outcome<VolumeId> {
    volume.parse().map_err(|e| Failure::unfit(format!("volume {volume}: {deed}: {e}")))
}

pub fn quiesce(session: &Session, volume: &str, seconds: u32) -> Outcome {
    let id = id_of(volume, "quiesce")?;
    let quiesce = Quiesce { deadline_ms: u64::from(seconds) * 1000 };
    // The answer comes when all is durable, however long that takes.
    let client = session.daemon(DAEMON).with_timeout(Duration::from_secs(90));
    crate::wait_for(client.quiesce_volume(id, quiesce))
        .map_err(|e| session.unreachable(&format!("volume {id}: quiesce"), e))?;
    output::note(&format!(
        "{id} is quiet; changes go on in {seconds} s, or: netctl volume resume {id}"
    ));
    Ok(())
}

pub fn resume(session: &Session, volume: &str) -> Outcome {
    let id = id_of(volume, "resume")?;
    crate::wait_for(session.daemon(DAEMON).resume_volume(id))
        .map_err(|e| session.unreachable(&format!("volume {id}: resume"), e))
}

pub fn drain(session: &Session, volume: &str, undo: bool) -> Outcome {
    let id = id_of(volume, "drain")?.to_string();
    let client = session.daemon(DAEMON);
    let done = async {
        if undo { client.undrain_export(&id).await } else { client.drain_export(&id).await }
    };
    crate::wait_for(done).map_err(|e| session.unreachable(&format!("volume {id}: drain"), e))
}

pub fn connections(session: &Session) -> Outcome {
    let all = crate::wait_for(session.daemon(DAEMON).connections())
        .map_err(|e| session.unreachable("volume: connections", e))?;
    match session.format {
        Format::Json => output::json(&all),
        Format::Id => {
            all.iter().for_each(|c| output::line(&c.id.to_string()));
            Ok(())
        }
        Format::Table | Format::Wide => {
            let rows: Vec<Vec<String>> = all
                .iter()
                .map(|c| {
                    vec![
                        c.id.to_string(),
                        c.export.clone().unwrap_or_else(|| "-".to_owned()),
                        c.peer.clone(),
                        if c.read_only { "reads" } else { "writes" }.to_owned(),
                        c.in_flight.to_string(),
                        if c.waits { "yes" } else { "no" }.to_owned(),
                        (c.age_ms / 1000).to_string(),
                    ]
                })
                .collect();
            output::table(
                &["CONNECTION", "EXPORT", "PEER", "ACCESS", "IN FLIGHT", "WAITS", "AGE S"],
                &rows,
            );
            Ok(())
        }
    }
}

pub fn disconnect(session: &Session, connection: u64) -> Outcome {
    crate::wait_for(session.daemon(DAEMON).disconnect(connection))
        .map_err(|e| session.unreachable(&format!("connection {connection}: disconnect"), e))
}

#[cfg(test)]
mod tests {
    use rpc::block::KindStatistics;

    use super::*;

    fn seen(volume: &str, operations: u64, latencies: &[(u64, u64)]) -> VolumeStatistics {
        let read = KindStatistics {
            operations,
            bytes: operations * 4096,
            latencies_us: latencies.to_vec(),
            ..KindStatistics::default()
        };
        VolumeStatistics {
            volume: volume.to_owned(),
            kinds: BTreeMap::from([("read".to_owned(), read)]),
            throttled: operations / 10,
            in_flight: 3,
            ..VolumeStatistics::default()
        }
    }

    #[test]
    fn what_happened_between_two_looks_is_shown_and_no_more() {
        let before = [seen("vol-a", 1000, &[(100, 990), (9000, 10)])];
        let now = [
            seen("vol-a", 3000, &[(100, 990), (200, 1990), (9000, 20)]),
            seen("vol-b", 10_000, &[(50, 10_000)]),
        ];
        let top = Top { volumes: vec![], once: true, interval: 1.0, sort: Order::Iops };
        let rows = rows(&top, &before, &now, 2.0);
        assert_eq!(rows[0].volume, "vol-b");
        let a = &rows[1];
        assert_eq!((a.read_iops, a.read_bytes), (1000.0, 4096.0 * 1000.0));
        assert_eq!((a.p50_us, a.p99_us, a.queue), (Some(200), Some(200), 3));
        assert_eq!(a.throttled, 0.1);
        let anew = Row::between(Some(&now[1]), &before[0], 1.0);
        assert_eq!(anew.read_iops, 1000.0, "it was opened anew");
        let only = Top { volumes: vec!["l-a".into()], sort: Order::Volume, ..top };
        assert_eq!(super::rows(&only, &before, &now, 1.0).len(), 1);
        assert_eq!(percentile(&BTreeMap::new(), 0.5), None);
    }
}
