//! ICMP errors of our own, and a NAT gateway's RST: a dropped packet becomes the answer to
//! its sender.
//!
//! Programs of their own, which others jump to when they have dropped a packet and its
//! sender is to be told. The quote is copied out, the frame is cut and shifted so that
//! nothing is left of a superframe or of a checksum left to the hardware, and the
//! answer is written over it.

use core::arch::asm;
use core::ptr::null_mut;

use aya_ebpf::bindings::{BPF_F_RECOMPUTE_CSUM, TC_ACT_SHOT, bpf_adj_room_mode::BPF_ADJ_ROOM_MAC};
use aya_ebpf::helpers::{
    bpf_csum_diff, bpf_ktime_get_coarse_ns, bpf_redirect, bpf_skb_adjust_room, bpf_skb_change_tail,
    bpf_skb_load_bytes, bpf_skb_store_bytes,
};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ebpf::icmp::{
    CHUNK, CHUNKS, ERRORS as LIMIT, QUOTE_AT, QUOTE_MAX, QUOTE6_MAX, Room, Tell, headers, headers6,
    heard,
};
use ebpf::packet::Frame as _;
use ebpf::rate::ticks;
use ebpf::rewrite::fold;
use ebpf::{GATEWAY, Reason, TRACE_MARK, Tables, VERDICT_MARK, reset};

use super::carry::count;
use super::six::{head6, work6};
use super::skb::Skb;
use super::tables::Maps;
use super::work;
use crate::maps::{ANSWER, ERRORS};
use crate::spend::draw;

/// Bytes taken out behind the Ethernet header: more than lie before any checksum that a
/// sender may have left to the hardware.
const CUT: u32 = 256;
/// What must be there for it: the shorter frame still holds an IPv6 header.
const CUT_FROM: u32 = 14 + CUT + 64;

#[classifier]
pub fn tell_four(ctx: TcContext) -> i32 {
    let skb = &Skb(ctx.skb.skb);
    let Some(head) = skb.head() else { return TC_ACT_SHOT };
    let Some(work) = work() else { return TC_ACT_SHOT };
    let Some(room) = ANSWER.get_ptr_mut(0) else { return TC_ACT_SHOT };
    let back = Back::of(skb, head.destination_mac());
    let verdict = &work.verdict;
    if !heard(verdict, head.destination_mac()) || !back.may(skb, verdict.slots[0]) {
        return TC_ACT_SHOT;
    }
    if verdict.tell == Tell::Reset {
        let Some(number) = skb.load(work.packet.transport + 8) else { return TC_ACT_SHOT };
        let made = reset::frame(&head, &work.packet, back.mac, u32::from_be_bytes(number));
        return if become_frame(skb, room, &made, 0) { back.go(skb) } else { TC_ACT_SHOT };
    }
    let quoted = if work.packet.size > QUOTE_MAX { QUOTE_MAX } else { work.packet.size };
    let Some(sum) = quote(skb, room, quoted) else { return TC_ACT_SHOT };
    let made = headers(&head, verdict, back.mac, quoted, sum);
    if !become_frame(skb, room, &made, quoted) {
        return TC_ACT_SHOT;
    }
    count(verdict.slots[0], Reason::Told);
    back.go(skb)
}

#[classifier]
pub fn tell_six(ctx: TcContext) -> i32 {
    let skb = &Skb(ctx.skb.skb);
    let Some(head) = head6(skb) else { return TC_ACT_SHOT };
    let Some(work) = work6() else { return TC_ACT_SHOT };
    let Some(room) = ANSWER.get_ptr_mut(0) else { return TC_ACT_SHOT };
    let back = Back::of(skb, head.destination_mac());
    let verdict = &work.verdict;
    if !heard(verdict, head.destination_mac()) || !back.may(skb, verdict.slots[0]) {
        return TC_ACT_SHOT;
    }
    let quoted = if work.packet.size > QUOTE6_MAX { QUOTE6_MAX } else { work.packet.size };
    let Some(sum) = quote(skb, room, quoted) else { return TC_ACT_SHOT };
    let made = headers6(head, verdict, back.mac, quoted, sum);
    if !become_frame(skb, room, &made, quoted) {
        return TC_ACT_SHOT;
    }
    count(verdict.slots[0], Reason::Told);
    back.go(skb)
}

/// The way back.
struct Back {
    ifindex: u32,
    to_world: bool,
    mac: u64,
}

impl Back {
    #[inline(always)]
    fn of(skb: &Skb, destination_mac: u64) -> Self {
        // SAFETY: the context is valid for the program's run.
        let ifindex = unsafe { (*skb.0).ifindex };
        let to_world = ifindex == Maps::now().config().uplink;
        let mac = if to_world { destination_mac } else { GATEWAY };
        Self { ifindex, to_world, mac }
    }

    /// Whether the interface's bucket of errors has room. Who traces is always told.
    #[inline(always)]
    fn may(&self, skb: &Skb, slot: u32) -> bool {
        if skb.mark() == TRACE_MARK {
            return true;
        }
        let Some(level) = ERRORS.get_ptr_mut(slot * 2 + u32::from(self.to_world)) else {
            return false;
        };
        // SAFETY: the helper has no precondition.
        let now = ticks(unsafe { bpf_ktime_get_coarse_ns() });
        draw(level, &LIMIT, now, 1)
    }

    #[inline(always)]
    fn go(&self, skb: &Skb) -> i32 {
        skb.set_mark(if self.to_world { 0 } else { VERDICT_MARK });
        // SAFETY: the helper has no precondition.
        (unsafe { bpf_redirect(self.ifindex, 0) }) as i32
    }
}

/// Copies `len` bytes from the IP header on into the room, and sums them up.
#[inline(always)]
fn quote(skb: &Skb, room: *mut Room, len: u32) -> Option<u32> {
    let mut sum = 0;
    for n in 0..CHUNKS {
        let from = (n * CHUNK) as u32;
        if from >= len {
            break;
        }
        let left = opaque(len - from);
        let take = if left > CHUNK as u32 { CHUNK as u32 } else { left };
        if take == 0 {
            break;
        }
        // SAFETY: the room has a place for each chunk. What a short one leaves is zeros.
        let result = unsafe {
            let place = room.cast::<u8>().add(QUOTE_AT + n * CHUNK);
            place.cast::<[u64; CHUNK / 8]>().write([0; CHUNK / 8]);
            if bpf_skb_load_bytes(skb.0.cast(), 14 + from, place.cast(), take) != 0 {
                return None;
            }
            bpf_csum_diff(null_mut(), 0, place.cast(), CHUNK as u32, sum)
        };
        sum = result as u32;
    }
    // Summed as the machine has its words; either way the sum has the same bytes.
    Some(u32::from(u16::from_be(fold(sum) as u16)))
}

/// A number that the compiler knows nothing of: what the verifier is to see checked, it
/// would leave out.
#[inline(always)]
fn opaque(number: u32) -> u32 {
    let mut number = u64::from(number);
    // SAFETY: no instruction at all.
    unsafe { asm!("/* {0} */", inout(reg) number, options(pure, nomem, nostack)) };
    number as u32
}

/// Replaces the frame by the headers and `quoted` bytes of the room.
#[inline(always)]
fn become_frame<const N: usize>(
    skb: &Skb,
    room: *mut Room,
    headers: &[u8; N],
    quoted: u32,
) -> bool {
    let len = opaque(N as u32 + quoted);
    if len == 0 || len as usize > N + CHUNKS * CHUNK {
        return false;
    }
    // SAFETY: the entry is this CPU's own, the headers end where the quote begins; and the
    // context is valid for the program's run.
    unsafe {
        let begin = room.cast::<u8>().add(QUOTE_AT - N);
        begin.cast::<[u8; N]>().write(*headers);
        bpf_skb_change_tail(skb.0, CUT_FROM, 0) == 0
            && bpf_skb_adjust_room(skb.0, -(CUT as i32), BPF_ADJ_ROOM_MAC, 0) == 0
            && bpf_skb_change_tail(skb.0, len, 0) == 0
            && bpf_skb_store_bytes(skb.0.cast(), 0, begin.cast(), len, BPF_F_RECOMPUTE_CSUM.into())
                == 0
    }
}
