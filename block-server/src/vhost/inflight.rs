//! What a server that was killed had taken and not answered: kept in memory that
//! the peer holds for us (vhost-user, "Inflight I/O tracking", split rings).
//!
//! ```text
//!   a queue's part:  features u64 │ version u16 │ size u16 │ last u16 │ used u16
//!                    size × ( in flight u8, 5 bytes, next u16, counter u64 )
//! ```
//!
//! A request is marked before it begins and unmarked after the guest can see its
//! answer. Between the two steps of answering we may be killed; `last` and
//! `used` let the next server finish them, so that no answered request is
//! repeated and no other forgotten. Repeating is in the order of the counters.

use super::memory::{Fault, Memory};

const HEADER_BYTES: u64 = 16;
const ENTRY_BYTES: u64 = 16;
/// Parts begin at a cache line.
const PART_ALIGNMENT: u64 = 64;
const VERSION: u16 = 1;

const VERSION_AT: u64 = 8;
const SIZE_AT: u64 = 10;
const LAST_AT: u64 = 12;
const USED_AT: u64 = 14;

/// Bytes of one queue's part.
pub const fn part_bytes(size: u16) -> u64 {
    (HEADER_BYTES + ENTRY_BYTES * size as u64).next_multiple_of(PART_ALIGNMENT)
}

/// One queue's part. The memory is the peer's too: what is read is judged.
#[derive(Debug)]
pub struct Part {
    start: u64,
    size: u16,
    counter: u64,
}

impl Part {
    /// Takes up what an earlier server left; gives the heads that it had taken
    /// and not answered, oldest first.
    pub fn open(
        memory: &impl Memory,
        start: u64,
        size: u16,
        used_in_ring: u16,
    ) -> Result<(Self, Vec<u16>), Fault> {
        let mut part = Self { start, size, counter: 0 };
        let is_ours =
            memory.load(start + VERSION_AT)? == VERSION && memory.load(start + SIZE_AT)? == size;
        if !is_ours {
            part.begin(memory, used_in_ring)?;
            return Ok((part, Vec::new()));
        }
        part.finish_last(memory, used_in_ring)?;
        let mut left = part.marked(memory)?;
        left.sort_unstable();
        part.counter = left.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok((part, left.into_iter().map(|(_, head)| head).collect()))
    }

    fn begin(&self, memory: &impl Memory, used: u16) -> Result<(), Fault> {
        for head in 0..self.size {
            memory.write(self.entry(head), &[0; ENTRY_BYTES as usize])?;
        }
        memory.write(self.start, &0_u64.to_le_bytes())?;
        memory.store(self.start + SIZE_AT, self.size)?;
        memory.store(self.start + LAST_AT, 0)?;
        memory.store(self.start + USED_AT, used)?;
        memory.store(self.start + VERSION_AT, VERSION)
    }

    /// Unmarks what the guest has seen answered and we had not noted.
    fn finish_last(&self, memory: &impl Memory, used_in_ring: u16) -> Result<(), Fault> {
        let noted = memory.load(self.start + USED_AT)?;
        let missed = used_in_ring.wrapping_sub(noted).min(self.size);
        let mut head = memory.load(self.start + LAST_AT)?;
        for _ in 0..missed {
            if head >= self.size {
                break;
            }
            memory.write(self.entry(head), &[0])?;
            head = memory.load(self.entry(head) + 6)?;
        }
        memory.store(self.start + USED_AT, used_in_ring)
    }

    fn marked(&self, memory: &impl Memory) -> Result<Vec<(u64, u16)>, Fault> {
        let mut left = Vec::new();
        for head in 0..self.size {
            let mut entry = [0; ENTRY_BYTES as usize];
            memory.read(self.entry(head), &mut entry)?;
            let [mark, _, _, _, _, _, _, _, counter @ ..] = entry;
            if mark == 1 {
                left.push((u64::from_le_bytes(counter), head));
            }
        }
        Ok(left)
    }

    const fn entry(&self, head: u16) -> u64 {
        self.start + HEADER_BYTES + ENTRY_BYTES * head as u64
    }

    /// Before a request begins.
    pub fn mark(&mut self, memory: &impl Memory, head: u16) -> Result<(), Fault> {
        let entry = self.entry(head);
        memory.write(entry + 8, &self.counter.to_le_bytes())?;
        self.counter = self.counter.wrapping_add(1);
        barrier();
        memory.write(entry, &[1])
    }

    /// Before a request is put into the used ring.
    pub fn answering(&self, memory: &impl Memory, head: u16) -> Result<(), Fault> {
        let last = memory.load(self.start + LAST_AT)?;
        memory.store(self.entry(head) + 6, last)?;
        memory.store(self.start + LAST_AT, head)
    }

    /// After the used ring's index says so.
    pub fn answered(&self, memory: &impl Memory, head: u16, used: u16) -> Result<(), Fault> {
        barrier();
        memory.write(self.entry(head), &[0])?;
        memory.store(self.start + USED_AT, used)
    }
}

/// A kill may come between any two instructions, and the memory outlives us: the
/// compiler must keep their order. (What another core sees is no matter here.)
fn barrier() {
    std::sync::atomic::compiler_fence(std::sync::atomic::Ordering::SeqCst);
}
