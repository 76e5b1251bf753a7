//! Coverage-guided fuzzing for a bounded time: builds a crate's fuzz room with
//! libFuzzer, on stable Rust, and runs it from the corpus that is kept there.
//!
//! ```text
//! CRATE/fuzz/Cargo.toml   a workspace of its own: built with coverage counters in all its code
//!           /src          what is tried, and what must hold
//!           /corpus.txt   what was found interesting so far, one input in hexadecimal a line
//!           /found.txt    what once broke something; the note stands above it
//! CRATE/tests/fuzz.rs     replays both, and runs this
//! ```
//! To take in what a long run found:
//! `HOSTPLANE_FULL=1 HOSTPLANE_KEEP_CORPUS=1 cargo test -p CRATE --test fuzz`.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::{is_full, skip};

/// Of each run, side by side.
const PROCESSES: u32 = 2;

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// Coverage counters are a pass of LLVM's that stable Rust lets one name.
const FLAGS: [&str; 6] = [
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "--cfg=fuzzing",
];

/// A crate's fuzz room.
#[derive(Debug, Clone, Copy)]
pub struct Fuzz {
    /// The crate's own folder.
    pub manifest_dir: &'static str,
    /// The program of the room.
    pub program: &'static str,
    /// Longer inputs find nothing new and take longer.
    pub input_bytes_max: usize,
    /// For how long each process runs, and with `HOSTPLANE_FULL=1`.
    pub seconds: [u32; 2],
}

impl Fuzz {
    fn folder(&self) -> PathBuf {
        Path::new(self.manifest_dir).join("fuzz")
    }

    /// What was found interesting so far, and what once broke something.
    pub fn known(&self) -> Vec<Vec<u8>> {
        [self.read("corpus.txt"), self.read("found.txt")].concat()
    }

    fn read(&self, name: &str) -> Vec<Vec<u8>> {
        let text = fs::read_to_string(self.folder().join(name)).expect("the room's inputs");
        let lines = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty());
        lines
            .map(|line| {
                let digits = line.as_bytes().as_chunks::<2>().0;
                let byte = |d: &[u8; 2]| u8::from_str_radix(std::str::from_utf8(d).ok()?, 16).ok();
                digits.iter().map(byte).collect::<Option<Vec<u8>>>().expect("a line of hexadecimal")
            })
            .collect()
    }

    /// Fuzzes from the corpus and `seeds`, and fails where anything is found. `target` is
    /// where the room is built, and `work` an empty folder.
    pub fn run(&self, test: &str, seeds: &[Vec<u8>], target: &Path, work: &Path) {
        if !Command::new("c++").arg("--version").output().is_ok_and(|o| o.status.success()) {
            return skip(test, "libFuzzer needs a C++ compiler: install g++");
        }
        let program = self.build(&target.join("fuzz"));
        let program = program.unwrap_or_else(|told| panic!("the fuzzer is not built: {told}"));
        let corpus = work.join("corpus");
        fs::create_dir(&corpus).expect("the corpus' folder is made");
        let known = [&self.read("corpus.txt"), seeds].concat();
        for (number, input) in known.iter().enumerate() {
            fs::write(corpus.join(format!("known-{number}")), input).expect("an input is written");
        }
        let seconds = self.seconds[usize::from(is_full())];
        let length = format!("-max_len={}", self.input_bytes_max);
        let run = |_| {
            Command::new(&program)
                .arg(&corpus)
                .args([&format!("-max_total_time={seconds}"), &length])
                // A gigabyte of memory, or ten seconds for one input, are findings too.
                .args(["-rss_limit_mb=1024", "-timeout=10", "-print_final_stats=1", "-reload=1"])
                .arg(format!("-artifact_prefix={}/", work.display()))
                .stdout(Stdio::null())
                .stderr(Stdio::piped())
                .spawn()
                .expect("the fuzzer starts")
        };
        for run in (0..PROCESSES).map(run).collect::<Vec<_>>() {
            let output = run.wait_with_output().expect("the fuzzer ends");
            let told = String::from_utf8_lossy(&output.stderr).into_owned();
            let found = artifacts(work);
            assert!(
                output.status.success() && found.is_empty(),
                "add this line to fuzz/found.txt, and mend what it shows: {found:?}\n{}",
                last(&told, 40, "\n")
            );
            let stat = |name: &str| told.lines().rev().find(|l| l.contains(name)).unwrap_or("");
            eprintln!("{}; {}", stat("number_of_executed_units"), stat("new_units_added"));
        }
        if std::env::var_os("HOSTPLANE_KEEP_CORPUS").is_some() {
            self.keep(&program, work, &corpus);
        }
    }

    fn build(&self, target: &Path) -> Result<PathBuf, String> {
        let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
            .args(["build", "--release", "--locked", "--target", TRIPLE, "--manifest-path"])
            .arg(self.folder().join("Cargo.toml"))
            .arg("--target-dir")
            .arg(target)
            .env("CARGO_ENCODED_RUSTFLAGS", FLAGS.join("\x1f"))
            .output()
            .map_err(|e| e.to_string())?;
        if output.status.success() {
            return Ok(target.join(TRIPLE).join("release").join(self.program));
        }
        Err(last(&String::from_utf8_lossy(&output.stderr), 6, "; "))
    }

    /// A small corpus that reaches as much code, as text. How often it does is left out.
    fn keep(&self, program: &Path, work: &Path, corpus: &Path) {
        let small = work.join("small");
        fs::create_dir(&small).expect("the small corpus' folder is made");
        let merged = Command::new(program)
            .args(["-merge=1", "-use_counters=0"])
            .arg(format!("-max_len={}", self.input_bytes_max))
            .args([&small, corpus])
            .stderr(Stdio::null())
            .status();
        assert!(merged.is_ok_and(|status| status.success()), "the corpus is merged");
        let mut lines = artifacts(&small);
        lines.sort_by_key(|line| (line.len(), line.clone()));
        let text = lines.join("\n") + "\n";
        fs::write(self.folder().join("corpus.txt"), text).expect("the corpus is written");
    }
}

/// The files of a folder, each in hexadecimal.
fn artifacts(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).expect("the folder is there").flatten();
    entries
        .filter(|entry| entry.path().is_file())
        .map(|entry| fs::read(entry.path()).expect("an input is read"))
        .map(|bytes| bytes.iter().map(|byte| format!("{byte:02x}")).collect())
        .collect()
}

fn last(text: &str, lines: usize, between: &str) -> String {
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join(between)
}
