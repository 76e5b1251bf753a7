//! The RST by which a NAT gateway answers its instance, in the peer's name, where a connection
//! goes on whose port was given back.

use crate::flow::TCP;
use crate::icmp::{ethernet, put};
use crate::packet::{Head, IPV4, Packet};
use crate::rewrite::{fold, sum32};

/// Ethernet, IP and TCP.
pub const LEN: usize = 54;

const TTL: u8 = 64;
const DONT_FRAGMENT: u16 = 0x4000;
/// A header of five words, and the flag.
const RST: u16 = 0x5004;

/// The answer to `packet`, whose head is `head`. `acknowledged`: the number that it expects
/// next, by which its sender believes the answer (RFC 9293, 3.5.2).
#[inline(always)]
pub fn frame(head: &Head, packet: &Packet, from_mac: u64, acknowledged: u32) -> [u8; LEN] {
    let (source, destination) = (head.destination, head.source);
    let addresses = sum32(source) + sum32(destination);
    let life = u16::from_be_bytes([TTL, TCP]);
    let len = (LEN - 14) as u16;
    let ip_sum = 0x4500 + u32::from(len) + u32::from(DONT_FRAGMENT) + u32::from(life) + addresses;
    let tcp_sum = addresses
        + u32::from(TCP)
        + 20
        + u32::from(packet.source_port)
        + u32::from(packet.destination_port)
        + sum32(acknowledged)
        + u32::from(RST);
    let mut b = [0; LEN];
    ethernet(&mut b, head.source_mac(), from_mac, IPV4);
    put(&mut b, 14, 0x4500);
    put(&mut b, 16, len);
    put(&mut b, 20, DONT_FRAGMENT);
    put(&mut b, 22, life);
    put(&mut b, 24, !(fold(ip_sum) as u16));
    b[26..30].copy_from_slice(&source.to_be_bytes());
    b[30..34].copy_from_slice(&destination.to_be_bytes());
    put(&mut b, 34, packet.destination_port);
    put(&mut b, 36, packet.source_port);
    b[38..42].copy_from_slice(&acknowledged.to_be_bytes());
    put(&mut b, 46, RST);
    put(&mut b, 50, !(fold(tcp_sum) as u16));
    b
}
