//! The promises of one volume that lies in a plain file or device.
//!
//! ```text
//!   submit ──▶ waiting (overlaps an earlier change) ──▶ running ──▶ [durable] ──▶ reply
//!                                                     ops │ ▲ completions   sync
//!                                                         ▼ │
//!                                                    engine or simulated disk
//! ```
//!
//! - A change (write, zeroes, trim) is acknowledged when the file took it. It is
//!   *durable* when a later flush, or its own FUA, was acknowledged.
//! - Changes that share a block happen in the order of their arrival, whole.
//! - A flush is answered after a sync that *began* after the flush arrived, so
//!   it covers every change acknowledged before on any connection. Flushes that
//!   arrive while a sync runs share the next one.
//! - When a sync fails, nobody knows what the disk holds: the volume is failed,
//!   every request from then on gets EIO, and no later sync can hide it.
//! - A writer of a lower generation than the volume's is answered EPERM.
//!
//! Buffers belong to the caller: operations name a request's ticket and a place
//! in its buffer, laid out as [`Core::layout`] says.

#[cfg(test)]
mod crash;
mod mistake;
mod sync;

use std::collections::VecDeque;

use super::edges::{Edge, edges, whole};
use super::request::{
    Geometry, Kind, Layout, Op, Outcome, Reply, Request, Ticket, Token, Trouble, ZEROS_MAX,
};

#[cfg(test)]
pub use mistake::Mistake;
use mistake::planted;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// Behind an earlier change of the same blocks.
    Waiting,
    Head,
    Tail,
    Body {
        done: u64,
    },
    Allocate,
    Zeros {
        done: u64,
    },
    /// Of zeroes: the first or second block that is zeroed in part, read and then
    /// written.
    EdgeRead(usize),
    EdgeWrite(usize),
    /// The change is made; a sync must make it durable.
    Durable,
}

#[derive(Debug, Clone, Copy)]
struct Job {
    request: Request,
    step: Step,
}

#[derive(Debug, Clone, Copy)]
struct Range {
    start: u64,
    end: u64,
    job: u32,
}

impl Range {
    const fn overlaps(self, other: Self) -> bool {
        self.start < other.end && other.start < self.end
    }
}

const SYNC_TOKEN: u32 = u32::MAX;

const EPERM: i32 = 1;
const EIO: i32 = 5;
const EOPNOTSUPP: i32 = 95;

#[derive(Debug)]
pub struct Core {
    geometry: Geometry,
    generation: u64,
    failed: Option<String>,
    jobs: Vec<Option<Job>>,
    free: Vec<u32>,
    /// Block ranges of changes that run.
    changing: Vec<Range>,
    /// Changes that wait, in order of arrival.
    waiting: VecDeque<Range>,
    /// Jobs that the running sync will answer, and those that the next one will.
    syncing: Option<Vec<u32>>,
    sync_next: Vec<u32>,
    ops: VecDeque<(Token, Op)>,
    replies: VecDeque<Reply>,
    troubles: VecDeque<Trouble>,
    #[cfg(test)]
    pub mistake: Option<Mistake>,
}

impl Core {
    /// `failed`: why the volume was failed before, where it was.
    pub fn new(geometry: Geometry, generation: u64, failed: Option<String>) -> Self {
        assert!(geometry.alignment.is_power_of_two(), "the alignment is a power of two");
        assert!(
            geometry.size.is_multiple_of(u64::from(geometry.alignment)),
            "the size is a multiple of the alignment"
        );
        Self {
            geometry,
            generation,
            failed,
            jobs: Vec::new(),
            free: Vec::new(),
            changing: Vec::new(),
            waiting: VecDeque::new(),
            syncing: None,
            sync_next: Vec::new(),
            ops: VecDeque::new(),
            replies: VecDeque::new(),
            troubles: VecDeque::new(),
            #[cfg(test)]
            mistake: None,
        }
    }

    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub fn failed(&self) -> Option<&str> {
        self.failed.as_deref()
    }

    /// Requests that are not answered yet.
    pub fn in_flight(&self) -> usize {
        self.jobs.len() - self.free.len()
    }

    /// Whether a change is not answered yet.
    pub fn has_changes(&self) -> bool {
        self.jobs.iter().flatten().any(|job| job.request.kind.changes())
    }

    /// The file became larger. Requests are checked by their sessions against the
    /// size that these told their clients.
    pub fn grow(&mut self, size: u64) {
        assert!(size >= self.geometry.size, "a volume does not shrink");
        assert!(
            size.is_multiple_of(u64::from(self.geometry.alignment)),
            "the size is a multiple of the alignment"
        );
        self.geometry.size = size;
    }

    /// Fences every writer below `generation`. Its requests fail from now on;
    /// those that run are waited for with [`Self::has_older`].
    pub fn raise(&mut self, generation: u64) {
        self.generation = self.generation.max(generation);
        if planted!(self, FencedWaiterRuns) {
            return;
        }
        for range in std::mem::take(&mut self.waiting) {
            let request = self.job(range.job).request;
            if self.is_fenced(&request) {
                self.remove(range.job);
                self.reply(request.ticket, Err(EPERM));
            } else {
                self.waiting.push_back(range);
            }
        }
        self.start_waiting();
    }

    /// Whether a change by a fenced writer still runs.
    pub fn has_older(&self) -> bool {
        self.jobs.iter().flatten().any(|job| self.is_fenced(&job.request))
    }

    fn is_fenced(&self, request: &Request) -> bool {
        request.generation.is_some_and(|g| g < self.generation) && !planted!(self, FenceIgnored)
    }

    pub fn layout(&self, kind: Kind, offset: u64, length: u64) -> Layout {
        let (start, end) = self.blocks(offset, length);
        let window = (end - start) as usize;
        let scratch = match kind {
            Kind::Write if (start, end) != (offset, offset + length) => {
                self.geometry.alignment as usize
            }
            Kind::Read | Kind::Write => 0,
            Kind::Zero { .. } if (start, end) != (offset, offset + length) => {
                // One block at a time.
                return Layout { capacity: self.geometry.alignment as usize, payload_at: 0 };
            }
            _ => return Layout { capacity: 0, payload_at: 0 },
        };
        Layout { capacity: window + scratch, payload_at: (offset - start) as usize }
    }

    /// The range widened to whole blocks.
    fn blocks(&self, offset: u64, length: u64) -> (u64, u64) {
        let mask = u64::from(self.geometry.alignment) - 1;
        (offset & !mask, (offset + length + mask) & !mask)
    }

    /// Takes a request that is within the volume. Exactly one reply will follow.
    pub fn submit(&mut self, request: Request) {
        let end = request.offset.checked_add(request.length);
        assert!(end.is_some_and(|e| e <= self.geometry.size), "the session lets nothing else in");
        if self.failed.is_some() {
            return self.reply(request.ticket, Err(EIO));
        }
        if self.is_fenced(&request) {
            return self.reply(request.ticket, Err(EPERM));
        }
        if request.kind == Kind::Flush {
            let job = self.insert(Job { request, step: Step::Durable });
            return self.make_durable(job);
        }
        if request.length == 0 {
            return self.reply(request.ticket, Ok(Vec::new()));
        }
        let job = self.insert(Job { request, step: Step::Waiting });
        if !request.kind.changes() {
            return self.begin(job);
        }
        let (start, end) = self.blocks(request.offset, request.length);
        let range = Range { start, end, job };
        if self.must_wait(range) {
            self.waiting.push_back(range);
        } else {
            self.changing.push(range);
            self.begin(job);
        }
    }

    fn must_wait(&self, range: Range) -> bool {
        if planted!(self, OverlapsUnordered) {
            return false;
        }
        self.changing.iter().any(|r| r.overlaps(range))
            || self.waiting.iter().any(|r| r.overlaps(range))
    }

    pub fn next_op(&mut self) -> Option<(Token, Op)> {
        self.ops.pop_front()
    }

    pub fn next_reply(&mut self) -> Option<Reply> {
        self.replies.pop_front()
    }

    pub fn next_trouble(&mut self) -> Option<Trouble> {
        self.troubles.pop_front()
    }

    /// An operation that [`Self::next_op`] gave has ended.
    pub fn complete(&mut self, token: Token, outcome: Outcome) {
        if token.0 == SYNC_TOKEN {
            return self.synced(outcome);
        }
        let job = self.job(token.0);
        let fails_as = match (job.step, &outcome) {
            // A file system without the cheap way: the zeros are written.
            (Step::Allocate, Outcome::Failed(EOPNOTSUPP)) => {
                return self.zero_otherwise(token.0);
            }
            (_, Outcome::Failed(errno)) => Some(*errno),
            // The file ended before the volume does.
            (
                Step::Head
                | Step::Tail
                | Step::Body { .. }
                | Step::EdgeRead(_)
                | Step::EdgeWrite(_),
                Outcome::Done(0),
            ) => Some(EIO),
            _ => None,
        };
        if let Some(errno) = fails_as {
            return self.fail(token.0, errno);
        }
        match (job.step, outcome) {
            (Step::Body { .. }, Outcome::Extents(extents)) => {
                self.remove(token.0);
                self.reply(job.request.ticket, Ok(extents));
            }
            (_, Outcome::Done(count)) => self.advance(token.0, job, count as u64),
            (step, outcome) => unreachable!("{outcome:?} answers {step:?}"),
        }
    }

    fn advance(&mut self, id: u32, job: Job, count: u64) {
        let request = job.request;
        let (start, end) = self.blocks(request.offset, request.length);
        let window = (end - start) as usize;
        let alignment = self.geometry.alignment as usize;
        let before = (request.offset - start) as usize;
        let behind = (end - request.offset - request.length) as usize;
        let token = Token(id);
        let copy =
            |from, to, length| (token, Op::Copy { ticket: request.ticket, from, to, length });
        match job.step {
            Step::Head => {
                // A block that is read for its head may hold the tail as well.
                if !planted!(self, HeadNotMerged) {
                    self.ops.push_back(copy(window, 0, before));
                }
                if behind > 0 && window == alignment {
                    let at = alignment - behind;
                    self.ops.push_back(copy(window + at, at, behind));
                    self.run(id, Step::Body { done: 0 });
                } else if behind > 0 {
                    self.run(id, Step::Tail);
                } else {
                    self.run(id, Step::Body { done: 0 });
                }
            }
            Step::Tail => {
                let at = alignment - behind;
                if !planted!(self, TailNotMerged) {
                    self.ops.push_back(copy(window + at, window - behind, behind));
                }
                self.run(id, Step::Body { done: 0 });
            }
            Step::Body { done } if matches!(request.kind, Kind::Read | Kind::Write) => {
                // A short transfer goes on where it stopped, at a whole block.
                let mask = u64::from(self.geometry.alignment) - 1;
                let done = done + (count & !mask);
                if count & !mask == 0 && done < window as u64 {
                    return self.fail(id, EIO);
                }
                let is_short_enough =
                    request.kind == Kind::Write && planted!(self, ShortWriteAcknowledged);
                if done >= window as u64 || is_short_enough {
                    let durable = request.fua && request.kind == Kind::Write;
                    self.finish(id, durable);
                } else {
                    self.run(id, Step::Body { done });
                }
            }
            Step::Zeros { done } => {
                let done = done + count;
                if done < self.whole(&request).1 {
                    self.run(id, Step::Zeros { done });
                } else {
                    self.zero_edge(id, 0);
                }
            }
            Step::Allocate => self.zero_edge(id, 0),
            Step::EdgeRead(index) => {
                if let Some(edge) = self.edges(&request)[index] {
                    let (at, length) = if planted!(self, EdgeNotMerged) {
                        (0, alignment)
                    } else {
                        (edge.at, edge.length)
                    };
                    self.ops.push_back((token, Op::Fill { ticket: request.ticket, at, length }));
                }
                self.run(id, Step::EdgeWrite(index));
            }
            // A part of a block that was written is written again, from the beginning.
            Step::EdgeWrite(index) if count < alignment as u64 => {
                self.run(id, Step::EdgeWrite(index));
            }
            Step::EdgeWrite(index) => self.zero_edge(id, index + 1),
            Step::Body { .. } => self.finish(id, false),
            Step::Waiting | Step::Durable => unreachable!("{:?} has no operation", job.step),
        }
    }

    fn zero_otherwise(&mut self, id: u32) {
        match self.job(id).request.kind {
            // Advice that cannot be followed.
            Kind::Trim => self.finish(id, false),
            Kind::Zero { fast: false, .. } => self.run(id, Step::Zeros { done: 0 }),
            _ => self.fail(id, EOPNOTSUPP),
        }
    }

    fn whole(&self, request: &Request) -> (u64, u64) {
        whole(request.offset, request.length, u64::from(self.geometry.alignment))
    }

    fn edges(&self, request: &Request) -> [Option<Edge>; 2] {
        match request.kind {
            Kind::Zero { .. } => {
                edges(request.offset, request.length, u64::from(self.geometry.alignment))
            }
            // Advice for whole blocks only.
            _ => [None; 2],
        }
    }

    /// The whole blocks are zeroed; goes on at edge `index` or the one after it.
    fn zero_edge(&mut self, id: u32, index: usize) {
        let edges = self.edges(&self.job(id).request);
        match (index..edges.len()).find(|i| edges[*i].is_some()) {
            Some(index) => self.run(id, Step::EdgeRead(index)),
            None => self.finish(id, false),
        }
    }

    /// Starts a job at its first step.
    fn begin(&mut self, id: u32) {
        let request = self.job(id).request;
        let (start, end) = self.blocks(request.offset, request.length);
        let step = match request.kind {
            Kind::Write if start != request.offset => Step::Head,
            Kind::Write if end != request.offset + request.length => Step::Tail,
            Kind::Trim | Kind::Zero { .. } if self.whole(&request).1 == 0 => {
                return self.zero_edge(id, 0);
            }
            Kind::Trim | Kind::Zero { .. } => Step::Allocate,
            _ => Step::Body { done: 0 },
        };
        self.run(id, step);
    }

    fn run(&mut self, id: u32, step: Step) {
        let Some(job) = &mut self.jobs[id as usize] else { unreachable!("job {id} is gone") };
        job.step = step;
        let request = job.request;
        let Request { ticket, offset, length, .. } = request;
        let (start, end) = self.blocks(offset, length);
        let window = (end - start) as usize;
        let alignment = self.geometry.alignment as usize;
        let op = match (step, request.kind) {
            (Step::Head, _) => Op::Read { ticket, at: window, offset: start, length: alignment },
            (Step::Tail, _) => {
                Op::Read { ticket, at: window, offset: end - alignment as u64, length: alignment }
            }
            (Step::Body { done }, Kind::Read) => Op::Read {
                ticket,
                at: done as usize,
                offset: start + done,
                length: window - done as usize,
            },
            (Step::Body { done }, Kind::Write) => Op::Write {
                ticket,
                at: done as usize,
                offset: start + done,
                length: window - done as usize,
                durable: request.fua && !planted!(self, FuaIgnored),
            },
            (Step::Body { .. }, Kind::Prefetch) => Op::Prefetch { offset, length },
            (Step::Body { .. }, Kind::Extents) => Op::Extents { offset, length },
            (Step::Allocate, kind) => {
                let (offset, length) = self.whole(&request);
                match kind {
                    Kind::Zero { hole: false, .. } => Op::Zero { offset, length },
                    _ => Op::Punch { offset, length },
                }
            }
            (Step::Zeros { done }, _) => {
                let (offset, length) = self.whole(&request);
                Op::WriteZeros { offset: offset + done, length: (length - done).min(ZEROS_MAX) }
            }
            (Step::EdgeRead(index) | Step::EdgeWrite(index), kind) => {
                let Some(edge) = self.edges(&request)[index] else {
                    unreachable!("{kind:?} has no edge {index}")
                };
                let offset = edge.block;
                if matches!(step, Step::EdgeRead(_)) {
                    Op::Read { ticket, at: 0, offset, length: alignment }
                } else {
                    Op::Write { ticket, at: 0, offset, length: alignment, durable: false }
                }
            }
            (step, kind) => unreachable!("{kind:?} has no step {step:?}"),
        };
        self.ops.push_back((Token(id), op));
    }

    /// The operations of a job succeeded. `durable`: so is the change.
    fn finish(&mut self, id: u32, durable: bool) {
        let request = self.job(id).request;
        if request.fua && request.kind.changes() && self.failed.is_some() {
            // A sync that failed meanwhile may have been told of this change's failure.
            self.remove(id);
            return self.reply(request.ticket, Err(EIO));
        }
        let durable = durable || request.kind != Kind::Write && planted!(self, FuaZeroesNotSynced);
        if request.fua && request.kind.changes() && !durable {
            let Some(job) = &mut self.jobs[id as usize] else { unreachable!("job {id} is gone") };
            job.step = Step::Durable;
            self.release(id);
            return self.make_durable(id);
        }
        self.remove(id);
        self.reply(request.ticket, Ok(Vec::new()));
    }

    fn fail(&mut self, id: u32, errno: i32) {
        let Request { ticket, kind, offset, length, fua, .. } = self.job(id).request;
        let deed = match kind {
            Kind::Read => "read",
            Kind::Write => "write",
            Kind::Flush => "flush",
            Kind::Trim => "trim",
            Kind::Zero { .. } => "write zeroes",
            Kind::Prefetch => "prefetch",
            Kind::Extents => "look for holes",
        };
        self.remove(id);
        self.troubles.push_back(Trouble::Refused { deed, offset, length, errno });
        self.reply(ticket, Err(errno));
        // A durable write syncs: its failure may have used up the report of an
        // earlier write's failure, which no later sync would see again.
        if kind == Kind::Write && fua && errno == EIO && !planted!(self, DurableFailureForgotten) {
            self.fail_volume("a durable write failed with EIO");
        }
    }

    fn job(&self, id: u32) -> Job {
        match self.jobs.get(id as usize) {
            Some(Some(job)) => *job,
            _ => unreachable!("job {id} is gone"),
        }
    }

    fn insert(&mut self, job: Job) -> u32 {
        if let Some(id) = self.free.pop() {
            self.jobs[id as usize] = Some(job);
            return id;
        }
        self.jobs.push(Some(job));
        let id = (self.jobs.len() - 1) as u32;
        assert!(id != SYNC_TOKEN, "connections bound the jobs far below");
        id
    }

    fn remove(&mut self, id: u32) {
        self.release(id);
        self.jobs[id as usize] = None;
        self.free.push(id);
    }

    /// Gives up a change's blocks and starts those who waited for them.
    fn release(&mut self, id: u32) {
        let Some(at) = self.changing.iter().position(|r| r.job == id) else { return };
        self.changing.swap_remove(at);
        self.start_waiting();
    }

    /// Starts every change that no earlier one stands before.
    fn start_waiting(&mut self) {
        let mut index = 0;
        while index < self.waiting.len() {
            let range = self.waiting[index];
            let looked_at = if planted!(self, WaitersPassEachOther) { 0 } else { index };
            let free = !self.changing.iter().any(|r| r.overlaps(range))
                && !self.waiting.iter().take(looked_at).any(|r| r.overlaps(range));
            if free {
                self.waiting.remove(index);
                self.changing.push(range);
                self.begin(range.job);
            } else {
                index += 1;
            }
        }
    }

    fn reply(&mut self, ticket: Ticket, result: Result<Vec<(u64, u32)>, i32>) {
        self.replies.push_back(Reply { ticket, result });
    }
}
