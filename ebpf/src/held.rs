//! Fragments that overtook the first of their datagram, which alone has the ports.
//!
//! ```text
//!   fragment, and no first ─▶ HELD_RING ─▶ the daemon: is the first there? ─┬─ not yet: wait
//!                                  (docs/adr/0086)   asked by BPF_PROG_TEST_RUN └─ yes, or too late:
//!   its device's program ◀── reenter, with HELD_MARK ◀─────────────────────────┘
//! ```
//! A frame with [`crate::HELD_MARK`] is not held again: it follows its first, or is dropped and
//! counted as one without.

use bytemuck::{Pod, Zeroable};

/// The longest frame that is held: a jumbo one.
pub const HELD_MAX: usize = 9216;
/// Bytes of frames that wait to be read.
pub const HELD_BYTES: u32 = 1 << 20;

/// `HELD_RING`: before each frame.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct HeldHead {
    /// Where it came in.
    pub ifindex: u32,
    /// Of the interface that it concerns.
    pub slot: u32,
}
const _: () = assert!(size_of::<HeldHead>() == 8);
