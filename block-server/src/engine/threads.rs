//! The blocking engine: file operations on a few threads, sockets by `poll` on
//! the caller's. For hosts where io_uring is disabled, and as the second
//! opinion of the conformance test.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, unbounded};

use super::{Completion, Engine, Io, Token, Wait};

/// Enough to keep a disk's queue filled; more would only switch contexts.
const THREADS: usize = 16;

/// What crosses to a thread. The addresses in it are kept valid by the promise
/// of [`Engine::start`].
struct Task(Token, Io);

// SAFETY: an `Io` is plain numbers and addresses; whoever started it promised
// that these stay valid and untouched until the completion was reaped.
unsafe impl Send for Task {}

pub struct Threads {
    tasks: Sender<Task>,
    done: Receiver<Completion>,
    /// Becomes readable when `done` has something.
    bell: OwnedFd,
    /// Socket operations that wait until they can go on.
    polled: Vec<(Token, Io)>,
    ready: Vec<Completion>,
}

impl Threads {
    pub fn new() -> io::Result<Self> {
        let bell = eventfd()?;
        let (tasks, task_queue) = unbounded::<Task>();
        let (done_sender, done) = unbounded();
        for index in 0..THREADS {
            let (queue, done) = (task_queue.clone(), done_sender.clone());
            let bell = bell.try_clone()?;
            std::thread::Builder::new().name(format!("block-io-{index}")).spawn(move || {
                for Task(token, io) in queue {
                    let completion = Completion { token, result: perform(io) };
                    if done.send(completion).is_err() {
                        return;
                    }
                    ring(&bell);
                }
            })?;
        }
        Ok(Self { tasks, done, bell, polled: Vec::new(), ready: Vec::new() })
    }

    fn poll_sockets(&mut self, timeout: Duration) -> io::Result<()> {
        let mut fds = vec![pollfd(self.bell.as_raw_fd(), libc::POLLIN)];
        fds.extend(self.polled.iter().map(|(_, io)| match *io {
            Io::Accept { listener } => pollfd(listener, libc::POLLIN),
            Io::Receive { socket, .. } => pollfd(socket, libc::POLLIN),
            Io::Send { socket, .. } => pollfd(socket, libc::POLLOUT),
            Io::Wake { eventfd, .. } => pollfd(eventfd, libc::POLLIN),
            Io::Ring { eventfd, .. } => pollfd(eventfd, libc::POLLOUT),
            Io::Poll { socket } => pollfd(socket, libc::POLLIN),
            _ => unreachable!("files are not polled"),
        }));
        let milliseconds = timeout.as_millis().min(60_000) as i32;
        // SAFETY: `fds` is a live array of that many entries.
        let count = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as u64, milliseconds) };
        if count < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(()) } else { Err(error) };
        }
        if fds[0].revents != 0 {
            silence(&self.bell);
        }
        let mut index = 0;
        self.polled.retain(|(token, io)| {
            index += 1;
            if fds[index].revents == 0 {
                return true;
            }
            let result = perform(*io);
            if result == -libc::EAGAIN {
                return true;
            }
            self.ready.push(Completion { token: *token, result });
            false
        });
        Ok(())
    }
}

impl Engine for Threads {
    fn name(&self) -> &'static str {
        "threads"
    }

    unsafe fn start(&mut self, token: Token, io: Io) {
        match io {
            Io::Accept { .. }
            | Io::Receive { .. }
            | Io::Send { .. }
            | Io::Wake { .. }
            | Io::Ring { .. }
            | Io::Poll { .. } => {
                self.polled.push((token, io));
            }
            _ => {
                // The threads live as long as this end of the channel.
                let _ = self.tasks.send(Task(token, io));
            }
        }
    }

    fn reap(&mut self, wait: Wait, completions: &mut Vec<Completion>) -> io::Result<()> {
        let timeout = match wait {
            Wait::No => Duration::ZERO,
            Wait::UpTo(sleep) | Wait::SpinThen { sleep, .. } => sleep,
        };
        let nothing = self.done.is_empty() && self.ready.is_empty();
        self.poll_sockets(if nothing { timeout } else { Duration::ZERO })?;
        completions.append(&mut self.ready);
        completions.extend(self.done.try_iter());
        Ok(())
    }

    fn cancel(&mut self, token: Token) {
        if let Some(at) = self.polled.iter().position(|(t, _)| *t == token) {
            self.polled.swap_remove(at);
            self.ready.push(Completion { token, result: -libc::ECANCELED });
        }
    }
}

fn pollfd(fd: RawFd, events: i16) -> libc::pollfd {
    libc::pollfd { fd, events, revents: 0 }
}

/// A new eventfd, for waking a thread that waits for I/O.
pub fn eventfd() -> io::Result<OwnedFd> {
    // SAFETY: takes no memory; the result is checked before it is owned.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC | libc::EFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel just gave it to us, and to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Makes an eventfd readable.
pub fn ring(bell: &OwnedFd) {
    let one = 1_u64.to_ne_bytes();
    // SAFETY: eight live bytes. A full counter (EAGAIN) is readable already.
    let _ = unsafe { libc::write(bell.as_raw_fd(), one.as_ptr().cast(), one.len()) };
}

fn silence(bell: &OwnedFd) {
    let mut count = [0_u8; 8];
    // SAFETY: eight live bytes; EAGAIN means that it is silent already.
    let _ = unsafe { libc::read(bell.as_raw_fd(), count.as_mut_ptr().cast(), count.len()) };
}

/// Makes the system call and says what it returned, or `-errno`.
fn perform(io: Io) -> i32 {
    // SAFETY: every address is valid until the completion is reaped, by the
    // promise of `Engine::start`, and the completion is made from this result.
    let result = unsafe {
        match io {
            Io::Accept { listener } => {
                let flags = libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK;
                let null = std::ptr::null_mut();
                libc::accept4(listener, null, std::ptr::null_mut(), flags) as isize
            }
            Io::Receive { socket, into, length } => {
                libc::recv(socket, into.cast(), length, libc::MSG_DONTWAIT)
            }
            Io::Send { socket, message } => {
                libc::sendmsg(socket, message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT)
            }
            Io::Read { file, into, length, offset } => {
                libc::pread(file.fd, into.cast(), length, offset as i64)
            }
            Io::Write { file, from, length, offset, durable } => {
                let vector = libc::iovec { iov_base: from.cast_mut().cast(), iov_len: length };
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                libc::pwritev2(file.fd, &raw const vector, 1, offset as i64, flags)
            }
            Io::ReadVectored { file, into, count, offset } => {
                libc::preadv(file.fd, into, count as i32, offset as i64)
            }
            Io::WriteVectored { file, from, count, offset, durable } => {
                let flags = if durable { libc::RWF_DSYNC } else { 0 };
                libc::pwritev2(file.fd, from, count as i32, offset as i64, flags)
            }
            Io::Sync { file } => libc::fdatasync(file.fd) as isize,
            Io::Allocate { file, mode, offset, length } => {
                libc::fallocate(file.fd, mode, offset as i64, length as i64) as isize
            }
            Io::Wake { eventfd, into } => libc::read(eventfd, into.cast(), 8),
            Io::Ring { eventfd, from } => libc::write(eventfd, from.cast(), 8),
            Io::Poll { .. } => 0,
        }
    };
    if result >= 0 {
        return result as i32;
    }
    -io::Error::last_os_error().raw_os_error().unwrap_or(libc::EIO)
}
