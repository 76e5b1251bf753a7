//! Ports of NAT gateways: how one is chosen, and how long it is kept.
//!
//! ```text
//!   NAT_FLOWS   instance's five-tuple ─▶ public address, port, when that was last written down
//!   NAT_PORTS   public address, port, peer ─▶ whose, when last seen, what is closed
//! ```
//! `NAT_PORTS` is what counts: an entry is put there first and never over another, so two CPUs
//! cannot give one port away twice, and its idle time and the ends of TCP are noted there by
//! both directions. `NAT_FLOWS` only leads a connection's packets to it.
//! A port is taken towards one peer: towards another it is free.

use bytemuck::{Pod, Zeroable};

use crate::flow::CLOSING_IDLE_S;
use crate::layout::FlowKey;
use crate::packet::{Kind, Packet};
use crate::tables::Tables;

/// The first port that is given away.
pub const FIRST: u32 = 1024;
/// How many there are: towards each peer, of each protocol.
pub const PORTS_MAX: u32 = 65_536 - FIRST;
/// Connections to one peer for which a port is always as good as found, as with EC2.
pub const CONNECTIONS_A_PEER: u32 = 55_000;
/// Ports that are looked at for a new connection. Of the ports towards one peer 0.853 are taken at
/// [`CONNECTIONS_A_PEER`]; that all of these are has then a chance of 1 in 26 000.
pub const PROBES: u32 = 64;
/// A connection may be silent for so long, as with EC2.
pub const IDLE_S: u32 = 350;
/// Connections of all gateways.
pub const CONNECTIONS_MAX: u32 = 524_288;
/// Connections of one interface through gateways: an eighth, and more than to one peer.
pub const CONNECTIONS_AN_INTERFACE_MAX: u32 = CONNECTIONS_MAX / 8;
const _: () = assert!(CONNECTIONS_AN_INTERFACE_MAX > CONNECTIONS_A_PEER);
/// Datagrams in pieces on their way in that are known at once.
pub const PIECES_MAX: u32 = 8192;

/// `NAT_FLOWS`: a connection as its instance sees it → what it is to the world.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Translation {
    /// The gateway's address.
    pub public: u32,
    /// When [`Holder::seen_s`] was last written by a packet outward.
    pub seen_s: u32,
    pub port: u16,
    pub zero: [u8; 6],
}
const _: () = assert!(size_of::<Translation>() == 16);

/// Key of `NAT_PORTS`, and (with a datagram's number for the port) of `NAT_PIECES`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct PortKey {
    pub public: u32,
    pub peer: u32,
    pub port: u16,
    pub peer_port: u16,
    pub protocol: u8,
    pub zero: [u8; 3],
}
const _: () = assert!(size_of::<PortKey>() == 16);

impl PortKey {
    #[inline(always)]
    pub fn of(flow: &FlowKey, public: u32, port: u16) -> Self {
        let FlowKey { remote: peer, remote_port: peer_port, protocol, .. } = *flow;
        Self { public, peer, port, peer_port, protocol, zero: [0; 3] }
    }
}

/// `NAT_PORTS`: whose port it is.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Pod, Zeroable)]
pub struct PortHolder {
    /// [`crate::layout::Interface::id`].
    pub interface: u64,
    pub local: u32,
    /// Seconds of the coarse monotonic clock.
    pub seen_s: u32,
    pub local_port: u16,
    /// What is closed: [`CLOSED_OUT`] and the like.
    pub flags: u16,
    pub zero: u32,
}
const _: () = assert!(size_of::<PortHolder>() == 24);

/// [`PortHolder::flags`]: the instance has closed its direction.
pub const CLOSED_OUT: u16 = 1;
/// [`PortHolder::flags`]: the peer has.
pub const CLOSED_IN: u16 = 2;
/// [`PortHolder::flags`]: one of them has reset the connection.
pub const RESET: u16 = 4;

impl PortHolder {
    #[inline(always)]
    pub fn of(flow: &FlowKey, now_s: u32) -> Self {
        let FlowKey { interface, local, local_port, .. } = *flow;
        Self { interface, local, seen_s: now_s, local_port, flags: 0, zero: 0 }
    }

    #[inline(always)]
    pub fn is_of(&self, flow: &FlowKey) -> bool {
        self.interface == flow.interface
            && self.local == flow.local
            && self.local_port == flow.local_port
    }

    /// The connection as its instance sees it.
    pub fn flow(&self, key: &PortKey) -> FlowKey {
        FlowKey {
            interface: self.interface,
            local: self.local,
            remote: key.peer,
            local_port: self.local_port,
            remote_port: key.peer_port,
            protocol: key.protocol,
            zero: [0; 3],
        }
    }

    /// Whether the port is still held. A clock that seems to run back makes nothing old.
    #[inline(always)]
    pub fn alive(&self, now_s: u32) -> bool {
        let both = CLOSED_OUT | CLOSED_IN;
        let ended = self.flags & RESET != 0 || self.flags & both == both;
        let most = if ended { CLOSING_IDLE_S } else { IDLE_S };
        now_s.saturating_sub(self.seen_s) <= most
    }

    /// After `packet`.
    #[inline(always)]
    pub fn step(&self, packet: &Packet, outward: bool, now_s: u32) -> Self {
        let mut next = *self;
        next.seen_s = now_s;
        if packet.kind == Kind::Tcp {
            if outward && packet.opens_tcp() {
                next.flags = 0;
            }
            if packet.is_fin() {
                next.flags |= if outward { CLOSED_OUT } else { CLOSED_IN };
            }
            // Of the world's nobody knows who sent it (`flow::REMOTE_RESET`).
            if packet.is_rst() && outward {
                next.flags |= RESET;
            }
        }
        next
    }
}

/// From SplitMix64.
const MIX: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];

/// Where the search for a connection's port begins, and by which steps it goes on.
#[inline(always)]
pub fn start(flow: &FlowKey, seed: u64) -> u64 {
    let ends = u64::from(flow.local) << 32 | u64::from(flow.remote);
    let ports = u64::from(flow.local_port) << 48
        | u64::from(flow.remote_port) << 32
        | u64::from(flow.protocol);
    let mut mix = flow.interface ^ seed;
    mix = (mix ^ mix >> 30).wrapping_mul(MIX[0]) ^ ends;
    mix = (mix ^ mix >> 27).wrapping_mul(MIX[1]) ^ ports ^ seed;
    mix = (mix ^ mix >> 30).wrapping_mul(MIX[0]);
    mix ^ mix >> 31
}

/// A port that is free towards the key's peer, of the first `ports` that there are; 0: none
/// was found. The steps are primes above every number of ports, so that as many ports as are
/// looked at are different ones.
#[inline(always)]
pub fn free<T: Tables + ?Sized>(tables: &T, key: &PortKey, ports: u32, start: u64) -> u16 {
    if ports == 0 || ports > PORTS_MAX {
        return 0;
    }
    let step = match start >> 62 {
        0 => 65_537,
        1 => 65_539,
        2 => 65_543,
        _ => 65_551,
    };
    let mut at = start as u32 % ports;
    let mut key = *key;
    for _ in 0..PROBES {
        key.port = (FIRST + at) as u16;
        if tables.port_holder(&key).is_none() {
            return key.port;
        }
        at = (at + step) % ports;
    }
    0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(n: u16) -> FlowKey {
        FlowKey {
            interface: 7,
            local: 0x0a00_0005,
            remote: 0xcb00_7109,
            local_port: n,
            remote_port: 443,
            protocol: crate::flow::TCP,
            zero: [0; 3],
        }
    }

    #[test]
    fn searches_begin_everywhere() {
        let mut met = vec![0_u32; 64];
        (0..64_000).for_each(|n| met[start(&flow(n), 3) as usize % 64] += 1);
        assert!(met.iter().all(|n| (800..1200).contains(n)), "{met:?}");
        assert_ne!(start(&flow(1), 3), start(&flow(1), 4));
    }

    #[test]
    fn a_port_is_held_for_350_seconds_of_silence_and_10_after_the_end() {
        let holder = PortHolder::of(&flow(1), 1000);
        assert!(holder.alive(1000 + IDLE_S) && !holder.alive(1001 + IDLE_S));
        for flags in [RESET, CLOSED_OUT | CLOSED_IN] {
            let ended = PortHolder { flags, ..holder };
            assert!(ended.alive(1010) && !ended.alive(1011));
        }
        let half = PortHolder { flags: CLOSED_OUT, ..holder };
        assert!(half.alive(1000 + IDLE_S));
        assert_eq!(holder.flow(&PortKey::of(&flow(1), 5, 6)), flow(1));
    }
}
