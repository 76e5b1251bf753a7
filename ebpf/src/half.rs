//! The half-open table: where flows wait for an answer and its confirmation.
//!
//! Openings come as fast as anyone cares to send them, so one must cost little and
//! take nothing but another opening's place. The key names a bucket of four places,
//! two lines of the cache; a new flow takes the place that has been silent longest.
//!
//! ```text
//!   key ─▶ spread(key, seed) ─┬─▶ bucket   ┌ key and mark │ flow ┐ x 4
//!                             └─▶ mark     └ 24 bytes     │ 8    ┘
//! ```
//! There is no lock. A place that one CPU fills while another reads it may show
//! parts of two keys: the mark, made from the whole key, then fits neither (once
//! in 16 million such moments it would). What is read as the flow may be that of
//! the place's next tenant: a half-open flow's word too.

use bytemuck::{Pod, Zeroable};

use crate::ip::V6;
use crate::layout::{Flow, FlowKey, HALF_BUCKETS};

pub const PLACES: usize = 4;

/// Words of an IPv4 flow's key, and of an IPv6 flow's.
pub const WORDS4: usize = 3;
pub const WORDS6: usize = 6;

/// A key as words, the mark in the last one's last bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place<const N: usize = WORDS4> {
    pub words: [u64; N],
    /// Its phase is 0: the place is free.
    pub flow: Flow,
}
const _: () = assert!(size_of::<Place>() == 32);

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bucket<const N: usize = WORDS4> {
    pub places: [Place<N>; PLACES],
}
const _: () = assert!(size_of::<Bucket>() == 128);
const _: () = assert!(size_of::<Bucket<WORDS6>>() == 224);

// SAFETY: whole words, and a flow, which is one.
unsafe impl<const N: usize> Zeroable for Bucket<N> {}
// SAFETY: as above.
unsafe impl<const N: usize> Pod for Bucket<N> {}

/// Where a key belongs, and how it is written there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Address<const N: usize = WORDS4> {
    pub bucket: u32,
    pub words: [u64; N],
}

/// From SplitMix64.
const MIX: [u64; 2] = [0xbf58_476d_1ce4_e5b9, 0x94d0_49bb_1331_11eb];

impl Address<WORDS6> {
    #[inline(always)]
    pub fn of6(key: &FlowKey<V6>, seed: u64) -> Self {
        let ports = u64::from(key.local_port) << 48
            | u64::from(key.remote_port) << 32
            | u64::from(key.protocol) << 24;
        let mut mix = key.interface ^ seed;
        mix = (mix ^ mix >> 30).wrapping_mul(MIX[0]) ^ key.local.high;
        mix = (mix ^ mix >> 27).wrapping_mul(MIX[1]) ^ key.local.low;
        mix = (mix ^ mix >> 30).wrapping_mul(MIX[0]) ^ key.remote.high;
        mix = (mix ^ mix >> 27).wrapping_mul(MIX[1]) ^ key.remote.low;
        mix = (mix ^ mix >> 30).wrapping_mul(MIX[0]) ^ ports ^ seed;
        mix = (mix ^ mix >> 27).wrapping_mul(MIX[1]);
        mix ^= mix >> 31;
        let (local, remote) = (key.local, key.remote);
        let last = ports | mix & 0x00ff_ffff;
        Self {
            bucket: (mix >> 40) as u32 & (HALF_BUCKETS - 1),
            words: [key.interface, local.high, local.low, remote.high, remote.low, last],
        }
    }
}

impl Address<WORDS4> {
    /// `seed` keeps a stranger from choosing whose bucket he fills.
    #[inline(always)]
    pub fn of(key: &FlowKey, seed: u64) -> Self {
        let ends = u64::from(key.local) << 32 | u64::from(key.remote);
        let ports = u64::from(key.local_port) << 48
            | u64::from(key.remote_port) << 32
            | u64::from(key.protocol) << 24;
        let mut mix = key.interface ^ seed;
        mix = (mix ^ mix >> 30).wrapping_mul(MIX[0]) ^ ends;
        mix = (mix ^ mix >> 27).wrapping_mul(MIX[1]) ^ ports ^ seed;
        mix = (mix ^ mix >> 30).wrapping_mul(MIX[0]);
        mix = (mix ^ mix >> 27).wrapping_mul(MIX[1]);
        Self {
            bucket: (mix >> 40) as u32 & (HALF_BUCKETS - 1),
            words: [key.interface, ends, ports | mix & 0x00ff_ffff],
        }
    }
}

impl<const N: usize> Bucket<N> {
    #[inline(always)]
    pub fn find(&self, words: &[u64; N]) -> Option<Flow> {
        for place in &self.places {
            if place.holds(words) {
                return Some(place.flow);
            }
        }
        None
    }

    /// Writes the flow to its place, or to the one that was silent longest.
    #[inline(always)]
    pub fn put(&mut self, words: &[u64; N], flow: Flow) {
        let mut chosen = 0;
        let mut oldest = u32::MAX;
        for (i, place) in self.places.iter().enumerate() {
            if place.holds(words) {
                chosen = i;
                break;
            }
            let seen = if place.flow.phase == 0 { 0 } else { place.flow.seen_s };
            if seen < oldest {
                (chosen, oldest) = (i, seen);
            }
        }
        if let Some(place) = self.places.get_mut(chosen) {
            if !place.holds(words) {
                place.flow.phase = 0;
                place.words = *words;
            }
            place.flow = flow;
        }
    }

    #[inline(always)]
    pub fn remove(&mut self, words: &[u64; N]) {
        for place in &mut self.places {
            if place.holds(words) {
                place.flow.phase = 0;
            }
        }
    }
}

impl<const N: usize> Place<N> {
    #[inline(always)]
    fn holds(&self, words: &[u64; N]) -> bool {
        let mut differ = 0;
        for (own, other) in self.words.iter().zip(words) {
            differ |= own ^ other;
        }
        differ == 0 && self.flow.phase != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow;

    fn key(n: u32) -> FlowKey {
        FlowKey {
            interface: 7,
            local: 0x0a00_0001,
            remote: n,
            local_port: 80,
            remote_port: n as u16,
            protocol: flow::TCP,
            zero: [0; 3],
        }
    }

    #[test]
    fn a_flow_is_found_until_it_is_removed() {
        let mut bucket = Bucket::zeroed();
        let words = Address::of(&key(1), 3).words;
        assert_eq!(bucket.find(&words), None);
        bucket.put(&words, flow::open(false, 1, 0));
        bucket.put(&words, flow::open(false, 2, 9));
        assert_eq!(bucket.find(&words), Some(flow::open(false, 2, 9)));
        bucket.remove(&words);
        assert_eq!(bucket.find(&words), None);
    }

    #[test]
    fn a_full_bucket_gives_up_the_flow_that_was_silent_longest() {
        let mut bucket = Bucket::zeroed();
        let words = |n| Address::of(&key(n), 3).words;
        for n in 0..4 {
            bucket.put(&words(n), flow::open(false, 1, 100 - n));
        }
        bucket.put(&words(4), flow::open(false, 1, 200));
        let found: Vec<u32> = (0..5).filter(|n| bucket.find(&words(*n)).is_some()).collect();
        assert_eq!(found, [0, 1, 2, 4]);
    }

    #[test]
    fn keys_spread_over_the_buckets_and_a_seed_moves_them() {
        let mut fill = vec![0_u32; HALF_BUCKETS as usize];
        for n in 0..HALF_BUCKETS {
            fill[Address::of(&key(n), 3).bucket as usize] += 1;
        }
        // A fair hash leaves about 6 of 1637 buckets' worth above 6 (Poisson, mean 1).
        assert!(fill.iter().all(|n| *n <= 12), "{:?}", fill.iter().max());
        let empty = fill.iter().filter(|n| **n == 0).count() as f64 / f64::from(HALF_BUCKETS);
        assert!((0.33..0.41).contains(&empty), "{empty}");
        let moved = (0..1000)
            .filter(|n| Address::of(&key(*n), 3).bucket != Address::of(&key(*n), 4).bucket);
        assert!(moved.count() > 990);
    }
}
