//! One socket with its session: what is being received, what is being sent.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::time::Instant;

use super::moving::Leaving;
use super::places::Origin;
use super::{Access, Served};
use crate::engine::Window;
use crate::nbd::session::Held;
use crate::nbd::{Chunk, Session};
use crate::tls;

/// Pieces of output in one system call (`UIO_MAXIOV`, sendmsg(2)); a session
/// holds some 128 replies of one or two pieces.
const PIECES_MAX: usize = 1024;

/// What the socket's one running receive fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Receiving {
    Nothing,
    Space,
    Payload,
    /// TLS's input.
    Sealed,
}

/// How far a connection is on its way out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Closing {
    No,
    /// What is in flight is answered, then the socket is closed.
    Drain,
    /// The peer is gone: what is in flight only has to end.
    Dead,
}

/// The export that a connection uses.
#[derive(Debug)]
pub(super) struct Chosen {
    pub volume: u32,
    /// `None` for a reader.
    pub generation: Option<u64>,
    /// Its name.
    pub export: String,
    connections: Arc<AtomicU32>,
}

impl Chosen {
    pub fn new(served: &Served) -> Self {
        served.connections.fetch_add(1, Ordering::Relaxed);
        Self {
            volume: served.volume,
            generation: served.writer(),
            export: served.name.clone(),
            connections: Arc::clone(&served.connections),
        }
    }

    /// All that use the export, by whichever socket.
    pub fn users(&self) -> u32 {
        self.connections.load(Ordering::Relaxed)
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        self.connections.fetch_sub(1, Ordering::Relaxed);
    }
}

pub(super) struct Connection {
    pub socket: OwnedFd,
    pub listener: u32,
    /// Where it comes from.
    pub origin: Origin,
    pub exports: Rc<[Served]>,
    pub session: Session<Window>,
    /// What to put in place when the peer asks for it.
    tls_server: Option<Arc<tls::Server>>,
    pub tls: Option<Box<tls::Layer>>,
    pub names: Option<tls::Names>,
    pub chosen: Option<Chosen>,
    /// It goes to the export's own worker.
    pub leaving: Option<Leaving>,
    /// The write whose payload is arriving: its ticket and how much is there.
    pub incoming: Option<(u32, usize)>,
    pub receiving: Receiving,
    pub sending: bool,
    pub closing: Closing,
    pub was_shut_down: bool,
    pub deadline: Option<Instant>,
    pub is_busy: bool,
    /// A request of it that waits at the gate: nothing more is read meanwhile.
    pub held: Option<u32>,
    /// Its number for control, used once in the life of the process.
    pub serial: u64,
    pub since: Instant,
    batch: Vec<Chunk<Window>>,
    /// Pieces of the batch that are sent, and bytes of the next one.
    batch_sent: (usize, usize),
    batch_held: Held,
    vectors: Vec<libc::iovec>,
    message: libc::msghdr,
}

impl Connection {
    pub fn new(
        socket: OwnedFd,
        listener: u32,
        exports: Rc<[Served]>,
        access: Access,
        now: Instant,
        deadline: Instant,
    ) -> Self {
        static SERIAL: AtomicU64 = AtomicU64::new(1);
        let (session, tls_server) = match access {
            Access::Certificate(server) => (Session::behind_tls(), Some(server)),
            Access::Anyone | Access::Users(_) => (Session::new(), None),
        };
        // SAFETY: a message header of zeros is an empty message.
        let message = unsafe { std::mem::zeroed() };
        Self {
            socket,
            listener,
            origin: Origin::default(),
            exports,
            session,
            tls_server,
            tls: None,
            names: None,
            chosen: None,
            leaving: None,
            incoming: None,
            receiving: Receiving::Nothing,
            sending: false,
            closing: Closing::No,
            was_shut_down: false,
            deadline: Some(deadline),
            is_busy: false,
            held: None,
            serial: SERIAL.fetch_add(1, Ordering::Relaxed),
            since: now,
            batch: Vec::new(),
            batch_sent: (0, 0),
            batch_held: Held::default(),
            vectors: Vec::new(),
            message,
        }
    }

    pub fn from(mut self, origin: Origin) -> Self {
        self.origin = origin;
        self
    }

    pub fn has_output(&self) -> bool {
        let has_plain = !self.batch.is_empty() || self.session.has_output();
        match &self.tls {
            None => has_plain,
            Some(tls) => tls.has_output() || (has_plain && tls.failure().is_none()),
        }
    }

    /// Whether TLS is in place or about to be.
    pub fn is_sealed(&self) -> bool {
        self.tls.is_some() || self.session.wants_tls()
    }

    pub fn is_stopped(&self) -> bool {
        self.session.is_stopped()
    }

    pub fn receives(&self) -> bool {
        self.receiving != Receiving::Nothing
    }

    /// Whether nothing of it runs, but for a request that no volume has seen.
    pub fn is_still(&self) -> bool {
        let leaves_with = self.leaving.as_ref().is_some_and(|leaving| leaving.request.is_some());
        self.closing == Closing::No
            && !self.is_sealed()
            && !self.receives()
            && !self.sending
            && self.session.in_flight()
                == usize::from(self.incoming.is_some() || self.held.is_some() || leaves_with)
    }

    /// What was taken out of the session and the kernel did not take.
    pub fn unsent(&mut self) -> Vec<u8> {
        let (pieces, bytes) = self.batch_sent;
        let all: Vec<u8> =
            self.batch.iter().skip(pieces).flat_map(|piece| piece.bytes()).copied().collect();
        self.clear_batch();
        all.get(bytes..).map_or_else(Vec::new, <[u8]>::to_vec)
    }

    /// Sealed bytes came; what TLS has against them ends the connection after
    /// the peer was told.
    pub fn unseal(&mut self, count: usize) {
        let Some(tls) = &mut self.tls else { unreachable!("sealed bytes come through TLS") };
        tls.received(count);
        if let Some(failure) = tls.failure() {
            tracing::warn!("refused a peer: TLS: {failure}");
            self.session.stop_reading();
            self.closing = self.closing.max(Closing::Drain);
        } else if self.names.is_none() && !tls.is_handshaking() {
            self.names = Some(tls.names());
        }
    }

    pub fn open_sealed(&mut self) -> bool {
        if self.session.wants_tls() {
            // Only once the peer has been told, unsealed, that it may begin.
            let is_still = !self.receives() && !self.sending;
            if is_still && !self.has_output() {
                self.begin_tls();
            }
            return false;
        }
        let Some(tls) = &mut self.tls else { return false };
        // While it waits for its payload a session still takes input; the
        // places are asked for only where something is there to fill them.
        let count = tls.take(self.session.space());
        self.session.received(count);
        count > 0
    }

    fn begin_tls(&mut self) {
        self.session.tls_begins();
        match self.tls_server.as_ref().map(|server| tls::Layer::new(server)) {
            Some(Ok(layer)) => self.tls = Some(Box::new(layer)),
            failed => {
                tracing::error!("cannot begin TLS: {:?}", failed.and_then(Result::err));
                self.closing = Closing::Dead;
            }
        }
    }

    /// Queues what ends a TLS connection, once; `true` when something was queued.
    pub fn say_goodbye(&mut self) -> bool {
        let is_last = self.session.in_flight() == 0 && !self.sending && !self.has_output();
        let Some(tls) = self.tls.as_mut().filter(|_| is_last) else { return false };
        tls.close();
        tls.has_output()
    }

    /// Gathers what is to be sent, so many bytes of it at most where TLS does not seal
    /// them. The message and all that it points to stay
    /// in place until [`Self::was_sent`]: the connection is boxed, and neither
    /// the batch nor the vectors are touched in between.
    pub fn message(&mut self, mut left: usize) -> *const libc::msghdr {
        if self.batch.is_empty() {
            self.batch_held = self.session.transmit(&mut self.batch);
        }
        if self.tls.is_some() {
            return self.sealed_message();
        }
        let (pieces, bytes) = self.batch_sent;
        self.vectors.clear();
        for (index, piece) in self.batch.iter().enumerate().skip(pieces).take(PIECES_MAX) {
            if left == 0 {
                break;
            }
            let rest = &piece.bytes()[if index == pieces { bytes } else { 0 }..];
            let iov_len = rest.len().min(left);
            left -= iov_len;
            self.vectors.push(libc::iovec { iov_base: rest.as_ptr().cast_mut().cast(), iov_len });
        }
        self.message.msg_iov = self.vectors.as_mut_ptr();
        self.message.msg_iovlen = self.vectors.len() as _;
        self.sending = true;
        &raw const self.message
    }

    /// As `message`: seals as much of the batch as there is room for.
    fn sealed_message(&mut self) -> *const libc::msghdr {
        if self.tls.as_ref().is_some_and(|tls| tls.failure().is_some()) {
            self.drop_output();
        }
        let Some(tls) = &mut self.tls else { unreachable!("asked only with TLS in place") };
        let (mut pieces, mut bytes) = self.batch_sent;
        while pieces < self.batch.len() && tls.has_room() {
            let rest = &self.batch[pieces].bytes()[bytes..];
            let count = rest.len().min(tls::SEALED_MAX);
            tls.seal(&rest[..count]);
            (pieces, bytes) =
                if count == rest.len() { (pieces + 1, 0) } else { (pieces, bytes + count) };
        }
        self.batch_sent = (pieces, bytes);
        tls.finish();
        let sealed = tls.output();
        self.vectors.clear();
        self.vectors.push(libc::iovec {
            iov_base: sealed.as_ptr().cast_mut().cast(),
            iov_len: sealed.len(),
        });
        if pieces == self.batch.len() {
            self.clear_batch();
        }
        self.message.msg_iov = self.vectors.as_mut_ptr();
        self.message.msg_iovlen = self.vectors.len() as _;
        self.sending = true;
        &raw const self.message
    }

    /// The kernel took `count` bytes of the message.
    pub fn was_sent(&mut self, mut count: usize) {
        self.sending = false;
        if let Some(tls) = &mut self.tls {
            return tls.sent(count);
        }
        let (mut pieces, mut bytes) = self.batch_sent;
        while pieces < self.batch.len() {
            let left = self.batch[pieces].bytes().len() - bytes;
            if count < left {
                self.batch_sent = (pieces, bytes + count);
                return;
            }
            count -= left;
            (pieces, bytes) = (pieces + 1, 0);
        }
        self.clear_batch();
    }

    fn clear_batch(&mut self) {
        self.batch.clear();
        self.batch_sent = (0, 0);
        self.session.sent(std::mem::take(&mut self.batch_held));
    }

    /// Nothing more will be sent.
    pub fn drop_output(&mut self) {
        self.clear_batch();
        self.batch_held = self.session.transmit(&mut self.batch);
        self.clear_batch();
    }

    /// Ends both directions, so that whatever operation runs comes back.
    pub fn shut_down(&mut self) {
        if !std::mem::replace(&mut self.was_shut_down, true) {
            // SAFETY: shutdown touches no memory; a peer that is gone is no error.
            let _ = unsafe { libc::shutdown(self.socket.as_raw_fd(), libc::SHUT_RDWR) };
        }
    }
}
