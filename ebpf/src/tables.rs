//! What a decision looks up, and the classification of a new flow.

use crate::flow::{TCP, UDP};
use crate::ip::{Ip, V6};
use crate::layout::{
    Config, Elastic, Flow, FlowKey, Holder, Hop, Interface, Local, LocalKey, POLICY_NONE, Policy,
    ROW_NONE, ROW_WORDS_MAX, SEARCH_ROUNDS, SUMMARY, SUMMARY_BITS, Six, Span, Step, Step6,
};
use crate::port::{self, PortHolder, PortKey, Translation};

/// The maps, or what stands for them on the host. Nothing here writes: what a
/// packet changes is in its verdict.
pub trait Tables {
    fn config(&self) -> Config;
    fn interface(&self, ifindex: u32) -> Option<&Interface>;
    fn local(&self, key: &LocalKey) -> Option<Local>;
    fn elastic(&self, address: u32) -> Option<&Elastic>;
    fn policy(&self, slot: u32) -> Option<&Policy>;
    fn step(&self, index: u32) -> Option<Step>;
    /// A word of a row; 0 where there is none.
    fn word(&self, index: u32) -> u64;
    fn flow(&self, key: &FlowKey) -> Option<Flow>;
    fn half_flow(&self, key: &FlowKey) -> Option<Flow>;
    /// Tracked flows of the interface with this slot.
    fn flows_open(&self, slot: u32) -> u64;
    fn blocked(&self, address: u32) -> bool;
    /// Whether the address lies in an elastic range, exceptions aside.
    fn in_elastic_range(&self, address: u32) -> bool;

    /// What an interface has of IPv6, if anything.
    fn six(&self, ifindex: u32) -> Option<&Six>;
    fn holder(&self, address: &V6) -> Option<Holder>;
    fn step6(&self, index: u32) -> Option<Step6>;
    fn flow6(&self, key: &FlowKey<V6>) -> Option<Flow>;
    fn half_flow6(&self, key: &FlowKey<V6>) -> Option<Flow>;
    fn blocked6(&self, address: &V6) -> bool;
    fn in_range6(&self, address: &V6) -> bool;

    /// [`crate::fragment::Place::end`] of the place there.
    fn first_fragment(&self, index: u32, key: &crate::fragment::Key, now_s: u32) -> u32;

    /// What a connection is to the world, behind a NAT gateway.
    fn translation(&self, key: &FlowKey) -> Option<Translation>;
    fn port_holder(&self, key: &PortKey) -> Option<PortHolder>;
    /// Whose is a datagram in pieces, by its number in the port's place.
    fn piece_holder(&self, key: &PortKey) -> Option<PortHolder>;
    /// Connections through gateways of the interface with this slot.
    fn translations_open(&self, slot: u32) -> u64;

    /// [`port::free`], a global function in the programs as [`classify`] is.
    fn free_port(&self, key: &PortKey, ports: u32, start: u64) -> u16 {
        port::free(self, key, ports, start)
    }

    /// The table's longest prefix that contains the address.
    fn hop(&self, table: u32, address: u32) -> Hop;
    fn hop6(&self, table: u32, address: V6) -> Hop;

    /// [`classify`]. The programs make it a global function, which the verifier
    /// walks once, and not once for each way that leads to a call.
    fn classify(&self, slot: u32, question: &Question) -> u32 {
        classify(self, slot, question)
    }

    fn classify6(&self, slot: u32, question: &Question<V6>) -> u32 {
        classify(self, slot, question)
    }
}

/// What a rule sees of a new flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Question<A = u32> {
    pub remote: A,
    /// Of the remote interface, where the packet came by the private network; 0: none.
    pub identity: u64,
    pub protocol: u8,
    pub detail: u16,
}

/// No step, no rule.
const NONE: u32 = 0;

/// The first rule of the policy that permits the flow, counted from 1; 0: none does.
#[inline(always)]
pub fn classify<A: Ip, T: Tables + ?Sized>(tables: &T, slot: u32, q: &Question<A>) -> u32 {
    if slot == POLICY_NONE {
        return NONE;
    }
    let Some(policy) = tables.policy(slot) else {
        return NONE;
    };
    let (ports, key) = match q.protocol {
        TCP => (policy.tcp, u64::from(q.detail)),
        UDP => (policy.udp, u64::from(q.detail)),
        icmp if icmp == A::ICMP => (A::icmp_span(policy), u64::from(q.detail)),
        other => (policy.others, u64::from(other)),
    };
    let by_port = search(tables, ports, key, false);
    if by_port == ROW_NONE {
        return NONE;
    }
    let by_address = A::remote_row(tables, policy, q.remote);
    let by_identity = match q.identity {
        0 => ROW_NONE,
        identity => search(tables, policy.identities, identity, true),
    };
    let [remote, member, port] = [by_address, by_identity, by_port].map(|r| Row::at(tables, r));
    // Only words that both sides have can have a rule in common, so the port's row has them.
    let mut common = (remote.summary | member.summary) & port.summary & SUMMARY;
    for _ in 0..ROW_WORDS_MAX {
        if common == 0 {
            break;
        }
        let w = lowest_bit(common);
        let hit = (remote.word(tables, w) | member.word(tables, w))
            & tables.word(port.zeroth.wrapping_add(w));
        if hit != 0 {
            return w * 64 + lowest_bit(hit) + 1;
        }
        common &= common - 1;
    }
    NONE
}

/// A row of a policy.
#[derive(Clone, Copy)]
struct Row {
    summary: u64,
    /// Where its word 0 would be.
    zeroth: u32,
}

impl Row {
    #[inline(always)]
    fn at<T: Tables + ?Sized>(tables: &T, row: u32) -> Self {
        let summary = if row == ROW_NONE { 0 } else { tables.word(row) };
        Self { summary, zeroth: row.wrapping_add(1).wrapping_sub((summary >> SUMMARY_BITS) as u32) }
    }

    /// Word `w`: 0 where the summary has no such bit, for it may be another row's there.
    #[inline(always)]
    fn word<T: Tables + ?Sized>(self, tables: &T, w: u32) -> u64 {
        if self.summary >> w & 1 == 0 { 0 } else { tables.word(self.zeroth.wrapping_add(w)) }
    }
}

/// The row of the last step whose key is not above `key` (`exact`: is `key`).
#[inline(always)]
pub fn search<T: Tables + ?Sized>(tables: &T, span: Span, key: u64, exact: bool) -> u32 {
    let mut first = span.first;
    let mut len = span.len;
    let mut row = ROW_NONE;
    for _ in 0..SEARCH_ROUNDS {
        if len == 0 {
            break;
        }
        let half = len / 2;
        let Some(step) = tables.step(first.wrapping_add(half)) else {
            return ROW_NONE;
        };
        if step.key <= key {
            row = if exact && step.key != key { ROW_NONE } else { step.row };
            first = first.wrapping_add(half + 1);
            len -= half + 1;
        } else {
            len = half;
        }
    }
    row
}

/// The row of the last step whose address is not above `key`.
#[inline(always)]
pub fn search6<T: Tables + ?Sized>(tables: &T, span: Span, key: V6) -> u32 {
    let mut first = span.first;
    let mut len = span.len;
    let mut row = ROW_NONE;
    for _ in 0..SEARCH_ROUNDS {
        if len == 0 {
            break;
        }
        let half = len / 2;
        let Some(step) = tables.step6(first.wrapping_add(half)) else {
            return ROW_NONE;
        };
        let below =
            step.key.high < key.high || step.key.high == key.high && step.key.low <= key.low;
        if below {
            row = step.row;
            first = first.wrapping_add(half + 1);
            len -= half + 1;
        } else {
            len = half;
        }
    }
    row
}

/// Number of trailing zeros of a word that is not 0: the bits below the lowest
/// one, counted. Written out, for BPF has no instruction for it, and without a
/// branch, for each would double the verifier's work.
#[inline(always)]
fn lowest_bit(word: u64) -> u32 {
    let below = (word & word.wrapping_neg()).wrapping_sub(1);
    let pairs = below - (below >> 1 & 0x5555_5555_5555_5555);
    let nibbles = (pairs & 0x3333_3333_3333_3333) + (pairs >> 2 & 0x3333_3333_3333_3333);
    let bytes = (nibbles + (nibbles >> 4)) & 0x0f0f_0f0f_0f0f_0f0f;
    (bytes.wrapping_mul(0x0101_0101_0101_0101) >> 56) as u32
}

#[cfg(test)]
mod tests {
    use super::lowest_bit;

    #[test]
    fn the_lowest_bit_is_named() {
        for bit in 0..64 {
            assert_eq!(lowest_bit(1 << bit), bit);
            assert_eq!(lowest_bit(u64::MAX << bit), bit);
        }
    }
}
