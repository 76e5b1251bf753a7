//! What is to happen to a packet, and to its flows.
//!
//! A verdict is filled in place: the programs have 512 bytes of stack, so theirs
//! lies in a per-CPU map. All zeros is a lawful one.

use bytemuck::Zeroable;

use crate::decide::Route;
use crate::icmp::Tell;
use crate::ip::Ip;
use crate::layout::{Flow, FlowKey, Interface, LIMITED};
use crate::packet::{Inner, Packet, Part};
use crate::port::{PortHolder, PortKey, Translation};
use crate::reason::Reason;
use crate::rewrite::Rewrite;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Action {
    Drop = 0,
    /// Leave it to the host's own stack.
    Pass = 1,
    /// Turn the ARP request into its answer, in place, with `rewrite.source_mac` as
    /// the address asked for, and send it back.
    AnswerArp = 2,
    /// Rewrite, and hand to the guest's or the punt device `ifindex` with our mark.
    Deliver = 3,
    /// Rewrite, and send out by `ifindex`; the kernel finds the hardware address of `next_hop`.
    Leave = 4,
    /// Rewrite, and put into the namespace at the other end of the veth `ifindex`.
    Enter = 5,
    /// Turn the neighbour solicitation into its answer, and send it back:
    /// [`crate::neighbour::answer`] of `rewrite`.
    AnswerNeighbour = 6,
    /// Not decided here: [`crate::nat`] goes on, in a program of its own.
    Translate = 7,
}

/// New addresses for the packet inside an ICMP error. The inner header's checksum
/// is corrected with them, so the sum over the ICMP message stays what it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InnerRewrite {
    /// Where the inner IPv4 header's checksum, source and destination begin; 0: nothing to do.
    pub offset: u32,
    /// All three, as they are to stand there.
    pub bytes: [u8; 10],
}

/// A write to the flow tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum FlowWrite {
    Nothing = 0,
    /// Into the half-open table.
    Half = 1,
    /// Out of the flow table, where an ended one stands, and into the half-open table.
    Reopen = 2,
    /// Into the flow table, where it is already.
    Tracked = 3,
    /// Out of the half-open table into the flow table.
    Confirm = 4,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowChange<A = u32> {
    pub key: FlowKey<A>,
    pub flow: Flow,
    /// Counter slot of the interface that pays for the flow.
    pub slot: u32,
    pub write: FlowWrite,
}

/// [`Verdict::pays`]: the first slot's interface, which sends.
pub const PAYS_OUT: u8 = 1;
/// The first slot's interface, which receives from the world.
pub const PAYS_IN: u8 = 2;
/// The second slot's interface, which receives from another of this host.
pub const PAYS_IN_SECOND: u8 = 4;
/// The first slot's interface, for a service of the host.
pub const PAYS_SERVICE: u8 = 8;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict<A = u32> {
    pub action: Action,
    pub reason: Reason,
    /// The rules that opened the flow, counted from 1; 0: none was asked.
    pub egress_rule: u16,
    pub ingress_rule: u16,
    /// The slots whose counters move; 0 as the first is the uplink's, as the
    /// second it is none.
    pub slots: [u32; 2],
    /// Whose buckets pay for the packet: [`PAYS_OUT`] and the like.
    pub pays: u8,
    /// Which of the slots are counted: bit 0 the first, bit 1 the second.
    pub counted: u8,
    /// Set by the early program alone: whether the receiver takes frames from it.
    pub fast: bool,
    /// What the sender of a dropped packet is told, by whom, and of which MTU.
    pub tell: Tell,
    pub told_mtu: u16,
    pub teller: A,
    /// Of the interface that remembers this first fragment; 0: there is nothing to remember.
    pub keeps: u64,
    pub ifindex: u32,
    pub next_hop: A,
    pub rewrite: Rewrite<A>,
    pub inner: InnerRewrite,
    /// The sender's side and the receiver's.
    pub sender: FlowChange<A>,
    pub receiver: FlowChange<A>,
}

/// Another port in a transport header, or in the packet inside an ICMP error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PortChange {
    /// Where it stands in the frame; 0: nothing to do.
    pub at: u32,
    /// Where the checksum that covers it stands.
    pub checksum_at: u32,
    pub old: u16,
    pub new: u16,
    /// Of UDP: a checksum of 0 is none.
    pub udp: bool,
}

impl PortChange {
    pub const NONE: Self = Self { at: 0, checksum_at: 0, old: 0, new: 0, udp: false };
}

/// A write to the ports of a NAT gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum NatWrite {
    Nothing = 0,
    /// A new connection, which gets the port unless another was faster.
    Open = 1,
    /// A packet outward: both maps.
    Out = 2,
    /// A packet inward: `NAT_PORTS` alone.
    In = 3,
}

/// [`NatWork::piece`]: there is one.
pub const PIECE: u32 = 1 << 16;

/// What a NAT gateway does with a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NatWork {
    /// Its public address.
    pub gateway: u32,
    /// The half of the tables by which it was routed.
    pub half: u32,
    /// Its block of counters.
    pub slot: u32,
    pub write: NatWrite,
    /// The connection, as its instance sees it and as the world does.
    pub key: FlowKey,
    pub translation: Translation,
    pub port_key: PortKey,
    pub holder: PortHolder,
    /// Of the first piece of a datagram inward: its number and [`PIECE`], to be remembered with
    /// the holder. 0: there is none.
    pub piece: u32,
    /// Of a TCP connection that has no port any more.
    pub lost: bool,
    pub ports: PortChange,
}

/// A packet's verdict, and what was read on the way to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work<A = u32> {
    pub packet: Packet<A>,
    pub inner: Inner<A>,
    pub route: Route<A>,
    pub verdict: Verdict<A>,
    /// Only what goes through a NAT gateway looks here.
    pub nat: NatWork,
}

// SAFETY: plain integers, and enums with a variant for 0.
unsafe impl<A: Ip> Zeroable for Work<A> {}

impl<A: Ip> Work<A> {
    /// Forgets the packet before.
    #[inline(always)]
    pub fn begin(&mut self) {
        let verdict = &mut self.verdict;
        verdict.action = Action::Drop;
        verdict.reason = Reason::Undecided;
        verdict.egress_rule = 0;
        verdict.ingress_rule = 0;
        verdict.slots = [0, 0];
        verdict.pays = 0;
        verdict.counted = 3;
        verdict.tell = Tell::Nothing;
        verdict.keeps = 0;
        verdict.inner.offset = 0;
        verdict.sender.write = FlowWrite::Nothing;
        verdict.receiver.write = FlowWrite::Nothing;
    }
}

impl<A: Ip> Verdict<A> {
    #[inline(always)]
    pub fn refuse(&mut self, reason: Reason) {
        self.action = Action::Drop;
        self.reason = reason;
    }

    #[inline(always)]
    pub fn accept(&mut self, action: Action, reason: Reason) {
        self.action = action;
        self.reason = reason;
    }

    /// Notes who remembers a first fragment.
    #[inline(always)]
    pub fn keep(&mut self, packet: &Packet<A>, interface: u64) {
        if packet.part == Part::First {
            self.keeps = interface;
        }
    }

    /// Notes whether the interface pays for what passes.
    #[inline(always)]
    pub fn bill(&mut self, interface: &Interface, how: u8) {
        if interface.flags & LIMITED != 0 {
            self.pays |= how;
        }
    }

    /// A bucket has no room: whose, and which. What does not pass opens nothing.
    #[inline(always)]
    pub fn exceed(&mut self, reason: Reason, counted: u8) {
        self.refuse(reason);
        self.counted = counted;
        self.keeps = 0;
        self.sender.write = FlowWrite::Nothing;
        self.receiver.write = FlowWrite::Nothing;
    }

    /// As it stands in the control block: reason, egress rule, ingress rule.
    #[inline(always)]
    pub fn report(&self) -> [u32; 3] {
        [self.reason as u32, u32::from(self.egress_rule), u32::from(self.ingress_rule)]
    }
}
