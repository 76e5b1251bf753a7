//! When a request may go on to its volume: limits, and turns between volumes.
//!
//! ```text
//!   session ──▶ arrive ──▶ may go ─────────────────────────▶ volume::Core
//!                  │                                            ▲
//!                  └─▶ waiting (over its limit, or not its turn) ┘ next
//!                  └─▶ kept    (a change, while the volume is held) ┘ release
//! ```
//!
//! The worker asks for each request that was parsed whole. One that must wait
//! stays with its connection, which is not read further: so no more waits than one
//! request a connection, and TCP holds back the rest. A flush never waits.
//!
//! Turns: while more than one volume is busy, little more than
//! [`SHARED_BYTES_MAX`] are on their way to the disk, given out by start-time fair
//! queueing with a depth (SFQ(D): Jin, Chase, Kaur, "Interposed proportional
//! sharing for a storage service utility", 2004). A request starts, on a scale of
//! bytes, where its volume's last one ended, but not before what went last; the
//! earliest start goes next. Volumes that ask for all get the same in bytes. One
//! that asks for less than its share, with nothing on its way, goes at once even
//! when the way is full: it waits for no queue of ours, and the disk's own has at
//! most those bytes before it. Shared, large requests go to the disk and their replies
//! to the socket a piece at a time (docs/adr/0076). A volume alone has no bound.
//!
//! Threads share those bytes too ([`lane`], docs/adr/0091): each has at least the part
//! that its waiting volumes make of all that wait, and of the rest what others leave.
//!
//! It owns no clock: `now` is nanoseconds on the caller's. What may never be true:
//! a request that is lost or goes twice; a wait when nothing is in the way.

pub mod bucket;
mod gate;
mod lane;

use model::Limits;

use gate::Gate;
pub use gate::{Arrival, Class, Lack};
pub use lane::Lane;

/// Bytes on their way to the disk while several volumes are busy: two requests
/// of 1 MiB keep a disk busy.
pub const SHARED_BYTES_MAX: u64 = 2 << 20;

/// Bytes that one operation on a file moves meanwhile: the disk has so much less
/// before what another volume asks.
const PIECE_BYTES: usize = 256 << 10;

/// Bytes that one send copies meanwhile: so long the thread looks at nothing else.
const SEND_BYTES: usize = 64 << 10;

/// The least that a request weighs: a small one costs as much as its block.
const WEIGHT_MIN: u64 = 4096;

/// Who has no more on its way need not look at other threads: it is in nobody's.
const LOOK_BYTES: u64 = 256 << 10;

/// How long a thread, or the way, counts as shared after requests of two volumes met.
const SHARED_NS: u64 = 100_000_000;

const NEVER: u64 = u64::MAX;

/// What a request of so many bytes counts among those on their way.
const fn weight(bytes: u64) -> u64 {
    if bytes < WEIGHT_MIN { WEIGHT_MIN } else { bytes }
}

/// The gates of a worker's volumes. Volumes are named by the worker's numbers.
#[derive(Debug)]
pub struct Admission {
    lane: Lane,
    gates: Vec<Option<Gate>>,
    /// Volumes that have something waiting, the last served last.
    waiting: Vec<u32>,
    in_flight: u64,
    /// The start of what went last, on the scale of bytes that a busy volume got.
    virtual_time: u64,
    last_volume: u32,
    /// Requests of two volumes meet on this thread until then.
    met_until: u64,
    /// And on the way to the disk, on whichever threads.
    shared_until: u64,
    /// Before that time, no waiting request can go.
    look_at: u64,
}

impl Admission {
    pub const fn new(lane: Lane) -> Self {
        Self {
            lane,
            gates: Vec::new(),
            waiting: Vec::new(),
            in_flight: 0,
            virtual_time: 0,
            last_volume: u32::MAX,
            met_until: 0,
            shared_until: 0,
            look_at: NEVER,
        }
    }

    pub fn add(&mut self, volume: u32, limits: Limits) {
        let index = volume as usize;
        if self.gates.len() <= index {
            self.gates.resize_with(index + 1, || None);
        }
        self.gates[index] = Some(Gate::new(limits));
    }

    /// Nothing of it may be waiting or on its way.
    pub fn remove(&mut self, volume: u32) {
        let gone = self.gates.get_mut(volume as usize).and_then(Option::take);
        if let Some(gate) = gone {
            assert!(
                gate.waiting.is_empty() && gate.kept.is_empty() && gate.in_flight == 0,
                "a volume goes when nobody asks it for anything"
            );
        }
    }

    /// Whether the request may go at once; if not, [`Self::next`] will give it.
    pub fn arrive(&mut self, now: u64, volume: u32, arrival: &Arrival) -> bool {
        if arrival.class == Class::Flush {
            return true;
        }
        if volume != self.last_volume {
            if self.last_volume != u32::MAX {
                self.met_until = now + SHARED_NS;
                self.shared_until = self.met_until;
            }
            self.last_volume = volume;
        }
        let Some(gate) = gate_of(&mut self.gates, volume) else { return true };
        let priced = gate.price(arrival);
        if gate.held && arrival.class.changes() {
            gate.kept.push_back(priced);
            return false;
        }
        let has_room = self.has_room(now, weight(priced.bytes));
        let shared = now < self.shared_until;
        let Some(gate) = gate_of(&mut self.gates, volume) else { return true };
        let is_next = gate.waiting.is_empty() && gate.ready_at() <= now;
        let may_go =
            !shared || (self.waiting.is_empty() && has_room) || gate.is_owed(self.virtual_time);
        if is_next && may_go {
            gate.take(now, priced);
            if shared {
                let start = gate.start(self.virtual_time);
                gate.finish = start + weight(priced.bytes);
                self.virtual_time = self.virtual_time.max(start);
            }
            self.in_flight += weight(priced.bytes);
            self.tell();
            return true;
        }
        self.look_at = self.look_at.min(gate.ready_at());
        gate.waiting.push_back(priced);
        if gate.waiting.len() == 1 {
            self.waiting.push(volume);
            self.tell();
        }
        false
    }

    /// Whether the way to the disk has room for more of this thread. Sees, where
    /// `coming` bytes are many, whether others use it.
    fn has_room(&mut self, now: u64, coming: u64) -> bool {
        let mut others = lane::Others::default();
        if self.in_flight + coming > LOOK_BYTES {
            others = self.lane.others();
        }
        if others.bytes > 0 {
            self.shared_until = now + SHARED_NS;
        }
        if now >= self.shared_until || self.in_flight + others.bytes < SHARED_BYTES_MAX {
            return true;
        }
        let volumes = (self.waiting.len() as u64).max(1);
        self.in_flight < SHARED_BYTES_MAX * volumes / (volumes + others.volumes)
    }

    /// Says to other threads what is on its way here.
    fn tell(&self) {
        self.lane.set(self.in_flight, self.waiting.len());
    }

    /// Bytes that one operation on a file may move; the rest is asked for after it.
    pub fn piece_max(&self, now: u64) -> usize {
        if now < self.shared_until { PIECE_BYTES } else { usize::MAX }
    }

    /// Bytes that a connection may be sent at once.
    pub fn send_max(&self, now: u64) -> usize {
        if now < self.met_until { SEND_BYTES } else { usize::MAX }
    }

    /// A request of `length` bytes that went is answered.
    pub fn ended(&mut self, volume: u32, class: Class, length: u64) {
        if class == Class::Flush {
            return;
        }
        let bytes = if matches!(class, Class::Read | Class::Write) { length } else { 0 };
        let Some(gate) = gate_of(&mut self.gates, volume) else { return };
        gate.in_flight -= weight(bytes);
        self.in_flight -= weight(bytes);
        self.tell();
        if !self.waiting.is_empty() {
            self.look_at = 0;
        }
    }

    /// A waiting request that may go now: its volume and ticket.
    pub fn next(&mut self, now: u64) -> Option<(u32, u32)> {
        if now < self.look_at {
            return None;
        }
        let has_room = self.has_room(now, 0);
        let (mut look_at, mut best) = (NEVER, None);
        for &volume in &self.waiting {
            let Some(gate) = self.gates[volume as usize].as_ref() else { continue };
            let ready_at = gate.ready_at();
            if ready_at > now {
                look_at = look_at.min(ready_at);
            } else if has_room || gate.is_owed(self.virtual_time) {
                let start = gate.start(self.virtual_time);
                if best.is_none_or(|(least, _)| start < least) {
                    best = Some((start, volume));
                }
            } else {
                look_at = look_at.min(self.shared_until);
            }
        }
        let Some((start, volume)) = best else {
            self.look_at = look_at;
            return None;
        };
        let gate = gate_of(&mut self.gates, volume)?;
        let priced = gate.waiting.pop_front()?;
        gate.take(now, priced);
        gate.finish = start + weight(priced.bytes);
        self.virtual_time = start;
        self.in_flight += weight(priced.bytes);
        // Behind those that have waited as long.
        self.waiting.retain(|v| *v != volume);
        if !gate.waiting.is_empty() {
            self.waiting.push(volume);
        }
        self.tell();
        Some((volume, priced.ticket))
    }

    /// When [`Self::next`] should be asked again, if nothing else happens.
    pub fn wake_at(&self) -> Option<u64> {
        (self.look_at != NEVER && !self.waiting.is_empty()).then_some(self.look_at)
    }

    pub fn set_limits(&mut self, now: u64, volume: u32, limits: Limits) {
        if let Some(gate) = gate_of(&mut self.gates, volume) {
            gate.set_limits(limits, now);
            self.look_at = 0;
        }
    }

    /// What its buckets lack, for the process that goes on with the volume.
    pub fn lacks(&self, now: u64, volume: u32) -> Lack {
        let gate = self.gates.get(volume as usize).and_then(Option::as_ref);
        gate.map_or([0; 4], |gate| gate.lacks(now))
    }

    pub fn owe(&mut self, now: u64, volume: u32, lack: Lack) {
        if let Some(gate) = gate_of(&mut self.gates, volume) {
            gate.owe(now, lack);
        }
    }

    /// Changes that arrive from now on wait for [`Self::release`]; so do those
    /// that were waiting.
    pub fn hold(&mut self, volume: u32) {
        if let Some(gate) = gate_of(&mut self.gates, volume) {
            gate.held = true;
            // What class a waiting request has is not kept: all of them wait.
            let waiting = std::mem::take(&mut gate.waiting);
            gate.kept.extend(waiting);
            self.waiting.retain(|v| *v != volume);
            self.tell();
        }
    }

    pub fn release(&mut self, volume: u32) {
        let Some(gate) = gate_of(&mut self.gates, volume) else { return };
        gate.held = false;
        let kept = std::mem::take(&mut gate.kept);
        gate.waiting.extend(kept);
        if !gate.waiting.is_empty() {
            self.look_at = 0;
            self.waiting.retain(|v| *v != volume);
            self.waiting.push(volume);
            self.tell();
        }
    }

    pub fn is_held(&self, volume: u32) -> bool {
        self.gates.get(volume as usize).and_then(Option::as_ref).is_some_and(|g| g.held)
    }

    /// Nobody waits for this request any more.
    pub fn forget(&mut self, volume: u32, ticket: u32) {
        if let Some(gate) = gate_of(&mut self.gates, volume) {
            gate.waiting.retain(|p| p.ticket != ticket);
            gate.kept.retain(|p| p.ticket != ticket);
            if gate.waiting.is_empty() {
                self.waiting.retain(|v| *v != volume);
                self.tell();
            }
        }
    }

    /// Requests that wait, for whatever reason.
    pub fn waiting(&self, volume: u32) -> usize {
        let gate = self.gates.get(volume as usize).and_then(Option::as_ref);
        gate.map_or(0, |gate| gate.waiting.len() + gate.kept.len())
    }
}

fn gate_of(gates: &mut [Option<Gate>], volume: u32) -> Option<&mut Gate> {
    gates.get_mut(volume as usize)?.as_mut()
}

#[cfg(test)]
mod tests;
