//! A flow's life, as seen from its instance.
//!
//! ```text
//!           answer          initiator again             FIN both ways, or the instance's RST
//!   New ─────────▶ Answered ──────────────▶ Established ───────────────▶ Closing
//!    └── half-open table ──┘                └────────── flow table ────────────┘
//! ```
//! A RST from the other end ends nothing (docs/adr/0083): whoever knows addresses and ports
//! can forge one, and the instance alone can tell by its numbers. The flow stays until
//! its time is over, and gives up its place before others do where places run short.
//! Only the initiator's packet *after* an answer moves a flow into the flow
//! table: a flood of openings from forged sources may well be answered by the
//! guest, but is never confirmed, so it fights for the half-open table alone.
//! An idle flow is as good as absent; the sweep only gives its memory back.

use crate::ip::Ip;
use crate::layout::{Flow, Interface};
use crate::packet::{Kind, Packet};

pub const NEW: u8 = 1;
pub const ANSWERED: u8 = 2;
pub const ESTABLISHED: u8 = 3;
pub const CLOSING: u8 = 4;

/// [`Flow::flags`]: the instance sent the first packet.
pub const BY_INSTANCE: u8 = 1;
/// [`Flow::flags`]: the instance has closed its direction.
pub const INSTANCE_CLOSED: u8 = 2;
/// [`Flow::flags`]: the other end has closed its direction.
pub const REMOTE_CLOSED: u8 = 4;

/// [`Flow::flags`]: rules let everybody in and every answer out, so that EC2 tracks nothing.
/// [`Flow::rule`] is the interface's [`Interface::epoch`] then: under other rules the flow is
/// judged anew.
pub const UNTRACKED: u8 = 8;

/// [`Flow::flags`]: the other end has sent a RST, or somebody in its name, and nothing since.
pub const REMOTE_RESET: u8 = 16;

/// A TCP opening waits this long for each step (Linux' `SYN_SENT`, six retries, is 120 s).
pub const TCP_OPENING_IDLE_S: u32 = 60;
/// A closed TCP flow is kept for last acknowledgements (Linux' `CLOSE` is 10 s).
pub const CLOSING_IDLE_S: u32 = 10;

pub const TCP: u8 = 6;
pub const UDP: u8 = 17;
pub const ICMP: u8 = 1;
pub const ICMPV6: u8 = 58;

/// Seconds of the coarse monotonic clock, by a multiplication: a division costs the
/// programs as much as a lookup. A millisecond behind, and 4 s a year.
#[inline(always)]
pub const fn seconds(ns: u64) -> u32 {
    // 2^20 ns are 1.048576 ms.
    const PER_TICK: u64 = ((1 << 20) << 32) / 1_000_000_000;
    ((ns >> 20).wrapping_mul(PER_TICK) >> 32) as u32
}

/// A flow's first packet.
#[inline(always)]
pub fn open(from_instance: bool, rule: u16, now_s: u32) -> Flow {
    let flags = if from_instance { BY_INSTANCE } else { 0 };
    Flow { seen_s: now_s, rule, phase: NEW, flags }
}

/// A flow that is not tracked, in its midst or at its first packet.
#[inline(always)]
pub fn untracked(by_instance: bool, interface: &Interface, now_s: u32) -> Flow {
    let flow = open(by_instance, interface.epoch, now_s);
    Flow { flags: flow.flags | UNTRACKED, ..flow }
}

/// Whether it was let in by rules that are no more.
#[inline(always)]
pub fn outdated(flow: &Flow, interface: &Interface) -> bool {
    flow.flags & UNTRACKED != 0 && flow.rule != interface.epoch
}

/// How long the flow may be silent.
#[inline(always)]
pub fn idle_s_max(flow: &Flow, protocol: u8, interface: &Interface) -> u32 {
    if flow.phase == CLOSING {
        return CLOSING_IDLE_S;
    }
    let confirmed = flow.phase == ESTABLISHED;
    match (protocol, confirmed) {
        (TCP, true) => interface.tcp_idle_s,
        (TCP, false) => TCP_OPENING_IDLE_S,
        (UDP, true) => interface.udp_stream_idle_s,
        (_, true) => interface.other_idle_s,
        (_, false) => interface.udp_idle_s,
    }
}

/// Whether the flow still counts. A clock that seems to run back (another CPU's
/// coarse clock) makes no flow old.
#[inline(always)]
pub fn alive(flow: &Flow, protocol: u8, interface: &Interface, now_s: u32) -> bool {
    now_s.saturating_sub(flow.seen_s) <= idle_s_max(flow, protocol, interface)
}

/// Whether `packet` begins a connection anew on the ports of one that has ended, or may have.
#[inline(always)]
pub fn reopens<A: Ip>(flow: &Flow, packet: &Packet<A>) -> bool {
    let ended = flow.phase == CLOSING || flow.flags & REMOTE_RESET != 0;
    ended && packet.kind == Kind::Tcp && packet.opens_flow()
}

/// A tracked flow of which nobody knows whether its RST was true, after an opening that
/// `rule` lets in: if RST and opening were forged, the old connection goes on in its place.
#[inline(always)]
pub fn again(from_instance: bool, rule: u16, now_s: u32) -> Flow {
    Flow { phase: ESTABLISHED, ..open(from_instance, rule, now_s) }
}

/// Whether the flow gives its place to others, where these have none.
#[inline(always)]
pub fn may_yield(flow: &Flow, now_s: u32) -> bool {
    flow.flags & REMOTE_RESET != 0 && now_s.saturating_sub(flow.seen_s) > CLOSING_IDLE_S
}

/// The flow after `packet`.
#[inline(always)]
pub fn step<A: Ip>(flow: &Flow, packet: &Packet<A>, from_instance: bool, now_s: u32) -> Flow {
    let mut next = *flow;
    next.seen_s = now_s;
    let by_initiator = from_instance == (flow.flags & BY_INSTANCE != 0);
    if flow.phase == NEW && !by_initiator {
        next.phase = ANSWERED;
    } else if flow.phase == ANSWERED && by_initiator && !packet.opens_tcp() {
        next.phase = ESTABLISHED;
    }
    if packet.kind == Kind::Tcp {
        if packet.is_fin() {
            next.flags |= if from_instance { INSTANCE_CLOSED } else { REMOTE_CLOSED };
        }
        let both = INSTANCE_CLOSED | REMOTE_CLOSED;
        let doubtful = packet.is_rst() && !from_instance && next.phase == ESTABLISHED;
        if packet.is_rst() && !doubtful || next.flags & both == both {
            next.phase = CLOSING;
        }
        if doubtful {
            next.flags |= REMOTE_RESET;
        } else if !from_instance && !packet.opens_tcp() {
            next.flags &= !REMOTE_RESET;
        }
    }
    next
}

#[cfg(test)]
mod tests {
    use super::seconds;

    #[test]
    fn seconds_are_a_millisecond_and_four_seconds_a_year_late_at_most() {
        const YEAR_S: u64 = 31_536_000;
        for s in [0, 1, 2, 59, 86_400, YEAR_S, 10 * YEAR_S] {
            let late_ns = 2_000_000 + s * 4_000_000_000 / YEAR_S * 2;
            assert!(u64::from(seconds(s * 1_000_000_000)) <= s);
            assert!(u64::from(seconds(s * 1_000_000_000 + late_ns)) >= s, "{s}");
        }
    }
}
