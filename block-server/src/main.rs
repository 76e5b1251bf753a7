//! Arguments and signals.

use anyhow::Context;
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// An NBD server on io_uring: volumes for Hostplane, or any file for anyone.
#[derive(Debug, Parser)]
#[command(version)]
enum Arguments {
    /// Keep the volumes of a deployment and serve them; asked over its control socket.
    Daemon(block_server::daemon::Options),
    /// Serve files or devices to anyone who may reach the socket.
    Serve(block_server::standalone::Options),
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_default_env()
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info")),
        )
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    raise_descriptor_limit();
    if let Arguments::Daemon(options) = &arguments {
        options.confine()?;
    }
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(async {
            match arguments {
                Arguments::Daemon(options) => {
                    block_server::daemon::run(options, asked_to_end()?).await
                }
                Arguments::Serve(options) => {
                    block_server::standalone::run(options, asked_to_end()?).await
                }
            }
        })
}

/// Each volume takes a few descriptors, and the usual soft limit of 1024 would
/// end at some hundred volumes. A failure only leaves it as it was.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Resolves on SIGTERM or SIGINT.
fn asked_to_end() -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("cannot hear SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot hear SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}
