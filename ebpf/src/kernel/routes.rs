//! A look into the route tables. Global functions of plain numbers: the key has a place
//! on a stack of their own, and the verifier walks them once.

use aya_ebpf::maps::lpm_trie::Key;
use ebpf::layout::Hop;
use ebpf::route::{NO_HOP, key_bytes, key6_bytes};

use crate::maps::ROUTES;

/// A [`Hop`] as one word.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_hop(table: u32, address: u32) -> u64 {
    find(64, key_bytes(table, address))
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn find_hop6(table: u32, high: u64, low: u64) -> u64 {
    find(160, key6_bytes(table, high, low))
}

#[inline(always)]
fn find(length: u32, bytes: [u8; 20]) -> u64 {
    let hop: Hop = match ROUTES.get(Key::new(length, bytes)) {
        Some(hop) => *hop,
        None => NO_HOP,
    };
    bytemuck::cast(hop)
}
