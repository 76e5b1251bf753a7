//! The RST by which a NAT gateway answers its instance, in the peer's name, where a connection
//! goes on whose port was given back.

use crate::flow::TCP;
use crate::made::{self, put};
use crate::packet::{Head, Packet};
use crate::rewrite::{fold, sum32};

/// Ethernet, IP and TCP.
pub const LEN: usize = 54;

/// A header of five words, and the flag.
const RST: u16 = 0x5004;

/// The answer to `packet`, whose head is `head`. `acknowledged`: the number that it expects
/// next, by which its sender believes the answer (RFC 9293, 3.5.2).
#[inline(always)]
pub fn frame(head: &Head, packet: &Packet, from_mac: u64, acknowledged: u32) -> [u8; LEN] {
    let (source, destination) = (head.destination, head.source);
    let len = (LEN - 14) as u16;
    let sum = sum32(source)
        + sum32(destination)
        + u32::from(TCP)
        + 20
        + u32::from(packet.source_port)
        + u32::from(packet.destination_port)
        + sum32(acknowledged)
        + u32::from(RST);
    let mut b = [0; LEN];
    made::ipv4(&mut b, (head.source_mac(), from_mac), (source, destination), (0, TCP), len);
    put(&mut b, 34, packet.destination_port);
    put(&mut b, 36, packet.source_port);
    b[38..42].copy_from_slice(&acknowledged.to_be_bytes());
    put(&mut b, 46, RST);
    put(&mut b, 50, !(fold(sum) as u16));
    b
}
