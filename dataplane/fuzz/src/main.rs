//! libFuzzer against one interface's responder: any frames of its guest, one after
//! another, any answers of name servers, and time.
//!
//! The responders know nothing of the rest of the dataplane, so their files are
//! taken as they are.

#![no_main]

#[allow(dead_code, unused_imports, reason = "the daemon uses the rest")]
#[path = "../../src/respond/mod.rs"]
mod respond;

#[allow(dead_code, reason = "the test that makes seeds uses the rest")]
mod guest;
mod heap;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: &[u8]| guest::hold(input));
