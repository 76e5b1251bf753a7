//! Headers of frames that the programs make themselves: answers to whoever sent one.

use crate::packet::{IPV4, mac_bytes};
use crate::rewrite::{fold, sum32};

pub const TTL: u8 = 64;
const DONT_FRAGMENT: u16 = 0x4000;

#[inline(always)]
pub fn put(b: &mut [u8], at: usize, word: u16) {
    b[at..at + 2].copy_from_slice(&word.to_be_bytes());
}

#[inline(always)]
pub fn ethernet(b: &mut [u8], (to, from): (u64, u64), kind: u16) {
    b[..6].copy_from_slice(&mac_bytes(to));
    b[6..12].copy_from_slice(&mac_bytes(from));
    put(b, 12, kind);
}

/// Ethernet and an IPv4 header without options, for `len` bytes with that header.
#[inline(always)]
pub fn ipv4(
    b: &mut [u8],
    macs: (u64, u64),
    (source, destination): (u32, u32),
    (precedence, protocol): (u16, u8),
    len: u16,
) {
    let life = u16::from_be_bytes([TTL, protocol]);
    let sum = u32::from(0x4500 | precedence)
        + u32::from(len)
        + u32::from(DONT_FRAGMENT)
        + u32::from(life)
        + sum32(source)
        + sum32(destination);
    ethernet(b, macs, IPV4);
    put(b, 14, 0x4500 | precedence);
    put(b, 16, len);
    put(b, 20, DONT_FRAGMENT);
    put(b, 22, life);
    put(b, 24, !(fold(sum) as u16));
    b[26..30].copy_from_slice(&source.to_be_bytes());
    b[30..34].copy_from_slice(&destination.to_be_bytes());
}
