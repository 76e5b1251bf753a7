//! An interface's private addresses, and the elastic ones that stand for them.

use std::net::Ipv4Addr;

use ebpf::layout::{ELASTICS_MAX, Elastic, Interface, LOCALS_MAX, Local, LocalKey};
use rpc::dataplane::{self, Desired};

use super::{Error, Tables, limit};

/// Private addresses that an interface may have beside its first (EC2 has 50 in all on
/// its larger types).
pub const SECONDARIES_AN_INTERFACE_MAX: usize = 49;

/// Each private address with the elastic one that stands for it, the first before all.
pub fn addresses(
    i: &dataplane::Interface,
) -> impl Iterator<Item = (Ipv4Addr, Option<Ipv4Addr>)> + '_ {
    let secondary = i.secondary.iter().map(|s| (s.address, s.elastic));
    std::iter::once((i.address, i.elastic)).chain(secondary)
}

/// What no other interface may have too.
pub fn told(i: &dataplane::Interface) -> impl Iterator<Item = String> + '_ {
    addresses(i).flat_map(|(address, elastic)| {
        let elastic = elastic.map(|e| format!("elastic address {e}"));
        std::iter::once(format!("address {address} in {}", i.vpc)).chain(elastic)
    })
}

pub fn refuse(desired: &Desired) -> Result<(), Error> {
    for i in &desired.interfaces {
        let count = i.secondary.len();
        if count > SECONDARIES_AN_INTERFACE_MAX {
            return Err(Error::TooManySecondaries { interface: i.id, count });
        }
        let outside = addresses(i).find(|(address, _)| !i.subnet.contains(address));
        if let Some((address, _)) = outside {
            return Err(Error::OutsideSubnet { interface: i.id, address, subnet: i.subnet });
        }
    }
    let all = || desired.interfaces.iter().flat_map(addresses);
    limit("private addresses", all().count() + desired.nat_gateways.len(), LOCALS_MAX)?;
    let elastics = all().filter(|(_, e)| e.is_some()).count() + desired.nat_gateways.len();
    limit("elastic addresses", elastics, ELASTICS_MAX)
}

pub fn add(i: &dataplane::Interface, record: &Interface, tables: &mut Tables) {
    let Interface { identity, ifindex, vpc, .. } = *record;
    for (address, elastic) in addresses(i) {
        let address = u32::from(address);
        let elastic = elastic.map_or(0, u32::from);
        let local = Local { identity, ifindex, service: 0, elastic, zero: 0 };
        tables.locals.insert(LocalKey { vpc, address, zero: 0 }, local);
        if elastic != 0 {
            tables.elastics.insert(elastic, Elastic { interface: *record, address, nat: 0 });
        }
    }
}
