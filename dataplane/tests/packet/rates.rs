//! Rates in the loaded programs: what passes is bounded by bytes and packets that
//! are counted here. The rates are so small that the time which a test takes adds
//! next to nothing, and where it does, it is reckoned with.

use std::net::Ipv6Addr;

use dataplane::compile::compile;
use dataplane::load::Loaded;
use ebpf::rate::{BYTES_MIN, PACKETS_MIN, SERVICE_PACKETS_A_SECOND};
use ebpf::{Reason, TRACE_MARK};
use etherparse::PacketBuilder;
use ipnet::Ipv6Net;
use model::{InterfaceId, Mac, Peer, Protocol, Rule, RuleId};
use nix::net::if_::if_nametoindex;
use nix::time::{ClockId, clock_gettime};
use rpc::dataplane::{Allowance, Desired, Device, MOVED_FLOWS_VERSION, MovedFlows, Rates};

use crate::agree::Bench;
use crate::random::Random;
use crate::world::{
    UPLINK, UPLINK_MAC, address, address6, desired, devices, elastic, group, guest, guest_mac,
};

const LEN: u64 = 1000;
/// 125 bytes a second: a frame in eight seconds.
const SLOW: Allowance = Allowance { baseline: 1000, peak: 1000, credit: 0 };
const FRAMES: u64 = BYTES_MIN / LEN;
/// What may pass besides, were the test to take minutes.
const SLACK: u64 = 60;

pub fn index(name: &str) -> u32 {
    if_nametoindex(name).unwrap()
}

/// Guests 0 and 1 in one network, both with elastic addresses, everything permitted.
pub fn open_world() -> Desired {
    let mut random = Random::seeded("rates", 5);
    let both = [guest(0), guest(1)];
    let mut found = loop {
        let mut found = desired(&mut random, 0);
        found.interfaces.retain(|i| both.contains(&i.device.name().to_owned()));
        if found.interfaces.len() == 2 && found.uplink.is_some() {
            break found;
        }
    };
    let anything = |id: u128| Rule {
        id: RuleId::from_random(id),
        protocol: Protocol::Any,
        peer: Peer::Cidr("0.0.0.0/0".parse().unwrap()),
    };
    found.groups.retain(|g| g.id == group(0));
    found.groups[0].ingress = vec![anything(1)];
    found.groups[0].egress = vec![anything(2)];
    found.blocklist.clear();
    // The world's addresses here are documentation's.
    found.uplink.as_mut().unwrap().bogons = false;
    for interface in &mut found.interfaces {
        let Device::Existing { name } = &interface.device else { unreachable!() };
        interface.elastic = Some(elastic(usize::from(*name == guest(1))));
        interface.groups = vec![group(0)];
        interface.route_table = None;
        interface.network_acl = None;
    }
    found
}

pub struct World {
    pub desired: Desired,
    pub loaded: Loaded,
    _bench: Bench,
}

impl World {
    pub fn new(test: &str) -> Option<Self> {
        let bench = Bench::new(test)?;
        let loaded = Loaded::open(&bench.deployment).unwrap();
        let mut world = Self { desired: open_world(), loaded, _bench: bench };
        world.apply();
        Some(world)
    }

    /// An address of IPv6 for the first guest.
    fn give_ipv6(&mut self) {
        let address = address6(0, 0);
        let interface = &mut self.desired.interfaces[0];
        interface.ipv6 = vec![address];
        interface.subnet6 = Some(Ipv6Net::new(address, 64).unwrap().trunc());
        self.apply();
    }

    pub fn apply(&mut self) {
        let devices = devices(index);
        let tables = compile(&self.desired, &devices, self.loaded.tables()).unwrap();
        self.loaded.update(tables).unwrap();
    }

    fn limit(&mut self, n: usize, rates: Rates) {
        let interface =
            self.desired.interfaces.iter_mut().find(|i| i.device.name() == guest(n)).unwrap();
        interface.rates = rates;
        self.apply();
    }

    fn share(&mut self, n: usize, of: Option<InterfaceId>) {
        let interface =
            self.desired.interfaces.iter_mut().find(|i| i.device.name() == guest(n)).unwrap();
        interface.rates_of = of;
        self.apply();
    }

    pub fn run(&self, device: &str, frame: &[u8]) -> Reason {
        self.loaded.run(index(device), frame, TRACE_MARK).unwrap().reason.unwrap()
    }

    /// Sends so many frames from one guest to the other; how many pass.
    fn between(&self, from: usize, to: usize, count: u64) -> u64 {
        let frame = udp(guest_mac(from), address(from).octets(), address(to).octets(), 4000);
        (0..count).filter(|_| self.run(&guest(from), &frame).accepts()).count() as u64
    }

    fn counted(&self, n: usize, reason: Reason) -> u64 {
        let id = self.desired.interfaces.iter().find(|i| i.device.name() == guest(n)).unwrap().id;
        let counters = self.loaded.counters().unwrap();
        counters.interfaces[&id].get(reason.name()).copied().unwrap_or(0)
    }
}

fn udp(source: Mac, from: [u8; 4], to: [u8; 4], port: u16) -> Vec<u8> {
    let destination = if source == UPLINK_MAC { UPLINK_MAC.octets() } else { [2; 6] };
    let source = if source == UPLINK_MAC { [4; 6] } else { source.octets() };
    let builder = PacketBuilder::ethernet2(source, destination).ipv4(from, to, 64).udp(port, 9);
    let mut frame = Vec::new();
    builder.write(&mut frame, &vec![0; LEN as usize - 42]).unwrap();
    assert_eq!(frame.len() as u64, LEN);
    frame
}

/// From the world.
fn udp6(from: Ipv6Addr, to: Ipv6Addr) -> Vec<u8> {
    let step = PacketBuilder::ethernet2([4; 6], UPLINK_MAC.octets());
    let mut frame = Vec::new();
    step.ipv6(from.octets(), to.octets(), 64).udp(4000, 22).write(&mut frame, b"x").unwrap();
    frame
}

fn assert_bound(passed: u64, least: u64) {
    assert!((least..=least + SLACK).contains(&passed), "{passed} passed, {least} expected");
}

#[test]
fn an_interface_sends_its_burst_and_its_rate_and_its_neighbour_is_left_alone() {
    let test = "an_interface_sends_its_burst_and_its_rate_and_its_neighbour_is_left_alone";
    let Some(mut world) = World::new(test) else { return };
    world.limit(0, Rates { outgoing: Some(SLOW), ..Rates::default() });
    assert_bound(world.between(0, 1, 2000), FRAMES);
    assert!(world.counted(0, Reason::BandwidthOut) >= 2000 - FRAMES - SLACK);
    // Its own limit, so its own drops.
    assert_eq!(world.counted(1, Reason::BandwidthOut), 0);
    assert_eq!(world.between(1, 0, 2000), 2000, "what comes in, and the neighbour");
    let id = world.desired.interfaces[0].id;
    let credits = world.loaded.credits(id).unwrap();
    assert!(credits.outgoing.unwrap() < LEN * 8 * 2, "{credits:?}");
    assert_eq!(credits.incoming, None);
}

#[test]
fn an_interface_receives_no_more_than_its_rate_by_whichever_way() {
    let test = "an_interface_receives_no_more_than_its_rate_by_whichever_way";
    let Some(mut world) = World::new(test) else { return };
    world.limit(1, Rates { incoming: Some(SLOW), ..Rates::default() });
    let near = world.between(0, 1, 100);
    assert_eq!(near, 100);
    let frame = udp(UPLINK_MAC, [203, 0, 113, 9], elastic(1).octets(), 4000);
    let far = (0..2000).filter(|_| world.run(UPLINK, &frame).accepts()).count() as u64;
    assert_bound(near + far, FRAMES);
    assert!(world.between(0, 1, 100) <= SLACK);
    assert_eq!(world.counted(0, Reason::BandwidthIn), 0);
    assert!(world.counted(1, Reason::BandwidthIn) >= 2000 - FRAMES - 2 * SLACK);
    assert_eq!(world.between(1, 0, 1000), 1000, "what it sends");
    let other = udp(UPLINK_MAC, [203, 0, 113, 9], elastic(0).octets(), 4000);
    assert!((0..1000).all(|_| world.run(UPLINK, &other).accepts()), "its neighbour");
}

#[test]
fn packets_are_limited_both_ways_together() {
    let test = "packets_are_limited_both_ways_together";
    let Some(mut world) = World::new(test) else { return };
    let packets = Some(Allowance { baseline: 1, peak: 1000, credit: 300 });
    world.limit(0, Rates { packets, ..Rates::default() });
    let passed = world.between(0, 1, 150) + world.between(1, 0, 1000);
    // The peak's bucket holds what a superframe needs, and fills while this runs.
    assert!((PACKETS_MIN..=300 + SLACK).contains(&passed), "{passed}");
    assert!(world.counted(0, Reason::PacketRate) >= 1150 - 300 - SLACK);
    assert_eq!(world.counted(1, Reason::PacketRate), 0);
}

#[test]
fn a_refused_packet_opens_no_flow() {
    let test = "a_refused_packet_opens_no_flow";
    let Some(mut world) = World::new(test) else { return };
    world.limit(0, Rates { outgoing: Some(SLOW), ..Rates::default() });
    world.between(0, 1, 400);
    let other = udp(guest_mac(0), address(0).octets(), address(1).octets(), 5000);
    while world.run(&guest(0), &other).accepts() {}
    world.limit(0, Rates::default());
    let third = udp(guest_mac(0), address(0).octets(), address(1).octets(), 6000);
    assert_eq!(world.run(&guest(0), &third), Reason::NewFlow);
    assert_eq!(world.run(&guest(0), &third), Reason::Established);
}

#[test]
fn limits_change_while_packets_pass_and_what_was_spent_stays_spent() {
    let test = "limits_change_while_packets_pass_and_what_was_spent_stays_spent";
    let Some(mut world) = World::new(test) else { return };
    let deep = |credit| Allowance { baseline: 1000, peak: 80_000_000_000, credit };
    let megabytes = |n: u64| Rates { outgoing: Some(deep(n * 8_000_000)), ..Rates::default() };
    world.limit(0, megabytes(1));
    assert_bound(world.between(0, 1, 3000), 1000);
    // Twice the credits: as many again, though the first are gone.
    world.limit(0, megabytes(2));
    assert_bound(world.between(0, 1, 3000), 1000);
    world.limit(0, Rates { outgoing: Some(SLOW), ..Rates::default() });
    assert!(world.between(0, 1, 500) <= SLACK, "the bucket shrank, and is empty");
    world.limit(0, Rates::default());
    assert_eq!(world.between(0, 1, 3000), 3000);
}

#[test]
fn what_is_missing_from_the_buckets_moves_with_the_flows() {
    let test = "what_is_missing_from_the_buckets_moves_with_the_flows";
    let Some(mut world) = World::new(test) else { return };
    let rates = Rates { outgoing: Some(SLOW), ..Rates::default() };
    world.limit(0, rates);
    world.between(0, 1, 200);
    let id = world.desired.interfaces.iter().find(|i| i.device.name() == guest(0)).unwrap().id;
    let moved = world.loaded.export(id).unwrap();
    // Another interface stands in its place and it comes again: its buckets are full,
    // as on another host.
    for n in [id, InterfaceId::from_random(99), id] {
        let interface =
            world.desired.interfaces.iter_mut().find(|i| i.device.name() == guest(0)).unwrap();
        interface.id = n;
        world.apply();
    }
    world.loaded.import(&moved).unwrap();
    let left = world.between(0, 1, 1000);
    assert_bound(left, FRAMES - 200);
    let wrong = MovedFlows { missing: vec![1; 9], ..moved.clone() };
    assert!(world.loaded.import(&wrong).is_err());
    let older = MovedFlows {
        version: MOVED_FLOWS_VERSION,
        interface: id,
        flows: Vec::new(),
        missing: Vec::new(),
        ports: Vec::new(),
    };
    world.loaded.import(&older).unwrap();
    assert!(world.between(0, 1, 500) <= SLACK);
}

#[test]
fn interfaces_of_one_instance_share_its_rates() {
    let test = "interfaces_of_one_instance_share_its_rates";
    let Some(mut world) = World::new(test) else { return };
    let ids = [0, 1]
        .map(|n| world.desired.interfaces.iter().find(|i| i.device.name() == guest(n)).unwrap().id);
    world.limit(0, Rates { outgoing: Some(SLOW), ..Rates::default() });
    world.share(1, Some(ids[0]));
    let both = world.between(0, 1, 100) + world.between(1, 0, 2000);
    assert_bound(both, FRAMES);
    assert!(world.between(0, 1, 500) <= SLACK, "the one has spent what the other wants");
    assert!(world.counted(1, Reason::BandwidthOut) >= 1900 - FRAMES);
    let left = ids.map(|id| world.loaded.credits(id).unwrap().outgoing.unwrap());
    assert!(left.iter().all(|bits| *bits < LEN * 8 * SLACK), "{left:?}");
    // What is missing is missing once, whichever of them moves.
    let moved = ids.map(|id| world.loaded.export(id).unwrap());
    for moved in moved.iter().chain(&moved) {
        world.loaded.import(moved).unwrap();
    }
    // Alone again, it has what it had: full buckets of its own, and no debt of another's.
    world.share(1, None);
    assert_eq!(world.between(1, 0, 1000), 1000);
    assert!(world.between(0, 1, 500) <= SLACK);
}

/// No device is there: what is compiled is looked at, and not loaded.
fn any_index(name: &str) -> u32 {
    name.bytes().fold(1, |sum, byte| sum + u32::from(byte))
}

#[test]
fn who_shares_whose_rates_is_told_apart() {
    let mut desired = open_world();
    let tables = |desired: &Desired| compile(desired, &devices(any_index), &Default::default());
    let ids: Vec<InterfaceId> = desired.interfaces.iter().map(|i| i.id).collect();
    let told = |desired: &Desired| tables(desired).unwrap_err().to_string();
    desired.interfaces[0].rates_of = Some(InterfaceId::from_random(99));
    assert!(told(&desired).contains("there is no interface"), "{}", told(&desired));
    desired.interfaces[0].rates_of = Some(ids[1]);
    desired.interfaces[1].rates_of = Some(ids[0]);
    assert!(told(&desired).contains("name that one"), "{}", told(&desired));
    desired.interfaces[1].rates_of = None;
    desired.interfaces[0].rates = Rates { packets: Some(SLOW), ..Rates::default() };
    assert!(told(&desired).contains("leave out either"), "{}", told(&desired));
    desired.interfaces[0].rates = Rates::default();
    assert!(tables(&desired).unwrap().rates.is_empty(), "no limits are none to share");
}

#[test]
fn a_guest_cannot_flood_the_responder() {
    let test = "a_guest_cannot_flood_the_responder";
    let Some(world) = World::new(test) else { return };
    let ask = |from: usize| {
        let builder = PacketBuilder::ethernet2(guest_mac(from).octets(), [0xff; 6])
            .ipv4([0; 4], [255; 4], 64)
            .udp(68, 67);
        let mut frame = Vec::new();
        builder.write(&mut frame, &[0; 240]).unwrap();
        frame
    };
    let now = || {
        let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
        std::time::Duration::from(now).as_secs_f64()
    };
    let (frame, begun) = (ask(0), now());
    let mut passed = 0_u64;
    for _ in 0..20_000 {
        match world.run(&guest(0), &frame) {
            Reason::PuntDhcp => passed += 1,
            reason => assert_eq!(reason, Reason::ServiceRate),
        }
    }
    // As many as the bucket had, and what came in while they were sent.
    let most = SERVICE_PACKETS_A_SECOND as f64 * (1.1 + now() - begun);
    assert!(passed >= SERVICE_PACKETS_A_SECOND && passed as f64 <= most, "{passed} of {most}");
    assert_eq!(world.counted(0, Reason::ServiceRate), 20_000 - passed);
    assert_eq!(world.run(&guest(1), &ask(1)), Reason::PuntDhcp, "its neighbour");
    assert_eq!(world.counted(1, Reason::ServiceRate), 0);
}

#[test]
fn one_source_opens_as_many_flows_as_it_may_and_others_are_left_alone() {
    let test = "one_source_opens_as_many_flows_as_it_may_and_others_are_left_alone";
    let Some(mut world) = World::new(test) else { return };
    world.desired.uplink.as_mut().unwrap().source_packets = Some(1);
    world.apply();
    let flood = [203, 0, 113, 9];
    let early = |frame: &[u8]| world.loaded.run_early(frame).unwrap();
    let opening = udp(UPLINK_MAC, flood, elastic(0).octets(), 4000);
    let passed = (0..2000).filter(|_| early(&opening)).count() as u64;
    assert_bound(passed, PACKETS_MIN);
    let counters = world.loaded.counters().unwrap();
    assert_eq!(counters.uplink["source-rate-exceeded"], 2000 - passed);
    for host in 10..110 {
        let other = udp(UPLINK_MAC, [203, 0, 113, host], elastic(0).octets(), 4000);
        assert!(early(&other), "203.0.113.{host}");
    }
    // What opens no flow is none of its business, and what is not for an interface neither.
    let builder = PacketBuilder::ethernet2([4; 6], UPLINK_MAC.octets())
        .ipv4(flood, elastic(0).octets(), 64)
        .tcp(4000, 22, 1, 100)
        .ack(1);
    let mut established = Vec::new();
    builder.write(&mut established, b"x").unwrap();
    assert!((0..2000).all(|_| early(&established)));
    let to_the_host = udp(UPLINK_MAC, flood, [192, 0, 2, 200], 4000);
    assert!((0..2000).all(|_| early(&to_the_host)));
    world.desired.uplink.as_mut().unwrap().source_packets = None;
    world.apply();
    assert!((0..2000).all(|_| world.loaded.run_early(&opening).unwrap()));
}

#[test]
fn one_network_of_64_bits_opens_as_many_flows_over_ipv6_as_one_source_may() {
    let test = "one_network_of_64_bits_opens_as_many_flows_over_ipv6_as_one_source_may";
    let Some(mut world) = World::new(test) else { return };
    world.desired.uplink.as_mut().unwrap().source_packets = Some(1);
    world.give_ipv6();
    let opening = |network: u16, host: u16| {
        udp6(Ipv6Addr::new(0x2001, 0xdb8, 0xf, network, 0, 0, 0, host), address6(0, 0))
    };
    let early = |frame: &[u8]| world.loaded.run_early(frame).unwrap();
    let passed = (0..2000).filter(|n| early(&opening(1, *n))).count() as u64;
    assert_bound(passed, PACKETS_MIN);
    assert_eq!(world.loaded.counters().unwrap().uplink["source-rate-exceeded"], 2000 - passed);
    for network in 2..100 {
        assert!(early(&opening(network, 1)), "network {network}");
    }
}

#[test]
fn sources_that_cannot_be_there_are_dropped_early_over_ipv6_and_the_link_is_left_alone() {
    let test =
        "sources_that_cannot_be_there_are_dropped_early_over_ipv6_and_the_link_is_left_alone";
    let Some(mut world) = World::new(test) else { return };
    world.desired.blocklist = vec!["2001:db8:bad::/48".parse().unwrap()];
    world.give_ipv6();
    let from = |source: &str, to| udp6(source.parse().unwrap(), to);
    let early =
        |world: &World, source: &str, to| world.loaded.run_early(&from(source, to)).unwrap();
    for source in ["::", "::1", "::ffff:10.0.0.1", "ff02::1", "2001:db8:bad::1"] {
        assert!(!early(&world, source, address6(0, 0)), "{source}");
    }
    for source in ["2001:db8:f::1", "3fff::1", "fd00::1", "fe80::1"] {
        assert!(early(&world, source, address6(0, 0)), "{source}");
    }
    world.desired.uplink.as_mut().unwrap().bogons = true;
    world.apply();
    for source in ["3fff::1", "fd00::1"] {
        assert!(!early(&world, source, address6(0, 0)), "{source}");
    }
    // One of the host's own addresses is the documentation's.
    for source in ["2600::1", "fe80::1", "2001:db8:f::1"] {
        assert!(early(&world, source, address6(0, 0)), "{source}");
    }
    world.desired.uplink.as_mut().unwrap().bogons = false;
    world.apply();
    let host = "2001:db8:ffff::1".parse().unwrap();
    assert!(early(&world, "::1", host), "what is for no interface is the host's own affair");
    world.desired.elastic_ranges = vec!["2001:db8:ffff::/48".parse().unwrap()];
    world.apply();
    assert!(!early(&world, "2001:db8:f::1", host), "nobody has it, and all of the range is ours");
    world.desired.elastic_ranges.clear();
    world.apply();
    let mut cut = from("2001:db8:f::1", address6(0, 0));
    cut.truncate(57);
    assert!(!world.loaded.run_early(&cut).unwrap(), "no whole UDP header");
}

#[test]
fn sources_that_cannot_be_there_are_dropped_early() {
    let test = "sources_that_cannot_be_there_are_dropped_early";
    let Some(mut world) = World::new(test) else { return };
    let from = |source: [u8; 4]| udp(UPLINK_MAC, source, elastic(0).octets(), 4000);
    let early = |world: &World, source| world.loaded.run_early(&from(source)).unwrap();
    let never = [[0, 0, 0, 1], [127, 0, 0, 1], [169, 254, 1, 1], [224, 0, 0, 1], [255; 4]];
    for source in never {
        assert!(!early(&world, source), "{source:?}");
    }
    let bogons = [[10, 1, 1, 1], [192, 168, 1, 1], [100, 64, 0, 1], [203, 0, 113, 9]];
    assert!(bogons.iter().all(|source| early(&world, *source)), "not asked for");
    world.desired.uplink.as_mut().unwrap().bogons = true;
    world.apply();
    assert!(bogons.iter().all(|source| !early(&world, *source)));
    assert!(early(&world, [8, 8, 8, 8]));
    // The gateway's and the host's own network are there.
    assert!(early(&world, [198, 51, 100, 254]));
}
