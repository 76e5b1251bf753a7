//! The shell around [`Responders`]: one thread that owns the punt device.
//!
//! It reads frames, asks the clock, writes frames, and decides nothing. Commands
//! come by a channel; an eventfd wakes it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender};
use model::InterfaceId;
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::dns::Action;
use super::dns::upstream::{Said, Sockets};
use super::metadata::TokenKey;
use super::{Counters, Responders, Served};

/// Frames read before time and commands are looked at again.
const FRAMES_A_TURN_MAX: usize = 64;

/// The longest frame a tap hands over: an MTU of 64 KiB and its header.
const FRAME_BYTES_MAX: usize = 65_536 + 14;

enum Command {
    Configure(Vec<(u32, Served)>, Vec<SocketAddr>),
    Counters(Sender<BTreeMap<InterfaceId, Counters>>),
}

/// The thread's handle. The thread ends when this is dropped.
pub struct RespondThread {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
}

impl RespondThread {
    /// `punt` is the punt device, opened non-blocking.
    pub fn start(punt: File, key: TokenKey) -> io::Result<Self> {
        let wake = Arc::new(EventFd::from_flags(EfdFlags::EFD_NONBLOCK | EfdFlags::EFD_CLOEXEC)?);
        let (commands, inbox) = crossbeam_channel::unbounded();
        let responders = Responders::new(key, random);
        let shell = Shell {
            punt,
            wake: wake.clone(),
            inbox,
            responders,
            sockets: Sockets::default(),
            ready: Vec::new(),
        };
        std::thread::Builder::new().name("respond".into()).spawn(move || shell.run())?;
        Ok(Self { commands, wake })
    }

    /// Serves exactly these from now on, by their devices' ifindex, and asks `servers`
    /// for names of others.
    pub fn configure(&self, served: Vec<(u32, Served)>, servers: Vec<SocketAddr>) {
        self.send(Command::Configure(served, servers));
    }

    pub fn counters(&self) -> BTreeMap<InterfaceId, Counters> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        self.send(Command::Counters(sender));
        receiver.recv().unwrap_or_default()
    }

    fn send(&self, command: Command) {
        // Without the thread nobody answers guests: its panic was reported where it happened.
        if self.commands.send(command).is_ok() {
            _ = self.wake.write(1);
        }
    }
}

impl Drop for RespondThread {
    fn drop(&mut self) {
        self.commands = crossbeam_channel::bounded(0).0;
        _ = self.wake.write(1);
    }
}

struct Shell {
    punt: File,
    wake: Arc<EventFd>,
    inbox: Receiver<Command>,
    responders: Responders,
    sockets: Sockets,
    /// The sockets that have something to say.
    ready: Vec<u64>,
}

impl Shell {
    fn run(mut self) {
        let mut out = Vec::new();
        loop {
            let now = since_boot();
            let due = self.responders.next_due(now).map(|due| due.saturating_sub(now));
            if let Err(error) = self.wait(due) {
                tracing::error!(%error, "punt device: wait: metadata and DHCP stop");
                return;
            }
            if !self.obey() {
                return;
            }
            self.read(&mut out);
            self.hear();
            self.responders.elapse(since_boot(), &mut out);
            self.act(&mut out);
            self.write(&mut out);
        }
    }

    fn wait(&mut self, limit: Option<Duration>) -> Result<(), Errno> {
        // Rounded up, so that what is due is due when it wakes.
        let timeout = limit.map_or(PollTimeout::NONE, |d| {
            PollTimeout::try_from(d.as_micros().div_ceil(1000)).unwrap_or(PollTimeout::MAX)
        });
        let mut fds = vec![
            PollFd::new(self.punt.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.wake.as_fd(), PollFlags::POLLIN),
        ];
        let own = fds.len();
        let mut tokens = Vec::new();
        for (token, fd, flags) in self.sockets.waiting() {
            tokens.push(token);
            fds.push(PollFd::new(fd, flags));
        }
        let polled = poll(&mut fds, timeout);
        let ready = tokens.into_iter().zip(&fds[own..]).filter(|(_, fd)| fd.any() == Some(true));
        self.ready = ready.map(|(token, _)| token).collect();
        match polled {
            Ok(_) => Ok(()),
            Err(Errno::EINTR) => {
                self.ready.clear();
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// Takes what name servers answered.
    fn hear(&mut self) {
        for token in std::mem::take(&mut self.ready) {
            match self.sockets.turn(token) {
                Said::Nothing => {}
                Said::Message(message) => {
                    self.responders.hear(token, Some(&message), since_boot());
                }
                Said::Ended => self.responders.hear(token, None, since_boot()),
            }
        }
    }

    /// Sends what is to be asked of name servers, and what they answered to guests.
    fn act(&mut self, out: &mut Vec<Vec<u8>>) {
        while let Some(action) = self.responders.next_action(since_boot(), out) {
            match action {
                Action::Send { token, server, stream, message } => {
                    if let Err(error) = self.sockets.send(token, server, stream, &message) {
                        tracing::debug!(%server, %error, "name server: ask");
                        self.responders.hear(token, None, since_boot());
                    }
                }
                Action::Close { token } => self.sockets.close(token),
                Action::Answer { .. } => {}
            }
        }
    }

    /// Whether to go on.
    fn obey(&mut self) -> bool {
        _ = self.wake.read();
        loop {
            match self.inbox.try_recv() {
                Ok(Command::Configure(served, servers)) => {
                    self.responders.configure(served, servers, random, since_boot());
                }
                Ok(Command::Counters(reply)) => _ = reply.send(self.responders.counters()),
                Err(crossbeam_channel::TryRecvError::Empty) => return true,
                Err(crossbeam_channel::TryRecvError::Disconnected) => return false,
            }
        }
    }

    fn read(&mut self, out: &mut Vec<Vec<u8>>) {
        let mut frame = vec![0; FRAME_BYTES_MAX];
        self.responders.booted_at = since_1970().saturating_sub(since_boot());
        for _ in 0..FRAMES_A_TURN_MAX {
            match self.punt.read(&mut frame) {
                Ok(length) => self.responders.receive(&frame[..length], since_boot(), out),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                // It was removed under us. A daemon that starts anew makes another.
                Err(error) if error.raw_os_error() == Some(Errno::EBADFD as i32) => {
                    tracing::error!(%error, "punt device: it is gone; ending to be started anew");
                    std::process::exit(1);
                }
                Err(error) => {
                    // It is down: say so, and look again in a while.
                    tracing::warn!(%error, "punt device: read");
                    std::thread::sleep(Duration::from_millis(100));
                    return;
                }
            }
        }
    }

    fn write(&mut self, out: &mut Vec<Vec<u8>>) {
        for frame in out.drain(..) {
            if let Err(error) = self.punt.write(&frame) {
                tracing::debug!(%error, "punt device: write: frame lost");
            }
        }
    }
}

/// Time since boot, suspended or not: tokens outlive the daemon by this clock.
fn since_boot() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME)
        .map_or(Duration::ZERO, Duration::from)
}

fn since_1970() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME)
        .map_or(Duration::ZERO, Duration::from)
}

/// From the kernel's generator.
///
/// # Panics
/// Where it gives nothing: a guessable key would be worse than none.
pub fn random() -> u128 {
    let mut bytes = [0; 16];
    let read = File::open("/dev/urandom").and_then(|mut f| f.read_exact(&mut bytes));
    assert!(read.is_ok(), "/dev/urandom: read: {read:?}");
    u128::from_ne_bytes(bytes)
}
