//! The metadata service of one interface behind a TCP of its own.
//!
//! ```text
//! listening ─ a peer comes ─▶ taken ─ request ⇄ answer ─▶ closing ─▶ gone
//!                               └ quiet, or a request not whole, for too long ─▶ 408 or reset ─▶ gone
//! ```
//! There is one spare listener while connections are fewer than the most.

use std::collections::VecDeque;
use std::time::Duration;

use smoltcp::socket::tcp;

use super::interface::Counters;
use super::metadata::{self, Service, Session};
use super::stack::{Limits, Line, Stack};
use super::wire::Wire;

/// Metadata connections an interface may hold; a client needs one or two. At
/// the limit the one that has been quiet longest gives way.
const CONNECTIONS_MAX: usize = 16;

/// A connection's buffers: a request head and a half, and one full user-data
/// document. With [`CONNECTIONS_MAX`] an interface holds under 512 KiB.
const RECEIVE_BYTES: usize = 4 * 1024;
const SEND_BYTES: usize = 16 * 1024;

/// How long a connection may be quiet, and a request may take to arrive whole.
const PATIENCE: Duration = Duration::from_secs(10);

/// The metadata service behind its TCP: one spare listener while there is room.
pub struct Metadata {
    pub service: Service,
    stack: Stack,
    connections: Vec<Connection>,
    /// Routers that an answer may pass: with 1, one that is forwarded dies.
    hops: u8,
}

struct Connection {
    line: Line,
    session: Session,
    /// What is written but does not fit the socket's buffer yet.
    unsent: VecDeque<u8>,
}

impl AsRef<Line> for Connection {
    fn as_ref(&self) -> &Line {
        &self.line
    }
}

impl Metadata {
    pub fn new(service: Service, hops: u8, wire: &mut Wire, seed: u128, now: Duration) -> Self {
        let limits = Limits {
            connections: CONNECTIONS_MAX,
            receive_bytes: RECEIVE_BYTES,
            send_bytes: SEND_BYTES,
            patience: PATIENCE,
        };
        let stack = Stack::new(metadata::ADDRESSES, metadata::PORT, limits, wire, seed, now);
        let mut metadata = Self { service, stack, connections: Vec::new(), hops };
        metadata.listen(now);
        metadata
    }

    /// From now on, on all connections.
    pub fn limit_hops(&mut self, hops: u8) {
        self.hops = hops;
        for connection in &self.connections {
            self.stack.socket(&connection.line).set_hop_limit(Some(hops));
        }
    }

    /// One turn of the stack: packets in, requests answered, packets out.
    pub fn turn(&mut self, wire: &mut Wire, counters: &mut Counters, now: Duration) {
        loop {
            self.stack.poll(wire, now);
            let mut moved = false;
            for connection in &mut self.connections {
                let socket = self.stack.socket(&connection.line);
                moved |= connection.turn(socket, &mut self.service, counters, now);
            }
            if !moved {
                break;
            }
        }
        self.stack.reap(&mut self.connections);
        self.listen(now);
    }

    /// Keeps one listener spare.
    fn listen(&mut self, now: Duration) {
        let Some(line) = self.stack.listen(&mut self.connections, now) else { return };
        self.stack.socket(&line).set_hop_limit(Some(self.hops));
        let (session, unsent) = (Session::default(), VecDeque::new());
        self.connections.push(Connection { line, session, unsent });
    }

    pub fn next_due(&mut self, now: Duration) -> Option<Duration> {
        self.stack.next_due(&self.connections, now)
    }
}

impl Connection {
    /// Moves bytes both ways; whether anything moved, so that the stack has more to do.
    fn turn(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        service: &mut Service,
        counters: &mut Counters,
        now: Duration,
    ) -> bool {
        if !self.line.served(socket, now) {
            return false;
        }
        if now >= self.line.since + PATIENCE {
            return self.give_up(socket, now);
        }
        let mut moved = self.flush(socket);
        // One answer at a time: nothing is read while the last is still here.
        while self.unsent.is_empty() {
            let read = self.read(socket, now);
            match self.session.next_answer(service, now) {
                Some(answer) => {
                    counters.metadata_answered += 1;
                    self.unsent.extend(answer);
                    self.line.since = now;
                    self.flush(socket);
                    moved = true;
                }
                None if read => moved = true,
                None => break,
            }
        }
        let peer_done = !socket.may_recv() && socket.recv_queue() == 0;
        let over = self.session.closing() || peer_done;
        if over && self.unsent.is_empty() && socket.may_send() {
            socket.close();
            moved = true;
        }
        moved
    }

    fn read(&mut self, socket: &mut tcp::Socket<'_>, now: Duration) -> bool {
        if self.session.closing() || !socket.can_recv() {
            return false;
        }
        let fresh = !self.session.in_request();
        let session = &mut self.session;
        let taken = socket.recv(|bytes| {
            let taken = session.receive(bytes);
            (taken, taken)
        });
        // The request's time runs from its first byte; later ones do not extend it.
        if fresh {
            self.line.since = now;
        }
        taken.is_ok_and(|n| n > 0)
    }

    fn flush(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        if self.unsent.is_empty() {
            return false;
        }
        let sent = socket.send_slice(self.unsent.make_contiguous()).unwrap_or(0);
        self.unsent.drain(..sent);
        sent > 0
    }

    /// Its time is up: told so where it was in the middle of a request, and closed.
    fn give_up(&mut self, socket: &mut tcp::Socket<'_>, now: Duration) -> bool {
        if self.session.in_request() && !self.session.closing() && self.unsent.is_empty() {
            self.unsent.extend(self.session.time_out());
            self.flush(socket);
            socket.close();
            self.line.since = now;
        } else {
            socket.abort();
        }
        true
    }
}
