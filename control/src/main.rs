//! `control`: arguments and signals.

use clap::Parser;
use control::daemon::{Options, run};
use tokio::signal::unix::{SignalKind, signal};

/// The EC2-compatible API of a Hostplane region.
#[derive(Parser)]
#[command(name = "control", version)]
enum Command {
    /// Serves until SIGTERM.
    Daemon(Box<Options>),
    /// Prints docs/guide/ec2-actions.md.
    Guide,
}

fn main() -> anyhow::Result<()> {
    let options = match Command::parse() {
        Command::Guide => {
            print!("{}", control::core::guide_page());
            return Ok(());
        }
        Command::Daemon(options) => options,
    };
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .init();
    tokio::runtime::Runtime::new()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let end = async {
            tokio::select! {
                _ = terminate.recv() => {}
                _ = interrupt.recv() => {}
            }
        };
        run(*options, end).await
    })
}
