//! Arguments and signals.

use anyhow::Context;
use block_server::{daemon, standalone};
use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};

/// An NBD server on io_uring: volumes for Hostplane, or any file for anyone.
#[derive(Debug, Parser)]
#[command(version)]
enum Arguments {
    /// Keep the volumes of a deployment and serve them; asked over its control socket.
    Daemon(daemon::Options),
    /// Serve files or devices to anyone who may reach the socket.
    Serve(standalone::Options),
}

/// What is to be done once the process is confined.
enum Work {
    Daemon(daemon::Prepared),
    Serve(standalone::Prepared),
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
    raise_limits();
    let work = match arguments {
        Arguments::Daemon(options) => {
            let prepared = daemon::Prepared::new(options)?;
            prepared.confine()?;
            Work::Daemon(prepared)
        }
        Arguments::Serve(options) => {
            let Some(prepared) = standalone::Prepared::new(options)? else { return Ok(()) };
            prepared.confine();
            Work::Serve(prepared)
        }
    };
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("cannot start the runtime")?
        .block_on(async {
            match work {
                Work::Daemon(prepared) => daemon::run(prepared, asked_to_end()?).await,
                Work::Serve(prepared) => standalone::run(prepared, asked_to_end()?).await,
            }
        })
}

/// Each volume takes a few descriptors, and the usual soft limit of 1024 would
/// end at some hundred volumes. Registered buffers count as locked memory, and
/// without its capability root has a limit too. A failure leaves it as it was.
fn raise_limits() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let unlimited = Rlimit { current: None, maximum: None };
    if setrlimit(Resource::Memlock, unlimited).is_err() {
        let Rlimit { maximum, .. } = getrlimit(Resource::Memlock);
        let _ = setrlimit(Resource::Memlock, Rlimit { current: maximum, maximum });
    }
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
