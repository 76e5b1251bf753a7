//! A hypervisor that exists only in memory: the conformance partner of the QEMU
//! shell, the world of the core's tests, and the stand-in for scale tests of
//! control, where a thousand real guests would not fit.
//!
//! [`Machine`] is plain: effects in, events out when they are due, all chance
//! from a seed. [`Scripted`] drives one a guest on real time.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use model::{InstanceId, VolumeId};

use crate::lifecycle::{Effect, Event, GuestRun, MachineEvent, Seen, Sight};
use crate::qemu::{Accelerator, Choice, Context, Hypervisor, Reports};

/// How often the guest does what it should not, each in percent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    pub ignores_button: u32,
    pub refuses_release: u32,
    pub fails_to_start: u32,
    pub refuses_command: u32,
    pub ignores_quit: u32,
}

/// Numbers from a seed (splitmix64, Steele et al. 2014).
#[derive(Debug, Clone)]
pub struct Chance(u64);

impl Chance {
    pub const fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % bound
    }

    pub fn percent(&mut self, percent: u32) -> bool {
        self.below(100) < u64::from(percent)
    }
}

/// The process, as the world sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Process {
    pub run: GuestRun,
    pub devices: BTreeMap<VolumeId, Sight>,
    pub nodes: BTreeSet<VolumeId>,
    answers: bool,
}

#[derive(Debug, Clone)]
enum Act {
    Tell(MachineEvent),
    /// QEMU begins to answer.
    Answer,
    Look,
    PowerOff,
    Release(VolumeId),
    End,
}

#[derive(Debug)]
pub struct Machine {
    pub faults: Faults,
    process: Option<Process>,
    due: Vec<(Duration, Act)>,
    epoch: u64,
    chance: Chance,
    /// How many processes there were at once, at most.
    pub processes_max: u32,
}

impl Machine {
    pub const fn new(seed: u64, faults: Faults) -> Self {
        Self {
            faults,
            process: None,
            due: Vec::new(),
            epoch: 0,
            chance: Chance::new(seed),
            processes_max: 0,
        }
    }

    pub const fn process(&self) -> Option<&Process> {
        self.process.as_ref()
    }

    fn later(&mut self, now: Duration, most_ms: u64, act: Act) {
        let delay = Duration::from_millis(1 + self.chance.below(most_ms));
        self.due.push((now + delay, act));
    }

    /// The process dies at once, as by a crash.
    pub fn crash(&mut self, now: Duration) {
        if self.process.is_some() {
            self.end(now);
        }
    }

    /// The guest powers itself off.
    pub fn power_off(&mut self, now: Duration) {
        self.later(now, 5, Act::PowerOff);
    }

    /// The agent died: nobody hears what was about to be told, and what it asked
    /// QEMU for happens still.
    pub fn agent_died(&mut self) {
        self.due.retain(|(_, act)| !matches!(act, Act::Tell(_) | Act::Look));
    }

    /// A start that comes to nothing.
    pub fn fail_to_start(&mut self, epoch: u64, now: Duration) {
        self.epoch = epoch;
        self.later(now, 20, Act::Tell(MachineEvent::StartFailed("planted".into())));
    }

    fn end(&mut self, now: Duration) {
        self.process = None;
        self.due.retain(|(_, act)| matches!(act, Act::Tell(_)));
        self.due.push((now, Act::Tell(MachineEvent::Exited)));
    }

    pub fn perform(&mut self, effect: &Effect, now: Duration) {
        match effect {
            Effect::Adopt { epoch } => {
                self.epoch = *epoch;
                let absent = Act::Tell(MachineEvent::Absent);
                let act = if self.process.is_some() { Act::Look } else { absent };
                self.later(now, 20, act);
            }
            Effect::Start { epoch, disks, .. } => {
                self.epoch = *epoch;
                if self.process.is_some() {
                    self.processes_max = 2;
                    return;
                }
                if self.chance.percent(self.faults.fails_to_start) {
                    return self.fail_to_start(*epoch, now);
                }
                let devices = disks.iter().map(|d| (d.volume, Sight { slot: d.slot }));
                self.process = Some(Process {
                    run: GuestRun::Running,
                    devices: devices.collect(),
                    nodes: disks.iter().map(|d| d.volume).collect(),
                    answers: false,
                });
                self.processes_max = self.processes_max.max(1);
                self.later(now, 300, Act::Answer);
            }
            Effect::Kill if self.process.is_none() => {
                self.later(now, 2, Act::Tell(MachineEvent::Exited));
            }
            Effect::Kill => self.later(now, 20, Act::End),
            Effect::CleanUp => self.later(now, 5, Act::Tell(MachineEvent::CleanedUp(Ok(())))),
            Effect::PowerDown => {
                if !self.chance.percent(self.faults.ignores_button) {
                    self.later(now, 4000, Act::PowerOff);
                }
            }
            Effect::Quit => {
                if !self.chance.percent(self.faults.ignores_quit) {
                    self.later(now, 100, Act::End);
                }
            }
            _ => self.command(effect, now),
        }
    }

    /// What QEMU is asked for by QMP.
    fn command(&mut self, effect: &Effect, now: Duration) {
        if *effect == Effect::Reset {
            // A guest that was on its way down begins anew.
            self.due.retain(|(_, act)| !matches!(act, Act::PowerOff));
        }
        let refused = self.chance.percent(self.faults.refuses_command);
        let holds_out = self.chance.percent(self.faults.refuses_release);
        let result = match &mut self.process {
            Some(_) if refused => Err("planted".to_owned()),
            None => Err("not connected".to_owned()),
            Some(process) => Ok(process),
        };
        let told = match effect {
            Effect::Reset => MachineEvent::ResetDone(result.map(|p| p.run = GuestRun::Running)),
            Effect::AddNode { volume } => MachineEvent::NodeAdded(
                *volume,
                result.and_then(|p| {
                    p.nodes.insert(*volume).then_some(()).ok_or("it is there".into())
                }),
            ),
            Effect::AddDevice { volume, slot, .. } => MachineEvent::DeviceAdded(
                *volume,
                result.and_then(|p| {
                    let taken = p.devices.values().any(|s| s.slot == *slot);
                    if taken || !p.nodes.contains(volume) || p.devices.contains_key(volume) {
                        return Err("slot taken, node missing, or plugged in already".into());
                    }
                    p.devices.insert(*volume, Sight { slot: *slot });
                    Ok(())
                }),
            ),
            Effect::DeleteDevice { volume } => match result {
                Ok(process) if !process.devices.contains_key(volume) => {
                    MachineEvent::DeviceGone(*volume)
                }
                Ok(_) => {
                    if !holds_out {
                        self.later(now, 200, Act::Release(*volume));
                    }
                    MachineEvent::ReleaseAsked(*volume, Ok(()))
                }
                Err(e) => MachineEvent::ReleaseAsked(*volume, Err(e)),
            },
            Effect::DeleteNode { volume } => MachineEvent::NodeDeleted(
                *volume,
                result.and_then(|p| {
                    if p.devices.contains_key(volume) {
                        return Err("it is in use".into());
                    }
                    p.nodes.remove(volume);
                    Ok(())
                }),
            ),
            _ => return,
        };
        self.later(now, 20, Act::Tell(told));
    }

    /// When the next event is due.
    pub fn next_due(&self) -> Option<Duration> {
        self.due.iter().map(|(at, _)| *at).min()
    }

    /// What happens up to `now`, in its order.
    pub fn events(&mut self, now: Duration) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(i) =
            (0..self.due.len()).filter(|i| self.due[*i].0 <= now).min_by_key(|i| self.due[*i].0)
        {
            let (at, act) = self.due.remove(i);
            if let Some(event) = self.happen(act, at) {
                events.push(Event::Machine { epoch: self.epoch, event });
            }
        }
        events
    }

    fn happen(&mut self, act: Act, now: Duration) -> Option<MachineEvent> {
        if let Act::Tell(event) = act {
            return Some(event);
        }
        let Some(process) = &mut self.process else {
            // The process ended between the question and the look.
            return matches!(act, Act::Look).then_some(MachineEvent::Exited);
        };
        match act {
            Act::Tell(_) => None,
            Act::Answer | Act::Look => {
                process.answers = true;
                Some(MachineEvent::Seen(Seen {
                    run: process.run,
                    devices: process.devices.clone(),
                    nodes: process.nodes.clone(),
                }))
            }
            Act::PowerOff => {
                let was = std::mem::replace(&mut process.run, GuestRun::Off);
                (was == GuestRun::Running && process.answers).then_some(MachineEvent::GuestOff)
            }
            Act::Release(volume) => {
                process.devices.remove(&volume).map(|_| MachineEvent::DeviceGone(volume))
            }
            Act::End => {
                self.end(now);
                None
            }
        }
    }
}

/// Guests in memory behind the same wall as QEMU.
pub struct Scripted {
    machines: BTreeMap<InstanceId, tokio::sync::mpsc::UnboundedSender<Effect>>,
    seed: u64,
    choice: Choice,
    reports: Reports,
}

impl Scripted {
    pub fn new(seed: u64, reports: Reports) -> Self {
        let choice = Choice {
            accelerator: Accelerator::Tcg,
            reason: "a scripted machine in memory".into(),
            kvm_group: None,
        };
        Self { machines: BTreeMap::new(), seed, choice, reports }
    }
}

impl Hypervisor for Scripted {
    fn perform(&mut self, id: InstanceId, effect: Effect, _context: Context) {
        let (seed, reports) = (self.seed, self.reports.clone());
        let machine = self.machines.entry(id).or_insert_with(|| {
            let (effects, inbox) = tokio::sync::mpsc::unbounded_channel();
            tokio::spawn(drive(id, Machine::new(seed, Faults::default()), inbox, reports));
            effects
        });
        // The task ends only with the runtime.
        let _ = machine.send(effect);
    }

    fn process(&self, _id: InstanceId) -> Option<(u32, bool)> {
        None
    }

    fn accelerator(&self) -> &Choice {
        &self.choice
    }
}

async fn drive(
    id: InstanceId,
    mut machine: Machine,
    mut effects: tokio::sync::mpsc::UnboundedReceiver<Effect>,
    reports: Reports,
) {
    let start = tokio::time::Instant::now();
    loop {
        let due = machine.next_due().unwrap_or(Duration::from_secs(3600));
        tokio::select! {
            effect = effects.recv() => match effect {
                Some(effect) => machine.perform(&effect, start.elapsed()),
                None => return,
            },
            () = tokio::time::sleep_until(start + due) => {}
        }
        for event in machine.events(start.elapsed()) {
            if reports.send((id, event)).await.is_err() {
                return;
            }
        }
    }
}
