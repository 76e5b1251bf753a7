//! Tables of very many rules are rewritten under traffic, and no packet is missed.
//!
//! Ten thousand rules; a hundred thousand, rewritten twenty times, with `HOSTPLANE_FULL=1`.

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use model::{
    GroupId, InterfaceId, Mac, Peer, PortRange, Protocol, Rule, RuleId, RuleLimits, SecurityGroup,
    VpcId,
};
use rpc::dataplane::{Device, Interface};

use crate::elastic::reachable_guest;
use crate::traffic::{Flow, Stream, echo_datagrams, echo_server, ping_flood};
use crate::world::{INTERNET, World, anywhere, ping, run, tcp};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const RULES_A_GROUP: u32 = 1000;
/// Half a second of them.
const PINGS: u16 = 100;

struct Size {
    groups: usize,
    rewrites: u32,
    flows: usize,
}

fn size() -> Size {
    match std::env::var_os("HOSTPLANE_FULL").is_some_and(|full| full == "1") {
        true => Size { groups: 100, rewrites: 20, flows: 50 },
        false => Size { groups: 10, rewrites: 5, flows: 20 },
    }
}

/// Another thousand rules for each edition.
fn group(n: usize, edition: u32) -> SecurityGroup {
    let rule = |k: u32| {
        let number = edition * RULES_A_GROUP + k;
        let spread = number.wrapping_mul(0x9e37_79b1) ^ n as u32;
        let address = Ipv4Addr::from(0x6440_0000 | spread >> 10);
        let peer = Peer::Cidr(format!("{address}/32").parse().unwrap());
        let id = RuleId::from_random((n as u128) << 64 | u128::from(number));
        Rule { id, protocol: Protocol::Tcp(PortRange::single(spread as u16)), peer }
    };
    SecurityGroup {
        id: GroupId::from_random(1000 + n as u128),
        vpc: VpcId::from_random(1),
        ingress: (0..RULES_A_GROUP).map(rule).collect(),
        egress: Vec::new(),
    }
}

/// An interface for each group, on a device that carries nothing.
fn idle_interfaces(world: &mut World, groups: usize) {
    let host = world.namespace("host");
    for n in 0..groups {
        let name = format!("{}d{n}", world.name);
        let peer = format!("{name}p");
        let pair = ["-n", &host, "link", "add", &name, "type", "veth", "peer", "name", &peer];
        run(Command::new("ip").args(pair));
        let (id, mac) = (InterfaceId::from_random(500 + n as u128), Mac([2, 0, 0, 1, 0, n as u8]));
        let address = Ipv4Addr::new(10, 0, 1, n as u8 + 4);
        let ends = (address, "10.0.1.0/24".parse().unwrap());
        world.desired.interfaces.push(Interface {
            groups: vec![GroupId::from_random(1000 + n as u128)],
            ..Interface::new(id, Device::Existing { name }, mac, VpcId::from_random(1), ends)
        });
        world.desired.groups.push(group(n, 0));
    }
    let limits = RuleLimits { rules_a_group: RULES_A_GROUP, groups_an_interface: 1 };
    world.desired.rule_limits = Some(limits);
}

#[test]
fn very_many_rules_are_rewritten_under_traffic_and_nothing_is_lost() {
    let test = "very_many_rules_are_rewritten_under_traffic_and_nothing_is_lost";
    let Some(mut world) = World::new(test) else { return };
    let Size { groups, rewrites, flows } = size();
    reachable_guest(&mut world, vec![(tcp(22), anywhere()), (ping(), anywhere())]);
    idle_interfaces(&mut world, groups);
    world.start();
    world.apply();
    echo_server(&world, "g1", 22);
    echo_datagrams(&world, "net", 5000);
    let pause = Duration::from_millis(20);
    let flows: Vec<Flow> =
        (0..flows).map(|_| Flow::of(&world, "net", ELASTIC, 22, 100, pause)).collect();
    let stream = Stream::open(&world, "g1", INTERNET, 5000);
    // One flood after the other, for as long as it takes.
    let pings = |world: &World| ping_flood(world, "net", ELASTIC, PINGS, Duration::from_millis(5));
    let mut flood = pings(&world);
    let mut floods = 1;
    for edition in 1..=rewrites {
        for n in 0..groups {
            world.desired.groups[1 + n] = group(n, edition);
        }
        world.apply();
        if flood.is_finished() {
            assert_eq!(flood.join().unwrap(), usize::from(PINGS), "every ping came back");
            (flood, floods) = (pings(&world), floods + 1);
        }
    }
    let rules: usize = world.desired.groups.iter().map(|g| g.ingress.len()).sum();
    eprintln!("{rules} rules, rewritten {rewrites} times");
    for flow in flows {
        flow.goes_on(3);
        flow.finish().unwrap();
    }
    let (sent, heard) = stream.finish();
    assert_eq!(heard, sent, "datagrams that came back");
    assert_eq!(flood.join().unwrap(), usize::from(PINGS), "every ping came back");
    eprintln!("{floods} floods of {PINGS} pings");
}
