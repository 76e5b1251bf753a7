//! Aligned memory for file I/O. Buffers come from one arena that the ring knows by
//! heart (a registered buffer: no page is pinned anew for each operation), in huge
//! pages where the kernel has them: what lies in one page is one segment to the
//! disk, where 1 MiB in small pages is more segments than a request may have.
//! When the arena is used up, small ones come from the heap. Large ones are mapped:
//! their pages come only when bytes do, so that a peer which announces much and
//! sends nothing costs nothing; a few are kept for the next request of their size.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::cell::RefCell;
use std::ptr::NonNull;
use std::rc::Rc;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous, munmap};

use crate::nbd::Payload;

/// What O_DIRECT asks of memory at most: a block of 4 KiB.
pub const ALIGNMENT: usize = 4096;

/// A huge page, on every machine that we run on.
const HUGE: usize = 2 << 20;

/// Two parts of the arena, apart from each other so that many small buffers,
/// which are never joined again, leave room for large ones: enough for a thousand
/// requests of 4 KiB and some tens of 128 KiB, and for sixteen of 1 MiB, at once.
const PART_BYTES: usize = 16 << 20;
const ARENA_BYTES: usize = 2 * PART_BYTES;

/// Size classes are powers of two from 4 KiB to 2 MiB; from this one (512 KiB)
/// on they lie in the second part.
const CLASS_SHIFT_MIN: u32 = 12;
const CLASSES: usize = 10;
const CLASS_LARGE: usize = 7;

/// Bytes of mapped buffers that are kept for later.
const KEPT_BYTES_MAX: usize = 16 << 20;

#[derive(Debug)]
struct Arena {
    base: NonNull<u8>,
    state: RefCell<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Bytes of each part that were given out at least once.
    carved: [usize; 2],
    free: [Vec<NonNull<u8>>; CLASSES],
    /// Mapped buffers without a user.
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
        // Every buffer holds the arena alive, so none is left.
        unmap(self.base, ARENA_BYTES);
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
    let protection = ProtFlags::READ | ProtFlags::WRITE;
    // SAFETY: a new private mapping, at a place of the kernel's choice.
    let mapped =
        unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, protection, MapFlags::PRIVATE) };
    mapped
        .ok()
        .and_then(|start| NonNull::new(start.cast()))
        .unwrap_or_else(|| handle_alloc_error(layout(bytes)))
}

/// In huge pages, where the kernel gives them; a whole number of them.
fn map_huge(bytes: usize) -> NonNull<u8> {
    let start = map(bytes + HUGE);
    let before = start.as_ptr().align_offset(HUGE);
    // SAFETY: the sum of both is within the mapping, which is larger by a huge page.
    let (aligned, end) = unsafe { (start.add(before), start.add(before + bytes)) };
    for (at, length) in [(start, before), (end, HUGE - before)] {
        if length > 0 {
            unmap(at, length);
        }
    }
    // SAFETY: advice on a mapping of ours, which nobody uses yet. A kernel without
    // huge pages refuses, and small ones do as well.
    let _ = unsafe { madvise(aligned.as_ptr().cast(), bytes, Advice::LinuxHugepage) };
    aligned
}

fn unmap(start: NonNull<u8>, bytes: usize) {
    // SAFETY: it came from `map` with this length, and its only owner gives it up.
    let unmapped = unsafe { munmap(start.as_ptr().cast(), bytes) };
    assert!(unmapped.is_ok(), "a mapping of ours can be taken down");
}

/// The buffers of one thread.
#[derive(Debug, Clone)]
pub struct Pool {
    arena: Rc<Arena>,
}

impl Pool {
    pub fn new() -> Self {
        let base = map_huge(ARENA_BYTES);
        Self { arena: Rc::new(Arena { base, state: RefCell::default() }) }
    }

    /// The registered part, for the ring.
    pub fn arena(&self) -> (NonNull<u8>, usize) {
        (self.arena.base, ARENA_BYTES)
    }

    pub fn take(&self, bytes: usize) -> Buffer {
        let capacity = bytes.max(ALIGNMENT).next_power_of_two();
        let class = (capacity.trailing_zeros() - CLASS_SHIFT_MIN) as usize;
        let (start, origin) = match self.take_class(class) {
            Some(start) => (start, Origin::Class(class)),
            None if class < CLASS_LARGE => (allocate(capacity), Origin::Heap),
            None => (self.take_mapped(capacity), Origin::Mapped),
        };
        Buffer { start, capacity, origin, arena: Rc::clone(&self.arena) }
    }

    fn take_mapped(&self, capacity: usize) -> NonNull<u8> {
        let mut state = self.arena.state.borrow_mut();
        let Some(at) = state.kept.iter().position(|(_, kept)| *kept == capacity) else {
            return map(capacity);
        };
        state.kept_bytes -= capacity;
        state.kept.swap_remove(at).0
    }

    fn take_class(&self, class: usize) -> Option<NonNull<u8>> {
        let mut state = self.arena.state.borrow_mut();
        if let Some(start) = state.free.get_mut(class)?.pop() {
            return Some(start);
        }
        let bytes = 1 << (class as u32 + CLASS_SHIFT_MIN);
        let part = usize::from(class >= CLASS_LARGE);
        let at = state.carved[part];
        if at + bytes > PART_BYTES {
            return None;
        }
        state.carved[part] += bytes;
        // SAFETY: the sum was just found to lie within the part, which lies in the arena.
        Some(unsafe { self.arena.base.add(part * PART_BYTES + at) })
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
            (0..3000).map(|i| pool.take(1 + (i * 97_777) % (5 << 20))).collect();
        let mut places: Vec<(usize, usize)> =
            taken.iter_mut().map(|b| (b.address() as usize, b.capacity())).collect();
        places.sort_unstable();
        assert!(places.iter().all(|(start, _)| start.is_multiple_of(ALIGNMENT)));
        assert!(places.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
        drop(taken);
        let again = pool.take(4096);
        assert!(matches!(again.origin, Origin::Class(_)), "the arena serves again");
        let pool = Pool::new();
        let first = pool.take(8 << 20).address();
        let kept = pool.take(8 << 20).address();
        assert_eq!(first, kept, "a large one was kept");
    }
}
