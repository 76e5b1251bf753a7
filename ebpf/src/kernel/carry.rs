//! What a verdict says is done: paid, told, counted, rewritten and sent on.

use core::mem::size_of;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh,
    bpf_redir_neigh__bindgen_ty_1,
};
use aya_ebpf::helpers::{bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer};
use ebpf::flow::{TCP, UDP};
use ebpf::icmp::Tell;
use ebpf::packet::{Frame, mac_bytes};
use ebpf::rate::on_the_wire;
use ebpf::{
    ASK_MARK, Action, HELD_MARK, Head, Ip, REASONS_MAX, Reason, TRACE_MARK, Tables, VERDICT_MARK,
    Verdict, Work,
};

use super::flows::{Stored, write_flow};
use super::fragments::keep4;
use super::skb::Skb;
use super::tables::Maps;
use super::work;
use crate::hold::hold;
use crate::maps::COUNTERS;
use crate::{spend, watch};

const AF_INET: u32 = 2;

/// No code of tc's: the packet is dropped, and its sender is to be told.
pub const TOLD: i32 = 257;

/// Does what the verdict in this CPU's work space says. A global function, which the
/// verifier walks by itself and not once for each way to a verdict.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn carry_out(ctx: *mut __sk_buff) -> i32 {
    let skb = &Skb(ctx);
    let Some(head) = skb.head() else { return TC_ACT_SHOT };
    let Some(work) = work() else { return TC_ACT_SHOT };
    let mark = skb.mark();
    let asked = mark == ASK_MARK;
    if work.verdict.pays != 0 && !asked && work.verdict.action != Action::Drop {
        pay(skb, &head, work);
    }
    if holds(skb, mark, &work.verdict) {
        return TC_ACT_SHOT;
    }
    let (head, verdict) = (&head, &work.verdict);
    if asked || mark == TRACE_MARK {
        report(skb, verdict);
    }
    if !asked {
        account(verdict);
        if verdict.keeps != 0 {
            keep4();
        }
        if watch::wanted(verdict) {
            watch::watch(ctx);
        }
    }
    match verdict.action {
        Action::Drop if verdict.tell != Tell::Nothing && !asked => TOLD,
        Action::Drop | Action::AnswerNeighbour | Action::Translate => TC_ACT_SHOT,
        Action::Pass => TC_ACT_UNSPEC,
        Action::AnswerArp => answer_arp(skb, mac_bytes(verdict.rewrite.source_mac)),
        Action::Deliver | Action::Leave | Action::Enter => {
            if !rewrite(skb, head, verdict) {
                return TC_ACT_SHOT;
            }
            match verdict.action {
                Action::Deliver => deliver(skb, verdict.ifindex),
                Action::Enter => enter(skb, verdict.ifindex),
                _ => leave(skb, verdict.ifindex, verdict.next_hop),
            }
        }
    }
}

/// Whether the frame is a fragment without its first, and waits for it with the daemon.
#[inline(always)]
pub fn holds<A: Ip>(skb: &Skb, mark: u32, verdict: &Verdict<A>) -> bool {
    if verdict.reason != Reason::FragmentLost || matches!(mark, ASK_MARK | TRACE_MARK | HELD_MARK) {
        return false;
    }
    let slot = verdict.slots[0];
    let held = watch::kept() && hold(skb.0, slot) != 0;
    if held {
        count(slot, Reason::FragmentHeld);
    }
    held
}

/// Has the buckets pay for what passes, or refuses it.
#[inline(always)]
fn pay(skb: &Skb, head: &Head, work: &mut Work) {
    refuse_unpaid(work, spend_for(skb, head));
}

/// What the buckets say of this frame.
#[inline(always)]
pub fn spend_for(skb: &Skb, head: &Head) -> u32 {
    // SAFETY: the context is valid for the program's run.
    let (len, gso_size) = unsafe { ((*skb.0).len, (*skb.0).gso_size) };
    let headers = match gso_size {
        0 => 0,
        _ => skb.headers(head),
    };
    let (packets, bytes) = on_the_wire(len, headers, gso_size);
    spend::spend(bytes, packets)
}

/// `answer` is [`spend::spend`]'s.
#[inline(always)]
pub fn refuse_unpaid<A: Ip>(work: &mut Work<A>, answer: u32) {
    let reason = match answer & 0xff {
        0 => return,
        1 => Reason::BandwidthOut,
        2 => Reason::BandwidthIn,
        3 => Reason::PacketRate,
        _ => Reason::ServiceRate,
    };
    work.verdict.exceed(reason, (answer >> 8) as u8);
}

#[inline(always)]
fn rewrite(skb: &Skb, head: &Head, verdict: &Verdict) -> bool {
    if let Some((old, new)) = verdict.rewrite.transport_delta(head)
        && !correct_transport(skb, head, old, new)
    {
        return false;
    }
    let inner = &verdict.inner;
    if inner.offset != 0 && !skb.store(inner.offset, &inner.bytes) {
        return false;
    }
    skb.set_head(&verdict.rewrite.apply(head))
}

/// Flows and counters.
#[inline(always)]
pub fn account<A: Stored>(verdict: &Verdict<A>) {
    write_flow(&verdict.sender);
    write_flow(&verdict.receiver);
    // What passes by the uplink is none of our business, and not worth a counter.
    if verdict.action == Action::Pass {
        return;
    }
    if verdict.counted & 1 != 0 {
        count(verdict.slots[0], verdict.reason);
    }
    if verdict.slots[1] != 0 && verdict.counted & 2 != 0 {
        count(verdict.slots[1], verdict.reason);
    }
}

/// Into the control block, where BPF_PROG_TEST_RUN finds it.
#[inline(always)]
pub fn report<A: Ip>(skb: &Skb, verdict: &Verdict<A>) {
    let [reason, egress, ingress] = verdict.report();
    // SAFETY: the context is valid for the program's run, and `cb` may be written.
    unsafe {
        (*skb.0).cb[0] = reason;
        (*skb.0).cb[1] = egress;
        (*skb.0).cb[2] = ingress;
    }
}

/// The transport's checksum covers the addresses. The helper does the right thing
/// for complete, partial and absent checksums alike.
#[inline(always)]
fn correct_transport(skb: &Skb, head: &Head, old: u32, new: u32) -> bool {
    // A later fragment has none.
    if head.second & 0x1fff != 0 {
        return true;
    }
    let transport = 14 + head.header_len();
    let (offset, flags) = match head.protocol() {
        TCP => (transport + 16, 0),
        UDP => (transport + 6, u64::from(BPF_F_MARK_MANGLED_0)),
        _ => return true,
    };
    let flags = flags | u64::from(BPF_F_PSEUDO_HDR) | 4;
    // SAFETY: the helper checks the frame's end itself.
    let result = unsafe {
        bpf_l4_csum_replace(
            skb.0.cast(),
            offset,
            u64::from(old.to_be()),
            u64::from(new.to_be()),
            flags,
        )
    };
    result == 0
}

#[inline(always)]
pub fn deliver(skb: &Skb, ifindex: u32) -> i32 {
    skb.set_mark(VERDICT_MARK);
    // SAFETY: the helper has no precondition.
    (unsafe { bpf_redirect(ifindex, 0) }) as i32
}

/// Past the device, its guard and the queue between the namespaces.
#[inline(always)]
pub fn enter(skb: &Skb, ifindex: u32) -> i32 {
    skb.set_mark(0);
    // SAFETY: the helper has no precondition.
    (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32
}

#[inline(always)]
fn leave(skb: &Skb, ifindex: u32, next_hop: u32) -> i32 {
    leave_by(skb, ifindex, AF_INET, [next_hop.to_be(), 0, 0, 0])
}

/// The kernel finds the hardware address of `next_hop`, a word of it for IPv4.
#[inline(always)]
pub fn leave_by(skb: &Skb, ifindex: u32, family: u32, next_hop: [u32; 4]) -> i32 {
    skb.set_mark(0);
    let mut hop = bpf_redir_neigh {
        nh_family: family,
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: next_hop },
    };
    // SAFETY: the helper reads the structure during the call.
    let result = unsafe {
        bpf_redirect_neigh(ifindex, &raw mut hop, size_of::<bpf_redir_neigh>() as i32, 0)
    };
    result as i32
}

/// The request becomes the answer: sender and target change places, `mac` is ours.
#[inline(always)]
fn answer_arp(skb: &Skb, mac: [u8; 6]) -> i32 {
    let Some(asked) = skb.load::<28>(14) else { return TC_ACT_SHOT };
    let [m0, m1, m2, m3, m4, m5] = mac;
    let a = &asked;
    let answer: [u8; 42] = [
        a[8], a[9], a[10], a[11], a[12], a[13], m0, m1, m2, m3, m4, m5, 0x08, 0x06, //
        0, 1, 8, 0, 6, 4, 0, 2, //
        m0, m1, m2, m3, m4, m5, a[24], a[25], a[26], a[27], //
        a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17],
    ];
    if !skb.store(0, &answer) {
        return TC_ACT_SHOT;
    }
    skb.set_mark(VERDICT_MARK);
    // SAFETY: the context is valid for the program's run; the helper has no precondition.
    (unsafe { bpf_redirect((*skb.0).ifindex, 0) }) as i32
}

#[inline(always)]
pub fn refuse(skb: &Skb, reason: Reason) -> i32 {
    // SAFETY: the context is valid for the program's run.
    let ifindex = unsafe { (*skb.0).ifindex };
    let slot = Maps::now().interface(ifindex).map_or(0, |i| i.slot);
    count(slot, reason);
    if let Some(work) = work() {
        work.begin();
        work.verdict.slots[0] = slot;
        work.verdict.refuse(reason);
        if watch::wanted(&work.verdict) {
            watch::tell_refused(skb.0);
        }
    }
    TC_ACT_SHOT
}

#[inline(always)]
pub fn count(slot: u32, reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(slot * REASONS_MAX + reason as u32) {
        // SAFETY: the counter is this CPU's own, and the pointer was checked.
        unsafe { *counter += 1 }
    }
}
