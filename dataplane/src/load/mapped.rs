//! An array of the kernel's as memory of ours: a thousand rules are some thirty thousand
//! words, and a call for each takes too long, as does a mapping for each change.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _};
use std::ptr::NonNull;

use bytemuck::Pod;

use super::syscall::sizes;

/// A whole array map (one made with `BPF_F_MMAPABLE`), for as long as this lives.
#[derive(Debug)]
pub struct Mapped<V> {
    memory: NonNull<V>,
    len: usize,
}

// SAFETY: the memory is the kernel's and bound to no thread.
unsafe impl<V: Send> Send for Mapped<V> {}

impl<V: Pod> Mapped<V> {
    pub fn open(fd: impl AsFd) -> io::Result<Self> {
        // The kernel rounds each value up to whole words (kernel/bpf/arraymap.c).
        const { assert!(size_of::<V>().is_multiple_of(8), "an entry takes whole words") };
        let found = sizes(fd.as_fd())?;
        if (found.key, found.value) != (4, size_of::<V>()) {
            let text = format!("{found:?}, not an array of {} bytes each", size_of::<V>());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        let (access, fd) = (libc::PROT_READ | libc::PROT_WRITE, fd.as_fd().as_raw_fd());
        let bytes = found.entries * size_of::<V>();
        // SAFETY: a new mapping at a place of the kernel's choice touches no memory of ours;
        // the kernel refuses a range that is not the map's.
        let memory =
            unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, libc::MAP_SHARED, fd, 0) };
        match NonNull::new(memory.cast()) {
            Some(start) if memory != libc::MAP_FAILED => {
                Ok(Self { memory: start, len: found.entries })
            }
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Writes entries in a row. Programs that read them meanwhile may see any mixture.
    pub fn write(&self, first: u32, values: &[V]) -> io::Result<()> {
        let to = self.at(first, values.len())?;
        // SAFETY: `at` has seen that so many entries are there. Nobody holds a reference to
        // them: readers are programs in the kernel, and `read`, which copies.
        unsafe { to.copy_from_nonoverlapping(values.as_ptr(), values.len()) };
        Ok(())
    }

    /// A copy of entries in a row.
    pub fn read(&self, first: u32, len: usize) -> io::Result<Vec<V>> {
        let from = self.at(first, len)?;
        let mut values = vec![V::zeroed(); len];
        // SAFETY: as in `write`; any bytes are a `V`.
        unsafe { from.copy_to_nonoverlapping(values.as_mut_ptr(), len) };
        Ok(values)
    }

    fn at(&self, first: u32, len: usize) -> io::Result<*mut V> {
        let first = first as usize;
        if first.checked_add(len).is_none_or(|end| end > self.len) {
            let text = format!("entries {first} and {len} on, of {}", self.len);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        // SAFETY: within the mapping, or just behind its end where `len` is 0.
        Ok(unsafe { self.memory.as_ptr().add(first) })
    }
}

impl<V> Drop for Mapped<V> {
    fn drop(&mut self) {
        // SAFETY: the mapping was made in `open` and is used by nobody else.
        unsafe { libc::munmap(self.memory.as_ptr().cast(), self.len * size_of::<V>()) };
    }
}
