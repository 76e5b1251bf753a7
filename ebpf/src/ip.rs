//! The two families of addresses. What is decided is written once, over [`Ip`];
//! each family says how it is read, found and written.
//!
//! IPv4 packets pay nothing for this: the compiler makes the decision of each
//! family by itself, and the programs enter IPv6 by a function of its own.

use core::hash::Hash;

use bytemuck::{Pod, Zeroable};

use crate::ROUTER_ADDRESS6;
use crate::flow::{ICMP, ICMPV6};
use crate::fragment::Key;
use crate::layout::{Flow, FlowKey, Hop, Interface, Policy, Span};
use crate::packet::{Frame, Inner, Kind, Packet};
use crate::reason::Reason;
use crate::rewrite::{corrected, sum32};
use crate::tables::{Question, Tables, search, search6};
use crate::verdict::Work;

/// An IPv6 address as two words, host byte order.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct V6 {
    pub high: u64,
    pub low: u64,
}
const _: () = assert!(size_of::<V6>() == 16);

/// To every node of the link.
pub const ALL_NODES: V6 = V6 { high: 0xff02 << 48, low: 1 };

impl V6 {
    pub const UNSPECIFIED: Self = Self { high: 0, low: 0 };

    #[inline(always)]
    pub const fn of(b: &[u8; 16]) -> Self {
        Self {
            high: u64::from_be_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]),
            low: u64::from_be_bytes([b[8], b[9], b[10], b[11], b[12], b[13], b[14], b[15]]),
        }
    }

    #[inline(always)]
    pub const fn bytes(self) -> [u8; 16] {
        let ([a, b, c, d, e, f, g, h], [i, j, k, l, m, n, o, p]) =
            (self.high.to_be_bytes(), self.low.to_be_bytes());
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }

    pub const fn from_bits(bits: u128) -> Self {
        Self { high: (bits >> 64) as u64, low: bits as u64 }
    }

    pub const fn bits(self) -> u128 {
        (self.high as u128) << 64 | self.low as u128
    }

    #[inline(always)]
    pub const fn is_unspecified(self) -> bool {
        self.high | self.low == 0
    }

    #[inline(always)]
    pub const fn is_multicast(self) -> bool {
        self.high >> 56 == 0xff
    }

    /// fe80::/10.
    #[inline(always)]
    pub const fn is_link_local(self) -> bool {
        self.high >> 54 == 0xfe80 >> 6
    }
}

/// An address of either family, and what its family does in its own way.
pub trait Ip: Pod + Eq + Hash {
    /// The family's ICMP.
    const ICMP: u8;

    fn icmp_kind(kind: u8) -> Result<Kind, Reason>;

    /// Never the other end of what is forwarded.
    fn is_unroutable(self) -> bool;

    /// Whether an interface here has it towards the world.
    fn is_ours<T: Tables + ?Sized>(self, tables: &T) -> bool;

    fn flow<T: Tables + ?Sized>(tables: &T, key: &FlowKey<Self>) -> Option<Flow>;

    fn half_flow<T: Tables + ?Sized>(tables: &T, key: &FlowKey<Self>) -> Option<Flow>;

    fn classify<T: Tables + ?Sized>(tables: &T, slot: u32, question: &Question<Self>) -> u32;

    /// Where a route table sends it.
    fn hop<T: Tables + ?Sized>(tables: &T, table: u32, to: Self) -> Hop;

    /// The class table of the family's ICMP types and codes.
    fn icmp_span(policy: &Policy) -> Span;

    /// The row of the rules whose address matches.
    fn remote_row<T: Tables + ?Sized>(tables: &T, policy: &Policy, remote: Self) -> u32;

    /// Reads the packet that the ICMP error `packet` is about.
    fn parse_inner<F: Frame + ?Sized>(
        inner: &mut Inner<Self>,
        frame: &F,
        packet: &Packet<Self>,
    ) -> Result<(), Reason>;

    /// The subnet's router, as a guest knows it; 0: there is none.
    fn router(interface: &Interface) -> Self;

    /// What the world knows the host by: its address on the uplink, or else `address`.
    fn host<T: Tables + ?Sized>(tables: &T, address: Self) -> Self;

    fn is_none(self) -> bool;

    /// What tells a fragment's datagram from all others of the interface.
    fn fragment_key(packet: &Packet<Self>, interface: u64) -> Key;

    /// New addresses for the packet inside an ICMP error.
    fn rewrite_inner(work: &mut Work<Self>, source: Option<Self>, destination: Option<Self>);
}

/// From this mask on, a subnet has no room for a router beside its hosts.
const ONE_HOST_MASK: u32 = 0xffff_fffe;

impl Ip for u32 {
    const ICMP: u8 = ICMP;

    #[inline(always)]
    fn icmp_kind(kind: u8) -> Result<Kind, Reason> {
        match kind {
            8 | 13 | 15 | 17 => Ok(Kind::IcmpRequest),
            0 | 14 | 16 | 18 => Ok(Kind::IcmpReply),
            3 | 11 | 12 => Ok(Kind::IcmpError),
            _ => Err(Reason::IcmpType),
        }
    }

    /// This network, loopback, link-local, multicast and above (RFC 6890).
    #[inline(always)]
    fn is_unroutable(self) -> bool {
        let first = self >> 24;
        first == 0 || first == 127 || first >= 224 || self >> 16 == 0xa9fe
    }

    #[inline(always)]
    fn is_ours<T: Tables + ?Sized>(self, tables: &T) -> bool {
        tables.elastic(self).is_some()
    }

    #[inline(always)]
    fn flow<T: Tables + ?Sized>(tables: &T, key: &FlowKey) -> Option<Flow> {
        tables.flow(key)
    }

    #[inline(always)]
    fn half_flow<T: Tables + ?Sized>(tables: &T, key: &FlowKey) -> Option<Flow> {
        tables.half_flow(key)
    }

    #[inline(always)]
    fn classify<T: Tables + ?Sized>(tables: &T, slot: u32, question: &Question) -> u32 {
        tables.classify(slot, question)
    }

    #[inline(always)]
    fn hop<T: Tables + ?Sized>(tables: &T, table: u32, to: u32) -> Hop {
        tables.hop(table, to)
    }

    #[inline(always)]
    fn icmp_span(policy: &Policy) -> Span {
        policy.icmp
    }

    #[inline(always)]
    fn remote_row<T: Tables + ?Sized>(tables: &T, policy: &Policy, remote: u32) -> u32 {
        search(tables, policy.remotes, u64::from(remote), false)
    }

    #[inline(always)]
    fn parse_inner<F: Frame + ?Sized>(
        inner: &mut Inner,
        frame: &F,
        packet: &Packet,
    ) -> Result<(), Reason> {
        inner.parse(frame, packet)
    }

    #[inline(always)]
    fn rewrite_inner(work: &mut Work, source: Option<u32>, destination: Option<u32>) {
        let inner = &work.inner;
        let source = source.unwrap_or(inner.source);
        let destination = destination.unwrap_or(inner.destination);
        let old = sum32(inner.source) + sum32(inner.destination);
        let new = sum32(source) + sum32(destination);
        let [c0, c1] = corrected(inner.checksum, old, new).to_be_bytes();
        let [s0, s1, s2, s3] = source.to_be_bytes();
        let [d0, d1, d2, d3] = destination.to_be_bytes();
        work.verdict.inner.offset = inner.offset + 10;
        work.verdict.inner.bytes = [c0, c1, s0, s1, s2, s3, d0, d1, d2, d3];
    }

    /// The first address of the subnet, where it is not the guest's only one.
    #[inline(always)]
    fn router(interface: &Interface) -> u32 {
        if interface.mask >= ONE_HOST_MASK { 0 } else { interface.subnet + 1 }
    }

    #[inline(always)]
    fn host<T: Tables + ?Sized>(tables: &T, address: u32) -> u32 {
        match tables.config().uplink_address {
            0 => address,
            own => own,
        }
    }

    #[inline(always)]
    fn is_none(self) -> bool {
        self == 0
    }

    #[inline(always)]
    fn fragment_key(packet: &Packet, interface: u64) -> Key {
        let ends = u64::from(packet.source) << 32 | u64::from(packet.destination);
        let datagram = u64::from(packet.fragment_id) << 8 | u64::from(packet.protocol);
        [interface, ends, datagram, 0, 0, 0]
    }
}

impl Ip for V6 {
    const ICMP: u8 = ICMPV6;

    #[inline(always)]
    fn icmp_kind(kind: u8) -> Result<Kind, Reason> {
        match kind {
            128 => Ok(Kind::IcmpRequest),
            129 => Ok(Kind::IcmpReply),
            1..=4 => Ok(Kind::IcmpError),
            130..=137 | 143 => Ok(Kind::Link),
            _ => Err(Reason::IcmpType),
        }
    }

    /// Unspecified, loopback, IPv4-mapped, link-local, multicast (RFC 6890).
    #[inline(always)]
    fn is_unroutable(self) -> bool {
        self.high == 0 || self.is_link_local() || self.is_multicast()
    }

    #[inline(always)]
    fn is_ours<T: Tables + ?Sized>(self, tables: &T) -> bool {
        tables.holder(&self).is_some()
    }

    #[inline(always)]
    fn flow<T: Tables + ?Sized>(tables: &T, key: &FlowKey<Self>) -> Option<Flow> {
        tables.flow6(key)
    }

    #[inline(always)]
    fn half_flow<T: Tables + ?Sized>(tables: &T, key: &FlowKey<Self>) -> Option<Flow> {
        tables.half_flow6(key)
    }

    #[inline(always)]
    fn classify<T: Tables + ?Sized>(tables: &T, slot: u32, question: &Question<Self>) -> u32 {
        tables.classify6(slot, question)
    }

    #[inline(always)]
    fn hop<T: Tables + ?Sized>(tables: &T, table: u32, to: Self) -> Hop {
        tables.hop6(table, to)
    }

    #[inline(always)]
    fn icmp_span(policy: &Policy) -> Span {
        policy.icmp6
    }

    #[inline(always)]
    fn remote_row<T: Tables + ?Sized>(tables: &T, policy: &Policy, remote: Self) -> u32 {
        search6(tables, policy.remotes6, remote)
    }

    #[inline(always)]
    fn parse_inner<F: Frame + ?Sized>(
        inner: &mut Inner<Self>,
        frame: &F,
        packet: &Packet<Self>,
    ) -> Result<(), Reason> {
        inner.parse6(frame, packet)
    }

    /// Addresses are the same inside and out.
    #[inline(always)]
    fn rewrite_inner(_: &mut Work<Self>, _: Option<Self>, _: Option<Self>) {}

    #[inline(always)]
    fn router(_: &Interface) -> Self {
        ROUTER_ADDRESS6
    }

    #[inline(always)]
    fn host<T: Tables + ?Sized>(tables: &T, address: Self) -> Self {
        let own = tables.config().uplink_address6;
        if own.is_unspecified() { address } else { own }
    }

    #[inline(always)]
    fn is_none(self) -> bool {
        self.is_unspecified()
    }

    #[inline(always)]
    fn fragment_key(packet: &Packet<Self>, interface: u64) -> Key {
        let V6 { high, low } = packet.source;
        let to = packet.destination;
        [interface, high, low, to.high, to.low, u64::from(packet.fragment_id)]
    }
}
