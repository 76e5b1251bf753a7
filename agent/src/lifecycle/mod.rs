//! The life of one instance on this host: plain data in, effects out. No socket,
//! no clock, no process.
//!
//! ```text
//!             ┌───────── no QEMU found ──────────┐
//!   Unknown ──┤ Adopt                            v      disks exported, network there
//!      ^      └── QEMU found ──▶ Up ◀──────┐     Off ──────────────────────────▶ Starting
//!      │                         │        └──────────────── it answers ─────────────┤
//!      │    reboot wanted        │ ──▶ Rebooting ── off, or patience gone ──▶ Resetting ──▶ Up
//!      │    stop wanted          │ ──▶ PoweringDown ── off, or patience gone ──▶ Quitting
//!      │    guest went off       │ ───────────────────────────────────────────▶ Quitting
//!      │    Quitting ── patience gone ──▶ Killing
//!      │
//!      └── could not start ── Starting        any, process ended ──▶ CleaningUp ──▶ Off
//! ```
//! The owner (`host`) gives every event to [`Instance::step`] in one order and
//! performs the effects that come back, in their order. What may never be true:
//! a second `Start` while a QEMU may be alive; a disk operation on a volume that
//! neither is nor was attached; a state that EC2's own table forbids.
//!
//! An effect in flight is remembered as such; its result is an event. Results of
//! an earlier QEMU are told apart by the `epoch` and dropped.

mod disk;
mod event;
mod instance;
#[cfg(test)]
mod tests;

pub use disk::{Disk, DiskOp};
pub use event::{Effect, Event, GuestRun, MachineEvent, Seen, Sight, StartDisk};
pub use instance::{Instance, Machine, Record, slots};

use std::time::Duration;

/// How long a guest may take to power itself off when it is stopped; then it is
/// forced. Distributions need seconds, under emulation up to a minute.
pub const STOP_PATIENCE: Duration = Duration::from_secs(90);
/// The same before a reset.
pub const REBOOT_PATIENCE: Duration = Duration::from_secs(60);
/// The same when the instance is terminated: only volumes that outlive it profit.
pub const TERMINATE_PATIENCE: Duration = Duration::from_secs(15);
/// A guest that is still booting does not notice the button: press it again.
pub const PRESS_AGAIN: Duration = Duration::from_secs(3);
/// How long QEMU may take to end when told to quit, before it is killed.
pub const QUIT_PATIENCE: Duration = Duration::from_secs(10);
/// How long the kernel may take to end a killed process before it is told again.
pub const KILL_AGAIN: Duration = Duration::from_secs(5);
/// How long a started QEMU may take to answer.
pub const START_PATIENCE: Duration = Duration::from_secs(60);
/// A guest that did not release a disk is asked again.
pub const RELEASE_AGAIN: Duration = Duration::from_secs(5);
/// First and last pause between tries of what failed.
pub const RETRY_FIRST: Duration = Duration::from_millis(200);
pub const RETRY_LAST: Duration = Duration::from_secs(10);
/// Starts that fail, or guests that die, one after the other, before the
/// instance is left stopped for people to look at.
pub const FAILURES_MAX: u32 = 5;
/// A guest that ran so long has not failed to start.
pub const FAILURES_FORGOTTEN: Duration = Duration::from_secs(600);
/// An attached volume that cannot be exported holds up the start so many times
/// only; the root disk always does.
pub const EXPORT_TRIES_AWAITED: u32 = 5;

/// The pause before try number `tries` (from 1).
pub fn backoff(tries: u32) -> Duration {
    RETRY_FIRST.saturating_mul(1 << tries.saturating_sub(1).min(16)).min(RETRY_LAST)
}
