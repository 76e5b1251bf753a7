//! Who signed a request: AWS Signature Version 4 (HMAC) and 4A (ECDSA P-256).
//!
//! Called by the front with the raw request; pure, takes `now`. What may never
//! be true: an accepted request of which a byte that matters was not signed.

mod request;
mod sign;

pub use request::{Head, KeyMaterial, Signature, verify};
pub use sign::{derive_public_key, derive_signing_key, hex, hmac_hex, sha256_hex, sign_v4};
