//! A split virtqueue, walked by the device (virtio 1.2, 2.7).
//!
//! ```text
//!   guest:  desc[…] ◀─ avail.ring[next_avail] … avail.index   ──kick──▶ us
//!   us:     used.ring[next_used] ─▶ used.index                ──call──▶ guest
//! ```
//!
//! Pure over [`Memory`]. Every number in the rings is the guest's word and is
//! taken once: a descriptor is copied before it is judged. A ring that breaks a
//! rule is [`Broken`] and is not walked further.

use super::memory::{Fault, Memory};

/// Entries of a ring at most; QEMU's own limit.
pub const SIZE_MAX: u16 = 1024;

/// Descriptors of one request, in the ring and in its indirect table: as many as
/// one vectored system call takes.
pub const CHAIN_MAX: usize = 1024;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// In `avail.flags`: the guest wants no call.
const NO_INTERRUPT: u16 = 1;
/// In `used.flags`: we want no kick.
const NO_NOTIFY: u16 = 1;

const DESCRIPTOR_BYTES: u64 = 16;

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error(transparent)]
    Fault(#[from] Fault),
    #[error("{pending} requests are announced in a ring of {size}")]
    Ahead { pending: u16, size: u16 },
    #[error("descriptor {index} of {count} is named")]
    Index { index: u16, count: u16 },
    #[error("request {head} is announced again before it was answered")]
    Repeated { head: u16 },
    #[error("a request has more than {CHAIN_MAX} descriptors, or they form a loop")]
    Long,
    #[error("an indirect table of {length} bytes, nested, or with a successor")]
    Indirect { length: u32 },
    #[error("a descriptor of no bytes")]
    Empty,
    #[error("a readable descriptor behind a writable one")]
    Order,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub at: u64,
    pub length: u32,
}

/// One request as the guest laid it out: what we may read, then what we may write.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chain {
    pub head: u16,
    pub readable: Vec<Segment>,
    pub writable: Vec<Segment>,
}

/// Guest addresses of a ring's three parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Places {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

/// What was agreed on for all rings of a device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Agreed {
    pub event_index: bool,
    pub indirect: bool,
}

#[derive(Debug)]
pub struct Queue {
    size: u16,
    places: Places,
    agreed: Agreed,
    next_available: u16,
    next_used: u16,
    /// `next_used` when the guest was last called; `None`: it was never.
    called_at: Option<u16>,
    /// By head: taken and not answered.
    taken: Vec<bool>,
    in_flight: u16,
}

impl Queue {
    /// `next_available`: where an earlier server stopped. Refused where the size
    /// is none, or the parts are not in memory.
    pub fn new(
        memory: &impl Memory,
        size: u16,
        places: Places,
        agreed: Agreed,
        next_available: u16,
    ) -> Result<Self, Broken> {
        if !size.is_power_of_two() || size > SIZE_MAX {
            return Err(Broken::Index { index: size, count: SIZE_MAX });
        }
        let mut queue = Self {
            size,
            places,
            agreed,
            next_available,
            next_used: 0,
            called_at: None,
            taken: vec![false; usize::from(size)],
            in_flight: 0,
        };
        queue.check_places(memory)?;
        queue.next_used = memory.load(places.used + 2)?;
        Ok(queue)
    }

    fn check_places(&self, memory: &impl Memory) -> Result<(), Broken> {
        let size = u64::from(self.size);
        let parts = [
            (self.places.descriptors, DESCRIPTOR_BYTES * size, 16),
            (self.places.available, 6 + 2 * size, 2),
            (self.places.used, 6 + 8 * size, 4),
        ];
        for (at, length, alignment) in parts {
            if !memory.covers(at, length) || !at.is_multiple_of(alignment) {
                return Err(Fault { at, length }.into());
            }
        }
        Ok(())
    }

    /// The same rings under other addresses: the guest's memory was laid out anew.
    pub fn move_to(&mut self, memory: &impl Memory, places: Places) -> Result<(), Broken> {
        self.places = places;
        self.check_places(memory)
    }

    pub fn size(&self) -> u16 {
        self.size
    }

    pub fn next_available(&self) -> u16 {
        self.next_available
    }

    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    pub fn in_flight(&self) -> u16 {
        self.in_flight
    }

    /// Takes the next request; `false` when there is none.
    pub fn pop(&mut self, memory: &impl Memory, chain: &mut Chain) -> Result<bool, Broken> {
        let pending = self.pending(memory)?;
        if pending == 0 {
            return Ok(false);
        }
        let slot = u64::from(self.next_available % self.size);
        let head = memory.load(self.places.available + 4 + 2 * slot)?;
        self.take(memory, head, chain)?;
        self.next_available = self.next_available.wrapping_add(1);
        Ok(true)
    }

    fn pending(&self, memory: &impl Memory) -> Result<u16, Broken> {
        let announced = memory.load(self.places.available + 2)?;
        let pending = announced.wrapping_sub(self.next_available);
        if pending > self.size {
            return Err(Broken::Ahead { pending, size: self.size });
        }
        Ok(pending)
    }

    /// Takes the request at `head`, which an earlier server had taken already.
    pub fn take(
        &mut self,
        memory: &impl Memory,
        head: u16,
        chain: &mut Chain,
    ) -> Result<(), Broken> {
        match self.taken.get(usize::from(head)) {
            None => return Err(Broken::Index { index: head, count: self.size }),
            Some(true) => return Err(Broken::Repeated { head }),
            Some(false) => {}
        }
        self.walk(memory, head, chain)?;
        self.taken[usize::from(head)] = true;
        self.in_flight += 1;
        Ok(())
    }

    fn walk(&self, memory: &impl Memory, head: u16, chain: &mut Chain) -> Result<(), Broken> {
        chain.head = head;
        chain.readable.clear();
        chain.writable.clear();
        let (mut table, mut count, mut index) = (self.places.descriptors, self.size, head);
        let mut is_nested = false;
        // One more than descriptors that count: the one that names the table.
        for _ in 0..=CHAIN_MAX {
            if index >= count {
                return Err(Broken::Index { index, count });
            }
            let found = Descriptor::read(memory, table, index)?;
            if found.flags & INDIRECT != 0 && self.agreed.indirect {
                count = found.table_length(is_nested)?;
                (table, index, is_nested) = (found.at, 0, true);
                continue;
            }
            found.append(memory, chain)?;
            if found.flags & NEXT == 0 {
                return Ok(());
            }
            index = found.next;
        }
        Err(Broken::Long)
    }

    /// Answers a request that was taken; `written`: bytes put to its memory.
    pub fn push(&mut self, memory: &impl Memory, head: u16, written: u32) -> Result<(), Broken> {
        self.give_back(head);
        let slot = u64::from(self.next_used % self.size);
        let mut element = [0_u8; 8];
        element[..4].copy_from_slice(&u32::from(head).to_le_bytes());
        element[4..].copy_from_slice(&written.to_le_bytes());
        memory.write(self.places.used + 4 + 8 * slot, &element)?;
        self.next_used = self.next_used.wrapping_add(1);
        memory.store(self.places.used + 2, self.next_used)?;
        Ok(())
    }

    fn give_back(&mut self, head: u16) {
        let taken = std::mem::replace(&mut self.taken[usize::from(head)], false);
        assert!(taken, "request {head} is answered once");
        self.in_flight -= 1;
    }

    /// Whether the guest wants to hear of what was pushed since it last was told.
    pub fn must_call(&mut self, memory: &impl Memory) -> Result<bool, Broken> {
        if self.called_at == Some(self.next_used) {
            return Ok(false);
        }
        // The guest writes its wish and then looks at our index, we the other
        // way round: one of the two must see the other.
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let before = self.called_at.replace(self.next_used);
        if !self.agreed.event_index {
            return Ok(memory.load(self.places.available)? & NO_INTERRUPT == 0);
        }
        let wish = memory.load(self.places.available + 4 + 2 * u64::from(self.size))?;
        Ok(before.is_none_or(|before| is_passed(wish, self.next_used, before)))
    }

    /// Asks for a kick at the next request. `true`: one came meanwhile, and no
    /// kick may follow.
    pub fn ask_for_kicks(&mut self, memory: &impl Memory) -> Result<bool, Broken> {
        if self.agreed.event_index {
            let place = self.places.used + 4 + 8 * u64::from(self.size);
            memory.store(place, self.next_available)?;
        } else {
            memory.store(self.places.used, 0)?;
        }
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        Ok(self.pending(memory)? > 0)
    }

    /// The ring will be looked at without being asked to. With event indexes
    /// there is nothing to say: a wish that is passed counts once.
    pub fn forgo_kicks(&mut self, memory: &impl Memory) -> Result<(), Broken> {
        if !self.agreed.event_index {
            memory.store(self.places.used, NO_NOTIFY)?;
        }
        Ok(())
    }
}

/// Whether going from `before` to `now` passed the index behind `wish`.
const fn is_passed(wish: u16, now: u16, before: u16) -> bool {
    now.wrapping_sub(wish).wrapping_sub(1) < now.wrapping_sub(before)
}

#[derive(Debug, Clone, Copy)]
struct Descriptor {
    at: u64,
    length: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    fn read(memory: &impl Memory, table: u64, index: u16) -> Result<Self, Fault> {
        let at = table.checked_add(DESCRIPTOR_BYTES * u64::from(index));
        let at = at.ok_or(Fault { at: table, length: DESCRIPTOR_BYTES })?;
        let mut bytes = [0_u8; DESCRIPTOR_BYTES as usize];
        memory.read(at, &mut bytes)?;
        let [a @ .., l0, l1, l2, l3, f0, f1, n0, n1] = bytes;
        Ok(Self {
            at: u64::from_le_bytes(a),
            length: u32::from_le_bytes([l0, l1, l2, l3]),
            flags: u16::from_le_bytes([f0, f1]),
            next: u16::from_le_bytes([n0, n1]),
        })
    }

    fn table_length(self, is_nested: bool) -> Result<u16, Broken> {
        let count = u64::from(self.length) / DESCRIPTOR_BYTES;
        let is_whole = u64::from(self.length) == count * DESCRIPTOR_BYTES;
        if is_nested
            || !is_whole
            || count == 0
            || count > CHAIN_MAX as u64
            || self.flags & NEXT != 0
        {
            return Err(Broken::Indirect { length: self.length });
        }
        Ok(count as u16)
    }

    fn append(self, memory: &impl Memory, chain: &mut Chain) -> Result<(), Broken> {
        let segment = Segment { at: self.at, length: self.length };
        if self.length == 0 {
            return Err(Broken::Empty);
        }
        if chain.readable.len() + chain.writable.len() == CHAIN_MAX {
            return Err(Broken::Long);
        }
        if !memory.covers(self.at, u64::from(self.length)) {
            return Err(Fault { at: self.at, length: u64::from(self.length) }.into());
        }
        if self.flags & WRITE != 0 {
            chain.writable.push(segment);
        } else if chain.writable.is_empty() {
            chain.readable.push(segment);
        } else {
            return Err(Broken::Order);
        }
        Ok(())
    }
}
