//! The io_uring engine: one ring, used by one thread.
//!
//! What was measured to pay is in (docs/adr/0031): many operations a system
//! call, registered files and buffers, DEFER_TASKRUN with SINGLE_ISSUER. SQPOLL
//! and zero-copy send did not pay and are absent.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::time::{Duration, Instant};

use io_uring::types::{Fd, Fixed, FsyncFlags, SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue, opcode, squeue};

use super::{Completion, Engine, FileId, Io, Pool, Token, Wait};

/// Submission entries; when they are used up, what is queued is submitted early.
const ENTRIES: u32 = 1024;

/// Completions may outrun submissions by this much before the kernel must keep
/// them in a list of its own.
const COMPLETIONS: u32 = 4096;

/// Files that can be registered at once; a volume beyond that goes unregistered.
const FILES_MAX: u32 = 1024;

/// Marks completions that nobody waits for.
const NOBODY: u64 = u64::MAX;

/// Marks the wait for a client before it is accepted. An accept that waits by itself
/// is woken alone, as one of all that wait at the socket: a predecessor that was
/// killed waits there until the kernel has taken its ring down, and a wake that it
/// got would leave the client in the backlog for ever. A poll is woken with all.
const HEARD: u64 = 1 << 63;

pub struct Uring {
    ring: IoUring,
    free_files: Vec<u32>,
    arena: Option<std::ops::Range<usize>>,
}

impl Uring {
    pub fn new(pool: &Pool) -> io::Result<Self> {
        let ring = IoUring::builder()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_cqsize(COMPLETIONS)
            .setup_r_disabled()
            .build(ENTRIES)?;
        let free_files = match ring.submitter().register_files_sparse(FILES_MAX) {
            Ok(()) => (0..FILES_MAX).rev().collect(),
            Err(error) => {
                tracing::warn!(%error, "files go unregistered, at some more CPU an operation");
                Vec::new()
            }
        };
        let (base, length) = pool.arena();
        let vector = libc::iovec { iov_base: base.as_ptr().cast(), iov_len: length };
        // SAFETY: the arena lives as long as the pool, which the worker keeps
        // beside the engine; the kernel pins its pages until the ring is closed.
        let arena = match unsafe { ring.submitter().register_buffers(&[vector]) } {
            Ok(()) => Some(base.as_ptr() as usize..base.as_ptr() as usize + length),
            Err(error) => {
                // RLIMIT_MEMLOCK, mostly.
                tracing::warn!(%error, "buffers go unregistered, at some more CPU an operation");
                None
            }
        };
        super::restrict::enable(&ring)?;
        Ok(Self { ring, free_files, arena })
    }

    fn is_registered(&self, start: *const u8, length: usize) -> bool {
        let start = start as usize;
        self.arena.as_ref().is_some_and(|a| a.start <= start && start + length <= a.end)
    }

    fn entry(&self, io: Io) -> squeue::Entry {
        match io {
            Io::Accept { listener } => {
                opcode::Accept::new(Fd(listener), std::ptr::null_mut(), std::ptr::null_mut())
                    .flags(libc::SOCK_CLOEXEC)
                    .build()
            }
            Io::Receive { socket, into, length } => {
                opcode::Recv::new(Fd(socket), into, length as u32).build()
            }
            Io::Send { socket, message } => {
                opcode::SendMsg::new(Fd(socket), message).flags(libc::MSG_NOSIGNAL as u32).build()
            }
            Io::Read { file, into, length, offset } => {
                if self.is_registered(into, length) {
                    match file.fixed {
                        Some(i) => opcode::ReadFixed::new(Fixed(i), into, length as u32, 0)
                            .offset(offset)
                            .build(),
                        None => opcode::ReadFixed::new(Fd(file.fd), into, length as u32, 0)
                            .offset(offset)
                            .build(),
                    }
                } else {
                    match file.fixed {
                        Some(i) => {
                            opcode::Read::new(Fixed(i), into, length as u32).offset(offset).build()
                        }
                        None => opcode::Read::new(Fd(file.fd), into, length as u32)
                            .offset(offset)
                            .build(),
                    }
                }
            }
            Io::Write { file, from, length, offset, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                let length32 = length as u32;
                match (self.is_registered(from, length), file.fixed) {
                    (true, Some(i)) => opcode::WriteFixed::new(Fixed(i), from, length32, 0)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                    (true, None) => opcode::WriteFixed::new(Fd(file.fd), from, length32, 0)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                    (false, Some(i)) => opcode::Write::new(Fixed(i), from, length32)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                    (false, None) => opcode::Write::new(Fd(file.fd), from, length32)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                }
            }
            Io::ReadVectored { file, into, count, offset } => match file.fixed {
                Some(i) => opcode::Readv::new(Fixed(i), into, count as u32).offset(offset).build(),
                None => opcode::Readv::new(Fd(file.fd), into, count as u32).offset(offset).build(),
            },
            Io::WriteVectored { file, from, count, offset, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                match file.fixed {
                    Some(i) => opcode::Writev::new(Fixed(i), from, count as u32)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                    None => opcode::Writev::new(Fd(file.fd), from, count as u32)
                        .offset(offset)
                        .rw_flags(flags)
                        .build(),
                }
            }
            Io::Sync { file } => {
                opcode::Fsync::new(Fd(file.fd)).flags(FsyncFlags::DATASYNC).build()
            }
            Io::Allocate { file, mode, offset, length } => {
                opcode::Fallocate::new(Fd(file.fd), length).offset(offset).mode(mode).build()
            }
            Io::Wake { eventfd, into } => opcode::Read::new(Fd(eventfd), into, 8).build(),
            Io::Ring { eventfd, from } => opcode::Write::new(Fd(eventfd), from, 8).build(),
            Io::Poll { socket } => {
                opcode::PollAdd::new(Fd(socket), (libc::POLLIN | libc::POLLRDHUP) as u32).build()
            }
        }
    }

    /// # Safety
    /// As [`Engine::start`].
    unsafe fn push(&mut self, entry: squeue::Entry) {
        // SAFETY: the caller keeps the memory that the entry names.
        while unsafe { self.ring.submission().push(&entry) }.is_err() {
            if let Err(error) = self.ring.submit() {
                // EBUSY or EAGAIN: completions must be reaped first. They are
                // kept by the kernel, so asking again makes room in the end.
                tracing::debug!(%error, "the ring is full");
                std::thread::yield_now();
            }
        }
    }

    /// Runs deferred work and submits, without waiting.
    fn enter(&mut self) -> io::Result<()> {
        let queued = {
            let mut submission = self.ring.submission();
            submission.sync();
            submission.len()
        };
        // SAFETY: no argument is passed; the entries' memory is kept by `start`'s callers.
        let entered = unsafe {
            self.ring.submitter().enter::<libc::sigset_t>(
                queued as u32,
                0,
                1, // IORING_ENTER_GETEVENTS
                None,
            )
        };
        passing(entered.map(|_| ()))
    }

    fn sleep(&mut self, duration: Duration) -> io::Result<()> {
        let timeout = Timespec::from(duration);
        let arguments = SubmitArgs::new().timespec(&timeout);
        passing(self.ring.submitter().submit_with_args(1, &arguments).map(|_| ()))
    }

    fn collect(&mut self, completions: &mut Vec<Completion>) -> bool {
        let before = completions.len();
        completions.extend(
            self.ring
                .completion()
                .filter(|c| c.user_data() & HEARD == 0)
                .map(|c: cqueue::Entry| Completion { token: c.user_data(), result: c.result() }),
        );
        completions.len() > before
    }

    fn has_work(&mut self) -> bool {
        let submission = self.ring.submission();
        submission.taskrun() || submission.cq_overflow() || !submission.is_empty()
    }
}

/// What only means "look again" is no error.
fn passing(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

impl Engine for Uring {
    fn name(&self) -> &'static str {
        "io_uring"
    }

    unsafe fn start(&mut self, token: Token, io: Io) {
        if let Io::Accept { listener } = io {
            let heard = opcode::PollAdd::new(Fd(listener), libc::POLLIN as u32).build();
            let heard = heard.user_data(token | HEARD).flags(squeue::Flags::IO_LINK);
            // SAFETY: a poll names no memory.
            unsafe { self.push(heard) }
        }
        let entry = self.entry(io).user_data(token);
        // SAFETY: the caller's promise is the one that `push` asks for.
        unsafe { self.push(entry) }
    }

    #[expect(clippy::disallowed_methods, reason = "the engine is a shell; it bounds its own spin")]
    fn reap(&mut self, wait: Wait, completions: &mut Vec<Completion>) -> io::Result<()> {
        match wait {
            Wait::No => self.enter()?,
            Wait::UpTo(duration) => {
                if self.ring.completion().is_empty() {
                    self.sleep(duration)?;
                } else {
                    self.enter()?;
                }
            }
            Wait::SpinThen { spin, sleep } => {
                // After a reply that went at once there is nothing to tell the kernel.
                if self.has_work() {
                    self.enter()?;
                }
                if self.collect(completions) {
                    return Ok(());
                }
                let end = Instant::now() + spin;
                while Instant::now() < end {
                    if self.has_work() {
                        self.enter()?;
                    }
                    if self.collect(completions) {
                        return Ok(());
                    }
                    std::hint::spin_loop();
                }
                self.sleep(sleep)?;
            }
        }
        self.collect(completions);
        Ok(())
    }

    fn cancel(&mut self, token: Token) {
        for target in [token, token | HEARD] {
            let entry = opcode::AsyncCancel::new(target).build().user_data(NOBODY);
            // SAFETY: a cancellation names no memory.
            unsafe { self.push(entry) }
        }
    }

    fn add_file(&mut self, fd: BorrowedFd<'_>) -> FileId {
        let fd = fd.as_raw_fd();
        let fixed = self
            .free_files
            .pop()
            .filter(|index| self.ring.submitter().register_files_update(*index, &[fd]).is_ok());
        FileId { fd, fixed }
    }

    fn remove_file(&mut self, file: FileId) {
        if let Some(index) = file.fixed
            && self.ring.submitter().register_files_update(index, &[-1]).is_ok()
        {
            self.free_files.push(index);
        }
    }
}
