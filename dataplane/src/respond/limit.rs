//! A token bucket: how many frames an interface may have answered for it.

use std::time::Duration;

/// Frames an interface may send to the link-local services each second; EC2
/// allows 1024 (EC2 user guide, "Link-local service limits").
pub const FRAMES_A_SECOND_MAX: u32 = 1024;

/// Frames that may come at once after a quiet time: one second's worth.
pub const FRAMES_AT_ONCE_MAX: u32 = FRAMES_A_SECOND_MAX;

/// Tokens are kept in millionths, so that a call every microsecond loses nothing.
const MILLIONTHS: u64 = 1_000_000;

#[derive(Debug, Clone)]
pub struct Bucket {
    tokens_millionths: u64,
    filled_at: Duration,
}

impl Bucket {
    pub fn full(now: Duration) -> Self {
        Self { tokens_millionths: u64::from(FRAMES_AT_ONCE_MAX) * MILLIONTHS, filled_at: now }
    }

    /// Whether one more frame may pass. A clock that stands still or goes back gives nothing.
    pub fn admit(&mut self, now: Duration) -> bool {
        let elapsed_us = now.saturating_sub(self.filled_at).as_micros();
        let gained = u64::try_from(elapsed_us)
            .unwrap_or(u64::MAX)
            .saturating_mul(u64::from(FRAMES_A_SECOND_MAX));
        self.filled_at = self.filled_at.max(now);
        self.tokens_millionths = self
            .tokens_millionths
            .saturating_add(gained)
            .min(u64::from(FRAMES_AT_ONCE_MAX) * MILLIONTHS);
        match self.tokens_millionths.checked_sub(MILLIONTHS) {
            Some(left) => {
                self.tokens_millionths = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_gets_one_burst_and_then_its_rate() {
        let mut bucket = Bucket::full(Duration::ZERO);
        let passed = (0..5000).filter(|_| bucket.admit(Duration::ZERO)).count();
        assert_eq!(passed, FRAMES_AT_ONCE_MAX as usize);
        let passed = (1..=2_000_000u64)
            .step_by(10)
            .filter(|&us| bucket.admit(Duration::from_micros(us)))
            .count();
        assert!((2047..=2048).contains(&passed), "{passed} in two seconds");
    }

    #[test]
    fn a_clock_that_goes_back_gives_nothing() {
        let mut bucket = Bucket::full(Duration::from_secs(5));
        while bucket.admit(Duration::from_secs(5)) {}
        assert!(!bucket.admit(Duration::from_secs(1)));
        assert!(!bucket.admit(Duration::from_secs(5)));
    }
}
