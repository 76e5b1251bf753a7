//! First fragments that went on are remembered: `ebpf::fragment` says how.

use ebpf::fragment::kept;
use ebpf::{Ip, Tables, Work};

use super::six::work6;
use super::skb::now_s;
use super::tables::Maps;
use super::work;
use crate::maps::FRAGMENTS;

/// Remembers the packet in this CPU's work space. Global functions, which the verifier
/// walks by themselves.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn keep4() -> i32 {
    let Some(work) = work() else { return 0 };
    keep(work)
}

/// [`keep4`] of the other family.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn keep6() -> i32 {
    let Some(work) = work6() else { return 0 };
    keep(work)
}

#[inline(always)]
fn keep<A: Ip>(work: &Work<A>) -> i32 {
    let (index, place) = kept(&work.packet, &work.verdict, Maps::now().config().seed, now_s());
    if let Some(at) = FRAGMENTS.get_ptr_mut(index) {
        // SAFETY: the pointer was checked; who reads while this is written knows it by the
        // mark.
        unsafe { at.write(place) };
    }
    0
}
