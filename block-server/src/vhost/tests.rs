//! The rings against a naive driver, a hostile one, and a server that is killed
//! between any two steps.

use std::cell::RefCell;
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::block::{Deed, Disk, Malformed, Status, id_of};
use super::inflight::{Part, part_bytes};
use super::memory::{Fault, Memory};
use super::queue::{Agreed, Broken, CHAIN_MAX, Chain, Places, Queue, Segment};
use crate::volume::{Geometry, Kind};

/// A guest's memory in a vector.
struct Bytes(RefCell<Vec<u8>>);

impl Bytes {
    fn new(length: usize) -> Self {
        Self(RefCell::new(vec![0; length]))
    }

    fn range(&self, at: u64, length: u64) -> Result<std::ops::Range<usize>, Fault> {
        let end = at.checked_add(length).filter(|e| *e <= self.0.borrow().len() as u64);
        end.map(|end| at as usize..end as usize).ok_or(Fault { at, length })
    }

    fn put(&self, at: u64, bytes: &[u8]) {
        self.write(at, bytes).unwrap();
    }

    fn u32(&self, at: u64) -> u32 {
        let mut bytes = [0; 4];
        self.read(at, &mut bytes).unwrap();
        u32::from_le_bytes(bytes)
    }
}

impl Memory for Bytes {
    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), Fault> {
        let range = self.range(at, into.len() as u64)?;
        into.copy_from_slice(&self.0.borrow()[range]);
        Ok(())
    }

    fn write(&self, at: u64, from: &[u8]) -> Result<(), Fault> {
        let range = self.range(at, from.len() as u64)?;
        self.0.borrow_mut()[range].copy_from_slice(from);
        Ok(())
    }

    fn load(&self, at: u64) -> Result<u16, Fault> {
        let mut bytes = [0; 2];
        self.read(at, &mut bytes)?;
        Ok(u16::from_le_bytes(bytes))
    }

    fn store(&self, at: u64, value: u16) -> Result<(), Fault> {
        self.write(at, &value.to_le_bytes())
    }

    fn covers(&self, at: u64, length: u64) -> bool {
        self.range(at, length).is_ok()
    }
}

const SIZE: u16 = 16;
const PLACES: Places = Places { descriptors: 0, available: 0x400, used: 0x800 };
const TABLES: u64 = 0x1000;
const DATA: u64 = 0x8000;
const MEMORY: usize = 0x2_0000;
const ALL: Agreed = Agreed { event_index: true, indirect: true };

fn descriptor(memory: &Bytes, table: u64, index: u16, at: u64, length: u32, flags: u16, next: u16) {
    let mut bytes = Vec::new();
    bytes.extend(at.to_le_bytes());
    bytes.extend(length.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(next.to_le_bytes());
    memory.put(table + 16 * u64::from(index), &bytes);
}

/// The driver's side, as plainly as it can be written.
struct Driver<'a> {
    memory: &'a Bytes,
    free: Vec<u16>,
    available: u16,
    seen: u16,
    /// By head: its descriptors.
    out: BTreeMap<u16, Vec<u16>>,
}

impl<'a> Driver<'a> {
    fn new(memory: &'a Bytes) -> Self {
        Self { memory, free: (0..SIZE).collect(), available: 0, seen: 0, out: BTreeMap::new() }
    }

    /// Announces a request, if there is room.
    fn add(&mut self, segments: &[(Segment, bool)], indirect: bool) -> Option<u16> {
        let needed = if indirect { 1 } else { segments.len() };
        if self.free.len() < needed {
            return None;
        }
        let mine = self.free.split_off(self.free.len() - needed);
        let head = mine[0];
        let table = if indirect { TABLES + 0x400 * u64::from(head) } else { PLACES.descriptors };
        let places: Vec<u16> =
            if indirect { (0..segments.len() as u16).collect() } else { mine.clone() };
        for (i, (segment, writable)) in segments.iter().enumerate() {
            let next = places.get(i + 1);
            let flags = u16::from(next.is_some()) | u16::from(*writable) << 1;
            let next = next.copied().unwrap_or(0);
            descriptor(self.memory, table, places[i], segment.at, segment.length, flags, next);
        }
        if indirect {
            let length = 16 * segments.len() as u32;
            descriptor(self.memory, PLACES.descriptors, head, table, length, 4, 0);
        }
        let slot = PLACES.available + 4 + 2 * u64::from(self.available % SIZE);
        self.memory.store(slot, head).unwrap();
        self.available = self.available.wrapping_add(1);
        self.memory.store(PLACES.available + 2, self.available).unwrap();
        self.out.insert(head, mine);
        Some(head)
    }

    /// The next request that was answered, and how much was written.
    fn reap(&mut self) -> Option<(u16, u32)> {
        if self.memory.load(PLACES.used + 2).unwrap() == self.seen {
            return None;
        }
        let slot = PLACES.used + 4 + 8 * u64::from(self.seen % SIZE);
        let head = self.memory.u32(slot) as u16;
        self.seen = self.seen.wrapping_add(1);
        self.free.extend(self.out.remove(&head).expect("answered once"));
        Some((head, self.memory.u32(slot + 4)))
    }

    fn wish_call_at(&self, index: u16) {
        self.memory.store(PLACES.available + 4 + 2 * u64::from(SIZE), index).unwrap();
    }

    fn wished_kick_at(&self) -> u16 {
        self.memory.load(PLACES.used + 4 + 8 * u64::from(SIZE)).unwrap()
    }
}

fn segments() -> impl Strategy<Value = Vec<(Segment, bool)>> {
    let one = (DATA..MEMORY as u64 - 0x1000, 1..0x1000_u32);
    (prop::collection::vec(one, 1..6), 0..6_usize).prop_map(|(all, readable)| {
        let segment = |(i, (at, length))| (Segment { at, length }, i >= readable);
        all.into_iter().enumerate().map(segment).collect()
    })
}

#[derive(Debug, Clone)]
enum Step {
    Add(Vec<(Segment, bool)>, bool),
    Pop,
    Answer(usize),
    Reap,
    /// The guest wants to be called so far ahead.
    Wish(u16),
    AskForKicks,
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        3 => (segments(), any::<bool>()).prop_map(|(s, i)| Step::Add(s, i)),
        3 => Just(Step::Pop),
        2 => any::<usize>().prop_map(Step::Answer),
        2 => Just(Step::Reap),
        1 => (0..4_u16).prop_map(Step::Wish),
        1 => Just(Step::AskForKicks),
    ];
    prop::collection::vec(step, 1..200)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// What the driver lays out is what the device takes, in order; what is
    /// answered is what the driver reaps, in order; and nobody who wished to be
    /// told is left to wait.
    #[test]
    fn a_ring_agrees_with_a_naive_driver(steps in steps(), event_index: bool) {
        let memory = Bytes::new(MEMORY);
        let mut driver = Driver::new(&memory);
        let agreed = Agreed { event_index, indirect: true };
        let mut queue = Queue::new(&memory, SIZE, PLACES, agreed, 0).unwrap();
        let mut announced = std::collections::VecDeque::new();
        let mut answered = std::collections::VecDeque::new();
        let mut taken = Vec::new();
        let (mut chain, mut called, mut wish) = (Chain::default(), 0_u16, 0_u16);
        for step in steps {
            match step {
                Step::Add(segments, indirect) => {
                    if let Some(head) = driver.add(&segments, indirect) {
                        announced.push_back((head, segments));
                    }
                }
                Step::Pop => {
                    let came = queue.pop(&memory, &mut chain).unwrap();
                    prop_assert_eq!(came, !announced.is_empty());
                    if let Some((head, segments)) = announced.pop_front() {
                        let side = |w| {
                            segments.iter().filter(|s| s.1 == w).map(|s| s.0).collect::<Vec<_>>()
                        };
                        prop_assert_eq!(chain.head, head);
                        prop_assert_eq!(&chain.readable, &side(false));
                        prop_assert_eq!(&chain.writable, &side(true));
                        taken.push(head);
                    }
                }
                Step::Answer(which) if !taken.is_empty() => {
                    let head = taken.swap_remove(which % taken.len());
                    queue.push(&memory, head, u32::from(head) + 7).unwrap();
                    answered.push_back(head);
                }
                Step::Answer(_) => {}
                Step::Reap => {
                    let calls = queue.must_call(&memory).unwrap();
                    let now = queue.next_used();
                    // Naively: did the count pass what was wished for?
                    let mut passed = false;
                    let mut at = called;
                    while at != now {
                        passed |= at == wish || !event_index;
                        at = at.wrapping_add(1);
                    }
                    prop_assert!(calls || !passed, "a call was due and did not come");
                    called = now;
                    for _ in 0..answered.len() {
                        let head = answered.pop_front().unwrap();
                        prop_assert_eq!(driver.reap(), Some((head, u32::from(head) + 7)));
                    }
                    prop_assert_eq!(driver.reap(), None);
                }
                Step::Wish(ahead) => {
                    wish = queue.next_used().wrapping_add(ahead);
                    driver.wish_call_at(wish);
                    if !event_index {
                        memory.store(PLACES.available, 0).unwrap();
                    }
                }
                Step::AskForKicks => {
                    let more = queue.ask_for_kicks(&memory).unwrap();
                    prop_assert_eq!(more, !announced.is_empty());
                    if event_index {
                        prop_assert_eq!(driver.wished_kick_at(), queue.next_available());
                    }
                }
            }
            prop_assert_eq!(usize::from(queue.in_flight()), taken.len());
        }
    }
}

/// A small generator of our own: ten thousand cases in a blink.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, sides: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % sides
    }
}

/// The guest's rings are filled with lawful requests and then spoilt: each walk
/// ends, with chains that lie within memory or with a broken ring.
#[test]
fn ten_thousand_spoilt_rings_break_their_own_device_and_nothing_else() {
    let mut dice = Dice(0x9e37_79b9_7f4a_7c15);
    let (mut broken, mut lawful) = (0, 0);
    for round in 0..10_000 {
        let memory = Bytes::new(MEMORY);
        let mut driver = Driver::new(&memory);
        for _ in 0..=dice.roll(8) {
            let writable = dice.roll(2) == 1;
            let one = |at, length| Segment { at: DATA + at, length };
            let list = [(one(0, 16), false), (one(0x200, 512), writable), (one(0x1000, 1), true)];
            driver.add(&list, dice.roll(2) == 1);
        }
        for _ in 0..=dice.roll(12) {
            // Anywhere in rings and tables, any byte; often where it hurts.
            let at = if dice.roll(3) == 0 {
                PLACES.available + dice.roll(40)
            } else {
                dice.roll(TABLES + 0x400 * u64::from(SIZE))
            };
            memory.put(at, &[dice.roll(256) as u8]);
        }
        let agreed = Agreed { event_index: round % 2 == 0, indirect: round % 3 != 0 };
        let mut queue = Queue::new(&memory, SIZE, PLACES, agreed, 0).unwrap();
        let mut chain = Chain::default();
        let disk = disk(false);
        for _ in 0..=SIZE {
            match queue.pop(&memory, &mut chain) {
                Ok(false) => break,
                Ok(true) => {
                    let all = chain.readable.iter().chain(&chain.writable);
                    assert!(chain.readable.len() + chain.writable.len() <= CHAIN_MAX);
                    for s in all {
                        assert!(memory.covers(s.at, u64::from(s.length)));
                    }
                    if let Ok(asked) = disk.understand(&memory, &mut chain)
                        && let Deed::Volume(_) = asked.deed
                    {
                        assert!(asked.offset + asked.length <= disk.geometry.size);
                    }
                    lawful += 1;
                }
                Err(_) => {
                    broken += 1;
                    break;
                }
            }
        }
    }
    assert!(broken > 1000 && lawful > 1000, "{broken} broken, {lawful} lawful");
}

#[test]
fn each_rule_of_the_rings_is_kept() {
    type Spoil = fn(&Bytes);
    let cases: [(&str, Spoil, Broken); 9] = [
        ("a loop", |m| descriptor(m, 0, 0, DATA, 16, 1, 0), Broken::Long),
        (
            "a successor outside",
            |m| descriptor(m, 0, 0, DATA, 16, 1, SIZE),
            Broken::Index { index: SIZE, count: SIZE },
        ),
        (
            "an overflow",
            |m| descriptor(m, 0, 0, u64::MAX - 4, 16, 0, 0),
            Broken::Fault(Fault { at: u64::MAX - 4, length: 16 }),
        ),
        ("nothing", |m| descriptor(m, 0, 0, DATA, 0, 0, 0), Broken::Empty),
        (
            "the wrong order",
            |m| {
                descriptor(m, 0, 0, DATA, 16, 3, 1);
                descriptor(m, 0, 1, DATA, 16, 0, 0);
            },
            Broken::Order,
        ),
        (
            "a torn table",
            |m| descriptor(m, 0, 0, TABLES, 17, 4, 0),
            Broken::Indirect { length: 17 },
        ),
        (
            "a table in a table",
            |m| {
                descriptor(m, 0, 0, TABLES, 16, 4, 0);
                descriptor(m, TABLES, 0, TABLES, 32, 4, 0);
            },
            Broken::Indirect { length: 32 },
        ),
        (
            "an announcement too far",
            |m| m.store(PLACES.available + 2, SIZE + 1).unwrap(),
            Broken::Ahead { pending: SIZE + 1, size: SIZE },
        ),
        (
            "a head outside",
            |m| m.store(PLACES.available + 4, SIZE).unwrap(),
            Broken::Index { index: SIZE, count: SIZE },
        ),
    ];
    for (name, spoil, expected) in cases {
        let memory = Bytes::new(MEMORY);
        memory.store(PLACES.available + 2, 1).unwrap();
        descriptor(&memory, 0, 0, DATA, 16, 0, 0);
        spoil(&memory);
        let mut queue = Queue::new(&memory, SIZE, PLACES, ALL, 0).unwrap();
        assert_eq!(queue.pop(&memory, &mut Chain::default()), Err(expected), "{name}");
    }
    let memory = Bytes::new(MEMORY);
    memory.store(PLACES.available + 2, 2).unwrap();
    descriptor(&memory, 0, 0, DATA, 16, 0, 0);
    let mut queue = Queue::new(&memory, SIZE, PLACES, ALL, 0).unwrap();
    assert_eq!(queue.pop(&memory, &mut Chain::default()), Ok(true));
    let again = queue.pop(&memory, &mut Chain::default());
    assert_eq!(again, Err(Broken::Repeated { head: 0 }));
    for (size, places) in [
        (SIZE + 1, PLACES),
        (2048, PLACES),
        (SIZE, Places { used: MEMORY as u64 - 8, ..PLACES }),
        (SIZE, Places { descriptors: 8, ..PLACES }),
        (SIZE, Places { available: 0x401, ..PLACES }),
    ] {
        assert!(Queue::new(&memory, size, places, ALL, 0).is_err(), "{size} {places:?}");
    }
}

fn disk(read_only: bool) -> Disk {
    Disk {
        geometry: Geometry { size: 1 << 20, alignment: 4096 },
        read_only,
        queues: 1,
        id: id_of("vol-0123456789abcdef0"),
    }
}

/// A request of this kind, laid out in pieces of `cut` bytes.
fn ask(memory: &Bytes, kind: u32, sector: u64, out: &[u8], room: u32, cut: usize) -> Chain {
    let mut bytes = Vec::new();
    bytes.extend(kind.to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(sector.to_le_bytes());
    bytes.extend(out);
    memory.put(DATA, &bytes);
    let split = |start: u64, length: usize| {
        (0..length)
            .step_by(cut)
            .map(|i| Segment { at: start + i as u64, length: cut.min(length - i) as u32 })
            .collect()
    };
    Chain {
        head: 3,
        readable: split(DATA, bytes.len()),
        writable: split(DATA + 0x8000, room as usize),
    }
}

#[test]
fn requests_mean_what_virtio_says_however_they_are_cut() {
    let refused = |status| Deed::Refuse(status);
    let range = |sector: u64, count: u32, flags: u32| {
        let mut bytes = sector.to_le_bytes().to_vec();
        bytes.extend(count.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes
    };
    let whole = 1 << 20;
    let hole = Kind::Zero { hole: true, fast: false };
    type Case = (u32, u64, Vec<u8>, u32, Deed, u64, u64);
    let cases: Vec<Case> = vec![
        (0, 2, vec![], 513, Deed::Volume(Kind::Read), 1024, 512),
        (0, 2047, vec![], 513, Deed::Volume(Kind::Read), 2047 * 512, 512),
        (0, 2048, vec![], 513, refused(Status::IoError), 0, 0),
        (0, u64::MAX / 512, vec![], 513, refused(Status::IoError), 0, 0),
        (0, u64::MAX, vec![], 513, refused(Status::IoError), 0, 0),
        (0, 0, vec![], 512, refused(Status::IoError), 0, 0),
        (1, 1, vec![7; 1024], 1, Deed::Volume(Kind::Write), 512, 1024),
        (1, 0, vec![7; 100], 1, refused(Status::IoError), 0, 0),
        (4, 99, vec![], 1, Deed::Volume(Kind::Flush), 0, 0),
        (8, 0, vec![], 21, Deed::Identify, 0, 20),
        (11, 0, range(8, 16, 0), 1, Deed::Volume(Kind::Trim), 4096, 8192),
        (11, 0, range(8, 16, 1), 1, refused(Status::Unsupported), 0, 0),
        (11, 0, range(2047, 2, 0), 1, refused(Status::IoError), 0, 0),
        (11, 0, range(0, u32::MAX, 0), 1, refused(Status::IoError), 0, 0),
        (11, 0, vec![0; 32], 1, refused(Status::IoError), 0, 0),
        (11, 0, vec![0; 8], 1, refused(Status::IoError), 0, 0),
        (13, 0, range(0, 2048, 1), 1, Deed::Volume(hole), 0, whole),
        (13, 0, range(0, 1, 2), 1, refused(Status::Unsupported), 0, 0),
        (99, 0, vec![], 1, refused(Status::Unsupported), 0, 0),
    ];
    for (kind, sector, out, room, deed, offset, length) in cases {
        for cut in [1, 5, 16, 17, 4096] {
            let memory = Bytes::new(MEMORY);
            let mut chain = ask(&memory, kind, sector, &out, room, cut);
            let asked = disk(false).understand(&memory, &mut chain).unwrap();
            assert_eq!((asked.deed, asked.offset, asked.length), (deed, offset, length), "{kind}");
            assert_eq!(asked.status_at, DATA + 0x8000 + u64::from(room) - 1);
            let left: u64 = chain.writable.iter().map(|s| u64::from(s.length)).sum();
            assert_eq!(left, u64::from(room) - 1);
        }
    }
    let memory = Bytes::new(MEMORY);
    for kind in [1, 11, 13] {
        let out = if kind == 1 { vec![0; 512] } else { range(0, 1, 0) };
        let mut chain = ask(&memory, kind, 0, &out, 1, 4096);
        let asked = disk(true).understand(&memory, &mut chain).unwrap();
        assert_eq!(asked.deed, refused(Status::IoError), "a read-only disk keeps what it has");
    }
    let mut chain = ask(&memory, 0, 0, &[], 0, 64);
    assert_eq!(disk(false).understand(&memory, &mut chain), Err(Malformed::Status));
    let mut chain = ask(&memory, 0, 0, &[], 1, 64);
    chain.readable[0].length = 15;
    assert_eq!(disk(false).understand(&memory, &mut chain), Err(Malformed::Header));
}

#[test]
fn a_disk_tells_its_size_its_block_and_its_volume() {
    let config = disk(false).config();
    assert_eq!(config[..8], 2048_u64.to_le_bytes());
    assert_eq!(config[20..24], 512_u32.to_le_bytes());
    assert_eq!(config[24], 3, "2^3 sectors make a physical block of 4096");
    assert_eq!(&disk(false).id, b"vol0123456789abcdef0");
}

/// A server is killed after each step of answering; the next one begins with
/// exactly what was not answered, in the order in which it was taken.
#[test]
fn a_killed_server_leaves_what_was_not_answered_and_nothing_else() {
    #[derive(Clone, Copy, PartialEq, PartialOrd)]
    enum Killed {
        BeforeAnswering,
        BeforeIndex,
        AfterIndex,
        Never,
    }
    let mut dice = Dice(77);
    for killed in [Killed::BeforeAnswering, Killed::BeforeIndex, Killed::AfterIndex, Killed::Never]
    {
        for _ in 0..200 {
            let memory = Bytes::new(part_bytes(SIZE) as usize + 64);
            let start_used = dice.roll(65536) as u16;
            let (mut part, left) = Part::open(&memory, 64, SIZE, start_used).unwrap();
            assert!(left.is_empty());
            let (mut used, mut taken) = (start_used, Vec::new());
            for _ in 0..dice.roll(60) {
                if dice.roll(2) == 0 && taken.len() < usize::from(SIZE) {
                    let head = (0..SIZE).find(|h| !taken.contains(h)).unwrap();
                    part.mark(&memory, head).unwrap();
                    taken.push(head);
                } else if !taken.is_empty() {
                    let head = taken.remove(dice.roll(taken.len() as u64) as usize);
                    part.answering(&memory, head).unwrap();
                    used = used.wrapping_add(1);
                    part.answered(&memory, head, used).unwrap();
                }
            }
            if !taken.is_empty() && killed != Killed::Never {
                let which = dice.roll(taken.len() as u64) as usize;
                if killed > Killed::BeforeAnswering {
                    part.answering(&memory, taken[which]).unwrap();
                }
                if killed == Killed::AfterIndex {
                    used = used.wrapping_add(1);
                    taken.remove(which);
                }
            }
            let (_, left) = Part::open(&memory, 64, SIZE, used).unwrap();
            assert_eq!(left, taken);
            let (_, again) = Part::open(&memory, 64, SIZE, used).unwrap();
            assert_eq!(again, taken, "looking changes nothing");
        }
    }
}

/// The region is the peer's memory too: whatever it holds, opening it ends, and
/// names heads of the ring only, each once.
#[test]
fn a_spoilt_record_of_what_is_in_flight_is_bounded() {
    let mut dice = Dice(5);
    for _ in 0..10_000 {
        let memory = Bytes::new(part_bytes(SIZE) as usize);
        Part::open(&memory, 0, SIZE, 0).unwrap();
        for _ in 0..dice.roll(64) {
            let at = dice.roll(part_bytes(SIZE));
            memory.put(at, &[dice.roll(256) as u8]);
        }
        let used = dice.roll(65536) as u16;
        let (_, mut left) = Part::open(&memory, 0, SIZE, used).unwrap();
        left.sort_unstable();
        left.dedup();
        assert!(left.len() <= usize::from(SIZE) && left.iter().all(|head| *head < SIZE));
    }
}
