//! Fragments: the first one, which has the ports, is decided as any packet is, and what
//! it was allowed holds for those that follow.
//!
//! Each interface has places of its own, so that nobody's fragments push out another's. A
//! datagram's place follows from its addresses and its identification; a newer one takes it.
//!
//! ```text
//!   slot × 64 + spread(key, seed) ─▶ ┌ key │ seen, end of the first │ mark ┐
//!                                    └ 48  │ 8                      │ 8    ┘
//! ```
//! There is no lock: the mark is made from all of a place, so that one that is seen half
//! written is none.

use bytemuck::{Pod, Zeroable};

use crate::ip::Ip;
use crate::packet::{Packet, Part};
use crate::reason::Reason;
use crate::tables::Tables;
use crate::verdict::Verdict;

/// Datagrams in pieces that an interface may have under way, a power of two.
pub const PLACES: u32 = 64;
/// A first fragment is remembered so long (RFC 791 and RFC 8200: 15 to 60 s).
pub const LIFE_S: u32 = 30;
/// The longest datagram, without its IP header.
pub const END_MAX: u32 = 65_535;

pub const WORDS: usize = 6;
/// The interface's id, both addresses, and what tells a datagram from others.
pub type Key = [u64; WORDS];

/// `FRAGMENTS`: by slot and key.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Place {
    pub key: Key,
    /// In seconds of the coarse monotonic clock.
    pub seen_s: u32,
    /// Where the first fragment's data end: no later one may begin before.
    pub end: u32,
    pub mark: u64,
}
const _: () = assert!(size_of::<Place>() == 64);

/// From SplitMix64.
const MIX: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];

#[inline(always)]
fn mixed(key: &Key, seed: u64) -> u64 {
    let mut mix = seed;
    for (n, word) in key.iter().enumerate() {
        mix = (mix ^ mix >> 29 ^ word).wrapping_mul(MIX[n & 1]);
    }
    mix ^ mix >> 31
}

/// Where a key's datagram stands; `seed` keeps a stranger from choosing.
#[inline(always)]
pub fn index(slot: u32, key: &Key, seed: u64) -> u32 {
    slot * PLACES + ((mixed(key, seed) >> 40) as u32 & (PLACES - 1))
}

impl Place {
    #[inline(always)]
    pub fn of(key: Key, seen_s: u32, end: u32) -> Self {
        Self { key, seen_s, end, mark: Self::mark(&key, seen_s, end) }
    }

    #[inline(always)]
    fn mark(key: &Key, seen_s: u32, end: u32) -> u64 {
        mixed(key, u64::from(seen_s) << 32 | u64::from(end))
    }

    /// Where the data of this key's first fragment end; 0: it was not seen, or long ago.
    #[inline(always)]
    pub fn end(&self, key: &Key, now_s: u32) -> u32 {
        let mut differ = self.mark ^ Self::mark(key, self.seen_s, self.end);
        for (own, other) in self.key.iter().zip(key) {
            differ |= own ^ other;
        }
        let old = now_s.saturating_sub(self.seen_s) > LIFE_S;
        if differ != 0 || old { 0 } else { self.end }
    }
}

/// Whether a later fragment may go where its first one went.
#[inline(always)]
pub fn follows<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    (id, slot): (u64, u32),
    packet: &Packet<A>,
    now_s: u32,
) -> Result<(), Reason> {
    let key = A::fragment_key(packet, id);
    let index = index(slot, &key, tables.config().seed);
    match tables.first_fragment(index, &key, now_s) {
        0 => Err(Reason::FragmentLost),
        end if packet.at < end => Err(Reason::FragmentOverlap),
        _ => Ok(()),
    }
}

/// What is to be remembered of a packet that goes on: where, and what.
#[inline(always)]
pub fn kept<A: Ip>(
    packet: &Packet<A>,
    verdict: &Verdict<A>,
    seed: u64,
    now_s: u32,
) -> (u32, Place) {
    let key = A::fragment_key(packet, verdict.keeps);
    (index(verdict.slots[0], &key, seed), Place::of(key, now_s, packet.end))
}

impl<A: Ip> Packet<A> {
    /// Notes which part of a datagram it is: `len` bytes from `at`.
    #[inline(always)]
    pub fn be_part(&mut self, id: u32, at: u32, more: bool, len: u32) -> Result<(), Reason> {
        let ragged = more && len & 7 != 0;
        if len == 0 || ragged || at + len > END_MAX {
            return Err(Reason::Malformed);
        }
        self.fragment_id = id;
        self.at = at;
        self.end = at + len;
        self.part = if at == 0 { Part::First } else { Part::Later };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_found_by_its_own_key_for_half_a_minute() {
        let key = [1, 2, 3, 4, 5, 6];
        let place = Place::of(key, 100, 1480);
        assert_eq!(place.end(&key, 100), 1480);
        assert_eq!(place.end(&key, 100 + LIFE_S), 1480);
        assert_eq!(place.end(&key, 101 + LIFE_S), 0);
        for n in 0..WORDS {
            let mut other = key;
            other[n] ^= 1;
            assert_eq!(place.end(&other, 100), 0);
        }
        assert_eq!(Place::zeroed().end(&[0; WORDS], 0), 0);
    }

    #[test]
    fn a_place_that_is_seen_half_written_is_none() {
        let (old, new) = (Place::of([1; 6], 100, 8), Place::of([1, 1, 1, 1, 1, 2], 101, 1480));
        let halves = [bytemuck::cast::<Place, [u64; 8]>(old), bytemuck::cast(new)];
        for cut in 1..8 {
            let words: [u64; 8] = std::array::from_fn(|n| halves[usize::from(n < cut)][n]);
            let torn: Place = bytemuck::cast(words);
            if torn != old && torn != new {
                assert_eq!(torn.end(&old.key, 101) + torn.end(&new.key, 101), 0, "{cut}");
            }
        }
    }
}
