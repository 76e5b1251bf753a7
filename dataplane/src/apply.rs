//! Brings the host to a desired state: devices, tables, responders.
//!
//! One thread owns the loaded programs and does one thing after another; the
//! control socket puts its calls into the same queue, so there is one history.
//!
//! ```text
//! desired ─ older generation? ─ refused
//!    │ readable by the responders? ─ refused
//!    ├─ devices made and looked up
//!    ├─ compiled ─ refused where it cannot be
//!    ├─ kept on disk            (from here on a restart applies it)
//!    ├─ tables changed          (make before break)
//!    ├─ responders told
//!    └─ devices removed that it no longer names
//! ```
//! Every step may be done twice. A state that is on disk and could not be applied
//! whole (its uplink is not there yet, after a reboot) is tried again.

use std::path::PathBuf;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use rpc::Deployment;
use rpc::dataplane::{Applied, Desired, InterfaceStatus, Question, Status, Verdict};
use tokio::sync::oneshot;

use crate::compile::{self, Devices, compile};
use crate::device::{self, Host};
use crate::load::{self, Counters, Loaded};
use crate::record;
use crate::respond::thread::RespondThread;
use crate::respond::{Served, Unanswerable};

/// How often flows are aged by one slice, and an unfinished state tried again.
const TICK: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "desired state: apply generation {offered}: generation {accepted} was accepted before it"
    )]
    Older { offered: u64, accepted: u64 },
    #[error(transparent)]
    Unanswerable(#[from] Unanswerable),
    #[error(transparent)]
    Compile(#[from] compile::Error),
    #[error(transparent)]
    Device(#[from] device::Error),
    #[error(transparent)]
    Load(#[from] load::Error),
    #[error(transparent)]
    Record(#[from] record::Error),
    #[error("dataplane: {0}: its thread has ended; the log says why")]
    Gone(&'static str),
}

impl From<Error> for rpc::Error {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Older { .. } => Self::conflict(message),
            Error::Unanswerable(_) | Error::Compile(_) => Self::refused(message),
            Error::Device(device::Error::Foreign { .. }) => Self::conflict(message),
            Error::Record(record::Error::Damaged { .. }) => Self::damaged(message),
            Error::Device(_) | Error::Load(_) | Error::Record(_) | Error::Gone(_) => {
                Self::unavailable(message)
            }
        }
    }
}

/// Applies a state without a daemon, which nobody else may have meanwhile: tables
/// and devices. Nothing answers DHCP then, and flows are aged when this is called.
pub fn enforce(deployment: &Deployment, desired: Desired) -> Result<Applied, Error> {
    parse(&desired)?;
    let mut host = Host::open(deployment)?;
    let mut loaded = Loaded::open(deployment)?;
    let (devices, made) = host.ensure(&desired)?;
    let tables = compile(&desired, &devices, loaded.tables())?;
    record::write(&deployment.state_of("dataplane").join("desired.json"), &desired)?;
    let changed = loaded.update(tables)?;
    let removed = host.prune(&desired)?;
    loaded.sweep_all()?;
    Ok(Applied { generation: desired.generation, changes: made + changed + removed })
}

/// The state of this host's packets, and what changes it.
pub struct Applier {
    host: Host,
    loaded: Loaded,
    respond: RespondThread,
    record: PathBuf,
    accepted: Desired,
    /// Whether `accepted` was applied whole.
    applied: bool,
    /// Why not, so that it is said once and not each second.
    hindrance: Option<String>,
    flows: u64,
}

impl Applier {
    /// Adopts or loads the programs and applies what was last accepted. A state
    /// that cannot be applied now is logged and tried again: what is pinned
    /// forwards as it did.
    pub fn start(
        deployment: &Deployment,
        host: Host,
        respond: RespondThread,
    ) -> Result<Self, Error> {
        let record = deployment.state_of("dataplane").join("desired.json");
        let accepted = record::read::<Desired>(&record)?.unwrap_or_default();
        let loaded = Loaded::open(deployment)?;
        let mut applier = Self {
            host,
            loaded,
            respond,
            record,
            accepted,
            applied: false,
            hindrance: None,
            flows: 0,
        };
        applier.finish();
        Ok(applier)
    }

    pub fn apply(&mut self, desired: Desired) -> Result<Applied, Error> {
        if desired.generation < self.accepted.generation {
            return Err(Error::Older {
                offered: desired.generation,
                accepted: self.accepted.generation,
            });
        }
        self.bring_about(desired)
    }

    fn bring_about(&mut self, desired: Desired) -> Result<Applied, Error> {
        let served = parse(&desired)?;
        let (devices, made) = self.host.ensure(&desired)?;
        let tables = compile(&desired, &devices, self.loaded.tables())?;
        if desired != self.accepted {
            record::write(&self.record, &desired)?;
        }
        self.applied = false;
        self.accepted = desired;
        self.respond.configure(at_devices(served, &self.accepted, &devices));
        let changed = self.loaded.update(tables)?;
        let removed = self.host.prune(&self.accepted)?;
        self.applied = true;
        let generation = self.accepted.generation;
        let changes = made + changed + removed;
        if changes > 0 {
            tracing::info!(generation, made, changed, removed, "applied");
        }
        Ok(Applied { generation, changes })
    }

    /// Applies what was accepted before and is not in force yet.
    fn finish(&mut self) {
        if self.applied {
            return;
        }
        let hindrance = self.bring_about(self.accepted.clone()).err().map(|e| e.to_string());
        if let Some(error) = hindrance.as_ref().filter(|h| self.hindrance.as_ref() != Some(h)) {
            let generation = self.accepted.generation;
            tracing::error!(generation, error, "not applied yet; the last tables stay");
        }
        self.hindrance = hindrance;
    }

    /// What is due each second.
    pub fn tick(&mut self) {
        self.finish();
        match self.loaded.sweep() {
            Ok(swept) => self.flows = swept.flows,
            Err(error) => tracing::error!(%error, "flows were not aged"),
        }
    }

    pub fn accepted(&self) -> &Desired {
        &self.accepted
    }

    pub fn why(&self, question: &Question) -> Result<Verdict, Error> {
        Ok(self.loaded.why(question)?)
    }

    pub fn status(&self) -> Result<Status, Error> {
        let Counters { interfaces, uplink } = self.loaded.counters()?;
        let answered = self.respond.counters();
        let mut reasons = uplink;
        let mut described = Vec::new();
        for interface in &self.accepted.interfaces {
            let mut own = interfaces.get(&interface.id).cloned().unwrap_or_default();
            for (reason, count) in &own {
                *reasons.entry(reason.clone()).or_default() += count;
            }
            if let Some(counters) = answered.get(&interface.id) {
                own.extend(counters.named().filter(|(_, n)| *n > 0).map(|(k, n)| (k.into(), n)));
            }
            described.push(InterfaceStatus {
                id: interface.id,
                device: interface.device.name().to_owned(),
                address: interface.address,
                elastic: interface.elastic,
                reasons: own,
            });
        }
        Ok(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            object: load::origin(),
            generation: if self.applied { self.accepted.generation } else { 0 },
            adopted: self.loaded.adopted(),
            flows: self.flows,
            interfaces: described,
            reasons,
        })
    }
}

fn parse(desired: &Desired) -> Result<Vec<Served>, Unanswerable> {
    desired.interfaces.iter().map(Served::try_from).collect()
}

fn at_devices(served: Vec<Served>, desired: &Desired, devices: &Devices) -> Vec<(u32, Served)> {
    let names = desired.interfaces.iter().map(|i| i.device.name());
    names
        .zip(served)
        .filter_map(|(name, served)| Some((devices.by_name.get(name)?.ifindex, served)))
        .collect()
}

type Reply<T> = oneshot::Sender<Result<T, Error>>;

enum Command {
    Apply(Box<Desired>, Reply<Applied>),
    Accepted(Reply<Desired>),
    Why(Question, Reply<Verdict>),
    Status(Reply<Status>),
}

/// How the control socket reaches the applier's thread. Cheap to clone.
#[derive(Clone)]
pub struct Handle(Sender<Command>);

impl Handle {
    /// Moves the applier into its thread, which ends with the last handle.
    pub fn start(applier: Applier) -> std::io::Result<Self> {
        let (sender, inbox) = crossbeam_channel::unbounded();
        std::thread::Builder::new().name("apply".into()).spawn(move || run(applier, &inbox))?;
        Ok(Self(sender))
    }

    pub async fn apply(&self, desired: Desired) -> Result<Applied, Error> {
        self.ask("apply", |reply| Command::Apply(Box::new(desired), reply)).await
    }

    pub async fn accepted(&self) -> Result<Desired, Error> {
        self.ask("tell its desired state", Command::Accepted).await
    }

    pub async fn why(&self, question: Question) -> Result<Verdict, Error> {
        self.ask("judge a packet", |reply| Command::Why(question, reply)).await
    }

    pub async fn status(&self) -> Result<Status, Error> {
        self.ask("tell its status", Command::Status).await
    }

    async fn ask<T>(
        &self,
        deed: &'static str,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.0.send(command(reply)).map_err(|_| Error::Gone(deed))?;
        answer.await.map_err(|_| Error::Gone(deed))?
    }
}

fn run(mut applier: Applier, inbox: &Receiver<Command>) {
    let ticks = crossbeam_channel::tick(TICK);
    loop {
        // Ticks first, so that a busy caller does not stop flows from ageing.
        if ticks.try_recv().is_ok() {
            applier.tick();
        }
        match inbox.recv_timeout(TICK) {
            Ok(command) => obey(&mut applier, command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// A caller that has gone away does not need its answer.
fn obey(applier: &mut Applier, command: Command) {
    match command {
        Command::Apply(desired, reply) => _ = reply.send(applier.apply(*desired)),
        Command::Accepted(reply) => _ = reply.send(Ok(applier.accepted().clone())),
        Command::Why(question, reply) => _ = reply.send(applier.why(&question)),
        Command::Status(reply) => _ = reply.send(applier.status()),
    }
}
