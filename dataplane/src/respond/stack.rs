//! A TCP of one interface's own, and the connections a service holds on it: one
//! spare listener, and at the limit the quietest connection gives way.

use std::net::IpAddr;
use std::time::Duration;

use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{HardwareAddress, IpAddress, IpCidr};

use super::wire::Wire;

/// What a service's connections may take.
pub struct Limits {
    pub connections: usize,
    pub receive_bytes: usize,
    pub send_bytes: usize,
    /// How long a connection may be quiet; a peer that no longer acknowledges
    /// is given up after as long.
    pub patience: Duration,
}

pub struct Stack {
    interface: Interface,
    sockets: SocketSet<'static>,
    port: u16,
    limits: Limits,
}

/// One connection, as far as the stack knows it.
pub struct Line {
    pub handle: SocketHandle,
    /// Whether a peer has come.
    pub taken: bool,
    /// Since when it has been quiet, or since when its request has been coming.
    pub since: Duration,
}

impl Stack {
    pub fn new(
        addresses: impl IntoIterator<Item = IpAddr>,
        port: u16,
        limits: Limits,
        wire: &mut Wire,
        seed: u128,
        now: Duration,
    ) -> Self {
        let mut config = Config::new(HardwareAddress::Ip);
        // Initial sequence numbers come from it; the lower half is as random as the whole.
        config.random_seed = seed as u64;
        let mut interface = Interface::new(config, wire, instant(now));
        interface.update_ip_addrs(|own| {
            for address in addresses {
                let bits = if address.is_ipv4() { 32 } else { 128 };
                let pushed = own.push(IpCidr::new(IpAddress::from(address), bits));
                assert!(pushed.is_ok(), "a new interface has room for three addresses");
            }
        });
        Self { interface, sockets: SocketSet::new(Vec::new()), port, limits }
    }

    pub fn poll(&mut self, wire: &mut Wire, now: Duration) {
        self.interface.poll(instant(now), wire, &mut self.sockets);
    }

    pub fn socket(&mut self, line: &Line) -> &mut tcp::Socket<'static> {
        self.sockets.get_mut(line.handle)
    }

    /// Forgets connections that have ended.
    pub fn reap<C: AsRef<Line>>(&mut self, connections: &mut Vec<C>) {
        connections.retain(|connection| {
            let handle = connection.as_ref().handle;
            let open = self.sockets.get::<tcp::Socket<'_>>(handle).is_open();
            if !open {
                self.sockets.remove(handle);
            }
            open
        });
    }

    /// A new listener, where none is spare; at the cost of the quietest connection.
    pub fn listen<C: AsRef<Line>>(
        &mut self,
        connections: &mut Vec<C>,
        now: Duration,
    ) -> Option<Line> {
        if connections.iter().any(|c| !c.as_ref().taken) {
            return None;
        }
        if connections.len() >= self.limits.connections {
            let quietest = connections.iter().enumerate().min_by_key(|(_, c)| c.as_ref().since);
            if let Some((at, _)) = quietest {
                self.sockets.remove(connections.swap_remove(at).as_ref().handle);
            }
        }
        let handle = self.sockets.add(self.listener());
        Some(Line { handle, taken: false, since: now })
    }

    fn listener(&self) -> tcp::Socket<'static> {
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; self.limits.receive_bytes]),
            tcp::SocketBuffer::new(vec![0; self.limits.send_bytes]),
        );
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        socket.set_timeout(Some(duration(self.limits.patience)));
        let listening = socket.listen(self.port);
        assert!(listening.is_ok(), "a new socket may listen on a port that is not zero");
        socket
    }

    /// When there is next something to do, if nothing arrives before.
    pub fn next_due<C: AsRef<Line>>(
        &mut self,
        connections: &[C],
        now: Duration,
    ) -> Option<Duration> {
        let stack = self
            .interface
            .poll_at(instant(now), &self.sockets)
            .map(|at| Duration::from_micros(at.total_micros().max(0).unsigned_abs()));
        let lines = connections.iter().map(AsRef::as_ref).filter(|line| line.taken);
        stack.into_iter().chain(lines.map(|line| line.since + self.limits.patience)).min()
    }
}

impl Line {
    /// Whether a peer is there to be served; notes when it came.
    pub fn served(&mut self, socket: &tcp::Socket<'_>, now: Duration) -> bool {
        if !self.taken && socket.state() != tcp::State::Listen {
            (self.taken, self.since) = (true, now);
        }
        self.taken && socket.is_open()
    }
}

fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

fn duration(d: Duration) -> smoltcp::time::Duration {
    smoltcp::time::Duration::from_micros(u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}
