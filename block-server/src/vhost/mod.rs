//! The second front: vhost-user-blk, for a QEMU on this host whose guest's
//! memory is shared with us. Requests come from the guest's own rings and data
//! goes between its memory and the file, with no socket and no copy between.
//!
//! ```text
//!  socket (messages, descriptors) ─▶ protocol ─▶ deeds ┐
//!  guest memory ◀─ memory ─▶ queue ─▶ block ───────────┴▶ worker ⇄ volume::Core
//!                  (bounds)  (rings)  (virtio-blk)        (shell)
//! ```
//!
//! Written after the vhost-user document of QEMU (docs/interop/vhost-user.rst)
//! and virtio 1.2. What may never be true: an access outside the memory that the
//! peer gave us, whatever its rings say; a page read twice and trusted as the
//! same (the guest writes while we read); a peer that breaks its own device and
//! with it another's.

pub mod block;
pub mod inflight;
pub mod memory;
pub mod protocol;
pub mod queue;
pub mod wire;

#[cfg(test)]
mod tests;
