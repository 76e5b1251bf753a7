//! Moves bytes: an operation with a token goes in, a completion with the token
//! comes out. It decides nothing.
//!
//! Two engines do the same: [`uring`] (one ring, one thread, sockets and files
//! alike) and [`threads`] (blocking system calls on a few threads, `poll` for
//! sockets), for hosts where io_uring is disabled. The conformance test runs
//! one script on both and on the simulated disk.

pub mod buffer;
mod restrict;
pub mod threads;
pub mod uring;

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

pub use buffer::{Buffer, Pool, Window};

/// What the caller knows an operation by.
pub type Token = u64;

/// A file or device that an engine was told of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileId {
    pub(crate) fd: RawFd,
    /// Its place in the ring's table of registered files, where it has one.
    pub(crate) fixed: Option<u32>,
}

/// One thing for the kernel to do. Memory is named by address: see [`Engine::start`].
#[derive(Debug, Clone, Copy)]
pub enum Io {
    Accept {
        listener: RawFd,
    },
    Receive {
        socket: RawFd,
        into: *mut u8,
        length: usize,
    },
    Send {
        socket: RawFd,
        message: *const libc::msghdr,
    },
    Read {
        file: FileId,
        into: *mut u8,
        length: usize,
        offset: u64,
    },
    Write {
        file: FileId,
        from: *const u8,
        length: usize,
        offset: u64,
        durable: bool,
    },
    /// To and from several places at once.
    ReadVectored {
        file: FileId,
        into: *const libc::iovec,
        count: usize,
        offset: u64,
    },
    WriteVectored {
        file: FileId,
        from: *const libc::iovec,
        count: usize,
        offset: u64,
        durable: bool,
    },
    Sync {
        file: FileId,
    },
    /// `fallocate(2)` with this mode.
    Allocate {
        file: FileId,
        mode: i32,
        offset: u64,
        length: u64,
    },
    /// Reads eight bytes from an eventfd.
    Wake {
        eventfd: RawFd,
        into: *mut u8,
    },
    /// Adds to an eventfd what the eight bytes say.
    Ring {
        eventfd: RawFd,
        from: *const u8,
    },
    /// Ends when something can be received.
    Poll {
        socket: RawFd,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    pub token: Token,
    /// As the system call's: what it returned, or `-errno`.
    pub result: i32,
}

/// How long [`Engine::reap`] may wait for the first completion.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    No,
    /// Looks again and again before it sleeps: for answers that are near.
    SpinThen {
        spin: Duration,
        sleep: Duration,
    },
    UpTo(Duration),
}

pub trait Engine {
    /// Which engine this is, for the status and the log.
    fn name(&self) -> &'static str;

    /// Queues an operation; it may begin at once or at the next [`Self::reap`].
    ///
    /// # Safety
    /// Every address in `io` must stay valid, and memory that is written to
    /// untouched by others, until the completion with this token was reaped.
    unsafe fn start(&mut self, token: Token, io: Io);

    /// Appends what has completed.
    fn reap(&mut self, wait: Wait, completions: &mut Vec<Completion>) -> io::Result<()>;

    /// Asks for an operation to end early; its completion still comes.
    fn cancel(&mut self, token: Token);

    fn add_file(&mut self, fd: BorrowedFd<'_>) -> FileId {
        FileId { fd: fd.as_raw_fd(), fixed: None }
    }

    /// No operation on the file may be in flight.
    fn remove_file(&mut self, _file: FileId) {}
}

impl<E: Engine + ?Sized> Engine for Box<E> {
    fn name(&self) -> &'static str {
        (**self).name()
    }

    unsafe fn start(&mut self, token: Token, io: Io) {
        // SAFETY: the caller keeps the promise that this very method asks for.
        unsafe { (**self).start(token, io) }
    }

    fn reap(&mut self, wait: Wait, completions: &mut Vec<Completion>) -> io::Result<()> {
        (**self).reap(wait, completions)
    }

    fn cancel(&mut self, token: Token) {
        (**self).cancel(token);
    }

    fn add_file(&mut self, fd: BorrowedFd<'_>) -> FileId {
        (**self).add_file(fd)
    }

    fn remove_file(&mut self, file: FileId) {
        (**self).remove_file(file);
    }
}

/// Where a file has data and where holes, from `offset` on: (length, is a hole).
/// At most `count_max` extents; adjoining ones of one kind are one.
pub fn extents(
    file: FileId,
    offset: u64,
    length: u64,
    count_max: usize,
) -> io::Result<Vec<(u64, bool)>> {
    extents_of_fd(file.fd, offset, length, count_max)
}

/// The same for a descriptor that the caller holds open.
pub fn extents_of_fd(
    fd: RawFd,
    offset: u64,
    length: u64,
    count_max: usize,
) -> io::Result<Vec<(u64, bool)>> {
    let end = offset + length;
    let seek = |from: u64, whence| {
        // SAFETY: lseek touches no memory, and the caller holds the file open.
        let at = unsafe { libc::lseek(fd, from as i64, whence) };
        if at >= 0 {
            return Ok((at as u64).min(end));
        }
        let error = io::Error::last_os_error();
        // No data (or no hole) behind this place.
        if error.raw_os_error() == Some(libc::ENXIO) { Ok(end) } else { Err(error) }
    };
    let mut found = Vec::new();
    let mut at = offset;
    while at < end && found.len() < count_max {
        let data = match seek(at, libc::SEEK_DATA) {
            Ok(data) => data,
            // A device or a file system that does not tell: all of it is data.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => at,
            Err(error) => return Err(error),
        };
        if data > at {
            found.push((data - at, true));
            at = data;
            continue;
        }
        let hole = match seek(at, libc::SEEK_HOLE) {
            Ok(hole) if hole > at => hole,
            Ok(_) => end,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => end,
            Err(error) => return Err(error),
        };
        found.push((hole - at, false));
        at = hole;
    }
    Ok(found)
}
