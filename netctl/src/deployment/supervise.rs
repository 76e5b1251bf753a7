//! The supervisor: a shell round [`Restarts`]. It starts the daemons, hears
//! their `ready`, starts again whichever ends, and writes what it knows to
//! `supervisor.json`.
//!
//! SIGTERM: it ends the daemons, last started first, and then itself. SIGUSR1:
//! it lets go: it ends at once and leaves the daemons running, for `netctl
//! down`, which ends them in an order of its own (guests before the block
//! server), and for a new supervisor after an upgrade. SIGHUP: it replaces the
//! block server by the one that is installed now (`replace`).
//!
//! One task a daemon; the main task alone holds the picture of all and writes it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use clap::Args;
use rpc::Deployment;
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use super::config::{Config, write_json};
use super::place::{DAEMONS, Files};
use super::process::{END_WITHIN, Identity, end_by_file};
use super::replace::{self, Replaced, TAKES_OVER, pid_file_of_next, ready, said};
use super::restart::Restarts;
use crate::failure::{Failure, Outcome};

/// A log is set aside (`.old`, one generation) when a daemon is started and its
/// log is larger than this, so that a crash loop cannot fill the run directory,
/// which is memory on most hosts.
const LOG_BYTES_MAX: u64 = 16 << 20;

/// How `last_end` begins where a daemon was ended for being late.
pub(super) const LATE: &str = "not ready within";

#[derive(Debug, Args)]
pub struct Supervise {
    /// The `deployment.json` that `netctl up` wrote
    #[arg(long)]
    pub config: PathBuf,
}

/// What the supervisor knows; `supervisor.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Picture {
    pub supervisor: Identity,
    pub version: String,
    /// On SIGHUP it replaces the block server; an older one would end.
    #[serde(default)]
    pub replaces: bool,
    pub daemons: Vec<DaemonPicture>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DaemonPicture {
    pub name: String,
    pub phase: Phase,
    pub pid: Option<u32>,
    /// Starts after the first.
    pub restarts: u32,
    /// How often it has ended by itself.
    pub ends: u32,
    /// Whether it has ended several times without living long in between.
    pub looping: bool,
    /// Seconds since the epoch of the last change of `phase`.
    pub since_s: u64,
    /// How its last life ended, if it has.
    pub last_end: Option<String>,
    /// How often another took its place while it served, and how often one
    /// came and could not.
    #[serde(default)]
    pub replaced: u32,
    #[serde(default)]
    pub refused: u32,
    #[serde(default)]
    pub last_refusal: Option<String>,
}

impl DaemonPicture {
    /// Whether its last life ended because it took too long to be ready.
    pub fn was_late(&self) -> bool {
        self.last_end.as_ref().is_some_and(|end| end.starts_with(LATE))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Phase {
    Starting,
    Ready,
    /// It has ended, and is started again after a pause.
    Waiting,
    Ended,
}

impl Phase {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Waiting => "waiting",
            Self::Ended => "ended",
        }
    }
}

pub(super) enum Event {
    Started {
        pid: Option<u32>,
    },
    Ready,
    /// It will be started again.
    Ended {
        how: String,
        looping: bool,
    },
    /// Another took its place while it served.
    Replaced {
        pid: Option<u32>,
    },
    /// One was to take its place and could not.
    Refused {
        how: String,
    },
    /// It was ended because the supervisor ends.
    Stopped,
}

pub fn run(supervise: &Supervise) -> Outcome {
    let config: Config = super::config::read_json(&supervise.config)?.ok_or_else(|| {
        Failure::unfit(format!("file {}: there is none", supervise.config.display()))
    })?;
    // A session of its own: no terminal's hang-up or Ctrl-C reaches the daemons.
    // It fails only where we lead a process group already, as under a service
    // manager, and then there is no terminal either.
    let _ = nix::unistd::setsid();
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::failed(format!("supervisor: start: {e}")))?
        .block_on(supervise_all(config))
}

async fn supervise_all(config: Config) -> Outcome {
    let deployment = config.deployment()?;
    let failed = |e: io::Error| Failure::failed(format!("supervisor: start: {e}"));
    let mut terminate = signal(SignalKind::terminate()).map_err(failed)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(failed)?;
    let mut release = signal(SignalKind::user_defined1()).map_err(failed)?;
    let mut replace = signal(SignalKind::hangup()).map_err(failed)?;
    let supervisor = Identity::own(None).map_err(failed)?;
    supervisor.write(&deployment.pid_file("supervisor"))?;

    // Daemons of a supervisor that was killed: they are replaced, not adopted,
    // since only a parent learns how its child ended. Guests, flows and volumes
    // outlive their daemons; the block server's connections go to its successor.
    for daemon in DAEMONS.iter().rev().filter(|daemon| **daemon != TAKES_OVER) {
        end_by_file(&deployment.pid_file(daemon))?;
    }
    replace::settle(&deployment)?;

    let mut picture = Picture {
        supervisor,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        replaces: true,
        daemons: DAEMONS
            .map(|name| DaemonPicture {
                name: name.to_owned(),
                phase: Phase::Starting,
                pid: None,
                restarts: 0,
                ends: 0,
                looping: false,
                since_s: now_s(),
                last_end: None,
                replaced: 0,
                refused: 0,
                last_refusal: None,
            })
            .to_vec(),
    };
    write_json(&deployment.status_file(), &picture)?;

    let (tell, mut events) = mpsc::unbounded_channel();
    let (ask, asked) = watch::channel(());
    let mut keepers: Vec<(watch::Sender<bool>, JoinHandle<()>)> = Vec::new();
    for (index, daemon) in DAEMONS.into_iter().enumerate() {
        let (stop, stopped) = watch::channel(false);
        let keeper = Keeper {
            daemon,
            config: config.clone(),
            deployment: deployment.clone(),
            index,
            tell: tell.clone(),
            stopped,
            asked: asked.clone(),
            may_inherit: true,
        };
        keepers.push((stop, tokio::spawn(keeper.keep())));
    }

    loop {
        tokio::select! {
            Some((index, event)) = events.recv() => note(&deployment, &mut picture, index, event),
            _ = replace.recv() => {
                eprintln!("supervisor: asked to replace {TAKES_OVER}");
                let _ = ask.send(());
            }
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            _ = release.recv() => {
                eprintln!("supervisor: asked to let go; the daemons run on");
                return Ok(());
            }
        }
    }
    eprintln!("supervisor: asked to end; ending the daemons");
    for (stop, mut task) in keepers.into_iter().rev() {
        // A keeper that is gone has nothing left to stop.
        let _ = stop.send(true);
        loop {
            tokio::select! {
                Some((index, event)) = events.recv() => note(&deployment, &mut picture, index, event),
                _ = &mut task => break,
            }
        }
    }
    while let Ok((index, event)) = events.try_recv() {
        note(&deployment, &mut picture, index, event);
    }
    Ok(())
}

fn note(deployment: &Deployment, picture: &mut Picture, index: usize, event: Event) {
    let daemon = &mut picture.daemons[index];
    daemon.since_s = now_s();
    match event {
        Event::Started { pid } => {
            if daemon.last_end.is_some() {
                daemon.restarts += 1;
            }
            daemon.pid = pid;
            daemon.phase = Phase::Starting;
            eprintln!("supervisor: {} started, pid {}", daemon.name, pid.unwrap_or_default());
        }
        Event::Ready => {
            daemon.phase = Phase::Ready;
            eprintln!("supervisor: {} ready", daemon.name);
        }
        Event::Ended { how, looping } => {
            eprintln!("supervisor: {} ended: {how}", daemon.name);
            daemon.pid = None;
            daemon.phase = Phase::Waiting;
            daemon.ends += 1;
            daemon.looping = looping;
            daemon.last_end = Some(how);
        }
        Event::Replaced { pid } => {
            eprintln!("supervisor: {} replaced, pid {}", daemon.name, pid.unwrap_or_default());
            daemon.pid = pid;
            daemon.phase = Phase::Ready;
            daemon.replaced += 1;
        }
        Event::Refused { how } => {
            eprintln!("supervisor: {} is not replaced: {how}", daemon.name);
            daemon.refused += 1;
            daemon.last_refusal = Some(how);
        }
        Event::Stopped => {
            eprintln!("supervisor: {} stopped", daemon.name);
            daemon.pid = None;
            daemon.phase = Phase::Ended;
        }
    }
    // The run directory may be gone while we end; the next change writes again.
    if let Err(failure) = write_json(&deployment.status_file(), picture) {
        eprintln!("{failure}");
    }
}

/// Keeps one daemon alive.
pub(super) struct Keeper {
    pub(super) daemon: &'static str,
    pub(super) config: Config,
    pub(super) deployment: Deployment,
    index: usize,
    tell: mpsc::UnboundedSender<(usize, Event)>,
    pub(super) stopped: watch::Receiver<bool>,
    /// To replace it while it serves.
    asked: watch::Receiver<()>,
    /// Whether it was not tried yet to take over from an earlier supervisor's.
    may_inherit: bool,
}

impl Keeper {
    async fn keep(mut self) {
        let mut restarts = Restarts::default();
        loop {
            let born = Instant::now();
            let how = match self.begin() {
                Ok((child, heir)) => match self.live(child, heir).await {
                    Some(how) => how,
                    None => return self.tell(Event::Stopped),
                },
                Err(e) => format!("cannot start: {e}"),
            };
            let pause = restarts.after_end(born.elapsed());
            self.tell(Event::Ended { how, looping: restarts.is_looping() });
            tokio::select! {
                () = sleep(pause) => {}
                _ = self.stopped.changed() => return self.tell(Event::Stopped),
            }
        }
    }

    pub(super) fn tell(&self, event: Event) {
        // The main task drops its end only when the whole supervisor ends.
        let _ = self.tell.send((self.index, event));
    }

    /// Once it may take over from one that an earlier supervisor left; the next
    /// attempt ends that one first. `true`: it has such a predecessor.
    fn begin(&mut self) -> io::Result<(Child, bool)> {
        let own = self.deployment.pid_file(self.daemon);
        if self.daemon == TAKES_OVER && replace::predecessor(&self.deployment) {
            if self.may_inherit {
                self.may_inherit = false;
                return Ok((self.spawn(&replace::pid_file_of_next(&self.deployment))?, true));
            }
            end_by_file(&own).map_err(|failure| io::Error::other(failure.to_string()))?;
        }
        Ok((self.spawn(&own)?, false))
    }

    /// The heir is ready: its predecessor, which is not our child, is gone or goes.
    fn inherit(&self) -> Outcome {
        let (own, next) =
            (self.deployment.pid_file(self.daemon), pid_file_of_next(&self.deployment));
        end_by_file(&own)?;
        fs::rename(&next, &own)
            .map_err(|e| Failure::failed(format!("file {}: rename: {e}", next.display())))
    }

    pub(super) fn spawn(&self, pid_file: &Path) -> io::Result<Child> {
        let log = self.deployment.log_of(self.daemon);
        set_aside_if_large(&log)?;
        let log = fs::OpenOptions::new().create(true).append(true).open(log)?;
        let mut command = Command::new(std::env::current_exe()?);
        command.arg("launch").arg("--pid-file").arg(pid_file);
        command.arg("--").arg(self.config.executable(self.daemon));
        command.args(self.config.daemon_arguments(self.daemon));
        command.current_dir("/").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log).spawn()
    }

    /// Until the daemon ends (how), or is ended because we are (`None`).
    async fn live(&mut self, mut child: Child, heir: bool) -> Option<String> {
        self.tell(Event::Started { pid: child.id() });
        let within = Duration::from_secs(self.config.ready_within_s);
        let deadline = Instant::now() + within;
        let mut is_ready = false;
        let mut said = said(&mut child);
        loop {
            tokio::select! {
                () = ready(&mut said) => if !is_ready {
                    is_ready = true;
                    if heir && let Err(failure) = self.inherit() {
                        eprintln!("supervisor: {failure}");
                    }
                    self.tell(Event::Ready);
                },
                Ok(()) = self.asked.changed(), if is_ready && self.daemon == TAKES_OVER => {
                    match self.replace(&mut child).await {
                        Replaced::By(successor, heard) => (child, said) = (*successor, heard),
                        Replaced::Not => {}
                        Replaced::Stopped => return None,
                    }
                }
                end = child.wait() => return Some(describe(end)),
                () = sleep_until(deadline), if !is_ready => {
                    end_child(&mut child).await;
                    return Some(format!("{LATE} {} s", within.as_secs()));
                }
                _ = self.stopped.changed() => {
                    end_child(&mut child).await;
                    return None;
                }
            }
        }
    }
}

pub(super) async fn end_child(child: &mut Child) {
    // `id` is there until the child has been waited for, so it names no other.
    if let Some(pid) = child.id().and_then(|id| Pid::from_raw(i32::try_from(id).ok()?)) {
        let _ = kill_process(pid, Signal::TERM);
    }
    if timeout(END_WITHIN, child.wait()).await.is_err() {
        // It waits for the end, too.
        let _ = child.kill().await;
    }
}

pub(super) fn describe(end: io::Result<ExitStatus>) -> String {
    match end {
        Ok(status) => status.to_string(),
        Err(e) => format!("cannot wait for it: {e}"),
    }
}

fn set_aside_if_large(log: &Path) -> io::Result<()> {
    match fs::metadata(log) {
        Ok(meta) if meta.len() > LOG_BYTES_MAX => fs::rename(log, log.with_extension("log.old")),
        _ => Ok(()),
    }
}

#[expect(clippy::disallowed_methods, reason = "the supervisor is a shell")]
pub(super) fn now_s() -> u64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
