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
//!    │ ── Ready ───────────────────────────▶ │ will never serve again
//!    │ ◀──────────────────────────── Go ──── │ ends
//!    │ serves                                │
//! ```
//!
//! What may never be true: two that serve. Until the old one reads `Ready` it may
//! change its mind (the new one fell silent, or died) and goes on as before; the
//! new one serves only after `Go`, or once the kernel says that the old process
//! is dead. Whichever is killed, at any place, the other serves or nobody does.

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
use wire::{Channel, Message};

/// Raised with every change of the messages: two that differ do not talk.
const VERSION: u32 = 2;

/// How long one side waits for the other, but for what follows.
const WAIT_MAX: Duration = Duration::from_secs(10);

/// How long the new one may take to read its settings and to open its files.
const PREPARE_MAX: Duration = Duration::from_secs(60);

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
    park: impl FnOnce() -> io::Result<Load>,
) -> Result<(), (Error, Option<Load>)> {
    let mut channel = Channel::new(stream);
    let begun = begin_giving(&mut channel, kind, sockets);
    begun.map_err(|error| (error, None))?;
    let load = park().map_err(|error| (Error::Io(error), None))?;
    match hand_on(&mut channel, &load) {
        Ok(()) => {
            // From here on we are no server any more, whether or not this arrives:
            // when it does not, the other sees our end.
            let _ = channel.send(&Message::Go);
            Ok(())
        }
        Err(error) => Err((error, Some(load))),
    }
}

fn begin_giving(channel: &mut Channel, kind: &str, sockets: &Sockets) -> Result<(), Error> {
    channel.wait_at_most(WAIT_MAX)?;
    match channel.receive()?.message {
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
    channel.wait_at_most(PREPARE_MAX)?;
    match channel.receive()?.message {
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
    match channel.receive()?.message {
        Message::Ready => Ok(()),
        other => Err(unexpected(&other)),
    }
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

impl Taking {
    /// Asks whoever listens at `path` for its sockets; `None` where nobody does.
    pub fn begin(path: &Path, kind: &str) -> Result<Option<(Self, Sockets)>, Error> {
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
        let mut channel = Channel::new(stream);
        channel.wait_at_most(WAIT_MAX)?;
        channel.send(&Message::Hello { version: VERSION, kind: kind.to_owned() })?;
        let mut sockets = Sockets::default();
        loop {
            let received = channel.receive()?;
            match (received.message, received.fd) {
                (Message::Socket { name }, Some(fd)) => {
                    sockets.listening.insert(name, fd);
                }
                (Message::Welcome, Some(old)) => {
                    channel.wait_at_most(PREPARE_MAX)?;
                    return Ok(Some((Self { channel, old }, sockets)));
                }
                (other, _) => return Err(unexpected(&other)),
            }
        }
    }

    /// All is open and could be served: takes the rest. When this gives `Ok`,
    /// nobody but us serves; before, nothing may be begun.
    pub fn finish(mut self) -> Result<Load, Error> {
        self.channel.send(&Message::Prepared)?;
        let load = self.receive_load()?;
        self.channel.send(&Message::Ready)?;
        match self.channel.receive() {
            Ok(received) if matches!(received.message, Message::Go) => Ok(load),
            // It said nothing: either it has changed its mind, or it is dead.
            _ if self.old_is_dead() => Ok(load),
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
        let timeout = Timespec { tv_sec: 2, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.old, PollFlags::IN)];
        retry_on_intr(|| poll(&mut fds, Some(&timeout))).is_ok_and(|count| count > 0)
    }
}
