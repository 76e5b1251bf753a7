//! Rates as buckets.

use ebpf::rate::{
    BYTES_A_SECOND_MIN, BYTES_MIN, IN, Limit, OUT, PACKETS, PACKETS_A_SECOND_MIN, PACKETS_MIN,
    Rates, UNITS_A_SECOND_MAX,
};
use rpc::dataplane::{Allowance, Desired, Interface};

use super::{Error, Tables};

const BITS_A_BYTE: u64 = 8;

/// The early program's limit on each source.
pub fn of_sources(desired: &Desired, tables: &mut Tables) -> Result<(), Error> {
    let Some(rate) = desired.uplink.as_ref().and_then(|uplink| uplink.source_packets) else {
        return Ok(());
    };
    let mut rates = Rates::default();
    let allowance = Allowance { baseline: rate, peak: rate, credit: rate };
    let buckets = packets("source_packets", &allowance);
    let (peak, base) = buckets.map_err(|wrong| wrong.of("uplink".into()))?;
    rates.limits[PACKETS] = peak;
    rates.limits[PACKETS + 1] = base;
    tables.rates.insert(0, rates);
    tables.config.sources = 1;
    Ok(())
}

/// The interface whose rates count for it: itself, or the one that it names.
pub fn payer<'a>(desired: &'a Desired, interface: &'a Interface) -> Result<&'a Interface, Error> {
    let Some(id) = interface.rates_of else { return Ok(interface) };
    let wrong = |cause: String| Wrong("rates_of", cause).of(format!("interface {}", interface.id));
    if interface.rates != rpc::dataplane::Rates::default() {
        return Err(wrong(format!("it has rates of its own, and those of {id}; leave out either")));
    }
    let payer = desired.interfaces.iter().find(|i| i.id == id);
    let payer = payer.ok_or_else(|| wrong(format!("there is no interface {id}")))?;
    if payer.rates_of.is_some() {
        return Err(wrong(format!("{id} has the rates of another; name that one")));
    }
    Ok(payer)
}

pub fn of(interface: &Interface) -> Result<Rates, Error> {
    let mut rates = Rates::default();
    let wanted = &interface.rates;
    let ways = [
        (OUT, wanted.outgoing.map(|a| bytes("outgoing", &a))),
        (IN, wanted.incoming.map(|a| bytes("incoming", &a))),
        (PACKETS, wanted.packets.map(|a| packets("packets", &a))),
    ];
    for (place, buckets) in ways {
        let Some(buckets) = buckets else { continue };
        let (peak, base) =
            buckets.map_err(|wrong| wrong.of(format!("interface {}", interface.id)))?;
        rates.limits[place] = peak;
        rates.limits[place + 1] = base;
    }
    Ok(rates)
}

struct Wrong(&'static str, String);

impl Wrong {
    fn of(self, object: String) -> Error {
        Error::Rate { object, which: self.0, cause: self.1 }
    }
}

fn bytes(which: &'static str, allowance: &Allowance) -> Result<(Limit, Limit), Wrong> {
    let Allowance { baseline, peak, credit } = *allowance;
    let range = (BYTES_A_SECOND_MIN, BYTES_MIN, BITS_A_BYTE);
    buckets(which, (baseline, peak, credit), range)
}

fn packets(which: &'static str, allowance: &Allowance) -> Result<(Limit, Limit), Wrong> {
    let Allowance { baseline, peak, credit } = *allowance;
    buckets(which, (baseline, peak, credit), (PACKETS_A_SECOND_MIN, PACKETS_MIN, 1))
}

/// At the greatest rate for as long as its shallow bucket, and at the baseline with
/// all credits. `a_unit`: what is said is so many to one that is counted.
fn buckets(
    which: &'static str,
    (baseline, peak, credit): (u64, u64, u64),
    (least, burst_least, a_unit): (u64, u64, u64),
) -> Result<(Limit, Limit), Wrong> {
    let (least, most) = (least * a_unit, UNITS_A_SECOND_MAX * a_unit);
    if !(least..=most).contains(&baseline) || !(least..=most).contains(&peak) {
        let cause = format!("{baseline} to {peak} a second, but {least} to {most} can be counted");
        return Err(Wrong(which, cause));
    }
    if peak < baseline {
        return Err(Wrong(which, format!("the peak {peak} is below the baseline {baseline}")));
    }
    let limit = |rate: u64, burst: u64| Limit::of(rate / a_unit, burst / a_unit, burst_least);
    Ok((limit(peak, 0), limit(baseline, credit)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_out_of_bounds_are_refused_and_their_edges_are_not() {
        let of = |baseline, peak| bytes("outgoing", &Allowance { baseline, peak, credit: 0 });
        assert!(of(1000, 1000).is_ok());
        assert!(of(UNITS_A_SECOND_MAX * 8, UNITS_A_SECOND_MAX * 8).is_ok());
        for (baseline, peak) in
            [(0, 0), (999, 1000), (1000, 999), (1000, UNITS_A_SECOND_MAX * 8 + 1)]
        {
            assert!(of(baseline, peak).is_err(), "{baseline} {peak}");
        }
        let of = |rate| packets("packets", &Allowance { baseline: rate, peak: rate, credit: 0 });
        assert!(of(1).is_ok() && of(0).is_err() && of(UNITS_A_SECOND_MAX + 1).is_err());
    }
}
