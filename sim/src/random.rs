//! Numbers that follow from a seed.

use std::hash::{BuildHasher, Hasher, RandomState};

/// SplitMix64 (Steele, Lea, Flood 2014): 64 bits of state, equidistributed, and
/// any seed is as good as any other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Random {
    state: u64,
}

impl Random {
    pub const fn new(seed: u64) -> Self {
        Self { state: seed }
    }

    pub const fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// One of `0..bound`.
    pub const fn below(&mut self, bound: u64) -> u64 {
        assert!(bound > 0, "nothing is below zero");
        // The bias is below 2^-40 for the small bounds of a simulation.
        self.next() % bound
    }

    /// Whether a thing of this probability happens.
    pub const fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }
}

/// The seed in the environment variable `SEED`, or a new one. Whoever uses it prints it.
pub fn seed_from_environment() -> u64 {
    let given = std::env::var("SEED").ok().and_then(|text| text.parse().ok());
    // The standard library draws a hasher's keys from the system's randomness.
    given.unwrap_or_else(|| RandomState::new().build_hasher().finish())
}

/// Whether the long campaigns are wanted (`./x test --full`).
pub fn is_full() -> bool {
    std::env::var_os("HOSTPLANE_FULL").is_some_and(|value| value == "1")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_numbers_again_and_another_gives_others() {
        let draw = |seed| {
            let mut random = Random::new(seed);
            (0..8).map(|_| random.next()).collect::<Vec<_>>()
        };
        assert_eq!(draw(7), draw(7));
        assert_ne!(draw(7), draw(8));
    }
}
