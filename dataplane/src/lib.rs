//! Packets: compiles a desired state into tables, loads them beside the pinned
//! programs, and applies the difference.
//!
//! ```text
//! rpc::dataplane::Desired ──compile──▶ Tables ──diff──▶ [Change] ──load::Loaded──▶ kernel
//!        device facts ────────┘            ▲ loaded.tables()
//! ```

pub mod compile;
pub mod diff;
pub mod load;
