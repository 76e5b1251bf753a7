//! Aligned memory for file I/O. Small buffers come from one arena that the ring
//! knows by heart (a registered buffer: no page is pinned anew for each
//! operation); larger ones, and all when the arena is used up, from the heap.

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
}

impl Drop for Arena {
    fn drop(&mut self) {
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
        let bytes = bytes.max(ALIGNMENT).next_multiple_of(ALIGNMENT);
        let class = bytes.next_power_of_two().trailing_zeros() - CLASS_SHIFT_MIN;
        if (class as usize) < CLASSES
            && let Some(start) = self.take_class(class as usize)
        {
            let capacity = 1 << (class + CLASS_SHIFT_MIN);
            return Buffer { start, capacity, origin: Some((Rc::clone(&self.arena), class as u8)) };
        }
        Buffer { start: allocate(bytes), capacity: bytes, origin: None }
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
    /// `None`: of the heap.
    origin: Option<(Rc<Arena>, u8)>,
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
        // zeros) and belong to this buffer alone.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.capacity) }
    }

    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and `self` is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.capacity) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match &self.origin {
            Some((arena, class)) => {
                arena.state.borrow_mut().free[usize::from(*class)].push(self.start);
            }
            // SAFETY: it came from `alloc_zeroed` with this very layout.
            None => unsafe { dealloc(self.start.as_ptr(), layout(self.capacity)) },
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
        assert!(again.origin.is_some(), "the arena serves again");
    }
}
