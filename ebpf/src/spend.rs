//! Has an interface's buckets pay for a packet: `ebpf::rate` says how.

use core::arch::asm;

use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use ebpf::rate::{
    IN, Levels, Limit, OUT, PACKETS, RESOLVER, Rates, SERVICE, SERVICES, Spend, ask, source_places,
    ticks,
};
use ebpf::verdict::{PAYS_IN, PAYS_IN_SECOND, PAYS_OUT, PAYS_SERVICE};

use crate::maps::{LEVELS, RATES, SOURCES, WORK};

const PASSES: u32 = 0;
const BANDWIDTH_OUT: u32 = 1;
const BANDWIDTH_IN: u32 = 2;
const PACKET_RATE: u32 = 3;
const SERVICE_RATE: u32 = 4;
/// [`ebpf::Verdict::counted`], a byte further up.
const FIRST: u32 = 1 << 8;
const SECOND: u32 = 2 << 8;

/// DNS, wherever its server is.
const DNS_PORT: u16 = 53;

/// 0, or what has no room for the packet in this CPU's work space: the reason in
/// the low byte, whose it is above. A global function, walked by the verifier once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn spend(bytes: u32, packets: u32) -> u32 {
    let Some(work) = WORK.get_ptr(0) else { return PASSES };
    // SAFETY: the pointer was checked, and a verdict stands there.
    let (pays, [first, second], port) = unsafe {
        let verdict = &(*work).verdict;
        (verdict.pays, verdict.slots, (*work).packet.destination_port)
    };
    // SAFETY: the helper has no precondition.
    let now = ticks(unsafe { bpf_ktime_get_coarse_ns() });
    if pays & PAYS_SERVICE != 0 {
        let place = if port == DNS_PORT { RESOLVER } else { SERVICES };
        return service(first, place, packets, now);
    }
    let asked = Asked { bytes, packets, now };
    if pays & PAYS_OUT != 0 {
        match asked.of::<OUT>(first) {
            PASSES => {}
            refused => return refused | FIRST,
        }
    }
    if pays & PAYS_IN != 0 {
        match asked.of::<IN>(first) {
            PASSES => {}
            refused => return refused | FIRST,
        }
    }
    if pays & PAYS_IN_SECOND != 0 {
        match asked.of::<IN>(second) {
            PASSES => {}
            refused => return refused | SECOND,
        }
    }
    PASSES
}

#[inline(always)]
fn service(slot: u32, place: usize, packets: u32, now: u64) -> u32 {
    let Some(levels) = LEVELS.get_ptr_mut(slot) else { return PASSES };
    match draw(at(levels, place), &SERVICE, now, packets.into()) {
        true => PASSES,
        false => SERVICE_RATE | FIRST,
    }
}

/// Has one bucket pay, where it has room.
#[inline(always)]
pub fn draw(level: *mut u64, limit: &Limit, now: u64, units: u64) -> bool {
    match ask(limit, read(level), now, units) {
        Some(spend) => {
            pay(level, spend);
            true
        }
        None => false,
    }
}

/// Whether the source may open one more flow: one of its two places has room.
#[inline(always)]
pub fn source_may(source: u32, seed: u64) -> bool {
    let Some(rates) = RATES.get_ptr(0) else { return true };
    let limit = limit(rates, PACKETS + 1);
    // SAFETY: the helper has no precondition.
    let now = ticks(unsafe { bpf_ktime_get_coarse_ns() });
    let [first, second] = source_places(source, seed);
    let first = one_more(first, &limit, now);
    let second = one_more(second, &limit, now);
    first || second
}

#[inline(always)]
fn one_more(place: u32, limit: &Limit, now: u64) -> bool {
    let Some(level) = SOURCES.get_ptr_mut(place) else { return true };
    draw(level, limit, now, 1)
}

struct Asked {
    bytes: u32,
    packets: u32,
    now: u64,
}

impl Asked {
    /// All four buckets are asked before any of them pays.
    #[inline(always)]
    fn of<const WAY: usize>(&self, slot: u32) -> u32 {
        let Some(rates) = RATES.get_ptr(slot) else { return PASSES };
        // SAFETY: the pointer was checked; the daemon may write the word, whole.
        let payer = unsafe { (*rates).payer(slot) };
        let Some(levels) = LEVELS.get_ptr_mut(payer) else { return PASSES };
        let bytes = u64::from(self.bytes);
        let packets = u64::from(self.packets);
        let ask = |place: usize, units: u64| {
            ask(&limit(rates, place), read(at(levels, place)), self.now, units)
        };
        let bandwidth = if WAY == OUT { BANDWIDTH_OUT } else { BANDWIDTH_IN };
        let Some(peak) = ask(WAY, bytes) else { return bandwidth };
        let Some(base) = ask(WAY + 1, bytes) else { return bandwidth };
        let Some(packets_peak) = ask(PACKETS, packets) else { return PACKET_RATE };
        let Some(packets_base) = ask(PACKETS + 1, packets) else { return PACKET_RATE };
        pay(at(levels, WAY), peak);
        pay(at(levels, WAY + 1), base);
        pay(at(levels, PACKETS), packets_peak);
        pay(at(levels, PACKETS + 1), packets_base);
        PASSES
    }
}

#[inline(always)]
fn limit(rates: *const Rates, place: usize) -> Limit {
    // SAFETY: the pointer was checked, and `place` is one of six.
    unsafe { (&raw const (*rates).limits).cast::<Limit>().add(place).read() }
}

#[inline(always)]
fn at(levels: *mut Levels, place: usize) -> *mut u64 {
    // SAFETY: the pointer was checked, and `place` is one of eight.
    unsafe { (&raw mut (*levels).full_at).cast::<u64>().add(place) }
}

#[inline(always)]
fn read(level: *const u64) -> u64 {
    // SAFETY: an aligned word of a map; other CPUs may write it, whole.
    unsafe { level.read_volatile() }
}

#[inline(always)]
fn pay(level: *mut u64, spend: Spend) {
    match spend {
        Spend::Nothing => {}
        // SAFETY: as for `read`.
        Spend::Begin(full_at) => unsafe { level.write_volatile(full_at) },
        // SAFETY: as for `read`; the addition is atomic.
        Spend::Add(ticks) => unsafe {
            asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) level, in(reg) ticks);
        },
    }
}
