//! Builds the eBPF object.

/// Options of `cargo xtask build-ebpf`.
#[derive(Debug, clap::Args)]
pub struct Args {}

pub fn run(_args: Args) -> anyhow::Result<()> {
    anyhow::bail!("the eBPF programs have not landed yet")
}
