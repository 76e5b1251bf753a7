//! What is asked of a server, and what came of it.

use std::fmt;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Deed {
    Read,
    Write,
}

/// Requests of one size at random places of the whole file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Load {
    pub deed: Deed,
    pub block_bytes: u32,
    /// Requests in flight on each connection.
    pub depth: u32,
    pub connections: u32,
}

/// What was done, and how long an operation took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Done {
    pub operations: u64,
    pub iops: f64,
    pub p50_us: f64,
    pub p99_us: f64,
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { deed, block_bytes, depth, connections } = self;
        let deed = match deed {
            Deed::Read => "read",
            Deed::Write => "write",
        };
        let (size, unit) = match block_bytes {
            b if b % (1 << 20) == 0 => (b >> 20, "MiB"),
            b => (b >> 10, "KiB"),
        };
        write!(f, "{size} {unit} random {deed}, ")?;
        if *connections > 1 {
            write!(f, "{connections} connections of ")?;
        }
        write!(f, "QD{depth}")
    }
}
