//! IPv6: programs of its own, which the others jump to and IPv4 packets never enter.

use aya_ebpf::bindings::{__sk_buff, TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::helpers::{bpf_redirect, bpf_skb_change_tail};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ebpf::icmp::Tell;
use ebpf::layout::TELL_SIX;
use ebpf::neighbour::{ANSWER_LEN, answer};
use ebpf::six::{from_instance6, from_punt6, from_world6};
use ebpf::verdict::Verdict;
use ebpf::{ASK_MARK, Action, Head6, Reason, TRACE_MARK, V6, VERDICT_MARK, Work};

use super::carry::{
    TOLD, account, deliver, enter, holds, leave_by, refuse, refuse_unpaid, report, spend_for,
};
use super::fragments::keep6;
use super::go_on;
use super::skb::Skb;
use super::tables::Maps;
use crate::maps::{HEAD6, WORK, WORK6};
use crate::watch;

const AF_INET6: u32 = 10;

/// This CPU's work space.
#[inline(always)]
pub fn work6() -> Option<&'static mut Work<V6>> {
    let work = WORK6.get_ptr_mut(0)?;
    // SAFETY: as for the other family's.
    Some(unsafe { &mut *work })
}

/// The frame's head, read into this CPU's place for one: the stack has not enough
/// room, and what lies in a map the verifier does not follow value by value.
#[inline(always)]
pub fn head6(skb: &Skb) -> Option<&'static Head6> {
    let place = HEAD6.get_ptr_mut(0)?;
    let head = skb.head6()?;
    // SAFETY: the pointer was checked, and the entry is this CPU's own.
    unsafe {
        place.write(head);
        Some(&*place)
    }
}

/// The decision and what follows from it stand side by side on the stack, not one
/// upon the other.
#[classifier]
pub fn tap_ingress_six(ctx: TcContext) -> i32 {
    let code = match decide_for_guest(ctx.skb.skb) {
        DECIDED => carry_out6(ctx.skb.skb),
        code => code,
    };
    if code == TOLD { go_on(&ctx, TELL_SIX) } else { code }
}

#[classifier]
pub fn uplink_ingress_six(ctx: TcContext) -> i32 {
    let code = match decide_for_uplink(ctx.skb.skb) {
        DECIDED => carry_out6(ctx.skb.skb),
        code => code,
    };
    if code == TOLD { go_on(&ctx, TELL_SIX) } else { code }
}

#[classifier]
pub fn punt_ingress_six(ctx: TcContext) -> i32 {
    match decide_for_responder(ctx.skb.skb) {
        DECIDED => carry_out6(ctx.skb.skb),
        code => code,
    }
}

/// No code of tc's: the verdict stands in the work space.
const DECIDED: i32 = 256;

#[inline(never)]
fn decide_for_guest(ctx: *mut __sk_buff) -> i32 {
    let skb = Skb(ctx);
    let Some(head) = head6(&skb) else { return refuse(&skb, Reason::Malformed) };
    let Some(work) = work6() else { return TC_ACT_SHOT };
    from_instance6(&Maps::now(), &skb, head, &skb.arrival(), work);
    DECIDED
}

#[inline(never)]
fn decide_for_uplink(ctx: *mut __sk_buff) -> i32 {
    let skb = Skb(ctx);
    let Some(head) = head6(&skb) else { return TC_ACT_UNSPEC };
    let Some(work) = work6() else { return TC_ACT_SHOT };
    from_world6(&Maps::now(), &skb, head, &skb.arrival(), work);
    DECIDED
}

#[inline(never)]
fn decide_for_responder(ctx: *mut __sk_buff) -> i32 {
    let skb = Skb(ctx);
    let Some(head) = head6(&skb) else { return refuse(&skb, Reason::PuntStray) };
    let Some(work) = work6() else { return TC_ACT_SHOT };
    from_punt6(&Maps::now(), head, work);
    DECIDED
}

/// Does what the verdict in this CPU's work space says.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn carry_out6(ctx: *mut __sk_buff) -> i32 {
    let skb = &Skb(ctx);
    let Some(head) = head6(skb) else { return TC_ACT_SHOT };
    let Some(work) = work6() else { return TC_ACT_SHOT };
    let mark = skb.mark();
    let asked = mark == ASK_MARK;
    if work.verdict.pays != 0 && !asked && work.verdict.action != Action::Drop {
        pay(skb, work);
    }
    if holds(skb, mark, &work.verdict) {
        return TC_ACT_SHOT;
    }
    let verdict = &work.verdict;
    if asked || mark == TRACE_MARK {
        report(skb, verdict);
    }
    if !asked {
        account(verdict);
        if verdict.keeps != 0 {
            keep6();
        }
        tell(ctx, verdict);
    }
    match verdict.action {
        Action::Drop if verdict.tell != Tell::Nothing && !asked => TOLD,
        Action::Drop | Action::AnswerArp | Action::Translate => TC_ACT_SHOT,
        Action::Pass => TC_ACT_UNSPEC,
        Action::AnswerNeighbour => answer_neighbour(skb, verdict),
        Action::Deliver | Action::Leave | Action::Enter => send_on(skb, head, verdict),
    }
}

/// The buckets look for the payer in the other family's work space.
#[inline(always)]
fn pay(skb: &Skb, work: &mut Work<V6>) {
    let (Some(payer), Some(head)) = (WORK.get_ptr_mut(0), skb.head()) else { return };
    // SAFETY: the pointer was checked, and the entry is this CPU's own.
    let payer = unsafe { &mut *payer };
    payer.verdict.pays = work.verdict.pays;
    payer.verdict.slots = work.verdict.slots;
    payer.packet.destination_port = work.packet.destination_port;
    refuse_unpaid(work, spend_for(skb, &head));
}

#[inline(always)]
fn send_on(skb: &Skb, head: &Head6, verdict: &Verdict<V6>) -> i32 {
    if !skb.set_head6(&verdict.rewrite.apply6(head)) {
        return TC_ACT_SHOT;
    }
    match verdict.action {
        Action::Deliver => deliver(skb, verdict.ifindex),
        Action::Enter => enter(skb, verdict.ifindex),
        _ => {
            let V6 { high, low } = verdict.next_hop;
            let hop = [(high >> 32) as u32, high as u32, (low >> 32) as u32, low as u32];
            leave_by(skb, verdict.ifindex, AF_INET6, hop.map(u32::to_be))
        }
    }
}

/// By the other family's work space: what is told of a packet is the same for both.
#[inline(always)]
fn tell(ctx: *mut __sk_buff, verdict: &Verdict<V6>) {
    let Some(work) = WORK.get_ptr_mut(0) else { return };
    // SAFETY: the pointer was checked, and the entry is this CPU's own.
    let told = unsafe { &mut (*work).verdict };
    told.action = verdict.action;
    told.reason = verdict.reason;
    told.egress_rule = verdict.egress_rule;
    told.ingress_rule = verdict.ingress_rule;
    told.slots = verdict.slots;
    if watch::wanted(told) {
        watch::watch(ctx);
    }
}

/// The question becomes the answer, which may be longer than it was.
#[inline(always)]
fn answer_neighbour(skb: &Skb, verdict: &Verdict<V6>) -> i32 {
    // SAFETY: the helper has no other precondition than a valid context.
    let fitted = unsafe { bpf_skb_change_tail(skb.0, ANSWER_LEN as u32, 0) };
    if fitted != 0 || !skb.store(0, &answer(&verdict.rewrite)) {
        return TC_ACT_SHOT;
    }
    skb.set_mark(VERDICT_MARK);
    // SAFETY: the context is valid for the program's run; the helper has no precondition.
    (unsafe { bpf_redirect((*skb.0).ifindex, 0) }) as i32
}
