//! Writes what is made from the definition of the command line: man pages,
//! completions, and the guide's reference. Run by `cargo xtask manual`.
//!
//! Usage: `manual GUIDE DIR`

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap_complete::Shell;
use netctl::reference;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [guide, dir] = arguments.as_slice() else { bail!("usage: manual GUIDE DIR") };
    renew(guide)?;
    let man = dir.join("man");
    let completions = dir.join("completions");
    for dir in [&man, &completions] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    clap_mangen::generate_to(reference::command(), &man).context("write the man pages")?;
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
        clap_complete::generate_to(shell, &mut reference::command(), "netctl", &completions)
            .with_context(|| format!("write the completions for {shell}"))?;
    }
    println!("{}: man pages and completions; {}: reference", dir.display(), guide.display());
    Ok(())
}

fn renew(guide: &Path) -> anyhow::Result<()> {
    let text = fs::read_to_string(guide).with_context(|| format!("read {}", guide.display()))?;
    let renewed = reference::renew(&text)
        .with_context(|| format!("{}: has no line {}", guide.display(), reference::BELOW))?;
    fs::write(guide, renewed).with_context(|| format!("write {}", guide.display()))
}
