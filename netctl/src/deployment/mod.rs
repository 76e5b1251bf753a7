//! One Hostplane on this host: its four daemons, its uplink, its directories.
//!
//! ```text
//!   netctl up ──starts──▶ supervisor ──starts and restarts──▶ block-server
//!      │                     │  ▲                             dataplane
//!      │ waits for ready     │  │ exit, `ready`               control
//!      ▼                     ▼  │                             agent
//!   <run>/supervisor.json ◀──writes          each: <run>/pids/<daemon>.json
//! ```
//! Called by the commands `up`, `down`, `status`, `doctor`, `logs`, `version`.
//! What may never be true: that a process is signalled unless its pid, its
//! start time and its executable are those that were written down; that `down`
//! needs anything that a crash could have taken away.

pub mod config;
pub mod doctor;
pub mod down;
pub mod launch;
pub mod leftovers;
pub mod logs;
mod packets;
pub mod place;
pub mod preflight;
pub mod process;
pub mod replace;
pub mod report;
mod restart;
pub mod supervise;
pub mod up;
pub mod uplink;
pub mod version;
