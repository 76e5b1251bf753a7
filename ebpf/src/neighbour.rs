//! IPv6 on the link: neighbours, routers and listeners (RFC 4861, RFC 3810).
//!
//! Guests never see each other's messages. What one asks about the subnet and its
//! router is answered here with the gateway's hardware address, what it says of
//! itself must be true and is needed by nobody, and its question for a router goes
//! to the responder.
//!
//! ```text
//!   0      14     54     58        62       78                86
//!   | Eth. | IPv6 | type | flags: 4 | target | option: type, 1, MAC |
//! ```

use crate::ip::{ALL_NODES, V6};
use crate::packet::{Frame, Head6, Packet, be16, mac_bytes, mac_number};
use crate::reason::Reason;
use crate::rewrite::{Rewrite, sum32};
use crate::{GATEWAY, flow};

pub const ROUTER_SOLICITATION: u8 = 133;
pub const SOLICITATION: u8 = 135;
pub const ADVERTISEMENT: u8 = 136;

/// What a router would have to have lowered.
pub const HOP_LIMIT: u8 = 255;
pub const ANSWER_LEN: usize = 86;
const HEADER_LEN: u32 = 24;
/// Options that are walked through; more are refused.
const OPTIONS_MAX: u32 = 4;
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;

/// A solicitation for a router has no target, so its options come earlier.
const ROUTER_HEADER_LEN: u32 = 8;

/// A message about an address, or to a router.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Message {
    pub kind: u8,
    /// Unspecified where the message has none.
    pub target: V6,
    /// The hardware address that it tells: the sender's, or the target's.
    pub told_mac: Option<u64>,
}

impl Message {
    /// `packet` is of `Kind::Link`. Only these three kinds are read.
    #[inline(always)]
    pub fn parse<F: Frame + ?Sized>(
        frame: &F,
        head: &Head6,
        packet: &Packet<V6>,
    ) -> Result<Self, Reason> {
        let [kind, code] = packet.detail.to_be_bytes();
        let end = head.payload_len() + 54;
        if head.hop_limit() != HOP_LIMIT || code != 0 {
            return Err(Reason::Malformed);
        }
        let (target, at) = match kind {
            ROUTER_SOLICITATION => (V6::UNSPECIFIED, packet.transport + ROUTER_HEADER_LEN),
            _ => {
                let target: [u8; 16] = frame.load(packet.transport + 8).ok_or(Reason::Malformed)?;
                (V6::of(&target), packet.transport + HEADER_LEN)
            }
        };
        let option = if kind == ADVERTISEMENT { TARGET_LINK_LAYER } else { SOURCE_LINK_LAYER };
        let told_mac = told_mac(frame, at, end, option)?;
        if target.is_multicast() || head.source.is_unspecified() && told_mac.is_some() {
            return Err(Reason::Malformed);
        }
        Ok(Self { kind, target, told_mac })
    }
}

#[inline(always)]
fn told_mac<F: Frame + ?Sized>(
    frame: &F,
    mut at: u32,
    end: u32,
    wanted: u8,
) -> Result<Option<u64>, Reason> {
    let mut told = None;
    for _ in 0..OPTIONS_MAX {
        if at >= end {
            break;
        }
        let h: [u8; 8] = frame.load(at).ok_or(Reason::Malformed)?;
        if h[1] == 0 {
            return Err(Reason::Malformed);
        }
        if h[0] == wanted {
            told = Some(mac_number([h[2], h[3], h[4], h[5], h[6], h[7]]));
        }
        at += u32::from(h[1]) * 8;
    }
    if at == end { Ok(told) } else { Err(Reason::Malformed) }
}

/// The answer to a solicitation: `source` is the address asked for, and it is at
/// `source_mac`; `destination` asked from `destination_mac`.
#[inline(always)]
pub fn answer(rewrite: &Rewrite<V6>) -> [u8; ANSWER_LEN] {
    let asked_by = rewrite.destination;
    // Whoever has no address yet is told by an answer to all.
    let to = if asked_by.is_unspecified() { ALL_NODES } else { asked_by };
    let ours = mac_bytes(rewrite.source_mac);
    let mut b = [0; ANSWER_LEN];
    b[..6].copy_from_slice(&mac_bytes(rewrite.destination_mac));
    b[6..12].copy_from_slice(&ours);
    b[12..22].copy_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, flow::ICMPV6, HOP_LIMIT]);
    b[22..38].copy_from_slice(&rewrite.source.bytes());
    b[38..54].copy_from_slice(&to.bytes());
    // Router, solicited, override.
    let router = if rewrite.source_mac == GATEWAY { 0x80 } else { 0 };
    let solicited = if asked_by.is_unspecified() { 0 } else { 0x40 };
    let flags = router | solicited | 0x20;
    b[62..78].copy_from_slice(&rewrite.source.bytes());
    let [m0, m1, m2, m3, m4, m5] = ours;
    b[78..].copy_from_slice(&[TARGET_LINK_LAYER, 1, m0, m1, m2, m3, m4, m5]);
    // The pseudo-header, and the message with the target in it once more.
    let sum = sum6(rewrite.source) * 2
        + sum6(to)
        + 32
        + u32::from(flow::ICMPV6)
        + u32::from(be16(ADVERTISEMENT, 0))
        + u32::from(be16(flags, 0))
        + u32::from(be16(TARGET_LINK_LAYER, 1))
        + u32::from(be16(m0, m1))
        + u32::from(be16(m2, m3))
        + u32::from(be16(m4, m5));
    let once = (sum & 0xffff) + (sum >> 16);
    let [c0, c1] = (!((once & 0xffff) + (once >> 16)) as u16).to_be_bytes();
    b[54..59].copy_from_slice(&[ADVERTISEMENT, 0, c0, c1, flags]);
    b
}

#[inline(always)]
fn sum6(address: V6) -> u32 {
    sum32((address.high >> 32) as u32)
        + sum32(address.high as u32)
        + sum32((address.low >> 32) as u32)
        + sum32(address.low as u32)
}
