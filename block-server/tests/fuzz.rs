//! Coverage-guided fuzzing of handshake and transmission, with libFuzzer.
//!
//! `fuzz/corpus.txt` is what it found interesting so far, one input in hexadecimal
//! a line; `fuzz/found.txt` is what once broke something. Both are replayed by an
//! ordinary test. To take in what a long run found:
//! `HOSTPLANE_FULL=1 HOSTPLANE_KEEP_CORPUS=1 cargo test -p block-server --test fuzz`.

mod fixture;
mod talk;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use block_server::nbd;
use fixture::{skip, text};
use sim::is_full;
use talk::Mode;

/// Longer inputs find nothing new and take longer.
const INPUT_BYTES_MAX: usize = 1024;

/// Two processes of half a minute make the minute.
const PROCESSES: u64 = 2;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz")
}

fn read_inputs(name: &str) -> Vec<Vec<u8>> {
    let text = std::fs::read_to_string(folder().join(name)).unwrap();
    let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
    lines
        .map(|line| {
            let digits = line.as_bytes().as_chunks::<2>().0;
            let byte = |d: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(d).ok()?, 16).ok();
            digits.iter().map(byte).collect::<Option<Vec<u8>>>().expect("a line of hexadecimal")
        })
        .collect()
}

/// Where there is no corpus yet, the whole talk of each mode is the seed.
fn seeds() -> Vec<Vec<u8>> {
    let modes = [Mode::Simple, Mode::Structured, Mode::Extended];
    modes.map(|mode| [vec![1, 0], talk::talk(mode, 20)].concat()).into()
}

#[test]
fn what_fuzzing_found_before_holds_still() {
    let inputs = [read_inputs("corpus.txt"), read_inputs("found.txt"), seeds()].concat();
    assert!(inputs.len() > 100, "{} inputs", inputs.len());
    inputs.iter().for_each(|input| talk::hold(input));
}

/// Builds the fuzzer with the compiler at hand: coverage counters are a pass of
/// LLVM's that stable Rust lets one name.
fn build(target: &Path) -> Result<PathBuf, String> {
    let triple = "x86_64-unknown-linux-gnu";
    let flags = [
        "-Cpasses=sancov-module",
        "-Cllvm-args=-sanitizer-coverage-level=4",
        "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
        "-Cllvm-args=-sanitizer-coverage-pc-table",
        "-Cllvm-args=-sanitizer-coverage-trace-compares",
        "--cfg=fuzzing",
    ];
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["build", "--release", "--locked", "--target", triple, "--manifest-path"])
        .arg(folder().join("Cargo.toml"))
        .arg("--target-dir")
        .arg(target)
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        .output()
        .map_err(|e| e.to_string())?;
    if output.status.success() {
        return Ok(target.join(triple).join("release/session"));
    }
    let told = String::from_utf8_lossy(&output.stderr).into_owned();
    Err(told
        .lines()
        .rev()
        .take(6)
        .collect::<Vec<_>>()
        .into_iter()
        .rev()
        .collect::<Vec<_>>()
        .join("; "))
}

#[test]
fn a_minute_of_fuzzing_finds_nothing() {
    const TEST: &str = "a_minute_of_fuzzing_finds_nothing";
    if !Command::new("c++").arg("--version").output().is_ok_and(|o| o.status.success()) {
        return skip(TEST, "libFuzzer needs a C++ compiler: install g++");
    }
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).join("fuzz");
    let program = build(&target).unwrap_or_else(|told| panic!("the fuzzer is not built: {told}"));
    let work = tempfile::tempdir().unwrap();
    let corpus = work.path().join("corpus");
    std::fs::create_dir(&corpus).unwrap();
    let known = [read_inputs("corpus.txt"), seeds()].concat();
    for (number, input) in known.iter().enumerate() {
        std::fs::write(corpus.join(format!("known-{number}")), input).unwrap();
    }
    let seconds = if is_full() { 3600 } else { 60 / PROCESSES };
    let runs = (0..PROCESSES).map(|_| {
        Command::new(&program)
            .arg(&corpus)
            .args([format!("-max_total_time={seconds}"), format!("-max_len={INPUT_BYTES_MAX}")])
            // A gigabyte of memory, or ten seconds for one input, are findings too.
            .args(["-rss_limit_mb=1024", "-timeout=10", "-print_final_stats=1", "-reload=1"])
            .arg(format!("-artifact_prefix={}/", work.path().display()))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    });
    let runs: Vec<_> = runs.collect();
    for run in runs {
        let output = run.wait_with_output().unwrap();
        let told = String::from_utf8_lossy(&output.stderr).into_owned();
        let artifacts = std::fs::read_dir(work.path()).unwrap().flatten();
        let found: Vec<String> = artifacts
            .filter(|entry| entry.path().is_file())
            .map(|entry| hexadecimal(&std::fs::read(entry.path()).unwrap()))
            .collect();
        let last: Vec<&str> = told.lines().rev().take(40).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        assert!(
            output.status.success() && found.is_empty(),
            "add this line to fuzz/found.txt, and mend what it shows: {found:?}\n{}",
            last.join("\n")
        );
        let stat = |name: &str| last.iter().find(|l| l.contains(name)).copied().unwrap_or("");
        eprintln!("{}; {}", stat("number_of_executed_units"), stat("new_units_added"));
    }
    if std::env::var_os("HOSTPLANE_KEEP_CORPUS").is_some() {
        keep(&program, work.path(), &corpus);
    }
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The smallest corpus that reaches as much, as text.
fn keep(program: &Path, work: &Path, corpus: &Path) {
    let small = work.join("small");
    std::fs::create_dir(&small).unwrap();
    let merged = Command::new(program)
        .args(["-merge=1", &format!("-max_len={INPUT_BYTES_MAX}"), text(&small), text(corpus)])
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(merged.success());
    let mut lines: Vec<String> = std::fs::read_dir(small)
        .unwrap()
        .flatten()
        .map(|entry| hexadecimal(&std::fs::read(entry.path()).unwrap()))
        .collect();
    lines.sort_by_key(|line| (line.len(), line.clone()));
    std::fs::write(folder().join("corpus.txt"), lines.join("\n") + "\n").unwrap();
}
