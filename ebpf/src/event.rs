//! What the programs tell of single packets: drops and new flows as events, hits
//! of rules, and (where it is asked for) packets and bytes of flows.
//!
//! Nothing here is told of an established flow, but for its tally where tallies
//! are on; and a flood tells [`Wanted::events_a_second_max`] events a second on
//! each CPU, and how many it left out.

use bytemuck::{Pod, Zeroable};

/// Bytes of a frame that an event carries: the headers of IPv6 and TCP.
pub const CAPTURED_MAX: usize = 96;
/// Events that wait to be read: some thousands.
pub const EVENTS_BYTES: u32 = 1 << 19;
/// Rules with a counter, each interface's own.
pub const HITS_MAX: u32 = 131_072;
/// Flows tallied between two readings.
pub const TALLIES_MAX: u32 = 65_536;

/// [`Wanted::what`]: an event for each drop and new flow.
pub const EVENTS: u32 = 1;
/// [`Wanted::what`]: a tally for each flow.
pub const TALLY: u32 = 2;

/// `WANTED`, one entry, written by the daemon.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Wanted {
    pub what: u32,
    pub events_a_second_max: u32,
    /// Not zero: somebody takes fragments out of [`crate::held`]'s ring.
    pub holds: u32,
}
const _: () = assert!(size_of::<Wanted>() == 12);

/// `PACE`, one a CPU: how many events this second has had.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Pace {
    pub second: u32,
    pub told: u32,
    /// Since the programs were loaded: events that nobody was told of.
    pub left_out: u64,
    /// Tallies that found no place.
    pub untallied: u64,
}
const _: () = assert!(size_of::<Pace>() == 24);

/// One packet that was dropped, or opened a flow.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Event {
    /// Of the monotonic clock.
    pub time_ns: u64,
    /// Where it came in.
    pub ifindex: u32,
    pub length: u32,
    /// Counter slots of whom it concerns, as the verdict has them.
    pub slots: [u32; 2],
    /// Counted from 1; 0: none was asked.
    pub egress_rule: u16,
    pub ingress_rule: u16,
    pub reason: u8,
    pub captured: u8,
    /// The port that a NAT gateway found for it; 0: none.
    pub translated: u16,
    pub frame: [u8; CAPTURED_MAX],
}
const _: () = assert!(size_of::<Event>() == 128);

/// `HITS`: a rule of an interface → the flows that it let in.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct HitKey {
    /// Of the interface.
    pub slot: u32,
    /// Counted from 1.
    pub rule: u16,
    /// 1: egress; 2: ingress.
    pub direction: u16,
}
const _: () = assert!(size_of::<HitKey>() == 8);

/// [`TallyKey::family`]: the addresses' first four bytes, and all of them.
pub const FOUR: u8 = 4;
pub const SIX: u8 = 6;

/// `TALLIES`: packets as they came in, one way.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct TallyKey {
    pub ifindex: u32,
    pub slots: [u32; 2],
    /// As they stand in the packet.
    pub source: [u8; 16],
    pub destination: [u8; 16],
    /// Host byte order.
    pub source_port: u16,
    pub destination_port: u16,
    pub protocol: u8,
    /// 1: it went on.
    pub accepted: u8,
    pub family: u8,
    pub zero: u8,
}
const _: () = assert!(size_of::<TallyKey>() == 52);

#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Tally {
    pub packets: u64,
    pub bytes: u64,
    /// Seconds of the coarse monotonic clock.
    pub first_s: u32,
    pub last_s: u32,
}
const _: () = assert!(size_of::<Tally>() == 24);
