//! Buckets in the kernel: what is left of them, and what is missing.

use std::io;
use std::time::Duration;

use ebpf::rate::{IN, Levels, Limit, OUT, PACKETS, RESOLVER, Rates, SERVICE, SERVICES, ticks};
use nix::time::{ClockId, clock_gettime};
use rpc::dataplane::Credits;

use super::maps::Maps;

/// Places of a slot's buckets.
pub const BUCKETS: usize = size_of::<Levels>() / 8;

/// What the programs ask.
fn now() -> io::Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE).map_err(io::Error::from)?;
    Ok(ticks(Duration::from(now).as_nanos() as u64))
}

/// The limit in each place.
fn limits(rates: &Rates) -> [Limit; BUCKETS] {
    let mut all = [SERVICE; BUCKETS];
    all[..RESOLVER.min(SERVICES)].copy_from_slice(&rates.limits);
    all
}

/// Those of the services are the interface's own, whoever pays for the rest.
fn is_service(place: usize) -> bool {
    place >= RESOLVER.min(SERVICES)
}

/// Bytes or packets that are missing from each bucket that the interface draws from.
pub fn missing(maps: &Maps, slot: u32) -> io::Result<[u64; BUCKETS]> {
    let rates = maps.rates.get(&slot)?.unwrap_or_default();
    let limits = limits(&rates);
    let own = maps.levels.get(&slot)?.unwrap_or_default();
    let shared = maps.levels.get(&rates.payer(slot))?.unwrap_or_default();
    let now = now()?;
    Ok(std::array::from_fn(|place| {
        let levels = if is_service(place) { &own } else { &shared };
        limits[place].missing(levels.full_at[place], now)
    }))
}

/// Makes so much missing, or as much as the buckets hold.
pub fn put_missing(maps: &Maps, slot: u32, missing: &[u64; BUCKETS]) -> io::Result<()> {
    let rates = maps.rates.get(&slot)?.unwrap_or_default();
    let limits = limits(&rates);
    let now = now()?;
    let payer = rates.payer(slot);
    for (whose, services) in [(slot, true), (payer, false)] {
        let mut levels: Levels = maps.levels.get(&whose)?.unwrap_or_default();
        for place in (0..BUCKETS).filter(|place| is_service(*place) == services) {
            levels.full_at[place] = limits[place].full_at(missing[place], now);
        }
        maps.levels.put(&whose, &levels)?;
    }
    Ok(())
}

/// What is left of the credits.
pub fn credits(maps: &Maps, slot: u32) -> io::Result<Credits> {
    let rates = maps.rates.get(&slot)?.unwrap_or_default();
    let missing = missing(maps, slot)?;
    // The baseline's bucket has the credits.
    let left = |place: usize, a_unit: u64| {
        let limit = rates.limits[place + 1];
        let whole = limit.missing(u64::MAX, 0);
        (limit.depth != 0).then(|| (whole - missing[place + 1].min(whole)) * a_unit)
    };
    Ok(Credits { incoming: left(IN, 8), outgoing: left(OUT, 8), packets: left(PACKETS, 1) })
}
