//! Aligned memory for file I/O. Small buffers come from one arena that the ring
//! knows by heart (a registered buffer: no page is pinned anew for each
//! operation), and from the heap when it is used up. Large ones are mapped: their
//! pages come only when bytes do, so that a peer which announces much and sends
//! nothing costs nothing; a few are kept for the next request of their size.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;

use crate::nbd::Payload;

/// What O_DIRECT asks of memory at most: a block of 4 KiB.
pub const ALIGNMENT: usize = 4096;

/// Enough for a thousand requests of 4 KiB and some tens of 128 KiB at once.
const ARENA_BYTES: usize = 16 << 20;

/// Size classes of the arena are powers of two from 4 KiB to 256 KiB.
const CLASS_SHIFT_MIN: u32 = 12;
const CLASSES: usize = 7;

/// Bytes of large buffers that are kept for later: eight requests of 1 MiB, with
/// room for others.
const KEPT_BYTES_MAX: usize = 16 << 20;

#[derive(Debug)]
struct Arena {
    base: NonNull<u8>,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Never carved yet.
    fresh_at: usize,
    free: [Vec<NonNull<u8>>; CLASSES],
    /// Large buffers without a user.
    kept: Vec<(NonNull<u8>, usize)>,
    kept_bytes: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Origin {
    Class(usize),
    Heap,
    Mapped,
}

impl Drop for Arena {
    fn drop(&mut self) {
        for (start, capacity) in self.state.get_mut().kept.drain(..) {
            unmap(start, capacity);
        }
        // SAFETY: `base` came from `alloc_zeroed` with this layout, and every
        // buffer holds the arena alive.
        unsafe { dealloc(self.base.as_ptr(), layout(ARENA_BYTES)) }
    }
}

fn layout(bytes: usize) -> Layout {
    match Layout::from_size_align(bytes, ALIGNMENT) {
        Ok(layout) => layout,
        Err(_) => unreachable!("buffers are bounded far below isize::MAX"),
    }
}

fn allocate(bytes: usize) -> NonNull<u8> {
    let layout = layout(bytes);
    // SAFETY: the size is not zero: callers ask for at least one block.
    let start = unsafe { alloc_zeroed(layout) };
    NonNull::new(start).unwrap_or_else(|| handle_alloc_error(layout))
}

fn map(bytes: usize) -> NonNull<u8> {
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new private mapping, at a place of the kernel's choice.
    let mapped =
        unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE) };
    mapped
        .ok()
        .and_then(|start| NonNull::new(start.cast()))
        .unwrap_or_else(|| handle_alloc_error(layout(bytes)))
}

fn unmap(start: NonNull<u8>, bytes: usize) {
    // SAFETY: it came from `map` with this length, and its only owner gives it up.
    let unmapped = unsafe { rustix::mm::munmap(start.as_ptr().cast(), bytes) };
    assert!(unmapped.is_ok(), "a mapping of ours can be taken down");
}

/// The buffers of one thread.
#[derive(Debug, Clone)]
pub struct Pool {
    arena: Rc<Arena>,
}

impl Pool {
    pub fn new() -> Self {
        let base = allocate(ARENA_BYTES);
        Self { arena: Rc::new(Arena { base, state: RefCell::default() }) }
    }

    /// The registered part, for the ring.
    pub fn arena(&self) -> (NonNull<u8>, usize) {
        (self.arena.base, ARENA_BYTES)
    }

    pub fn take(&self, bytes: usize) -> Buffer {
        let capacity = bytes.max(ALIGNMENT).next_power_of_two();
        let class = (capacity.trailing_zeros() - CLASS_SHIFT_MIN) as usize;
        let (start, origin) = if class >= CLASSES {
            (self.take_large(capacity), Origin::Mapped)
        } else if let Some(start) = self.take_class(class) {
            (start, Origin::Class(class))
        } else {
            (allocate(capacity), Origin::Heap)
        };
        Buffer { start, capacity, origin, arena: Rc::clone(&self.arena) }
    }

    fn take_large(&self, capacity: usize) -> NonNull<u8> {
        let mut state = self.arena.state.borrow_mut();
        let Some(at) = state.kept.iter().position(|(_, kept)| *kept == capacity) else {
            return map(capacity);
        };
        state.kept_bytes -= capacity;
        state.kept.swap_remove(at).0
    }

    fn take_class(&self, class: usize) -> Option<NonNull<u8>> {
        let mut state = self.arena.state.borrow_mut();
        if let Some(start) = state.free[class].pop() {
            return Some(start);
        }
        let bytes = 1 << (class as u32 + CLASS_SHIFT_MIN);
        if state.fresh_at + bytes > ARENA_BYTES {
            return None;
        }
        // SAFETY: the sum was just found to lie within the arena.
        let start = unsafe { self.arena.base.add(state.fresh_at) };
        state.fresh_at += bytes;
        Some(start)
    }
}

impl Default for Pool {
    fn default() -> Self {
        Self::new()
    }
}

/// Memory that belongs to one request. Its address stays while it lives.
#[derive(Debug)]
pub struct Buffer {
    start: NonNull<u8>,
    capacity: usize,
    origin: Origin,
    arena: Rc<Arena>,
}

impl Buffer {
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    pub fn address(&mut self) -> *mut u8 {
        self.start.as_ptr()
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: `capacity` bytes from `start` are initialised (allocated as
        // zeros or mapped) and belong to this buffer alone.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.capacity) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.capacity) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut state = self.arena.state.borrow_mut();
        match self.origin {
            Origin::Class(class) => state.free[class].push(self.start),
            Origin::Mapped if state.kept_bytes + self.capacity <= KEPT_BYTES_MAX => {
                state.kept_bytes += self.capacity;
                state.kept.push((self.start, self.capacity));
            }
            Origin::Mapped => unmap(self.start, self.capacity),
            // SAFETY: it came from `allocate` with this very size.
            Origin::Heap => unsafe { dealloc(self.start.as_ptr(), layout(self.capacity)) },
        }
    }
}

/// The part of a buffer that is a reply's payload.
#[derive(Debug)]
pub struct Window {
    pub buffer: Buffer,
    pub at: usize,
    pub length: usize,
}

impl Payload for Window {
    fn bytes(&self) -> &[u8] {
        &self.buffer.bytes()[self.at..self.at + self.length]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_apart_and_come_back() {
        let pool = Pool::new();
        let mut taken: Vec<Buffer> =
            (0..3000).map(|i| pool.take(1 + (i * 977) % (300 << 10))).collect();
        let mut places: Vec<(usize, usize)> =
            taken.iter_mut().map(|b| (b.address() as usize, b.capacity())).collect();
        places.sort_unstable();
        assert!(places.iter().all(|(start, _)| start.is_multiple_of(ALIGNMENT)));
        assert!(places.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        drop(taken);
        let again = pool.take(4096);
        assert!(matches!(again.origin, Origin::Class(_)), "the arena serves again");
        let first = pool.take(1 << 20).address();
        let kept = pool.take(1 << 20).address();
        assert_eq!(first, kept, "a large one was kept");
    }
}
