//! Questions about speed, each answered side by side with its peers in one run.
//!
//! | module | duty |
//! |---|---|
//! | [`block`] | 4 KiB over NBD: contenders, load, report |
//! | [`packet`] | nanoseconds a packet: namespaces, frames, contenders, report |
//! | [`storm`] | a flood, a guest's TCP, a daemon that is replaced: who loses what |
//! | [`statistic`], [`table`] | medians, spread, ratios; figures as text |
//! | [`machine`], [`process`] | what was measured on; programs in the background and their CPU time |
//!
//! `src/bin/` has a program for each question. A benchmark
//! prints medians, their spread and ratios; it never asserts a time, and a peer
//! that is not installed is a line that says so.

pub mod block;
pub mod machine;
pub mod packet;
pub mod process;
pub mod statistic;
pub mod storm;
pub mod table;
