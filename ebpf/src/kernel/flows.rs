//! What a verdict writes into the flow tables.

use core::arch::asm;

use ebpf::layout::{Flow, FlowKey};
use ebpf::verdict::{FlowChange, FlowWrite};
use ebpf::{Ip, V6};

use super::tables::{half_open, half_open6};
use crate::maps::{FLOWS, FLOWS6, QUOTAS};

/// linux/bpf.h: insert, but never replace.
const BPF_NOEXIST: u64 = 1;

/// A full table is no error: the flow then goes on as half-open, or is judged anew.
#[inline(always)]
pub fn write_flow<A: Stored>(change: &FlowChange<A>) {
    let FlowChange { write, slot, key, flow } = change;
    match write {
        FlowWrite::Nothing => {}
        FlowWrite::Tracked => {
            A::put(key, flow, 0);
        }
        FlowWrite::Half => A::put_half(key, flow),
        FlowWrite::Reopen => {
            if A::remove(key) {
                add(*slot, false);
            }
            A::put_half(key, flow);
        }
        FlowWrite::Confirm => {
            // Only one of two CPUs that confirm it at once counts it.
            if A::put(key, flow, BPF_NOEXIST) {
                add(*slot, true);
                A::remove_half(key);
            }
        }
    }
}

/// Where a family's flows stand.
pub trait Stored: Ip {
    fn put(key: &FlowKey<Self>, flow: &Flow, flags: u64) -> bool;
    fn remove(key: &FlowKey<Self>) -> bool;
    fn put_half(key: &FlowKey<Self>, flow: &Flow);
    fn remove_half(key: &FlowKey<Self>);
}

macro_rules! stored {
    ($family:ty, $flows:ident, $half_open:ident) => {
        impl Stored for $family {
            #[inline(always)]
            fn put(key: &FlowKey<Self>, flow: &Flow, flags: u64) -> bool {
                $flows.insert(key, flow, flags).is_ok()
            }

            #[inline(always)]
            fn remove(key: &FlowKey<Self>) -> bool {
                $flows.remove(key).is_ok()
            }

            #[inline(always)]
            fn put_half(key: &FlowKey<Self>, flow: &Flow) {
                if let Some((bucket, words)) = $half_open(key) {
                    bucket.put(&words, *flow);
                }
            }

            #[inline(always)]
            fn remove_half(key: &FlowKey<Self>) {
                if let Some((bucket, words)) = $half_open(key) {
                    bucket.remove(&words);
                }
            }
        }
    };
}

stored!(u32, FLOWS, half_open);
stored!(V6, FLOWS6, half_open6);

#[inline(always)]
fn add(slot: u32, opened: bool) {
    if let Some(quota) = QUOTAS.get_ptr_mut(slot) {
        // SAFETY: the pointer was checked, the fields are aligned, and no program
        // writes them but by this atomic addition. (`AtomicU64` has none on this
        // target, for it lacks compare-and-swap before version 3.)
        unsafe {
            let field = if opened { &raw mut (*quota).opened } else { &raw mut (*quota).closed };
            asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) field, in(reg) 1_u64);
        }
    }
}
