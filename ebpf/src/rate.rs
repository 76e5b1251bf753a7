//! Token buckets, as points in time.
//!
//! A bucket is one word: the moment at which it will be full again. Spending moves
//! it into the future by the cost; a packet passes while that stays within the
//! bucket's depth from now. Nothing is ever refilled, and an idle bucket costs nothing.
//!
//! ```text
//!             now          full again
//!   ───────────┼───────────────┼──────────────┤ now + depth
//!              └── spent ──────┘└── left ─────┘
//! ```
//! A direction has two: a shallow one at the greatest rate, and a deep one at the
//! baseline, whose depth are the credits that a burst spends. Whoever has none left
//! goes on at the baseline. A packet passes where all of its buckets have room, and
//! only then it spends.

use bytemuck::{Pod, Zeroable};

/// Parts of a nanosecond in which buckets count: a byte at 100 Gbit/s takes five.
pub const TICKS_A_NS: u64 = 64;
const TICKS_A_SECOND: u64 = 1_000_000_000 * TICKS_A_NS;
/// Parts of a tick in which a unit's cost is kept.
const COST_PARTS: u64 = 1024;
/// No bucket is deeper: a month.
const DEPTH_MAX: u64 = 30 * 86_400 * TICKS_A_SECOND;
/// Every bucket holds this much time at least: the clock moves by up to 10 ms.
const DEPTH_MIN_MS: u64 = 20;
/// Every bucket of bytes holds two superframes, or one might never pass.
pub const BYTES_MIN: u64 = 262_144;
/// Every bucket of packets holds the packets of a superframe.
pub const PACKETS_MIN: u64 = 128;
/// Units a second that a limit may say: 1 packet, 125 bytes up to 10 Tbit/s.
pub const PACKETS_A_SECOND_MIN: u64 = 1;
pub const BYTES_A_SECOND_MIN: u64 = 125;
pub const UNITS_A_SECOND_MAX: u64 = 1_250_000_000_000;

/// Packets a second that an interface may send to the network's resolver, and as
/// many to all the other services of the host (EC2 user guide, "Link-local limits").
pub const SERVICE_PACKETS_A_SECOND: u64 = 1024;

/// Places of sources in each of two rows, a power of two. Who shares a place in one row
/// with a flood does not share the other, but for one in 32 768.
pub const SOURCES_A_ROW: u32 = 1 << SOURCE_BITS;
const SOURCE_BITS: u32 = 15;

/// A source's places in both rows; `seed` is what no stranger knows.
#[inline(always)]
pub const fn source_places(source: u32, seed: u64) -> [u32; 2] {
    let word = seed ^ source as u64;
    let mixed = (word ^ word >> 32).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let again = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let shift = 64 - SOURCE_BITS;
    [(mixed >> shift) as u32, SOURCES_A_ROW + (again >> shift) as u32]
}

/// One bucket's rate and depth. All zeros: no limit.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Limit {
    /// Of one unit, in parts of a tick.
    pub cost: u64,
    /// In ticks.
    pub depth: u64,
}

impl Limit {
    pub const NONE: Self = Self { cost: 0, depth: 0 };

    /// `rate` units a second with `burst` units at once, or `least` where that is more.
    pub const fn of(rate: u64, burst: u64, least: u64) -> Self {
        let cost = TICKS_A_SECOND * COST_PARTS / rate;
        let burst = if burst > least { burst } else { least };
        let depth = burst as u128 * cost as u128 / COST_PARTS as u128;
        let shortest = DEPTH_MIN_MS * 1_000_000 * TICKS_A_NS;
        let depth = if depth > DEPTH_MAX as u128 { DEPTH_MAX } else { depth as u64 };
        Self { cost, depth: if depth < shortest { shortest } else { depth } }
    }

    #[inline(always)]
    pub const fn price(&self, units: u64) -> u64 {
        self.cost.wrapping_mul(units) / COST_PARTS
    }

    /// What is missing from a full bucket, in units.
    pub fn missing(&self, full_at: u64, now: u64) -> u64 {
        let ticks = full_at.saturating_sub(now).min(self.depth);
        match self.cost {
            0 => 0,
            cost => (u128::from(ticks) * u128::from(COST_PARTS)).div_ceil(cost.into()) as u64,
        }
    }

    /// When a bucket that lacks `units` will be full.
    pub fn full_at(&self, units: u64, now: u64) -> u64 {
        let ticks = u128::from(self.cost) * u128::from(units) / u128::from(COST_PARTS);
        now + ticks.min(self.depth.into()) as u64
    }
}

/// The limit of every interface's bucket for one kind of service.
pub const SERVICE: Limit =
    Limit::of(SERVICE_PACKETS_A_SECOND, SERVICE_PACKETS_A_SECOND, PACKETS_MIN);

/// Now, as buckets count.
#[inline(always)]
pub const fn ticks(ns: u64) -> u64 {
    ns.wrapping_mul(TICKS_A_NS)
}

/// What a packet does to a bucket that has room for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spend {
    /// There is no limit.
    Nothing,
    /// It was full: it will be again at this moment. Two CPUs that find it full at
    /// once may write the same, and then one packet was free.
    Begin(u64),
    /// It will be full so much later. Added atomically, so that none is lost
    /// while the bucket is in use.
    Add(u64),
}

/// `None`: the packet of `units` does not pass.
#[inline(always)]
pub fn ask(limit: &Limit, full_at: u64, now: u64, units: u64) -> Option<Spend> {
    if limit.depth == 0 {
        return Some(Spend::Nothing);
    }
    let price = limit.price(units);
    let spent = full_at.saturating_sub(now);
    if spent + price > limit.depth {
        return None;
    }
    Some(if spent == 0 { Spend::Begin(now + price) } else { Spend::Add(price) })
}

/// Places in [`Rates`] and [`Levels`]; each is two, the greatest rate and the baseline.
pub const OUT: usize = 0;
pub const IN: usize = 2;
pub const PACKETS: usize = 4;
/// Places in [`Levels`] alone: the network's resolver, and the other services.
pub const RESOLVER: usize = 6;
pub const SERVICES: usize = 7;

/// `RATES`: the limits of the interface with this slot.
///
/// Slot 0's `PACKETS` is what one source of the world may send to all elastic
/// addresses together, where the early program looks.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Rates {
    /// Outgoing bytes, incoming bytes, packets both ways.
    pub limits: [Limit; 6],
    /// The slot whose [`Levels`] these limits are held against; 0: its own. All interfaces
    /// of an instance draw from the same buckets so.
    pub payer: u64,
}
const _: () = assert!(size_of::<Rates>() == 104);

impl Rates {
    pub fn limited(&self) -> bool {
        self.limits.iter().any(|limit| limit.depth != 0)
    }

    /// The slot whose buckets pay for the interface with `slot`.
    #[inline(always)]
    pub const fn payer(&self, slot: u32) -> u32 {
        if self.payer == 0 { slot } else { self.payer as u32 }
    }
}

/// `LEVELS`: when its buckets will be full. Written by the programs.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Levels {
    pub full_at: [u64; 8],
}
const _: () = assert!(size_of::<Levels>() == 64);

/// Packets and bytes on the wire of what the kernel carries as one: a superframe of
/// `len` bytes becomes packets of at most `gso_size` bytes after their headers.
#[inline(always)]
pub fn on_the_wire(len: u32, headers: u32, gso_size: u32) -> (u32, u32) {
    let payload = len.saturating_sub(headers);
    if gso_size == 0 || payload <= gso_size {
        return (1, len);
    }
    let packets = (payload - 1) / gso_size + 1;
    (packets, len.saturating_add((packets - 1).saturating_mul(headers)))
}

#[cfg(test)]
#[path = "rate_tests.rs"]
mod tests;
