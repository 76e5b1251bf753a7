//! Runs every test and closes with one line, `N passed, N failed, N skipped`.
//!
//! Cargo's harness knows no test that skips itself at run time. Ours write a
//! line `SKIPPED <test>: <reason>` to the file that `HOSTPLANE_SKIPPED` names
//! and return; such a test is counted as skipped here, not as passed, and its
//! reason is shown at the end.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{ChildStdout, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::Duration;

use anyhow::{Context, bail};

/// Options of `cargo xtask test`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Only unit, model and property tests; no daemons, guests or namespaces of the end-to-end crate.
    #[arg(long)]
    quick: bool,
    /// The long campaigns as well (`HOSTPLANE_FULL=1` to the tests): hours.
    #[arg(long, conflicts_with = "quick")]
    full: bool,
    /// Passed on to the test harness, such as a name to select by.
    #[arg(last = true)]
    harness: Vec<String>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Count {
    passed: u64,
    failed: u64,
    ignored: u64,
    /// Test programs that ended without a result line: crashed, or did not build.
    broken: u64,
}

pub fn run(args: &Args) -> anyhow::Result<()> {
    let root = crate::root();
    let skipped_file =
        std::env::temp_dir().join(format!("hostplane-skipped-{}", std::process::id()));
    std::fs::write(&skipped_file, "").context("make the list of skipped tests")?;

    let mut count = Count::default();
    // Unit and model tests side by side; end-to-end tests one at a time, since
    // each may run guests.
    run_cargo(&root, &["--workspace", "--exclude", "tests"], &[], args, &skipped_file, &mut count)?;
    if !args.quick {
        run_cargo(&root, &["-p", "tests"], &["--test-threads=1"], args, &skipped_file, &mut count)?;
    }

    let skipped: BTreeSet<String> = std::fs::read_to_string(&skipped_file)
        .context("read the list of skipped tests")?
        .lines()
        .map(str::to_owned)
        .collect();
    // The list has been read; a copy left in the temporary folder harms nobody.
    let _ = std::fs::remove_file(&skipped_file);
    println!();
    for line in &skipped {
        println!("{line}");
    }
    let skips = skipped.len() as u64 + count.ignored;
    let passed = count.passed.saturating_sub(skipped.len() as u64);
    let failed = count.failed + count.broken;
    println!("{passed} passed, {failed} failed, {skips} skipped");
    if failed > 0 {
        bail!("{failed} test(s) or test program(s) failed");
    }
    if passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

fn run_cargo(
    root: &Path,
    selection: &[&str],
    harness: &[&str],
    args: &Args,
    skipped_file: &Path,
    count: &mut Count,
) -> anyhow::Result<()> {
    let mut child = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["test", "--no-fail-fast", "--locked"])
        .args(selection)
        .arg("--")
        .args(harness)
        .args(&args.harness)
        .current_dir(root)
        .env("HOSTPLANE_SKIPPED", skipped_file)
        .env("HOSTPLANE_FULL", if args.full { "1" } else { "0" })
        .stdout(Stdio::piped())
        .spawn()
        .context("run cargo test")?;
    let stdout = child.stdout.take().context("cargo test has no output")?;
    let lines = lines_of(stdout);
    let (mut results, mut silent_s) = (0, 0);
    loop {
        match lines.recv_timeout(Duration::from_secs(1)) {
            Ok(line) => {
                let line = line.context("read the output of cargo test")?;
                let line = String::from_utf8_lossy(&line);
                println!("{line}");
                results += u64::from(add_result(&line, count));
                silent_s = 0;
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                let ended = child.try_wait().context("look after cargo test")?.is_some();
                silent_s += u32::from(ended);
                if silent_s > LEFT_OVER_S {
                    println!("xtask: a process that a test left behind holds the output open");
                    break;
                }
            }
        }
    }
    let status = child.wait().context("wait for cargo test")?;
    if !status.success() && (count.failed == 0 || results == 0) {
        count.broken += 1;
    }
    Ok(())
}

/// How long the output may stay open after cargo has ended.
const LEFT_OVER_S: u32 = 10;

/// Read by a thread of its own: what a test left running may hold the output open for ever.
fn lines_of(stdout: ChildStdout) -> Receiver<std::io::Result<Vec<u8>>> {
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n') {
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    lines
}

/// Adds a line such as `test result: ok. 3 passed; 0 failed; 1 ignored; …`.
/// The result lines of child programs (printed by a failed test) are indented or
/// quoted, and do not count.
fn add_result(line: &str, count: &mut Count) -> bool {
    let Some(rest) = line.strip_prefix("test result: ") else { return false };
    let number_before = |word: &str| {
        rest.split(['.', ';'])
            .find_map(|part| part.trim().strip_suffix(word)?.trim().parse::<u64>().ok())
            .unwrap_or(0)
    };
    count.passed += number_before("passed");
    count.failed += number_before("failed");
    count.ignored += number_before("ignored");
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_result_line_is_added_and_any_other_is_not() {
        let mut count = Count::default();
        assert!(add_result(
            "test result: FAILED. 3 passed; 2 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.1s",
            &mut count
        ));
        assert!(!add_result("  test result: ok. 9 passed; 0 failed", &mut count));
        assert_eq!(count, Count { passed: 3, failed: 2, ignored: 1, broken: 0 });
    }
}
