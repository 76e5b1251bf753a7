//! The state of one instance and its moves.

use std::collections::BTreeMap;
use std::time::Duration;

use model::{AttachmentState, InstanceId, InstanceState, VolumeId};
use rpc::host::{self, ObservedAttachment, ObservedInstance, Run};
use serde::{Deserialize, Serialize};

use super::{
    Disk, DiskOp, EXPORT_TRIES_AWAITED, Effect, Event, FAILURES_FORGOTTEN, FAILURES_MAX, GuestRun,
    KILL_AGAIN, MachineEvent, PRESS_AGAIN, QUIT_PATIENCE, REBOOT_PATIENCE, START_PATIENCE,
    STOP_PATIENCE, Seen, StartDisk, TERMINATE_PATIENCE, backoff,
};
use crate::qemu::SLOTS_MAX;

/// What must survive the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub state: InstanceState,
    /// The last start and reboot that were taken up.
    pub starts: u64,
    pub reboots: u64,
    /// Why it is not what was asked for, for people.
    pub reason: Option<String>,
    /// Generation of each attachment whose volume may be exported.
    pub generations: BTreeMap<VolumeId, u64>,
    /// Starts that failed, or guests that died, one after the other.
    pub failures: u32,
}

impl Default for Record {
    fn default() -> Self {
        Self {
            state: InstanceState::Pending,
            starts: 0,
            reboots: 0,
            reason: None,
            generations: BTreeMap::new(),
            failures: 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Machine {
    /// An earlier agent may have left a QEMU.
    Unknown {
        asked: bool,
        again_at: Duration,
    },
    Off {
        start_at: Duration,
    },
    Starting {
        until: Duration,
    },
    Up {
        since: Duration,
    },
    Rebooting {
        press_at: Duration,
        until: Duration,
    },
    Resetting {
        asked: bool,
        again_at: Duration,
    },
    PoweringDown {
        press_at: Duration,
        until: Duration,
    },
    Quitting {
        until: Duration,
    },
    Killing {
        again_at: Duration,
    },
    CleaningUp {
        asked: bool,
        tries: u32,
        again_at: Duration,
    },
}

impl Machine {
    /// Whether a QEMU of this instance may be alive.
    pub const fn may_live(&self) -> bool {
        !matches!(self, Self::Off { .. } | Self::CleaningUp { .. })
    }

    const fn is_up(&self) -> bool {
        matches!(self, Self::Up { .. })
    }

    #[cfg(test)]
    pub const fn name(&self) -> &'static str {
        match self {
            Self::Unknown { .. } => "unknown",
            Self::Off { .. } => "off",
            Self::Starting { .. } => "starting",
            Self::Up { .. } => "up",
            Self::Rebooting { .. } => "rebooting",
            Self::Resetting { .. } => "resetting",
            Self::PoweringDown { .. } => "powering-down",
            Self::Quitting { .. } => "quitting",
            Self::Killing { .. } => "killing",
            Self::CleaningUp { .. } => "cleaning-up",
        }
    }
}

/// What the wish and the history together ask for now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    Run,
    Stop,
    Gone,
}

#[derive(Debug, Clone)]
pub struct Instance {
    id: InstanceId,
    record: Record,
    remembered: Record,
    wish: Option<Box<host::Instance>>,
    network: Result<(), String>,
    machine: Machine,
    epoch: u64,
    disks: BTreeMap<VolumeId, Disk>,
}

impl Instance {
    /// One that is new here (`None`), or as it was remembered.
    pub fn new(id: InstanceId, record: Option<Record>) -> Self {
        let record = record.unwrap_or_default();
        let disks = record.generations.iter();
        let disks = disks.map(|(volume, generation)| {
            // It may be exported still; if it is not wanted, that is undone.
            let mut disk = Disk::new(*generation, false);
            disk.export = true;
            (*volume, disk)
        });
        Self {
            id,
            disks: disks.collect(),
            remembered: record.clone(),
            record,
            wish: None,
            network: Err("they were not asked for yet".into()),
            machine: Machine::Unknown { asked: false, again_at: Duration::ZERO },
            epoch: 0,
        }
    }

    pub const fn id(&self) -> InstanceId {
        self.id
    }

    pub const fn state(&self) -> InstanceState {
        self.record.state
    }

    pub const fn machine(&self) -> &Machine {
        &self.machine
    }

    pub fn wish(&self) -> Option<&host::Instance> {
        self.wish.as_deref()
    }

    /// The volumes that are exported for it, or may be, with their generations.
    pub fn exports(&self) -> impl Iterator<Item = (VolumeId, u64)> {
        self.disks.iter().filter(|(_, d)| d.export).map(|(volume, d)| (*volume, d.generation))
    }

    /// Whether any step towards or from `volume` is not undone yet.
    pub fn holds(&self, volume: VolumeId) -> bool {
        self.disks.contains_key(&volume)
    }

    pub fn step(&mut self, event: Event, now: Duration) -> Vec<Effect> {
        self.absorb(event, now);
        let mut effects = Vec::new();
        self.advance(now, &mut effects);
        self.advance_disks(now, &mut effects);
        self.settle();
        if self.record != self.remembered {
            self.remembered = self.record.clone();
            effects.insert(0, Effect::Remember(self.record.clone()));
        }
        effects
    }

    fn absorb(&mut self, event: Event, now: Duration) {
        match event {
            Event::Wish(wish) => self.wish = Some(wish),
            Event::Network(network) => self.network = network,
            Event::Exported(volume, result) => self.disk_ended(volume, DiskOp::Export, result, now),
            Event::Unexported(volume, result) => {
                self.disk_ended(volume, DiskOp::Unexport, result, now);
            }
            Event::ExportLost(volume) => {
                if let Some(disk) = self.disks.get_mut(&volume) {
                    disk.export = false;
                }
            }
            Event::Machine { epoch, event } if epoch == self.epoch => {
                self.absorb_machine(event, now)
            }
            Event::Machine { .. } | Event::Tick => {}
        }
    }

    fn absorb_machine(&mut self, event: MachineEvent, now: Duration) {
        match event {
            MachineEvent::Seen(seen) => self.seen(&seen, now),
            MachineEvent::Absent => self.absent(now),
            MachineEvent::Unclear(reason) => {
                self.record.reason = Some(reason);
                if let Machine::Unknown { .. } = self.machine {
                    self.machine = Machine::Unknown { asked: false, again_at: now + backoff(4) };
                }
            }
            MachineEvent::StartFailed(reason) => {
                if let Machine::Starting { .. } | Machine::Killing { .. } = self.machine {
                    self.failed(format!("Server.InternalError: cannot start: {reason}"));
                    // Whatever stood in its way may be a QEMU of ours: look.
                    self.machine = Machine::Unknown { asked: false, again_at: now };
                    self.disks.values_mut().for_each(Disk::machine_ended);
                }
            }
            MachineEvent::Exited => self.exited(now),
            MachineEvent::GuestOff => self.guest_off(now),
            MachineEvent::ResetDone(result) => self.reset_done(result, now),
            MachineEvent::NodeAdded(v, result) => self.disk_ended(v, DiskOp::AddNode, result, now),
            MachineEvent::DeviceAdded(v, result) => {
                self.disk_ended(v, DiskOp::AddDevice, result, now);
            }
            MachineEvent::ReleaseAsked(v, result) => {
                self.disk_ended(v, DiskOp::Release, result, now);
            }
            MachineEvent::DeviceGone(volume) => {
                if let Some(disk) = self.disks.get_mut(&volume) {
                    disk.released();
                }
            }
            MachineEvent::NodeDeleted(v, result) => {
                self.disk_ended(v, DiskOp::DeleteNode, result, now);
            }
            MachineEvent::CleanedUp(result) => self.cleaned_up(result, now),
        }
    }

    fn disk_ended(
        &mut self,
        volume: VolumeId,
        op: DiskOp,
        result: Result<(), String>,
        now: Duration,
    ) {
        if let Some(disk) = self.disks.get_mut(&volume) {
            disk.end(op, result, now);
        }
    }

    /// QEMU says what it holds; this is believed over what we thought.
    fn seen(&mut self, seen: &Seen, now: Duration) {
        if !self.machine.may_live() {
            return;
        }
        if let Machine::Unknown { .. } | Machine::Starting { .. } = self.machine {
            self.machine = Machine::Up { since: now };
            // It was marked lost before it was found again.
            self.record.reason = None;
        }
        for volume in seen.devices.keys().chain(&seen.nodes) {
            let generation = self.record.generations.get(volume).copied().unwrap_or(0);
            let disk = self.disks.entry(*volume).or_insert_with(|| Disk::new(generation, false));
            // Seen in the guest, so it was exported; exporting again is harmless.
            disk.export = true;
        }
        for (volume, disk) in &mut self.disks {
            if disk.op.is_some_and(DiskOp::is_machines) {
                disk.op = None;
            }
            disk.device = seen.devices.contains_key(volume);
            disk.node = disk.device || seen.nodes.contains(volume);
            disk.slot = seen.devices.get(volume).map(|s| s.slot);
        }
        match seen.run {
            GuestRun::Running => {}
            GuestRun::Off => self.guest_off(now),
            GuestRun::Paused => {
                self.machine = Machine::Resetting { asked: false, again_at: now };
            }
        }
    }

    fn absent(&mut self, now: Duration) {
        if let Machine::Unknown { .. } = self.machine {
            if self.record.state == InstanceState::Running {
                self.failed("Server.InternalError: its QEMU ended while the agent was away".into());
            }
            self.disks.values_mut().for_each(Disk::machine_ended);
            // What an earlier QEMU left behind goes first.
            self.machine = Machine::CleaningUp { asked: false, tries: 0, again_at: now };
        }
    }

    fn exited(&mut self, now: Duration) {
        if !self.machine.may_live() {
            return;
        }
        match self.machine {
            Machine::Starting { .. } => {
                self.failed("Server.InternalError: QEMU ended as it started".into());
            }
            Machine::Up { since } => {
                if now.saturating_sub(since) >= FAILURES_FORGOTTEN {
                    self.record.failures = 0;
                }
                self.failed("Server.InternalError: QEMU ended unexpectedly".into());
            }
            _ => {}
        }
        self.disks.values_mut().for_each(Disk::machine_ended);
        self.machine = Machine::CleaningUp { asked: false, tries: 0, again_at: now };
    }

    fn failed(&mut self, reason: String) {
        self.record.failures += 1;
        self.record.reason = Some(reason);
    }

    fn guest_off(&mut self, now: Duration) {
        match self.machine {
            Machine::Rebooting { .. } => {
                self.machine = Machine::Resetting { asked: false, again_at: now };
            }
            Machine::Up { .. } if self.target() == Target::Run && self.reboot_wanted() => {
                self.machine = Machine::Resetting { asked: false, again_at: now };
            }
            Machine::Up { .. } | Machine::PoweringDown { .. } | Machine::Starting { .. } => {
                if matches!(self.record.state, InstanceState::Pending | InstanceState::Running) {
                    self.record.reason = Some(
                        "Client.InstanceInitiatedShutdown: the guest powered itself off".into(),
                    );
                    self.become_state(InstanceState::Stopping);
                }
                self.machine = Machine::Quitting { until: Duration::ZERO };
            }
            _ => {}
        }
    }

    fn reset_done(&mut self, result: Result<(), String>, now: Duration) {
        if let Machine::Resetting { asked: true, .. } = self.machine {
            match result {
                Ok(()) => {
                    if let Some(wish) = &self.wish {
                        self.record.reboots = self.record.reboots.max(wish.reboots);
                    }
                    self.machine = Machine::Up { since: now };
                }
                Err(_) => {
                    self.machine = Machine::Resetting { asked: false, again_at: now + backoff(3) }
                }
            }
        }
    }

    fn cleaned_up(&mut self, result: Result<(), String>, now: Duration) {
        if let Machine::CleaningUp { asked: true, tries, .. } = self.machine {
            self.machine = match result {
                Ok(()) => {
                    let pause = if self.record.failures == 0 {
                        Duration::ZERO
                    } else {
                        backoff(self.record.failures)
                    };
                    Machine::Off { start_at: now + pause }
                }
                Err(reason) => {
                    self.record.reason = Some(reason);
                    Machine::CleaningUp {
                        asked: false,
                        tries: tries + 1,
                        again_at: now + backoff(tries + 1),
                    }
                }
            };
        }
    }

    fn target(&self) -> Target {
        use InstanceState::{Pending, Running, ShuttingDown, Stopped, Stopping, Terminated};
        let Some(wish) = &self.wish else { return Target::Stop };
        match (wish.run, self.record.state) {
            (Run::Terminated, _) | (_, ShuttingDown | Terminated) => Target::Gone,
            (Run::Stopped, _) | (Run::Running, Stopping) => Target::Stop,
            (Run::Running, Pending | Running) if self.record.failures >= FAILURES_MAX => {
                Target::Stop
            }
            (Run::Running, Pending | Running) => Target::Run,
            (Run::Running, Stopped) if wish.starts > self.record.starts => Target::Run,
            (Run::Running, Stopped) => Target::Stop,
        }
    }

    fn reboot_wanted(&self) -> bool {
        self.wish.as_ref().is_some_and(|w| w.reboots > self.record.reboots)
    }

    /// Level-triggered: looks at what is and what should be, and takes the next step.
    fn advance(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        // Without a wish nothing is done to a guest: it runs on as it is.
        let Some(wish) = self.wish.clone() else { return };
        let target = self.target();
        self.name_state(target, &wish);
        match self.machine {
            Machine::Unknown { asked: false, again_at } if now >= again_at => {
                self.epoch += 1;
                self.machine = Machine::Unknown { asked: true, again_at };
                effects.push(Effect::Adopt { epoch: self.epoch });
            }
            Machine::Off { start_at } if target == Target::Run && now >= start_at => {
                self.start(&wish, now, effects);
            }
            Machine::Starting { until } if target != Target::Run || now >= until => {
                if now >= until {
                    self.failed("Server.InternalError: QEMU does not answer".into());
                }
                self.kill(now, effects);
            }
            Machine::Up { .. } => self.advance_up(target, &wish, now, effects),
            Machine::Rebooting { .. } if target != Target::Run => {
                self.power_down(target, now, effects);
            }
            Machine::Rebooting { until, .. } if now >= until => {
                self.machine = Machine::Resetting { asked: false, again_at: now };
                self.advance(now, effects);
            }
            Machine::Rebooting { press_at, until } if now >= press_at => {
                self.machine = Machine::Rebooting { press_at: now + PRESS_AGAIN, until };
                effects.push(Effect::PowerDown);
            }
            Machine::Resetting { .. } if target != Target::Run => self.quit(now, effects),
            Machine::Resetting { asked: false, again_at } if now >= again_at => {
                self.machine = Machine::Resetting { asked: true, again_at };
                effects.push(Effect::Reset);
            }
            Machine::PoweringDown { until, .. } if now >= until => self.quit(now, effects),
            Machine::PoweringDown { press_at, until } => {
                // A stop that became a termination is more hurried.
                let until = if target == Target::Gone {
                    until.min(now + TERMINATE_PATIENCE)
                } else {
                    until
                };
                if now >= press_at {
                    effects.push(Effect::PowerDown);
                    self.machine = Machine::PoweringDown { press_at: now + PRESS_AGAIN, until };
                } else {
                    self.machine = Machine::PoweringDown { press_at, until };
                }
            }
            Machine::Quitting { until } if until == Duration::ZERO => self.quit(now, effects),
            Machine::Quitting { until } if now >= until => self.kill(now, effects),
            Machine::Killing { again_at } if now >= again_at => self.kill(now, effects),
            Machine::CleaningUp { asked: false, tries, again_at } if now >= again_at => {
                self.machine = Machine::CleaningUp { asked: true, tries, again_at };
                effects.push(Effect::CleanUp);
            }
            _ => {}
        }
    }

    fn advance_up(
        &mut self,
        target: Target,
        wish: &host::Instance,
        now: Duration,
        effects: &mut Vec<Effect>,
    ) {
        match target {
            Target::Run => {
                if self.record.state == InstanceState::Pending {
                    self.become_state(InstanceState::Running);
                    self.record.reason = None;
                }
                self.record.starts = self.record.starts.max(wish.starts);
                if self.reboot_wanted() {
                    self.machine = Machine::Rebooting {
                        press_at: now + PRESS_AGAIN,
                        until: now + REBOOT_PATIENCE,
                    };
                    effects.push(Effect::PowerDown);
                }
            }
            Target::Stop | Target::Gone => self.power_down(target, now, effects),
        }
    }

    /// The names that EC2 has for where the instance is heading.
    fn name_state(&mut self, target: Target, wish: &host::Instance) {
        use InstanceState::{Pending, Running, ShuttingDown, Stopped, Stopping, Terminated};
        if wish.run != Run::Running {
            // Who asks for an end asks for it of the newest start too, begun or not.
            self.record.starts = self.record.starts.max(wish.starts);
        }
        match (target, self.record.state) {
            (Target::Gone, Pending | Running | Stopping | Stopped) => {
                self.become_state(ShuttingDown)
            }
            (Target::Stop, Pending | Running) => {
                if wish.run == Run::Stopped {
                    self.record.reason =
                        Some("Client.UserInitiatedShutdown: stopped by request".into());
                }
                self.become_state(Stopping);
            }
            (Target::Run, Stopped) => {
                self.record.starts = wish.starts;
                self.record.reboots = wish.reboots;
                self.record.reason = None;
                self.record.failures = 0;
                self.become_state(Pending);
            }
            (Target::Run | Target::Stop | Target::Gone, ShuttingDown | Terminated)
            | (Target::Run, Pending | Running | Stopping)
            | (Target::Stop, Stopping | Stopped) => {}
        }
    }

    fn start(&mut self, wish: &host::Instance, now: Duration, effects: &mut Vec<Effect>) {
        if let Err(cause) = &self.network {
            self.record.reason =
                Some(format!("Server.Pending: its network interfaces are not made yet: {cause}"));
            return;
        }
        if !wish.volumes.iter().any(|a| a.boot) {
            self.record.reason = Some("Client.VolumeMissing: it has no root volume".into());
            return;
        }
        let ready = wish.volumes.iter().all(|a| {
            self.disks.get(&a.volume).is_some_and(|d| {
                d.generation == a.generation
                    && d.op.is_none()
                    && (d.export || (!a.boot && d.tries >= EXPORT_TRIES_AWAITED))
            })
        });
        if !ready {
            let trouble = self.disks.values().find_map(|d| d.trouble.clone());
            if let Some(trouble) = trouble {
                self.record.reason = Some(format!("Server.Pending: volume: {trouble}"));
            }
            return;
        }
        self.record.starts = self.record.starts.max(wish.starts);
        self.record.reboots = wish.reboots;
        self.epoch += 1;
        self.machine = Machine::Starting { until: now + START_PATIENCE };
        let disks = self.plug_for_start(wish);
        effects.push(Effect::Start { epoch: self.epoch, wish: Box::new(wish.clone()), disks });
    }

    /// The root disk takes the first slot, the others follow as they were attached.
    fn plug_for_start(&mut self, wish: &host::Instance) -> Vec<StartDisk> {
        let mut attachments: Vec<&host::Attachment> = wish.volumes.iter().collect();
        attachments.sort_by_key(|a| !a.boot);
        let mut disks = Vec::new();
        for (slot, attachment) in (0..slots(wish)).zip(attachments) {
            if let Some(disk) = self.disks.get_mut(&attachment.volume).filter(|d| d.export) {
                disk.slot = Some(slot);
                disk.boot = attachment.boot;
                disks.push(StartDisk { volume: attachment.volume, slot, boot: attachment.boot });
            }
        }
        disks
    }

    fn power_down(&mut self, target: Target, now: Duration, effects: &mut Vec<Effect>) {
        let patience = if target == Target::Gone { TERMINATE_PATIENCE } else { STOP_PATIENCE };
        self.machine = Machine::PoweringDown { press_at: now + PRESS_AGAIN, until: now + patience };
        effects.push(Effect::PowerDown);
    }

    fn quit(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        self.machine = Machine::Quitting { until: now + QUIT_PATIENCE };
        effects.push(Effect::Quit);
    }

    fn kill(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        self.machine = Machine::Killing { again_at: now + KILL_AGAIN };
        effects.push(Effect::Kill);
    }

    fn advance_disks(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let Some(wish) = self.wish.clone() else { return };
        let target = self.target();
        // Until it is known whether a QEMU lives, its disks are left alone.
        if let Machine::Unknown { .. } = self.machine {
            return;
        }
        let bring_up = target == Target::Run;
        self.disks.retain(|volume, disk| {
            let serves =
                |a: &host::Attachment| a.volume == *volume && a.generation == disk.generation;
            !disk.is_gone() || (bring_up && wish.volumes.iter().any(serves))
        });
        if bring_up {
            for attachment in &wish.volumes {
                self.disks
                    .entry(attachment.volume)
                    .or_insert_with(|| Disk::new(attachment.generation, attachment.boot));
            }
        }
        let machine_up = self.machine.is_up();
        let may_live = self.machine.may_live();
        for volume in self.disks.keys().copied().collect::<Vec<_>>() {
            let attachment = wish.volumes.iter().find(|a| a.volume == volume);
            let wanted = attachment.is_some_and(|a| {
                bring_up && self.disks.get(&volume).is_some_and(|d| d.generation == a.generation)
            });
            // A disk that QEMU may be using keeps its export until QEMU has ended or let go.
            if !wanted && may_live && !machine_up {
                continue;
            }
            self.advance_disk(volume, wanted, machine_up, now, effects);
        }
        self.record.generations =
            self.disks.iter().map(|(volume, disk)| (*volume, disk.generation)).collect();
    }

    fn advance_disk(
        &mut self,
        volume: VolumeId,
        wanted: bool,
        machine_up: bool,
        now: Duration,
        effects: &mut Vec<Effect>,
    ) {
        let slot = self.free_slot();
        let Some(disk) = self.disks.get_mut(&volume) else { return };
        let Some(op) = disk.next(wanted, machine_up, now) else { return };
        let effect = match op {
            DiskOp::Export => Effect::Export { volume, generation: disk.generation },
            DiskOp::AddNode => Effect::AddNode { volume },
            DiskOp::AddDevice => {
                let Some(slot) = slot else {
                    disk.trouble = Some("no hot-plug slot is free".into());
                    return;
                };
                disk.slot = Some(slot);
                Effect::AddDevice { volume, slot, boot: disk.boot }
            }
            DiskOp::Release => Effect::DeleteDevice { volume },
            DiskOp::DeleteNode => Effect::DeleteNode { volume },
            DiskOp::Unexport => Effect::Unexport { volume },
        };
        disk.begin(op, now);
        effects.push(effect);
    }

    fn free_slot(&self) -> Option<u32> {
        let slots = self.wish.as_deref().map_or(0, slots);
        (0..slots).find(|slot| self.disks.values().all(|d| d.slot != Some(*slot)))
    }

    /// An ending is over when neither process nor export is left.
    fn settle(&mut self) {
        let over = matches!(self.machine, Machine::Off { .. }) && self.disks.is_empty();
        match self.record.state {
            InstanceState::Stopping if over => self.become_state(InstanceState::Stopped),
            InstanceState::ShuttingDown if over => self.become_state(InstanceState::Terminated),
            _ => {}
        }
    }

    fn become_state(&mut self, next: InstanceState) {
        let last = self.record.state;
        assert!(last.may_become(next), "{}: {last} may not become {next}", self.id);
        self.record.state = next;
    }

    /// What control is told.
    pub fn observed(&self) -> ObservedInstance {
        ObservedInstance {
            id: self.id,
            state: self.record.state,
            starts: self.record.starts,
            reboots: self.record.reboots,
            reason: self.record.reason.clone().or_else(|| self.trouble()),
            attachments: self.attachments(),
        }
    }

    /// The first volume that stands still, and why.
    fn trouble(&self) -> Option<String> {
        self.disks.iter().find_map(|(volume, disk)| {
            Some(format!("Server.Pending: volume {volume}: {}", disk.trouble.as_ref()?))
        })
    }

    fn attachments(&self) -> Vec<ObservedAttachment> {
        let wished = self.wish.iter().flat_map(|w| &w.volumes);
        let gone =
            matches!(self.record.state, InstanceState::ShuttingDown | InstanceState::Terminated);
        let mut all = BTreeMap::new();
        for volume in self.disks.keys() {
            all.insert(*volume, AttachmentState::Detaching);
        }
        for attachment in wished {
            let disk = self.disks.get(&attachment.volume);
            let state = match disk {
                _ if gone && disk.is_none() => continue,
                Some(d) if gone || d.generation != attachment.generation => {
                    AttachmentState::Detaching
                }
                Some(d) if d.device && d.op == Some(DiskOp::Release) => AttachmentState::Detaching,
                Some(d) if d.device => AttachmentState::Attached,
                // A guest that is off, or comes back by itself, has its disks still.
                _ if !self.machine.is_up() && self.record.state != InstanceState::Pending => {
                    AttachmentState::Attached
                }
                _ => AttachmentState::Attaching,
            };
            all.insert(attachment.volume, state);
        }
        all.into_iter().map(|(volume, state)| ObservedAttachment { volume, state }).collect()
    }
}

/// Hot-plug slots of the guest, the root disk's included.
pub fn slots(wish: &host::Instance) -> u32 {
    wish.volumes_max.max(u32::try_from(wish.volumes.len()).unwrap_or(SLOTS_MAX)).clamp(1, SLOTS_MAX)
}
