//! The load: fio, by its engines `nbd` (libnbd) and, on the bare file, `io_uring`.

use std::fmt;
use std::process::Command;

use anyhow::Context;
use serde_json::Value;

use crate::block::file::DataFile;
use crate::process;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Deed {
    Read,
    Write,
}

/// A pattern of requests, random over the whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Workload {
    pub deed: Deed,
    pub block_bytes: u32,
    /// Requests in flight.
    pub depth: u32,
}

pub const RANDOM_4K: [Workload; 2] = [
    Workload { deed: Deed::Read, block_bytes: 4096, depth: 64 },
    Workload { deed: Deed::Write, block_bytes: 4096, depth: 64 },
];

/// What fio says that it did.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Done {
    pub operations: u64,
    pub iops: f64,
    /// Completion latency.
    pub p99_us: f64,
}

pub fn over_nbd(
    uri: &str,
    data: &DataFile,
    workload: Workload,
    seconds: u64,
) -> anyhow::Result<Done> {
    let mut fio = command(data, workload, seconds);
    fio.arg("--ioengine=nbd").arg(format!("--uri={uri}"));
    outcome(fio, workload)
}

pub fn on_file(data: &DataFile, workload: Workload, seconds: u64) -> anyhow::Result<Done> {
    let mut fio = command(data, workload, seconds);
    fio.args(["--ioengine=io_uring", "--direct=1"])
        .arg(format!("--filename={}", data.path().display()));
    outcome(fio, workload)
}

fn command(data: &DataFile, workload: Workload, seconds: u64) -> Command {
    let mut fio = Command::new("fio");
    fio.current_dir(data.directory())
        .args(["--name=load", "--output-format=json", "--time_based", "--norandommap"])
        .args(["--randrepeat=0", "--numjobs=1", "--allow_file_create=0"])
        .arg(format!("--rw={}", workload.rw()))
        .arg(format!("--bs={}", workload.block_bytes))
        .arg(format!("--iodepth={}", workload.depth))
        .arg(format!("--runtime={seconds}"));
    fio
}

fn outcome(mut fio: Command, workload: Workload) -> anyhow::Result<Done> {
    let text = process::output(&mut fio)?;
    parse(&text, workload.deed).with_context(|| format!("fio: its answer: `{}`", text.trim()))
}

fn parse(text: &str, deed: Deed) -> anyhow::Result<Done> {
    // Warnings may come before the document.
    let document = text.find('{').map(|at| &text[at..]).context("no JSON in it")?;
    let document: Value = serde_json::from_str(document)?;
    let job = &document["jobs"][0];
    let failed = job["error"].as_i64().context("no `error`")?;
    anyhow::ensure!(failed == 0, "error {failed}");
    let side = &job[match deed {
        Deed::Read => "read",
        Deed::Write => "write",
    }];
    let operations = side["total_ios"].as_u64().context("no `total_ios`")?;
    anyhow::ensure!(operations > 0, "not one operation");
    let p99_ns = side["clat_ns"]["percentile"]["99.000000"].as_f64().context("no p99")?;
    let iops = side["iops"].as_f64().context("no `iops`")?;
    Ok(Done { operations, iops, p99_us: p99_ns / 1000.0 })
}

impl Workload {
    fn rw(self) -> &'static str {
        match self.deed {
            Deed::Read => "randread",
            Deed::Write => "randwrite",
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let deed = match self.deed {
            Deed::Read => "read",
            Deed::Write => "write",
        };
        write!(f, "{} KiB random {deed}, QD{}", self.block_bytes / 1024, self.depth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Cut down from what fio 3.33 printed.
    const ANSWER: &str = r#"fio: a warning
{ "jobs": [ { "jobname": "load", "error": 0,
  "read": { "total_ios": 150000, "iops": 50000.25,
            "clat_ns": { "percentile": { "50.000000": 1000, "99.000000": 2342912 } } },
  "write": { "total_ios": 0, "iops": 0.0, "clat_ns": {} } } ] }"#;

    #[test]
    fn the_answer_is_read_behind_a_warning() {
        let done = parse(ANSWER, Deed::Read).unwrap();
        assert_eq!(done, Done { operations: 150_000, iops: 50_000.25, p99_us: 2342.912 });
    }

    #[test]
    fn an_answer_without_operations_or_with_an_error_is_no_figure() {
        assert!(parse(ANSWER, Deed::Write).is_err());
        assert!(parse(&ANSWER.replace("\"error\": 0", "\"error\": 5"), Deed::Read).is_err());
        assert!(parse("fio: failed", Deed::Read).is_err());
    }
}
