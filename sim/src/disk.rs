//! A disk with a volatile cache.
//!
//! ```text
//!   start ──▶ running ──(any order)──▶ cached ──sync or durable write──▶ durable
//!                │                        │                                 │
//!                └───── at a crash: any part, sector by sector ─────────────┴─▶ image
//! ```
//!
//! - Operations that run together end in any order.
//! - A sync covers what had *completed* when it *started*; of what completes
//!   while it runs, nothing is promised.
//! - A crash keeps what is durable. Each sector of what is cached or running may
//!   be there or not, in any of the versions that it had since.
//! - A sync that fails loses what it should have made durable, although reads
//!   show it until the crash, and the next sync succeeds (as Linux does since
//!   4.13; "fsyncgate"). So does a durable write that fails with EIO: it syncs too,
//!   and its error uses up the report.

use crate::Random;

/// What a crash keeps or loses as a whole. Tiny, so that a volume of a kilobyte
/// has many; what matters is that a block has several.
pub const SECTOR: usize = 16;

type Sector = [u8; SECTOR];

const EIO: i32 = 5;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Read { offset: u64, length: usize },
    Write { offset: u64, data: Vec<u8>, durable: bool },
    Zero { offset: u64, length: usize },
    Sync,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Done {
    Read(Vec<u8>),
    /// Bytes that were written; fewer than asked for is lawful.
    Written(usize),
    Synced,
    /// An errno.
    Failed(i32),
}

/// How one operation goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// With this errno. A write may have been done in part.
    Fails(i32),
    /// One grain is moved, where there are several.
    Short,
    /// Nothing is moved, and no error told: as at the end of a file that was cut.
    Nothing,
}

/// What goes wrong, and how often.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Faults {
    /// What befalls the operation of this number, counted from one.
    pub nth: Option<(u64, Fault)>,
    /// Of the failures that the percentages draw.
    pub errno: i32,
    /// Reads and writes that do less than asked for.
    pub short_percent: u64,
    pub fail_percent: u64,
    pub fail_sync_percent: u64,
}

#[derive(Debug, Clone)]
struct Cached {
    /// Grows with each sector that is written.
    sequence: u64,
    sector: usize,
    value: Sector,
}

#[derive(Debug, Clone)]
struct Running {
    token: u64,
    op: Op,
    number: u64,
    /// For a sync: it covers what was cached up to here.
    covers: u64,
}

#[derive(Debug, Clone)]
pub struct Disk {
    /// What reads see.
    visible: Vec<Sector>,
    durable: Vec<Sector>,
    cached: Vec<Cached>,
    sequence: u64,
    running: Vec<Running>,
    started: u64,
    /// Transfers are cut only at multiples of this.
    grain: usize,
    pub faults: Faults,
}

impl Disk {
    /// `image` is what is durable at first; transfers are cut at `grain` bytes.
    pub fn new(image: &[u8], grain: usize) -> Self {
        let durable: Vec<Sector> = image.as_chunks().0.to_vec();
        assert_eq!(durable.len() * SECTOR, image.len(), "whole sectors only");
        assert!(grain.is_multiple_of(SECTOR), "a transfer is cut between sectors");
        Self {
            visible: durable.clone(),
            durable,
            cached: Vec::new(),
            sequence: 0,
            running: Vec::new(),
            started: 0,
            grain,
            faults: Faults::default(),
        }
    }

    pub fn start(&mut self, token: u64, op: Op) {
        self.started += 1;
        self.running.push(Running { token, op, number: self.started, covers: self.sequence });
    }

    /// How many operations were started.
    pub fn started(&self) -> u64 {
        self.started
    }

    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    /// Ends one of the running operations, whichever it may be.
    pub fn step(&mut self, random: &mut Random) -> Option<(u64, Done)> {
        if self.running.is_empty() {
            return None;
        }
        let at = random.below(self.running.len() as u64) as usize;
        let Running { token, op, number, covers } = self.running.swap_remove(at);
        Some((token, self.perform(op, number, covers, random)))
    }

    fn perform(&mut self, op: Op, number: u64, covers: u64, random: &mut Random) -> Done {
        let Faults { nth, errno, fail_percent, fail_sync_percent, .. } = self.faults;
        let fault = nth.and_then(|(n, fault)| (n == number).then_some(fault));
        let (fails, errno) = match fault {
            Some(Fault::Fails(errno)) => (true, errno),
            _ => {
                let percent = if op == Op::Sync { fail_sync_percent } else { fail_percent };
                (random.chance(percent), errno)
            }
        };
        match op {
            Op::Read { .. } if fails => Done::Failed(errno),
            Op::Read { offset, length } => {
                let length = self.cut(length, fault, random);
                let first = offset as usize / SECTOR;
                Done::Read(self.visible[first..first + length / SECTOR].concat())
            }
            Op::Write { offset, mut data, durable } => {
                // A write that fails may have been done in part.
                let length = self.cut(data.len(), fault, random);
                data.truncate(if fails && random.chance(50) { 0 } else { length });
                self.put(offset as usize / SECTOR, &data, durable && !fails);
                if fails && durable && errno == EIO {
                    self.lose(covers);
                }
                if fails { Done::Failed(errno) } else { Done::Written(data.len()) }
            }
            Op::Zero { .. } if fails => Done::Failed(errno),
            Op::Zero { offset, length } => {
                self.put(offset as usize / SECTOR, &vec![0; length], false);
                Done::Written(length)
            }
            Op::Sync => {
                let covered = self.cached.iter().filter(|c| c.sequence <= covers);
                if fails {
                    self.lose(covers);
                    return Done::Failed(errno);
                }
                for cached in covered {
                    self.durable[cached.sector] = cached.value;
                }
                self.cached.retain(|c| c.sequence > covers);
                Done::Synced
            }
        }
    }

    /// What was cached up to here will never be durable, and nobody is told again.
    fn lose(&mut self, covers: u64) {
        self.cached.retain(|c| c.sequence > covers);
    }

    /// A length that is possibly shorter, but at least one grain unless the fault says so.
    fn cut(&self, length: usize, fault: Option<Fault>, random: &mut Random) -> usize {
        match fault {
            Some(Fault::Short) => return length.min(self.grain),
            Some(Fault::Nothing) => return 0,
            Some(Fault::Fails(_)) | None => {}
        }
        let grains = length / self.grain;
        if grains < 2 || !random.chance(self.faults.short_percent) {
            return length;
        }
        self.grain * (1 + random.below(grains as u64 - 1) as usize)
    }

    fn put(&mut self, first: usize, data: &[u8], durable: bool) {
        for (index, value) in data.as_chunks().0.iter().enumerate() {
            let sector = first + index;
            self.visible[sector] = *value;
            if durable {
                // What was cached of this sector is older: it cannot come back.
                self.cached.retain(|c| c.sector != sector);
                self.durable[sector] = *value;
            } else {
                self.sequence += 1;
                self.cached.push(Cached { sequence: self.sequence, sector, value: *value });
            }
        }
    }

    /// What a power loss at this moment might leave. The disk itself goes on.
    pub fn crash_image(&self, random: &mut Random) -> Vec<u8> {
        let mut image = self.durable.clone();
        let mut fates: Vec<Cached> = self.cached.clone();
        for running in &self.running {
            if let Op::Write { offset, data, .. } = &running.op {
                let first = *offset as usize / SECTOR;
                fates.extend(data.as_chunks().0.iter().enumerate().map(|(index, value)| Cached {
                    sequence: u64::MAX,
                    sector: first + index,
                    value: *value,
                }));
            }
        }
        // How much of the cache was on its way: nothing, all, or a part.
        let kept_percent = [0, 10, 50, 90, 100][random.below(5) as usize];
        for fate in fates {
            if random.chance(kept_percent) {
                image[fate.sector] = fate.value;
            }
        }
        image.concat()
    }

    /// What reads see at this moment.
    pub fn visible(&self) -> Vec<u8> {
        self.visible.concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(disk: &mut Disk, random: &mut Random, offset: u64, byte: u8, durable: bool) {
        disk.start(1, Op::Write { offset, data: vec![byte; 2 * SECTOR], durable });
        assert_eq!(disk.step(random), Some((1, Done::Written(2 * SECTOR))));
    }

    #[test]
    fn a_crash_tears_what_was_not_synced_and_keeps_what_was() {
        let mut random = Random::new(3);
        let mut disk = Disk::new(&[0; 8 * SECTOR], SECTOR);
        write(&mut disk, &mut random, 0, 1, false);
        disk.start(2, Op::Sync);
        assert_eq!(disk.step(&mut random), Some((2, Done::Synced)));
        write(&mut disk, &mut random, 0, 2, false);
        write(&mut disk, &mut random, 4 * SECTOR as u64, 3, true);
        let mut seen = std::collections::BTreeSet::new();
        for _ in 0..200 {
            let image = disk.crash_image(&mut random);
            assert_eq!(image[4 * SECTOR], 3, "a durable write stays");
            assert!(image[0] == 1 || image[0] == 2);
            seen.insert((image[0], image[SECTOR]));
        }
        assert_eq!(seen.len(), 4, "each half is lost or kept by itself: {seen:?}");
    }

    #[test]
    fn a_sync_does_not_cover_what_completes_while_it_runs() {
        let mut random = Random::new(3);
        let mut disk = Disk::new(&[0; 2 * SECTOR], SECTOR);
        disk.start(1, Op::Sync);
        disk.put(0, &[9; SECTOR], false);
        assert_eq!(disk.step(&mut random), Some((1, Done::Synced)));
        assert!((0..100).any(|_| disk.crash_image(&mut random)[0] == 0));
    }

    #[test]
    fn a_failed_sync_loses_data_that_a_later_one_cannot_save() {
        let mut random = Random::new(3);
        let mut disk = Disk::new(&[0; 2 * SECTOR], SECTOR);
        write(&mut disk, &mut random, 0, 1, false);
        disk.faults = Faults { nth: Some((2, Fault::Fails(5))), ..Faults::default() };
        disk.start(2, Op::Sync);
        assert_eq!(disk.step(&mut random), Some((2, Done::Failed(5))));
        disk.start(3, Op::Sync);
        assert_eq!(disk.step(&mut random), Some((3, Done::Synced)));
        assert_eq!(disk.visible()[0], 1);
        assert!((0..100).all(|_| disk.crash_image(&mut random)[0] == 0));
    }
}
