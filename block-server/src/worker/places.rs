//! Places of an export, for those who use it, and places at a socket, for those who have
//! not come so far.
//!
//! A stranger who connects and says nothing holds a place of the second kind. When
//! these are taken, the newcomer gets the place of somebody else: of the origin that
//! holds the most, its oldest. So silence, from however many connections, keeps
//! nobody out, and who floods from one address ends his own. What may never be true:
//! a connection that uses an export ended for one that does not.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use super::Worker;
use super::connection::Closing;
use crate::engine::Engine;

/// Connections that use one export: QEMU uses one, nbdcopy four by default, a
/// migration two QEMUs.
const CONNECTIONS_MAX: u32 = 64;

/// Connections of one socket that have not chosen an export yet, TLS included.
const HANDSHAKES_MAX: usize = 64;

/// Where a connection comes from, as far as places go: an address, of IPv6 its
/// first half, since whoever has one has all of them. Unix sockets have one origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) enum Origin {
    #[default]
    Host,
    Network(u64),
}

impl Origin {
    pub fn of(socket: &OwnedFd) -> Self {
        let name = rustix::net::getpeername(socket).ok().flatten();
        match name.and_then(|any| SocketAddr::try_from(any).ok()) {
            None => Self::Host,
            Some(address) => Self::of_address(address.ip().to_canonical()),
        }
    }

    fn of_address(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(four) => Self::Network(u64::from(four.to_bits())),
            IpAddr::V6(six) => Self::Network((six.to_bits() >> 64) as u64),
        }
    }
}

/// Whose place a newcomer gets: of those who wait, by their numbers in the order of
/// their coming.
fn who_goes(waiting: impl Iterator<Item = (u64, Origin)>, newcomer: Origin) -> Option<u64> {
    let mut origins: BTreeMap<Origin, (usize, u64)> = BTreeMap::new();
    for (serial, origin) in waiting {
        let (count, oldest) = origins.entry(origin).or_insert((0, serial));
        *count += 1;
        *oldest = serial.min(*oldest);
    }
    if let Some((count, _)) = origins.get_mut(&newcomer) {
        *count += 1;
    }
    let most = origins.values().map(|(count, _)| *count).max()?;
    origins.values().filter(|(count, _)| *count == most).map(|(_, oldest)| *oldest).min()
}

impl<E: Engine> Worker<E> {
    /// One more comes in, for whom somebody else may have to go.
    pub(super) fn make_room(&mut self, listener: u32, newcomer: Origin) {
        let waits = |c: &super::Connection| {
            c.listener == listener && c.chosen.is_none() && c.closing == Closing::No
        };
        let waiting: Vec<(u64, Origin, u32)> = self
            .connections
            .iter()
            .filter(|(_, c)| waits(c))
            .map(|(id, c)| (c.serial, c.origin, id))
            .collect();
        let is_crowded = waiting.len() >= HANDSHAKES_MAX;
        if let Some(listener) = self.listeners.get_mut(listener)
            && !std::mem::replace(&mut listener.told_crowd, is_crowded)
            && is_crowded
        {
            tracing::warn!(
                limit = HANDSHAKES_MAX,
                "ending connections that use no export, for others to come in"
            );
        }
        let goes = who_goes(waiting.iter().map(|w| (w.0, w.1)), newcomer);
        let goes = goes.filter(|_| is_crowded);
        if let Some((_, _, id)) = waiting.into_iter().find(|w| Some(w.0) == goes) {
            if let Some(connection) = self.connections.get_mut(id) {
                connection.closing = Closing::Dead;
            }
            self.touch_connection(id);
        }
    }

    /// Whether a connection that has just chosen an export is one too many: it is
    /// ended then.
    pub(super) fn is_crowded(&mut self, id: u32) -> bool {
        let Some(connection) = self.connections.get_mut(id) else { return true };
        let Some(chosen) = &connection.chosen else { return false };
        let is_over = chosen.users() > CONNECTIONS_MAX;
        if let Some(listener) = self.listeners.get_mut(connection.listener)
            && !std::mem::replace(&mut listener.told_full, is_over)
            && is_over
        {
            tracing::warn!(
                limit = CONNECTIONS_MAX,
                "export {:?}: refused a connection: the limit is reached",
                chosen.export
            );
        }
        if is_over {
            connection.closing = Closing::Dead;
            self.touch_connection(id);
        }
        is_over
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origins(list: &[u64]) -> impl Iterator<Item = (u64, Origin)> {
        list.iter().enumerate().map(|(serial, origin)| (serial as u64, Origin::Network(*origin)))
    }

    #[test]
    fn a_flood_from_one_origin_ends_its_own() {
        // The first one is slow and alone; all others are of one origin.
        let goes = who_goes(origins(&[1, 2, 2, 2]), Origin::Network(2));
        assert_eq!(goes, Some(1));
        assert_eq!(who_goes(origins(&[1, 2, 2, 2]), Origin::Network(3)), Some(1));
        assert_eq!(who_goes(origins(&[1, 2, 3]), Origin::Network(4)), Some(0), "the oldest of all");
        assert_eq!(who_goes(origins(&[1, 2, 3]), Origin::Network(2)), Some(1));
        assert_eq!(who_goes(origins(&[]), Origin::Host), None);
    }

    #[test]
    fn an_address_of_ipv6_counts_by_its_network() {
        let of = |text: &str| Origin::of_address(text.parse::<IpAddr>().unwrap().to_canonical());
        assert_eq!(of("2001:db8::1"), of("2001:db8::ffff:1"));
        assert_ne!(of("2001:db8::1"), of("2001:db8:0:1::1"));
        assert_eq!(of("::ffff:192.0.2.1"), of("192.0.2.1"));
        assert_ne!(of("192.0.2.1"), of("192.0.2.2"));
    }
}
