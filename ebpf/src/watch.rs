//! Tells what is seen: `ebpf::event` says what of it, and how much.

use core::arch::asm;
use core::mem::MaybeUninit;

use aya_ebpf::bindings::{__sk_buff, xdp_md};
use aya_ebpf::helpers::{
    bpf_ktime_get_coarse_ns, bpf_ktime_get_ns, bpf_skb_load_bytes, bpf_xdp_get_buff_len,
    bpf_xdp_load_bytes,
};
use aya_ebpf::macros::map;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray, RingBuf};
use ebpf::Verdict;
use ebpf::event::{
    CAPTURED_MAX, EVENTS, EVENTS_BYTES, Event, HITS_MAX, HitKey, Pace, TALLY, Wanted,
};

use crate::maps::WORK;
use crate::tally::tally;

/// Memory only for what is there.
const NO_PREALLOC: u32 = 1;
/// linux/bpf.h: insert, but never replace.
const BPF_NOEXIST: u64 = 1;
const NS_A_SECOND: u64 = 1_000_000_000;

#[map]
static WANTED: Array<Wanted> = Array::with_max_entries(1, 0);
#[map]
static PACE: PerCpuArray<Pace> = PerCpuArray::with_max_entries(1, 0);
#[map]
static EVENT_RING: RingBuf = RingBuf::with_byte_size(EVENTS_BYTES, 0);
/// Pinned: what was counted outlives the daemon.
#[map]
static HITS: HashMap<HitKey, u64> = HashMap::with_max_entries(HITS_MAX, NO_PREALLOC);

/// Whether anything is to be told of a packet with this verdict. All that an
/// established flow pays while nothing is wanted is one word read.
#[inline(always)]
pub fn wanted(verdict: &Verdict) -> bool {
    let what = WANTED.get(0).map_or(0, |w| w.what);
    what & TALLY != 0 || verdict.reason.opens() || what != 0 && !verdict.reason.accepts()
}

/// Whether somebody keeps fragments that come before their first.
#[inline(always)]
pub fn kept() -> bool {
    WANTED.get(0).is_some_and(|w| w.holds != 0)
}

/// Whether packets and bytes of flows are counted.
#[inline(always)]
pub fn tallied() -> bool {
    WANTED.get(0).is_some_and(|w| w.what & TALLY != 0)
}

/// Tells of the packet in this CPU's work space. A global function, walked by the
/// verifier once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn watch(ctx: *mut __sk_buff) -> i32 {
    let Some(work) = WORK.get_ptr(0) else { return 0 };
    // SAFETY: the pointer was checked, and `carry_out` has a verdict there.
    let verdict = unsafe { &(*work).verdict };
    let [first, second] = verdict.slots;
    if verdict.reason.opens() {
        if verdict.egress_rule != 0 {
            hit(HitKey { slot: first, rule: verdict.egress_rule, direction: 1 });
        }
        if verdict.ingress_rule != 0 {
            let slot = if second != 0 { second } else { first };
            hit(HitKey { slot, rule: verdict.ingress_rule, direction: 2 });
        }
    }
    let Some(wanted) = WANTED.get(0) else { return 0 };
    let told = verdict.reason.opens() || !verdict.reason.accepts();
    if wanted.what & EVENTS != 0 && told {
        // SAFETY: as above. What goes through no gateway has 0 there.
        let translated = unsafe { (*work).nat.ports.new };
        tell(&Skb(ctx), verdict, translated, wanted.events_a_second_max);
    }
    if wanted.what & TALLY != 0 {
        count_flow(ctx, verdict);
    }
    0
}

/// Tells of a frame that was refused before there was a verdict, or by a guard.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tell_refused(ctx: *mut __sk_buff) -> i32 {
    tell_drop(&Skb(ctx))
}

/// Tells of a frame that was dropped before the kernel spent anything on it.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn tell_early(ctx: *mut xdp_md) -> i32 {
    tell_drop(&Xdp(ctx))
}

#[inline(always)]
fn tell_drop<C: Carrier>(carrier: &C) -> i32 {
    let (Some(work), Some(wanted)) = (WORK.get_ptr(0), WANTED.get(0)) else { return 0 };
    if wanted.what & EVENTS != 0 {
        // SAFETY: the pointer was checked, and a verdict stands there.
        tell(carrier, unsafe { &(*work).verdict }, 0, wanted.events_a_second_max);
    }
    0
}

/// What a frame is carried in.
trait Carrier {
    fn ifindex(&self) -> u32;
    fn length(&self) -> u32;

    /// All of `length` bytes or nothing.
    ///
    /// # Safety
    /// `to` must be writable for as many.
    unsafe fn load(&self, to: *mut u8, length: u32) -> bool;
}

struct Skb(*mut __sk_buff);

impl Carrier for Skb {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.0).ifindex }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.0).len }
    }

    #[inline(always)]
    unsafe fn load(&self, to: *mut u8, length: u32) -> bool {
        // SAFETY: the caller's promise.
        unsafe { bpf_skb_load_bytes(self.0.cast(), 0, to.cast(), length) == 0 }
    }
}

struct Xdp(*mut xdp_md);

impl Carrier for Xdp {
    #[inline(always)]
    fn ifindex(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.0).ingress_ifindex }
    }

    #[inline(always)]
    fn length(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        (unsafe { bpf_xdp_get_buff_len(self.0) }) as u32
    }

    #[inline(always)]
    unsafe fn load(&self, to: *mut u8, length: u32) -> bool {
        // SAFETY: the caller's promise.
        unsafe { bpf_xdp_load_bytes(self.0, 0, to.cast(), length) == 0 }
    }
}

#[inline(always)]
fn hit(key: HitKey) {
    let count = match HITS.get_ptr_mut(key) {
        Some(count) => count,
        None if HITS.insert(key, 1, BPF_NOEXIST).is_ok() => return,
        // Another CPU was first; or there is no place.
        None => match HITS.get_ptr_mut(key) {
            Some(count) => count,
            None => return,
        },
    };
    // SAFETY: the pointer was checked, and all add to it atomically.
    unsafe { asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) count, in(reg) 1_u64) }
}

#[inline(always)]
fn tell<C: Carrier>(carrier: &C, verdict: &Verdict, translated: u16, limit: u32) {
    let Some(pace) = PACE.get_ptr_mut(0) else { return };
    // SAFETY: the pointer was checked, and the entry is this CPU's own.
    let pace = unsafe { &mut *pace };
    let second = now_s();
    if pace.second != second {
        pace.second = second;
        pace.told = 0;
    }
    if pace.told >= limit {
        pace.left_out += 1;
        return;
    }
    let Some(mut entry) = EVENT_RING.reserve::<Event>(0) else {
        pace.left_out += 1;
        return;
    };
    pace.told += 1;
    let event: *mut Event = MaybeUninit::as_mut_ptr(&mut entry);
    // SAFETY: the entry has an event's size and alignment; every field is written
    // before it is submitted, and the context is valid for the program's run.
    unsafe {
        (*event).time_ns = bpf_ktime_get_ns();
        (*event).ifindex = carrier.ifindex();
        (*event).length = carrier.length();
        (*event).slots = verdict.slots;
        (*event).egress_rule = verdict.egress_rule;
        (*event).ingress_rule = verdict.ingress_rule;
        (*event).reason = verdict.reason as u8;
        (*event).translated = translated;
        (*event).captured = capture(carrier, &raw mut (*event).frame);
    }
    entry.submit(0);
}

/// The frame's beginning, and how much of it: the helper loads all or nothing.
///
/// # Safety
/// `frame` must be writable.
#[inline(always)]
unsafe fn capture<C: Carrier>(carrier: &C, frame: *mut [u8; CAPTURED_MAX]) -> u8 {
    for length in [CAPTURED_MAX as u32, 74, 54, 42, 34, 14] {
        // SAFETY: `length` is at most the frame's.
        if unsafe { carrier.load(frame.cast(), length) } {
            return length as u8;
        }
    }
    0
}

#[inline(always)]
fn count_flow(ctx: *mut __sk_buff, verdict: &Verdict) {
    if !tally(ctx, verdict, now_s())
        && let Some(pace) = PACE.get_ptr_mut(0)
    {
        // SAFETY: the pointer was checked, and the entry is this CPU's own.
        unsafe { (*pace).untallied += 1 }
    }
}

#[inline(always)]
fn now_s() -> u32 {
    // SAFETY: the helper has no precondition.
    (unsafe { bpf_ktime_get_coarse_ns() } / NS_A_SECOND) as u32
}
