//! Programs: where a verdict is asked for and carried out.
//!
//! ```text
//!  programs (here, early, six) ─▶ ebpf::decide over tables ─▶ carry ─▶ flows, fragments
//!                     skb, span: the packet's bytes      spend, watch: beside
//!                                              tell: the sender of what was dropped
//!  announce: sends what the daemon has to say
//! ```

mod announce;
pub mod carry;
mod early;
mod flows;
mod fragments;
mod nat;
mod routes;
mod six;
pub mod skb;
mod span;
pub mod tables;
mod tell;

use aya_ebpf::bindings::{TC_ACT_SHOT, TC_ACT_UNSPEC};
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ebpf::decide::{from_instance, from_punt, from_world};
use ebpf::layout::{NAT_GUEST, NAT_UPLINK, SIX_GUEST, SIX_RESPONDER, SIX_UPLINK, TELL_FOUR};
use ebpf::packet::IPV6;
use ebpf::{Action, Reason, VERDICT_MARK, Work};

use self::carry::{TOLD, carry_out, refuse};
use self::skb::Skb;
use self::tables::Maps;
use crate::maps::{PROGRAMS, WORK};

/// This CPU's work space: the stack has not enough room.
#[inline(always)]
fn work() -> Option<&'static mut Work> {
    let work = WORK.get_ptr_mut(0)?;
    // SAFETY: the pointer was checked; whatever stands there is zeros or a `Work` that
    // another packet left; and no other program runs on this CPU before this one ends.
    Some(unsafe { &mut *work })
}

/// IPv6 has programs of its own, with a stack of their own, and so have ICMP errors.
/// Only a missing one lets this return.
#[inline(always)]
fn go_on(ctx: &TcContext, program: u32) -> i32 {
    // SAFETY: the programs there are classifiers as this one is.
    let _ = unsafe { PROGRAMS.tail_call(ctx, program) };
    TC_ACT_SHOT
}

/// From a guest.
#[classifier]
pub fn tap_ingress(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let Some(head) = skb.head() else { return refuse(&skb, Reason::Malformed) };
    if head.ether_type == IPV6 {
        return go_on(&ctx, SIX_GUEST);
    }
    let Some(work) = work() else { return TC_ACT_SHOT };
    let maps = Maps::now();
    from_instance(&maps, &skb, &head, &skb.arrival(), work);
    if work.verdict.action == Action::Translate {
        work.nat.half = maps.half();
        return go_on(&ctx, NAT_GUEST);
    }
    match carry_out(skb.0) {
        TOLD => go_on(&ctx, TELL_FOUR),
        code => code,
    }
}

/// From the world.
#[classifier]
pub fn uplink_ingress(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    // Shorter than any frame of ours.
    let Some(head) = skb.head() else { return TC_ACT_UNSPEC };
    if head.ether_type == IPV6 {
        return go_on(&ctx, SIX_UPLINK);
    }
    let Some(work) = work() else { return TC_ACT_SHOT };
    let maps = Maps::now();
    from_world(&maps, &skb, &head, &skb.arrival(), work);
    if work.verdict.action == Action::Translate {
        work.nat.half = maps.half();
        return go_on(&ctx, NAT_UPLINK);
    }
    match carry_out(skb.0) {
        TOLD => go_on(&ctx, TELL_FOUR),
        code => code,
    }
}

/// From our own responder.
#[classifier]
pub fn punt_ingress(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let Some(head) = skb.head() else { return refuse(&skb, Reason::PuntStray) };
    if head.ether_type == IPV6 {
        return go_on(&ctx, SIX_RESPONDER);
    }
    let Some(work) = work() else { return TC_ACT_SHOT };
    from_punt(&Maps::now(), &head, work);
    carry_out(skb.0)
}

/// Towards a guest or the responder: only with our verdict.
#[classifier]
pub fn tap_guard(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if skb.mark() == VERDICT_MARK {
        skb.set_mark(0);
        return TC_ACT_UNSPEC;
    }
    refuse(&skb, Reason::Unmarked)
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// SAFETY: a plain string in the section that the kernel reads the licence from.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
