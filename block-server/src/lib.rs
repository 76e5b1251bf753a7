//! Serves volumes by NBD, and to guests of this host by vhost-user-blk. See `main`
//! for the two ways to start it.
//!
//! ```text
//!  socket ⇄ nbd::Session ⇄ worker ⇄ volume::Core ⇄ engine ⇄ file
//!           (protocol)     (shell)  (promises)     (io_uring or threads)
//!  rings ⇄ vhost::Queue ─────┘
//! ```

pub mod backing;
pub mod catalogue;
pub mod confine;
pub mod daemon;
pub mod depot;
pub mod engine;
pub mod exposition;
pub mod fill;
pub mod handover;
mod holding;
pub mod metrics;
pub mod nbd;
mod notify;
pub mod plan;
pub mod serve;
pub mod socket;
pub mod standalone;
mod starter;
pub mod throttle;
pub mod tls;
pub mod vhost;
pub mod volume;
pub mod worker;

/// The smallest unit of offsets and lengths that a client which asked for block
/// sizes must keep (docs/adr/0030): a disk's sector.
pub const BLOCK_MIN: u32 = 512;
