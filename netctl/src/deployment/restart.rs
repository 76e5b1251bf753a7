//! When to start a daemon again that has ended: at once the first time, then
//! after longer and longer pauses, until it has lived long enough to be trusted.
//!
//! A core: it is told how long the daemon lived, and answers how long to wait.

use std::time::Duration;

/// A daemon that lived this long was well: its next end counts as the first.
pub const STEADY_AFTER: Duration = Duration::from_secs(10);

/// The second end in a row waits this long, and each further one twice as long.
const PAUSE_FIRST: Duration = Duration::from_millis(100);

/// No pause is longer: an operator who has mended the cause should not wait.
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// So many ends in a row without a steady life are called a crash loop.
const LOOPING_AFTER: u32 = 3;

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Restarts {
    ends_in_a_row: u32,
}

impl Restarts {
    /// How long to wait before the next start of a daemon that lived for `lived`.
    pub fn after_end(&mut self, lived: Duration) -> Duration {
        if lived >= STEADY_AFTER {
            self.ends_in_a_row = 0;
        }
        let pause = match self.ends_in_a_row {
            0 => Duration::ZERO,
            n => PAUSE_FIRST.saturating_mul(1 << (n - 1).min(16)).min(PAUSE_MAX),
        };
        self.ends_in_a_row = self.ends_in_a_row.saturating_add(1);
        pause
    }

    pub const fn is_looping(&self) -> bool {
        self.ends_in_a_row >= LOOPING_AFTER
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_end_is_answered_at_once_and_later_ones_with_growing_pauses() {
        let mut restarts = Restarts::default();
        let pauses: Vec<u128> =
            (0..9).map(|_| restarts.after_end(Duration::from_millis(1)).as_millis()).collect();
        assert_eq!(pauses, [0, 100, 200, 400, 800, 1600, 3200, 5000, 5000]);
        assert!(restarts.is_looping());
    }

    #[test]
    fn a_steady_life_forgives_what_was_before() {
        let mut restarts = Restarts::default();
        for _ in 0..5 {
            restarts.after_end(Duration::ZERO);
        }
        assert_eq!(restarts.after_end(STEADY_AFTER), Duration::ZERO);
        assert!(!restarts.is_looping());
    }

    #[test]
    fn no_number_of_ends_overflows_the_pause() {
        let mut restarts = Restarts { ends_in_a_row: u32::MAX };
        assert_eq!(restarts.after_end(Duration::ZERO), PAUSE_MAX);
        assert!(restarts.is_looping());
    }
}
