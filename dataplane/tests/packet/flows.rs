//! A flow's life, by the decision on the host: time is an argument.

use dataplane::compile::{Host, Tables, compile};
use ebpf::decide::{from_instance, from_world};
use ebpf::verdict::Work;
use ebpf::{Action, Arrival, GATEWAY_MAC, Head, Reason};
use etherparse::PacketBuilder;
use model::{Peer, PortRange, Protocol, Rule, RuleId};
use rpc::dataplane::{MOVED_FLOWS_VERSION, MovedFlow, MovedFlows};

use crate::random::Random;
use crate::rates::World;
use crate::world::{UPLINK, UPLINK_MAC, address, elastic, guest_mac, imagined_devices, peopled};

const WORLD: [u8; 4] = [203, 0, 113, 9];

/// Every guest there, guest 0 reachable on port 80 from everywhere, and nothing more.
struct Stage {
    desired: rpc::dataplane::Desired,
    host: Host,
    now_s: u32,
}

impl Stage {
    fn new() -> Self {
        let mut random = Random::seeded("flows", 41);
        let mut desired = peopled(&mut random);
        for (n, interface) in desired.interfaces.iter_mut().enumerate() {
            interface.elastic = Some(elastic(n));
            interface.source_check = true;
            interface.route_table = None;
            interface.network_acl = None;
            interface.groups.clear();
        }
        desired.interfaces[0].groups = vec![desired.groups[0].id];
        desired.groups[0].ingress = vec![Rule {
            id: RuleId::from_random(1),
            protocol: Protocol::Tcp(PortRange::single(80)),
            peer: Peer::Cidr("0.0.0.0/0".parse().unwrap()),
        }];
        let mut stage = Self { desired, host: Host::default(), now_s: 1000 };
        stage.load();
        stage
    }

    fn load(&mut self) {
        let tables: Tables =
            compile(&self.desired, &imagined_devices(), self.host.tables()).unwrap();
        self.host.load(tables);
    }

    fn decide(&mut self, ifindex: u32, frame: &[u8]) -> (Action, Reason) {
        let mut work: Work = bytemuck::Zeroable::zeroed();
        let head = Head::of(frame[..34].try_into().unwrap());
        let arrival = Arrival { ifindex, vlan: false, to_host: true, now_s: self.now_s };
        if ifindex == self.host.tables().config.uplink {
            from_world(&self.host, frame, &head, &arrival, &mut work);
        } else {
            from_instance(&self.host, frame, &head, &arrival, &mut work);
        }
        self.host.account(&work.verdict);
        (work.verdict.action, work.verdict.reason)
    }

    fn world_sends(&mut self, flags: &str) -> Reason {
        let frame =
            tcp(([8; 6], UPLINK_MAC.octets()), (WORLD, elastic(0).octets()), (5000, 80), flags);
        let uplink = imagined_devices().by_name[UPLINK].ifindex;
        self.decide(uplink, &frame).1
    }

    fn guest_sends(&mut self, flags: &str) -> Reason {
        let frame = tcp(
            (guest_mac(0).octets(), GATEWAY_MAC),
            (address(0).octets(), WORLD),
            (80, 5000),
            flags,
        );
        let ifindex = imagined_devices().by_name["g0"].ifindex;
        self.decide(ifindex, &frame).1
    }

    fn connect(&mut self) {
        assert_eq!(self.world_sends("S"), Reason::NewFlow);
        assert_eq!(self.guest_sends("SA"), Reason::Established);
        assert_eq!(self.world_sends("A"), Reason::Established);
        assert_eq!(self.host.flows().len(), 1);
    }
}

fn tcp(
    macs: ([u8; 6], [u8; 6]),
    ips: ([u8; 4], [u8; 4]),
    ports: (u16, u16),
    flags: &str,
) -> Vec<u8> {
    let mut tcp = PacketBuilder::ethernet2(macs.0, macs.1)
        .ipv4(ips.0, ips.1, 64)
        .tcp(ports.0, ports.1, 1, 1000);
    for flag in flags.chars() {
        tcp = match flag {
            'S' => tcp.syn(),
            'F' => tcp.fin(),
            'R' => tcp.rst(),
            'P' => tcp.psh(),
            'U' => tcp.urg(0),
            '-' => tcp,
            _ => tcp.ack(1),
        };
    }
    let mut frame = Vec::new();
    tcp.write(&mut frame, &[]).unwrap();
    frame
}

#[test]
fn a_connection_survives_the_removal_of_its_rule_and_a_new_one_does_not_begin() {
    let mut stage = Stage::new();
    stage.connect();
    stage.desired.groups[0].ingress.clear();
    stage.load();
    assert_eq!(stage.world_sends("A"), Reason::Established);
    assert_eq!(stage.guest_sends("A"), Reason::Established);
    stage.guest_sends("R");
    stage.now_s += ebpf::flow::CLOSING_IDLE_S + 1;
    assert_eq!(stage.world_sends("S"), Reason::IngressDenied);
}

/// Of the right addresses and ports; what its numbers are only the guest can judge.
#[test]
fn a_forged_reset_ends_no_connection_and_a_forged_opening_takes_nobodys_place() {
    let mut stage = Stage::new();
    stage.connect();
    assert_eq!(stage.world_sends("R"), Reason::Established, "the guest judges it");
    stage.now_s += dataplane::compile::TCP_IDLE_S;
    assert_eq!(stage.guest_sends("A"), Reason::Established, "as long as without it");
    for rule in [true, false] {
        assert_eq!(stage.world_sends("RA"), Reason::Established);
        let answer = if rule { Reason::NewFlow } else { Reason::IngressDenied };
        assert_eq!(stage.world_sends("S"), answer, "a rule is asked");
        assert_eq!(stage.guest_sends("A"), Reason::Established, "a challenge, RFC 5961");
        stage.now_s += dataplane::compile::TCP_IDLE_S;
        assert_eq!(stage.world_sends("A"), Reason::Established);
        assert_eq!((stage.host.flows().len(), stage.host.half_flows_count()), (1, 0));
        stage.desired.groups[0].ingress.clear();
        stage.load();
    }
    // The guest's own is no forgery.
    assert_eq!(stage.guest_sends("R"), Reason::Established);
    stage.now_s += ebpf::flow::CLOSING_IDLE_S + 1;
    assert_eq!(stage.world_sends("A"), Reason::NoFlow);
}

#[test]
fn flows_that_may_have_been_reset_give_their_places_up_where_places_run_short() {
    let test = "flows_that_may_have_been_reset_give_their_places_up_where_places_run_short";
    let Some(mut world) = World::new(test) else { return };
    let interface = world.desired.interfaces[0].id;
    let local = world.desired.interfaces[0].address.into();
    let flow = |n: u32, flags: u8| MovedFlow {
        protocol: ebpf::flow::TCP,
        local,
        remote: std::net::Ipv4Addr::from(0xcb00_7100 + n / 256).into(),
        local_port: 80,
        remote_port: 1000 + (n % 256) as u16,
        phase: ebpf::flow::ESTABLISHED,
        flags,
        silent_s: ebpf::flow::CLOSING_IDLE_S + 10,
    };
    let mut bring = |from: u32, to: u32, flags: u8| {
        let flows = (from..to).map(|n| flow(n, flags)).collect();
        let version = MOVED_FLOWS_VERSION;
        let (missing, ports) = (Vec::new(), Vec::new());
        let moved = MovedFlows { version, interface, flows, missing, ports };
        world.loaded.import(&moved).unwrap();
        world.loaded.sweep_all().unwrap();
        world.loaded.export(interface).unwrap().flows.len() as u64
    };
    let half = u64::from(dataplane::compile::FLOWS_AN_INTERFACE_MAX) / 2;
    let many = half as u32;
    assert_eq!(bring(0, 100, ebpf::flow::REMOTE_RESET), 100);
    assert_eq!(bring(100, many, 0), half, "there is room for all");
    // Some or all of those that were reset, and no other: one batch of the sweep is enough.
    let left = bring(many, many + 1, 0);
    assert!((half + 1 - 100..=half).contains(&left), "{left} of {}", half + 1);
    assert_eq!(bring(many + 1, many + 200, 0), half + 200 - 100, "by now all of those");
}

#[test]
fn unanswered_and_unconfirmed_openings_stay_half_open() {
    let mut stage = Stage::new();
    assert_eq!(stage.world_sends("S"), Reason::NewFlow);
    assert_eq!(stage.guest_sends("SA"), Reason::Established);
    assert_eq!(stage.world_sends("S"), Reason::Established, "a retransmission confirms nothing");
    assert_eq!((stage.host.flows().len(), stage.host.half_flows_count()), (0, 1));
    stage.now_s += ebpf::flow::TCP_OPENING_IDLE_S + 1;
    assert_eq!(stage.guest_sends("A"), Reason::NoFlow);
}

#[test]
fn an_idle_connection_is_forgotten_and_not_before_its_time() {
    let mut stage = Stage::new();
    stage.connect();
    stage.now_s += dataplane::compile::TCP_IDLE_S;
    assert_eq!(stage.world_sends("A"), Reason::Established);
    stage.now_s += dataplane::compile::TCP_IDLE_S + 1;
    assert_eq!(stage.world_sends("A"), Reason::NoFlow);
}

#[test]
fn an_interface_forgets_its_flows_after_its_own_idle_timeout() {
    let mut stage = Stage::new();
    stage.connect();
    // Shorter while the connection lives: it counts from its last packet.
    stage.desired.interfaces[0].idle.tcp_established = Some(60);
    stage.load();
    stage.now_s += 60;
    assert_eq!(stage.world_sends("A"), Reason::Established);
    stage.now_s += 61;
    assert_eq!(stage.world_sends("A"), Reason::NoFlow);
    stage.desired.interfaces[0].idle.tcp_established = Some(59);
    let error = compile(&stage.desired, &imagined_devices(), stage.host.tables()).unwrap_err();
    let told = error.to_string();
    assert!(told.contains("tcp-established of 59 s") && told.contains("60 to 432000"), "{told}");
}

#[test]
fn an_ended_connection_lets_its_ports_be_used_again() {
    let mut stage = Stage::new();
    stage.connect();
    stage.world_sends("FA");
    stage.guest_sends("FA");
    assert_eq!(stage.world_sends("A"), Reason::Established);
    assert_eq!(stage.world_sends("S"), Reason::NewFlow, "a new connection, judged anew");
    assert_eq!((stage.host.flows().len(), stage.host.half_flows_count()), (0, 1));
}

#[test]
fn a_guest_without_egress_rules_answers_but_does_not_begin() {
    let mut stage = Stage::new();
    assert_eq!(stage.guest_sends("S"), Reason::EgressDenied);
    assert_eq!(stage.guest_sends("A"), Reason::NoFlow);
    stage.connect();
    assert_eq!(stage.guest_sends("A"), Reason::Established);
}

#[test]
fn beyond_its_quota_an_interface_opens_no_flow_and_keeps_those_it_has() {
    let mut stage = Stage::new();
    let mut tables = stage.host.tables().clone();
    tables.records_mut().for_each(|i| i.flows_max = 1);
    stage.host.load(tables);
    stage.connect();
    assert_eq!(stage.world_sends("A"), Reason::Established);
    let other = tcp(
        ([8; 6], UPLINK_MAC.octets()),
        ([203, 0, 113, 10], elastic(0).octets()),
        (5000, 80),
        "S",
    );
    let uplink = imagined_devices().by_name[UPLINK].ifindex;
    assert_eq!(stage.decide(uplink, &other), (Action::Drop, Reason::FlowQuota));
    assert_eq!(stage.guest_sends("A"), Reason::Established);
}

#[test]
fn a_connection_of_a_lost_host_is_picked_up_where_that_is_wished_and_rules_permit_it() {
    let mut stage = Stage::new();
    stage.connect();
    // All flows are lost.
    stage.host = Host::default();
    stage.load();
    assert_eq!(stage.world_sends("A"), Reason::NoFlow);
    stage.desired.interfaces[0].loose_tcp = true;
    stage.load();
    assert_eq!(stage.guest_sends("A"), Reason::EgressDenied, "no rule lets it out");
    for flags in ["SA", "FA", "R", "-", "FPU", "SF"] {
        assert_eq!(stage.world_sends(flags), Reason::NoFlow, "{flags}");
    }
    assert_eq!(stage.world_sends("PA"), Reason::NewFlow);
    assert_eq!((stage.host.flows().len(), stage.host.half_flows_count()), (0, 1));
    assert_eq!(stage.guest_sends("A"), Reason::Established);
    assert_eq!(stage.world_sends("A"), Reason::Established);
    assert_eq!((stage.host.flows().len(), stage.host.half_flows_count()), (1, 0));
    // Switched off again: what was picked up stays, and nothing else is.
    stage.desired.interfaces[0].loose_tcp = false;
    stage.desired.groups[0].ingress.clear();
    stage.load();
    assert_eq!(stage.world_sends("A"), Reason::Established);
    stage.now_s += dataplane::compile::TCP_IDLE_S + 1;
    assert_eq!(stage.world_sends("A"), Reason::NoFlow);
    stage.desired.interfaces[0].loose_tcp = true;
    stage.load();
    assert_eq!(stage.world_sends("A"), Reason::IngressDenied, "its rule is gone");
}

#[test]
fn what_scanners_send_opens_nothing() {
    let mut stage = Stage::new();
    for flags in ["-", "F", "FPU", "A", "FA", "SF", "SR", "SFPU", "R", "RA", "SA", "SFA", "U"] {
        assert_eq!(stage.world_sends(flags), Reason::NoFlow, "{flags}");
        assert_eq!(stage.guest_sends(flags), Reason::NoFlow, "{flags}");
    }
    assert_eq!((stage.host.flows().len(), stage.host.half_flows_count()), (0, 0));
}

#[test]
fn both_ends_may_open_a_connection_at_once() {
    let mut stage = Stage::new();
    assert_eq!(stage.world_sends("S"), Reason::NewFlow);
    // The guest had no leave to begin; as an answer its opening goes out.
    assert_eq!(stage.guest_sends("S"), Reason::Established);
    assert_eq!((stage.host.flows().len(), stage.host.half_flows_count()), (0, 1));
    // RFC 9293, figure 8: each answers the other's opening.
    assert_eq!(stage.world_sends("SA"), Reason::Established);
    assert_eq!(stage.guest_sends("SA"), Reason::Established);
    assert_eq!(stage.world_sends("A"), Reason::Established);
    assert_eq!((stage.host.flows().len(), stage.host.half_flows_count()), (1, 0));
}

#[test]
fn a_half_closed_connection_lives_as_long_as_an_open_one() {
    let mut stage = Stage::new();
    stage.connect();
    assert_eq!(stage.world_sends("FA"), Reason::Established);
    stage.now_s += dataplane::compile::TCP_IDLE_S;
    assert_eq!(stage.guest_sends("PA"), Reason::Established, "its direction is open still");
    // A keepalive is a packet as any other.
    stage.now_s += dataplane::compile::TCP_IDLE_S;
    assert_eq!(stage.guest_sends("A"), Reason::Established);
    assert_eq!(stage.guest_sends("FA"), Reason::Established);
    // Closed both ways: last acknowledgements, and no more.
    stage.now_s += ebpf::flow::CLOSING_IDLE_S;
    assert_eq!(stage.world_sends("A"), Reason::Established);
    stage.now_s += ebpf::flow::CLOSING_IDLE_S + 1;
    assert_eq!(stage.world_sends("A"), Reason::NoFlow);
}

#[test]
fn ports_of_an_ended_connection_are_used_again_though_its_opening_is_sent_twice() {
    let mut stage = Stage::new();
    stage.connect();
    stage.guest_sends("R");
    assert_eq!(stage.world_sends("S"), Reason::NewFlow);
    assert_eq!(stage.world_sends("S"), Reason::Established, "the same opening again");
    assert_eq!(stage.guest_sends("SA"), Reason::Established);
    assert_eq!(stage.world_sends("A"), Reason::Established);
    assert_eq!((stage.host.flows().len(), stage.host.half_flows_count()), (1, 0));
    // An opening within a living connection is the guest's to answer.
    assert_eq!(stage.world_sends("S"), Reason::Established);
    assert_eq!(stage.host.flows().len(), 1);
}
