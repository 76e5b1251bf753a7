//! Man pages and completions of `netctl` and `dataplane`, and the guide's reference
//! of `netctl`, from the one definition of each command line.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where man pages and completions go; the reference goes to docs/guide/netctl.md.
    #[arg(long, default_value = "target/manual")]
    dir: PathBuf,
}

pub fn run(args: Args) -> anyhow::Result<()> {
    let root = crate::root();
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    // A program of each package's own, so that xtask need not be built with all of it.
    let dir = root.join(args.dir);
    let guide = root.join("docs/guide/netctl.md");
    for (package, arguments) in [("netctl", vec![&guide, &dir]), ("dataplane", vec![&dir])] {
        let status = Command::new(&cargo)
            .args(["run", "--quiet", "--package", package, "--example", "manual", "--"])
            .args(arguments)
            .current_dir(&root)
            .status()
            .context("run cargo")?;
        if !status.success() {
            bail!("manual: {package}: {status}");
        }
    }
    Ok(())
}
