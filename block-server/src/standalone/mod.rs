//! `block-server serve`: plain NBD for anyone, without catalogue or control.
//!
//! ```text
//!  words, file ──▶ Options ──▶ Plan ──▶ Opened ──▶ Serving ──▶ a successor
//!                                       (files,     (threads)
//!                                        sockets)
//! ```

mod open;
mod options;
mod serving;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::Context;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::backing;
use crate::confine::{Needs, confine};
use crate::exposition;
use crate::handover::{self, Sockets, Taken, Taking};
use crate::notify::Manager;
use crate::plan::{ACTIVATED, Place, Plan};
use crate::socket;
use crate::starter::{self, Starter};

use open::{Opened, check, open};
pub use options::Options;
use serving::{Serving, Threads};

/// What a hand-over calls us; a `daemon` is another kind.
const KIND: &str = "block-server serve";

/// All that was read and opened, before any thread is started.
pub struct Prepared {
    plan: Plan,
    opened: Opened,
    taking: Option<Taking>,
    manager: Manager,
    /// Where a file says what is served, which may change.
    starter: Option<Starter>,
}

impl Prepared {
    /// Opens all that is to be served; `None` where only that was asked.
    pub fn new(options: Options) -> anyhow::Result<Option<Self>> {
        let (is_check, take_over) = (options.check, options.take_over.clone());
        // Before anything is opened, so that nobody else has it open, too.
        let predecessor = starter::predecessor().context("the predecessor's socket")?;
        let reloads = options.config.is_some() && !is_check;
        let starter = reloads.then(Starter::split_off).transpose().context("the starter")?;
        let manager = Manager::of_environment();
        let activated = socket::inherited();
        let mut old = Sockets::default();
        let mut taking = None;
        let asks = take_over.as_deref().filter(|_| predecessor.is_none());
        if let Some(stream) = predecessor {
            let (begun, sockets) = Taking::of_starter(stream, KIND).context("take over")?;
            (taking, old) = (Some(begun), sockets);
        }
        if let Some(path) = asks.filter(|_| !is_check) {
            let begun = Taking::begin(path, KIND)
                .with_context(|| format!("take over by {}", path.display()))?;
            if let Some((begun, sockets)) = begun {
                (taking, old) = (Some(begun), sockets);
            }
        }
        let has_activated =
            !activated.is_empty() || old.listening.keys().any(|name| name.starts_with(ACTIVATED));
        let plan = options.plan(has_activated)?;
        if is_check {
            check(&plan, take_over.is_some())?;
            return Ok(None);
        }
        let opened = open(&plan, take_over.as_deref(), activated, &mut old)?;
        Ok(Some(Self { plan, opened, taking, manager, starter }))
    }

    /// Gives up what serving does not need. Called before any thread is started.
    pub fn confine(&self) {
        let sockets = self.plan.listeners.iter().filter_map(|listen| match &listen.place {
            Place::Unix(path, _) | Place::VhostUser(path, _) => Some(path.as_path()),
            Place::Tcp(_) | Place::Activated(_) => None,
        });
        let metrics = match &self.plan.metrics {
            Some(exposition::Place::Unix(path)) => Some(path.as_path()),
            _ => None,
        };
        let folder = |path: &'_ Path| match path.parent() {
            Some(folder) if folder != Path::new("") => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        let folders: Vec<PathBuf> = sockets.chain(metrics).map(folder).collect();
        let folders = folders.iter().map(PathBuf::as_path).collect();
        let held = confine(&Needs::Serving { folders });
        tracing::info!("confined by {held}");
    }
}

/// Serves until `stop` resolves or a successor has taken over.
pub async fn run(prepared: Prepared, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let Prepared { plan, mut opened, taking, manager, starter } = prepared;
    let is_successor = taking.is_some();
    // Heard from the beginning: it would end us.
    let hangups = starter.is_some().then(|| signal(SignalKind::hangup())).transpose();
    let hangups = hangups.context("cannot hear SIGHUP")?;
    let threads = Threads::start(&plan, &opened).context("cannot start the I/O engine")?;
    let mut taken = match taking {
        Some(taking) => tokio::task::block_in_place(|| taking.finish()).context("take over")?,
        None => Taken::default(),
    };
    // Nobody else serves now; when we fail before `begin`, the predecessor goes on.
    if taken.has_crashed {
        tracing::warn!("the predecessor died; going on as after a crash");
        opened.held.take_from_the_dead(&mut opened.exports, backing::FREED_WITHIN)?;
    } else {
        opened.held.settle(handover::SETTLE_MAX)?;
    }
    if let Err(error) = taken.begin() {
        opened.held.give_back();
        return Err(error).context("take over");
    }
    opened.held.begun();
    if is_successor {
        // While the predecessor still lives: its end is not the service's then.
        manager.successor();
    }
    let load = std::mem::take(&mut taken.load);
    drop(taken);
    let taken = load.connections.len();
    let scraped_at = opened.metrics.as_ref().map(OwnedFd::try_clone).transpose()?;
    let (serving, upgrades) = Serving::start(threads, opened, load).await?;
    crate::worker::set_slow_log(plan.slow_log);
    let scraped = async {
        match (&plan.metrics, scraped_at) {
            (Some(place), Some(socket)) => {
                exposition::serve(place.clone(), socket, serving.metrics.clone()).await
            }
            _ => std::future::pending().await,
        }
    };
    let (engine, threads, exports) = (serving.engine(), serving.threads(), plan.exports.len());
    tracing::info!(engine, threads, exports, taken, "serving");
    if plan.listeners.iter().any(|listen| !matches!(listen.place, Place::Activated(_))) {
        println!("ready");
    } // Else whoever passed the sockets on has clients there already, and its output is not ours.
    manager.ready();
    tokio::select! {
        () = stop => {}
        reloaded = reloads(&serving, starter.zip(hangups), &manager) => {
            reloaded?;
            tracing::info!("a successor serves");
            return Ok(());
        }
        ended = scraped => ended.context("the metrics' socket failed")?,
        succeeded = succession(&serving, upgrades) => {
            succeeded?;
            tracing::info!("a successor serves");
            return Ok(());
        }
    }
    manager.stopping();
    tokio::task::block_in_place(|| serving.stop());
    if let Some(exposition::Place::Unix(path)) = &plan.metrics {
        let _ = std::fs::remove_file(path);
    }
    for listen in &plan.listeners {
        if let Place::Unix(path, _) | Place::VhostUser(path, _) = &listen.place {
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(())
}

/// Resolves when a successor has taken over.
async fn succession(serving: &Serving, upgrades: Option<OwnedFd>) -> anyhow::Result<()> {
    let Some(upgrades) = upgrades else { return std::future::pending().await };
    let asked = handover::Asked::new(upgrades)?;
    loop {
        let stream = asked.next().await?;
        if tokio::task::block_in_place(|| serving.give_to(stream))?.is_none() {
            return Ok(());
        }
    }
}

/// Resolves when SIGHUP has brought a successor that serves by the changed file.
async fn reloads(
    serving: &Serving,
    starter: Option<(Starter, Signal)>,
    manager: &Manager,
) -> anyhow::Result<()> {
    let Some((starter, mut hangups)) = starter else { return std::future::pending().await };
    loop {
        hangups.recv().await;
        tracing::info!("SIGHUP: starting a successor");
        manager.reloading();
        let given = tokio::task::block_in_place(|| match starter.start() {
            Ok(stream) => serving.give_to(stream),
            Err(error) => Ok(Some(format!("cannot start a successor: {error}"))),
        });
        match given? {
            None => return Ok(()),
            Some(why) => {
                tracing::warn!("not reloaded, serving on: {why}");
                manager.not_reloaded(&why);
            }
        }
    }
}
