//! How often a key may ask, and that a signed change is done once.

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

#[derive(Debug)]
struct Bucket {
    tokens: f64,
    at_ms: u64,
}

#[derive(Debug)]
pub struct Guard {
    burst: f64,
    buckets: Mutex<HashMap<String, Bucket>>,
    seen: Mutex<HashMap<String, u64>>,
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

    /// A signature is good for one change. Reading twice harms nobody, and a
    /// client signs anew for each try.
    pub fn once(&self, digest: &str, ends_ms: u64, now_ms: u64) -> Result<(), ApiError> {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        if seen.len() >= REMEMBERED_MAX {
            seen.retain(|_, ends| *ends >= now_ms);
            if seen.len() >= REMEMBERED_MAX {
                return Err(ApiError::throttled());
            }
        }
        match seen.insert(digest.to_owned(), ends_ms) {
            Some(ends) if ends >= now_ms => Err(ApiError::unauthenticated(
                "AuthFailure",
                "This signed request was received before; sign it anew.",
            )),
            _ => Ok(()),
        }
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
    fn a_signature_serves_for_one_change() {
        let guard = Guard::new(1.0);
        assert!(guard.once("x", 100, 0).is_ok());
        assert_eq!(guard.once("x", 100, 50).unwrap_err().code, "AuthFailure");
        assert!(guard.once("y", 100, 50).is_ok());
    }
}
