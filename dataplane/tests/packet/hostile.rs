//! What a hostile guest sends: nothing of it passes, each frame is counted under
//! its reason, and the loaded programs are the ones that are asked.

use std::collections::BTreeMap;

use dataplane::compile::compile;
use dataplane::load::Loaded;
use ebpf::layout::Interface;
use ebpf::{GATEWAY_MAC, ROUTER_ADDRESS6, Reason, TRACE_MARK, V6};
use etherparse::PacketBuilder;
use ipnet::Ipv6Net;
use model::network_acl::Entry;
use model::route_table::Target;
use model::{Direction, Peer, PortRange, Protocol, Route, Rule, RuleId};
use nix::net::if_::if_nametoindex;
use rpc::dataplane::Desired;

use crate::acls::acl_id;
use crate::agree::Bench;
use crate::random::Random;
use crate::routes::table_id;
use crate::world::{address6, devices, elastic, interface_id, peopled};

const FRAMES: usize = 10_000;
const DROP: i32 = 2;

/// A liar, and what it is caught at.
type Lie = (Reason, fn(&mut Random, &Interface, &Interface) -> Vec<u8>);

const LIES: [Lie; 32] = [
    (Reason::SpoofedMac, |r, me, _| udp(any_mac(r), me.address, any(r), r)),
    (Reason::SpoofedMac, |_, me, other| arp(other.mac, me.mac, me.address, me.subnet + 1, 1)),
    (Reason::SpoofedAddress, |r, me, _| udp(me.mac, any(r), any(r), r)),
    (Reason::SpoofedAddress, |r, me, other| udp(me.mac, other.address, any(r), r)),
    (Reason::SpoofedAddress, |r, me, _| udp(me.mac, me.elastic, any(r), r)),
    (Reason::SpoofedArp, |_, me, other| arp(me.mac, me.mac, other.address, me.subnet + 1, 1)),
    (Reason::SpoofedArp, |_, me, other| arp(me.mac, other.mac, me.address, me.subnet + 1, 1)),
    // A gratuitous answer: "I am the gateway".
    (Reason::SpoofedArp, |_, me, _| arp(me.mac, me.mac, me.subnet + 1, me.subnet + 9, 2)),
    (Reason::ArpIgnored, |_, me, other| arp(me.mac, me.mac, me.address, other.address, 2)),
    (Reason::SpoofedDhcp, |_, me, other| dhcp_offer(me, other.address)),
    (Reason::SpoofedDhcp, |_, me, _| dhcp_offer(me, u32::MAX)),
    (Reason::Vlan, |r, me, _| with_type(udp(me.mac, me.address, any(r), r), &[0x8100, 0x88a8], r)),
    (Reason::EtherType, |r, me, _| {
        with_type(udp(me.mac, me.address, any(r), r), &[0x8847, 0x8863, 0x88cc, 0x0842], r)
    }),
    (Reason::Malformed, |r, me, _| with_type(udp(me.mac, me.address, any(r), r), &[0x86dd], r)),
    (Reason::SpoofedMac, |r, me, _| udp6(any_mac(r), own6(me), any6(r), r)),
    (Reason::SpoofedAddress, |r, me, _| udp6(me.mac, any6(r), any6(r), r)),
    (Reason::SpoofedAddress, |r, me, other| udp6(me.mac, own6(other), any6(r), r)),
    (Reason::SpoofedAddress, |r, me, _| udp6(me.mac, ROUTER_ADDRESS6, any6(r), r)),
    (Reason::SpoofedNeighbour, |_, me, other| link(me.mac, own6(other), 135, any_target(), me.mac)),
    (Reason::SpoofedNeighbour, |_, me, other| link(me.mac, own6(me), 135, any_target(), other.mac)),
    (Reason::SpoofedNeighbour, |_, me, other| link(me.mac, own6(me), 136, own6(other), me.mac)),
    // "I am the router", by its address and by an advertisement.
    (Reason::SpoofedNeighbour, |_, me, _| link(me.mac, own6(me), 136, ROUTER_ADDRESS6, me.mac)),
    (Reason::SpoofedNeighbour, |_, me, _| link(me.mac, own6(me), 134, any_target(), me.mac)),
    (Reason::SpoofedDhcp, |_, me, other| dhcp6_advertise(me, own6(other))),
    (Reason::ExtensionHeader, |r, me, _| routed(udp6(me.mac, own6(me), any6(r), r))),
    (Reason::FragmentTiny, |r, me, _| piece(tcp(me, any(r)), 0x2000, 16)),
    (Reason::FragmentTiny, |r, me, _| piece(tcp(me, any(r)), 1 + r.below(2) as u16, 16)),
    (Reason::FragmentLost, |r, me, _| {
        piece(udp(me.mac, me.address, any(r), r), 1 + r.below(0x1ff0) as u16, 16)
    }),
    // A DHCP request that only comes whole.
    (Reason::Fragment, |_, me, _| piece(dhcp_request(me), 0x2000, 248)),
    (Reason::Malformed, runt),
    (Reason::Malformed, contradiction),
    (Reason::NoRoute, |r, me, _| udp(me.mac, me.address, nowhere(r), r)),
];

fn any(random: &mut Random) -> u32 {
    0x0b00_0000 | random.next() as u32 & 0x00ff_ffff
}

fn nowhere(random: &mut Random) -> u32 {
    random.pick(&[0x7f00_0001, 0xe000_0001, 0xffff_ffff, 0, 0xa9fe_0101])
}

fn any6(random: &mut Random) -> V6 {
    V6 { high: 0x2600 << 48 | random.next() >> 16, low: random.next() }
}

/// As `open_world` has it.
fn own6(me: &Interface) -> V6 {
    let n = usize::from(me.mac[5]);
    V6::from_bits(address6(n, 0).to_bits())
}

fn any_target() -> V6 {
    V6::from_bits(address6(0, 99).to_bits())
}

fn udp6(mac: [u8; 6], from: V6, to: V6, random: &mut Random) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac, GATEWAY_MAC)
        .ipv6(from.bytes(), to.bytes(), 64)
        .udp(1024 + random.below(60_000) as u16, 53)
        .write(&mut frame, &[0; 20])
        .unwrap();
    frame
}

fn link(mac: [u8; 6], from: V6, kind: u8, target: V6, told: [u8; 6]) -> Vec<u8> {
    let mut body = target.bytes().to_vec();
    body.extend([if kind == 136 { 2 } else { 1 }, 1]);
    body.extend(told);
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac, GATEWAY_MAC)
        .ipv6(from.bytes(), ROUTER_ADDRESS6.bytes(), 255)
        .icmpv6_raw(kind, 0, [0x60, 0, 0, 0])
        .write(&mut frame, &body)
        .unwrap();
    frame
}

fn dhcp6_advertise(me: &Interface, to: V6) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(me.mac, GATEWAY_MAC)
        .ipv6(own6(me).bytes(), to.bytes(), 64)
        .udp(547, 546)
        .write(&mut frame, &[2; 24])
        .unwrap();
    frame
}

/// With a routing header of type 0.
fn routed(mut frame: Vec<u8>) -> Vec<u8> {
    let len = u16::from_be_bytes([frame[18], frame[19]]) + 24;
    frame[18..20].copy_from_slice(&len.to_be_bytes());
    let mut header = vec![frame[20], 2, 0, 1];
    header.resize(24, 0);
    frame[20] = 43;
    frame.splice(54..54, header);
    frame
}

fn any_mac(random: &mut Random) -> [u8; 6] {
    let [a, b, c, d, ..] = random.next().to_be_bytes();
    [0x0e, 0, a, b, c, d]
}

fn udp(mac: [u8; 6], from: u32, to: u32, random: &mut Random) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac, GATEWAY_MAC)
        .ipv4(from.to_be_bytes(), to.to_be_bytes(), 64)
        .udp(1024 + random.below(60_000) as u16, 53)
        .write(&mut frame, &[0; 20])
        .unwrap();
    frame
}

fn arp(mac: [u8; 6], sender_mac: [u8; 6], sender: u32, target: u32, operation: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, operation]);
    frame.extend(sender_mac);
    frame.extend(sender.to_be_bytes());
    frame.extend([0; 6]);
    frame.extend(target.to_be_bytes());
    frame
}

/// A piece with so many bytes of data.
fn piece(mut frame: Vec<u8>, place: u16, len: usize) -> Vec<u8> {
    frame.truncate(34 + len);
    frame[16..18].copy_from_slice(&(20 + len as u16).to_be_bytes());
    frame[20..22].copy_from_slice(&place.to_be_bytes());
    frame
}

fn tcp(me: &Interface, to: u32) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(me.mac, GATEWAY_MAC)
        .ipv4(me.address.to_be_bytes(), to.to_be_bytes(), 64)
        .tcp(4000, 80, 1, 1000)
        .syn()
        .write(&mut frame, &[])
        .unwrap();
    frame
}

fn dhcp_request(me: &Interface) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(me.mac, [0xff; 6])
        .ipv4([0; 4], [255; 4], 64)
        .udp(68, 67)
        .write(&mut frame, &[1; 240])
        .unwrap();
    frame
}

fn dhcp_offer(me: &Interface, to: u32) -> Vec<u8> {
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(me.mac, [0xff; 6])
        .ipv4(me.address.to_be_bytes(), to.to_be_bytes(), 64)
        .udp(67, 68)
        .write(&mut frame, &[2; 240])
        .unwrap();
    frame
}

fn with_type(mut frame: Vec<u8>, types: &[u16], random: &mut Random) -> Vec<u8> {
    frame[12..14].copy_from_slice(&random.pick(types).to_be_bytes());
    frame
}

/// Cut short, behind the shortest that the kernel runs a program on.
fn runt(random: &mut Random, me: &Interface, _: &Interface) -> Vec<u8> {
    let mut frame = udp(me.mac, me.address, any(random), random);
    frame.truncate(34 + random.below(20) as usize);
    frame
}

/// Lengths that cannot be.
fn contradiction(random: &mut Random, me: &Interface, _: &Interface) -> Vec<u8> {
    let mut frame = udp(me.mac, me.address, any(random), random);
    match random.below(4) {
        0 => frame[14] = 0x45 - 1 - random.below(5) as u8,
        1 => frame[14] = 0x55,
        2 => frame[17] = frame[17].wrapping_add(1 + random.below(100) as u8),
        _ => frame[39] = random.below(8) as u8,
    }
    frame
}

/// Groups that permit everything: what is caught is not caught by a rule.
pub fn open_world(random: &mut Random) -> Desired {
    let mut world = peopled(random);
    for (n, interface) in world.interfaces.iter_mut().enumerate() {
        interface.source_check = true;
        interface.route_table = None;
        interface.network_acl = None;
        interface.ipv6 = vec![address6(n, 0)];
        interface.subnet6 = Some(Ipv6Net::new(address6(n, 0), 64).unwrap().trunc());
        interface.elastic = Some(elastic(n));
        interface.groups = vec![world.groups[if n < 3 { 0 } else { 4 }].id];
    }
    for (n, group) in world.groups.iter_mut().enumerate() {
        let id = RuleId::from_random(n as u128);
        let peer = Peer::Cidr("0.0.0.0/0".parse().unwrap());
        group.egress = vec![Rule { id, protocol: Protocol::Any, peer }];
        group.ingress = group.egress.clone();
    }
    world
}

/// What a guest tries whose subnet has a route table and a network ACL.
const TRIES: [Lie; 13] = [
    (Reason::Blackhole, |r, me, _| udp(me.mac, me.address, host_of(0x0b00_0000, r), r)),
    (Reason::Blackhole, |r, me, _| tcp(me, host_of(0x0b00_0000, r))),
    (Reason::Blackhole, |r, me, _| udp6(me.mac, own6(me), host6_of(0x2600, r), r)),
    // No route has it, and there is no default.
    (Reason::NoRoute, |r, me, _| udp(me.mac, me.address, host_of(0x0c00_0000, r), r)),
    (Reason::NoRoute, |r, me, _| udp6(me.mac, own6(me), host6_of(0x2601, r), r)),
    (Reason::AclEgressDenied, |r, me, _| udp(me.mac, me.address, host_of(0x0d00_0000, r), r)),
    (Reason::AclEgressDenied, |r, me, _| tcp(me, host_of(0x0d00_0000, r))),
    (Reason::AclEgressDenied, |r, me, _| udp6(me.mac, own6(me), host6_of(0x2602, r), r)),
    // The neighbour's own subnet does not want it.
    (Reason::AclIngressDenied, |_, me, other| tcp(me, other.address)),
    // What they say is not asked before who says it.
    (Reason::SpoofedAddress, |r, me, other| udp(me.mac, other.address, host_of(0x0b00_0000, r), r)),
    (Reason::SpoofedMac, |r, me, _| udp(any_mac(r), me.address, host_of(0x0d00_0000, r), r)),
    // The tail of what never had a head, past the table and the ACL.
    (Reason::Blackhole, |r, me, _| {
        piece(udp(me.mac, me.address, host_of(0x0b00_0000, r), r), 1 + r.below(0x1ff0) as u16, 16)
    }),
    (Reason::FragmentTiny, |r, me, _| piece(tcp(me, host_of(0x0d00_0000, r)), 0x2000, 16)),
];

fn host_of(net: u32, random: &mut Random) -> u32 {
    net | random.next() as u32 & 0x00ff_ffff
}

fn host6_of(net: u64, random: &mut Random) -> V6 {
    V6 { high: net << 48 | random.next() >> 16, low: random.next() }
}

/// The same world; each subnet has routes to some of the internet, of which the ACL denies a part.
fn guarded_world(random: &mut Random) -> Desired {
    let mut world = open_world(random);
    let net = |text: &str| text.parse::<ipnet::IpNet>().unwrap();
    let route = |to, target| Route { destination: net(to), target };
    for (n, table) in world.route_tables.iter_mut().enumerate() {
        table.id = table_id(n as u64);
        table.local = vec![net("10.0.0.0/8"), net("2001:db8::/32")];
        table.routes = vec![
            route("11.0.0.0/8", Target::Blackhole),
            route("13.0.0.0/8", Target::InternetGateway),
            route("14.0.0.0/8", Target::InternetGateway),
            route("2600::/16", Target::Blackhole),
            route("2602::/16", Target::InternetGateway),
        ];
    }
    let allow = |number, direction, to, allow| Entry {
        number,
        direction,
        allow,
        protocol: Protocol::Any,
        net: net(to),
    };
    for (n, acl) in world.network_acls.iter_mut().enumerate() {
        acl.id = acl_id(n as u64);
        acl.entries = vec![
            allow(10, Direction::Egress, "13.0.0.0/8", false),
            allow(20, Direction::Egress, "2602::/16", false),
            allow(30, Direction::Egress, "0.0.0.0/0", true),
            allow(40, Direction::Egress, "::/0", true),
            Entry {
                protocol: Protocol::Tcp(PortRange::single(80)),
                ..allow(5, Direction::Ingress, "10.0.0.0/24", false)
            },
            allow(10, Direction::Ingress, "0.0.0.0/0", true),
        ];
    }
    for (n, interface) in world.interfaces.iter_mut().enumerate() {
        let of_vpc = if n < 3 { 0 } else { 2 };
        interface.route_table = Some(table_id(of_vpc));
        interface.network_acl = Some(acl_id(of_vpc));
    }
    world
}

#[test]
fn of_ten_thousand_hostile_frames_none_passes_and_each_is_counted() {
    let name = "of_ten_thousand_hostile_frames_none_passes_and_each_is_counted";
    none_passes(name, &LIES, open_world, any);
}

#[test]
fn of_ten_thousand_tries_to_get_round_routes_and_acls_none_passes() {
    let name = "of_ten_thousand_tries_to_get_round_routes_and_acls_none_passes";
    // What no entry and no route keeps back.
    let honest = |random: &mut Random| host_of(0x0e00_0000, random);
    none_passes(name, &TRIES, guarded_world, honest);
}

/// Frames of `lies` by turns; an honest one, to an address that `honest` picks, passes.
fn none_passes(
    name: &str,
    lies: &[Lie],
    world: fn(&mut Random) -> Desired,
    honest: fn(&mut Random) -> u32,
) {
    let Some(bench) = Bench::new(name) else { return };
    let mut random = Random::seeded("hostile", 61);
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let devices = devices(|name| if_nametoindex(name).unwrap());
    let tables = compile(&world(&mut random), &devices, loaded.tables()).unwrap();
    loaded.update(tables).unwrap();
    let guests: Vec<Interface> = loaded.tables().interfaces.values().copied().collect();
    // All is well with the same guest's honest packets.
    let to = honest(&mut random);
    let honest = udp(guests[0].mac, guests[0].address, to, &mut random);
    let run = loaded.run(guests[0].ifindex, &honest, TRACE_MARK).unwrap();
    assert_eq!(run.reason, Some(Reason::NewFlow));

    let mut sent: BTreeMap<String, u64> = BTreeMap::new();
    for n in 0..FRAMES {
        let (reason, lie) = lies[n % lies.len()];
        let me = &guests[n / lies.len() % 2];
        let frame = lie(&mut random, me, &guests[2]);
        let run = loaded.run(me.ifindex, &frame, TRACE_MARK).unwrap();
        assert_eq!(run.code, DROP, "{reason:?} passed: {frame:02x?}");
        assert_eq!(run.reason, Some(reason), "{frame:02x?}");
        *sent.entry(reason.name().to_owned()).or_default() += 1;
    }
    let mut counted: BTreeMap<String, u64> = BTreeMap::new();
    // A receiver counts what came so far, too.
    let mut interfaces = loaded.counters().unwrap().interfaces;
    for reasons in (0..2).filter_map(|n| interfaces.remove(&interface_id(n))) {
        for (reason, count) in reasons {
            *counted.entry(reason).or_default() += count;
        }
    }
    assert_eq!(counted.remove("new-flow"), Some(1));
    assert_eq!(counted, sent);
    eprintln!("{FRAMES} hostile frames, 0 passed: {sent:#?}");
}
