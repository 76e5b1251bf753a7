//! A volume: what its promises are, kept apart from how its bytes move.
//!
//! [`Core`] takes requests, says which operations they need, hears how these
//! ended, and answers. `worker` drives it with an [`crate::engine`], the crash
//! test with a simulated disk.

mod core;
mod edges;
mod request;

pub use self::core::Core;
pub use self::request::{
    Geometry, Kind, Layout, Op, Outcome, Reply, Request, Ticket, Token, Trouble, ZEROS_MAX,
};
