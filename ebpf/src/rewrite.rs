//! New headers for a packet that goes on.
//!
//! The IPv4 header's own checksum is complete at this point whatever the sender
//! leaves to its hardware, so it is corrected here (RFC 1624). The transport's
//! checksum may be partial: the kernel's helper corrects that one, told by
//! [`Rewrite::transport_delta`] which address words changed.

use crate::ip::V6;
use crate::packet::{Head, Head6};

/// What changes in the Ethernet and IPv4 headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rewrite<A = u32> {
    /// Hardware addresses as numbers.
    pub destination_mac: u64,
    pub source_mac: u64,
    pub source: A,
    pub destination: A,
    pub ttl: u8,
}

impl Rewrite {
    /// Changes nothing.
    #[inline(always)]
    pub fn of(head: &Head) -> Self {
        Self {
            destination_mac: head.destination_mac(),
            source_mac: head.source_mac(),
            source: head.source,
            destination: head.destination,
            ttl: head.ttl(),
        }
    }

    /// The old and new sum of both addresses, as the pseudo-header counts them.
    #[inline(always)]
    pub fn transport_delta(&self, head: &Head) -> Option<(u32, u32)> {
        let old = sum32(head.source) + sum32(head.destination);
        let new = sum32(self.source) + sum32(self.destination);
        let same = head.source == self.source && head.destination == self.destination;
        if same { None } else { Some((old, new)) }
    }

    #[inline(always)]
    pub fn apply(&self, head: &Head) -> Head {
        let mut next = *head;
        next.set_macs(self.destination_mac, self.source_mac);
        let old_ttl = head.third >> 16;
        let new_ttl = u32::from(self.ttl) << 8 | old_ttl & 0xff;
        let old = sum32(head.source) + sum32(head.destination) + old_ttl;
        let new = sum32(self.source) + sum32(self.destination) + new_ttl;
        next.third = new_ttl << 16 | corrected(head.third as u16, old, new) as u32;
        next.source = self.source;
        next.destination = self.destination;
        next
    }
}

/// Whether `checksum` may be a transport's that its sender left to the hardware: then only
/// the pseudo-header's sum stands there, not inverted. One in 65 535 complete ones
/// looks the same. `sum` is [`sum32`] of both addresses, the protocol and the length.
#[inline(always)]
pub const fn may_be_partial(checksum: u16, sum: u32) -> bool {
    let folded = fold(sum) as u16;
    // Zero and all ones are the same number.
    folded == checksum || (folded == 0 || folded == 0xffff) && (checksum == 0 || checksum == 0xffff)
}

/// IPv6: hardware addresses and the hop limit; no checksum covers them.
impl Rewrite<V6> {
    /// Changes nothing.
    #[inline(always)]
    pub fn of6(head: &Head6) -> Self {
        Self {
            destination_mac: head.destination_mac(),
            source_mac: head.source_mac(),
            source: head.source,
            destination: head.destination,
            ttl: head.hop_limit(),
        }
    }

    #[inline(always)]
    pub fn apply6(&self, head: &Head6) -> Head6 {
        let mut next = *head;
        next.set_macs(self.destination_mac, self.source_mac);
        next.second = head.second & !0xff | u32::from(self.ttl);
        next
    }
}

/// The two halves of a word, added.
#[inline(always)]
pub const fn sum32(word: u32) -> u32 {
    (word >> 16) + (word & 0xffff)
}

/// RFC 1624, equation 3: `checksum` after words that summed to `old` became words
/// that sum to `new`. Neither sum may exceed some thousands of 16-bit words.
#[inline(always)]
pub const fn corrected(checksum: u16, old: u32, new: u32) -> u16 {
    // `old` is brought below 2^16 first, so that its complement has 16 bits too.
    let old = fold(old);
    let sum = (!checksum as u32) + (!old & 0xffff) + fold(new);
    !(fold(sum) as u16)
}

#[inline(always)]
pub const fn fold(sum: u32) -> u32 {
    let once = (sum & 0xffff) + (sum >> 16);
    (once & 0xffff) + (once >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(words: &[u16]) -> u16 {
        !(words.iter().fold(0, |sum, w| fold(sum + u32::from(*w))) as u16)
    }

    #[test]
    fn a_checksum_left_to_the_hardware_is_known() {
        let (source, destination, protocol, len) = (0xc633_6401, 0xcb00_7109, 6_u32, 20_u32);
        let sum = sum32(source) + sum32(destination) + protocol + len;
        let words = [0xc633, 0x6401, 0xcb00, 0x7109, 6, 20];
        let pseudo = !checksum(&words);
        assert!(may_be_partial(pseudo, sum));
        let same = (0..=u16::MAX).filter(|c| may_be_partial(*c, sum)).count();
        assert_eq!(same, 1);
        assert!(may_be_partial(0, 0xffff) && may_be_partial(0xffff, 0));
        // Complete: the same words and some data.
        assert!(!may_be_partial(checksum(&[&words[..], &[0x1234]].concat()), sum));
    }

    #[test]
    fn a_corrected_checksum_is_the_one_computed_anew() {
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..100_000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let word = |shift: u32| (seed >> shift) as u16;
            let before = [0x4500, word(0), word(8), word(16)];
            let after = [0x4500, word(24), word(32), word(40)];
            let sum = |w: &[u16; 4]| w[1..].iter().map(|x| u32::from(*x)).sum();
            let got = corrected(checksum(&before), sum(&before), sum(&after));
            assert_eq!(got, checksum(&after), "{before:x?} {after:x?}");
        }
    }
}
