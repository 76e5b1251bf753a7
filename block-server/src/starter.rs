//! Who starts our successor when SIGHUP asks for one: a process that was split off
//! before anything was opened and before we confined ourselves, since after that we
//! can neither read a changed file nor start a program.
//!
//! ```text
//!  server (confined)             starter (waits)
//!    │ ── one byte ─────────────▶ │ starts the same program with the same words
//!    │ ◀─── a socket's end ────── │
//!    │ ◀══ hand-over ══▶ successor, whose standard input is the other end
//! ```
//!
//! What may never be true: that the server tells it what to start. It hears one
//! byte, and its end when the server ends.

use std::ffi::OsString;
use std::io::{self, IoSlice, IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// Tells a successor that its predecessor speaks at its standard input.
const PREDECESSOR: &str = "BLOCK_SERVER_PREDECESSOR";

/// How long it may take to start a program.
const START_MAX: Duration = Duration::from_secs(10);

/// The server's end.
#[derive(Debug)]
pub struct Starter {
    channel: UnixStream,
}

impl Starter {
    /// Splits it off. To be called while there is one thread and nothing is open.
    pub fn split_off() -> io::Result<Self> {
        let (own, its) = UnixStream::pair()?;
        let program = std::env::current_exe()?;
        // SAFETY: there is one thread, so the child may do whatever we may.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(own);
                wait_and_start(close_all_but(its), &program);
                std::process::exit(0)
            }
            _ => {
                own.set_read_timeout(Some(START_MAX))?;
                Ok(Self { channel: own })
            }
        }
    }

    /// Has a successor started; gives the socket at which it asks us.
    pub fn start(&self) -> io::Result<UnixStream> {
        (&self.channel).write_all(b"!")?;
        let mut byte = [0];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut byte)];
        let got = retry_on_intr(|| {
            recvmsg(&self.channel, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)
        })?;
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        match fd {
            Some(fd) => Ok(fd.into()),
            None if got.bytes == 0 => Err(io::ErrorKind::UnexpectedEof.into()),
            None => Err(io::Error::other("the program cannot be started; its log says why")),
        }
    }
}

/// Only this one and the three standard ones: whatever was passed on to the server,
/// and would stay open with us, is not ours.
fn close_all_but(channel: UnixStream) -> UnixStream {
    const PLACE: i32 = 3;
    // SAFETY: no descriptor but this one is used from here on; it is taken once.
    unsafe {
        libc::dup2(channel.as_raw_fd(), PLACE);
        libc::syscall(libc::SYS_close_range, PLACE + 1, u32::MAX, 0);
        libc::fcntl(PLACE, libc::F_SETFD, libc::FD_CLOEXEC);
        std::mem::forget(channel);
        UnixStream::from(OwnedFd::from_raw_fd(PLACE))
    }
}

/// Until the server ends.
fn wait_and_start(mut channel: UnixStream, program: &PathBuf) {
    let words: Vec<OsString> = std::env::args_os().skip(1).collect();
    let mut started: Vec<Child> = Vec::new();
    let mut byte = [0];
    while matches!(retry_on_intr(|| rustix::io::read(&channel, &mut byte)), Ok(1..)) {
        // Those that came to nothing have ended.
        started.retain_mut(|child| matches!(child.try_wait(), Ok(None)));
        let answered = match start(program, &words) {
            Ok((child, end)) => {
                started.push(child);
                send(&channel, &end)
            }
            Err(error) => {
                tracing::error!("cannot start {}: {error}", program.display());
                channel.write_all(b"?")
            }
        };
        if answered.is_err() {
            return;
        }
    }
}

fn start(program: &PathBuf, words: &[OsString]) -> io::Result<(Child, UnixStream)> {
    let (own, its) = UnixStream::pair()?;
    let child = Command::new(program)
        .args(words)
        .env(PREDECESSOR, "stdin")
        .env_remove("LISTEN_PID")
        .stdin(Stdio::from(OwnedFd::from(its)))
        // Whoever waited for the first one's `ready` may be gone.
        .stdout(Stdio::null())
        .spawn()?;
    Ok((child, own))
}

fn send(channel: &UnixStream, end: &UnixStream) -> io::Result<()> {
    let fds = [end.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    let slices = [IoSlice::new(b"!")];
    retry_on_intr(|| sendmsg(channel, &slices, &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

/// Whether we were started so; the predecessor's end is then no standard input any more.
pub fn predecessor() -> io::Result<Option<UnixStream>> {
    if std::env::var_os(PREDECESSOR).is_none() {
        return Ok(None);
    }
    let stream = std::io::stdin().as_fd().try_clone_to_owned()?;
    let nothing = std::fs::File::open("/dev/null")?;
    rustix::stdio::dup2_stdin(&nothing)?;
    Ok(Some(stream.into()))
}
