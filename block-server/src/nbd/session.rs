//! One NBD connection as a state machine: bytes in, requests out; answers in,
//! bytes out. It owns no socket and knows no clock.
//!
//! ```text
//!              client flags            GO, EXPORT_NAME            DISC
//!   ──▶ Greeting ────────▶ Options ──────────────▶ Transmission ──────▶ Closed
//!                             │  ABORT                  │                  ▲
//!                             └──────────────────────────┴─ bad magic ──────┘
//! ```
//!
//! The shell (`worker`) moves bytes: it lets the kernel write into
//! [`Session::space`], says how many came ([`Session::received`]), takes
//! requests ([`Session::next_request`]), gives answers ([`Session::answer`]) and
//! takes what is to be sent ([`Session::transmit`]). A write's payload is taken
//! by [`Session::take_payload`] or received by the shell straight into the I/O
//! buffer ([`Session::payload_received`]).
//!
//! What may never be true: a request without exactly one answer; memory that
//! grows with what a peer sends or leaves unread; a panic from a peer's bytes.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use super::context;
use super::frozen::{Frozen, Stage, Terms};
use super::handshake::{Handshake, Tls};
use super::input::Input;
use super::transmission::{self, Header};
use super::wire::{self, Error};

pub(super) use super::request::HEADER_MAX;
pub use super::request::{Answer, Chunk, Command, Export, Exports, Held, Payload, Request};

/// Bytes of input that a connection may hold before its handshake is done: the
/// longest option that we read, with its header.
pub const HANDSHAKE_SPACE: usize = 8 << 10;

/// Bytes of input that a connection holds in transmission: some thirty 4 KiB
/// writes fit, so that one receive fetches what a queue depth of 32 sends.
pub const TRANSMISSION_SPACE: usize = 160 << 10;

/// The largest payload of one READ or WRITE: what the protocol's document asks
/// a server to bear when nothing was negotiated.
pub const PAYLOAD_MAX: u32 = 32 << 20;

/// Requests that one connection may have unanswered or with their answer unsent.
/// Twice the deepest queue of QEMU's client (16) and of usual benchmarks (64).
pub const IN_FLIGHT_MAX: usize = 128;

/// Bytes of payload that one connection may have in flight or unsent; a single
/// larger request is let through when nothing else is. Sixteen requests of 1 MiB
/// keep a disk and a socket busy at once.
pub const IN_FLIGHT_BYTES_MAX: u64 = 16 << 20;

/// How replies look; each mode includes the former.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) enum Mode {
    Simple,
    Structured,
    Extended,
}

#[derive(Debug)]
enum State {
    Handshake(Handshake),
    /// TLS was agreed on, and the shell has not put it in place yet.
    Securing(Handshake),
    Transmission(Transmission),
    /// Nothing more is read. What is queued is still sent, what is in flight still
    /// answered, in the terms of the transmission, where there was one.
    Closed(Option<Transmission>),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Transmission {
    pub export: Export,
    pub mode: Mode,
    /// Empty: nothing may be asked by BLOCK_STATUS.
    pub contexts: context::Chosen,
    /// Whether the client was told the block sizes, and so must keep them.
    pub told_block_size: bool,
}

/// Payload of a write that is still to come.
#[derive(Debug, Clone, Copy)]
enum Incoming {
    Nothing,
    /// Goes to the request that was handed out last.
    Wanted(u64),
    /// Belongs to a request that was refused.
    Unwanted(u64),
}

#[derive(Debug)]
pub struct Session<P> {
    state: State,
    input: Input,
    incoming: Incoming,
    output: VecDeque<Chunk<P>>,
    in_flight: usize,
    in_flight_bytes: u64,
    /// Replies whose last byte is not sent, and the payload in them.
    held: Held,
    /// The part of it that is still in `output`.
    queued: Held,
    refusing: bool,
    stopped: bool,
}

impl<P: Payload> Session<P> {
    pub fn new() -> Self {
        Self::with(Tls::NotOffered)
    }

    /// Refuses all until the client has begun TLS.
    pub fn behind_tls() -> Self {
        Self::with(Tls::Required)
    }

    fn with(tls: Tls) -> Self {
        let mut session = Self {
            state: State::Handshake(Handshake::new(tls)),
            input: Input::new(HANDSHAKE_SPACE),
            incoming: Incoming::Nothing,
            output: VecDeque::new(),
            in_flight: 0,
            in_flight_bytes: 0,
            held: Held::default(),
            queued: Held::default(),
            refusing: false,
            stopped: false,
        };
        session.output.push_back(Chunk::Bytes(Handshake::greeting()));
        session
    }

    /// Where the next bytes of the peer go; empty while it must wait.
    /// Its place stays as it is until the next call of this method, whatever
    /// else is called meanwhile: the kernel may be writing there.
    pub fn space(&mut self) -> &mut [u8] {
        if self.is_closed() {
            return &mut [];
        }
        self.input.space()
    }

    /// `count` bytes were written to the start of [`Self::space`].
    pub fn received(&mut self, count: usize) {
        self.input.end += count;
        assert!(self.input.end <= self.input.buffer.len(), "more received than there was space");
    }

    /// Copies as much of `bytes` as there is space for and says how much that was.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let space = self.space();
        let count = bytes.len().min(space.len());
        space[..count].copy_from_slice(&bytes[..count]);
        self.received(count);
        count
    }

    /// The next request, or `None` until more bytes, room or payload come.
    /// What is refused is answered here and never seen by the caller.
    pub fn next_request(&mut self, exports: &dyn Exports) -> Option<Request> {
        if self.stopped {
            return None;
        }
        loop {
            self.drop_unwanted();
            if !matches!(self.incoming, Incoming::Nothing) {
                return None;
            }
            match &mut self.state {
                State::Closed(_) | State::Securing(_) => return None,
                State::Handshake(handshake) => {
                    if self.output.len() > IN_FLIGHT_MAX {
                        return None;
                    }
                    let mut replies = Vec::new();
                    let step = handshake.step(&mut self.input, exports, &mut replies);
                    if !replies.is_empty() {
                        self.output.push_back(Chunk::Bytes(replies));
                    }
                    match step {
                        super::handshake::Step::Wait => return None,
                        super::handshake::Step::Again => {}
                        super::handshake::Step::Close => self.close(),
                        super::handshake::Step::Secure => {
                            self.state = State::Securing(handshake.inside_tls());
                        }
                        super::handshake::Step::Begin(transmission) => {
                            self.input.capacity = TRANSMISSION_SPACE;
                            self.state = State::Transmission(transmission);
                        }
                    }
                }
                State::Transmission(transmission) => {
                    let busy_bytes = self.in_flight_bytes + self.held.bytes;
                    let has_room = self.in_flight + self.held.replies < IN_FLIGHT_MAX
                        && busy_bytes < IN_FLIGHT_BYTES_MAX;
                    if !has_room {
                        return None;
                    }
                    let header = match transmission::parse(transmission.mode, self.input.bytes()) {
                        transmission::Parsed::Short => return None,
                        transmission::Parsed::Damaged => {
                            self.close();
                            return None;
                        }
                        transmission::Parsed::Header(header) => header,
                    };
                    let occupied = header.payload.max(if header.kind == wire::command::READ {
                        header.length
                    } else {
                        0
                    });
                    // A peer may claim any length that 64 bits can hold.
                    let with_it = busy_bytes.saturating_add(occupied);
                    if busy_bytes > 0 && with_it > IN_FLIGHT_BYTES_MAX {
                        return None;
                    }
                    self.input.consume(transmission.header_length());
                    if header.kind == wire::command::DISC {
                        self.close();
                        return None;
                    }
                    let checked = if self.refusing {
                        Err(Error::Shutdown)
                    } else {
                        transmission.check(&header)
                    };
                    match checked {
                        Ok(request) => {
                            self.in_flight += 1;
                            self.in_flight_bytes += transmission::occupied(&request);
                            if request.command == Command::Write && request.length > 0 {
                                self.incoming = Incoming::Wanted(request.length);
                            }
                            return Some(request);
                        }
                        Err(error) => self.refuse(&header, error),
                    }
                }
            }
        }
    }

    fn close(&mut self) {
        let state = std::mem::replace(&mut self.state, State::Closed(None));
        if let State::Transmission(transmission) | State::Closed(Some(transmission)) = state {
            self.state = State::Closed(Some(transmission));
        }
    }

    fn refuse(&mut self, header: &Header, error: Error) {
        let State::Transmission(transmission) = &self.state else { return };
        self.held.replies += 1;
        self.queued.replies += 1;
        transmission.reply_error(
            header.cookie,
            header.kind,
            header.offset,
            error,
            &mut self.output,
        );
        if header.payload > transmission::SKIP_MAX {
            self.close();
        } else if header.payload > 0 {
            self.incoming = Incoming::Unwanted(header.payload);
        }
    }

    fn drop_unwanted(&mut self) {
        if let Incoming::Unwanted(left) = self.incoming {
            let count = (self.input.bytes().len() as u64).min(left);
            self.input.consume(count as usize);
            self.incoming =
                if left == count { Incoming::Nothing } else { Incoming::Unwanted(left - count) };
        }
    }

    /// Bytes of the last request's payload that have not been taken.
    pub fn payload_left(&self) -> u64 {
        match self.incoming {
            Incoming::Wanted(left) => left,
            Incoming::Nothing | Incoming::Unwanted(_) => 0,
        }
    }

    /// Copies what has come of the payload to the start of `target`.
    pub fn take_payload(&mut self, target: &mut [u8]) -> usize {
        let count = (self.payload_left() as usize).min(target.len()).min(self.input.bytes().len());
        target[..count].copy_from_slice(&self.input.bytes()[..count]);
        self.input.consume(count);
        self.payload_received(count as u64);
        count
    }

    /// `count` bytes of payload went past the session, straight to their place.
    pub fn payload_received(&mut self, count: u64) {
        let left = self.payload_left();
        assert!(count <= left, "more payload than the request has");
        if left > 0 {
            self.incoming =
                if left == count { Incoming::Nothing } else { Incoming::Wanted(left - count) };
        }
    }

    /// Whether bytes received wait to be parsed.
    pub fn has_input(&self) -> bool {
        !self.input.bytes().is_empty()
    }

    /// Answers a request that [`Self::next_request`] gave: exactly once each.
    pub fn answer(&mut self, request: &Request, answer: Answer<P>) {
        assert!(self.in_flight > 0, "an answer without a request");
        self.in_flight -= 1;
        self.in_flight_bytes -= transmission::occupied(request);
        match &self.state {
            State::Transmission(transmission) | State::Closed(Some(transmission)) => {
                let bytes = match &answer {
                    Answer::Data(data) => data.bytes().len() as u64,
                    _ => 0,
                };
                for held in [&mut self.held, &mut self.queued] {
                    held.replies += 1;
                    held.bytes += bytes;
                }
                transmission.reply(request, answer, &mut self.output);
            }
            State::Closed(None) | State::Handshake(_) | State::Securing(_) => {
                unreachable!("a request comes in transmission only")
            }
        }
    }

    /// Moves all output to `pieces`. It counts as the peer's until the caller
    /// says that it is sent: a peer that reads nothing is soon not listened to.
    pub fn transmit(&mut self, pieces: &mut Vec<Chunk<P>>) -> Held {
        pieces.extend(self.output.drain(..));
        std::mem::take(&mut self.queued)
    }

    /// What [`Self::transmit`] gave has gone, all of it.
    pub fn sent(&mut self, held: Held) {
        self.held.replies -= held.replies;
        self.held.bytes -= held.bytes;
    }

    pub fn has_output(&self) -> bool {
        !self.output.is_empty()
    }

    /// Puts the session down. `begun`: a request that no volume has seen, and what
    /// came of its payload. Nothing else may be in flight, TLS neither in place
    /// nor agreed on; `None` otherwise.
    pub fn freeze(mut self, begun: Option<(&Request, &[u8])>) -> Option<Frozen> {
        let mut input = Vec::new();
        if let (Some((request, payload)), State::Transmission(transmission)) = (begun, &self.state)
        {
            input = transmission.encode(request);
            input.extend_from_slice(payload);
            self.in_flight -= 1;
        }
        if self.in_flight > 0 {
            return None;
        }
        input.extend_from_slice(self.input.bytes());
        let stage = match self.state {
            State::Handshake(handshake) => Stage::Handshake(handshake),
            State::Transmission(transmission) => Stage::Transmission(transmission),
            State::Closed(_) => Stage::Closed,
            State::Securing(_) => return None,
        };
        let unwanted = match self.incoming {
            Incoming::Unwanted(left) => left,
            Incoming::Nothing | Incoming::Wanted(_) => 0,
        };
        let output = self.output.iter().flat_map(|chunk| chunk.bytes()).copied().collect();
        let terms = Terms { stage, unwanted, refusing: self.refusing };
        Some(Frozen { terms, input, output })
    }

    /// Takes up a session that was put down.
    pub fn thaw(frozen: Frozen) -> Self {
        let Frozen { terms, input, output } = frozen;
        let mut session = Self::new();
        session.output.clear();
        if !output.is_empty() {
            let held = Held { replies: 1, bytes: output.len() as u64 };
            (session.held, session.queued) = (held, held);
            session.output.push_back(Chunk::Bytes(output));
        }
        let end = input.len();
        let in_transmission = matches!(terms.stage, Stage::Transmission(_));
        let capacity = if in_transmission { TRANSMISSION_SPACE } else { HANDSHAKE_SPACE };
        session.input = Input { buffer: input, capacity, start: 0, end };
        session.refusing = terms.refusing;
        if terms.unwanted > 0 {
            session.incoming = Incoming::Unwanted(terms.unwanted);
        }
        session.state = match terms.stage {
            Stage::Handshake(handshake) => State::Handshake(handshake),
            Stage::Transmission(transmission) => State::Transmission(transmission),
            Stage::Closed => State::Closed(None),
        };
        session
    }

    /// Whether the peer's next bytes are TLS's: it was told so by the output.
    pub fn wants_tls(&self) -> bool {
        matches!(self.state, State::Securing(_))
    }

    /// TLS is in place, and all further bytes come from inside it. What came
    /// unsealed behind the request for it was put there by a third party or by a
    /// client that breaks the protocol: the connection ends.
    pub fn tls_begins(&mut self) {
        let damaged = self.has_input();
        self.state = match std::mem::replace(&mut self.state, State::Closed(None)) {
            State::Securing(handshake) if !damaged => State::Handshake(handshake),
            _ => State::Closed(None),
        };
    }

    /// Answers each further request with ESHUTDOWN.
    pub fn refuse_further(&mut self) {
        self.refusing = true;
    }

    /// Begins no further request; what is in flight is still answered, and the
    /// payload of a write that has begun is still taken.
    pub fn stop_reading(&mut self) {
        self.stopped = true;
    }

    pub fn is_stopped(&self) -> bool {
        self.stopped
    }

    pub fn in_flight(&self) -> usize {
        self.in_flight
    }

    pub fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed(_))
    }

    /// The export's key, once the client has chosen one.
    pub fn export_key(&self) -> Option<u64> {
        match &self.state {
            State::Transmission(transmission) => Some(transmission.export.key),
            State::Handshake(_) | State::Securing(_) | State::Closed(_) => None,
        }
    }
}

impl<P: Payload> Default for Session<P> {
    fn default() -> Self {
        Self::new()
    }
}
