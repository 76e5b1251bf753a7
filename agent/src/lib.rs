//! The agent: one a host. It brings the host to what control wants: volumes,
//! network, guests. It owns QEMU and the machine images; volumes and packets are
//! the block server's and the dataplane's, which it asks over their sockets.
//!
//! ```text
//!   control ──desired──▶ host (one owner, one queue) ──events──▶ lifecycle (pure)
//!           ◀─observed──   │   ▲                     ◀─effects──
//!                          v   │ results
//!              block-server, dataplane, qemu (shell)
//! ```
//! What may never be true: that a guest, a flow or a volume suffers because the
//! agent, control, or the way between them is gone.

#![deny(unsafe_code)]

pub mod host;
pub mod image;
pub mod lifecycle;
pub mod qemu;
pub mod scripted;
pub mod serve;
pub mod teardown;
