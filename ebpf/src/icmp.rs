//! The ICMP errors that a router owes to the sender of what it drops.
//!
//! The decision says what is told and by whom (`decide::tell`); here the headers are
//! put together. What is quoted is the packet as it came in.
//!
//! ```text
//!   0      14     34            42                  of IPv6: 0  14  54  62
//!   | Eth. | IPv4 | type … sum … | the packet, from its IP header on, in part |
//! ```

use crate::flow::{ICMP, ICMPV6};
use crate::ip::{Ip, V6};
use crate::made::{self, TTL, put};
use crate::packet::{Head, Head6, IPV6};
use crate::rate::Limit;
use crate::rewrite::{fold, sum32};
use crate::verdict::Verdict;

/// What the sender of a dropped packet is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Tell {
    Nothing = 0,
    /// It had no hop left.
    TimeExceeded = 1,
    /// It is longer than the MTU of its way.
    TooBig = 2,
    /// Its connection is over: a NAT gateway knows it no more ([`crate::reset`]).
    Reset = 3,
}

/// Ethernet, IP and ICMP.
pub const HEADERS_LEN: usize = 42;
pub const HEADERS6_LEN: usize = 62;

/// An error has 576 bytes at most (RFC 1812, 4.3.2.3), and of IPv6 1280 (RFC 4443, 2.4).
pub const QUOTE_MAX: u32 = 576 - 28;
pub const QUOTE6_MAX: u32 = 1280 - 48;
/// Bytes that are copied at once.
pub const CHUNK: usize = 64;
pub const CHUNKS: usize = (QUOTE6_MAX as usize).div_ceil(CHUNK);

/// Errors that an interface's guest is told a second, and as many the world about it.
pub const ERRORS_A_SECOND_MAX: u64 = 100;
pub const ERRORS: Limit = Limit::of(ERRORS_A_SECOND_MAX, ERRORS_A_SECOND_MAX, 1);

/// Where one is put together: the quote has whole words, and the headers end before it.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy)]
pub struct Room(pub [u8; QUOTE_AT + CHUNKS * CHUNK]);
pub const QUOTE_AT: usize = HEADERS6_LEN.next_multiple_of(8);

/// Precedence of what networks say themselves (RFC 1812, 4.3.2.5).
const INTERNETWORK_CONTROL: u16 = 0xc0;

/// What precedes the quote of `quoted` bytes whose words sum to `quote_sum`. It goes back
/// to whom `head` came from, and comes from `from_mac`.
#[inline(always)]
pub fn headers(
    head: &Head,
    verdict: &Verdict,
    from_mac: u64,
    quoted: u32,
    quote_sum: u32,
) -> [u8; HEADERS_LEN] {
    let (kind, rest) = match verdict.tell {
        Tell::TooBig => (0x0304, verdict.told_mtu),
        _ => (0x0b00, 0),
    };
    let len = (28 + quoted) as u16;
    let mut b = [0; HEADERS_LEN];
    let macs = (head.source_mac(), from_mac);
    made::ipv4(&mut b, macs, (verdict.teller, head.source), (INTERNETWORK_CONTROL, ICMP), len);
    put(&mut b, 34, kind);
    put(&mut b, 36, !(fold(u32::from(kind) + u32::from(rest) + quote_sum) as u16));
    put(&mut b, 40, rest);
    b
}

/// [`headers`] of the other family.
#[inline(always)]
pub fn headers6(
    head: &Head6,
    verdict: &Verdict<V6>,
    from_mac: u64,
    quoted: u32,
    quote_sum: u32,
) -> [u8; HEADERS6_LEN] {
    let (kind, rest) = match verdict.tell {
        Tell::TooBig => (0x0200, verdict.told_mtu),
        _ => (0x0300, 0),
    };
    let len = (8 + quoted) as u16;
    let (source, destination) = (verdict.teller, head.source);
    let sum = sum6(source)
        + sum6(destination)
        + u32::from(len)
        + u32::from(ICMPV6)
        + u32::from(kind)
        + u32::from(rest)
        + quote_sum;
    let mut b = [0; HEADERS6_LEN];
    made::ethernet(&mut b, (head.source_mac(), from_mac), IPV6);
    put(&mut b, 14, 0x6000);
    put(&mut b, 18, len);
    put(&mut b, 20, u16::from_be_bytes([ICMPV6, TTL]));
    b[22..38].copy_from_slice(&source.bytes());
    b[38..54].copy_from_slice(&destination.bytes());
    put(&mut b, 54, kind);
    put(&mut b, 56, !(fold(sum) as u16));
    put(&mut b, 60, rest);
    b
}

#[inline(always)]
fn sum6(a: V6) -> u32 {
    sum32((a.high >> 32) as u32)
        + sum32(a.high as u32)
        + sum32((a.low >> 32) as u32)
        + sum32(a.low as u32)
}

/// Whether anybody is told: a frame to a whole link asks for no answer (RFC 1122, 3.2.2).
#[inline(always)]
pub fn heard<A: Ip>(verdict: &Verdict<A>, destination_mac: u64) -> bool {
    verdict.tell != Tell::Nothing && destination_mac >> 40 & 1 == 0
}
