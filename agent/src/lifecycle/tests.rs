//! The core against a scripted world: random histories from a seed, with the
//! agent dying, guests dying, the block server away and guests that refuse; then
//! a world that behaves, in which all must come out as it was wanted.

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;

use model::{AttachmentState, InstanceId, InstanceState, VolumeId};
use rpc::host::{self, Run};

use super::*;
use crate::scripted::{self, Chance, Faults};

/// A planted mistake, each of which the histories must find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// A restarted agent remembers nothing.
    ForgetsRecords,
    /// Every start is done twice.
    StartsTwice,
    /// A disk's release is never asked for.
    NeverReleases,
    /// An export is withdrawn as soon as its volume is not wanted.
    UnexportsEarly,
    /// The end of QEMU is not heard.
    DeafToExit,
}

struct World {
    chance: Chance,
    mistake: Mistake,
    core: Instance,
    kept: Option<Record>,
    wish: host::Instance,
    machine: scripted::Machine,
    /// Volume → generation.
    exports: BTreeMap<VolumeId, u64>,
    block_is_up: bool,
    answers: Vec<(Duration, Event)>,
    ever_attached: BTreeSet<VolumeId>,
    now: Duration,
    states: BTreeSet<(InstanceState, InstanceState)>,
    machines_seen: BTreeSet<&'static str>,
    generation: u64,
}

fn volume(n: u64) -> VolumeId {
    VolumeId::from_random(u128::from(n) + 1)
}

impl World {
    fn new(seed: u64, mistake: Mistake) -> Self {
        let mut chance = Chance::new(seed);
        // The mix of faults is drawn too: a fixed one visits the same streets.
        let mut percent = || [0, 0, 10, 40, 90][chance.below(5) as usize];
        let faults = Faults {
            ignores_button: percent(),
            refuses_release: percent(),
            fails_to_start: percent(),
            refuses_command: percent(),
            ignores_quit: percent(),
        };
        let id = InstanceId::from_random(u128::from(seed));
        let wish = host::Instance {
            id,
            run: Run::Running,
            starts: 1,
            reboots: 0,
            vcpus: 1,
            memory_mib: 128,
            image: "tiny".into(),
            interfaces: Vec::new(),
            volumes: vec![attachment(0, 1)],
            volumes_max: 4,
        };
        let mut world = Self {
            machine: scripted::Machine::new(seed ^ 0xfeed, faults),
            chance,
            mistake,
            core: Instance::new(id, None),
            kept: None,
            wish,
            exports: BTreeMap::new(),
            block_is_up: true,
            answers: Vec::new(),
            ever_attached: BTreeSet::from([volume(0)]),
            now: Duration::from_secs(1),
            states: BTreeSet::new(),
            machines_seen: BTreeSet::new(),
            generation: 1,
        };
        world.step(Event::Network(Ok(())));
        world.tell_wish();
        world
    }

    fn tell_wish(&mut self) {
        self.step(Event::Wish(Box::new(self.wish.clone())));
    }

    fn step(&mut self, event: Event) {
        if self.mistake == Mistake::DeafToExit
            && matches!(event, Event::Machine { event: MachineEvent::Exited, .. })
        {
            return;
        }
        let before = self.core.state();
        let effects = self.core.step(event, self.now);
        let after = self.core.state();
        if before != after {
            self.states.insert((before, after));
        }
        self.machines_seen.insert(self.core.machine().name());
        for effect in effects {
            self.perform(&effect);
        }
    }

    fn perform(&mut self, effect: &Effect) {
        if let Some(volume) = volume_of(effect) {
            assert!(self.ever_attached.contains(&volume), "touches {volume}, never attached");
        }
        match effect {
            Effect::Remember(record) => self.kept = Some(record.clone()),
            Effect::Export { volume, generation } => {
                let result = if self.block_is_up {
                    self.exports.insert(*volume, *generation);
                    Ok(())
                } else {
                    Err("the block server is away".into())
                };
                self.answer(Event::Exported(*volume, result));
            }
            Effect::Unexport { volume } => {
                let used = self.machine.process().is_some_and(|p| p.nodes.contains(volume));
                assert!(!used, "the export of {volume} is withdrawn while QEMU uses it");
                let result = if self.block_is_up {
                    self.exports.remove(volume);
                    Ok(())
                } else {
                    Err("the block server is away".into())
                };
                self.answer(Event::Unexported(*volume, result));
            }
            Effect::DeleteDevice { .. } if self.mistake == Mistake::NeverReleases => {}
            Effect::DeleteDevice { volume } if self.mistake == Mistake::UnexportsEarly => {
                self.perform(&Effect::Unexport { volume: *volume });
            }
            effect => {
                if let Effect::Start { disks, epoch, .. } = effect {
                    // An export may be lost just before: QEMU then cannot connect.
                    if disks.iter().any(|d| !self.exports.contains_key(&d.volume)) {
                        self.machine.fail_to_start(*epoch, self.now);
                        return;
                    }
                    if self.mistake == Mistake::StartsTwice {
                        self.machine.perform(effect, self.now);
                    }
                }
                self.machine.perform(effect, self.now);
                assert!(self.machine.processes_max <= 1, "two QEMUs for one instance");
            }
        }
    }

    fn answer(&mut self, event: Event) {
        let delay = Duration::from_millis(1 + self.chance.below(300));
        self.answers.push((self.now + delay, event));
    }

    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now += Duration::from_millis(200);
            let now = self.now;
            let (due, later) =
                std::mem::take(&mut self.answers).into_iter().partition(|(at, _)| *at <= now);
            self.answers = later;
            for (_, event) in due {
                self.step(event);
            }
            for event in self.machine.events(now) {
                self.step(event);
            }
            if self.block_is_up && now.as_millis().is_multiple_of(2000) {
                self.compare_exports();
            }
            self.step(Event::Tick);
        }
    }

    /// As the owner does.
    fn compare_exports(&mut self) {
        let lost =
            self.core.exports().filter(|(v, generation)| self.exports.get(v) != Some(generation));
        for (volume, _) in lost.collect::<Vec<_>>() {
            self.step(Event::ExportLost(volume));
        }
    }

    fn agent_dies(&mut self) {
        let kept = self.kept.clone().filter(|_| self.mistake != Mistake::ForgetsRecords);
        self.core = Instance::new(self.wish.id, kept);
        self.answers.clear();
        self.machine.agent_died();
        self.step(Event::Network(Ok(())));
        self.tell_wish();
    }

    fn something_happens(&mut self) {
        match self.chance.below(15) {
            0 => self.wish.reboots += 1,
            1 if self.wish.run == Run::Running => self.wish.run = Run::Stopped,
            1 | 2 if self.wish.run == Run::Stopped => {
                self.wish.run = Run::Running;
                self.wish.starts += 1;
            }
            3 | 4 => self.attach(),
            5 | 6 => {
                let chosen = self.chance.below(4) + 1;
                self.wish.volumes.retain(|a| a.volume != volume(chosen));
            }
            7 => return self.agent_dies(),
            8 => return self.machine.crash(self.now),
            9 => return self.machine.power_off(self.now),
            10 => return self.block_is_up = !self.block_is_up,
            11 if self.chance.percent(5) => self.wish.run = Run::Terminated,
            12 => {
                let ready = self.chance.percent(50);
                let network = if ready { Ok(()) } else { Err("planted".into()) };
                return self.step(Event::Network(network));
            }
            13 => {
                // The block server forgets what nobody is connected to.
                let chosen = volume(self.chance.below(4));
                self.exports.remove(&chosen);
                return;
            }
            _ => return self.pass(Duration::from_secs(20)),
        }
        self.tell_wish();
    }

    fn attach(&mut self) {
        let chosen = self.chance.below(4) + 1;
        if self.wish.volumes.iter().all(|a| a.volume != volume(chosen)) {
            self.generation += 1;
            self.wish.volumes.push(attachment(chosen, self.generation));
            self.ever_attached.insert(volume(chosen));
        }
    }

    fn history(&mut self) {
        for _ in 0..40 {
            let pause = [0, 200, 1000, 5000, 30_000][self.chance.below(5) as usize];
            self.pass(Duration::from_millis(pause));
            self.something_happens();
        }
    }

    /// From here the world behaves, and the last wish must come true.
    fn comes_true(&mut self) {
        self.machine.faults = Faults::default();
        self.block_is_up = true;
        self.step(Event::Network(Ok(())));
        // What the guest has begun by itself comes to its end first.
        self.pass(Duration::from_secs(10));
        if self.wish.run == Run::Running {
            // Whatever made it stop, people ask once more.
            self.wish.starts += 1;
            self.tell_wish();
        }
        self.pass(Duration::from_secs(600));
        // Five slots are wanted at most and four are there: the fifth waits.
        let wanted: BTreeSet<VolumeId> = self.wish.volumes.iter().map(|a| a.volume).collect();
        let observed = self.core.observed();
        match self.wish.run {
            Run::Running => {
                assert_eq!(observed.state, InstanceState::Running, "{observed:?}");
                let process = self.machine.process().expect("a QEMU");
                assert_eq!(process.run, GuestRun::Running);
                let plugged: BTreeSet<VolumeId> = process.devices.keys().copied().collect();
                assert!(plugged.is_subset(&wanted), "{plugged:?} beyond {wanted:?}");
                assert!(plugged.contains(&volume(0)), "the root disk");
                assert_eq!(plugged.len(), wanted.len().min(5));
                assert_eq!(observed.reboots, self.wish.reboots);
                assert_eq!(observed.starts, self.wish.starts);
                let attached = observed.attachments.iter();
                assert!(
                    attached.clone().all(|a| a.state == AttachmentState::Attached),
                    "{observed:?}"
                );
                for attachment in &self.wish.volumes {
                    assert_eq!(self.exports.get(&attachment.volume), Some(&attachment.generation));
                }
                assert_eq!(self.exports.len(), wanted.len(), "exports left over");
            }
            Run::Stopped | Run::Terminated => {
                let end = if self.wish.run == Run::Stopped {
                    InstanceState::Stopped
                } else {
                    InstanceState::Terminated
                };
                assert_eq!(observed.state, end, "{observed:?}");
                assert_eq!(self.machine.process(), None);
                assert_eq!(self.exports, BTreeMap::new(), "exports left over");
            }
        }
    }
}

fn attachment(n: u64, generation: u64) -> host::Attachment {
    host::Attachment { volume: volume(n), device: format!("/dev/sd{n}"), generation, boot: n == 0 }
}

fn volume_of(effect: &Effect) -> Option<VolumeId> {
    match effect {
        Effect::Export { volume, .. }
        | Effect::Unexport { volume }
        | Effect::AddNode { volume }
        | Effect::AddDevice { volume, .. }
        | Effect::DeleteDevice { volume }
        | Effect::DeleteNode { volume } => Some(*volume),
        _ => None,
    }
}

#[test]
fn every_history_ends_as_it_was_wanted() {
    let mut states = BTreeSet::new();
    let mut machines = BTreeSet::new();
    for seed in 0..600 {
        let mut world = World::new(seed, Mistake::None);
        let result = catch_unwind(AssertUnwindSafe(|| {
            world.history();
            world.comes_true();
        }));
        if result.is_err() {
            panic!("seed {seed}: machine {:?}, wish {:?}", world.core.machine(), world.wish);
        }
        states.extend(world.states);
        machines.extend(world.machines_seen);
    }
    // Marks that must be reached, or the histories prove less than they seem to.
    assert!(states.contains(&(InstanceState::Running, InstanceState::Stopping)));
    assert!(states.contains(&(InstanceState::Stopped, InstanceState::Pending)));
    assert!(states.contains(&(InstanceState::ShuttingDown, InstanceState::Terminated)));
    let all = [
        "unknown",
        "off",
        "starting",
        "up",
        "rebooting",
        "resetting",
        "powering-down",
        "quitting",
        "killing",
        "cleaning-up",
    ];
    for name in all {
        assert!(machines.contains(name), "no history reached `{name}`");
    }
}

#[test]
fn each_planted_mistake_is_found() {
    let mut missed = Vec::new();
    for mistake in [
        Mistake::ForgetsRecords,
        Mistake::StartsTwice,
        Mistake::NeverReleases,
        Mistake::UnexportsEarly,
        Mistake::DeafToExit,
    ] {
        let found = (0..100).any(|seed| {
            catch_unwind(AssertUnwindSafe(|| {
                let mut world = World::new(seed, mistake);
                world.history();
                world.comes_true();
            }))
            .is_err()
        });
        if !found {
            missed.push(mistake);
        }
    }
    assert_eq!(missed, []);
}

#[test]
fn a_guest_that_powers_itself_off_stays_off_until_it_is_started() {
    let mut world = World::new(1, Mistake::None);
    world.machine.faults = Faults::default();
    world.pass(Duration::from_secs(30));
    assert_eq!(world.core.state(), InstanceState::Running);
    world.machine.power_off(world.now);
    world.pass(Duration::from_secs(30));
    assert_eq!(world.core.state(), InstanceState::Stopped);
    world.agent_dies();
    world.pass(Duration::from_secs(30));
    assert_eq!(world.core.state(), InstanceState::Stopped);
    world.wish.starts += 1;
    world.tell_wish();
    world.pass(Duration::from_secs(30));
    assert_eq!(world.core.state(), InstanceState::Running);
}

#[test]
fn a_guest_that_refuses_to_release_a_disk_keeps_it_detaching_and_is_asked_again() {
    let mut world = World::new(2, Mistake::None);
    world.machine.faults = Faults::default();
    world.attach();
    world.tell_wish();
    world.pass(Duration::from_secs(30));
    let chosen = world.wish.volumes.pop().unwrap().volume;
    world.machine.faults.refuses_release = 100;
    world.tell_wish();
    world.pass(Duration::from_secs(60));
    let attachments = world.core.observed().attachments;
    let state = attachments.iter().find(|a| a.volume == chosen).unwrap().state;
    assert_eq!(state, AttachmentState::Detaching);
    assert!(world.exports.contains_key(&chosen));
    world.machine.faults.refuses_release = 0;
    world.pass(Duration::from_secs(60));
    assert!(world.core.observed().attachments.iter().all(|a| a.volume != chosen));
    assert!(!world.exports.contains_key(&chosen));
}

#[test]
fn a_guest_that_cannot_start_is_left_stopped_with_the_reason() {
    let mut world = World::new(3, Mistake::None);
    world.machine.faults = Faults { fails_to_start: 100, ..Faults::default() };
    world.pass(Duration::from_secs(120));
    let observed = world.core.observed();
    assert_eq!(observed.state, InstanceState::Stopped);
    assert!(observed.reason.unwrap().contains("planted"));
    assert_eq!(observed.starts, 1);
}

#[test]
fn an_instance_that_ends_before_its_first_start_answers_the_wish_whole() {
    let mut world = World::new(4, Mistake::None);
    // A life in which the network never came.
    world.machine = scripted::Machine::new(4, Faults::default());
    world.core = Instance::new(world.wish.id, None);
    world.step(Event::Network(Err("planted".into())));
    world.tell_wish();
    world.pass(Duration::from_secs(30));
    assert_eq!(world.core.state(), InstanceState::Pending);
    assert!(world.core.observed().reason.unwrap().contains("interfaces are not made yet: planted"));
    assert_eq!(world.core.observed().starts, 0);
    assert!(!world.exports.is_empty());
    world.wish.run = Run::Terminated;
    world.tell_wish();
    world.pass(Duration::from_secs(30));
    let observed = world.core.observed();
    assert_eq!(observed.state, InstanceState::Terminated);
    assert_eq!(observed.starts, world.wish.starts, "control takes it for an older start's end");
    assert_eq!(observed.attachments, []);
    assert!(world.exports.is_empty());
}
