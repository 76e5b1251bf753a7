//! One thread that serves volumes: it owns an engine, the volumes' cores, the
//! connections and their buffers, and shares nothing but the way to the disk.
//!
//! ```text
//!            commands                     ┌────────── Worker ──────────┐
//!  control ───────────▶ channel + eventfd │ sessions ⇄ cores ⇄ engine  │ ⇄ kernel
//!          ◀─────────── events            └────────────────────────────┘
//! ```
//!
//! A volume is served by one worker only, with all its connections: ordering
//! and flushes need no lock. A connection that chose the volume of another worker
//! is sent there (`moving`). What may never be true: a wait for one peer while
//! another could be served; an operation whose memory is gone (every buffer and
//! message stays where it is until its completion came back).

mod accept;
mod border;
mod connection;
mod control;
mod device;
mod files;
mod guest;
mod moving;
mod obey;
mod park;
mod places;
mod quality;
mod serve;

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;
use tokio::sync::mpsc::UnboundedSender;

use crate::engine::{Buffer, Completion, Engine, FileId, Io, Pool, Token, Wait};
use crate::metrics::Counters;
use crate::nbd;
use crate::throttle::{Admission, Lane};
use crate::vhost::queue::Chain;
use crate::volume::{Core, ZEROS_MAX};

use connection::Connection;
pub use control::{
    Access, ConnectionInfo, EngineChoice, Event, Front, Gone, Handle, Home, NewVolume, Served,
};
use control::{Command, Waiter};
use device::{Device, GuestRequest};
pub use park::{Carried, Parked, Still};
pub use quality::set_slow_log;

/// That one process starts at most: each has a ring and 32 MiB of buffers.
pub const THREADS_MAX: i64 = 64;

/// One a core, and no more than these, serve where nobody says how many: each serves some
/// hundred thousand requests a second, and many would only take cores from the guests.
const THREADS_UNASKED_MAX: usize = 4;

/// How many threads serve, if so many were asked for.
pub fn threads(asked: Option<u16>) -> usize {
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    asked.map_or_else(|| cores().min(THREADS_UNASKED_MAX), usize::from)
}

/// How long a peer may take from connecting to transmission.
const HANDSHAKE_MAX: Duration = Duration::from_secs(30);

/// How long a connection that is being closed may take to fetch its last replies.
const DRAIN_MAX: Duration = Duration::from_secs(5);

/// How often deadlines are looked at.
const TICK: Duration = Duration::from_millis(500);

/// How long a worker looks for the peer's next message before it sleeps, when
/// messages came that fast before and no disk operation is awaited.
const SPIN: Duration = Duration::from_micros(50);

/// An operation that took less came from memory. After slower ones the peer has
/// gone to sleep, and a worker that spins meanwhile takes the core that it or
/// the disk wakes up on.
const OP_QUICK: Duration = Duration::from_micros(20);

/// What an operation's token says: what it was for, and an index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    Wake,
    Accept(u32),
    Receive(u32),
    Send(u32),
    Volume(u32, u32),
    /// Of a vhost-user connection: a message has come.
    Message(u32),
    /// A ring's bell: from the guest, and to it.
    Kick(u32, u16),
    Call(u32, u16),
}

impl Purpose {
    const fn token(self) -> Token {
        match self {
            Self::Wake => 0,
            Self::Accept(index) => 1 << 56 | index as u64,
            Self::Receive(index) => 2 << 56 | index as u64,
            Self::Send(index) => 3 << 56 | index as u64,
            // A worker has fewer than 2^24 volumes.
            Self::Volume(index, op) => 4 << 56 | (index as u64) << 32 | op as u64,
            Self::Message(index) => 5 << 56 | index as u64,
            Self::Kick(index, ring) => 6 << 56 | (ring as u64) << 32 | index as u64,
            Self::Call(index, ring) => 7 << 56 | (ring as u64) << 32 | index as u64,
        }
    }

    fn of(token: Token) -> Self {
        let low = token as u32;
        match token >> 56 {
            0 => Self::Wake,
            1 => Self::Accept(low),
            2 => Self::Receive(low),
            3 => Self::Send(low),
            4 => Self::Volume((token >> 32) as u32 & 0x00ff_ffff, low),
            5 => Self::Message(low),
            6 => Self::Kick(low, (token >> 32) as u16),
            7 => Self::Call(low, (token >> 32) as u16),
            kind => unreachable!("no operation of kind {kind} was started"),
        }
    }
}

/// Things by a small number that is used again after they are gone.
#[derive(Debug)]
struct Slots<T> {
    slots: Vec<Option<T>>,
    free: Vec<u32>,
}

impl<T> Slots<T> {
    const fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new() }
    }

    fn insert(&mut self, value: T) -> u32 {
        if let Some(index) = self.free.pop() {
            self.slots[index as usize] = Some(value);
            return index;
        }
        self.slots.push(Some(value));
        (self.slots.len() - 1) as u32
    }

    fn remove(&mut self, index: u32) -> Option<T> {
        let value = self.slots.get_mut(index as usize)?.take()?;
        self.free.push(index);
        Some(value)
    }

    fn get(&self, index: u32) -> Option<&T> {
        self.slots.get(index as usize)?.as_ref()
    }

    fn get_mut(&mut self, index: u32) -> Option<&mut T> {
        self.slots.get_mut(index as usize)?.as_mut()
    }

    fn iter(&self) -> impl Iterator<Item = (u32, &T)> {
        self.slots.iter().enumerate().filter_map(|(i, s)| Some((i as u32, s.as_ref()?)))
    }

    fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }
}

struct Volume {
    /// For messages.
    name: String,
    core: Core,
    file: FileId,
    /// Kept open for `file`.
    _fd: OwnedFd,
    counters: Arc<Counters>,
    /// Operations of the engine that run.
    ops: u32,
    /// It stands in `busy_volumes`.
    is_busy: bool,
    /// Changes wait until then, or until control lets them go on.
    held_until: Option<Instant>,
    /// How the last [`quality::BARRIER`] ended.
    barrier: Option<Result<(), i32>>,
}

struct Listener {
    /// `None` where another worker accepts, and sends on who uses an export of ours.
    socket: Option<OwnedFd>,
    access: Access,
    exports: Rc<[Served]>,
    front: Front,
    closing: bool,
    /// New connections are hung up on.
    draining: bool,
    accepting: bool,
    /// Connections are being refused, and the log says so.
    told_full: bool,
    /// Those who do not come to use an export are being ended for others.
    told_crowd: bool,
}

/// A request between its session and its volume.
struct InFlight {
    connection: u32,
    volume: u32,
    request: nbd::Request,
    buffer: Option<Buffer>,
    payload_at: usize,
    arrived: Instant,
    /// When it was let on to its volume, and when its first operation began.
    admitted: Instant,
    begun: Instant,
}

pub(crate) struct Worker<E> {
    engine: E,
    pool: Pool,
    commands: Receiver<Command>,
    events: UnboundedSender<Event>,
    bell: Arc<OwnedFd>,
    /// Where the bell's count is read to; boxed, so that it stays in its place.
    bell_count: Box<[u8; 8]>,
    volumes: Slots<Volume>,
    listeners: Slots<Listener>,
    connections: Slots<Box<Connection>>,
    requests: Slots<InFlight>,
    devices: Slots<Box<Device>>,
    /// Devices that there ever were.
    devices_born: u64,
    guest_requests: Slots<GuestRequest>,
    /// For taking one request off a ring; kept for its room.
    chain: Chain,
    /// Connections and volumes with something to do in this turn.
    busy_connections: VecDeque<u32>,
    busy_volumes: VecDeque<u32>,
    busy_devices: VecDeque<u32>,
    /// File operations that run: then the next event is probably the disk's.
    file_ops: u64,
    zeros: Buffer,
    admission: Admission,
    slow_log: quality::SlowLog,
    waiters: Vec<Waiter>,
    stopping: bool,
    /// Who waits for all to fall still.
    parking: Option<tokio::sync::oneshot::Sender<Still>>,
    is_parked: bool,
    /// When the engine last came back; nearer than that no time is asked for.
    now: Instant,
    /// The same, in nanoseconds since `epoch`.
    clock_ns: u64,
    epoch: Instant,
    next_tick: Instant,
    recent_gap: Duration,
    /// How long the last operations on files took, each.
    recent_op: Duration,
}

impl<E: Engine> Worker<E> {
    #[expect(clippy::disallowed_methods, reason = "a worker is a shell: deadlines begin here")]
    pub(crate) fn new(
        engine: E,
        pool: Pool,
        lane: Lane,
        commands: Receiver<Command>,
        events: UnboundedSender<Event>,
        bell: Arc<OwnedFd>,
    ) -> Self {
        let zeros = pool.take(ZEROS_MAX as usize);
        Self {
            engine,
            pool,
            commands,
            events,
            bell,
            bell_count: Box::new([0; 8]),
            volumes: Slots::new(),
            listeners: Slots::new(),
            connections: Slots::new(),
            requests: Slots::new(),
            devices: Slots::new(),
            devices_born: 0,
            guest_requests: Slots::new(),
            chain: Chain::default(),
            busy_connections: VecDeque::new(),
            busy_volumes: VecDeque::new(),
            busy_devices: VecDeque::new(),
            file_ops: 0,
            zeros,
            admission: Admission::new(lane),
            slow_log: quality::SlowLog::default(),
            waiters: Vec::new(),
            stopping: false,
            parking: None,
            is_parked: false,
            now: Instant::now(),
            clock_ns: 0,
            epoch: Instant::now(),
            next_tick: Instant::now() + TICK,
            recent_gap: Duration::MAX,
            recent_op: Duration::ZERO,
        }
    }

    /// Serves until it is told to stop and everything in flight is answered.
    #[expect(clippy::disallowed_methods, reason = "a worker is a shell: it alone asks the clock")]
    pub(crate) fn run(mut self) -> io::Result<()> {
        self.listen_for_bell();
        let mut completions: Vec<Completion> = Vec::new();
        loop {
            let before = Instant::now();
            let sleep = self.admission.wake_at().map_or(TICK, |at| {
                TICK.min(Duration::from_nanos(at.saturating_sub(self.clock_ns)))
            });
            let awaited_ops = self.file_ops;
            let spins = awaited_ops == 0 && self.recent_gap < SPIN && self.recent_op < OP_QUICK;
            let wait = if spins {
                Wait::SpinThen { spin: SPIN.min(sleep), sleep }
            } else {
                Wait::UpTo(sleep)
            };
            self.engine.reap(wait, &mut completions)?;
            let now = Instant::now();
            self.now = now;
            self.clock_ns = now.saturating_duration_since(self.epoch).as_nanos() as u64;
            if awaited_ops == 0 {
                self.recent_gap = now - before;
            }
            for completion in completions.drain(..) {
                self.completed(completion, now);
            }
            if let Some(ended @ 1..) = awaited_ops.checked_sub(self.file_ops) {
                self.recent_op = (now - before) / ended as u32;
            }
            self.work();
            if now >= self.next_tick {
                self.next_tick = now + TICK;
                self.enforce_deadlines(now);
                self.release_overdue(now);
                self.work();
            }
            self.tell_waiters();
            self.try_park(now);
            if self.stopping
                && self.connections.len() == 0
                && self.devices.len() == 0
                && self.listeners.len() == 0
            {
                return Ok(());
            }
        }
    }

    fn completed(&mut self, completion: Completion, now: Instant) {
        match Purpose::of(completion.token) {
            Purpose::Wake => {
                self.listen_for_bell();
                while let Ok(command) = self.commands.try_recv() {
                    self.obey(command, now);
                }
            }
            Purpose::Accept(listener) => self.accepted(listener, completion.result, now),
            Purpose::Receive(connection) => self.received(connection, completion.result),
            Purpose::Send(connection) => self.sent(connection, completion.result),
            Purpose::Volume(volume, op) => self.file_op_ended(volume, op, completion.result),
            Purpose::Message(device) => self.device_readable(device),
            Purpose::Kick(device, ring) => self.device_kicked(device, ring, completion.result),
            Purpose::Call(device, ring) => self.device_called(device, ring),
        }
    }

    /// Lets sessions, cores and the engine talk until none has anything to say.
    fn work(&mut self) {
        loop {
            if let Some(volume) = self.busy_volumes.pop_front() {
                self.serve_volume(volume);
            } else if let Some(connection) = self.busy_connections.pop_front() {
                self.serve_connection(connection);
            } else if let Some(device) = self.busy_devices.pop_front() {
                self.serve_device(device);
            } else if !self.admit_waiting() {
                return;
            }
        }
    }

    fn touch_connection(&mut self, index: u32) {
        if let Some(connection) = self.connections.get_mut(index)
            && !std::mem::replace(&mut connection.is_busy, true)
        {
            self.busy_connections.push_back(index);
        }
    }

    fn touch_volume(&mut self, index: u32) {
        if let Some(volume) = self.volumes.get_mut(index)
            && !std::mem::replace(&mut volume.is_busy, true)
        {
            self.busy_volumes.push_back(index);
        }
    }

    fn listen_for_bell(&mut self) {
        let io = Io::Wake { eventfd: self.bell.as_raw_fd(), into: self.bell_count.as_mut_ptr() };
        // SAFETY: the box stays until the worker is dropped, after its engine's
        // last reap, and nobody else writes to it.
        unsafe { self.engine.start(Purpose::Wake.token(), io) }
    }
}
