//! The project's own chores, run as `cargo xtask …` (and by `./x`).

#![forbid(unsafe_code)]

mod build_ebpf;
mod manual;
mod run_tests;
mod tidy;

use std::path::PathBuf;

use clap::Parser;

/// Chores of the Hostplane workspace.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Chore {
    /// Build the eBPF object, or say which prebuilt one is taken.
    BuildEbpf(build_ebpf::Args),
    /// Write netctl's man pages and completions, and the reference in its guide.
    Manual(manual::Args),
    /// Check what no compiler checks: arrows between crates, leftover markers, docs against the tree.
    Tidy,
    /// Run every test and close with one line that counts them.
    Test(run_tests::Args),
}

fn main() -> anyhow::Result<()> {
    match Chore::parse() {
        Chore::BuildEbpf(args) => build_ebpf::run(args),
        Chore::Manual(args) => manual::run(args),
        Chore::Tidy => tidy::run(),
        Chore::Test(args) => run_tests::run(&args),
    }
}

/// The workspace's root folder.
fn root() -> PathBuf {
    let manifest = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().map_or_else(|| manifest.clone(), PathBuf::from)
}
