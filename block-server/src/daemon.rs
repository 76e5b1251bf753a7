//! `block-server daemon`: the volumes of a Hostplane deployment.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use rpc::Deployment;
use tokio::sync::mpsc::unbounded_channel;

use crate::depot::{CONTROL, DAEMON, Depot, Inheritance, KIND, TAKE_OVER};
use crate::handover::{self, Sockets, Taking};
use crate::worker::{EngineChoice, Event, Handle, THREADS_MAX};
use crate::{confine, serve, socket};

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
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=THREADS_MAX))]
    threads: Option<u16>,
    /// Log requests that take as long, ten a second at most; changed live over the
    /// control socket.
    #[arg(long, value_name = "MS")]
    slow_log_ms: Option<u64>,
    /// Ask the daemon that serves this deployment for its sockets, volumes and
    /// connections, so that its clients notice nothing; where none serves, start.
    #[arg(long)]
    take_over: bool,
}

impl Options {
    fn deployment(&self) -> anyhow::Result<Deployment> {
        // Whoever reads a socket's path from an answer may stand in another folder.
        let run_dir =
            std::path::absolute(&self.run_dir).context("cannot place the run directory")?;
        Ok(Deployment::new(&self.name, &self.state_dir, run_dir)?)
    }
}

/// What is known before any thread is started.
pub struct Prepared {
    options: Options,
    deployment: Deployment,
    taking: Option<Taking>,
    from: Inheritance,
}

impl Prepared {
    /// Asks the daemon that serves, where it is to be replaced.
    pub fn new(options: Options) -> anyhow::Result<Self> {
        let deployment = options.deployment()?;
        let (mut taking, mut from) = (None, Inheritance::default());
        if options.take_over {
            let path = take_over_socket(&deployment);
            let begun = Taking::begin(&path, KIND)
                .with_context(|| format!("take over by {}", path.display()))?;
            if let Some((begun, sockets)) = begun {
                (taking, from.sockets) = (Some(begun), sockets);
            }
        }
        Ok(Self { options, deployment, taking, from })
    }

    /// Gives up what a daemon does not need. Called before any thread is started.
    pub fn confine(&self) -> anyhow::Result<()> {
        let home = self.deployment.state_of(DAEMON);
        for folder in [home.as_path(), self.deployment.run_dir()] {
            std::fs::create_dir_all(folder)
                .with_context(|| format!("cannot make {}", folder.display()))?;
        }
        let folders = vec![home.as_path(), self.deployment.run_dir()];
        let held = confine::confine(&confine::Needs::Keeping { folders });
        tracing::info!("confined by {held}");
        Ok(())
    }
}

/// Where a successor asks.
fn take_over_socket(deployment: &Deployment) -> PathBuf {
    deployment.socket_of(&format!("{DAEMON}-{TAKE_OVER}"))
}

/// Serves until `stop` resolves or a successor has taken over.
pub async fn run(prepared: Prepared, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let Prepared { options, deployment, taking, mut from } = prepared;
    let slow = options.slow_log_ms.filter(|ms| *ms > 0);
    crate::worker::set_slow_log(slow.map(std::time::Duration::from_millis));
    let (events, mut heard) = unbounded_channel();
    let count = crate::worker::threads(options.threads);
    let workers =
        Handle::start(count, options.engine, &events).context("cannot start the I/O engine")?;
    let engine = workers[0].engine();
    let depot = Depot::open(&deployment, workers, &mut from)?;
    let has_predecessor = taking.is_some();
    if let Some(taking) = taking {
        let mut taken = tokio::task::block_in_place(|| taking.finish()).context("take over")?;
        if taken.has_crashed {
            tracing::warn!("the predecessor died; going on as after a crash");
            from.after_a_crash();
        }
        from.load = std::mem::take(&mut taken.load);
        taken.begin().context("take over")?;
    }
    // Nobody but us serves from here on.
    let taken = from.load.connections.len();
    let own = own_sockets(&deployment, &mut from)?;
    depot.recover(from).await?;
    let path = deployment.socket_of(DAEMON);
    let control = copy_of(&own, CONTROL)?;
    let control = serve::listen(control, &path, serve::router(Arc::clone(&depot)))
        .with_context(|| format!("cannot serve {}", path.display()))?;
    let how = if has_predecessor { "taken over" } else { "begun" };
    tracing::info!(engine, threads = count, how, taken, "serving {}", path.display());
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
        succeeded = succession(&depot, &own) => {
            succeeded?;
            tracing::info!("a successor serves");
            return Ok(());
        }
    }
    tokio::task::block_in_place(|| depot.stop());
    Ok(())
}

/// The sockets that are the process's, not an export's.
fn own_sockets(deployment: &Deployment, from: &mut Inheritance) -> anyhow::Result<Sockets> {
    let mut own = Sockets::default();
    let paths =
        [(CONTROL, deployment.socket_of(DAEMON)), (TAKE_OVER, take_over_socket(deployment))];
    for (name, path) in paths {
        let socket = match from.sockets.listening.remove(name) {
            Some(socket) => socket,
            None => socket::listen(&path, &[])?,
        };
        own.listening.insert(name.to_owned(), socket);
    }
    Ok(own)
}

fn copy_of(sockets: &Sockets, name: &str) -> anyhow::Result<OwnedFd> {
    let socket = sockets.listening.get(name).with_context(|| format!("no socket {name}"))?;
    Ok(socket.try_clone()?)
}

/// Resolves when a successor has taken over.
async fn succession(depot: &Depot, own: &Sockets) -> anyhow::Result<()> {
    let asked = handover::Asked::new(copy_of(own, TAKE_OVER)?)?;
    loop {
        let stream = asked.next().await?;
        if depot.give_to(stream, own).await? {
            return Ok(());
        }
    }
}
