//! The core over a simulated disk, from a seed: power is lost at any moment, and
//! what is left must be what was promised.
//!
//! The model keeps, for each sector, every version that a change gave it, in the
//! order of submission. After a crash a sector must hold a version from the last
//! one that was made durable on; a read must see one from the last that was
//! acknowledged before it on.

use std::collections::{BTreeMap, BTreeSet};

use sim::{
    Disk, Done, Fault, Faults, Marks, Random, SECTOR, Swarm, is_full, seed_from_environment,
};

use super::{
    Core, EIO, EOPNOTSUPP, EPERM, Geometry, Kind, Mistake, Op, Outcome, Request, Ticket, Token,
};

const BLOCK: usize = 4 * SECTOR;
const BYTES: usize = 16 * BLOCK;
const SECTORS: usize = BYTES / SECTOR;

/// Requests in flight at once: enough for several to overlap in 16 blocks.
const IN_FLIGHT_MAX: usize = 8;

type Sector = [u8; SECTOR];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    /// May be there or not.
    Open,
    Acknowledged,
    /// Was refused to a fenced writer: must never be seen.
    Never,
}

#[derive(Debug, Clone)]
struct Version {
    value: Sector,
    fate: Fate,
}

#[derive(Debug)]
enum Asked {
    Change { sectors: Vec<(usize, usize)>, durable: bool, advice: bool },
    Read { first: usize, floors: Vec<usize> },
    Flush { floors: Vec<usize> },
}

struct World {
    core: Core,
    disk: Disk,
    random: Random,
    sectors: Vec<Vec<Version>>,
    durable_from: Vec<usize>,
    buffers: BTreeMap<Ticket, Vec<u8>>,
    asked: BTreeMap<Ticket, Asked>,
    next_ticket: Ticket,
    next_value: u64,
    no_fallocate: bool,
    may_fail: bool,
    raised: bool,
    /// Requests that a fenced writer made: none may succeed.
    stale: BTreeSet<Ticket>,
    crash_points: u64,
}

type Verdict = Result<(), String>;

impl World {
    fn new(seed: u64, mistake: Option<Mistake>, faults: Faults) -> Self {
        let mut random = Random::new(seed);
        let image: Vec<u8> = (0..BYTES).map(|i| (i / SECTOR) as u8 | 0x80).collect();
        let sectors = image
            .as_chunks()
            .0
            .iter()
            .map(|value| vec![Version { value: *value, fate: Fate::Acknowledged }])
            .collect();
        let geometry = Geometry { size: BYTES as u64, alignment: BLOCK as u32 };
        let mut core = Core::new(geometry, 1, None);
        core.mistake = mistake;
        let mut disk = Disk::new(&image, BLOCK);
        disk.faults = faults;
        Self {
            core,
            disk,
            sectors,
            durable_from: vec![0; SECTORS],
            buffers: BTreeMap::new(),
            asked: BTreeMap::new(),
            next_ticket: 0,
            next_value: 0,
            no_fallocate: random.chance(30),
            may_fail: faults.nth.is_some() || faults.fail_percent + faults.fail_sync_percent > 0,
            raised: false,
            stale: BTreeSet::new(),
            crash_points: 0,
            random,
        }
    }

    /// The last version of each sector that was acknowledged.
    fn floors(&self, first: usize, count: usize) -> Vec<usize> {
        self.sectors[first..first + count]
            .iter()
            .map(|versions| {
                versions.iter().rposition(|v| v.fate == Fate::Acknowledged).unwrap_or(0)
            })
            .collect()
    }

    fn submit(&mut self, kind: Kind, marks: &mut Marks) {
        let first = self.random.below(SECTORS as u64) as usize;
        let most = (SECTORS - first).min(3 * BLOCK / SECTOR);
        let mut count = 1 + self.random.below(most as u64) as usize;
        let mut first = first;
        if self.random.chance(50) {
            // As a guest does: whole blocks.
            first -= first % (BLOCK / SECTOR);
            count = count.next_multiple_of(BLOCK / SECTOR).min(SECTORS - first);
        }
        if kind == Kind::Flush {
            (first, count) = (0, 0);
        }
        let (offset, length) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        let layout = self.core.layout(kind, offset, length);
        let mut buffer = vec![0xee; layout.capacity];
        let fua = kind.changes() && self.random.chance(25);
        let asked = match kind {
            Kind::Read => Asked::Read { first, floors: self.floors(first, count) },
            Kind::Flush => Asked::Flush { floors: self.floors(0, SECTORS) },
            _ => {
                let mut sectors = Vec::new();
                for sector in first..first + count {
                    self.next_value += 1;
                    let mut value = [0; SECTOR];
                    if kind == Kind::Write {
                        value[..8].copy_from_slice(&self.next_value.to_le_bytes());
                        let at = layout.payload_at + (sector - first) * SECTOR;
                        buffer[at..at + SECTOR].copy_from_slice(&value);
                    }
                    self.sectors[sector].push(Version { value, fate: Fate::Open });
                    sectors.push((sector, self.sectors[sector].len() - 1));
                }
                let advice = kind == Kind::Trim;
                Asked::Change { sectors, durable: fua, advice }
            }
        };
        let changing = self.core.changing.len();
        self.asked.insert(ticket, asked);
        self.buffers.insert(ticket, buffer);
        // A writer that was fenced does not know it.
        let old = self.raised && self.random.chance(40);
        if old {
            self.stale.insert(ticket);
        }
        let generation = Some(if self.raised && !old { 2 } else { 1 });
        self.core.submit(Request { ticket, kind, offset, length, fua, generation });
        marks.hit_if("a change waits for another", !self.core.waiting.is_empty());
        marks.hit_if("changes run side by side", changing > 1);
        marks.hit_if("a flush waits for the next sync", !self.core.sync_next.is_empty());
    }

    /// Starts what the core wants started and hears what it answers.
    fn serve(&mut self, marks: &mut Marks) -> Verdict {
        loop {
            if let Some((token, op)) = self.core.next_op() {
                self.start(token, op, marks);
            } else if let Some(reply) = self.core.next_reply() {
                self.hear(reply.ticket, reply.result.map(|_| ()), marks)?;
            } else {
                return Ok(());
            }
        }
    }

    /// Which kind of operation the fault of a campaign fell upon.
    fn mark_fault(&self, op: &Op, marks: &mut Marks) {
        marks.hit_if("a sync is started", *op == Op::Sync);
        marks.hit_if("a hole is started", matches!(op, Op::Punch { .. }));
        marks.hit_if("a durable write is started", matches!(op, Op::Write { durable: true, .. }));
        if self.disk.faults.nth.is_some_and(|(nth, _)| nth == self.disk.started()) {
            marks.hit(match op {
                Op::Read { .. } => "the fault falls on a read",
                Op::Write { durable: true, .. } => "the fault falls on a durable write",
                Op::Write { .. } => "the fault falls on a write",
                Op::Punch { .. } => "the fault falls on a hole",
                Op::Zero { .. } => "the fault falls on zeroes",
                Op::WriteZeros { .. } => "the fault falls on written zeros",
                Op::Sync => "the fault falls on a sync",
                Op::Copy { .. } | Op::Fill { .. } | Op::Prefetch { .. } | Op::Extents { .. } => {
                    return;
                }
            });
        }
    }

    fn start(&mut self, token: Token, op: Op, marks: &mut Marks) {
        let id = u64::from(token.0);
        let kind = op;
        match op {
            Op::Read { offset, length, .. } => {
                self.disk.start(id, sim::Op::Read { offset, length });
            }
            Op::Write { ticket, at, offset, length, durable } => {
                let data = self.buffers[&ticket][at..at + length].to_vec();
                self.disk.start(id, sim::Op::Write { offset, data, durable });
            }
            Op::Copy { ticket, from, to, length } => {
                marks.hit("a partial block is merged");
                let Some(buffer) = self.buffers.get_mut(&ticket) else { return };
                buffer.copy_within(from..from + length, to);
            }
            Op::Fill { ticket, at, length } => {
                marks.hit("a part of a block is zeroed");
                let Some(buffer) = self.buffers.get_mut(&ticket) else { return };
                buffer[at..at + length].fill(0);
            }
            Op::Punch { .. } | Op::Zero { .. } if self.no_fallocate => {
                self.core.complete(token, Outcome::Failed(EOPNOTSUPP));
            }
            Op::Punch { offset, length }
            | Op::Zero { offset, length }
            | Op::WriteZeros { offset, length } => {
                let length = length as usize;
                self.disk.start(id, sim::Op::Zero { offset, length });
            }
            Op::Sync => self.disk.start(id, sim::Op::Sync),
            Op::Prefetch { .. } | Op::Extents { .. } => {
                unreachable!("no history asks for {op:?}")
            }
        }
        self.mark_fault(&kind, marks);
    }

    fn hear(&mut self, ticket: Ticket, result: Result<(), i32>, marks: &mut Marks) -> Verdict {
        let Some(asked) = self.asked.remove(&ticket) else {
            return Err(format!("request {ticket} was answered twice"));
        };
        let buffer = self.buffers.remove(&ticket).unwrap_or_default();
        if let Err(errno) = result {
            let lawful = match errno {
                EPERM => self.raised,
                EOPNOTSUPP => self.no_fallocate,
                _ => self.may_fail,
            };
            if !lawful {
                return Err(format!("request {ticket} failed with {errno} on a sound disk"));
            }
            marks.hit(if errno == EPERM {
                "a fenced writer is refused"
            } else {
                "a failure is told"
            });
            if let (EPERM, Asked::Change { sectors, .. }) = (errno, &asked) {
                for (sector, version) in sectors {
                    self.sectors[*sector][*version].fate = Fate::Never;
                }
            }
            return Ok(());
        }
        if self.stale.contains(&ticket) {
            return Err(format!("request {ticket} of a fenced writer succeeded"));
        }
        match asked {
            Asked::Change { advice: true, .. } => {}
            Asked::Change { sectors, durable, .. } => {
                for (sector, version) in sectors {
                    self.sectors[sector][version].fate = Fate::Acknowledged;
                    if durable {
                        let from = &mut self.durable_from[sector];
                        *from = version.max(*from);
                    }
                }
            }
            Asked::Flush { floors } => {
                for (from, floor) in self.durable_from.iter_mut().zip(floors) {
                    *from = floor.max(*from);
                }
            }
            Asked::Read { first, floors } => {
                let at = first % (BLOCK / SECTOR) * SECTOR;
                let values = buffer[at..].as_chunks().0;
                for ((index, floor), value) in floors.into_iter().enumerate().zip(values) {
                    self.check(first + index, floor, *value)
                        .map_err(|e| format!("read {ticket}: {e}"))?;
                }
            }
        }
        Ok(())
    }

    fn check(&self, sector: usize, floor: usize, value: Sector) -> Verdict {
        let lawful = self.sectors[sector][floor..]
            .iter()
            .any(|version| version.value == value && version.fate != Fate::Never);
        if lawful {
            return Ok(());
        }
        Err(format!(
            "sector {sector} holds {value:?}, older than version {floor} of {:?}",
            self.sectors[sector]
        ))
    }

    fn step_disk(&mut self) {
        let Some((id, done)) = self.disk.step(&mut self.random) else { return };
        let outcome = match done {
            Done::Read(data) => {
                self.place(id, &data);
                Outcome::Done(data.len())
            }
            Done::Written(count) => Outcome::Done(count),
            Done::Synced => Outcome::Done(0),
            Done::Failed(errno) => Outcome::Failed(errno),
        };
        self.core.complete(Token(id as u32), outcome);
    }

    /// Puts what was read where the core asked for it: the disk only knows the token.
    fn place(&mut self, id: u64, data: &[u8]) {
        let job = self.core.job(id as u32);
        let (start, end) = self.core.blocks(job.request.offset, job.request.length);
        let at = match job.step {
            super::Step::Body { done } => done as usize,
            super::Step::EdgeRead(_) => 0,
            _ => (end - start) as usize,
        };
        if let Some(buffer) = self.buffers.get_mut(&job.request.ticket) {
            buffer[at..at + data.len()].copy_from_slice(data);
        }
    }

    /// Another writer takes over: the old one's requests that wait must not run.
    fn raise(&mut self) {
        let core = &self.core;
        self.stale.extend(core.waiting.iter().map(|range| core.job(range.job).request.ticket));
        self.core.raise(2);
        self.raised = true;
    }

    fn crash(&mut self) -> Verdict {
        self.crash_points += 1;
        let image = self.disk.crash_image(&mut self.random);
        for (sector, value) in image.as_chunks().0.iter().enumerate() {
            self.check(sector, self.durable_from[sector], *value)
                .map_err(|e| format!("after the crash: {e}"))?;
        }
        Ok(())
    }

    /// Everything in flight ends, and each request was answered.
    fn settle(&mut self, marks: &mut Marks) -> Verdict {
        self.serve(marks)?;
        while !self.disk.is_idle() {
            self.step_disk();
            self.serve(marks)?;
        }
        if !self.asked.is_empty() || self.core.in_flight() > 0 {
            return Err(format!("never answered: {:?}", self.asked));
        }
        let floors = self.floors(0, SECTORS);
        for (sector, value) in self.disk.visible().as_chunks().0.iter().enumerate() {
            self.check(sector, floors[sector], *value).map_err(|e| format!("at the end: {e}"))?;
        }
        self.crash()
    }
}

/// How long a life is, and how often it is looked at after a crash.
#[derive(Debug, Clone, Copy)]
enum Length {
    /// In turns of the loop, with a crash point at every fourth.
    Steps(u64),
    /// Until this many operations were started, with a few crash points.
    Operations(u64),
}

/// How long a failed volume is asked further: it only refuses.
const FAILED_STEPS: u64 = 150;

/// One life of a volume. Gives the number of crashes that were looked at, and of
/// operations.
fn history(
    seed: u64,
    length: Length,
    mistake: Option<Mistake>,
    faults: Faults,
    marks: &mut Marks,
) -> Result<(u64, u64), String> {
    let mut world = World::new(seed, mistake, faults);
    let (steps, operations, crash_percent) = match length {
        Length::Steps(steps) => (steps, u64::MAX, 25),
        Length::Operations(operations) => (40 * operations, operations, 1),
    };
    let kinds = [
        Kind::Write,
        Kind::Read,
        Kind::Flush,
        Kind::Zero { hole: true, fast: false },
        Kind::Zero { hole: false, fast: false },
        Kind::Trim,
    ];
    let swarm = Swarm::draw(kinds.len(), &mut world.random);
    let eager_percent = 20 + world.random.below(60);
    let raises_at = if world.random.chance(30) { world.random.below(steps) } else { steps };
    let fails = |e: String| format!("seed {seed}: {e}");
    let mut failed_for = 0;
    for step in 0..steps {
        if world.disk.started() >= operations || failed_for > FAILED_STEPS {
            break;
        }
        failed_for += u64::from(world.core.failed().is_some());
        if step == raises_at {
            world.raise();
        }
        let has_room = world.asked.len() < IN_FLIGHT_MAX;
        if has_room && world.random.chance(eager_percent) {
            let kind = kinds[swarm.pick(&mut world.random)];
            world.submit(kind, marks);
        } else {
            world.step_disk();
        }
        world.serve(marks).map_err(fails)?;
        if world.random.chance(crash_percent) {
            world.crash().map_err(fails)?;
        }
    }
    world.settle(marks).map_err(fails)?;
    marks.hit_if("the volume is failed", world.core.failed().is_some());
    Ok((world.crash_points, world.disk.started()))
}

/// Some disks are sound, some cut transfers short, some fail now and then.
fn draw_faults(random: &mut Random) -> Faults {
    let sometimes = |random: &mut Random, percent| if random.chance(40) { percent } else { 0 };
    Faults {
        nth: None,
        errno: if random.chance(50) { EIO } else { 28 },
        short_percent: sometimes(random, 40),
        fail_percent: sometimes(random, 2),
        fail_sync_percent: sometimes(random, 10),
    }
}

/// Ten million in the long run.
#[test]
fn what_was_made_durable_survives_three_hundred_thousand_crashes() {
    let wanted = if is_full() { 10_000_000 } else { 300_000 };
    let first = seed_from_environment();
    eprintln!("SEED={first}");
    let (mut marks, mut seeds, mut points, mut lives) =
        (Marks::default(), Random::new(first), 0, 0);
    while points < wanted {
        let seed = seeds.next();
        let faults = draw_faults(&mut seeds);
        let (crashes, _) = history(seed, Length::Steps(120), None, faults, &mut marks).unwrap();
        points += crashes;
        lives += 1;
    }
    eprintln!("{points} crashes in {lives} histories");
    marks.demand(&[
        "a change waits for another",
        "changes run side by side",
        "a flush waits for the next sync",
        "a partial block is merged",
        "a part of a block is zeroed",
        "a fenced writer is refused",
        "a failure is told",
        "the volume is failed",
    ]);
}

/// A workload that has every kind of operation, none of them rare.
fn mixed_workload(seeds: &mut Random, length: Length) -> (u64, u64) {
    loop {
        let (seed, mut marks) = (seeds.next(), Marks::default());
        let (_, operations) = history(seed, length, None, Faults::default(), &mut marks).unwrap();
        let kinds = ["a sync is started", "a durable write is started", "a hole is started"];
        if kinds.into_iter().all(|kind| marks.has(kind)) {
            return (seed, operations);
        }
    }
}

/// Each operation of a workload in turn, of whatever kind it is: it fails, is
/// cut short, or moves nothing. The life then goes on to its end.
#[test]
fn each_of_two_thousand_operations_may_fail_in_turn() {
    const LENGTH: Length = Length::Operations(2000);
    let first = seed_from_environment();
    eprintln!("SEED={first}");
    let mut seeds = Random::new(first);
    let (seed, operations) = mixed_workload(&mut seeds, LENGTH);
    assert!(operations >= 2000, "{operations}");
    let faults = [Fault::Fails(EIO), Fault::Fails(28), Fault::Short, Fault::Nothing];
    let marks = std::thread::scope(|scope| {
        let runs = faults.map(|fault| {
            scope.spawn(move || {
                let mut marks = Marks::default();
                for nth in 1..=operations {
                    let faults = Faults { nth: Some((nth, fault)), ..Faults::default() };
                    history(seed, LENGTH, None, faults, &mut marks)
                        .unwrap_or_else(|e| panic!("operation {nth}, {fault:?}: {e}"));
                }
                marks
            })
        });
        runs.map(|run| run.join().unwrap())
    });
    for marks in marks {
        marks.demand(&[
            "the fault falls on a read",
            "the fault falls on a write",
            "the fault falls on a durable write",
            "the fault falls on a hole",
            "the fault falls on a sync",
        ]);
    }
    eprintln!("{operations} operations, {} times each", faults.len());
}

#[test]
fn each_planted_mistake_is_found() {
    const HISTORIES_MAX: u64 = 20_000;
    let first = seed_from_environment();
    eprintln!("SEED={first}");
    for mistake in Mistake::ALL {
        let mut seeds = Random::new(first);
        let found = (1..=HISTORIES_MAX).find_map(|count| {
            let seed = seeds.next();
            let faults = draw_faults(&mut seeds);
            let life = Length::Steps(120);
            let told = history(seed, life, Some(mistake), faults, &mut Marks::default()).err()?;
            Some((count, told))
        });
        let Some((count, told)) = found else {
            panic!("{mistake:?} was not found in {HISTORIES_MAX} histories");
        };
        eprintln!("{mistake:?}: found in history {count}: {}", &told[..told.len().min(160)]);
    }
}
