//! Questions about speed, each answered side by side with its peers in one run.
//!
//! `src/bin/block.rs` and `src/bin/network.rs` ask one question each; what they
//! share stands here. A benchmark prints medians, their spread and ratios; it
//! never asserts a time, and a peer that is not installed is a line that says so.

pub mod machine;
pub mod process;
pub mod statistic;
pub mod table;
