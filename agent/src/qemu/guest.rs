//! The task of one guest: from the launch, or from finding it again, to its end.
//!
//! Commands are carried out side by side, each by a QMP call of its own, so that
//! one that hangs holds up no other; `Kill` goes through the pidfd and needs no
//! QMP at all. A lost connection is made anew while the process lives: silence
//! never means death.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model::{InstanceId, VolumeId};
use rpc::{Deployment, host};
use serde_json::{Value, json};
use tokio::io::unix::AsyncFd;
use tokio::sync::mpsc;

use super::arguments::{self, Accelerator, Disk, Guest, Kernel};
use super::cgroup::{Cgroups, Limits};
use super::confine::{EXIT_LOCKED, FileKind, OpenFile, Plan};
use super::front::Fronts;
use super::plug::{self, plain};
use super::process::{Identity, Process};
use super::qmp::{self, Qmp};
use super::{Context, PROGRAM, Places, Reports, UID_MIN, console};
use crate::image::Store;
use crate::lifecycle::{Effect, Event, GuestRun, MachineEvent, Seen, Sight, StartDisk, slots};

/// How often a QEMU that does not answer is tried again.
const CONNECT_AGAIN: Duration = Duration::from_millis(100);
/// How often the logs are looked at for their size.
const TRIM_EVERY: Duration = Duration::from_secs(5);
const NOT_CONNECTED: &str = "QEMU is not connected";
const COMMANDS_MAX: usize = 256;
/// What is quoted of QEMU's own words when it fails.
const LOG_QUOTE_BYTES: usize = 600;

#[derive(Debug, Clone)]
pub struct Shared {
    pub deployment: Deployment,
    pub images: Store,
    pub launcher: PathBuf,
    pub cgroups: Cgroups,
    pub accelerator: Accelerator,
    pub fronts: Fronts,
    pub kvm_group: Option<u32>,
    pub reports: Reports,
}

#[derive(Debug)]
pub struct Handle {
    commands: mpsc::Sender<(Effect, Context)>,
    process: Arc<Mutex<Option<(u32, bool)>>>,
}

impl Handle {
    pub fn send(&self, effect: Effect, context: Context) {
        if self.commands.try_send((effect, context)).is_err() {
            tracing::error!(
                "a guest's task is gone or overrun; the command is lost and will be repeated"
            );
        }
    }

    pub fn process(&self) -> Option<(u32, bool)> {
        self.process.lock().map_or(None, |p| *p)
    }
}

pub fn spawn(shared: Shared, id: InstanceId, epoch: u64) -> Handle {
    let (commands, inbox) = mpsc::channel(COMMANDS_MAX);
    let process = Arc::new(Mutex::new(None));
    let places = Places::of(&shared.deployment, id);
    let task = Task { shared, id, epoch, places, shown: process.clone(), alive: None, qmp: None };
    tokio::spawn(task.run(inbox));
    Handle { commands, process }
}

struct Task {
    shared: Shared,
    id: InstanceId,
    epoch: u64,
    places: Places,
    shown: Arc<Mutex<Option<(u32, bool)>>>,
    alive: Option<Alive>,
    qmp: Option<(Qmp, mpsc::Receiver<qmp::Event>)>,
}

struct Alive {
    process: Process,
    ended: AsyncFd<OwnedFd>,
}

impl Task {
    async fn run(mut self, mut inbox: mpsc::Receiver<(Effect, Context)>) {
        let mut connect = tokio::time::interval(CONNECT_AGAIN);
        connect.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut trim = tokio::time::interval(TRIM_EVERY);
        loop {
            tokio::select! {
                command = inbox.recv() => match command {
                    Some((effect, context)) => self.perform(effect, context).await,
                    // The next epoch has a task of its own.
                    None => return,
                },
                () = ended(self.alive.as_ref()) => self.end().await,
                event = next_event(&mut self.qmp) => match event {
                    Some(event) => self.hear(event).await,
                    None => self.qmp = None,
                },
                _ = connect.tick(), if self.alive.is_some() && self.qmp.is_none() => self.connect().await,
                _ = trim.tick(), if self.alive.is_some() => {
                    for log in [self.places.console(), self.places.log()] {
                        if let Err(error) = console::trim(&log) {
                            tracing::warn!(log = %log.display(), %error, "cannot trim");
                        }
                    }
                }
            }
        }
    }

    async fn report(&self, event: MachineEvent) {
        report(&self.shared.reports, self.id, self.epoch, event).await;
    }

    async fn perform(&mut self, effect: Effect, context: Context) {
        match effect {
            Effect::Adopt { .. } => self.adopt().await,
            Effect::Start { wish, disks, .. } => {
                if let Err(reason) = self.start(&wish, &disks, &context).await {
                    self.report(MachineEvent::StartFailed(reason)).await;
                }
            }
            Effect::Kill => match &self.alive {
                Some(alive) => {
                    if let Err(error) = alive.process.kill() {
                        tracing::error!(instance = %self.id, %error, "cannot kill QEMU");
                    }
                }
                None => self.report(MachineEvent::Exited).await,
            },
            Effect::CleanUp => {
                let result = self.clean_up().map_err(|e| format!("clean up: {e}"));
                self.report(MachineEvent::CleanedUp(result)).await;
            }
            _ => {
                let qmp = self.qmp.as_ref().map(|(qmp, _)| qmp.clone());
                let (reports, id, epoch) = (self.shared.reports.clone(), self.id, self.epoch);
                let fronts = self.shared.fronts;
                tokio::spawn(async move {
                    for event in converse(qmp, effect, &context, fronts).await {
                        report(&reports, id, epoch, event).await;
                    }
                });
            }
        }
    }

    async fn adopt(&mut self) {
        let found = Identity::read(&self.places.pid_file()).and_then(|identity| match identity {
            Some(identity) if identity.uuid == arguments::uuid(self.id) => identity.open(),
            _ => Ok(None),
        });
        match found {
            Ok(Some(process)) => {
                if let Err(error) = self.hold(process, true) {
                    self.report(MachineEvent::Unclear(format!("watch its QEMU: {error}"))).await;
                }
            }
            Ok(None) => self.report(MachineEvent::Absent).await,
            Err(error) => {
                let reason = format!("look for its QEMU: {}: {error}", self.places.run.display());
                self.report(MachineEvent::Unclear(reason)).await;
            }
        }
    }

    fn hold(&mut self, process: Process, adopted: bool) -> std::io::Result<()> {
        #[expect(deprecated, reason = "an OwnedFd stays the descriptor that was registered")]
        let ended = AsyncFd::with_interest(process.pidfd()?, tokio::io::Interest::READABLE)?;
        if let Ok(mut shown) = self.shown.lock() {
            *shown = Some((process.pid(), adopted));
        }
        self.alive = Some(Alive { process, ended });
        Ok(())
    }

    async fn end(&mut self) {
        self.alive = None;
        self.qmp = None;
        if let Ok(mut shown) = self.shown.lock() {
            *shown = None;
        }
        self.report(MachineEvent::Exited).await;
    }

    async fn start(
        &mut self,
        wish: &host::Instance,
        disks: &[StartDisk],
        context: &Context,
    ) -> Result<(), String> {
        let plan = self.plan(wish, disks, context)?;
        let said = |deed: &str, e: std::io::Error| format!("{deed}: {e}");
        for folder in [&self.places.run, &self.places.state] {
            private_folder(folder).map_err(|e| said(&format!("create {}", folder.display()), e))?;
        }
        let text = serde_json::to_vec_pretty(&plan).map_err(|e| e.to_string())?;
        std::fs::write(self.places.plan(), text).map_err(|e| said("write the plan", e))?;
        let log = console::append(&self.places.log()).map_err(|e| said("open the log", e))?;
        let log_again = log.try_clone().map_err(|e| said("open the log", e))?;
        let mut child = tokio::process::Command::new(&self.shared.launcher)
            .arg("confine")
            .arg(self.places.plan())
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log_again)
            .spawn()
            .map_err(|e| said(&format!("run {}", self.shared.launcher.display()), e))?;
        let identity = child.id().map(|pid| Identity::of(pid, &plan.uuid));
        let process = identity.and_then(Result::ok).and_then(|i| i.open().ok().flatten());
        match process {
            Some(process) => {
                self.hold(process, false).map_err(|e| said("watch QEMU", e))?;
                // Reaps it, and says why a launch failed.
                tokio::spawn(say_why(child, self.places.log(), self.id));
                Ok(())
            }
            None => {
                let status = child.wait().await.map_err(|e| said("wait for QEMU", e))?;
                Err(format!("{status}: {}", quote(&self.places.log())))
            }
        }
    }

    fn plan(
        &self,
        wish: &host::Instance,
        disks: &[StartDisk],
        context: &Context,
    ) -> Result<Plan, String> {
        if context.uid < UID_MIN {
            return Err(format!(
                "user {} is not an instance's: those begin at {UID_MIN}",
                context.uid
            ));
        }
        let manifest = self.shared.images.manifest(&wish.image).map_err(|e| e.to_string())?;
        let place =
            |result: Result<PathBuf, crate::image::Error>| result.map_err(|e| e.to_string());
        let kernel = match manifest.command_line {
            Some(command_line) => Some(Kernel {
                image: place(self.shared.images.kernel_of(&wish.image))?,
                initrd: place(self.shared.images.initrd_of(&wish.image))?,
                command_line,
            }),
            None => None,
        };
        let fronts = self.shared.fronts;
        let disks = disks.iter().map(|d| {
            let sockets = context.sockets.get(&d.volume);
            let sockets = sockets.ok_or_else(|| format!("volume {} has no export", d.volume))?;
            let front = fronts.at_start(d.volume, sockets)?;
            Ok(Disk { volume: d.volume, front, slot: d.slot, boot: d.boot })
        });
        let guest = Guest {
            id: self.id,
            accelerator: self.shared.accelerator,
            vcpus: wish.vcpus,
            memory_mib: wish.memory_mib,
            interfaces: wish.interfaces.iter().map(|i| (i.device.clone(), i.mac)).collect(),
            disks: disks.collect::<Result<_, String>>()?,
            slots: slots(wish),
            shares_memory: fronts.share_memory(),
            abilities: fronts.abilities,
            kernel,
        };
        let limits = Limits { vcpus: wish.vcpus, memory_mib: wish.memory_mib };
        Ok(Plan {
            uuid: arguments::uuid(self.id),
            lock: self.places.lock(),
            pid_file: self.places.pid_file(),
            uid: context.uid,
            groups: self.shared.kvm_group.into_iter().collect(),
            cgroups: self.shared.cgroups.make(&self.id.to_string(), limits),
            files: open_files(&self.places, &guest),
            program: find_program()?,
            arguments: arguments::command_line(&guest),
        })
    }

    async fn connect(&mut self) {
        let Ok((qmp, events)) = Qmp::connect(&self.places.qmp()).await else { return };
        match look(&qmp).await {
            Ok(seen) => {
                self.qmp = Some((qmp, events));
                self.report(MachineEvent::Seen(seen)).await;
            }
            Err(error) => {
                tracing::warn!(instance = %self.id, %error, "QEMU does not say what it holds")
            }
        }
    }

    async fn hear(&mut self, event: qmp::Event) {
        let device = || event.data.get("device").and_then(Value::as_str);
        match event.name.as_str() {
            "SHUTDOWN" if event.data.get("guest") == Some(&json!(true)) => {
                self.report(MachineEvent::GuestOff).await;
            }
            "DEVICE_DELETED" => {
                if let Some(volume) = device().and_then(arguments::volume_of) {
                    self.report(MachineEvent::DeviceGone(volume)).await;
                }
            }
            "DEVICE_UNPLUG_GUEST_ERROR" => {
                if let Some(volume) = device().and_then(arguments::volume_of) {
                    let refusal = Err("the guest refuses to release it".to_owned());
                    self.report(MachineEvent::ReleaseAsked(volume, refusal)).await;
                }
            }
            _ => {}
        }
    }

    fn clean_up(&self) -> std::io::Result<()> {
        self.shared.cgroups.remove(&self.id.to_string())?;
        match std::fs::remove_dir_all(&self.places.run) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

async fn report(reports: &Reports, id: InstanceId, epoch: u64, event: MachineEvent) {
    // Nobody listens when the agent is ending.
    let _ = reports.send((id, Event::Machine { epoch, event })).await;
}

async fn ended(alive: Option<&Alive>) {
    match alive {
        Some(alive) => {
            let _ = alive.ended.readable().await;
        }
        None => std::future::pending().await,
    }
}

async fn next_event(qmp: &mut Option<(Qmp, mpsc::Receiver<qmp::Event>)>) -> Option<qmp::Event> {
    match qmp {
        Some((_, events)) => events.recv().await,
        None => std::future::pending().await,
    }
}

/// Does one thing with QEMU and gives what came of it.
async fn converse(
    qmp: Option<Qmp>,
    effect: Effect,
    context: &Context,
    fronts: Fronts,
) -> Vec<MachineEvent> {
    let execute = async |command: &str, arguments: Value| match &qmp {
        Some(qmp) => qmp.execute(command, arguments).await,
        None => {
            Err(qmp::Error::Unavailable { command: command.into(), cause: NOT_CONNECTED.into() })
        }
    };
    match effect {
        Effect::PowerDown => {
            let _ = execute("system_powerdown", json!({})).await;
            Vec::new()
        }
        Effect::Quit => {
            let _ = execute("quit", json!({})).await;
            Vec::new()
        }
        Effect::Reset => {
            let reset = async {
                execute("system_reset", json!({})).await?;
                // The reset happens in QEMU's main loop, soon after the answer;
                // until then `cont` is refused when the guest was off.
                let mut last = execute("cont", json!({})).await;
                for _ in 0..20 {
                    if last.is_ok() {
                        break;
                    }
                    tokio::time::sleep(Duration::from_millis(50)).await;
                    last = execute("cont", json!({})).await;
                }
                last
            };
            vec![MachineEvent::ResetDone(plain(reset.await))]
        }
        Effect::AddNode { volume } => {
            let added = match &qmp {
                Some(qmp) => plug::open(qmp, volume, context, fronts).await,
                None => Err(NOT_CONNECTED.to_owned()),
            };
            vec![MachineEvent::NodeAdded(volume, added)]
        }
        Effect::AddDevice { volume, slot, boot } => {
            let added = match &qmp {
                Some(qmp) => plug::add(qmp, (volume, slot, boot), context, fronts).await,
                None => Err(NOT_CONNECTED.to_owned()),
            };
            vec![MachineEvent::DeviceAdded(volume, added)]
        }
        Effect::DeleteDevice { volume } => {
            let name = arguments::device_id(volume);
            match execute("device_del", json!({ "id": name })).await {
                Err(qmp::Error::Refused { class, .. }) if class == "DeviceNotFound" => {
                    vec![MachineEvent::DeviceGone(volume)]
                }
                result => vec![MachineEvent::ReleaseAsked(volume, plain(result))],
            }
        }
        Effect::DeleteNode { volume } => {
            let closed = match &qmp {
                Some(qmp) => plug::close(qmp, volume).await,
                None => Err(NOT_CONNECTED.to_owned()),
            };
            vec![MachineEvent::NodeDeleted(volume, closed)]
        }
        Effect::ShowSize { volume, size } => {
            if let Some(qmp) = &qmp
                && let Err(error) = plug::show_size(qmp, volume, size).await
            {
                tracing::warn!(%volume, size, %error, "the guest does not see the size yet");
            }
            Vec::new()
        }
        other => {
            tracing::error!(effect = ?other, "not QEMU's to do");
            Vec::new()
        }
    }
}

/// What QEMU holds: the guest's state, the disks plugged in, the nodes open.
async fn look(qmp: &Qmp) -> Result<Seen, qmp::Error> {
    let status = qmp.execute("query-status", json!({})).await?;
    let run = match status.get("status").and_then(Value::as_str) {
        Some("running") => GuestRun::Running,
        Some("shutdown") => GuestRun::Off,
        _ => GuestRun::Paused,
    };
    let nodes = qmp.execute("query-named-block-nodes", json!({ "flat": true })).await?;
    let names = nodes.as_array().into_iter().flatten();
    let mut nodes: BTreeSet<VolumeId> =
        names.filter_map(|n| arguments::volume_of(n.get("node-name")?.as_str()?)).collect();
    nodes.extend(plug::channels(qmp).await?);
    let mut devices = BTreeMap::new();
    let children = qmp.execute("qom-list", json!({ "path": "/machine/peripheral" })).await?;
    for child in children.as_array().into_iter().flatten() {
        let Some(name) = child.get("name").and_then(Value::as_str) else { continue };
        let Some(volume) = arguments::volume_of(name) else { continue };
        let path = format!("/machine/peripheral/{name}");
        let bus = qmp.execute("qom-get", json!({ "path": path, "property": "parent_bus" })).await?;
        if let Some(slot) = bus.as_str().and_then(arguments::slot_of) {
            devices.insert(volume, Sight { slot });
        }
    }
    Ok(Seen { run, devices, nodes })
}

fn open_files(places: &Places, guest: &Guest) -> Vec<OpenFile> {
    let mut files = vec![
        OpenFile { name: "console".into(), kind: FileKind::Append(places.console()) },
        OpenFile { name: "qmp".into(), kind: FileKind::Listen(places.qmp()) },
        OpenFile { name: "serial".into(), kind: FileKind::Listen(places.serial()) },
    ];
    if guest.shares_memory {
        let memory = FileKind::Memory(guest.memory_mib << 20);
        files.push(OpenFile { name: "memory".into(), kind: memory });
    }
    if let Some(kernel) = &guest.kernel {
        files.push(OpenFile { name: "kernel".into(), kind: FileKind::Read(kernel.image.clone()) });
        files.push(OpenFile { name: "initrd".into(), kind: FileKind::Read(kernel.initrd.clone()) });
    }
    for (i, (device, _)) in guest.interfaces.iter().enumerate() {
        files.push(OpenFile { name: format!("tap{i}"), kind: FileKind::Tap(device.clone()) });
    }
    files
}

fn private_folder(path: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

fn find_program() -> Result<PathBuf, String> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|folder| folder.join(PROGRAM))
        .find(|file| file.is_file())
        .ok_or_else(|| format!("{PROGRAM} is not installed (apt install qemu-system-x86)"))
}

async fn say_why(mut child: tokio::process::Child, log: PathBuf, id: InstanceId) {
    match child.wait().await {
        Ok(status) if status.success() => {}
        Ok(status) if status.code() == Some(i32::from(EXIT_LOCKED)) => {
            tracing::warn!(instance = %id, "another QEMU holds the instance; looking for it");
        }
        Ok(status) => tracing::warn!(instance = %id, %status, said = quote(&log), "QEMU ended"),
        Err(error) => tracing::warn!(instance = %id, %error, "cannot wait for QEMU"),
    }
}

fn quote(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let tail = &bytes[bytes.len().saturating_sub(LOG_QUOTE_BYTES)..];
    String::from_utf8_lossy(tail).trim().replace('\n', "; ")
}
