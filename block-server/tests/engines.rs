//! The simulator believes our idea of a disk. One script, run by the same core
//! on the simulated disk and on both real engines, must end the same on all.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use block_server::backing::{Backing, Cache};
use block_server::engine::threads::Threads;
use block_server::engine::uring::Uring;
use block_server::engine::{Buffer, Completion, Engine, FileId, Io, Pool, Wait};
use block_server::volume::{Core, Geometry, Kind, Op, Outcome, Request, Ticket, Token};
use sim::{Disk, Done, Random, seed_from_environment};

const SIZE: u64 = 256 << 10;

enum Below {
    Simulated(Disk, BTreeMap<u64, (Ticket, usize)>, Random),
    /// The descriptor is kept open for the engine.
    Real(Box<dyn Engine>, FileId, #[expect(dead_code)] OwnedFd),
}

struct Run {
    core: Core,
    below: Below,
    pool: Pool,
    buffers: BTreeMap<Ticket, (Buffer, usize, usize)>,
    zeros: Buffer,
    running: usize,
    next: Ticket,
    told: Vec<(Ticket, Result<Vec<u8>, i32>)>,
}

impl Run {
    fn new(below: Below, pool: Pool, alignment: u32) -> Self {
        Self {
            core: Core::new(Geometry { size: SIZE, alignment }, 0, None),
            below,
            zeros: pool.take(block_server::volume::ZEROS_MAX as usize),
            pool,
            buffers: BTreeMap::new(),
            running: 0,
            next: 0,
            told: Vec::new(),
        }
    }

    fn submit(&mut self, kind: Kind, offset: u64, length: u64, fua: bool) {
        let ticket = self.next;
        self.next += 1;
        let layout = self.core.layout(kind, offset, length);
        let mut buffer = self.pool.take(layout.capacity);
        if kind == Kind::Write {
            let payload = &mut buffer.bytes_mut()[layout.payload_at..][..length as usize];
            for (index, byte) in payload.iter_mut().enumerate() {
                *byte = (ticket as usize * 31 + index / 16) as u8;
            }
        }
        self.buffers.insert(ticket, (buffer, layout.payload_at, length as usize));
        self.core.submit(Request { ticket, kind, offset, length, fua, generation: None });
    }

    /// Until nothing runs. What was read is told, in the order of the tickets.
    fn settle(&mut self) -> Vec<(Ticket, Result<Vec<u8>, i32>)> {
        loop {
            while let Some((token, op)) = self.core.next_op() {
                self.start(token, op);
            }
            while let Some(reply) = self.core.next_reply() {
                let (buffer, at, length) = self.buffers.remove(&reply.ticket).unwrap();
                let length = length.min(buffer.capacity() - at);
                let bytes = reply.result.map(|_| buffer.bytes()[at..at + length].to_vec());
                self.told.push((reply.ticket, bytes));
            }
            if self.running == 0 {
                let mut told = std::mem::take(&mut self.told);
                told.sort_by_key(|(ticket, _)| *ticket);
                return told;
            }
            self.reap();
        }
    }

    fn start(&mut self, token: Token, op: Op) {
        if let Op::Copy { ticket, from, to, length } = op {
            let (buffer, ..) = self.buffers.get_mut(&ticket).unwrap();
            return buffer.bytes_mut().copy_within(from..from + length, to);
        }
        if let Op::Fill { ticket, at, length } = op {
            let (buffer, ..) = self.buffers.get_mut(&ticket).unwrap();
            return buffer.bytes_mut()[at..at + length].fill(0);
        }
        self.running += 1;
        let id = u64::from(token.0);
        match &mut self.below {
            Below::Simulated(disk, places, _) => match op {
                Op::Read { ticket, at, offset, length } => {
                    places.insert(id, (ticket, at));
                    disk.start(id, sim::Op::Read { offset, length });
                }
                Op::Write { ticket, at, offset, length, durable } => {
                    let data = self.buffers[&ticket].0.bytes()[at..at + length].to_vec();
                    disk.start(id, sim::Op::Write { offset, data, durable });
                }
                Op::Punch { offset, length }
                | Op::Zero { offset, length }
                | Op::WriteZeros { offset, length } => {
                    disk.start(id, sim::Op::Zero { offset, length: length as usize });
                }
                Op::Sync => disk.start(id, sim::Op::Sync),
                other => unreachable!("the script asks for no {other:?}"),
            },
            Below::Real(engine, file, _) => {
                let file = *file;
                let mut place = |ticket, at: usize| {
                    let (buffer, ..) = self.buffers.get_mut(&ticket).unwrap();
                    buffer.bytes_mut()[at..].as_mut_ptr()
                };
                let keep = libc::FALLOC_FL_KEEP_SIZE;
                let io = match op {
                    Op::Read { ticket, at, offset, length } => {
                        Io::Read { file, into: place(ticket, at), length, offset }
                    }
                    Op::Write { ticket, at, offset, length, durable } => {
                        Io::Write { file, from: place(ticket, at), length, offset, durable }
                    }
                    Op::Punch { offset, length } => {
                        let mode = keep | libc::FALLOC_FL_PUNCH_HOLE;
                        Io::Allocate { file, mode, offset, length }
                    }
                    Op::Zero { offset, length } => {
                        let mode = keep | libc::FALLOC_FL_ZERO_RANGE;
                        Io::Allocate { file, mode, offset, length }
                    }
                    Op::WriteZeros { offset, length } => {
                        let from = self.zeros.address().cast_const();
                        Io::Write { file, from, length: length as usize, offset, durable: false }
                    }
                    Op::Sync => Io::Sync { file },
                    other => unreachable!("the script asks for no {other:?}"),
                };
                // SAFETY: the buffers stay in the map until their reply, which
                // follows the completion.
                unsafe { engine.start(id, io) };
            }
        }
    }

    fn reap(&mut self) {
        let mut ended = Vec::new();
        match &mut self.below {
            Below::Simulated(disk, places, random) => {
                let (id, done) = disk.step(random).expect("something runs");
                let outcome = match done {
                    Done::Read(data) => {
                        let (ticket, at) = places[&id];
                        let (buffer, ..) = self.buffers.get_mut(&ticket).unwrap();
                        buffer.bytes_mut()[at..at + data.len()].copy_from_slice(&data);
                        Outcome::Done(data.len())
                    }
                    Done::Written(count) => Outcome::Done(count),
                    Done::Synced => Outcome::Done(0),
                    Done::Failed(errno) => Outcome::Failed(errno),
                };
                ended.push((id, outcome));
            }
            Below::Real(engine, ..) => {
                let mut completions = Vec::new();
                // An engine may come back early with nothing, as after a late wake-up.
                for _ in 0..8 {
                    engine.reap(Wait::UpTo(Duration::from_secs(5)), &mut completions).unwrap();
                    if !completions.is_empty() {
                        break;
                    }
                }
                assert!(!completions.is_empty(), "nothing came back");
                ended.extend(completions.into_iter().map(|c| {
                    let failed = c.result < 0;
                    let outcome = if failed {
                        Outcome::Failed(-c.result)
                    } else {
                        Outcome::Done(c.result as usize)
                    };
                    (c.token, outcome)
                }));
            }
        }
        for (id, outcome) in ended {
            self.running -= 1;
            self.core.complete(Token(id as u32), outcome);
        }
    }
}

/// Rounds of changes that may overlap, each followed by reading everything.
fn script(run: &mut Run, seed: u64) -> Vec<(Ticket, Result<Vec<u8>, i32>)> {
    let mut random = Random::new(seed);
    let mut told = Vec::new();
    for _ in 0..40 {
        for _ in 0..1 + random.below(8) {
            let unit = if random.chance(50) { 4096 } else { 512 };
            let offset = random.below(SIZE / unit) * unit;
            let length = (1 + random.below(24)) * unit;
            let length = length.min(SIZE - offset);
            let kind = match random.below(8) {
                0 => Kind::Flush,
                1 => Kind::Zero { hole: true, fast: false },
                2 => Kind::Zero { hole: false, fast: false },
                _ => Kind::Write,
            };
            let fua = random.chance(20);
            if kind == Kind::Flush {
                run.submit(kind, 0, 0, false);
            } else {
                run.submit(kind, offset, length, fua);
            }
        }
        told.extend(run.settle().into_iter().map(|(t, r)| (t, r.map(|_| Vec::new()))));
        run.submit(Kind::Read, 0, SIZE, false);
        let at = 512 * random.below(SIZE / 512 - 3);
        run.submit(Kind::Read, at, 1024, false);
        told.extend(run.settle());
    }
    told
}

#[test]
fn the_simulated_disk_and_both_engines_agree() {
    let seed = seed_from_environment();
    eprintln!("SEED={seed}");
    for alignment in [512, 4096] {
        let disk = Disk::new(&vec![0; SIZE as usize], alignment as usize);
        let simulated = Below::Simulated(disk, BTreeMap::new(), Random::new(seed));
        let expected = script(&mut Run::new(simulated, Pool::new(), alignment), seed);
        assert!(expected.iter().all(|(_, result)| result.is_ok()));
        for name in ["io_uring", "threads"] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("disk.img");
            std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
            let pool = Pool::new();
            let made: std::io::Result<Box<dyn Engine>> = match name {
                "threads" => Threads::new().map(|e| Box::new(e) as _),
                _ => Uring::new(&pool).map(|e| Box::new(e) as _),
            };
            let mut engine = match made {
                Ok(engine) => engine,
                Err(error) => {
                    eprintln!("SKIPPED the_simulated_disk_and_both_engines_agree: {name}: {error}");
                    continue;
                }
            };
            let backing = Backing::open(&path, false).unwrap();
            let file = engine.add_file(backing.fd.as_fd());
            let below = Below::Real(engine, file, backing.fd);
            let told = script(&mut Run::new(below, pool, alignment), seed);
            assert_eq!(told.len(), expected.len());
            for ((ticket, real), (_, simulated)) in told.iter().zip(&expected) {
                assert!(
                    real == simulated,
                    "{name}, alignment {alignment}: request {ticket} differs"
                );
            }
        }
    }
}

/// Starts to accept, and tells the kernel so.
fn listen(engine: &mut dyn Engine, listener: &UnixListener) {
    // SAFETY: accepting names no memory; the listener outlives the engine.
    unsafe { engine.start(7, Io::Accept { listener: listener.as_raw_fd() }) }
    engine.reap(Wait::No, &mut Vec::new()).unwrap();
}

/// As beside a ring whose server was killed, and which the kernel has not yet taken down.
#[test]
fn a_client_is_heard_beside_a_ring_that_does_nothing_any_more() {
    const LOOKS_MAX: usize = 300;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let (listens, wait) = std::sync::mpsc::channel();
    let (release, released) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let listener = &listener;
        scope.spawn(move || {
            let pool = Pool::new();
            let Ok(mut stuck) = Uring::new(&pool) else { return };
            listen(&mut stuck, listener);
            listens.send(()).unwrap();
            let _ = released.recv();
        });
        // No message: this host has no io_uring, and other tests say so.
        if wait.recv().is_err() {
            return;
        }
        let pool = Pool::new();
        let mut engine = Uring::new(&pool).unwrap();
        listen(&mut engine, listener);
        let _client = UnixStream::connect(&path).unwrap();
        let mut completions = Vec::new();
        for _ in 0..LOOKS_MAX {
            engine.reap(Wait::UpTo(Duration::from_millis(100)), &mut completions).unwrap();
            if !completions.is_empty() {
                break;
            }
        }
        drop(release);
        assert_eq!(completions.len(), 1, "the client waits in the backlog");
        assert_eq!(completions[0].token, 7);
        assert!(completions[0].result >= 0, "{}", completions[0].result);
        // SAFETY: the kernel has just made it, for us.
        drop(unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(completions[0].result) });
    });
}

const SPINS: Wait =
    Wait::SpinThen { spin: Duration::from_millis(1), sleep: Duration::from_millis(1) };

/// Until something has ended; `None` after far more turns than that takes.
fn ended(engine: &mut dyn Engine, wait: Wait) -> Option<Completion> {
    const TURNS_MAX: usize = 30_000;
    let mut completions = Vec::new();
    for _ in 0..TURNS_MAX {
        engine.reap(wait, &mut completions).unwrap();
        if !completions.is_empty() {
            assert_eq!(completions.len(), 1, "{completions:?}");
            return completions.pop();
        }
    }
    None
}

/// What a worker's receive may meet: a message that is there, one that comes when the
/// worker sleeps, an end before any comes, and others who keep the ring busy.
#[test]
fn a_receive_ends_once_whether_found_slept_for_cancelled_or_beside_others() {
    use std::io::Write;
    let pool = Pool::new();
    let Ok(mut engine) = Uring::new(&pool) else {
        println!(
            "SKIPPED a_receive_ends_once_whether_found_slept_for_cancelled_or_beside_others: no io_uring"
        );
        return;
    };
    let (mut peer, own) = UnixStream::pair().unwrap();
    let mut bytes = [0_u8; 16];
    let into = bytes.as_mut_ptr();
    let receive = Io::Receive { socket: own.as_raw_fd(), into, length: 16 };
    // SAFETY: the bytes and the socket outlive every operation: each is seen to end.
    let start = |engine: &mut Uring, token, io| unsafe { engine.start(token, io) };
    let is = |found: Option<Completion>, token, result| {
        assert_eq!(found, Some(Completion { token, result }));
    };

    start(&mut engine, 1, receive);
    peer.write_all(b"one").unwrap();
    is(ended(&mut engine, SPINS), 1, 3);

    start(&mut engine, 2, receive);
    let mut completions = Vec::new();
    engine.reap(SPINS, &mut completions).unwrap();
    assert!(completions.is_empty());
    peer.write_all(b"later").unwrap();
    is(ended(&mut engine, Wait::UpTo(Duration::from_millis(10))), 2, 5);

    start(&mut engine, 3, receive);
    engine.cancel(3);
    is(ended(&mut engine, SPINS), 3, -libc::ECANCELED);
    engine.reap(SPINS, &mut completions).unwrap();
    assert!(completions.is_empty(), "it ended once");

    // A socket that always has something keeps the ring busy.
    let (mut noisy, heard) = UnixStream::pair().unwrap();
    noisy.write_all(b"!").unwrap();
    peer.write_all(b"me too").unwrap();
    start(&mut engine, 4, receive);
    let mut turns = 0;
    while !completions.iter().any(|c| c.token == 4) {
        turns += 1;
        assert!(turns < 1000, "passed over for ever");
        completions.clear();
        start(&mut engine, 9, Io::Poll { socket: heard.as_raw_fd() });
        while completions.is_empty() {
            engine.reap(SPINS, &mut completions).unwrap();
        }
    }
    assert!(completions.contains(&Completion { token: 4, result: 6 }));
    assert_eq!(&bytes[..6], b"me too");
}

#[test]
fn a_read_through_the_cache_says_what_the_file_holds_and_where_it_ends() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.img");
    let held: Vec<u8> = (0..8192_u32).map(|i| (i / 7) as u8).collect();
    std::fs::write(&path, &held).unwrap();
    let pool = Pool::new();
    let mut engines: Vec<Box<dyn Engine>> = vec![Box::new(Threads::new().unwrap())];
    match Uring::new(&pool) {
        Ok(engine) => engines.push(Box::new(engine)),
        Err(error) => println!(
            "SKIPPED a_read_through_the_cache_says_what_the_file_holds_and_where_it_ends: io_uring: {error}"
        ),
    }
    for engine in &mut engines {
        let backing = Backing::open_cached(&path, false, Cache::Writeback).unwrap();
        let file = engine.add_file(backing.fd.as_fd());
        for (offset, count) in [(0, 4096), (100, 4096), (6000, 2192), (8192, 0)] {
            let mut buffer = pool.take(4096);
            let io = Io::Read { file, into: buffer.address(), length: 4096, offset };
            // SAFETY: the buffer outlives the operation, which is seen to end.
            unsafe { engine.start(5, io) }
            let found = ended(engine.as_mut(), Wait::UpTo(Duration::from_millis(10)));
            assert_eq!(found, Some(Completion { token: 5, result: count as i32 }), "at {offset}");
            let at = offset as usize;
            assert_eq!(buffer.bytes()[..count], held[at..at + count]);
        }
        engine.remove_file(file);
    }
}
