//! What one volume may do, and what of it waits.

use std::collections::VecDeque;

use model::{Limits, Rate};

use super::bucket::Bucket;

/// A bucket without credits holds what its rate gives in this time: requests come
/// in bursts, and a guest that was idle for a moment need not queue at once.
const BURST_MS: u64 = 100;

/// What of a request matters here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    Read,
    Write,
    /// Zeroes and trim: one operation, no bytes.
    Change,
    /// Status and prefetch: the same.
    Ask,
    /// Never waits: what it covers is done already.
    Flush,
}

impl Class {
    pub const fn changes(self) -> bool {
        matches!(self, Self::Write | Self::Change)
    }

    const fn carries(self) -> bool {
        matches!(self, Self::Read | Self::Write)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    pub ticket: u32,
    pub class: Class,
    pub offset: u64,
    pub length: u64,
}

/// A request with its price.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Priced {
    pub ticket: u32,
    pub units: u64,
    pub bytes: u64,
}

/// Counts operations as EBS does: a large one is several, and those that go on
/// where the last one ended are one until they fill it.
#[derive(Debug, Clone, Copy)]
struct Units {
    shift: u32,
    end: u64,
    left: u64,
}

impl Units {
    fn of(unit_bytes: u64) -> Self {
        let unit = if unit_bytes == 0 { Limits::UNIT } else { unit_bytes };
        Self { shift: unit.next_power_of_two().trailing_zeros(), end: u64::MAX, left: 0 }
    }

    fn count(&mut self, offset: u64, length: u64) -> u64 {
        let joined = if offset == self.end { self.left.min(length) } else { 0 };
        let rest = length - joined;
        let units = (rest + ((1 << self.shift) - 1)) >> self.shift;
        let kept = if offset == self.end { self.left - joined } else { 0 };
        self.left = if units > 0 { (units << self.shift) - rest } else { kept };
        self.end = offset + length;
        units
    }
}

/// How long each of a volume's buckets needs to be full again, in nanoseconds.
pub type Lack = [u64; 4];

#[derive(Debug)]
pub(super) struct Gate {
    /// Operations and bytes: what is sustained, and the peak.
    buckets: [Bucket; 4],
    limited: bool,
    units: Units,
    pub waiting: VecDeque<Priced>,
    /// Changes wait until the volume is released.
    pub held: bool,
    pub kept: VecDeque<Priced>,
    /// Bytes admitted and not ended.
    pub in_flight: u64,
    /// Where its last request ended, on the scale of its worker's turns.
    pub finish: u64,
}

impl Gate {
    pub fn new(limits: Limits) -> Self {
        Self {
            buckets: buckets(limits),
            limited: !limits.is_none(),
            units: Units::of(limits.unit_bytes),
            waiting: VecDeque::new(),
            held: false,
            kept: VecDeque::new(),
            in_flight: 0,
            finish: 0,
        }
    }

    pub fn set_limits(&mut self, limits: Limits, now: u64) {
        for (bucket, new) in self.buckets.iter_mut().zip(buckets(limits)) {
            bucket.become_like(new, now);
        }
        self.limited = !limits.is_none();
        self.units = Units::of(limits.unit_bytes);
    }

    pub fn lacks(&self, now: u64) -> Lack {
        self.buckets.map(|bucket| bucket.lacks(now))
    }

    pub fn owe(&mut self, now: u64, lack: Lack) {
        for (bucket, lack) in self.buckets.iter_mut().zip(lack) {
            bucket.owe(now, lack);
        }
    }

    pub fn price(&mut self, arrival: &Arrival) -> Priced {
        let Arrival { ticket, class, offset, length } = *arrival;
        if !class.carries() {
            return Priced { ticket, units: 1, bytes: 0 };
        }
        let units = if self.limited { self.units.count(offset, length) } else { 0 };
        Priced { ticket, units, bytes: length }
    }

    /// The earliest time at which the next request may go.
    pub fn ready_at(&self) -> u64 {
        if !self.limited {
            return 0;
        }
        self.buckets.iter().map(Bucket::ready_at).max().unwrap_or(0)
    }

    /// Where its next request starts.
    pub fn start(&self, virtual_time: u64) -> u64 {
        self.finish.max(virtual_time)
    }

    /// Whether it has had less than its share, and waits for nothing now.
    pub const fn is_owed(&self, virtual_time: u64) -> bool {
        self.in_flight == 0 && self.finish <= virtual_time
    }

    pub fn take(&mut self, now: u64, priced: Priced) {
        if self.limited {
            for (index, bucket) in self.buckets.iter_mut().enumerate() {
                bucket.take(now, if index < 2 { priced.units } else { priced.bytes });
            }
        }
        self.in_flight += super::weight(priced.bytes);
    }
}

fn buckets(limits: Limits) -> [Bucket; 4] {
    let [sustained, peak] = pair(limits.operations);
    let [sustained_bytes, peak_bytes] = pair(limits.bytes);
    [sustained, peak, sustained_bytes, peak_bytes]
}

fn pair(rate: Option<Rate>) -> [Bucket; 2] {
    let Some(rate) = rate else { return [Bucket::default(); 2] };
    let steady = |per_second: u64| Bucket::new(per_second, per_second * BURST_MS / 1000);
    if rate.peak <= rate.sustained {
        return [steady(rate.sustained), Bucket::default()];
    }
    [Bucket::new(rate.sustained, rate.credits), steady(rate.peak)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_counted_as_ebs_counts_them() {
        const KIB: u64 = 1 << 10;
        let mut units = Units::of(256 * KIB);
        assert_eq!(units.count(0, 1024 * KIB), 4, "one of 1024 KiB is four of 256");
        let small: u64 = (0..64).map(|i| units.count((1 << 30) + i * 4 * KIB, 4 * KIB)).sum();
        assert_eq!(small, 1, "64 of 4 KiB in sequence are one");
        let random: u64 = (0..64).map(|i| units.count(i * 8 * KIB, 4 * KIB)).sum();
        assert_eq!(random, 64, "those that are apart are not merged");
        let mut disk = Units::of(1 << 20);
        assert_eq!((0..16).map(|i| disk.count(i << 16, 1 << 16)).sum::<u64>(), 1);
        assert_eq!(disk.count(1 << 20, 512), 1, "the next one begins anew");
        assert_eq!(disk.count(1 << 40, 0), 0, "an empty one costs nothing");
    }
}
