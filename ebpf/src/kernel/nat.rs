//! What goes through a NAT gateway: programs of their own, which the others jump to.

use core::arch::asm;

use aya_ebpf::bindings::{__sk_buff, BPF_F_MARK_MANGLED_0, TC_ACT_SHOT};
use aya_ebpf::helpers::bpf_l4_csum_replace;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;
use ebpf::layout::TELL_FOUR;
use ebpf::nat::{ask_for_guest, end_lost, from_outside};
use ebpf::port::{PortKey, free};
use ebpf::verdict::{NatWork, NatWrite, PortChange};
use ebpf::{ASK_MARK, Action, Reason};

use super::carry::{TOLD, carry_out, count};
use super::go_on;
use super::skb::Skb;
use super::tables::Maps;
use super::work;
use crate::maps::{NAT_FLOWS, NAT_OPENED, NAT_PIECES, NAT_PORTS};

/// linux/bpf.h: insert, but never replace; replace, but never insert.
const BPF_NOEXIST: u64 = 1;
const BPF_EXIST: u64 = 2;

#[classifier]
pub fn nat_guest(ctx: TcContext) -> i32 {
    let code = match decide_for_guest(ctx.skb.skb) {
        DECIDED => carry_out_translated(ctx.skb.skb),
        code => code,
    };
    if code == TOLD { go_on(&ctx, TELL_FOUR) } else { code }
}

#[classifier]
pub fn nat_uplink(ctx: TcContext) -> i32 {
    let code = match decide_for_uplink(ctx.skb.skb) {
        DECIDED => carry_out_translated(ctx.skb.skb),
        code => code,
    };
    if code == TOLD { go_on(&ctx, TELL_FOUR) } else { code }
}

/// No code of tc's: the verdict stands in the work space.
const DECIDED: i32 = 256;

#[inline(never)]
fn decide_for_guest(ctx: *mut __sk_buff) -> i32 {
    let skb = Skb(ctx);
    let Some(work) = work() else { return TC_ACT_SHOT };
    ask_for_guest(&Maps::of(work.nat.half), &skb, &skb.arrival(), work);
    DECIDED
}

#[inline(never)]
fn decide_for_uplink(ctx: *mut __sk_buff) -> i32 {
    let skb = Skb(ctx);
    let Some(head) = skb.head() else { return TC_ACT_SHOT };
    let Some(work) = work() else { return TC_ACT_SHOT };
    from_outside(&Maps::of(work.nat.half), &skb, &head, &skb.arrival(), work);
    DECIDED
}

/// Ports are written before all else that the verdict says is done. Of what goes through no
/// gateway nothing stands in `ports`, so it is emptied again.
#[inline(never)]
fn carry_out_translated(ctx: *mut __sk_buff) -> i32 {
    let skb = &Skb(ctx);
    let Some(work) = work() else { return TC_ACT_SHOT };
    let asked = skb.mark() == ASK_MARK;
    end_lost(work);
    if work.verdict.action != Action::Drop && !asked && !written(&work.nat, work.verdict.slots[0]) {
        // Another CPU was faster, or there is no room.
        work.verdict.exceed(Reason::NatNoPort, work.verdict.counted);
        work.nat.ports = PortChange::NONE;
    }
    report(skb, &work.nat);
    let changed = change_port(skb, &work.nat.ports);
    let code = if changed { carry_out(ctx) } else { TC_ACT_SHOT };
    if !asked && work.nat.slot != 0 {
        count(work.nat.slot, work.verdict.reason);
    }
    work.nat.ports = PortChange::NONE;
    code
}

/// The port that was found, and the gateway, where whoever asks finds them.
#[inline(always)]
fn report(skb: &Skb, nat: &NatWork) {
    // SAFETY: the context is valid for the program's run, and `cb` may be written.
    unsafe {
        (*skb.0).cb[3] = nat.gateway;
        (*skb.0).cb[4] = nat.ports.new.into();
    }
}

/// Whether the connection has its port. `slot`: of the interface that opens it.
#[inline(always)]
fn written(nat: &NatWork, slot: u32) -> bool {
    match nat.write {
        NatWrite::Nothing => {}
        NatWrite::Open => {
            if NAT_PORTS.insert(&nat.port_key, &nat.holder, BPF_NOEXIST).is_err() {
                return false;
            }
            if NAT_FLOWS.insert(&nat.key, &nat.translation, 0).is_err() {
                let _ = NAT_PORTS.remove(&nat.port_key);
                return false;
            }
            opened(slot);
        }
        // Neither brings back what the sweep has taken.
        NatWrite::Out => {
            let _ = NAT_FLOWS.insert(&nat.key, &nat.translation, BPF_EXIST);
            let _ = NAT_PORTS.insert(&nat.port_key, &nat.holder, BPF_EXIST);
        }
        NatWrite::In => {
            let _ = NAT_PORTS.insert(&nat.port_key, &nat.holder, BPF_EXIST);
        }
    }
    if nat.piece != 0 {
        let key = PortKey { port: nat.piece as u16, peer_port: 0, ..nat.port_key };
        let _ = NAT_PIECES.insert(&key, &nat.holder, 0);
    }
    true
}

#[inline(always)]
fn opened(slot: u32) {
    if let Some(count) = NAT_OPENED.get_ptr_mut(slot) {
        // SAFETY: the pointer was checked, and no program writes there but by this addition.
        unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) count, in(reg) 1_u64) }
    }
}

/// The checksum first: its helper wants the bytes as they were.
#[inline(always)]
fn change_port(skb: &Skb, change: &PortChange) -> bool {
    if change.at == 0 {
        return true;
    }
    let flags = 2 | if change.udp { u64::from(BPF_F_MARK_MANGLED_0) } else { 0 };
    // SAFETY: the helper checks the frame's end itself.
    let corrected = unsafe {
        bpf_l4_csum_replace(
            skb.0.cast(),
            change.checksum_at,
            u64::from(change.old.to_be()),
            u64::from(change.new.to_be()),
            flags,
        )
    };
    corrected == 0 && skb.store(change.at, &change.new.to_be_bytes())
}

/// [`free`] as a global function of plain numbers: verified by itself. `ends`: both
/// addresses; `rest`: how many ports, the peer's port and the protocol.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn free_port(ends: u64, rest: u64, start: u64) -> u32 {
    let key = PortKey {
        public: (ends >> 32) as u32,
        peer: ends as u32,
        port: 0,
        peer_port: (rest >> 8) as u16,
        protocol: rest as u8,
        zero: [0; 3],
    };
    free(&Maps::of(0), &key, (rest >> 32) as u32, start).into()
}
