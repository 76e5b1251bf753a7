//! Writes the man pages and completions of `dataplane` from the definition of
//! its command line. Run by `cargo xtask manual`.
//!
//! Usage: `manual DIR`

#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::CommandFactory as _;
use clap_complete::Shell;
use dataplane::cli::Arguments;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [dir] = arguments.as_slice() else { bail!("usage: manual DIR") };
    let (man, completions) = (dir.join("man"), dir.join("completions"));
    for dir in [&man, &completions] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    clap_mangen::generate_to(Arguments::command(), &man).context("write the man pages")?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut Arguments::command(), "dataplane", &completions)
            .with_context(|| format!("write the completions for {shell}"))?;
    }
    println!("{}: man pages and completions of dataplane", dir.display());
    Ok(())
}
