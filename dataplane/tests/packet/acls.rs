//! Network ACLs: compiled entries decide as the model's, and packets meet those of both
//! subnets, whatever the groups say and whatever flow they are of.

use std::net::IpAddr;

use bytemuck::Zeroable as _;
use dataplane::compile::{Host, Tables, compile};
use ebpf::layout::Interface as Record;
use ebpf::packet::HEAD_LEN;
use ebpf::{Arrival, GATEWAY_MAC, Head, Reason, Work};
use etherparse::PacketBuilder;
use ipnet::IpNet;
use model::network_acl::{ENTRIES_MAX, Entry};
use model::security_group::{Header, permits};
use model::{Direction, NetworkAcl, NetworkAclId, Peer, Protocol, VpcId};
use rpc::dataplane::{Desired, Interface};

use crate::random::Random;
use crate::world::{
    GUESTS, PORTS, any_address, any_address6, both_directions, desired, imagined_devices, rule,
};

pub fn acl_id(n: u64) -> NetworkAclId {
    NetworkAclId::from_random(u128::from(n) + 70)
}

/// Two of the first network and one of the second, most of them mild.
pub fn acls(random: &mut Random) -> Vec<NetworkAcl> {
    let entry = |random: &mut Random, direction, number| {
        let rule = rule(random, 0);
        let net = match rule.peer {
            Peer::Cidr(net) => net,
            Peer::Group(_) | Peer::PrefixList(_) => IpNet::from(IpAddr::V4(any_address(random))),
        };
        let allow = random.chance(60);
        Entry { number, direction, allow, protocol: rule.protocol, net }
    };
    let acl = |random: &mut Random, n: u64| {
        let mut entries = Vec::new();
        for direction in both_directions() {
            let count = random.below(6) as u16;
            // In no order.
            entries.extend((0..count).map(|k| entry(random, direction, 100 - k * 7)));
            if random.chance(80) {
                let mut all = |number, net: &str| {
                    let (protocol, net) = (Protocol::Any, net.parse().unwrap());
                    entries.push(Entry { number, direction, allow: true, protocol, net });
                };
                all(200, "0.0.0.0/0");
                all(201, "::/0");
            }
        }
        NetworkAcl { id: acl_id(n), vpc: VpcId::from_random(if n < 2 { 1 } else { 2 }), entries }
    };
    (0..3).map(|n| acl(random, n)).collect()
}

fn header(random: &mut Random) -> Header {
    let six = random.chance(40);
    let protocol = random.pick(&[1, 6, 6, 17, 17, 47, 58]);
    let detail = match protocol {
        1 if !six => (random.pick(&[0, 3, 8, 13]) << 8) | random.below(2) as u16,
        58 if six => (random.pick(&[1, 128, 135]) << 8) | random.below(2) as u16,
        6 | 17 => random.pick(&PORTS),
        _ => 0,
    };
    let remote = if six { any_address6(random).into() } else { any_address(random).into() };
    Header { remote, protocol, detail }
}

/// Whether the tables let it cross, by which entry: its number.
fn crosses(
    host: &Host,
    record: &Record,
    direction: Direction,
    header: &Header,
) -> (bool, Option<u16>) {
    use ebpf::{Tables as _, V6, tables::Question};
    let place = match direction {
        Direction::Ingress => record.acl_ingress,
        Direction::Egress => record.acl_egress,
    };
    let Some(slot) = u32::from(place).checked_sub(1) else { return (true, None) };
    let Header { protocol, detail, .. } = *header;
    let bit = match header.remote {
        IpAddr::V4(remote) => {
            let remote = remote.into();
            host.classify(slot, &Question { remote, identity: 0, protocol, detail })
        }
        IpAddr::V6(remote) => {
            let remote = V6::from_bits(remote.to_bits());
            host.classify6(slot, &Question { remote, identity: 0, protocol, detail })
        }
    };
    let Some(bit) = bit.checked_sub(1) else { return (false, None) };
    let allow = host.policy(slot).unwrap().allow >> bit & 1 != 0;
    let (_, numbers) = &host.tables().names.acls[&(record.ifindex, direction)];
    (allow, Some(numbers[bit as usize]))
}

fn acl_of<'a>(desired: &'a Desired, interface: &Interface) -> Option<&'a NetworkAcl> {
    let id = interface.network_acl?;
    desired.network_acls.iter().find(|a| a.id == id)
}

fn record<'a>(host: &'a Host, interface: &Interface) -> &'a Record {
    let mut records = host.tables().interfaces.values();
    records.find(|r| r.mac == interface.mac.octets()).unwrap()
}

/// Disagreements, denials, permissions.
fn compare(random: &mut Random, desired: &Desired, host: &Host, count: u64) -> [u64; 3] {
    let mut told = [0; 3];
    for interface in &desired.interfaces {
        let Some(acl) = acl_of(desired, interface) else { continue };
        for direction in both_directions() {
            for _ in 0..count {
                let header = header(random);
                if header.remote.is_ipv6() && interface.subnet6.is_none() {
                    continue;
                }
                let (crosses, by) = crosses(host, record(host, interface), direction, &header);
                let entry = acl.decide(direction, &header);
                let same_entry = crosses || by == entry.map(|e| e.number);
                let right = crosses == acl.permits(direction, &header) && same_entry;
                told[0] += u64::from(!right);
                told[1 + usize::from(crosses)] += 1;
            }
        }
    }
    told
}

#[test]
fn compiled_entries_decide_as_the_models() {
    let mut random = Random::seeded("acls", 41);
    let mut loaded = Tables::default();
    let mut sum = [0; 3];
    for world in 0..300 {
        let desired = desired(&mut random, 2);
        let tables = compile(&desired, &imagined_devices(), &loaded).unwrap();
        let told = compare(&mut random, &desired, &Host::new(tables.clone()), 60);
        assert_eq!(told[0], 0, "world {world}: {desired:#?}");
        sum.iter_mut().zip(told).for_each(|(sum, told)| *sum += told);
        loaded = tables;
    }
    assert!(sum[1] > 2000 && sum[2] > 2000, "{sum:?}");
}

#[test]
fn an_entry_that_permits_where_it_should_deny_is_noticed() {
    let mut random = Random::seeded("acls, sabotaged", 42);
    let mut noticed = 0;
    for _ in 0..40 {
        let desired = desired(&mut random, 2);
        let mut tables = compile(&desired, &imagined_devices(), &Tables::default()).unwrap();
        tables
            .policies
            .values_mut()
            .for_each(|p| std::sync::Arc::make_mut(&mut p.content).allow = u64::MAX);
        noticed += u64::from(compare(&mut random, &desired, &Host::new(tables), 60)[0] > 0);
    }
    assert!(noticed >= 10, "only {noticed} of 40 sabotaged worlds were noticed");
}

/// Whether the model lets a packet of no flow pass between two guests of a network.
fn passes(desired: &Desired, from: &Interface, to: &Interface, port: u16) -> bool {
    let header = |remote: std::net::Ipv4Addr| Header {
        remote: remote.into(),
        protocol: Protocol::UDP,
        detail: port,
    };
    let groups = |i: &Interface| {
        let known = |id| desired.groups.iter().find(|g| g.id == id).unwrap();
        i.groups.iter().map(|id| known(*id)).collect::<Vec<_>>()
    };
    let of = |i: &Interface| i.groups.iter().copied().collect();
    let apart = from.subnet != to.subnet;
    let acl = |i: &Interface, direction, header: &Header| {
        !apart || acl_of(desired, i).is_none_or(|a| a.permits(direction, header))
    };
    let (out, into) = (header(to.address), header(from.address));
    let lists = &desired.prefix_lists;
    acl(from, Direction::Egress, &out)
        && permits(groups(from), lists, Direction::Egress, &of(to), &out).is_some()
        && acl(to, Direction::Ingress, &into)
        && permits(groups(to), lists, Direction::Ingress, &of(from), &into).is_some()
}

/// Asks the decision itself, with the interfaces' groups and ACLs of both ends.
fn decided(host: &Host, from: &Interface, to: &Interface, port: u16) -> Reason {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(from.mac.octets(), GATEWAY_MAC)
        .ipv4(from.address.octets(), to.address.octets(), 64)
        .udp(40_001, port)
        .write(&mut frame, &[0; 20])
        .unwrap();
    let head = Head::of(frame[..HEAD_LEN].try_into().unwrap());
    let ifindex = record(host, from).ifindex;
    let arrival = Arrival { ifindex, vlan: false, to_host: true, now_s: 1000 };
    let mut work: Work = Work::zeroed();
    ebpf::decide::from_instance(host, frame.as_slice(), &head, &arrival, &mut work);
    work.verdict.reason
}

#[test]
fn a_packet_passes_where_both_ends_acls_and_groups_permit_it() {
    let mut random = Random::seeded("acls and groups", 43);
    let mut met = std::collections::BTreeMap::new();
    for world in 0..400 {
        let mut desired = desired(&mut random, 12);
        desired.interfaces.iter_mut().for_each(|i| i.route_table = None);
        let tables = compile(&desired, &imagined_devices(), &Tables::default()).unwrap();
        let host = Host::new(tables);
        for from in &desired.interfaces {
            for to in desired.interfaces.iter().filter(|i| i.vpc == from.vpc && i.id != from.id) {
                for port in PORTS {
                    let reason = decided(&host, from, to, port);
                    let expected = passes(&desired, from, to, port);
                    assert_eq!(reason.accepts(), expected, "world {world}: {reason:?} {from:#?}");
                    *met.entry(reason.name()).or_insert(0) += 1;
                }
            }
        }
    }
    for reason in [
        Reason::NewFlow,
        Reason::AclEgressDenied,
        Reason::AclIngressDenied,
        Reason::EgressDenied,
        Reason::IngressDenied,
    ] {
        assert!(met.get(reason.name()).is_some_and(|n| *n > 20), "{reason:?} of {met:?}");
    }
}

/// A world in which the first guest has the first ACL, of these entries.
fn guarded(entries: Vec<Entry>) -> Desired {
    let mut random = Random::seeded("guarded", 44);
    let mut world = desired(&mut random, 0);
    while world.interfaces.len() < GUESTS {
        world = desired(&mut random, 0);
    }
    world.interfaces[0].network_acl = Some(acl_id(0));
    world.network_acls[0].entries = entries;
    world
}

fn entry(number: u16, direction: Direction, net: &str) -> Entry {
    let (protocol, net) = (Protocol::Any, net.parse().unwrap());
    Entry { number, direction, allow: true, protocol, net }
}

fn refused(world: &Desired) -> String {
    compile(world, &imagined_devices(), &Tables::default()).unwrap_err().to_string()
}

#[test]
fn forty_entries_a_direction_are_the_limit_and_work() {
    let numbers = 1..=ENTRIES_MAX as u16;
    let ingress = numbers.map(|n| Entry {
        allow: n % 3 != 0,
        ..entry(n * 5, Direction::Ingress, &format!("{}.0.0.0/{}", n * 6, 1 + n % 20))
    });
    let mut world = guarded(ingress.collect());
    let tables = compile(&world, &imagined_devices(), &Tables::default()).unwrap();
    let mut random = Random::seeded("forty entries", 45);
    assert_eq!(compare(&mut random, &world, &Host::new(tables), 3000)[0], 0);
    world.network_acls[0].entries.push(entry(1000, Direction::Ingress, "0.0.0.0/0"));
    assert!(refused(&world).contains("41 ingress entries, but 40 are the most"));
}

#[test]
fn an_acl_that_permits_all_costs_nothing_and_one_that_contradicts_itself_is_refused() {
    use Direction::{Egress, Ingress};
    let places = |world: &Desired| {
        let tables = compile(world, &imagined_devices(), &Tables::default()).unwrap();
        let i = record(&Host::new(tables), &world.interfaces[0]).to_owned();
        (i.acl_ingress != 0, i.acl_egress != 0)
    };
    // As EC2's default has it; without IPv6, of IPv4 alone.
    let default = |net| [entry(100, Ingress, net), entry(100, Egress, net)];
    let mut world = guarded(default("0.0.0.0/0").to_vec());
    world.interfaces[0].subnet6 = Some("2001:db8:1:1::/64".parse().unwrap());
    assert_eq!(places(&world), (true, true));
    let six = [entry(101, Ingress, "::/0"), entry(101, Egress, "::/0")];
    world.network_acls[0].entries.extend(six);
    assert_eq!(places(&world), (false, false));
    let denied = Entry { allow: false, ..entry(99, Egress, "192.0.2.0/24") };
    world.network_acls[0].entries.push(denied);
    assert_eq!(places(&world), (false, true));
    // Behind the one that permits all it says nothing.
    world.network_acls[0].entries.last_mut().unwrap().number = 400;
    assert_eq!(places(&world), (false, false));
    // None at all denies all.
    assert_eq!(places(&guarded(Vec::new())), (true, true));

    assert!(refused(&guarded(vec![entry(0, Ingress, "::/0")])).contains("numbers are 1 to 32766"));
    let twice = vec![entry(7, Ingress, "::/0"), entry(7, Ingress, "0.0.0.0/0")];
    assert!(refused(&guarded(twice)).contains("ingress entry 7"));
    let mut world = guarded(Vec::new());
    world.interfaces[0].network_acl = Some(acl_id(2));
    assert!(refused(&world).contains("belongs to another network"));
    world.interfaces[0].network_acl = Some(acl_id(9));
    assert!(refused(&world).contains("is not in the desired state"));
}
