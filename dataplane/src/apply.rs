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

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use ebpf::event;
use rpc::Deployment;
use rpc::dataplane::{
    Applied, Desired, Explained, FlowLog, FrameQuestion, Imported, InterfaceStatus, MovedFlows,
    NatGatewayStatus, Observed, Question, RuleHits, Status, Traffic, Verdict,
};
use tokio::sync::broadcast;
use tokio::sync::oneshot;

use crate::compile::{self, Devices, compile, payer};
use crate::device::{self, Host};
use crate::flow_log::{Interval, file::Files, records};
use crate::load::{self, Counters, Hits, Loaded};
use crate::observe::Directory;
use crate::observe::thread::{EVENTS_A_SECOND_MAX, ObserveThread, boot_ms};
use crate::pieces::thread::PiecesThread;
use crate::record;
use crate::respond::thread::RespondThread;
use crate::respond::{Served, Unanswerable};

/// How often flows are aged by one slice, and an unfinished state tried again.
const TICK: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "desired state: apply generation {} of epoch {}: generation {} of epoch {} was accepted \
         before it{}", offered.1, offered.0, accepted.1, accepted.0, advice(*offered, *accepted)
    )]
    Older { offered: (u64, u64), accepted: (u64, u64) },
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

/// What to do where a state is refused for its age.
fn advice(offered: (u64, u64), accepted: (u64, u64)) -> &'static str {
    if offered.0 == accepted.0 {
        return "";
    }
    ": it comes from a store that another has succeeded. If the older store is to rule again, \
     end this daemon, remove its record dataplane/desired.json in the deployment's state folder, \
     and start it: packets flow on meanwhile"
}

/// What a state's age hangs on: a new store's generations begin anew.
fn age(desired: &Desired) -> (u64, u64) {
    (desired.epoch, desired.generation)
}

impl From<Error> for rpc::Error {
    fn from(error: Error) -> Self {
        let message = error.to_string();
        match error {
            Error::Older { .. } => Self::conflict(message),
            Error::Unanswerable(_) | Error::Compile(_) | Error::Load(load::Error::Refused(_)) => {
                Self::refused(message)
            }
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
/// `progress` is told after each change how many of all are done.
pub fn enforce(
    deployment: &Deployment,
    desired: Desired,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Applied, Error> {
    parse(&desired)?;
    let mut host = Host::open(deployment)?;
    let mut loaded = Loaded::open(deployment)?;
    let (devices, made) = host.ensure(&desired)?;
    let tables = compile(&desired, &devices, loaded.tables())?;
    record::write(&deployment.state_of("dataplane").join("desired.json"), &desired)?;
    let changed = loaded.update_watched(tables, &mut |_, done, all| progress(done.len(), all))?;
    announce(&mut loaded);
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
    observe: ObserveThread,
    pieces: PiecesThread,
    /// What the programs are to tell now.
    wanted: event::Wanted,
    /// Events and tallies that were lost, as last looked at.
    lost: (u64, u64),
    /// When the flow log's interval began, since 1970.
    interval_start: u64,
    hits: PathBuf,
}

impl Applier {
    /// Applies what was last accepted to the programs that were adopted or loaded. A state
    /// that cannot be applied now is logged and tried again: what is pinned
    /// forwards as it did.
    pub fn start(
        deployment: &Deployment,
        host: Host,
        mut loaded: Loaded,
        respond: RespondThread,
    ) -> Result<Self, Error> {
        let record = deployment.state_of("dataplane").join("desired.json");
        let accepted = record::read::<Desired>(&record)?.unwrap_or_default();
        let ring = loaded.ring()?;
        let observe = ObserveThread::start(ring).map_err(|_| Error::Gone("observe"))?;
        let pieces = PiecesThread::start(loaded.holder()?).map_err(|_| Error::Gone("pieces"))?;
        let hits = deployment.state_of("dataplane").join("hits.json");
        loaded.watch.remember(record::read::<Hits>(&hits)?.unwrap_or_default());
        let mut applier = Self {
            observe,
            pieces,
            wanted: event::Wanted::default(),
            lost: (0, 0),
            interval_start: boot_ms() / 1000 + since_boot_s(),
            hits,
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
        let (offered, accepted) = (age(&desired), age(&self.accepted));
        if offered < accepted {
            return Err(Error::Older { offered, accepted });
        }
        if offered.0 > accepted.0 && accepted.1 > 0 {
            let (epoch, before) = (offered.0, accepted.0);
            tracing::warn!(epoch, before, "a new store speaks: its generations count from now on");
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
        let served = at_devices(served, &self.accepted, &devices);
        self.respond.configure(served, self.accepted.name_servers.clone());
        let changed = self.loaded.update(tables)?;
        announce(&mut self.loaded);
        self.observe.know(Directory::new(self.loaded.tables()));
        self.pieces.know(self.loaded.tables().config.uplink);
        if changed > 0 {
            record::write(&self.hits, self.loaded.watch.earlier())?;
        }
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
        announce(&mut self.loaded);
        if let Err(error) = self.watch() {
            tracing::error!(%error, "what is observed was not told");
        }
    }

    /// Has the programs tell what somebody wants to know, and no more.
    fn watch(&mut self) -> Result<(), Error> {
        let events = if self.observe.heard() { event::EVENTS } else { 0 };
        let tally = if self.accepted.flow_log.is_some() { event::TALLY } else { 0 };
        let events_a_second_max = EVENTS_A_SECOND_MAX;
        let wanted = event::Wanted { what: events | tally, events_a_second_max, holds: 1 };
        if wanted != self.wanted {
            self.loaded.watch.want(wanted)?;
            self.wanted = wanted;
        }
        if wanted.what == 0 {
            return Ok(());
        }
        let lost = self.loaded.watch.lost()?;
        if lost.0 > self.lost.0 {
            self.observe.left_out(lost.0 - self.lost.0);
        }
        self.lost.0 = lost.0;
        let now = boot_ms() / 1000 + since_boot_s();
        match self.accepted.flow_log.clone() {
            Some(log) if now >= self.interval_start + u64::from(log.interval_s) => {
                self.write_flow_log(&log, now, lost.1)
            }
            Some(_) => Ok(()),
            None => {
                self.interval_start = now;
                Ok(())
            }
        }
    }

    fn write_flow_log(&mut self, log: &FlowLog, now: u64, untallied: u64) -> Result<(), Error> {
        let tallies = self.loaded.watch.take_tallies()?;
        let interval = Interval {
            start: self.interval_start,
            end: now,
            boot: boot_ms() / 1000,
            skipped: untallied > self.lost.1,
        };
        let directory = Directory::new(self.loaded.tables());
        let lines = records(&directory, &tallies, interval, log.format, &log.account);
        if let Err(error) = Files::new(log).append(&lines) {
            tracing::error!(directory = %log.directory.display(), %error, "flow log: not written");
        }
        (self.interval_start, self.lost.1) = (now, untallied);
        Ok(())
    }

    /// What is observed from now on.
    pub fn listen(&mut self) -> Result<broadcast::Receiver<Observed>, Error> {
        let receiver = self.observe.listen();
        self.watch()?;
        Ok(receiver)
    }

    /// Every rule, with the flows that it let in.
    pub fn rules(&self) -> Result<Vec<RuleHits>, Error> {
        let hits = self.loaded.watch.hits(self.loaded.tables())?;
        let mut rules = Vec::new();
        for group in &self.accepted.groups {
            for direction in [model::Direction::Ingress, model::Direction::Egress] {
                rules.extend(group.rules(direction).iter().map(|rule| RuleHits {
                    rule: rule.id,
                    group: group.id,
                    direction,
                    flows: hits.get(&rule.id).copied().unwrap_or(0),
                }));
            }
        }
        Ok(rules)
    }

    pub fn explain(&self, question: &FrameQuestion) -> Result<Explained, Error> {
        Ok(self.loaded.explain(question)?)
    }

    pub fn export(&self, interface: model::InterfaceId) -> Result<MovedFlows, Error> {
        Ok(self.loaded.export(interface)?)
    }

    pub fn import(&self, moved: &MovedFlows) -> Result<Imported, Error> {
        Ok(self.loaded.import(moved)?)
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
        let traffic = traffic();
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
                secondary: interface.secondary.clone(),
                reasons: own,
                traffic: traffic.get(interface.device.name()).copied().unwrap_or_default(),
                flows: self.loaded.flows_open(interface.id).unwrap_or(0),
                rates: payer(&self.accepted, interface).map_or(interface.rates, |i| i.rates),
                credits: self.loaded.credits(interface.id).unwrap_or_default(),
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
            nat_gateways: self.nat_gateways()?,
        })
    }

    fn nat_gateways(&self) -> Result<Vec<NatGatewayStatus>, Error> {
        let told = self.accepted.nat_gateways.iter().map(|gateway| {
            let (id, elastic) = (gateway.id, gateway.elastic);
            let (connections, reasons) = self.loaded.nat_gateway(elastic.into())?;
            Ok(NatGatewayStatus { id, elastic, connections, reasons })
        });
        told.collect()
    }
}

/// Where it cannot be said now (the uplink is down), neighbours ask when they need to know.
fn announce(loaded: &mut Loaded) {
    if let Err(error) = loaded.announce() {
        tracing::warn!(%error, "addresses that came were not announced on the uplink");
    }
}

fn since_boot_s() -> u64 {
    let clock = nix::time::ClockId::CLOCK_MONOTONIC;
    nix::time::clock_gettime(clock).map_or(0, |t| Duration::from(t).as_secs())
}

/// Every device of this network namespace, as the kernel counts.
fn traffic() -> BTreeMap<String, Traffic> {
    // The thread's own namespace, which is the process' first.
    let text = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap_or_default();
    text.lines().filter_map(device_line).collect()
}

/// proc(5): `name: bytes packets errs drop fifo frame compressed multicast`, and
/// eight more of what was sent. What a device received came from its guest.
fn device_line(line: &str) -> Option<(String, Traffic)> {
    let (name, counts) = line.split_once(':')?;
    let counts: Vec<u64> = counts.split_whitespace().filter_map(|n| n.parse().ok()).collect();
    let [from_bytes, from_packets, _, _, _, _, _, _, to_bytes, to_packets, ..] = counts[..] else {
        return None;
    };
    Some((name.trim().to_owned(), Traffic { from_packets, from_bytes, to_packets, to_bytes }))
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
    Listen(Reply<broadcast::Receiver<Observed>>),
    Rules(Reply<Vec<RuleHits>>),
    Explain(FrameQuestion, Reply<Explained>),
    Export(model::InterfaceId, Reply<MovedFlows>),
    Import(MovedFlows, Reply<Imported>),
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

    pub async fn listen(&self) -> Result<broadcast::Receiver<Observed>, Error> {
        self.ask("observe", Command::Listen).await
    }

    pub async fn rules(&self) -> Result<Vec<RuleHits>, Error> {
        self.ask("tell its rules", Command::Rules).await
    }

    pub async fn explain(&self, question: FrameQuestion) -> Result<Explained, Error> {
        self.ask("judge a frame", |reply| Command::Explain(question, reply)).await
    }

    pub async fn export(&self, interface: model::InterfaceId) -> Result<MovedFlows, Error> {
        self.ask("export flows", |reply| Command::Export(interface, reply)).await
    }

    pub async fn import(&self, moved: MovedFlows) -> Result<Imported, Error> {
        self.ask("import flows", |reply| Command::Import(moved, reply)).await
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
        Command::Listen(reply) => _ = reply.send(applier.listen()),
        Command::Rules(reply) => _ = reply.send(applier.rules()),
        Command::Explain(question, reply) => _ = reply.send(applier.explain(&question)),
        Command::Export(interface, reply) => _ = reply.send(applier.export(interface)),
        Command::Import(moved, reply) => _ = reply.send(applier.import(&moved)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_devices_counts_are_read_from_its_line() {
        let line =
            "  tap-a: 100 2 0 0 0 0 0 0      700    9    0    0    0     0       0          0";
        let (name, traffic) = device_line(line).unwrap();
        assert_eq!((name.as_str(), traffic.from_bytes, traffic.to_packets), ("tap-a", 100, 9));
        assert!(device_line("Inter-|   Receive  |  Transmit").is_none());
    }
}
