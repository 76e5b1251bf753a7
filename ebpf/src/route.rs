//! What a route table says of a destination: the longest prefix of its own decides.
//!
//! An interface without a table pays nothing for this, and has what a network has by
//! itself: whoever is in it, and the internet gateway. Within its own subnet no table is
//! asked, for what stays on the link meets no router.

use crate::ip::Ip;
use crate::layout::{Hop, Interface, ROUTES_NONE};
use crate::reason::Reason;
use crate::tables::Tables;

/// [`Hop::kind`]: there is no route.
pub const NOWHERE: u32 = 0;
/// To whoever has the address in the network.
pub const LOCAL: u32 = 1;
/// Out by the uplink.
pub const INTERNET: u32 = 2;
/// To an appliance's interface.
pub const INTERFACE: u32 = 3;
pub const BLACKHOLE: u32 = 4;
/// To an interface that takes only what is addressed to it.
pub const CHECKED: u32 = 5;
/// To a NAT gateway.
pub const NAT: u32 = 6;

/// Where a packet goes on to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// Nobody was asked: who is in the network, else the internet gateway.
    Any,
    Local,
    Internet,
    /// The appliance's ifindex.
    Interface(u32),
    /// The NAT gateway's public address.
    Nat(u32),
}

/// The way from `interface` to an address outside its subnet.
#[inline(always)]
pub fn way<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    to: A,
) -> Result<Way, Reason> {
    if interface.routes == ROUTES_NONE {
        return Ok(Way::Any);
    }
    let hop = A::hop(tables, interface.routes, to);
    match hop.kind {
        LOCAL => Ok(Way::Local),
        INTERNET => Ok(Way::Internet),
        INTERFACE => Ok(Way::Interface(hop.to)),
        NAT => Ok(Way::Nat(hop.to)),
        BLACKHOLE => Err(Reason::Blackhole),
        CHECKED => Err(Reason::DestinationCheck),
        _ => Err(Reason::NoRoute),
    }
}

/// No route.
pub const NO_HOP: Hop = Hop { kind: NOWHERE, to: 0 };

/// The first bytes of a key in `ROUTES`: each table has a trie for each family.
#[inline(always)]
const fn table_word(table: u32, six: bool) -> u32 {
    table << 1 | six as u32
}

/// A whole IPv4 address in a table, behind the length of 64.
#[inline(always)]
pub const fn key_bytes(table: u32, address: u32) -> [u8; 20] {
    let [a, b, c, d] = table_word(table, false).to_be_bytes();
    let [e, f, g, h] = address.to_be_bytes();
    [a, b, c, d, e, f, g, h, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
}

/// A whole IPv6 address in a table, behind the length of 160.
#[inline(always)]
pub const fn key6_bytes(table: u32, high: u64, low: u64) -> [u8; 20] {
    let [a, b, c, d] = table_word(table, true).to_be_bytes();
    let [e, f, g, h, i, j, k, l] = high.to_be_bytes();
    let [m, n, o, p, q, r, s, t] = low.to_be_bytes();
    [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t]
}
