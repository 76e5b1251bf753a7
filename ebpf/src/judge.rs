//! One interface's word on a packet: its flow, else its rules.

use crate::flow;
use crate::ip::Ip;
use crate::layout::{FlowKey, Interface, LOOSE_TCP};
use crate::packet::{Inner, Packet};
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
            _ => Err(refusal(detail)),
        }
    }
}

/// The reasons for which an interface refuses a packet.
#[inline(always)]
fn refusal(number: u32) -> Reason {
    const UNTRACKED: u32 = Reason::Untracked as u32;
    const EGRESS: u32 = Reason::EgressDenied as u32;
    const INGRESS: u32 = Reason::IngressDenied as u32;
    match number {
        UNTRACKED => Reason::Untracked,
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
        if flow::alive(&flow, protocol, interface, ask.now_s) && !flow::reopens(&flow, packet) {
            change.flow = flow::step(&flow, packet, ask.from_instance, ask.now_s);
            // Written once a second at most while nothing else changes.
            if change.flow != flow {
                change.write = FlowWrite::Tracked;
            }
            return Judgement::ESTABLISHED;
        }
    } else if let Some(flow) = A::half_flow(tables, &change.key)
        && flow::alive(&flow, protocol, interface, ask.now_s)
        && !flow::reopens(&flow, packet)
    {
        change.flow = flow::step(&flow, packet, ask.from_instance, ask.now_s);
        if change.flow.phase == flow::ESTABLISHED {
            if has_room(tables, interface) {
                change.write = FlowWrite::Confirm;
                return Judgement::ESTABLISHED;
            }
            // It goes on in the half-open table for as long as it stays there.
            change.flow.phase = flow::ANSWERED;
        }
        if change.flow != flow {
            change.write = FlowWrite::Half;
        }
        return Judgement::ESTABLISHED;
    }
    let rule = match admit(tables, interface, packet, ask, change.key.remote) {
        Ok(rule) => rule,
        Err(reason) => return Judgement::refused(reason),
    };
    change.flow = flow::open(ask.from_instance, rule as u16, ask.now_s);
    change.write = if tracked.is_some() { FlowWrite::Reopen } else { FlowWrite::Half };
    Judgement::opened(rule)
}

/// The rule that lets a new flow in, counted from 1.
#[inline(always)]
fn admit<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    packet: &Packet<A>,
    ask: &Ask,
    remote: A,
) -> Result<u32, Reason> {
    let picked_up = || interface.flags & LOOSE_TCP != 0 && packet.continues_tcp();
    if !packet.opens_flow() && !picked_up() {
        return Err(Reason::Untracked);
    }
    let (slot, denied) = match ask.from_instance {
        true => (interface.egress, Reason::EgressDenied),
        false => (interface.ingress, Reason::IngressDenied),
    };
    let question = Question {
        remote,
        identity: ask.identity,
        protocol: packet.protocol,
        detail: packet.detail,
    };
    match A::classify(tables, slot, &question) {
        0 => Err(denied),
        _ if !has_room(tables, interface) => Err(Reason::FlowQuota),
        rule => Ok(rule),
    }
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
        Some(flow) if flow::alive(&flow, key.protocol, interface, now_s) => {
            Ok((Reason::Related, 0))
        }
        _ => Err(Reason::Unrelated),
    }
}
