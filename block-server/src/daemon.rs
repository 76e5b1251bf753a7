//! `block-server daemon`: the volumes of a Hostplane deployment.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use rpc::Deployment;
use tokio::sync::mpsc::unbounded_channel;

use crate::depot::{DAEMON, Depot};
use crate::worker::{EngineChoice, Event, Handle};
use crate::{confine, serve};

/// One thread serves some hundred thousand requests a second; more than a few
/// would only take cores from the guests.
const WORKERS_MAX: usize = 4;

#[derive(Debug, clap::Args)]
pub struct Options {
    #[arg(long)]
    name: String,
    #[arg(long, value_name = "DIR")]
    state_dir: PathBuf,
    #[arg(long, value_name = "DIR")]
    run_dir: PathBuf,
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
    /// Threads that serve; by default one a core, at most four.
    #[arg(long, value_name = "COUNT")]
    threads: Option<usize>,
    /// Log requests that take as long, ten a second at most; changed live over the
    /// control socket.
    #[arg(long, value_name = "MS")]
    slow_log_ms: Option<u64>,
}

impl Options {
    fn deployment(&self) -> anyhow::Result<Deployment> {
        // Whoever reads a socket's path from an answer may stand in another folder.
        let run_dir =
            std::path::absolute(&self.run_dir).context("cannot place the run directory")?;
        Ok(Deployment::new(&self.name, &self.state_dir, run_dir)?)
    }

    /// Gives up what a daemon does not need. Called before any thread is started.
    pub fn confine(&self) -> anyhow::Result<()> {
        let deployment = self.deployment()?;
        let home = deployment.state_of(DAEMON);
        for folder in [home.as_path(), deployment.run_dir()] {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let folders = vec![home.as_path(), deployment.run_dir()];
        let held = confine::confine(&confine::Needs::Keeping { folders });
        tracing::info!("confined by {held}");
        Ok(())
    }
}

/// Serves until `stop` resolves.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let deployment = options.deployment()?;
    let slow = options.slow_log_ms.filter(|ms| *ms > 0);
    crate::worker::set_slow_log(slow.map(std::time::Duration::from_millis));
    let (events, mut heard) = unbounded_channel();
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let count = options.threads.unwrap_or(cores.min(WORKERS_MAX)).max(1);
    let workers = (0..count)
        .map(|index| Handle::start(index, options.engine, events.clone()))
        .collect::<Result<Vec<_>, _>>()
        .context("cannot start the I/O engine")?;
    let engine = workers[0].engine();
    let depot = Depot::open(&deployment, workers).await?;
    let socket = deployment.socket_of(DAEMON);
    let control = serve::listen(&socket, serve::router(Arc::clone(&depot)))
        .with_context(|| format!("cannot serve {}", socket.display()))?;
    tracing::info!(engine, threads = count, "serving {}", socket.display());
    println!("ready");
    let listening = Arc::clone(&depot);
    let hear = async move {
        while let Some(Event::VolumeFailed { name, reason }) = heard.recv().await {
            listening.volume_failed(&name, reason).await;
        }
    };
    tokio::select! {
        () = stop => {}
        () = hear => {}
        ended = control => ended.context("the control socket failed")?,
    }
    tokio::task::block_in_place(|| depot.stop());
    Ok(())
}
