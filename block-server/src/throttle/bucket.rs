//! A token bucket, kept as a time.
//!
//! Instead of a level that must be filled up, the bucket remembers when it will
//! be full again (`full_at`). Its level in nanoseconds of filling is
//! `depth - (full_at - now)`; something may go while that is positive, and is
//! then taken whole, into debt if need be. So an operation that is larger than the
//! bucket goes too, and those behind it wait for it. Over any span the bucket lets
//! through at most `rate * span + depth` and one operation.

/// Bits behind the point of a unit's time: exact to 10^-10 at 10 GB/s.
const FRACTION: u32 = 32;

/// The greatest debt that is taken over from another process, in nanoseconds.
const DEBT_MAX: u64 = 300_000_000_000;

/// Times are nanoseconds on the caller's clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bucket {
    full_at: u64,
    /// Of one unit, in 2^-32 ns; 0: it is no limit.
    unit: u64,
    depth: u64,
}

impl Bucket {
    /// Full; `per_second` and `depth` are units, at least one each.
    pub fn new(per_second: u64, depth: u64) -> Self {
        let unit = ((1_000_000_000_u64 << FRACTION) / per_second.max(1)).max(1);
        Self { full_at: 0, unit, depth: time_of(unit, depth.max(1)) }
    }

    /// The earliest time at which something may go.
    pub const fn ready_at(&self) -> u64 {
        if self.unit == 0 { 0 } else { self.full_at.saturating_add(1).saturating_sub(self.depth) }
    }

    pub fn take(&mut self, now: u64, units: u64) {
        self.full_at = self.full_at.max(now).saturating_add(time_of(self.unit, units));
    }

    /// How long it needs to be full again, for another process to go on with.
    pub const fn lacks(&self, now: u64) -> u64 {
        self.full_at.saturating_sub(now)
    }

    /// Takes over what another of its kind lacked; never more than it is deep and a
    /// debt beside, so that no number that is told can stop a volume for long.
    pub fn owe(&mut self, now: u64, lack: u64) {
        if self.unit > 0 {
            self.full_at = now + lack.min(self.depth.saturating_add(DEBT_MAX));
        }
    }

    /// What was taken and not filled up again stays so in a bucket of another
    /// rate; what no longer fits in it is forgiven.
    pub fn become_like(&mut self, new: Self, now: u64) {
        let missing = self.full_at.saturating_sub(now);
        let units = match self.unit {
            0 => 0,
            unit => ((u128::from(missing) << FRACTION) / u128::from(unit)) as u64,
        };
        *self = Self { full_at: now + time_of(new.unit, units).min(new.depth), ..new };
    }
}

/// Rounded up, so that a bucket never gives more than its rate.
fn time_of(unit: u64, units: u64) -> u64 {
    let exact = u128::from(unit) * u128::from(units) + ((1 << FRACTION) - 1);
    u64::try_from(exact >> FRACTION).unwrap_or(u64::MAX >> 2).min(u64::MAX >> 2)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// As one would explain it: a level in 10^-9 units, filled by the nanosecond.
    struct Naive {
        rate: i128,
        depth: i128,
        level: i128,
        at: u64,
    }

    impl Naive {
        fn look(&mut self, now: u64) {
            let filled = self.level + i128::from(now - self.at) * self.rate;
            (self.level, self.at) = (filled.min(self.depth), now);
        }

        fn ready_at(&self) -> u64 {
            if self.level > 0 {
                return self.at;
            }
            self.at + ((-self.level) / self.rate + 1) as u64
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]
        #[test]
        fn it_is_the_bucket_that_one_would_explain(
            rate in 1_u64..4_000_000_000,
            depth in 1_u64..1 << 33,
            script in prop::collection::vec((0_u64..3_000_000_000, 1_u64..1 << 26), 1..60),
        ) {
            let mut bucket = Bucket::new(rate, depth);
            let mut naive = Naive {
                rate: i128::from(rate),
                depth: i128::from(depth) * 1_000_000_000,
                level: i128::from(depth) * 1_000_000_000,
                at: 0,
            };
            let (mut now, mut sum) = (0, 0_u128);
            // Each operation rounds up by less than a nanosecond, and a unit's time
            // is cut by less than 2^-32 of a nanosecond.
            let mut slack = 2;
            for (pause, cost) in script {
                now += pause;
                naive.look(now);
                let ready = bucket.ready_at().max(now);
                slack += 2 + (cost >> 32);
                let drift = slack + (depth >> 32) + 1;
                prop_assert!(ready.abs_diff(naive.ready_at()) <= drift,
                    "{ready} and {} differ by more than {drift}", naive.ready_at());
                now = ready.max(naive.ready_at());
                naive.look(now);
                // What went until now fits the rate and the bucket.
                let bound = u128::from(rate) * u128::from(now) / 1_000_000_000
                    + u128::from(depth) + 1;
                prop_assert!(sum <= bound, "{sum} of {bound}");
                bucket.take(now, cost);
                naive.level -= i128::from(cost) * 1_000_000_000;
                sum += u128::from(cost);
            }
        }
    }

    #[test]
    fn a_change_of_rate_keeps_what_was_taken_and_no_debt_beyond_the_bucket() {
        let mut bucket = Bucket::new(100, 10);
        bucket.take(0, 60);
        assert_eq!(bucket.ready_at(), 500_000_001);
        bucket.become_like(Bucket::new(1000, 100), 0);
        assert_eq!(bucket.ready_at(), 0, "60 of 100 are taken");
        bucket.take(0, 40);
        assert_eq!(bucket.ready_at(), 1);
        bucket.become_like(Bucket::new(1, 1), 0);
        assert_eq!(bucket.ready_at(), 1, "no wait for a debt under another rate");
        bucket.become_like(Bucket::default(), 0);
        bucket.take(0, u64::MAX);
        assert_eq!(bucket.ready_at(), 0, "no limit");
    }
}
