//! How often a key may ask, and for how long a signed change may be repeated.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use crate::api::ApiError;

/// Calls that a key may make at once, and a second in the long run. EC2 gives
/// 100 and 20 to most Describe calls; one's own host is near and has few users.
pub const BURST: f64 = 500.0;
pub const RATE_A_SECOND: f64 = 100.0;

/// Signed changes remembered. At the greatest rate a key makes 90 000 in the
/// fifteen minutes, and as many may be dated ahead.
const REMEMBERED_MAX: usize = 200_000;

/// Two equal calls of one second may be this far apart when they arrive.
const REPEATED_MS_MAX: u64 = 5000;

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at_ms: u64,
}

#[derive(Debug)]
pub struct Guard {
    burst: f64,
    buckets: Mutex<HashMap<String, Bucket>>,
    /// What was signed → when it was first seen, and when it can no longer be accepted.
    seen: Mutex<HashMap<String, (u64, u64)>>,
}

impl Guard {
    pub fn new(burst: f64) -> Self {
        Self { burst, buckets: Mutex::default(), seen: Mutex::default() }
    }

    /// Takes a token. Only keys that exist reach this, so the map stays small.
    pub fn admit(&self, key: &str, now_ms: u64) -> Result<(), ApiError> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        let bucket =
            buckets.entry(key.to_owned()).or_insert(Bucket { tokens: self.burst, at_ms: now_ms });
        let passed = now_ms.saturating_sub(bucket.at_ms) as f64 / 1000.0;
        bucket.tokens = (bucket.tokens + passed * RATE_A_SECOND).min(self.burst);
        bucket.at_ms = now_ms.max(bucket.at_ms);
        if bucket.tokens < 1.0 {
            return Err(ApiError::throttled());
        }
        bucket.tokens -= 1.0;
        Ok(())
    }

    /// A signature is good for changes only for a few seconds after it was first
    /// seen. Times in signatures are whole seconds and boto3 signs nothing that
    /// tells two equal calls of one second apart, so an equal one at once may be
    /// lawful; one that comes later was heard by somebody and is played again.
    pub fn fresh(&self, digest: &str, ends_ms: u64, now_ms: u64) -> Result<(), ApiError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= REMEMBERED_MAX {
            seen.retain(|_, (_, ends)| *ends >= now_ms);
            if seen.len() >= REMEMBERED_MAX {
                return Err(ApiError::throttled());
            }
        }
        let (first_ms, _) = *seen.entry(digest.to_owned()).or_insert((now_ms, ends_ms));
        if now_ms > first_ms + REPEATED_MS_MAX {
            return Err(ApiError::unauthenticated(
                "AuthFailure",
                "This signed request was received before; sign it anew.",
            ));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_that_asks_too_often_is_throttled_until_time_has_passed() {
        let guard = Guard::new(2.0);
        assert!(guard.admit("a", 0).is_ok() && guard.admit("a", 0).is_ok());
        assert_eq!(guard.admit("a", 0).unwrap_err().code, "RequestLimitExceeded");
        assert!(guard.admit("b", 0).is_ok());
        assert!(guard.admit("a", 10).is_ok());
    }

    #[test]
    fn a_signature_that_is_played_again_later_is_refused() {
        let guard = Guard::new(1.0);
        assert!(guard.fresh("x", 900_000, 1000).is_ok());
        assert!(guard.fresh("x", 900_000, 1900).is_ok());
        assert_eq!(guard.fresh("x", 900_000, 7000).unwrap_err().code, "AuthFailure");
        assert!(guard.fresh("y", 900_000, 7000).is_ok());
    }
}
