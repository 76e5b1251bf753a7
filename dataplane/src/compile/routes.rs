//! Route tables to prefixes of one trie.
//!
//! A table with new content is written under a number that nothing points to, the
//! interfaces' records then name it, and only after that its predecessor is removed: no
//! packet is routed by half a table.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use ebpf::layout::{Hop, Interface, ROUTES_MAX, ROUTES_NONE, RouteKey};
use ebpf::route::{BLACKHOLE, CHECKED, INTERFACE, INTERNET, LOCAL, NAT};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::route_table::{ROUTES_A_TABLE_MAX, Target};
use model::{InterfaceId, RouteTable, RouteTableId, VpcId};
use rpc::dataplane::{self, Desired, Routed};

use super::{Devices, Error, Tables, limit, nat};

/// Numbers of tables: the trie's word has the family in its lowest bit.
const NUMBER_MAX: u32 = u32::MAX >> 1;

/// The destinations of one table.
type Content = BTreeMap<IpNet, Hop>;

/// Tables of the host by their ids, each with its number and its network.
pub struct RouteTables {
    numbers: BTreeMap<RouteTableId, (u32, VpcId)>,
}

/// Makes all of them, and puts their prefixes into `tables`.
pub fn compile(
    desired: &Desired,
    devices: &Devices,
    (loaded, gateways): (&Tables, &nat::ById),
    tables: &mut Tables,
) -> Result<RouteTables, Error> {
    let interfaces = desired.interfaces.iter().map(|i| (i.id, i)).collect();
    let targets = Targets { interfaces, gateways, devices };
    let mut numbers = Numbers::new(loaded);
    let mut by_id = BTreeMap::new();
    for table in &desired.route_tables {
        let content = content(table, &targets)?;
        let number = numbers.number(&content);
        let keys = content.iter().map(|(net, hop)| (key(number, *net), *hop));
        tables.routes.extend(keys);
        if by_id.insert(table.id, (number, table.vpc)).is_some() {
            return Err(wrong(table, "it appears twice".into()));
        }
    }
    limit("routes", tables.routes.len(), ROUTES_MAX)?;
    Ok(RouteTables { numbers: by_id })
}

impl RouteTables {
    /// What an interface's record names.
    pub fn of(&self, i: &dataplane::Interface) -> Result<u32, Error> {
        let Some(table) = i.route_table else { return Ok(ROUTES_NONE) };
        match self.numbers.get(&table) {
            Some((number, vpc)) if *vpc == i.vpc => Ok(*number),
            Some(_) => Err(Error::ForeignRouteTable { interface: i.id, table }),
            None => Err(Error::UnknownRouteTable { interface: i.id, table }),
        }
    }
}

fn wrong(table: &RouteTable, cause: String) -> Error {
    Error::RouteTable { table: table.id, cause }
}

/// What routes may name.
struct Targets<'a> {
    interfaces: BTreeMap<InterfaceId, &'a dataplane::Interface>,
    gateways: &'a nat::ById,
    devices: &'a Devices,
}

fn content(table: &RouteTable, targets: &Targets<'_>) -> Result<Content, Error> {
    for six in [false, true] {
        let of_family = |net: &IpNet| matches!(net, IpNet::V6(_)) == six;
        let routes = table.routes.iter().map(|r| &r.destination);
        for (what, count) in [
            ("routes", routes.filter(|net| of_family(net)).count()),
            ("local prefixes", table.local.iter().filter(|net| of_family(net)).count()),
        ] {
            if count > ROUTES_A_TABLE_MAX {
                let cause =
                    format!("{count} {what} of a family, but {ROUTES_A_TABLE_MAX} are the most");
                return Err(wrong(table, cause));
            }
        }
    }
    let local = |net: &IpNet| (net.trunc(), Hop { kind: LOCAL, to: 0 });
    let mut content: Content = table.local.iter().map(local).collect();
    for route in &table.routes {
        let destination = route.destination.trunc();
        let hop = hop(table, destination, route.target, targets)?;
        if content.insert(destination, hop).is_some() {
            let cause = format!("route {destination}: there is one already, or it is local");
            return Err(wrong(table, cause));
        }
    }
    Ok(content)
}

/// A target that is not on this host is a black hole, as EC2 shows it.
fn hop(
    table: &RouteTable,
    destination: IpNet,
    target: Target,
    targets: &Targets<'_>,
) -> Result<Hop, Error> {
    let nowhere = Hop { kind: BLACKHOLE, to: 0 };
    let id = match target {
        Target::InternetGateway => return Ok(Hop { kind: INTERNET, to: 0 }),
        Target::Blackhole => return Ok(nowhere),
        Target::NatGateway(id) => {
            return match targets.gateways.get(&id) {
                Some((_, vpc)) if *vpc != table.vpc => {
                    Err(wrong(table, format!("its target {id} belongs to another network")))
                }
                Some((public, _)) if matches!(destination, IpNet::V4(_)) => {
                    Ok(Hop { kind: NAT, to: (*public).into() })
                }
                // IPv6 is never translated.
                _ => Ok(nowhere),
            };
        }
        Target::Interface(id) => id,
    };
    let Some(interface) = targets.interfaces.get(&id) else { return Ok(nowhere) };
    if interface.vpc != table.vpc {
        return Err(wrong(table, format!("its target {id} belongs to another network")));
    }
    let Some(device) = targets.devices.by_name.get(interface.device.name()) else {
        return Ok(nowhere);
    };
    let kind = if interface.source_check { CHECKED } else { INTERFACE };
    Ok(Hop { kind, to: if kind == INTERFACE { device.ifindex } else { 0 } })
}

/// A table that the kernel has already keeps its number.
struct Numbers {
    by_content: BTreeMap<Content, u32>,
    taken: BTreeSet<u32>,
}

impl Numbers {
    fn new(loaded: &Tables) -> Self {
        let mut contents: BTreeMap<u32, Content> = BTreeMap::new();
        for (key, hop) in &loaded.routes {
            let (number, net) = read_key(key);
            contents.entry(number).or_default().insert(net, *hop);
        }
        // A table without any prefix is known by whoever names it alone.
        let named = loaded.interfaces.values().map(|i| i.routes);
        let taken = contents.keys().copied().chain(named).collect();
        Self { by_content: contents.into_iter().map(|(n, c)| (c, n)).collect(), taken }
    }

    /// Two tables with the same content share one number.
    fn number(&mut self, content: &Content) -> u32 {
        if let Some(number) = self.by_content.get(content) {
            return *number;
        }
        let free = (ROUTES_NONE + 1..NUMBER_MAX).find(|n| !self.taken.contains(n));
        let number = free.unwrap_or(NUMBER_MAX);
        self.taken.insert(number);
        self.by_content.insert(content.clone(), number);
        number
    }
}

/// As it stands in the kernel.
fn key(number: u32, net: IpNet) -> RouteKey {
    let (word, length, address) = match net {
        IpNet::V4(net) => {
            let [a, b, c, d] = net.network().octets();
            let mut address = [0; 16];
            address[..4].copy_from_slice(&[a, b, c, d]);
            (number << 1, net.prefix_len(), address)
        }
        IpNet::V6(net) => (number << 1 | 1, net.prefix_len(), net.network().octets()),
    };
    RouteKey { length: 32 + u32::from(length), table: word.to_be_bytes(), address }
}

fn read_key(key: &RouteKey) -> (u32, IpNet) {
    let word = u32::from_be_bytes(key.table);
    let length = key.length.saturating_sub(32).min(128) as u8;
    let [a, b, c, d, ..] = key.address;
    let net = match word & 1 {
        0 => Ipv4Net::new([a, b, c, d].into(), length.min(32)).map(IpNet::from),
        _ => Ipv6Net::new(key.address.into(), length).map(IpNet::from),
    };
    (word >> 1, net.unwrap_or_default())
}

impl Tables {
    /// The table's longest prefix that contains the address.
    pub fn hop(&self, number: u32, to: IpAddr) -> Option<(IpNet, Hop)> {
        let longest: u8 = if to.is_ipv4() { 32 } else { 128 };
        (0..=longest).rev().find_map(|length| {
            let net = IpNet::new(to, length).ok()?.trunc();
            self.routes.get(&key(number, net)).map(|hop| (net, *hop))
        })
    }

    /// The interface here that a sender's route goes by.
    pub fn appliance(&self, sender: &Interface, to: IpAddr) -> Option<&Interface> {
        self.routed(sender.ifindex, to)?;
        let (_, hop) = self.hop(sender.routes, to)?;
        if hop.kind == INTERFACE { self.interfaces.get(&hop.to) } else { None }
    }

    /// What the table of the interface with this ifindex says of a destination; `None`
    /// where no table is asked.
    pub fn routed(&self, ifindex: u32, to: IpAddr) -> Option<Routed> {
        let interface = self.interfaces.get(&ifindex)?;
        let table = *self.names.route_tables.get(&ifindex)?;
        let near = match to {
            IpAddr::V4(to) => u32::from(to) & interface.mask == interface.subnet,
            IpAddr::V6(to) => self.sixes.get(&ifindex)?.holds(super::six::v6(to)),
        };
        let hop = self.hop(interface.routes, to);
        (!near).then(|| Routed { table, destination: hop.map(|(net, _)| net) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_reads_back_from_the_kernels_key() {
        for net in ["0.0.0.0/0", "10.1.2.0/23", "192.0.2.7/32", "::/0", "2001:db8:1::/56"] {
            let net: IpNet = net.parse().unwrap();
            assert_eq!(read_key(&key(77, net)), (77, net));
        }
    }
}
