//! Random desired states over few addresses, ports and groups, so that rules and
//! packets meet.

use std::net::{Ipv4Addr, Ipv6Addr};

use dataplane::compile::{DeviceFact, DeviceKind, Devices};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::{
    Direction, GroupId, InterfaceId, ListEntry, Mac, NatGatewayId, Peer, PortRange, PrefixList,
    PrefixListId, Protocol, Rule, RuleId, SecurityGroup, VpcId,
};
use rpc::dataplane::{
    Desired, Device, Dns, Interface, NatGateway, PrivateAddress, Services, Uplink,
};

use crate::acls::{acl_id, acls};
use crate::random::Random;
use crate::routes::{table_id, tables};

pub const GUESTS: usize = 4;
pub const UPLINK: &str = "up0";
pub const PUNT: &str = "punt0";
pub const PORTS: [u16; 6] = [22, 53, 80, 443, 8000, 40_000];
pub const WORLD: [[u8; 4]; 4] = [[203, 0, 113, 9], [203, 0, 113, 77], [192, 0, 2, 1], [8, 8, 8, 8]];

pub fn guest(n: usize) -> String {
    format!("g{n}")
}

pub fn guest_mac(n: usize) -> Mac {
    Mac([0x02, 0, 0, 0, 1, n as u8])
}

pub const UPLINK_MAC: Mac = Mac([0x02, 0, 0, 0, 2, 0]);

/// Three guests share a network, the fourth has one of its own with the same addresses.
pub fn address(n: usize) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, (n == 2).into(), 10 + (n % 3) as u8)
}

/// Its second address, where it has one.
pub fn secondary(n: usize) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(address(n)) + TO_SECONDARY)
}

/// From a guest's first address to its second, and from what stands for the one to
/// what stands for the other.
pub const TO_SECONDARY: u32 = 20;

/// The fourth's network has addresses of its own: there is but one IPv6.
pub fn address6(n: usize, k: u64) -> Ipv6Addr {
    let net = if n == 2 { 2 } else { 1 + 2 * u16::from(n == 3) };
    Ipv6Addr::new(0x2001, 0xdb8, 1, net, 0, 0, n as u16, 10 + k as u16)
}

pub fn elastic(n: usize) -> Ipv4Addr {
    Ipv4Addr::new(198, 51, 100, 10 + n as u8)
}

/// The NAT gateway of the first or second network, with few ports.
pub fn gateway(n: u64) -> NatGateway {
    NatGateway {
        id: NatGatewayId::from_random(n.into()),
        vpc: VpcId::from_random(n.into()),
        address: Ipv4Addr::new(10, 0, 0, 200),
        elastic: Ipv4Addr::new(198, 51, 100, 50 + n as u8),
        ports_max: Some(2),
    }
}

pub fn interface_id(n: usize) -> InterfaceId {
    InterfaceId::from_random(n as u128 + 7)
}

fn vpc(n: usize) -> VpcId {
    VpcId::from_random(if n < 3 { 1 } else { 2 })
}

/// What the devices would be; `ifindex_of` says where they really are.
pub fn devices(ifindex_of: impl Fn(&str) -> u32) -> Devices {
    let mut devices = Devices { punt: Some(PUNT.to_owned()), ..Devices::default() };
    let mut add = |name: String, mac: Mac| {
        // Half of the guests live in namespaces.
        let kind = match name == guest(1) || name == guest(3) {
            true => DeviceKind::VethToNamespace,
            false => DeviceKind::Other,
        };
        let fact = DeviceFact { ifindex: ifindex_of(&name), mac, kind, mtu: 1500 };
        devices.by_name.insert(name, fact);
    };
    (0..GUESTS).for_each(|n| add(guest(n), guest_mac(n)));
    add(UPLINK.to_owned(), UPLINK_MAC);
    add(PUNT.to_owned(), Mac([0x02, 0, 0, 0, 3, 0]));
    devices.host_addresses =
        vec![Ipv4Addr::new(198, 51, 100, 1).into(), "2001:db8:0:1::1".parse().unwrap()];
    devices.uplink_address = Some(Ipv4Addr::new(198, 51, 100, 1));
    devices
}

/// MTUs that most random packets fit, and some do not.
pub fn narrow(random: &mut Random, mut desired: Desired) -> Desired {
    desired.interfaces.iter_mut().for_each(|i| i.dhcp.mtu = random.pick(&[1500, 1500, 80]));
    desired
}

/// As narrow an uplink.
pub fn narrow_devices() -> Devices {
    let mut devices = devices(|name| nix::net::if_::if_nametoindex(name).unwrap());
    devices.by_name.get_mut(UPLINK).unwrap().mtu = 84;
    devices
}

/// Devices that exist nowhere.
pub fn imagined_devices() -> Devices {
    let names: Vec<String> =
        (0..GUESTS).map(guest).chain([UPLINK.to_owned(), PUNT.to_owned()]).collect();
    devices(|name| 10 + names.iter().position(|n| n == name).unwrap_or_default() as u32)
}

pub fn desired(random: &mut Random, rules_max: u64) -> Desired {
    let mut groups = Vec::new();
    for n in 0..6 {
        let vpc = if n < 4 { VpcId::from_random(1) } else { VpcId::from_random(2) };
        let mut rules = |of: u64| {
            (0..random.below(rules_max + 1)).map(|i| rule(random, of * 10_000 + i)).collect()
        };
        let (ingress, egress) = (rules(2 * n + 1), rules(2 * n + 2));
        groups.push(SecurityGroup { id: group(n), vpc, ingress, egress });
    }
    let present: Vec<usize> = (0..GUESTS).filter(|_| random.chance(85)).collect();
    let interfaces = present.into_iter().map(|n| interface(random, n)).collect();
    Desired {
        generation: 1,
        uplink: random.chance(80).then(|| Uplink {
            device: UPLINK.to_owned(),
            gateway: Ipv4Addr::new(198, 51, 100, 254),
            gateway6: random.chance(85).then(|| "fe80::1".parse().unwrap()),
            early_drop: random.pick(&[None, Some(true), Some(false)]),
            bogons: random.chance(10),
            source_packets: None,
            fast_path: Default::default(),
        }),
        interfaces,
        groups,
        prefix_lists: lists(random),
        route_tables: tables(random),
        network_acls: acls(random),
        nat_gateways: (1..3).filter(|_| random.chance(70)).map(gateway).collect(),
        blocklist: if random.chance(30) {
            vec![
                IpNet::V4(Ipv4Net::new(Ipv4Addr::new(192, 0, 2, 0), 24).unwrap()),
                "2001:db8:bad::/48".parse().unwrap(),
            ]
        } else {
            Vec::new()
        },
        elastic_ranges: if random.chance(60) {
            vec![
                IpNet::V4(Ipv4Net::new(Ipv4Addr::new(198, 51, 100, 0), 24).unwrap()),
                "2001:db8::/40".parse().unwrap(),
            ]
        } else {
            Vec::new()
        },
        ..Desired::default()
    }
}

/// A world with every guest and an uplink, where nothing is blocked, whatever the dice say.
pub fn peopled(random: &mut Random) -> Desired {
    let mut world = desired(random, 0);
    while world.interfaces.len() < GUESTS || world.uplink.is_none() {
        world = desired(random, 0);
    }
    world.blocklist.clear();
    world.uplink.as_mut().unwrap().bogons = false;
    world
}

/// Half of the groups let everybody come or go, and every answer pass.
pub fn open_some(groups: &mut [SecurityGroup], random: &mut Random) {
    for (n, group) in groups.iter_mut().enumerate() {
        if random.chance(50) {
            continue;
        }
        let everybody = if random.chance(50) { "0.0.0.0/0" } else { "::/0" };
        let peer = Peer::Cidr(everybody.parse().unwrap());
        let port = Protocol::Tcp(PortRange::single(random.pick(&[22, 53, 443])));
        let protocol = random.pick(&[Protocol::Any, Protocol::Udp(PortRange::ALL), port]);
        let (inward, outward) = match random.chance(70) {
            true => (protocol, Protocol::Any),
            false => (Protocol::Any, protocol),
        };
        let id = |k: u128| RuleId::from_random(9000 + k + n as u128);
        group.ingress.push(Rule { id: id(0), protocol: inward, peer });
        group.egress.push(Rule { id: id(100), protocol: outward, peer });
    }
}

pub fn group(n: u64) -> GroupId {
    GroupId::from_random(u128::from(n) + 100)
}

/// Where a network resolves names, if one of its interfaces may ask.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);

fn interface(random: &mut Random, n: usize) -> Interface {
    let pool = if n < 3 { [0, 1, 2, 3] } else { [4, 5, 4, 5] };
    let mut groups: Vec<GroupId> =
        (0..random.below(4)).map(|_| group(random.pick(&pool))).collect();
    groups.sort();
    groups.dedup();
    let six = random.chance(90);
    Interface {
        ipv6: (0..if six { random.below(3) } else { 0 }).map(|k| address6(n, k)).collect(),
        subnet6: six.then(|| Ipv6Net::new(address6(n, 0), 64).unwrap().trunc()),
        elastic: random.chance(70).then(|| elastic(n)),
        secondary: (0..random.below(2)).map(|_| second(random, n)).collect(),
        groups,
        source_check: random.chance(75),
        route_table: random.chance(55).then(|| match n {
            0..3 => table_id(random.below(2)),
            _ => table_id(2),
        }),
        network_acl: random.chance(30).then(|| acl_id(if n < 3 { random.below(2) } else { 2 })),
        metadata: random.chance(60).then(Default::default),
        services: Services {
            metadata_ipv6: random.chance(50),
            dns: random.chance(60).then(|| Dns { address: Some(RESOLVER), names: vec![] }),
            ..Services::default()
        },
        ..Interface::new(
            interface_id(n),
            Device::Existing { name: guest(n) },
            guest_mac(n),
            vpc(n),
            (address(n), Ipv4Net::new(address(n), 24).unwrap().trunc()),
        )
    }
}

fn second(random: &mut Random, n: usize) -> PrivateAddress {
    let elastic = Ipv4Addr::from(u32::from(elastic(n)) + TO_SECONDARY);
    PrivateAddress { address: secondary(n), elastic: random.chance(70).then_some(elastic) }
}

pub fn rule(random: &mut Random, id: u64) -> Rule {
    let protocol = match random.below(9) {
        0 => Protocol::Any,
        1 | 2 => Protocol::Tcp(ports(random)),
        3 | 4 => Protocol::Udp(ports(random)),
        5 => Protocol::Icmp { kind: None, code: None },
        6 => Protocol::Icmp {
            kind: Some(random.pick(&[0, 3, 8, 13])),
            code: random.chance(50).then_some(0),
        },
        7 => Protocol::Icmpv6 {
            kind: [None, Some(128), Some(1), Some(135)][random.below(4) as usize],
            code: random.chance(50).then_some(0),
        },
        _ => Protocol::Number(random.pick(&[1, 6, 17, 47, 58])),
    };
    Rule { id: RuleId::from_random(id.into()), protocol, peer: peer(random) }
}

fn ports(random: &mut Random) -> PortRange {
    match random.below(3) {
        0 => PortRange::ALL,
        1 => PortRange::single(random.pick(&PORTS)),
        _ => {
            let (a, b) = (random.pick(&PORTS), random.pick(&PORTS));
            PortRange::new(a.min(b), a.max(b)).unwrap()
        }
    }
}

pub fn list_id(n: u64) -> PrefixListId {
    PrefixListId::from_random(u128::from(n) + 200)
}

/// Two of IPv4 and one of IPv6; one may be empty.
fn lists(random: &mut Random) -> Vec<PrefixList> {
    let list = |n: u64| {
        let mut entries: Vec<ListEntry> = Vec::new();
        for _ in 0..random.below(5) {
            let net = network(random, n == 2);
            if entries.iter().all(|e| e.net != net) {
                entries.push(ListEntry { net, description: format!("entry {net}") });
            }
        }
        PrefixList { id: list_id(n), version: 1 + random.below(9), entries_max: 5, entries }
    };
    (0..3).map(list).collect()
}

fn network(random: &mut Random, six: bool) -> IpNet {
    if six {
        let length = random.pick(&[0, 32, 48, 64, 120, 128, 128]);
        return IpNet::V6(Ipv6Net::new(any_address6(random), length).unwrap().trunc());
    }
    let length = random.pick(&[0, 8, 16, 24, 30, 32, 32]);
    IpNet::V4(Ipv4Net::new(any_address(random), length).unwrap().trunc())
}

fn peer(random: &mut Random) -> Peer {
    if random.chance(35) {
        return Peer::Group(group(random.below(6)));
    }
    if random.chance(15) {
        return Peer::PrefixList(list_id(random.below(3)));
    }
    let six = random.chance(35);
    Peer::Cidr(network(random, six))
}

pub fn any_address(random: &mut Random) -> Ipv4Addr {
    match random.below(10) {
        0..=2 => address(random.below(GUESTS as u64) as usize),
        3 => secondary(random.below(GUESTS as u64) as usize),
        4 if random.chance(30) => gateway(1 + random.below(2)).elastic,
        4 | 5 => elastic(random.below(GUESTS as u64 + 1) as usize),
        6..=8 => Ipv4Addr::from(random.pick(&WORLD)),
        _ => Ipv4Addr::from(random.next() as u32),
    }
}

pub fn any_address6(random: &mut Random) -> Ipv6Addr {
    const WORLD6: [&str; 4] = ["2001:db8:9::9", "2001:db8:bad::1", "2600::1", "fe80::9"];
    match random.below(10) {
        0..=5 => {
            let (n, k) = (random.below(GUESTS as u64) as usize, random.below(3));
            address6(n, k)
        }
        6..=8 => random.pick(&WORLD6).parse().unwrap(),
        _ => Ipv6Addr::from(u128::from(random.next()) << 64 | u128::from(random.next())),
    }
}

pub fn both_directions() -> [Direction; 2] {
    [Direction::Ingress, Direction::Egress]
}
