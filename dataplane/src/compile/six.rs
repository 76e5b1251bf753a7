//! IPv6 of an interface: its addresses, its subnet and its way out.

use std::collections::BTreeSet;
use std::net::Ipv6Addr;

use ebpf::V6;
use ebpf::ip::Ip as _;
use ebpf::layout::{HOLDERS_MAX, Holder, Interface, Six};
use rpc::dataplane::{self, Desired};

use super::{Error, Tables, limit};

/// IPv6 addresses an interface may have (EC2 has as many on its larger types).
pub const IPV6_AN_INTERFACE_MAX: usize = 50;

pub fn v6(address: Ipv6Addr) -> V6 {
    V6::from_bits(address.to_bits())
}

/// Addresses are global: no two interfaces have the same, of whatever networks.
pub fn refuse(desired: &Desired) -> Result<(), Error> {
    let mut seen = BTreeSet::new();
    for i in &desired.interfaces {
        if i.ipv6.len() > IPV6_AN_INTERFACE_MAX {
            let count = i.ipv6.len();
            return Err(Error::TooManyAddresses { interface: i.id, count });
        }
        for address in &i.ipv6 {
            let inside = i.subnet6.is_some_and(|subnet| subnet.contains(address));
            if !inside || v6(*address).is_unroutable() {
                return Err(Error::OutsideSubnet6 { interface: i.id, address: *address });
            }
            if !seen.insert(*address) {
                let what = format!("address {address}");
                return Err(Error::Duplicate { what, interface: i.id });
            }
        }
    }
    limit("IPv6 addresses", seen.len(), HOLDERS_MAX)
}

pub fn add(desired: &Desired, i: &dataplane::Interface, record: &Interface, tables: &mut Tables) {
    let Some(subnet) = i.subnet6 else { return };
    let gateway = desired.uplink.as_ref().and_then(|u| u.gateway6);
    let six = Six {
        subnet: v6(subnet.network()),
        mask: v6(subnet.netmask()),
        next_hop: gateway.map_or(V6::UNSPECIFIED, v6),
    };
    tables.sixes.insert(record.ifindex, six);
    let Interface { vpc, identity, ifindex, .. } = *record;
    let holder = Holder { vpc, identity, ifindex, zero: 0 };
    tables.holders.extend(i.ipv6.iter().map(|address| (v6(*address), holder)));
}
