//! An interface's ports at NAT gateways, exported by one host's loaded programs and brought to
//! another's.

use std::collections::BTreeMap;
use std::time::Duration;

use dataplane::compile::compile;
use dataplane::load::{self, Loaded, Run};
use ebpf::port::{
    CLOSED_OUT, CONNECTIONS_AN_INTERFACE_MAX, FIRST, IDLE_S, PORTS_MAX, PortHolder, PortKey, RESET,
};
use ebpf::{GATEWAY_MAC, Reason, TRACE_MARK};
use etherparse::PacketBuilder;
use model::InterfaceId;
use nix::net::if_::if_nametoindex;
use rpc::dataplane::{Imported, LeftOut, MovedFlows, MovedPort};

use crate::agree::Bench;
use crate::nat::{PEER, Stage, ends, resets, tcp};
use crate::random::Random;
use crate::world::{UPLINK, UPLINK_MAC, address, devices, gateway, guest, guest_mac, interface_id};

/// One host, and then another in its place.
struct Hosts {
    stage: Stage,
    loaded: Option<Loaded>,
    bench: Bench,
}

impl Hosts {
    fn new(test: &str, ports: u16) -> Option<Self> {
        let bench = Bench::new(test)?;
        let loaded = Some(Loaded::open(&bench.deployment).unwrap());
        let mut hosts = Self { stage: Stage::new(ports), loaded, bench };
        hosts.load();
        Some(hosts)
    }

    fn load(&mut self) {
        let devices = devices(|name| if_nametoindex(name).unwrap());
        let tables = compile(&self.stage.desired, &devices, self.here().tables()).unwrap();
        self.loaded.as_mut().unwrap().update(tables).unwrap();
    }

    /// Nothing of the first is known on it.
    fn move_to_another(&mut self) {
        self.loaded = None;
        load::teardown(&self.bench.deployment).unwrap();
        self.loaded = Some(Loaded::open(&self.bench.deployment).unwrap());
        self.load();
        assert!(self.here().ports().unwrap().is_empty());
    }

    fn here(&self) -> &Loaded {
        self.loaded.as_ref().unwrap()
    }

    fn run(&self, device: &str, frame: &[u8]) -> Run {
        self.here().run(if_nametoindex(device).unwrap(), frame, TRACE_MARK).unwrap()
    }

    fn guest_sends(&self, n: usize, port: u16, flags: &str) -> Run {
        let macs = (guest_mac(n).octets(), GATEWAY_MAC);
        self.run(&guest(n), &tcp(macs, (address(n), PEER), (port, 443), flags))
    }

    fn world_sends(&self, port: u16, flags: &str) -> Run {
        let macs = ([8; 6], UPLINK_MAC.octets());
        self.run(UPLINK, &tcp(macs, (PEER, gateway(1).elastic), (443, port), flags))
    }

    /// Opens a connection; its port at the gateway.
    fn connect(&self, n: usize, port: u16) -> u16 {
        let run = self.guest_sends(n, port, "S");
        assert_eq!(run.reason, Some(Reason::NewFlow));
        let outer = ends(&run.frame).0.1;
        assert_eq!(self.world_sends(outer, "SA").reason, Some(Reason::Established));
        assert_eq!(self.guest_sends(n, port, "A").reason, Some(Reason::Established));
        outer
    }

    /// A datagram of the first guest, or one to it.
    fn datagram(&self, out: bool, port: u16) -> Run {
        let (device, macs, from, to, ports) = match out {
            true => (guest(0), (guest_mac(0).octets(), GATEWAY_MAC), address(0), PEER, (port, 53)),
            false => {
                let macs = ([8; 6], UPLINK_MAC.octets());
                (UPLINK.to_owned(), macs, PEER, gateway(1).elastic, (53, port))
            }
        };
        let step = PacketBuilder::ethernet2(macs.0, macs.1).ipv4(from.octets(), to.octets(), 64);
        let mut frame = Vec::new();
        step.udp(ports.0, ports.1).write(&mut frame, &[0x5a; 24]).unwrap();
        self.run(&device, &frame)
    }

    fn open(&self, n: usize) -> u64 {
        self.here().translations_open(interface_id(n)).unwrap()
    }

    fn sweep(&mut self) -> u64 {
        self.loaded.as_mut().unwrap().sweep_ports().unwrap()
    }

    fn import(&self, moved: &MovedFlows) -> Imported {
        self.here().import(moved).unwrap()
    }
}

fn only(why: LeftOut) -> BTreeMap<LeftOut, u64> {
    BTreeMap::from([(why, 1)])
}

#[test]
fn connections_through_a_gateway_keep_their_ports_on_another_host() {
    let test = "connections_through_a_gateway_keep_their_ports_on_another_host";
    let Some(mut hosts) = Hosts::new(test, 1) else { return };
    // The only port that the gateway has here; there it has them all.
    let only_port = FIRST as u16;
    assert_eq!(hosts.connect(0, 5000), only_port);
    assert_eq!(ends(&hosts.datagram(true, 6000).frame).0.1, only_port);
    assert_eq!(hosts.datagram(false, only_port).reason, Some(Reason::Established));
    assert_eq!(hosts.datagram(true, 6000).reason, Some(Reason::Established));
    assert_eq!(hosts.guest_sends(0, 5000, "FA").reason, Some(Reason::Established));
    let moved = hosts.here().export(interface_id(0)).unwrap();
    assert_eq!((moved.flows.len(), moved.ports.len()), (2, 2), "{moved:?}");
    assert!(hosts.here().export(interface_id(1)).unwrap().ports.is_empty());
    // As it goes from host to host; one that knows of no ports takes the rest.
    let mut told = serde_json::to_value(&moved).unwrap();
    assert_eq!(serde_json::from_value::<MovedFlows>(told.clone()).unwrap(), moved);
    told.as_object_mut().unwrap().remove("ports");
    let older: MovedFlows = serde_json::from_value(told).unwrap();
    assert_eq!((older.flows.len(), older.ports.len()), (2, 0));

    hosts.stage.desired.nat_gateways[0].ports_max = Some(PORTS_MAX as u16);
    hosts.move_to_another();
    let mut later = moved.clone();
    later.ports.iter_mut().for_each(|port| port.silent_s += 300);
    let imported = hosts.import(&later);
    let none = BTreeMap::new();
    assert_eq!(imported, Imported { flows: 2, ports: 2, left_out: none.clone() });
    assert_eq!((hosts.open(0), hosts.here().ports().unwrap().len()), (2, 2));
    // How long they were silent, and what was closed, is known there.
    let again = hosts.here().export(interface_id(0)).unwrap();
    let known = again.ports.iter().all(|port| (300..310).contains(&port.silent_s));
    assert!(known && again.ports.len() == 2, "{again:?}");
    let closed: Vec<u16> =
        again.ports.iter().filter(|p| p.protocol == 6).map(|p| p.flags).collect();
    assert_eq!(closed, [CLOSED_OUT]);
    // Twice is once.
    assert_eq!(hosts.import(&later), Imported { flows: 0, ports: 0, left_out: none });
    assert_eq!(hosts.sweep(), 0);

    let back = hosts.world_sends(only_port, "A");
    assert_eq!(back.reason, Some(Reason::Established));
    assert_eq!(ends(&back.frame), ((PEER, 443), (address(0), 5000)));
    let out = hosts.guest_sends(0, 5000, "A");
    assert_eq!(out.reason, Some(Reason::Established));
    assert_eq!(ends(&out.frame), ((gateway(1).elastic, only_port), (PEER, 443)));
    let back = hosts.datagram(false, only_port);
    assert_eq!(ends(&back.frame), ((PEER, 53), (address(0), 6000)));
    let out = hosts.datagram(true, 6000);
    assert_eq!(ends(&out.frame), ((gateway(1).elastic, only_port), (PEER, 53)));
    assert_eq!(hosts.open(0), 2, "none was opened anew");
    // Nobody else gets one of them.
    assert_ne!(hosts.connect(1, 5000), only_port);
}

#[test]
fn a_port_that_is_anothers_on_the_other_host_stays_his_and_the_connection_is_left_out() {
    let test = "a_port_that_is_anothers_on_the_other_host_stays_his_and_the_connection_is_left_out";
    let Some(mut hosts) = Hosts::new(test, 1) else { return };
    let port = hosts.connect(0, 5000);
    let moved = hosts.here().export(interface_id(0)).unwrap();
    hosts.move_to_another();
    assert_eq!(hosts.connect(1, 7000), port, "the only one that there is");
    let imported = hosts.import(&moved);
    assert_eq!((imported.flows, imported.ports), (1, 0));
    assert_eq!(imported.left_out, only(LeftOut::PortTaken));
    assert_eq!((hosts.open(0), hosts.open(1)), (0, 1));
    let back = hosts.world_sends(port, "A");
    assert_eq!(ends(&back.frame), ((PEER, 443), (address(1), 7000)), "it is his");
    // Its instance is told that it is over, and need not wait for answers in vain.
    let told = hosts.guest_sends(0, 5000, "A");
    assert_eq!((told.reason, told.code), (Some(Reason::NoFlow), 7));
    assert_eq!(resets(&told.frame), ((PEER, 443), (address(0), 5000)));
    // Whoever has begun anew meanwhile keeps what he got.
    hosts.stage.desired.nat_gateways[0].ports_max = Some(PORTS_MAX as u16);
    hosts.load();
    let out = hosts.guest_sends(0, 5000, "S");
    assert_ne!(ends(&out.frame).0.1, port);
    assert_eq!(hosts.import(&moved).left_out, only(LeftOut::OtherPort));
}

#[test]
fn ports_go_nowhere_but_to_their_own_gateway_and_address_and_not_after_their_time() {
    let test = "ports_go_nowhere_but_to_their_own_gateway_and_address_and_not_after_their_time";
    let Some(mut hosts) = Hosts::new(test, 4) else { return };
    let port = hosts.connect(0, 5000);
    let moved = hosts.here().export(interface_id(0)).unwrap();
    let changed = |change: &dyn Fn(&mut MovedPort)| {
        let mut moved = moved.clone();
        change(&mut moved.ports[0]);
        moved
    };
    hosts.move_to_another();
    let left_out = |hosts: &Hosts, moved: &MovedFlows, why| {
        let imported = hosts.import(moved);
        assert_eq!((imported.ports, imported.left_out), (0, only(why)), "{:?}", moved.ports);
        assert!(
            hosts.here().ports().unwrap().iter().all(|(_, h)| h.local != u32::from(address(0)))
        );
    };
    let wrong = changed(&|port| port.gateway = gateway(2).id);
    left_out(&hosts, &wrong, LeftOut::NoGateway);
    left_out(&hosts, &changed(&|port| port.address = PEER), LeftOut::NoGateway);
    left_out(&hosts, &changed(&|port| port.local = address(1)), LeftOut::NoAddress);
    left_out(&hosts, &changed(&|port| port.local = PEER), LeftOut::NoAddress);
    left_out(&hosts, &changed(&|port| port.silent_s = IDLE_S + 1), LeftOut::Silent);
    left_out(&hosts, &changed(&|port| port.silent_s = u32::MAX), LeftOut::Silent);
    let ended = |port: &mut MovedPort| (port.flags, port.silent_s) = (RESET, 11);
    left_out(&hosts, &changed(&ended), LeftOut::Silent);
    // The other network's gateway is none of its own, though it stands there.
    let gateways = hosts.stage.desired.nat_gateways.clone();
    let others =
        changed(&|port| (port.gateway, port.address) = (gateway(2).id, gateway(2).elastic));
    hosts.stage.desired.nat_gateways.push(gateway(2));
    hosts.load();
    left_out(&hosts, &others, LeftOut::NoGateway);
    hosts.stage.desired.nat_gateways.clear();
    hosts.stage.desired.route_tables[0].routes.clear();
    hosts.load();
    left_out(&hosts, &moved, LeftOut::NoGateway);
    hosts.stage.desired.nat_gateways = gateways;
    hosts.load();

    // Who has the port and has ended gives way, though no sweep has come by.
    let mut ended = changed(&|port| {
        (port.local, port.flags, port.silent_s) = (address(1), RESET, 10);
    });
    ended.interface = interface_id(1);
    ended.flows.clear();
    assert_eq!(hosts.import(&ended).ports, 1);
    std::thread::sleep(Duration::from_secs(2));
    let imported = hosts.import(&moved);
    assert_eq!((imported.ports, imported.left_out.len()), (1, 0));
    assert_eq!((hosts.open(0), hosts.open(1)), (1, 0));
    let held = hosts.here().ports().unwrap();
    assert!(held.len() == 1 && held[0].0.port == port && held[0].1.local == u32::from(address(0)));
}

/// An interface has so many connections through gateways, wherever they began, and what is
/// beyond stays behind under its own name.
#[test]
fn an_interface_takes_as_many_ports_along_as_it_may_have_and_no_more() {
    const MOST: usize = CONNECTIONS_AN_INTERFACE_MAX as usize;
    let test = "an_interface_takes_as_many_ports_along_as_it_may_have_and_no_more";
    let Some(mut hosts) = Hosts::new(test, PORTS_MAX as u16) else { return };
    hosts.connect(0, 5000);
    let moved = hosts.here().export(interface_id(0)).unwrap();
    hosts.move_to_another();
    assert_eq!(hosts.connect(0, 6000), hosts.here().ports().unwrap()[0].0.port);
    let like = moved.ports[0];
    let to = |n: usize| std::net::Ipv4Addr::from_bits(u32::from(PEER) + 1 + n as u32 / 10_000);
    let ports = (0..MOST).map(|n| MovedPort {
        remote: to(n),
        port: FIRST as u16 + (n % 10_000) as u16,
        local_port: 20_000 + (n % 10_000) as u16,
        ..like
    });
    let many = MovedFlows { flows: Vec::new(), ports: ports.collect(), ..moved };
    let imported = hosts.import(&many);
    assert_eq!((imported.ports, imported.left_out), (MOST as u64 - 1, only(LeftOut::NoRoom)));
    assert_eq!(hosts.open(0), MOST as u64);
    assert_eq!(hosts.import(&many).left_out, only(LeftOut::NoRoom), "nor later");
    let run = hosts.guest_sends(0, 7000, "S");
    assert_eq!(run.reason, Some(Reason::FlowQuota), "nor by itself");
}

#[test]
fn ports_that_no_host_wrote_are_refused_and_none_ever_changes_its_holder() {
    let test = "ports_that_no_host_wrote_are_refused_and_none_ever_changes_its_holder";
    let Some(mut hosts) = Hosts::new(test, PORTS_MAX as u16) else { return };
    hosts.connect(0, 5000);
    let moved = hosts.here().export(interface_id(0)).unwrap();
    let before = hosts.here().ports().unwrap();
    let wrongs: [&dyn Fn(&mut MovedFlows); 5] = [
        &|moved| moved.ports[0].protocol = 47,
        &|moved| moved.ports[0].port = FIRST as u16 - 1,
        &|moved| moved.ports[0].flags = 8,
        &|moved| moved.ports = vec![moved.ports[0]; CONNECTIONS_AN_INTERFACE_MAX as usize + 1],
        &|moved| moved.version += 1,
    ];
    for (n, change) in wrongs.into_iter().enumerate() {
        let mut wrong = moved.clone();
        wrong.ports[0].local_port = 5001;
        wrong.flows[0].local_port = 5001;
        change(&mut wrong);
        let error = hosts.here().import(&wrong).unwrap_err();
        assert!(matches!(error, load::Error::Refused(_)), "{n}: {error}");
    }
    assert_eq!(hosts.here().ports().unwrap(), before);
    assert_eq!(hosts.here().flows_open(interface_id(0)).unwrap(), 1);

    let mut random = Random::seeded("moved ports", 91);
    let mut held: BTreeMap<PortKey, PortHolder> = before.into_iter().collect();
    let mut left_out: BTreeMap<LeftOut, u64> = BTreeMap::new();
    let mut taken = 0;
    for _ in 0..300 {
        let n = random.below(2) as usize;
        let ports: Vec<MovedPort> = (0..random.below(8)).map(|_| any(&mut random)).collect();
        let interface: InterfaceId = interface_id(n);
        let moved = MovedFlows { interface, flows: Vec::new(), ports, ..moved.clone() };
        let imported = hosts.import(&moved);
        taken += imported.ports;
        for (why, count) in imported.left_out {
            *left_out.entry(why).or_default() += count;
        }
        let now: BTreeMap<PortKey, PortHolder> =
            hosts.here().ports().unwrap().into_iter().collect();
        for (key, holder) in &held {
            assert_eq!(now.get(key), Some(holder), "a port was taken away");
        }
        assert_eq!(now.len() as u64, 1 + taken);
        assert_eq!(hosts.open(0) + hosts.open(1), 1 + taken, "as many as are counted");
        let mut flows: Vec<_> = now.iter().map(|(key, holder)| holder.flow(key)).collect();
        flows.sort_by_key(|flow| format!("{flow:?}"));
        flows.dedup();
        assert_eq!(flows.len(), now.len(), "a connection has two ports");
        held = now;
    }
    eprintln!("{taken} taken, left out: {left_out:?}");
    assert!(taken > 50 && left_out.len() == 5, "{taken} {left_out:?}");
    assert_eq!(hosts.sweep(), 0, "each is led to");
}

/// Of few addresses and ports, so that they meet; alive for as long as the test takes.
fn any(random: &mut Random) -> MovedPort {
    let n = random.below(2) as usize;
    MovedPort {
        gateway: gateway(1 + u64::from(random.chance(10))).id,
        address: gateway(1 + u64::from(random.chance(10))).elastic,
        port: 1024 + random.below(12) as u16,
        protocol: random.pick(&[1, 6, 17]),
        local: address(n),
        remote: PEER,
        local_port: 5000 + random.below(12) as u16,
        remote_port: random.pick(&[53, 443]),
        flags: random.pick(&[0, CLOSED_OUT]),
        silent_s: random.pick(&[0, 3, 1000]),
    }
}
