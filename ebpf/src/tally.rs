//! Counts packets and bytes of flows: of every IP packet that has a verdict, as it came in.

use core::arch::asm;

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::bpf_skb_load_bytes;
use aya_ebpf::macros::map;
use aya_ebpf::maps::HashMap;
use ebpf::Verdict;
use ebpf::event::{FOUR, SIX, TALLIES_MAX, Tally, TallyKey};
use ebpf::packet::{
    DESTINATION_OPTIONS, ETHERNET_LEN, EXTENSIONS_MAX, FRAGMENT, FRAGMENT_LEN, HEAD6_LEN,
    HOP_BY_HOP, IPV4, IPV6,
};

/// Memory only for what is there.
const NO_PREALLOC: u32 = 1;
/// linux/bpf.h: insert, but never replace.
const BPF_NOEXIST: u64 = 1;

#[map]
static TALLIES: HashMap<TallyKey, Tally> = HashMap::with_max_entries(TALLIES_MAX, NO_PREALLOC);

/// Adds the packet to its flow. `false`: there was no place for it.
#[inline(always)]
pub fn tally(ctx: *mut __sk_buff, verdict: &Verdict, now_s: u32) -> bool {
    // SAFETY: the context is valid for the program's run.
    let (ifindex, length) = unsafe { ((*ctx).ifindex, (*ctx).len) };
    let mut key = TallyKey {
        ifindex,
        slots: verdict.slots,
        source: [0; 16],
        destination: [0; 16],
        source_port: 0,
        destination_port: 0,
        protocol: 0,
        accepted: verdict.reason.accepts() as u8,
        family: 0,
        zero: 0,
    };
    let Some([high, low]) = load::<2>(ctx, ETHERNET_LEN - 2) else { return true };
    let known = match u16::from_be_bytes([high, low]) {
        IPV4 => four(ctx, &mut key),
        IPV6 => six(ctx, &mut key),
        _ => false,
    };
    if !known {
        return true;
    }
    // A superframe is one packet here; its length is the IP datagram's, as AWS counts.
    let bytes = u64::from(length.saturating_sub(ETHERNET_LEN));
    let Some(tally) = TALLIES.get_ptr_mut(key) else {
        let tally = Tally { packets: 1, bytes, first_s: now_s, last_s: now_s };
        return TALLIES.insert(key, tally, BPF_NOEXIST).is_ok();
    };
    // SAFETY: the pointer was checked; sums are added to atomically, and whoever
    // writes the time last is as right as any.
    unsafe {
        let packets = &raw mut (*tally).packets;
        asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) packets, in(reg) 1_u64);
        let sum = &raw mut (*tally).bytes;
        asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) sum, in(reg) bytes);
        (*tally).last_s = now_s;
    }
    true
}

/// Its ends, protocol and ports. `false`: it is no packet.
#[inline(always)]
fn four(ctx: *mut __sk_buff, key: &mut TallyKey) -> bool {
    key.family = FOUR;
    let ends = ends::<4>(ctx, ETHERNET_LEN + 12, key);
    // Flags, offset, TTL and protocol, and the header's own length.
    let Some([high, low, _, protocol]) = load::<4>(ctx, ETHERNET_LEN + 6) else { return false };
    let Some([first]) = load::<1>(ctx, ETHERNET_LEN) else { return false };
    key.protocol = protocol;
    let is_later = u16::from_be_bytes([high, low]) & 0x1fff != 0;
    if !is_later {
        ports(ctx, ETHERNET_LEN + u32::from(first & 0x0f) * 4, key);
    }
    ends
}

/// As above. What follows too many extension headers has the protocol of the last one seen.
#[inline(always)]
fn six(ctx: *mut __sk_buff, key: &mut TallyKey) -> bool {
    key.family = SIX;
    let ends = ends::<16>(ctx, ETHERNET_LEN + 8, key);
    let Some([next]) = load::<1>(ctx, ETHERNET_LEN + 6) else { return false };
    let mut protocol = next;
    let mut at = HEAD6_LEN as u32;
    let mut is_later = false;
    for _ in 0..EXTENSIONS_MAX {
        if !matches!(protocol, HOP_BY_HOP | DESTINATION_OPTIONS | FRAGMENT) || is_later {
            break;
        }
        let Some([next, length, high, low]) = load::<4>(ctx, at) else { break };
        if protocol == FRAGMENT {
            is_later = u16::from_be_bytes([high, low]) & 0xfff8 != 0;
            at += FRAGMENT_LEN;
        } else {
            at += (u32::from(length) + 1) * 8;
        }
        protocol = next;
    }
    key.protocol = protocol;
    if !is_later {
        ports(ctx, at, key);
    }
    ends
}

/// Both addresses, of `N` bytes each, one after the other. `false`: they are not there.
#[inline(always)]
fn ends<const N: u32>(ctx: *mut __sk_buff, at: u32, key: &mut TallyKey) -> bool {
    const { assert!(N <= 16) };
    let (from, to) = (&raw mut key.source, &raw mut key.destination);
    // SAFETY: there are sixteen bytes at each.
    unsafe { load_to(ctx, at, from.cast(), N) && load_to(ctx, at + N, to.cast(), N) }
}

/// Of TCP and UDP, whose header begins there.
#[inline(always)]
fn ports(ctx: *mut __sk_buff, at: u32, key: &mut TallyKey) {
    if !matches!(key.protocol, 6 | 17) {
        return;
    }
    if let Some([s0, s1, d0, d1]) = load::<4>(ctx, at) {
        key.source_port = u16::from_be_bytes([s0, s1]);
        key.destination_port = u16::from_be_bytes([d0, d1]);
    }
}

#[inline(always)]
fn load<const N: usize>(ctx: *mut __sk_buff, at: u32) -> Option<[u8; N]> {
    let mut bytes = [0_u8; N];
    // SAFETY: there are `N` bytes.
    if unsafe { load_to(ctx, at, bytes.as_mut_ptr(), N as u32) } { Some(bytes) } else { None }
}

/// All of them or nothing: the stack has no room for a copy of each.
///
/// # Safety
/// `to` must be writable for as many.
#[inline(always)]
unsafe fn load_to(ctx: *mut __sk_buff, at: u32, to: *mut u8, length: u32) -> bool {
    // SAFETY: the caller's promise.
    unsafe { bpf_skb_load_bytes(ctx.cast(), at, to.cast(), length) == 0 }
}
