//! New headers for a packet that goes on.
//!
//! The IPv4 header's own checksum is complete at this point whatever the sender
//! leaves to its hardware, so it is corrected here (RFC 1624). The transport's
//! checksum may be partial: the kernel's helper corrects that one, told by
//! [`Rewrite::transport_delta`] which address words changed.

use crate::packet::Head;

/// What changes in the Ethernet and IPv4 headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rewrite {
    /// Hardware addresses as numbers.
    pub destination_mac: u64,
    pub source_mac: u64,
    pub source: u32,
    pub destination: u32,
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
const fn fold(sum: u32) -> u32 {
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
