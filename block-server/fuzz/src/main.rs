//! libFuzzer against the NBD session: handshake and transmission, any bytes, in
//! any pieces, with answers that come at once or late and out of order.
//!
//! The session knows nothing of the rest of the server, so its files are taken
//! as they are; so is the peer of the session's tests.

#![no_main]

#[allow(dead_code, reason = "the worker uses the rest")]
#[path = "../../src/nbd/mod.rs"]
mod nbd;
#[path = "../../tests/talk/mod.rs"]
mod talk;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| talk::hold(input));
