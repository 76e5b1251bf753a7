//! The metadata service of one interface behind a TCP of its own.
//!
//! ```text
//! listening ─ a peer comes ─▶ taken ─ request ⇄ answer ─▶ closing ─▶ gone
//!                               └ quiet, or a request not whole, for too long ─▶ 408 or reset ─▶ gone
//! ```
//! There is one spare listener while connections are fewer than the most.

use std::collections::VecDeque;
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

use super::dhcp::METADATA_ADDRESS;
use super::interface::{Counters, METADATA_PORT};
use super::metadata::{Service, Session};
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
    stack: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
    /// Routers that an answer may pass: with 1, one that is forwarded dies.
    hops: u8,
}

struct Connection {
    handle: SocketHandle,
    session: Session,
    /// What is written but does not fit the socket's buffer yet.
    unsent: VecDeque<u8>,
    /// Since when it has been quiet, or since when its request has been coming.
    since: Duration,
    /// Whether a peer has come.
    taken: bool,
}

impl Metadata {
    pub fn new(service: Service, hops: u8, wire: &mut Wire, seed: u128, now: Duration) -> Self {
        let mut config = Config::new(HardwareAddress::Ip);
        // Initial sequence numbers come from it; the lower half is as random as the whole.
        config.random_seed = seed as u64;
        let mut stack = Interface::new(config, wire, instant(now));
        stack.update_ip_addrs(|addresses| {
            let pushed = addresses.push(IpCidr::new(IpAddress::Ipv4(METADATA_ADDRESS), 32));
            assert!(pushed.is_ok(), "a new interface has room for one address");
        });
        let sockets = SocketSet::new(Vec::new());
        let mut metadata = Self { service, stack, sockets, connections: Vec::new(), hops };
        metadata.listen(now);
        metadata
    }

    /// From now on, on all connections.
    pub fn limit_hops(&mut self, hops: u8) {
        self.hops = hops;
        for connection in &self.connections {
            let socket = self.sockets.get_mut::<tcp::Socket<'_>>(connection.handle);
            socket.set_hop_limit(Some(hops));
        }
    }

    /// One turn of the stack: packets in, requests answered, packets out.
    pub fn turn(&mut self, wire: &mut Wire, counters: &mut Counters, now: Duration) {
        loop {
            self.stack.poll(instant(now), wire, &mut self.sockets);
            let mut moved = false;
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut::<tcp::Socket<'_>>(connection.handle);
                moved |= connection.turn(socket, &mut self.service, counters, now);
            }
            if !moved {
                break;
            }
        }
        self.reap();
        self.listen(now);
    }

    /// Forgets connections that have ended.
    fn reap(&mut self) {
        let sockets = &mut self.sockets;
        self.connections.retain(|connection| {
            let ended = !sockets.get::<tcp::Socket<'_>>(connection.handle).is_open();
            if ended {
                sockets.remove(connection.handle);
            }
            !ended
        });
    }

    /// Keeps one listener spare, at the cost of the quietest connection.
    fn listen(&mut self, now: Duration) {
        if self.connections.iter().any(|c| !c.taken) {
            return;
        }
        if self.connections.len() >= CONNECTIONS_MAX {
            let quietest = self.connections.iter().enumerate().min_by_key(|(_, c)| c.since);
            if let Some((at, _)) = quietest {
                let connection = self.connections.swap_remove(at);
                self.sockets.remove(connection.handle);
            }
        }
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; RECEIVE_BYTES]),
            tcp::SocketBuffer::new(vec![0; SEND_BYTES]),
        );
        socket.set_hop_limit(Some(self.hops));
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        // A peer that no longer acknowledges is given up after this long.
        socket.set_timeout(Some(duration(PATIENCE)));
        let listening = socket.listen((METADATA_ADDRESS, METADATA_PORT));
        assert!(listening.is_ok(), "a new socket may listen on a port that is not zero");
        self.connections.push(Connection {
            handle: self.sockets.add(socket),
            session: Session::default(),
            unsent: VecDeque::new(),
            since: now,
            taken: false,
        });
    }

    pub fn next_due(&mut self, now: Duration) -> Option<Duration> {
        let stack = self
            .stack
            .poll_at(instant(now), &self.sockets)
            .map(|at| Duration::from_micros(at.total_micros().max(0).unsigned_abs()));
        let patience = self.connections.iter().filter(|c| c.taken).map(|c| c.since + PATIENCE);
        stack.into_iter().chain(patience).min()
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
        if !self.taken && socket.state() != tcp::State::Listen {
            (self.taken, self.since) = (true, now);
        }
        if !self.taken || !socket.is_open() {
            return false;
        }
        if now >= self.since + PATIENCE {
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
                    self.since = now;
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
            self.since = now;
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
            self.since = now;
        } else {
            socket.abort();
        }
        true
    }
}

pub(super) fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

pub(super) fn duration(d: Duration) -> smoltcp::time::Duration {
    smoltcp::time::Duration::from_micros(u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}
