//! One interface's word on a packet: its flow, else its rules.

use crate::flow;
use crate::ip::Ip;
use crate::layout::{Flow, FlowKey, Interface, LOOSE_TCP};
use crate::packet::{Inner, Kind, Packet};
use crate::reason::Reason;
use crate::tables::{Question, Tables};
use crate::verdict::{FlowChange, FlowWrite};

/// What the interface is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// Of the remote end, where it is reached by the private network; else 0.
    pub identity: u64,
    pub now_s: u32,
    pub from_instance: bool,
    /// Its flow is tracked whatever the rules are, as behind a NAT gateway.
    pub tracked: bool,
}

/// A reason and a rule in one register (a kernel function returns no more).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
pub struct Judgement(u32);

impl Judgement {
    const ESTABLISHED: Self = Self(1 << 16);

    #[inline(always)]
    const fn opened(rule: u32) -> Self {
        Self(2 << 16 | rule & 0xffff)
    }

    /// As [`Self::opened`], of a flow that is not tracked. 0: the rule is of the other direction.
    #[inline(always)]
    const fn untracked(rule: u32) -> Self {
        Self(4 << 16 | rule & 0xffff)
    }

    #[inline(always)]
    const fn refused(reason: Reason) -> Self {
        Self(3 << 16 | reason as u32)
    }

    #[inline(always)]
    pub fn split(self) -> Result<(Reason, u16), Reason> {
        let detail = self.0 & 0xffff;
        match self.0 >> 16 {
            1 => Ok((Reason::Established, 0)),
            2 => Ok((Reason::NewFlow, detail as u16)),
            4 => Ok((Reason::Untracked, detail as u16)),
            _ => Err(refusal(detail)),
        }
    }
}

/// The reasons for which an interface refuses a packet.
#[inline(always)]
fn refusal(number: u32) -> Reason {
    const NO_FLOW: u32 = Reason::NoFlow as u32;
    const EGRESS: u32 = Reason::EgressDenied as u32;
    const INGRESS: u32 = Reason::IngressDenied as u32;
    match number {
        NO_FLOW => Reason::NoFlow,
        EGRESS => Reason::EgressDenied,
        INGRESS => Reason::IngressDenied,
        _ => Reason::FlowQuota,
    }
}

/// `change.key` names the flow; what is to be written goes into `change`.
///
/// A function of its own in the kernel too, for a packet between two guests of
/// this host asks both.
#[inline(never)]
pub fn judge<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    packet: &Packet<A>,
    ask: &Ask,
    change: &mut FlowChange<A>,
) -> Judgement {
    change.slot = interface.slot;
    change.write = FlowWrite::Nothing;
    let protocol = packet.protocol;
    let tracked = A::flow(tables, &change.key);
    if let Some(flow) = tracked {
        let alive = flow::alive(&flow, protocol, interface, ask.now_s);
        let reopens = flow::reopens(&flow, packet);
        if alive && reopens && flow.phase == flow::ESTABLISHED {
            return again(tables, interface, packet, ask, change);
        }
        if alive && !reopens {
            change.flow = flow::step(&flow, packet, ask.from_instance, ask.now_s);
            // Written once a second at most while nothing else changes.
            if change.flow != flow {
                change.write = FlowWrite::Tracked;
            }
            return Judgement::ESTABLISHED;
        }
    } else if let Some(known) = A::half_flow(tables, &change.key)
        && flow::alive(&known, protocol, interface, ask.now_s)
        && !flow::reopens(&known, packet)
    {
        let mut flow = known;
        if flow::outdated(&flow, interface) {
            flow = renewed(tables, interface, packet, ask, &change.key, flow);
        }
        if flow.phase != 0 {
            change.flow = flow::step(&flow, packet, ask.from_instance, ask.now_s);
            if change.flow.phase == flow::ESTABLISHED {
                if flow.flags & flow::UNTRACKED == 0 && has_room(tables, interface) {
                    change.write = FlowWrite::Confirm;
                    return Judgement::ESTABLISHED;
                }
                // It goes on in the half-open table for as long as it stays there.
                change.flow.phase = flow::ANSWERED;
            }
            if change.flow != known {
                change.write = FlowWrite::Half;
            }
            return Judgement::ESTABLISHED;
        }
    }
    let opens = packet.opens_flow() || interface.flags & LOOSE_TCP != 0 && packet.continues_tcp();
    let rule = if opens {
        permitted(tables, interface, packet, ask, ask.from_instance, &change.key)
    } else {
        0
    };
    if opens && rule == 0 {
        return Judgement::refused(denial(ask.from_instance));
    }
    let open = open(tables, interface, packet, ask, &change.key);
    change.write = if tracked.is_some() { FlowWrite::Reopen } else { FlowWrite::Half };
    if open != TRACKED {
        // Of one in its midst, whoever may have begun it.
        let by_instance = if opens { ask.from_instance } else { open == BY_INSTANCE };
        change.flow = flow::untracked(by_instance, interface, ask.now_s);
        return Judgement::untracked(rule);
    }
    if !opens || !has_room(tables, interface) {
        change.write = FlowWrite::Nothing;
        let reason = if opens { Reason::FlowQuota } else { Reason::NoFlow };
        return Judgement::refused(reason);
    }
    change.flow = flow::open(ask.from_instance, rule as u16, ask.now_s);
    Judgement::opened(rule)
}

/// An opening where a connection may have been reset, or not: `flow::again`.
#[inline(always)]
fn again<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    packet: &Packet<A>,
    ask: &Ask,
    change: &mut FlowChange<A>,
) -> Judgement {
    let rule = permitted(tables, interface, packet, ask, ask.from_instance, &change.key);
    if rule == 0 {
        return Judgement::refused(denial(ask.from_instance));
    }
    change.flow = flow::again(ask.from_instance, rule as u16, ask.now_s);
    change.write = FlowWrite::Tracked;
    Judgement::opened(rule)
}

#[inline(always)]
fn denial(from_instance: bool) -> Reason {
    if from_instance { Reason::EgressDenied } else { Reason::IngressDenied }
}

/// The rule that permits the flow from its initiator's side, counted from 1; 0: none.
#[inline(always)]
fn permitted<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    packet: &Packet<A>,
    ask: &Ask,
    by_instance: bool,
    key: &FlowKey<A>,
) -> u32 {
    let slot = if by_instance { interface.egress } else { interface.ingress };
    // A packet of the other direction has the other end's port.
    let detail = match by_instance == ask.from_instance {
        true => packet.detail,
        false if by_instance => key.remote_port,
        false => key.local_port,
    };
    let (identity, protocol) = (ask.identity, packet.protocol);
    A::classify(tables, slot, &Question { remote: key.remote, identity, protocol, detail })
}

const TRACKED: u32 = 0;
const BY_REMOTE: u32 = 1;
const BY_INSTANCE: u32 = 2;

/// Whether rules let everybody begin the flow and every answer to it pass, and from which
/// side. EC2 tracks no such flow of TCP or UDP.
#[inline(always)]
fn open<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    packet: &Packet<A>,
    ask: &Ask,
    key: &FlowKey<A>,
) -> u32 {
    let Interface { open_ingress, open_egress, .. } = *interface;
    let may_be = packet.kind == Kind::Udp || packet.is_sound_tcp();
    if open_ingress | open_egress == 0 || ask.tracked || !may_be {
        return TRACKED;
    }
    let (remote, protocol) = (key.remote, packet.protocol);
    let asked = |slot: u16, detail: u16| {
        let question = Question { remote, identity: 0, protocol, detail };
        slot != 0 && A::classify(tables, u32::from(slot) - 1, &question) != 0
    };
    if asked(open_ingress, key.local_port) {
        BY_REMOTE
    } else if asked(open_egress, key.remote_port) {
        BY_INSTANCE
    } else {
        TRACKED
    }
}

/// A flow that was not tracked, under other rules than those that let it in: of phase 0
/// where they let it in no more, and tracked where not everybody may begin it now.
#[inline(always)]
fn renewed<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    packet: &Packet<A>,
    ask: &Ask,
    key: &FlowKey<A>,
    mut flow: Flow,
) -> Flow {
    let by_instance = flow.flags & flow::BY_INSTANCE != 0;
    if open(tables, interface, packet, ask, key) != TRACKED {
        flow.rule = interface.epoch;
        return flow;
    }
    let rule = permitted(tables, interface, packet, ask, by_instance, key);
    if rule == 0 {
        flow.phase = 0;
    }
    flow.flags &= !flow::UNTRACKED;
    flow.rule = rule as u16;
    flow
}

#[inline(always)]
fn has_room<T: Tables + ?Sized>(tables: &T, interface: &Interface) -> bool {
    tables.flows_open(interface.slot) < u64::from(interface.flows_max)
}

/// The flow of a packet inside an ICMP error that the instance had sent.
#[inline(always)]
pub fn sent_by_instance<A: Ip>(interface: u64, inner: &Inner<A>) -> FlowKey<A> {
    FlowKey {
        interface,
        local: inner.source,
        remote: inner.destination,
        local_port: inner.source_port,
        remote_port: inner.destination_port,
        protocol: inner.protocol,
        zero: [0; 3],
    }
}

/// The flow of a packet inside an ICMP error that the instance had received.
#[inline(always)]
pub fn sent_by_remote<A: Ip>(interface: u64, inner: &Inner<A>) -> FlowKey<A> {
    FlowKey {
        interface,
        local: inner.destination,
        remote: inner.source,
        local_port: inner.destination_port,
        remote_port: inner.source_port,
        protocol: inner.protocol,
        zero: [0; 3],
    }
}

/// An ICMP error passes where the flow that it is about is known.
#[inline(always)]
pub fn related<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    key: &FlowKey<A>,
    now_s: u32,
) -> Result<(Reason, u16), Reason> {
    let flow = match A::flow(tables, key) {
        Some(flow) => Some(flow),
        None => A::half_flow(tables, key),
    };
    match flow {
        Some(flow)
            if flow::alive(&flow, key.protocol, interface, now_s)
                && !flow::outdated(&flow, interface) =>
        {
            Ok((Reason::Related, 0))
        }
        _ => Err(Reason::Unrelated),
    }
}
