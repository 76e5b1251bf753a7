//! Queries by TCP (RFC 7766), over a stack of the interface's own: a length in two
//! bytes, then the message.
//!
//! ```text
//! listening ─ a peer comes ─▶ reading ─ whole ─▶ asked ─ answered ─▶ reading
//!                               └ quiet for too long ─▶ gone
//! ```
//! One question at a time a connection: the next is not read before the last was
//! answered, so that what a guest may keep here is bounded by its connections.

use std::collections::VecDeque;
use std::net::IpAddr;
use std::time::Duration;

use smoltcp::socket::tcp;

use super::PORT;
use crate::respond::stack::{Limits, Line, Stack};
use crate::respond::wire::Wire;

/// Connections of an interface; at the limit the quietest gives way.
const CONNECTIONS_MAX: usize = 8;
const RECEIVE_BYTES: usize = 2 * 1024;
const SEND_BYTES: usize = 8 * 1024;
const PATIENCE: Duration = Duration::from_secs(20);
/// The longest question: a header, a name, and an OPT with what options clients send.
const QUERY_BYTES_MAX: usize = 1024;

pub struct Streams {
    stack: Stack,
    connections: Vec<Connection>,
    names: u64,
}

struct Connection {
    /// Never used again, that no answer comes to another's connection.
    name: u64,
    line: Line,
    read: Vec<u8>,
    unsent: VecDeque<u8>,
    asked: bool,
}

impl AsRef<Line> for Connection {
    fn as_ref(&self) -> &Line {
        &self.line
    }
}

impl Streams {
    pub fn new(
        addresses: impl Iterator<Item = IpAddr>,
        wire: &mut Wire,
        seed: u128,
        now: Duration,
    ) -> Self {
        let limits = Limits {
            connections: CONNECTIONS_MAX,
            receive_bytes: RECEIVE_BYTES,
            send_bytes: SEND_BYTES,
            patience: PATIENCE,
        };
        let stack = Stack::new(addresses, PORT, limits, wire, seed, now);
        let mut streams = Self { stack, connections: Vec::new(), names: 0 };
        streams.listen(now);
        streams
    }

    /// Packets in, packets out; `asked` gets connections and what they ask.
    pub fn turn(&mut self, wire: &mut Wire, now: Duration, asked: &mut Vec<(u64, Vec<u8>)>) {
        loop {
            self.stack.poll(wire, now);
            let mut moved = false;
            for connection in &mut self.connections {
                let socket = self.stack.socket(&connection.line);
                moved |= connection.turn(socket, now, asked);
            }
            if !moved {
                break;
            }
        }
        self.stack.reap(&mut self.connections);
        self.listen(now);
    }

    pub fn answer(&mut self, name: u64, message: &[u8], now: Duration) {
        let Some(connection) = self.connections.iter_mut().find(|c| c.name == name) else { return };
        let Ok(length) = u16::try_from(message.len()) else { return };
        (connection.asked, connection.line.since) = (false, now);
        connection.unsent.extend(length.to_be_bytes());
        connection.unsent.extend(message);
    }

    fn listen(&mut self, now: Duration) {
        let Some(line) = self.stack.listen(&mut self.connections, now) else { return };
        self.names += 1;
        self.connections.push(Connection {
            name: self.names,
            line,
            read: Vec::new(),
            unsent: VecDeque::new(),
            asked: false,
        });
    }

    pub fn next_due(&mut self, now: Duration) -> Option<Duration> {
        self.stack.next_due(&self.connections, now)
    }
}

impl Connection {
    /// Whether anything moved, so that the stack has more to do.
    fn turn(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        now: Duration,
        asked: &mut Vec<(u64, Vec<u8>)>,
    ) -> bool {
        if !self.line.served(socket, now) {
            return false;
        }
        if now >= self.line.since + PATIENCE {
            socket.abort();
            return true;
        }
        let mut moved = self.flush(socket);
        if !self.asked && self.unsent.is_empty() {
            moved |= self.read(socket);
            match self.whole() {
                Ok(Some(message)) => {
                    (self.asked, self.line.since) = (true, now);
                    asked.push((self.name, message));
                }
                Ok(None) if socket.may_recv() || socket.recv_queue() > 0 => {}
                // It has no more to ask.
                Ok(None) if socket.may_send() => {
                    socket.close();
                    moved = true;
                }
                Ok(None) => {}
                Err(TooLong) => {
                    socket.abort();
                    moved = true;
                }
            }
        }
        moved
    }

    fn read(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        let room = QUERY_BYTES_MAX + 2 - self.read.len().min(QUERY_BYTES_MAX + 2);
        if !socket.can_recv() || room == 0 {
            return false;
        }
        let read = &mut self.read;
        let taken = socket.recv(|bytes| {
            let taken = bytes.len().min(room);
            read.extend(&bytes[..taken]);
            (taken, taken)
        });
        taken.is_ok_and(|n| n > 0)
    }

    /// The next message, once it is all here.
    fn whole(&mut self) -> Result<Option<Vec<u8>>, TooLong> {
        let Some((length, rest)) = self.read.split_first_chunk::<2>() else { return Ok(None) };
        let length = usize::from(u16::from_be_bytes(*length));
        if length > QUERY_BYTES_MAX {
            return Err(TooLong);
        }
        if rest.len() < length {
            return Ok(None);
        }
        Ok(Some(self.read.drain(..2 + length).skip(2).collect()))
    }

    fn flush(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        if self.unsent.is_empty() {
            return false;
        }
        let sent = socket.send_slice(self.unsent.make_contiguous()).unwrap_or(0);
        self.unsent.drain(..sent);
        sent > 0
    }
}

struct TooLong;
