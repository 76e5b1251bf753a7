//! The owner: one task holds everything that this host knows and takes every
//! event in one order. It asks others to act and never waits for them here.
//!
//! ```text
//!   control ─desired─▶ ┌───────────┐ ─effects─▶ hypervisor
//!   hypervisor ─event─▶│   Host    │ ─calls──▶ block server, dataplane
//!   results, asks ────▶│           │ ─whole──▶ control (observed), disk (records)
//!   tick ─────────────▶└───────────┘
//! ```
//! Each round compares all that is with all that should be; a lost message heals
//! itself. Before the first word from control the last wish on disk holds, so a
//! host without control keeps its guests, and starts them after a power cut.

mod control;
mod network;
mod remember;
mod volume;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use model::{InstanceId, InstanceState, VolumeId};
use rpc::agent::{InstanceStatus, Status};
use rpc::block::{Export, NewExport};
use rpc::host::{Desired, Observed};
use rpc::{Client, Deployment, dataplane};
use tokio::sync::{mpsc, oneshot, watch};

use crate::image::Store;
use crate::lifecycle::{Effect, Event, Instance};
use crate::qemu::{Context, Hypervisor, Reports, Sockets};

pub use control::{poll, report};
use network::Network;
pub use remember::Memory;
use volume::Volumes;

/// How often time passes for the cores; their finest pause is as long.
const TICK: Duration = Duration::from_millis(200);

/// How often the other daemons are asked whether they still have what we gave them.
const CHECK_EVERY: Duration = Duration::from_secs(2);

const MESSAGES_MAX: usize = 1024;

/// Users of guests without a tap of their own (tests, mostly): apart from those
/// that control gives out, and below systemd's for containers (from 524 288).
const UID_WITHOUT_TAP: u32 = 300_000;
const UID_WITHOUT_TAP_MASK: u32 = (1 << 17) - 1;

#[derive(Debug)]
pub enum Message {
    Desired(Box<Desired>),
    Exported(InstanceId, VolumeId, Result<Sockets, String>),
    Unexported(InstanceId, VolumeId, Result<(), String>),
    Exports(Vec<Export>),
    Volume(VolumeId, volume::Outcome),
    Network(Box<dataplane::Desired>, Result<u64, String>),
    NetworkGeneration(u64),
    ImagesChanged,
    Status(oneshot::Sender<Status>),
}

/// How others reach the owner.
#[derive(Debug, Clone)]
pub struct Desk {
    messages: mpsc::Sender<Message>,
}

impl Desk {
    pub async fn tell(&self, message: Message) {
        // The owner is gone only when the agent ends.
        let _ = self.messages.send(message).await;
    }

    pub async fn status(&self) -> Option<Status> {
        let (answer, status) = oneshot::channel();
        self.tell(Message::Status(answer)).await;
        status.await.ok()
    }
}

/// The channels of an owner that does not run yet.
#[derive(Debug)]
pub struct Channels {
    desk: Desk,
    messages: mpsc::Receiver<Message>,
    reports: Reports,
    events: mpsc::Receiver<(InstanceId, Event)>,
}

impl Channels {
    pub fn new() -> Self {
        let (messages, inbox) = mpsc::channel(MESSAGES_MAX);
        let (reports, events) = mpsc::channel(MESSAGES_MAX);
        Self { desk: Desk { messages }, messages: inbox, reports, events }
    }

    pub fn desk(&self) -> Desk {
        self.desk.clone()
    }

    /// Where the hypervisor's events go.
    pub fn reports(&self) -> Reports {
        self.reports.clone()
    }
}

impl Default for Channels {
    fn default() -> Self {
        Self::new()
    }
}

pub struct Host<H> {
    deployment: Deployment,
    images: Store,
    memory: Memory,
    hypervisor: H,
    channels: Channels,
    block: Client,
    dataplane: Client,
    observed: watch::Sender<Observed>,
    capacity: (u32, u64),
    started: tokio::time::Instant,
    next_check: Duration,

    desired: Desired,
    instances: BTreeMap<InstanceId, Instance>,
    volumes: Volumes,
    network: Network,
    sockets: BTreeMap<VolumeId, Sockets>,
    strangers: BTreeSet<InstanceId>,
}

impl<H: Hypervisor> Host<H> {
    /// Takes up what the last agent remembered.
    pub fn new(
        deployment: Deployment,
        images: Store,
        memory: Memory,
        hypervisor: H,
        channels: Channels,
        observed: watch::Sender<Observed>,
    ) -> std::io::Result<Self> {
        let desired = memory.desired()?.unwrap_or_default();
        let instances =
            memory.records()?.into_iter().map(|(id, record)| (id, Instance::new(id, Some(record))));
        let mut host = Self {
            block: Client::new(deployment.socket_of("block-server")),
            dataplane: Client::new(deployment.socket_of("dataplane")),
            capacity: capacity(),
            started: tokio::time::Instant::now(),
            next_check: Duration::ZERO,
            desired: Desired::default(),
            instances: instances.collect(),
            volumes: Volumes::new(memory.volumes_made()?),
            network: Network::default(),
            sockets: BTreeMap::new(),
            strangers: BTreeSet::new(),
            deployment,
            images,
            memory,
            hypervisor,
            channels,
            observed,
        };
        host.wish(desired);
        Ok(host)
    }

    pub async fn run(mut self) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            tokio::select! {
                message = self.channels.messages.recv() => {
                    if let Some(message) = message {
                        self.hear(message);
                    }
                }
                event = self.channels.events.recv() => {
                    if let Some((id, event)) = event {
                        self.step(id, event);
                    }
                }
                _ = tick.tick() => self.pass_time(),
            }
            self.tell_observed();
        }
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    fn hear(&mut self, message: Message) {
        match message {
            Message::Desired(desired) => {
                if *desired != self.desired {
                    if let Err(error) = self.memory.keep_desired(&desired) {
                        tracing::error!(%error, "cannot remember what control wants");
                    }
                    self.wish(*desired);
                }
            }
            Message::Exported(id, volume, result) => {
                let result = result.map(|sockets| {
                    self.sockets.insert(volume, sockets);
                });
                self.step(id, Event::Exported(volume, result));
            }
            Message::Unexported(id, volume, result) => {
                self.step(id, Event::Unexported(volume, result))
            }
            Message::Exports(exports) => self.compare_exports(&exports),
            Message::Volume(id, outcome) => {
                let now = self.now();
                if let volume::Outcome::Ready(size) = outcome {
                    self.show_size(id, size);
                }
                if self.volumes.end(id, outcome, now)
                    && let Err(error) = self.memory.keep_volumes_made(self.volumes.made())
                {
                    tracing::error!(%error, "cannot remember which volumes were made");
                }
            }
            Message::Network(asked, result) => {
                let now = self.now();
                self.network.applied(*asked, result, now);
                self.tell_network();
            }
            Message::NetworkGeneration(generation) => self.network.found(generation),
            Message::ImagesChanged => {
                self.memory.images_changed();
                self.volumes.hurry();
            }
            Message::Status(answer) => {
                let _ = answer.send(self.status());
            }
        }
    }

    /// Has the guest that holds the volume see its size, if it does not yet. Told
    /// again whenever the volume is looked at, so nothing is lost with a message.
    fn show_size(&mut self, volume: VolumeId, size: u64) {
        let holder = self.instances.iter().find(|(_, i)| i.exports().any(|(v, _)| v == volume));
        if let Some((&id, _)) = holder {
            self.perform(id, Effect::ShowSize { volume, size });
        }
    }

    /// Takes a whole new wish and looks at everything again.
    fn wish(&mut self, desired: Desired) {
        self.desired = desired;
        self.network.wish(self.desired.network.clone());
        self.volumes.wish(&self.desired.volumes);
        self.tell_network();
        for wish in self.desired.instances.clone() {
            let id = wish.id;
            self.instances.entry(id).or_insert_with(|| Instance::new(id, None));
            self.step(id, Event::Network(self.network.serves(&wish)));
            self.step(id, Event::Wish(Box::new(wish)));
        }
        self.forget();
    }

    /// Drops instances that control wants to hear of no more. Only those that
    /// are over: a guest that runs and is missing in the wish is left as it is.
    fn forget(&mut self) {
        let wanted: BTreeSet<InstanceId> = self.desired.instances.iter().map(|i| i.id).collect();
        let missing: Vec<InstanceId> =
            self.instances.keys().copied().filter(|id| !wanted.contains(id)).collect();
        for id in missing {
            if self.instances.get(&id).is_some_and(|i| i.state() == InstanceState::Terminated) {
                match self.memory.forget(id) {
                    Ok(()) => drop(self.instances.remove(&id)),
                    Err(error) => tracing::error!(instance = %id, %error, "cannot forget"),
                }
            } else if self.strangers.insert(id) {
                tracing::warn!(instance = %id, "control does not know it; it is left as it is");
            }
        }
    }

    fn tell_network(&mut self) {
        let wishes = self.desired.instances.clone();
        for wish in wishes {
            if self.instances.contains_key(&wish.id) {
                self.step(wish.id, Event::Network(self.network.serves(&wish)));
            }
        }
    }

    fn pass_time(&mut self) {
        let now = self.now();
        for id in self.instances.keys().copied().collect::<Vec<_>>() {
            self.step(id, Event::Tick);
        }
        if let Some(network) = self.network.next(now) {
            self.apply_network(network);
        }
        let held: BTreeSet<VolumeId> = self
            .desired
            .volumes
            .iter()
            .map(|v| v.id)
            .filter(|v| self.instances.values().any(|i| i.holds(*v)))
            .collect();
        for task in self.volumes.next(&held, now) {
            self.do_volume(task);
        }
        if now >= self.next_check {
            self.next_check = now + CHECK_EVERY;
            self.check();
        }
    }

    fn step(&mut self, id: InstanceId, event: Event) {
        let now = self.now();
        let Some(instance) = self.instances.get_mut(&id) else {
            tracing::warn!(instance = %id, ?event, "no such instance");
            return;
        };
        let before = instance.state();
        if !matches!(event, Event::Tick | Event::Network(_) | Event::Wish(_)) {
            tracing::debug!(instance = %id, ?event);
        }
        let effects = instance.step(event, now);
        let after = instance.state();
        if before != after {
            tracing::info!(instance = %id, "{before} → {after}");
        }
        for effect in effects {
            self.perform(id, effect);
        }
    }

    fn perform(&mut self, id: InstanceId, effect: Effect) {
        tracing::debug!(instance = %id, ?effect);
        match effect {
            Effect::Remember(record) => {
                if let Err(error) = self.memory.keep(id, &record) {
                    tracing::error!(instance = %id, %error, "cannot remember its state");
                }
            }
            Effect::Export { volume, generation } => {
                let new = NewExport {
                    volume,
                    read_only: false,
                    generation,
                    owner_uid: Some(self.uid_of(id)),
                };
                let (block, desk) = (self.block.clone(), self.channels.desk());
                tokio::spawn(async move {
                    let result = block.put_export(&volume.to_string(), &new).await;
                    let sockets = |e: Export| Sockets { nbd: e.socket, vhost_user: e.vhost_user };
                    let result = result.map(sockets).map_err(|e| e.message);
                    desk.tell(Message::Exported(id, volume, result)).await;
                });
            }
            Effect::Unexport { volume } => {
                self.sockets.remove(&volume);
                let (block, desk) = (self.block.clone(), self.channels.desk());
                tokio::spawn(async move {
                    let result = block.delete_export(&volume.to_string()).await;
                    desk.tell(Message::Unexported(id, volume, result.map_err(|e| e.message))).await;
                });
            }
            effect => {
                let context = Context { uid: self.uid_of(id), sockets: self.sockets_of(id) };
                self.hypervisor.perform(id, effect, context);
            }
        }
    }

    /// The owner of the instance's first tap, so that both daemons agree on it.
    fn uid_of(&self, id: InstanceId) -> u32 {
        let wish = self.desired.instances.iter().find(|i| i.id == id);
        let first = wish.and_then(|w| w.interfaces.first());
        let interface =
            first.and_then(|f| self.desired.network.interfaces.iter().find(|i| i.id == f.id));
        match interface.map(|i| &i.device) {
            Some(dataplane::Device::Tap { owner_uid, .. }) => *owner_uid,
            _ => {
                let digits = id.digits();
                let low = u32::from_str_radix(&digits[digits.len() - 8..], 16).unwrap_or_default();
                UID_WITHOUT_TAP + (low & UID_WITHOUT_TAP_MASK)
            }
        }
    }

    /// Where each of its volumes is served. An export that an earlier agent made
    /// is where the block server always puts it.
    fn sockets_of(&self, id: InstanceId) -> BTreeMap<VolumeId, Sockets> {
        let Some(instance) = self.instances.get(&id) else { return BTreeMap::new() };
        instance
            .exports()
            .map(|(volume, _)| {
                let place =
                    |front| self.deployment.run_dir().join(front).join(format!("{volume}.sock"));
                let usual = || Sockets { nbd: place("nbd"), vhost_user: Some(place("vhost")) };
                (volume, self.sockets.get(&volume).cloned().unwrap_or_else(usual))
            })
            .collect()
    }

    /// A block server that came back without its exports gets them again.
    fn compare_exports(&mut self, found: &[Export]) {
        let mut lost = Vec::new();
        for (id, instance) in &self.instances {
            for (volume, generation) in instance.exports() {
                let name = volume.to_string();
                if !found.iter().any(|e| e.name == name && e.generation >= generation) {
                    lost.push((*id, volume));
                }
            }
        }
        for (id, volume) in lost {
            tracing::warn!(instance = %id, %volume, "its export is gone; making it again");
            self.step(id, Event::ExportLost(volume));
        }
    }

    fn check(&self) {
        let (block, dataplane, desk) =
            (self.block.clone(), self.dataplane.clone(), self.channels.desk());
        tokio::spawn(async move {
            if let Ok(exports) = block.exports().await {
                desk.tell(Message::Exports(exports)).await;
            }
            if let Ok(status) = dataplane.dataplane_status().await {
                desk.tell(Message::NetworkGeneration(status.generation)).await;
            }
        });
    }

    fn apply_network(&self, network: dataplane::Desired) {
        let (dataplane, desk) = (self.dataplane.clone(), self.channels.desk());
        tokio::spawn(async move {
            let result = dataplane.dataplane_apply(&network).await;
            let result = result.map(|a| a.generation).map_err(|e| e.message);
            desk.tell(Message::Network(Box::new(network), result)).await;
        });
    }

    fn do_volume(&self, task: volume::Task) {
        let (block, desk, images) = (self.block.clone(), self.channels.desk(), self.images.clone());
        tokio::spawn(async move {
            let id = task.id();
            let outcome = volume::perform(task, &block, &images).await;
            desk.tell(Message::Volume(id, outcome)).await;
        });
    }

    fn tell_observed(&self) {
        let observed = self.observed();
        self.observed.send_if_modified(|last| {
            let changed = *last != observed;
            *last = observed;
            changed
        });
    }

    fn observed(&self) -> Observed {
        let known: BTreeSet<InstanceId> = self.desired.instances.iter().map(|i| i.id).collect();
        let instances = self.instances.iter();
        Observed {
            revision: self.desired.revision,
            accelerator: self.hypervisor.accelerator().accelerator.name().to_owned(),
            vcpus: self.capacity.0,
            memory_mib: self.capacity.1,
            instances: instances
                .filter(|(id, i)| known.contains(id) || i.state() != InstanceState::Terminated)
                .map(|(_, i)| i.observed())
                .collect(),
            volumes: self.volumes.observed(),
            images: self.memory.images(&self.images),
            network_generation: self.network.generation(),
        }
    }

    fn status(&self) -> Status {
        let choice = self.hypervisor.accelerator();
        let instances = self.instances.iter().map(|(id, instance)| {
            let process = self.hypervisor.process(*id);
            InstanceStatus {
                id: *id,
                state: instance.state(),
                pid: process.map(|p| p.0),
                adopted: process.is_some_and(|p| p.1),
            }
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            accelerator: choice.accelerator.name().to_owned(),
            accelerator_reason: choice.reason.clone(),
            instances: instances.collect(),
        }
    }
}

/// vCPUs and memory of this host, in MiB.
fn capacity() -> (u32, u64) {
    let vcpus = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let total = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"));
    let kib: u64 =
        total.and_then(|t| t.trim().trim_end_matches(" kB").parse().ok()).unwrap_or_default();
    (vcpus, kib / 1024)
}
