//! Randomness from one seed, which every test prints.

/// As many as `./x test` takes, or with `HOSTPLANE_FULL=1` as many as a long run does.
pub fn many<N>(usual: N, long: N) -> N {
    if std::env::var_os("HOSTPLANE_FULL").is_some_and(|full| full == "1") { long } else { usual }
}

pub struct Random(u64);

impl Random {
    /// The seed is the environment's `HOSTPLANE_SEED`, else `fallback`.
    pub fn seeded(test: &str, fallback: u64) -> Self {
        let seed = std::env::var("HOSTPLANE_SEED").ok().and_then(|s| s.parse().ok());
        let seed = seed.unwrap_or(fallback);
        eprintln!("{test}: HOSTPLANE_SEED={seed}");
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// splitmix64.
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    pub fn chance(&mut self, of_a_hundred: u64) -> bool {
        self.below(100) < of_a_hundred
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}
