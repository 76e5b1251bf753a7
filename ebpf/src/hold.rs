//! Later fragments that came before their first: `ebpf::held` says what becomes of them.

use core::mem::size_of;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{bpf_clone_redirect, bpf_ktime_get_coarse_ns, bpf_skb_load_bytes};
use aya_ebpf::macros::{classifier, map};
use aya_ebpf::maps::{Array, PerCpuArray, RingBuf};
use aya_ebpf::programs::TcContext;
use ebpf::HELD_MARK;
use ebpf::held::{HELD_BYTES, HELD_MAX, HeldHead};
use ebpf::layout::SLOTS_MAX;
use ebpf::rate::{SERVICE, ticks};

use crate::spend::draw;

const BPF_F_INGRESS: u64 = 1;

#[repr(C, align(8))]
pub struct Room {
    head: HeldHead,
    frame: [u8; HELD_MAX],
}

#[map]
static HELD_RING: RingBuf = RingBuf::with_byte_size(HELD_BYTES, 0);
/// When the bucket of what is held for the interface with this slot will be full. Not pinned.
#[map]
static HOLDS: Array<u64> = Array::with_max_entries(SLOTS_MAX, 0);
/// Where a frame is put together for the ring.
#[map]
static ROOM: PerCpuArray<Room> = PerCpuArray::with_max_entries(1, 0);

/// Gives the frame to the daemon, who lets it in again. 0: it is not held, for the
/// interface has had its share, it is too long, or nobody takes any out of the ring. A global
/// function, walked by the verifier once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn hold(ctx: *mut __sk_buff, slot: u32) -> i32 {
    let (Some(level), Some(room)) = (HOLDS.get_ptr_mut(slot), ROOM.get_ptr_mut(0)) else {
        return 0;
    };
    // SAFETY: the context is valid for the program's run, and the helper has no precondition.
    let (ifindex, length, now) =
        unsafe { ((*ctx).ifindex, (*ctx).len, ticks(bpf_ktime_get_coarse_ns())) };
    if length == 0 || length as usize > HELD_MAX {
        return 0;
    }
    if !draw(level, &SERVICE, now, 1) {
        return 0;
    }
    // SAFETY: the entry is this CPU's own, and has room for the head and the whole frame.
    let bytes = unsafe {
        (*room).head = HeldHead { ifindex, slot };
        let frame = (&raw mut (*room).frame).cast();
        if bpf_skb_load_bytes(ctx.cast(), 0, frame, length) != 0 {
            return 0;
        }
        let whole = size_of::<HeldHead>() + length as usize;
        core::slice::from_raw_parts(room.cast::<u8>(), whole)
    };
    HELD_RING.output::<[u8]>(bytes, 0).is_ok() as i32
}

/// Lets a frame in by the device that the context names, as if it came there now. Attached
/// nowhere: run by BPF_PROG_TEST_RUN, as `announce` is.
#[classifier]
pub fn reenter(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid for the program's run, and nothing is read of the frame
    // after the call.
    unsafe {
        (*ctx.skb.skb).mark = HELD_MARK;
        bpf_clone_redirect(ctx.skb.skb, (*ctx.skb.skb).ifindex, BPF_F_INGRESS) as i32
    }
}
