//! An elastic address is reached where a group allows it, and nowhere else.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::process::Command;
use std::time::Duration;

use model::{Direction, GroupId, Peer};
use rpc::dataplane::Question;

use crate::six::ip;
use crate::traffic::{Flow, PATIENCE, connects, echo_server, inside, ping_flood};
use crate::world::{INTERNET, World, anywhere, group, now, ping, run, tcp};

pub const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const QUICK: Duration = Duration::from_millis(1200);

/// One guest with an elastic address, in group 1.
pub fn reachable_guest(world: &mut World, ingress: Vec<(model::Protocol, Peer)>) {
    let interface = world.add_guest(1, 1, "10.0.0.5");
    interface.elastic = Some(ELASTIC);
    interface.groups = vec![GroupId::from_random(1)];
    world.desired.groups = vec![group(1, ingress)];
    world.configure_guest(1);
}

#[test]
fn a_port_is_opened_and_closed_live_and_a_tracked_flow_goes_on() {
    let test = "a_port_is_opened_and_closed_live_and_a_tracked_flow_goes_on";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![]);
    world.start();
    world.apply();
    echo_server(&world, "g1", 22);
    echo_server(&world, "g1", 80);
    assert!(!connects(&world, "net", ELASTIC, 22, QUICK), "no rule allows it");

    world.desired.groups = vec![group(1, vec![(tcp(22), anywhere())])];
    world.apply();
    assert!(connects(&world, "net", ELASTIC, 22, PATIENCE), "a rule allows it");
    assert!(!connects(&world, "net", ELASTIC, 80, QUICK), "no rule allows the other port");
    let flow = Flow::open(&world, "net", ELASTIC, 22);

    world.desired.groups = vec![group(1, vec![])];
    world.apply();
    assert!(!connects(&world, "net", ELASTIC, 22, QUICK), "the rule is gone");
    flow.goes_on(5);
    flow.finish().unwrap();
}

#[test]
fn a_rule_for_one_network_lets_in_no_other() {
    let test = "a_rule_for_one_network_lets_in_no_other";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), Peer::Cidr("203.0.113.0/24".parse().unwrap()))]);
    world.start();
    world.apply();
    echo_server(&world, "g1", 22);
    assert!(!connects(&world, "net", ELASTIC, 22, QUICK));
    let exact = Peer::Cidr(format!("{INTERNET}/32").parse().unwrap());
    world.desired.groups = vec![group(1, vec![(tcp(22), exact)])];
    world.apply();
    assert!(connects(&world, "net", ELASTIC, 22, PATIENCE));
}

#[test]
fn a_guest_reaches_the_internet_as_its_elastic_address_with_default_offloads() {
    let test = "a_guest_reaches_the_internet_as_its_elastic_address_with_default_offloads";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![]);
    world.start();
    world.apply();
    let seen = inside(&world, "net", || {
        let listener = std::net::TcpListener::bind((Ipv4Addr::UNSPECIFIED, 7000)).unwrap();
        std::thread::spawn(move || listener.accept().unwrap().1.ip())
    })
    .join()
    .unwrap();
    assert!(connects(&world, "g1", INTERNET, 7000, PATIENCE));
    assert_eq!(seen.join().unwrap(), ELASTIC);
    echo_server(&world, "net", 7001);
    // Superframes with partial checksums, both ways.
    let flow = Flow::open(&world, "g1", INTERNET, 7001);
    flow.goes_on(20);
    flow.finish().unwrap();
}

#[test]
fn an_elastic_address_that_moves_leaves_the_old_guest() {
    let test = "an_elastic_address_that_moves_leaves_the_old_guest";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(ping(), anywhere())]);
    world.add_guest(2, 1, "10.0.0.6").groups = vec![GroupId::from_random(1)];
    world.configure_guest(2);
    world.start();
    world.apply();
    let pings = |world: &World| {
        ping_flood(world, "net", ELASTIC, 20, Duration::from_millis(5)).join().unwrap()
    };
    assert_eq!(pings(&world), 20);
    world.desired.interfaces[0].elastic = None;
    world.apply();
    assert_eq!(pings(&world), 0);
    world.desired.interfaces[1].elastic = Some(ELASTIC);
    world.apply();
    assert_eq!(pings(&world), 20);
}

#[test]
fn a_group_as_source_admits_its_members_and_two_vpcs_never_meet() {
    let test = "a_group_as_source_admits_its_members_and_two_vpcs_never_meet";
    let Some(mut world) = World::new(test) else { return };
    for n in 1..=3u8 {
        let vpc = if n == 3 { 2 } else { 1 };
        let interface = world.add_guest(n, vpc, &format!("10.0.0.{}", 4 + n));
        interface.groups = vec![GroupId::from_random(if n == 3 { 2 } else { 1 })];
        world.configure_guest(n);
    }
    let mut other = group(2, vec![(tcp(80), anywhere())]);
    other.vpc = model::VpcId::from_random(2);
    world.desired.groups =
        vec![group(1, vec![(tcp(80), Peer::Group(GroupId::from_random(1)))]), other];
    world.start();
    world.apply();
    echo_server(&world, "g2", 80);
    echo_server(&world, "g3", 80);
    let to_two = Ipv4Addr::new(10, 0, 0, 6);
    let to_three = Ipv4Addr::new(10, 0, 0, 7);
    assert!(connects(&world, "g1", to_two, 80, PATIENCE), "a member of the group");
    assert!(!connects(&world, "g1", to_two, 81, QUICK), "a port that no rule names");
    assert!(!connects(&world, "g3", to_two, 80, QUICK), "another VPC");
    assert!(!connects(&world, "g1", to_three, 80, QUICK), "another VPC");
}

#[test]
fn a_guest_that_lies_about_its_address_is_not_heard() {
    let test = "a_guest_that_lies_about_its_address_is_not_heard";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(ping(), anywhere())]);
    world.start();
    world.apply();
    let count = |world: &World| {
        ping_flood(world, "g1", INTERNET, 10, Duration::from_millis(5)).join().unwrap()
    };
    assert_eq!(count(&world), 10, "as itself");
    let host = world.namespace("g1");
    let ip = |arguments: &str| {
        crate::world::run(std::process::Command::new("ip").args(arguments.split_whitespace()));
    };
    ip(&format!("-n {host} addr flush dev eth0"));
    ip(&format!("-n {host} addr add 10.0.0.99/24 dev eth0"));
    ip(&format!("-n {host} route add default via 10.0.0.1"));
    assert_eq!(count(&world), 0, "as another");
    ip(&format!("-n {host} link set eth0 down"));
    ip(&format!("-n {host} link set eth0 address 02:00:00:00:01:77"));
    ip(&format!("-n {host} addr flush dev eth0"));
    ip(&format!("-n {host} addr add 10.0.0.5/24 dev eth0"));
    ip(&format!("-n {host} link set eth0 up"));
    ip(&format!("-n {host} route add default via 10.0.0.1"));
    assert_eq!(count(&world), 0, "with another hardware address");
}

#[test]
fn why_names_the_rule_and_leaves_no_trace() {
    let test = "why_names_the_rule_and_leaves_no_trace";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.start();
    world.apply();
    let rule = world.desired.groups[0].ingress[0].id;
    let question = |port| Question {
        interface: world.desired.interfaces[0].id,
        direction: Direction::Ingress,
        local: None,
        protocol: 6,
        remote: Ipv4Addr::new(203, 0, 113, 9).into(),
        remote_port: 40_000,
        local_port: port,
    };
    let before = world.status();
    let allowed = world.why(&question(22));
    assert!(allowed.allowed, "{allowed:?}");
    assert_eq!(allowed.rule, Some(rule));
    let refused = world.why(&question(23));
    assert!(!refused.allowed, "{refused:?}");
    assert_eq!(refused.rule, None);
    let after = world.status();
    assert_eq!(after.flows, before.flows);
    assert_eq!(after.interfaces, before.interfaces);
}

#[test]
fn an_address_that_comes_to_this_host_is_announced_to_the_uplinks_neighbours() {
    let test = "an_address_that_comes_to_this_host_is_announced_to_the_uplinks_neighbours";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(ping(), anywhere())]);
    let public6: Ipv6Addr = "2001:db8:5::5".parse().unwrap();
    world.desired.interfaces[0].elastic = None;
    world.desired.interfaces[0].subnet6 = Some("2001:db8:5::/64".parse().unwrap());
    world.start();
    world.apply();
    // The addresses were another host's, with which the router has just spoken.
    let other = "02:de:ad:00:00:01";
    let net = world.namespace("net");
    for address in [ELASTIC.to_string(), public6.to_string()] {
        ip(&format!("-n {net} neigh replace {address} lladdr {other} dev eth0 nud stale"));
    }
    let neighbours = || run(Command::new("ip").args(["-n", &net, "neigh", "show", "dev", "eth0"]));
    assert_eq!(neighbours().matches(other).count(), 2);
    world.desired.interfaces[0].elastic = Some(ELASTIC);
    world.desired.interfaces[0].ipv6 = vec![public6];
    world.apply();
    let deadline = now() + Duration::from_secs(30);
    while neighbours().contains(other) {
        assert!(now() < deadline, "{}", neighbours());
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(ping_flood(&world, "net", ELASTIC, 5, Duration::from_millis(5)).join().unwrap(), 5);
}
