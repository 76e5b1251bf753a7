//! NAT gateways: what goes through one, by the decision on the host, and what random frames
//! answer to what went out.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use dataplane::compile::{Host, Tables, compile};
use ebpf::decide::{from_instance, from_world};
use ebpf::port::{CONNECTIONS_A_PEER, FIRST, IDLE_S, PORTS_MAX, PortHolder, PortKey, free, start};
use ebpf::verdict::Work;
use ebpf::{Action, Arrival, GATEWAY_MAC, Head, Reason, nat};
use etherparse::{PacketBuilder, SlicedPacket, TransportSlice};
use model::route_table::Target;
use model::{Peer, Protocol, Route, RouteTable, Rule, RuleId};

use crate::frames::carried_out;
use crate::random::Random;
use crate::world::{
    UPLINK, UPLINK_MAC, address, elastic, gateway, guest, guest_mac, imagined_devices, peopled,
};

pub const PEER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 9);

/// A frame from the world, or from who was reached by the gateway, to a port that is held.
pub fn expected(random: &mut Random, host: &Host, tables: &Tables) -> Option<(u32, Vec<u8>)> {
    let mut held: Vec<(PortKey, PortHolder)> = host.ports().iter().map(|(k, h)| (*k, *h)).collect();
    held.sort();
    if held.is_empty() || tables.config.uplink == 0 {
        return None;
    }
    let (key, holder) = random.pick(&held);
    let near = tables.elastics.get(&key.peer).filter(|e| e.nat == 0);
    // Its instance again, or who was asked.
    if random.chance(30) {
        let from = tables.interfaces.values().find(|i| i.id == holder.interface)?;
        let ends = (holder.local.to_be_bytes(), key.peer.to_be_bytes());
        let ports = (holder.local_port, key.peer_port);
        let frame = message(random, (from.mac, GATEWAY_MAC), ends, ports, (key.protocol, true));
        return Some((from.ifindex, frame));
    }
    let ports = (key.peer_port, key.port);
    let public = key.public.to_be_bytes();
    let (ifindex, macs, from) = match near {
        Some(near) => {
            (near.interface.ifindex, (near.interface.mac, GATEWAY_MAC), near.address.to_be_bytes())
        }
        None => (
            tables.config.uplink,
            ([2, 0, 0, 0, 8, 8], UPLINK_MAC.octets()),
            key.peer.to_be_bytes(),
        ),
    };
    Some((ifindex, message(random, macs, (from, public), ports, (key.protocol, false))))
}

/// A packet of a connection, a piece of one, or an ICMP error about one.
fn message(
    random: &mut Random,
    macs: ([u8; 6], [u8; 6]),
    (from, to): ([u8; 4], [u8; 4]),
    (port, to_port): (u16, u16),
    (protocol, asks): (u8, bool),
) -> Vec<u8> {
    let step = || PacketBuilder::ethernet2(macs.0, macs.1).ipv4(from, to, 64);
    let back = || PacketBuilder::ethernet2(macs.0, macs.1).ipv4(to, from, 64);
    let mut frame = Vec::new();
    let body = [0x5a; 24];
    if random.chance(25) {
        // About a packet that went the other way.
        match protocol {
            6 => back().tcp(to_port, port, 1, 1).write(&mut frame, &body),
            17 => back().udp(to_port, port).write(&mut frame, &body),
            _ if asks => back().icmpv4_echo_reply(port, 1).write(&mut frame, &body),
            _ => back().icmpv4_echo_request(to_port, 1).write(&mut frame, &body),
        }
        .unwrap();
        let about = frame.split_off(14)[..28].to_vec();
        let why =
            etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1400 };
        let error = etherparse::Icmpv4Type::DestinationUnreachable(why);
        let mut frame = Vec::new();
        step().icmpv4(error).write(&mut frame, &about).unwrap();
        return frame;
    }
    match protocol {
        6 => {
            let tcp = step().tcp(port, to_port, 1, 1000);
            crate::frames::with_flags(random, tcp).write(&mut frame, &body)
        }
        17 => step().udp(port, to_port).write(&mut frame, &body),
        _ if asks => step().icmpv4_echo_request(port, 1).write(&mut frame, &body),
        _ => step().icmpv4_echo_reply(to_port, 1).write(&mut frame, &body),
    }
    .unwrap();
    if random.chance(25) {
        crate::frames::become_part(random, &mut frame);
    }
    frame
}

/// Three private instances behind a gateway; the third has an elastic address and no gateway.
pub struct Stage {
    pub desired: rpc::dataplane::Desired,
    host: Host,
    now_s: u32,
}

impl Stage {
    pub fn new(ports: u16) -> Self {
        let mut random = Random::seeded("nat", 71);
        let mut desired = peopled(&mut random);
        desired.nat_gateways = vec![gateway(1)];
        desired.nat_gateways[0].ports_max = Some(ports);
        let everything = "0.0.0.0/0".parse().unwrap();
        let table = RouteTable {
            id: crate::routes::table_id(0),
            vpc: gateway(1).vpc,
            local: vec!["10.0.0.0/16".parse().unwrap()],
            routes: vec![Route {
                destination: everything,
                target: Target::NatGateway(gateway(1).id),
            }],
        };
        for (n, interface) in desired.interfaces.iter_mut().enumerate() {
            interface.elastic = (n == 2).then(|| elastic(n));
            interface.secondary.clear();
            interface.source_check = true;
            interface.route_table = (n < 2).then_some(table.id);
            interface.network_acl = None;
            interface.groups.clear();
            if n < 3 {
                interface.groups = vec![desired.groups[0].id];
            }
        }
        let rule = |n: u128, peer: &str| Rule {
            id: RuleId::from_random(n),
            protocol: Protocol::Any,
            peer: Peer::Cidr(peer.parse().unwrap()),
        };
        desired.groups[0].egress = vec![rule(1, "0.0.0.0/0")];
        // The third may be reached by the gateway's address, and nobody by any other.
        desired.groups[0].ingress = vec![rule(2, "198.51.100.51/32")];
        desired.route_tables = vec![table];
        let mut stage = Self { desired, host: Host::default(), now_s: 1000 };
        stage.load();
        stage
    }

    fn load(&mut self) {
        let tables: Tables =
            compile(&self.desired, &imagined_devices(), self.host.tables()).unwrap();
        self.host.load(tables);
    }

    /// What becomes of a frame from this device; or the answer, where it is dropped.
    fn send(&mut self, device: &str, frame: &[u8]) -> (Reason, Vec<u8>) {
        let ifindex = imagined_devices().by_name[device].ifindex;
        let mut work: Work = bytemuck::Zeroable::zeroed();
        let head = Head::of(frame[..34].try_into().unwrap());
        let arrival = Arrival { ifindex, vlan: false, to_host: true, now_s: self.now_s };
        let host = &self.host;
        match device == UPLINK {
            true => from_world(host, frame, &head, &arrival, &mut work),
            false => from_instance(host, frame, &head, &arrival, &mut work),
        }
        if work.verdict.action == Action::Translate {
            match device == UPLINK {
                true => nat::from_outside(host, frame, &head, &arrival, &mut work),
                false => nat::from_guest(host, frame, &arrival, &mut work),
            }
        }
        self.host.account(&work.verdict);
        self.host.keep(&work, self.now_s);
        self.host.translate(&work);
        let out = carried_out(frame, &work);
        let out = out.or_else(|| crate::told::told(frame, &work.verdict, device == UPLINK));
        (work.verdict.reason, out.unwrap_or_default())
    }

    fn guest_sends(&mut self, n: usize, ports: (u16, u16), flags: &str) -> (Reason, Vec<u8>) {
        let macs = (guest_mac(n).octets(), GATEWAY_MAC);
        let frame = tcp(macs, (address(n), PEER), ports, flags);
        self.send(&guest(n), &frame)
    }

    fn world_sends(&mut self, ports: (u16, u16), flags: &str) -> (Reason, Vec<u8>) {
        let frame = tcp(([8; 6], UPLINK_MAC.octets()), (PEER, gateway(1).elastic), ports, flags);
        self.send(UPLINK, &frame)
    }
}

pub fn tcp(
    macs: ([u8; 6], [u8; 6]),
    (from, to): (Ipv4Addr, Ipv4Addr),
    ports: (u16, u16),
    flags: &str,
) -> Vec<u8> {
    let mut tcp = PacketBuilder::ethernet2(macs.0, macs.1)
        .ipv4(from.octets(), to.octets(), 64)
        .tcp(ports.0, ports.1, 1, 1000);
    for flag in flags.chars() {
        tcp = match flag {
            'S' => tcp.syn(),
            'F' => tcp.fin(),
            'R' => tcp.rst(),
            _ => tcp.ack(1),
        };
    }
    let mut frame = Vec::new();
    tcp.write(&mut frame, &[]).unwrap();
    frame
}

/// Both ends as they stand in a frame, whose checksums must be right.
pub fn ends(frame: &[u8]) -> ((Ipv4Addr, u16), (Ipv4Addr, u16)) {
    assert_eq!(crate::checksum::wrong(frame), None, "{frame:02x?}");
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(etherparse::NetSlice::Ipv4(ip)) = &sliced.net else { panic!("{sliced:?}") };
    let (from, to) = (ip.header().source_addr(), ip.header().destination_addr());
    let (port, to_port) = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        other => panic!("{other:?}"),
    };
    ((from, port), (to, to_port))
}

#[test]
fn two_instances_with_one_port_to_one_peer_are_told_apart() {
    let mut stage = Stage::new(PORTS_MAX as u16);
    let mut outer = Vec::new();
    for n in 0..2 {
        let (reason, out) = stage.guest_sends(n, (5000, 443), "S");
        assert_eq!(reason, Reason::NewFlow);
        let ((from, port), to) = ends(&out);
        assert_eq!((from, to), (gateway(1).elastic, (PEER, 443)));
        outer.push(port);
    }
    assert_ne!(outer[0], outer[1]);
    for (n, port) in outer.into_iter().enumerate() {
        let (reason, back) = stage.world_sends((443, port), "SA");
        assert_eq!(reason, Reason::Established);
        assert_eq!(ends(&back), ((PEER, 443), (address(n), 5000)));
        let (_, out) = stage.guest_sends(n, (5000, 443), "A");
        assert_eq!(ends(&out).0, (gateway(1).elastic, port), "the same port again");
    }
}

#[test]
fn nobody_comes_in_who_was_not_asked() {
    let mut stage = Stage::new(PORTS_MAX as u16);
    assert_eq!(stage.world_sends((443, 5000), "S").0, Reason::NatUnsolicited);
    let port = ends(&stage.guest_sends(0, (5000, 443), "S").1).0.1;
    // The port is held towards that peer and its port alone, and not for an opening.
    assert_eq!(stage.world_sends((443, port), "S").0, Reason::NatUnsolicited);
    assert_eq!(stage.world_sends((444, port), "SA").0, Reason::NatUnsolicited);
    let other = tcp(
        ([8; 6], UPLINK_MAC.octets()),
        (Ipv4Addr::new(203, 0, 113, 77), gateway(1).elastic),
        (443, port),
        "SA",
    );
    assert_eq!(stage.send(UPLINK, &other).0, Reason::NatUnsolicited);
    assert_eq!(stage.world_sends((443, port), "SA").0, Reason::Established);
    // What is refused takes no port.
    stage.desired.groups[0].egress.clear();
    stage.load();
    assert_eq!(stage.guest_sends(1, (5000, 443), "S").0, Reason::EgressDenied);
    assert_eq!(stage.host.ports().len(), 1);
    // Neither the gateway's private address nor its own public one leads anywhere.
    for to in [gateway(1).address, gateway(1).elastic] {
        let macs = (guest_mac(0).octets(), GATEWAY_MAC);
        let (reason, _) = stage.send(&guest(0), &tcp(macs, (address(0), to), (1, 2), "S"));
        assert!(!reason.accepts(), "{to}: {reason:?}");
    }
}

#[test]
fn a_peer_has_as_many_connections_as_ports_and_the_next_is_refused_by_name() {
    let mut stage = Stage::new(4);
    let mut seen = std::collections::BTreeSet::new();
    for n in 0..4 {
        seen.insert(ends(&stage.guest_sends(0, (5000 + n, 443), "S").1).0.1);
    }
    assert_eq!(seen.into_iter().collect::<Vec<_>>(), [1024, 1025, 1026, 1027]);
    assert_eq!(stage.guest_sends(1, (6000, 443), "S").0, Reason::NatNoPort);
    // Towards another port of the same peer they are all free.
    assert_eq!(stage.guest_sends(1, (6000, 444), "S").0, Reason::NewFlow);
    assert_eq!(stage.guest_sends(0, (5001, 443), "S").0, Reason::Established, "it has its own");
}

#[test]
fn a_port_is_forgotten_after_350_silent_seconds_either_way() {
    let mut stage = Stage::new(PORTS_MAX as u16);
    let port = ends(&stage.guest_sends(0, (5000, 443), "S").1).0.1;
    stage.world_sends((443, port), "SA");
    stage.guest_sends(0, (5000, 443), "A");
    for _ in 0..3 {
        stage.now_s += IDLE_S;
        assert_eq!(stage.world_sends((443, port), "A").0, Reason::Established);
    }
    stage.now_s += IDLE_S;
    assert_eq!(ends(&stage.guest_sends(0, (5000, 443), "A").1).0.1, port);
    stage.now_s += IDLE_S + 1;
    assert_eq!(stage.world_sends((443, port), "A").0, Reason::NatUnsolicited);
    // Whoever goes on is told in the peer's name that it is over, as often as he does.
    for flags in ["A", "FA", "A"] {
        let (reason, answer) = stage.guest_sends(0, (5000, 443), flags);
        assert_eq!(reason, Reason::NoFlow);
        assert_eq!(resets(&answer), ((PEER, 443), (address(0), 5000)));
    }
    // What acknowledges nothing, and what ends it, is not answered; an opening is one.
    for flags in ["", "F", "R", "RA", "SA"] {
        assert_eq!(stage.guest_sends(0, (5000, 443), flags), (Reason::NoFlow, vec![]), "{flags}");
    }
    let (reason, out) = stage.guest_sends(0, (5000, 443), "S");
    assert!(reason.accepts(), "{reason:?}");
    assert_eq!(ends(&out).0.0, gateway(1).elastic);
}

#[test]
fn who_may_not_send_or_has_no_connection_is_told_of_no_end() {
    let mut stage = Stage::new(PORTS_MAX as u16);
    assert_eq!(stage.guest_sends(0, (5000, 443), "A"), (Reason::NoFlow, vec![]), "no flow");
    stage.guest_sends(0, (5000, 443), "S");
    let port = stage.host.ports().keys().next().unwrap().port;
    stage.world_sends((443, port), "SA");
    stage.guest_sends(0, (5000, 443), "A");
    stage.now_s += IDLE_S + 1;
    // To who is asked by another address of this host nothing went by this port.
    let macs = (guest_mac(0).octets(), GATEWAY_MAC);
    let near = tcp(macs, (address(0), elastic(2)), (5000, 443), "A");
    assert_eq!(stage.send(&guest(0), &near), (Reason::NoFlow, vec![]));
    let mut last = tcp(macs, (address(0), PEER), (5000, 443), "A");
    last[22] = 1;
    let sum = etherparse::Ipv4HeaderSlice::from_slice(&last[14..]).unwrap();
    let sum = sum.to_header().calc_header_checksum();
    last[24..26].copy_from_slice(&sum.to_be_bytes());
    assert_eq!(stage.send(&guest(0), &last).0, Reason::TtlExpired, "its router speaks first");
    let (_, answer) = stage.guest_sends(0, (5000, 443), "A");
    assert_eq!(resets(&answer).1, (address(0), 5000));
}

/// The ends of a RST that its receiver believes, in a frame for the first guest.
pub fn resets(frame: &[u8]) -> ((Ipv4Addr, u16), (Ipv4Addr, u16)) {
    let sliced = SlicedPacket::from_ethernet(frame).unwrap();
    let Some(TransportSlice::Tcp(header)) = &sliced.transport else { panic!("{sliced:?}") };
    assert!(header.rst() && !header.ack() && !header.syn() && !header.fin());
    assert_eq!(header.sequence_number(), 1, "what was acknowledged");
    assert_eq!((&frame[..6], &frame[6..12]), (&guest_mac(0).octets()[..], &GATEWAY_MAC[..]));
    ends(frame)
}

#[test]
fn an_ended_connection_gives_its_port_back_soon() {
    for (instance, peer) in [("FA", "FA"), ("R", "A")] {
        let mut stage = Stage::new(PORTS_MAX as u16);
        let port = ends(&stage.guest_sends(0, (5000, 443), "S").1).0.1;
        stage.world_sends((443, port), "SA");
        stage.guest_sends(0, (5000, 443), "A");
        stage.guest_sends(0, (5000, 443), instance);
        stage.world_sends((443, port), peer);
        let holder = *stage.host.ports().values().next().unwrap();
        assert!(holder.alive(stage.now_s + 10) && !holder.alive(stage.now_s + 11), "{holder:?}");
        // A new connection by the same port of its instance has a whole life again.
        stage.guest_sends(0, (5000, 443), "S");
        let holder = *stage.host.ports().values().next().unwrap();
        assert!(holder.alive(stage.now_s + IDLE_S), "{holder:?}");
    }
}

#[test]
fn a_forged_reset_takes_nobody_his_port() {
    let mut stage = Stage::new(PORTS_MAX as u16);
    let port = ends(&stage.guest_sends(0, (5000, 443), "S").1).0.1;
    stage.world_sends((443, port), "SA");
    stage.guest_sends(0, (5000, 443), "A");
    assert_eq!(stage.world_sends((443, port), "R").0, Reason::Established);
    stage.now_s += IDLE_S;
    assert_eq!(stage.world_sends((443, port), "A").0, Reason::Established);
    assert_eq!(stage.guest_sends(0, (5000, 443), "A").0, Reason::Established);
}

#[test]
fn an_instance_is_reached_by_its_elastic_address_through_the_gateway() {
    let mut stage = Stage::new(PORTS_MAX as u16);
    let macs = |n: usize| (guest_mac(n).octets(), GATEWAY_MAC);
    let syn = tcp(macs(0), (address(0), elastic(2)), (5000, 80), "S");
    let (reason, out) = stage.send(&guest(0), &syn);
    assert_eq!(reason, Reason::NewFlow);
    let ((from, port), to) = ends(&out);
    assert_eq!((from, to), (gateway(1).elastic, (address(2), 80)));
    let answer = tcp(macs(2), (address(2), gateway(1).elastic), (80, port), "SA");
    let (reason, back) = stage.send(&guest(2), &answer);
    assert_eq!(reason, Reason::Established);
    assert_eq!(ends(&back), ((elastic(2), 80), (address(0), 5000)));
    // It does not begin that way.
    let begin = tcp(macs(2), (address(2), gateway(1).elastic), (81, port), "S");
    assert_eq!(stage.send(&guest(2), &begin).0, Reason::NatUnsolicited);
}

/// With as many connections to one peer as EC2 promises, the next ones find their ports.
#[test]
fn fifty_five_thousand_connections_to_one_peer_find_ports() {
    let mut stage = Stage::new(PORTS_MAX as u16);
    let mut refused = 0;
    let (mut work, mut flow): (Work, ebpf::layout::FlowKey) =
        (bytemuck::Zeroable::zeroed(), bytemuck::Zeroable::zeroed());
    flow.remote = PEER.into();
    (flow.remote_port, flow.protocol) = (443, 6);
    for n in 0..CONNECTIONS_A_PEER {
        (flow.local, flow.local_port) = (n >> 8, (n & 0xff) as u16);
        let key = PortKey::of(&flow, gateway(1).elastic.into(), 0);
        let port = free(&stage.host, &key, PORTS_MAX, start(&flow, 77));
        refused += u32::from(port == 0);
        assert!(port == 0 || u32::from(port) >= FIRST);
        work.nat.write = ebpf::verdict::NatWrite::Open;
        work.nat.port_key = PortKey { port, ..key };
        work.nat.key = flow;
        work.nat.holder = PortHolder::of(&flow, 0);
        stage.host.translate(&work);
    }
    assert!(refused <= 3, "{refused} of {CONNECTIONS_A_PEER} found none");
    assert!(stage.host.ports().len() as u32 >= CONNECTIONS_A_PEER - 3);
}

#[test]
fn a_gateway_that_contradicts_itself_is_refused_by_name() {
    let refused = |change: &dyn Fn(&mut rpc::dataplane::Desired)| {
        let mut stage = Stage::new(4);
        change(&mut stage.desired);
        compile(&stage.desired, &imagined_devices(), &Tables::default()).unwrap_err().to_string()
    };
    let said = refused(&|d| {
        d.nat_gateways.push(rpc::dataplane::NatGateway { id: gateway(1).id, ..gateway(2) });
    });
    assert!(said.contains("it appears twice"), "{said}");
    let said = refused(&|d| d.nat_gateways[0].ports_max = Some(0));
    assert!(said.contains("0 ports; give it 1 to 64512"), "{said}");
    let said = refused(&|d| d.nat_gateways[0].ports_max = Some(64_513));
    assert!(said.contains("64513 ports"), "{said}");
    let said = refused(&|d| d.nat_gateways[0].elastic = elastic(2));
    assert!(said.contains("elastic address 198.51.100.12 is an interface's"), "{said}");
    let said = refused(&|d| d.nat_gateways[0].address = address(1));
    assert!(said.contains("is an interface's"), "{said}");
    let said = refused(&|d| d.nat_gateways[0].vpc = gateway(2).vpc);
    assert!(said.contains("belongs to another network"), "{said}");
}

/// Ports are counted, and go with their interface and with their gateway.
#[test]
fn ports_are_given_back_with_their_interface_or_their_gateway() {
    let name = "ports_are_given_back_with_their_interface_or_their_gateway";
    let Some(bench) = crate::agree::Bench::new(name) else { return };
    let devices = crate::world::devices(|name| nix::net::if_::if_nametoindex(name).unwrap());
    let mut loaded = dataplane::load::Loaded::open(&bench.deployment).unwrap();
    let mut stage = Stage::new(PORTS_MAX as u16);
    let load = |loaded: &mut dataplane::load::Loaded, stage: &Stage| {
        let tables = compile(&stage.desired, &devices, loaded.tables()).unwrap();
        loaded.update(tables).unwrap();
    };
    load(&mut loaded, &stage);
    let connect = |loaded: &dataplane::load::Loaded, n: usize, port: u16| {
        let macs = (guest_mac(n).octets(), GATEWAY_MAC);
        let frame = tcp(macs, (address(n), PEER), (port, 443), "S");
        let ifindex = nix::net::if_::if_nametoindex(guest(n).as_str()).unwrap();
        loaded.run(ifindex, &frame, ebpf::TRACE_MARK).unwrap().reason
    };
    for port in 0..20 {
        assert_eq!(connect(&loaded, 0, 5000 + port), Some(Reason::NewFlow));
        assert_eq!(connect(&loaded, 1, 5000 + port), Some(Reason::NewFlow));
    }
    let open = |loaded: &dataplane::load::Loaded, n| {
        loaded.translations_open(crate::world::interface_id(n)).unwrap()
    };
    assert_eq!((open(&loaded, 0), open(&loaded, 1)), (20, 20));
    assert_eq!(loaded.sweep_ports().unwrap(), 0);
    assert_eq!(loaded.nat_gateway(gateway(1).elastic.into()).unwrap().0, 40);
    // A restart knows them, and counts on.
    drop(loaded);
    let mut loaded = dataplane::load::Loaded::open(&bench.deployment).unwrap();
    load(&mut loaded, &stage);
    assert_eq!((loaded.ports().unwrap().len(), open(&loaded, 1)), (40, 20));
    let gone = stage.desired.interfaces.remove(0);
    load(&mut loaded, &stage);
    assert_eq!(loaded.sweep_ports().unwrap(), 20);
    assert_eq!((loaded.ports().unwrap().len(), open(&loaded, 1)), (20, 20));
    stage.desired.interfaces.insert(0, gone);
    let gateways = std::mem::take(&mut stage.desired.nat_gateways);
    load(&mut loaded, &stage);
    assert_eq!(loaded.sweep_ports().unwrap(), 20);
    assert_eq!((loaded.ports().unwrap().len(), open(&loaded, 1)), (0, 0));
    stage.desired.nat_gateways = gateways;
    load(&mut loaded, &stage);
    assert_eq!(connect(&loaded, 1, 6000), Some(Reason::NewFlow));
    assert_eq!(open(&loaded, 1), 1);
}

/// A frame at a time, each as it comes: what is rewritten cannot be run twice. The clock is
/// read around each, so that only what one costs more than another is worth looking at.
/// `HOSTPLANE_MEASURE=1 cargo test -p dataplane --test packet -- --nocapture nat::of_an`.
#[test]
fn of_an_established_packet_through_a_gateway_and_by_an_elastic_address() {
    let name = "of_an_established_packet_through_a_gateway_and_by_an_elastic_address";
    let times = if std::env::var_os("HOSTPLANE_MEASURE").is_some() { 50_001 } else { 51 };
    let Some(bench) = crate::agree::Bench::new(name) else { return };
    let index = |name: &str| nix::net::if_::if_nametoindex(name).unwrap();
    let mut loaded = dataplane::load::Loaded::open(&bench.deployment).unwrap();
    let stage = Stage::new(PORTS_MAX as u16);
    let tables = compile(&stage.desired, &crate::world::devices(index), loaded.tables()).unwrap();
    loaded.update(tables).unwrap();
    for (what, n) in [("by a NAT gateway", 0), ("by an elastic address", 2)] {
        let out = |flags: &str| {
            let macs = (guest_mac(n).octets(), GATEWAY_MAC);
            (index(&guest(n)), tcp(macs, (address(n), PEER), (5000, 443), flags))
        };
        let (device, syn) = out("S");
        let first = loaded.run(device, &syn, ebpf::TRACE_MARK).unwrap();
        assert_eq!(first.reason, Some(Reason::NewFlow), "{what}");
        let ((public, port), _) = ends(&first.frame);
        let back = |flags: &str| {
            let macs = ([8; 6], UPLINK_MAC.octets());
            (index(UPLINK), tcp(macs, (PEER, public), (443, port), flags))
        };
        for (device, frame) in [back("SA"), out("A"), back("A")] {
            let run = loaded.run(device, &frame, ebpf::TRACE_MARK).unwrap();
            assert_eq!(run.reason, Some(Reason::Established), "{what}");
        }
        for (way, (device, frame)) in [("out", out("A")), ("in", back("A"))] {
            let one = |_| {
                let run = loaded.run(device, &frame, 0).unwrap();
                assert_eq!(run.code, 7, "{what}: it goes on");
                run.took
            };
            let mut took: Vec<_> = (0..times).map(one).collect();
            took.sort();
            let (low, high) = (took[times / 20], took[times * 19 / 20]);
            eprintln!("{what}, {way}: {:?} a packet ({low:?} to {high:?})", took[times / 2]);
        }
    }
}

/// What a naive gateway would know: who has which port towards whom, and since when it is silent.
type Held = BTreeMap<(usize, u16, u16), (u16, u32)>;

/// Two instances, few ports of theirs and few of the gateway's, time that passes and a sweep now
/// and then: an answer reaches who asked, a connection keeps its port, and no two share one.
#[test]
fn whatever_happens_an_answer_reaches_who_asked_and_nobody_else() {
    const PORTS: usize = 6;
    let mut stage = Stage::new(PORTS as u16);
    let mut random = Random::seeded("ports", 72);
    let mut held = Held::new();
    let (mut kept, mut refused, mut lost) = (0, 0, 0);
    for _ in 0..20_000 {
        if random.chance(15) {
            stage.now_s += random.pick(&[1, 40, 200, IDLE_S + 1]);
        }
        if random.chance(10) {
            stage.host.sweep_ports(stage.now_s);
        }
        let now_s = stage.now_s;
        let (n, own) = (random.below(2) as usize, 5000 + random.below(5) as u16);
        let to = 443 + random.below(2) as u16;
        let (reason, out) = stage.guest_sends(n, (own, to), random.pick(&["S", "A"]));
        let alive = |(_, seen): &(u16, u32)| now_s - seen <= IDLE_S;
        let before = held.get(&(n, own, to)).copied().filter(alive);
        if !reason.accepts() {
            // Only an opening of a group's flow may be refused, and a port where none is left.
            let towards = stage.host.ports().keys().filter(|key| key.peer_port == to).count();
            let full = reason == Reason::NatNoPort && before.is_none() && towards == PORTS;
            assert!(full || reason == Reason::NoFlow, "{reason:?} {towards} {before:?}");
            refused += u64::from(full);
            continue;
        }
        let ((from, port), _) = ends(&out);
        assert_eq!(from, gateway(1).elastic);
        if let Some((known, _)) = before {
            assert_eq!(port, known, "a connection keeps its port");
            kept += 1;
        }
        let others = held.iter().filter(|((m, o, t), _)| (*m, *o) != (n, own) && *t == to);
        let shared = others.filter(|(_, state)| alive(state) && state.0 == port).count();
        assert_eq!(shared, 0, "two live connections share port {port}");
        held.insert((n, own, to), (port, now_s));
        let (reason, back) = stage.world_sends((to, port), "A");
        if reason.accepts() {
            assert_eq!(ends(&back).1, (address(n), own));
        } else {
            lost += 1;
        }
    }
    assert_eq!(lost, 0);
    assert!(kept > 2000 && refused > 200, "{kept} kept, {refused} refused");
}
