//! fio as the client, by its engines `nbd` (libnbd) and, on the bare file, `io_uring`.

use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;
use serde_json::Value;

use crate::block::address::Address;
use crate::block::file::DataFile;
use crate::block::load::{Deed, Done, Load};
use crate::process;

/// libnbd looks for certificates at home only for those who are not root.
const NOBODY: u32 = 65534;

pub fn over_nbd(
    address: &Address,
    data: &DataFile,
    load: Load,
    duration: Duration,
) -> anyhow::Result<Done> {
    let mut fio = command(data, load, duration);
    fio.arg("--ioengine=nbd").arg(format!("--uri={}", address.uri()));
    if let Address::Tls(_, certificates) = address {
        fio.env("HOME", certificates.home());
        if nix::unistd::geteuid().is_root() {
            fio.uid(NOBODY).gid(NOBODY);
        }
    }
    outcome(fio, load)
}

pub fn on_file(data: &DataFile, load: Load, duration: Duration) -> anyhow::Result<Done> {
    let mut fio = command(data, load, duration);
    fio.args(["--ioengine=io_uring", "--direct=1"])
        .arg(format!("--filename={}", data.path().display()));
    outcome(fio, load)
}

fn command(data: &DataFile, load: Load, duration: Duration) -> Command {
    let mut fio = Command::new("fio");
    fio.current_dir(data.directory())
        .args(["--name=load", "--output-format=json", "--time_based", "--norandommap"])
        .args(["--randrepeat=0", "--allow_file_create=0"])
        .arg(format!("--rw={}", rw(load.deed)))
        .arg(format!("--bs={}", load.block_bytes))
        .arg(format!("--iodepth={}", load.depth))
        .arg(format!("--runtime={}ms", duration.as_millis()));
    fio
}

fn outcome(mut fio: Command, load: Load) -> anyhow::Result<Done> {
    let text = process::output(&mut fio)?;
    parse(&text, load.deed).with_context(|| format!("fio: its answer: `{}`", text.trim()))
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
    let quantile = |name: &str| {
        let ns = side["clat_ns"]["percentile"][name].as_f64();
        ns.map(|ns| ns / 1000.0).with_context(|| format!("no percentile {name}"))
    };
    let iops = side["iops"].as_f64().context("no `iops`")?;
    Ok(Done { operations, iops, p50_us: quantile("50.000000")?, p99_us: quantile("99.000000")? })
}

fn rw(deed: Deed) -> &'static str {
    match deed {
        Deed::Read => "randread",
        Deed::Write => "randwrite",
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
        assert_eq!(
            done,
            Done { operations: 150_000, iops: 50_000.25, p50_us: 1.0, p99_us: 2342.912 }
        );
    }

    #[test]
    fn an_answer_without_operations_or_with_an_error_is_no_figure() {
        assert!(parse(ANSWER, Deed::Write).is_err());
        assert!(parse(&ANSWER.replace("\"error\": 0", "\"error\": 5"), Deed::Read).is_err());
        assert!(parse("fio: failed", Deed::Read).is_err());
    }
}
