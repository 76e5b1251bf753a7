//! What the threads of a process tell each other of the way to the disk.
//!
//! Each writes a lane of its own, at no more than a store, and reads the others'
//! only where it has much on its way itself. Nobody wakes anybody: who waits has
//! something on its way, and looks again when that has ended.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes on their way, and in the lowest byte how many volumes wait for more.
/// Alone on what two cores may fetch together.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Place(AtomicU64);

const WAITING_BITS: u32 = 8;
const WAITING_MAX: u64 = (1 << WAITING_BITS) - 1;

/// One thread's lane, and its sight of the others'.
#[derive(Debug)]
pub struct Lane {
    all: Arc<[Place]>,
    own: usize,
}

/// What other threads have on its way.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Others {
    pub bytes: u64,
    /// Volumes that would take more; a thread that has anything on its way counts
    /// as one at least.
    pub volumes: u64,
}

impl Lane {
    /// Of a thread that shares its disk with no other.
    pub fn alone() -> Self {
        Self::for_threads(1).remove(0)
    }

    /// One for each of so many threads.
    pub fn for_threads(count: usize) -> Vec<Self> {
        let all: Arc<[Place]> = (0..count).map(|_| Place::default()).collect();
        (0..count).map(|own| Self { all: Arc::clone(&all), own }).collect()
    }

    pub(super) fn set(&self, bytes: u64, waiting: usize) {
        let waiting = WAITING_MAX.min(waiting as u64);
        self.all[self.own].0.store(bytes << WAITING_BITS | waiting, Ordering::Relaxed);
    }

    pub(super) fn others(&self) -> Others {
        let mut others = Others::default();
        for (index, place) in self.all.iter().enumerate() {
            let word = if index == self.own { 0 } else { place.0.load(Ordering::Relaxed) };
            let bytes = word >> WAITING_BITS;
            if bytes > 0 {
                others.bytes += bytes;
                others.volumes += (word & WAITING_MAX).max(1);
            }
        }
        others
    }
}
