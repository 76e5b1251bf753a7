//! Packets: compiles a desired state into tables, loads them beside the pinned
//! programs, and applies the difference.
//!
//! ```text
//! rpc::dataplane::Desired ──compile──▶ Tables ──diff──▶ [Change] ──load::Loaded──▶ kernel
//!        device facts ────────┘            ▲ loaded.tables()
//! ```

pub mod alone;
pub mod apply;
pub mod cli;
pub mod compile;
pub mod confine;
pub mod device;
pub mod diff;
pub mod flow_log;
pub mod load;
pub mod lock;
pub mod observe;
pub mod pieces;
pub mod record;
pub mod respond;
pub mod serve;
