//! A server replaced by another under load: the new process asks the old one for
//! its sockets, its lock and its connections.
//!
//! ```text
//!   new                                    old
//!    │ ── Hello { version, kind } ─────────▶ │ serves
//!    │ ◀───────────── Socket … Welcome ──── │ serves
//!    │ reads its settings, opens its files   │ serves
//!    │ ── Prepared ────────────────────────▶ │ parks: nothing runs from here on
//!    │ ◀──── Volume … Connection … End ──── │
//!    │ ── Ready ───────────────────────────▶ │
//!    │ ◀──────────────────────────── Go ──── │ serves only if no `Begun` comes
//!    │ ── Begun ───────────────────────────▶ │ will never serve again
//!    │ serves; hangs up                      │ ends
//! ```
//!
//! What may never be true: two that serve. Until the old one reads `Ready` it may
//! change its mind (the new one fell silent, or died) and goes on as before; the
//! new one serves only after `Go`, or once the kernel says that the old process
//! is dead. After `Go` it is the socket that decides: the new one begins once the kernel
//! has taken its `Begun`, and the old one goes on once it has shut its end, after which the
//! kernel takes no `Begun` any more, and found none there. So whichever is killed or stands
//! still, at any place, the other serves (tests/relay.rs).

mod gather;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::retry_on_intr;
use rustix::process::{PidfdFlags, getpid, pidfd_open};

use crate::nbd::Frozen;
use crate::worker::{Carried, Parked};
pub use gather::gather;
use wire::{Channel, Message, Received};

/// Raised with every change of the messages: two that differ do not talk.
const VERSION: u32 = 4;

/// How long one side waits for the other, but for what follows.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// How long whatever the new one does between `Go` and `Begun` may take: nobody serves
/// meanwhile, and the old one waits no longer than [`WAIT_MAX`].
pub const SETTLE_MAX: Duration = Duration::from_secs(5);

/// How long a dying process may take to close what it listens at.
const DEAD_WITHIN: Duration = Duration::from_secs(2);

/// How long the old one may take to park: the disk's time, mostly.
const PARK_MAX: Duration = Duration::from_secs(30);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("the other side: {0}")]
    Io(#[from] io::Error),
    #[error("the other side speaks version {0} of the hand-over, and we speak {VERSION}")]
    Version(u32),
    #[error("the other side is a {0}")]
    Kind(String),
    #[error("the other side said something else: {0}")]
    Unexpected(String),
    #[error("the other side said nothing for {} s {while_it}", .waited.as_secs())]
    Silent { waited: Duration, while_it: &'static str },
    #[error("the new server ended before it began to serve")]
    NotBegun,
    #[error("the old server went on serving by itself")]
    Kept,
}

/// The socket at which successors ask.
pub struct Asked {
    listener: tokio::net::UnixListener,
}

impl Asked {
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        let listener = UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        Ok(Self { listener: tokio::net::UnixListener::from_std(listener)? })
    }

    /// The next who may ask: root, or the user that we run as.
    pub async fn next(&self) -> io::Result<UnixStream> {
        loop {
            let accepted = self.listener.accept().await;
            let known = accepted.and_then(|(stream, _)| Ok((stream.peer_cred()?.uid(), stream)));
            let Ok((uid, stream)) = known else {
                // Out of descriptors, mostly. Serving goes on meanwhile.
                tokio::time::sleep(Duration::from_secs(1)).await;
                continue;
            };
            if uid == 0 || uid == rustix::process::getuid().as_raw() {
                let stream = stream.into_std()?;
                stream.set_nonblocking(false)?;
                return Ok(stream);
            }
            tracing::warn!(uid, "refused a stranger as successor");
        }
    }
}

/// What is handed on while the old one still serves.
#[derive(Debug, Default)]
pub struct Sockets {
    /// By a name that both sides make from their settings. The claims of block
    /// devices go with them.
    pub listening: BTreeMap<String, OwnedFd>,
}

/// What is handed on once nothing runs.
#[derive(Debug, Default)]
pub struct Load {
    /// With the name of the socket that it came in by.
    pub connections: Vec<(String, Parked)>,
    /// By the volume's name.
    pub volumes: Vec<(String, Carried)>,
}

/// The old side of one hand-over. `park` stops everything and says what there is
/// to hand on; on an error the caller takes up again what it parked.
/// `Ok`: the caller must never serve again.
pub fn give(
    stream: UnixStream,
    kind: &str,
    sockets: &Sockets,
    prepare_max: Duration,
    park: impl FnOnce() -> io::Result<Load>,
) -> Result<(), (Error, Option<Load>)> {
    let mut channel = Channel::new(stream);
    let begun = begin_giving(&mut channel, kind, sockets, prepare_max);
    begun.map_err(|error| (error, None))?;
    let load = park().map_err(|error| (Error::Io(error), None))?;
    match hand_on(&mut channel, &load).and_then(|()| let_begin(&mut channel)) {
        Ok(()) => Ok(()),
        Err(error) => Err((error, Some(load))),
    }
}

/// We are no server any more, unless the other ends without a word, or says none
/// in its time: then nothing has happened.
fn let_begin(channel: &mut Channel) -> Result<(), Error> {
    // When it does not arrive, the other sees our end, or we its.
    let _ = channel.send(&Message::Go);
    let mut heard = channel.receive();
    let is_late = heard.as_ref().is_err_and(is_timeout);
    if is_late {
        // It cannot say it any more; whether it has, is there to be read.
        channel.hear_no_more()?;
        heard = channel.receive();
    }
    match heard {
        Ok(Received { message: Message::Begun, .. }) => {
            // It has something to do yet for which we should be there; not for ever.
            let _ = channel.receive();
            Ok(())
        }
        Ok(other) => Err(unexpected(&other.message)),
        Err(_) if is_late => {
            Err(Error::Silent { waited: WAIT_MAX, while_it: "when it was to begin" })
        }
        Err(_) => Err(Error::NotBegun),
    }
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// A silence, named.
fn silent(waited: Duration, while_it: &'static str) -> impl Fn(Error) -> Error {
    move |error| match error {
        Error::Io(cause) if is_timeout(&cause) => Error::Silent { waited, while_it },
        other => other,
    }
}

fn begin_giving(
    channel: &mut Channel,
    kind: &str,
    sockets: &Sockets,
    prepare_max: Duration,
) -> Result<(), Error> {
    channel.wait_at_most(WAIT_MAX)?;
    let hello = channel.receive().map_err(Error::Io);
    match hello.map_err(silent(WAIT_MAX, "after it had connected"))?.message {
        Message::Hello { version, kind: other } => {
            let refusal = if version != VERSION {
                Some(Error::Version(version))
            } else {
                (other != kind).then_some(Error::Kind(other))
            };
            if let Some(error) = refusal {
                let reason = format!("this is version {VERSION} of a {kind}");
                let _ = channel.send(&Message::Refused { reason });
                return Err(error);
            }
        }
        other => return Err(unexpected(&other)),
    }
    for (name, socket) in &sockets.listening {
        channel.send_with(&Message::Socket { name: name.clone() }, &[], Some(socket.as_fd()))?;
    }
    // Not the peer's credentials: those are of whoever first listened here.
    let own = pidfd_open(getpid(), PidfdFlags::empty()).map_err(io::Error::from)?;
    channel.send_with(&Message::Welcome, &[], Some(own.as_fd()))?;
    channel.wait_at_most(prepare_max)?;
    let prepared = channel.receive().map_err(Error::Io);
    match prepared.map_err(silent(prepare_max, "while it prepared"))?.message {
        Message::Prepared => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn hand_on(channel: &mut Channel, load: &Load) -> Result<(), Error> {
    channel.wait_at_most(WAIT_MAX)?;
    for (name, carried) in &load.volumes {
        let (name, carried) = (name.clone(), carried.clone());
        channel.send(&Message::Volume { name, carried })?;
    }
    for (socket, parked) in &load.connections {
        let Frozen { terms, input, output } = &parked.session;
        let message = Message::Connection {
            socket: socket.clone(),
            export: parked.export.clone(),
            terms: Box::new(terms.clone()),
            input: input.len(),
        };
        let bytes = [&input[..], output].concat();
        channel.send_with(&message, &bytes, Some(parked.socket.as_fd()))?;
    }
    channel.send(&Message::End { connections: load.connections.len() })?;
    let ready = channel.receive().map_err(Error::Io);
    match ready.map_err(silent(WAIT_MAX, "when all was handed to it"))?.message {
        Message::Ready => Ok(()),
        other => Err(unexpected(&other)),
    }
}

fn is_hang_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

fn unexpected(message: &Message) -> Error {
    match message {
        Message::Refused { reason } => Error::Unexpected(reason.clone()),
        other => Error::Unexpected(format!("{other:?}")),
    }
}

/// The new side, between `Welcome` and `Prepared`.
pub struct Taking {
    channel: Channel,
    /// Tells when the old process is dead.
    old: OwnedFd,
}

impl Load {
    /// What a volume of that name must know again.
    pub fn carried(&self, name: &str) -> Carried {
        let found = self.volumes.iter().find(|(volume, _)| volume == name);
        found.map(|(_, carried)| carried.clone()).unwrap_or_default()
    }
}

/// What the new one is left with.
#[derive(Default)]
pub struct Taken {
    pub load: Load,
    /// The old one died before it had handed over what it held: it is as after a
    /// crash, and its last operations may still run.
    pub has_crashed: bool,
    taking: Option<Taking>,
}

impl Taken {
    /// To be called before anything is served: from then on the old one never will, and
    /// it ends when this is dropped. On an error it has waited too long, and serves.
    pub fn begin(&mut self) -> Result<(), Error> {
        let Some(taking) = &mut self.taking else { return Ok(()) };
        match taking.channel.send(&Message::Begun) {
            Ok(()) => Ok(()),
            // Nobody needs to hear it.
            Err(_) if taking.old_is_dead() => Ok(()),
            Err(_) => Err(Error::Kept),
        }
    }
}

impl Taking {
    /// Asks the predecessor that had us started.
    pub fn of_starter(stream: UnixStream, kind: &str) -> Result<(Self, Sockets), Error> {
        Self::hello(stream, kind)
    }

    /// Asks whoever listens at `path` for its sockets; `None` where nobody does.
    pub fn begin(path: &Path, kind: &str) -> Result<Option<(Self, Sockets)>, Error> {
        let mut waited = Duration::ZERO;
        loop {
            match Self::ask(path, kind) {
                // It hung up on us: dying, perhaps, and then soon nobody listens.
                Err(Error::Io(cause)) if is_hang_up(&cause) && waited < DEAD_WITHIN => {
                    let pause = Duration::from_millis(50);
                    std::thread::sleep(pause);
                    waited += pause;
                }
                asked => return asked,
            }
        }
    }

    fn ask(path: &Path, kind: &str) -> Result<Option<(Self, Sockets)>, Error> {
        let stream = match UnixStream::connect(path) {
            Ok(stream) => stream,
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
                ) =>
            {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        Self::hello(stream, kind).map(Some)
    }

    fn hello(stream: UnixStream, kind: &str) -> Result<(Self, Sockets), Error> {
        let mut channel = Channel::new(stream);
        channel.wait_at_most(WAIT_MAX)?;
        channel.send(&Message::Hello { version: VERSION, kind: kind.to_owned() })?;
        let mut sockets = Sockets::default();
        loop {
            let received = channel.receive().map_err(Error::Io);
            let received = received.map_err(silent(WAIT_MAX, "when it was asked"))?;
            match (received.message, received.fd) {
                (Message::Socket { name }, Some(fd)) => {
                    sockets.listening.insert(name, fd);
                }
                (Message::Welcome, Some(old)) => {
                    channel.wait_at_most(PARK_MAX)?;
                    return Ok((Self { channel, old }, sockets));
                }
                (other, _) => return Err(unexpected(&other)),
            }
        }
    }

    /// All is open and could be served: takes the rest. When this gives `Ok`,
    /// nobody but us may serve; before, nothing may be begun.
    pub fn finish(mut self) -> Result<Taken, Error> {
        let handed_on = self.channel.send(&Message::Prepared).map_err(Error::Io);
        let load = match handed_on.and_then(|()| self.receive_load()) {
            Ok(load) => load,
            Err(_) if self.old_is_dead() => {
                return Ok(Taken { has_crashed: true, ..Taken::default() });
            }
            Err(error) => return Err(silent(PARK_MAX, "when it was to hand all on")(error)),
        };
        self.channel.wait_at_most(WAIT_MAX)?;
        let heard = self.channel.send(&Message::Ready).and_then(|()| self.channel.receive());
        match heard {
            Ok(received) if matches!(received.message, Message::Go) => {
                Ok(Taken { load, has_crashed: false, taking: Some(self) })
            }
            // It said nothing: either it has changed its mind, or it is dead.
            _ if self.old_is_dead() => Ok(Taken { load, ..Taken::default() }),
            _ => Err(Error::Kept),
        }
    }

    fn receive_load(&mut self) -> Result<Load, Error> {
        let mut load = Load::default();
        loop {
            let received = self.channel.receive()?;
            match (received.message, received.fd) {
                (Message::Volume { name, carried }, _) => load.volumes.push((name, carried)),
                (Message::Connection { socket, export, terms, input }, Some(fd)) => {
                    let mut bytes = received.bytes;
                    if input > bytes.len() {
                        return Err(Error::Unexpected("fewer bytes than announced".to_owned()));
                    }
                    let output = bytes.split_off(input);
                    let session = Frozen { terms: *terms, input: bytes, output };
                    // The listener's number is the worker's, and told by the caller.
                    let parked = Parked { socket: fd, listener: 0, export, session };
                    load.connections.push((socket, parked));
                }
                (Message::End { connections }, _) if connections == load.connections.len() => {
                    return Ok(load);
                }
                (other, _) => return Err(unexpected(&other)),
            }
        }
    }

    /// A process that ends takes a moment.
    fn old_is_dead(&self) -> bool {
        let timeout = Timespec { tv_sec: DEAD_WITHIN.as_secs() as i64, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.old, PollFlags::IN)];
        retry_on_intr(|| poll(&mut fds, Some(&timeout))).is_ok_and(|count| count > 0)
    }
}
