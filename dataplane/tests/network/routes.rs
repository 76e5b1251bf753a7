//! Route tables: by an appliance there and back, into a black hole, and nowhere.
//!
//! ```text
//!  g1 10.0.0.5, 2001:db8:1:1::5 ─┐  tables of both: the other's subnet by g2
//!                                ├─ g2 10.0.1.5, 2001:db8:1:2::5, forwards, no source check
//!  g3 10.0.2.5, 2001:db8:1:3::5 ─┘
//! ```

use std::net::Ipv4Addr;
use std::process::Command;
use std::time::Duration;

use model::route_table::Target;
use model::{Direction, GroupId, InterfaceId, Peer, Protocol, Route, RouteTable, RouteTableId};
use rpc::dataplane::{Question, Routed};

use crate::six;
use crate::traffic::{Flow, PATIENCE, connects, echo_server};
use crate::world::{World, anywhere, group, has, now, run};

const FIRST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
const THIRD: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 5);
const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const SHORT: Duration = Duration::from_secs(1);

fn ip(arguments: &str) {
    run(Command::new("ip").args(arguments.split_whitespace()));
}

fn table(n: u128, routes: &[(&str, Target)]) -> RouteTable {
    let net = |text: &str| text.parse().unwrap();
    let route = |(to, target): &(&str, Target)| Route { destination: net(to), target: *target };
    RouteTable {
        id: RouteTableId::from_random(n),
        vpc: model::VpcId::from_random(1),
        local: vec![net("10.0.0.0/16"), net("2001:db8:1::/56")],
        routes: routes.iter().map(route).collect(),
    }
}

fn by_second() -> Target {
    Target::Interface(InterfaceId::from_random(2))
}

fn everyone6() -> Peer {
    Peer::Cidr("::/0".parse().unwrap())
}

fn world(test: &str) -> Option<World> {
    let mut world = World::new(test)?;
    let mut open = group(1, vec![(Protocol::Any, anywhere()), (Protocol::Any, everyone6())]);
    let rule = model::RuleId::from_random(66);
    open.egress.push(model::Rule { id: rule, protocol: Protocol::Any, peer: everyone6() });
    world.desired.groups = vec![open];
    for n in 1..=3_u8 {
        let interface = world.add_guest(n, 1, &format!("10.0.{}.5", n - 1));
        interface.ipv6 = vec![format!("2001:db8:1:{n}::5").parse().unwrap()];
        interface.subnet6 = Some(format!("2001:db8:1:{n}::/64").parse().unwrap());
        interface.groups = vec![GroupId::from_random(1)];
        interface.source_check = n != 2;
        world.configure_guest(n);
        let inside = world.namespace(&format!("g{n}"));
        ip(&format!("-n {inside} addr add 2001:db8:1:{n}::5/64 dev eth0 nodad"));
        ip(&format!("-n {inside} route add default via fe80::68:70ff:fe00:1 dev eth0"));
    }
    world.desired.interfaces[0].elastic = Some(ELASTIC);
    world.desired.interfaces[0].route_table = Some(RouteTableId::from_random(1));
    world.desired.interfaces[2].route_table = Some(RouteTableId::from_random(3));
    let there = [
        ("10.0.2.0/24", by_second()),
        ("2001:db8:1:3::/64", by_second()),
        ("0.0.0.0/0", Target::InternetGateway),
    ];
    let back = [("10.0.0.0/24", by_second()), ("2001:db8:1:1::/64", by_second())];
    world.desired.route_tables = vec![table(1, &there), table(3, &back)];
    forwards(&world, true);
    world.start();
    world.apply();
    Some(world)
}

/// Whether the second guest is a router.
fn forwards(world: &World, on: bool) {
    let value = if on { "1" } else { "0" };
    for name in ["net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"] {
        let script = format!("echo {value} > /proc/sys/{name}");
        run(world.command("g2", "sh").args(["-c", &script]));
    }
}

fn packets(world: &World, n: usize, reason: &str) -> u64 {
    world.status().interfaces[n - 1].reasons.get(reason).copied().unwrap_or(0)
}

fn asked(world: &World, to: Ipv4Addr) -> rpc::dataplane::Verdict {
    world.why(&Question {
        interface: InterfaceId::from_random(1),
        direction: Direction::Egress,
        local: None,
        protocol: 6,
        remote: to.into(),
        remote_port: 7,
        local_port: 40_000,
    })
}

fn routed(by: Option<&str>) -> Option<Routed> {
    let destination = by.map(|net| net.parse().unwrap());
    Some(Routed { table: RouteTableId::from_random(1), destination })
}

#[test]
fn an_appliance_forwards_there_and_back_and_its_route_changes_under_a_flow() {
    let test = "an_appliance_forwards_there_and_back_and_its_route_changes_under_a_flow";
    if !has(test, "ping") {
        return;
    }
    let Some(mut world) = world(test) else { return };
    echo_server(&world, "g3", 7);
    let flow = Flow::open(&world, "g1", THIRD, 7);
    // Each of its packets passed the second guest, which knows the flow both as it came
    // and as it went on.
    assert!(packets(&world, 2, "established") > 0, "{:#?}", world.status());
    assert!(six::pings(&world, "g1", "2001:db8:1:3::5"), "the other family, too");
    assert_eq!(asked(&world, THIRD).routed, routed(Some("10.0.2.0/24")));

    // Into a black hole: at once, and for what is open too.
    let before = world.desired.route_tables[0].clone();
    world.desired.route_tables[0].routes[0].target = Target::Blackhole;
    world.apply();
    let said = asked(&world, THIRD);
    assert_eq!((said.reason.as_str(), said.routed), ("blackhole", routed(Some("10.0.2.0/24"))));
    let begun = now();
    while packets(&world, 1, "blackhole") < 2 {
        assert!(now() - begun < PATIENCE, "the flow went on by a route that is gone");
        std::thread::sleep(Duration::from_millis(20));
    }
    // And back, across a daemon that was killed: the flow goes on, and the tables are found.
    world.desired.route_tables[0] = before;
    world.apply();
    flow.goes_on(3);
    world.kill();
    flow.goes_on(3);
    world.start();
    world.desired.generation += 1;
    assert_eq!(world.try_apply().unwrap().changes, 0, "what was pinned is what is wanted");
    assert!(world.status().adopted);
    flow.goes_on(3);
    flow.finish().unwrap();

    // Without its table, the network by itself: no appliance.
    let through = packets(&world, 2, "new-flow");
    for n in [0, 2] {
        world.desired.interfaces[n].route_table = None;
    }
    forwards(&world, false);
    world.apply();
    assert!(connects(&world, "g1", THIRD, 7, PATIENCE));
    assert_eq!(packets(&world, 2, "new-flow"), through);
}

#[test]
fn what_no_route_names_goes_nowhere_and_a_checked_target_takes_nothing() {
    let test = "what_no_route_names_goes_nowhere_and_a_checked_target_takes_nothing";
    let Some(mut world) = world(test) else { return };
    echo_server(&world, "net", 7);
    let internet = crate::world::INTERNET;
    assert!(connects(&world, "g1", internet, 7, PATIENCE), "by the internet gateway");
    world.desired.route_tables[0].routes.pop();
    world.desired.interfaces[1].source_check = true;
    world.apply();
    assert!(!connects(&world, "g1", internet, 7, SHORT));
    let said = asked(&world, internet);
    assert_eq!((said.reason.as_str(), said.routed), ("no-route", routed(None)));
    assert!(packets(&world, 1, "no-route") > 0);
    // The second takes only what is addressed to it.
    assert!(!connects(&world, "g1", THIRD, 7, SHORT));
    assert_eq!(asked(&world, THIRD).reason, "destination-check");
    // Who is in the network and in no route is local; who is nobody is nowhere.
    assert_eq!(asked(&world, Ipv4Addr::new(10, 0, 1, 5)).routed, routed(Some("10.0.0.0/16")));
    assert_eq!(asked(&world, Ipv4Addr::new(10, 0, 1, 9)).reason, "no-route");
    // On its own link no table is asked.
    assert_eq!(asked(&world, Ipv4Addr::new(10, 0, 0, 9)).routed, None);
    // From the world the interface is reached as before; its answer has no way.
    echo_server(&world, "g1", 8);
    assert!(!connects(&world, "net", ELASTIC, 8, SHORT));
    world.desired.interfaces[0].route_table = None;
    world.apply();
    assert!(connects(&world, "net", ELASTIC, 8, PATIENCE));
    assert_eq!(world.desired.interfaces[0].address, FIRST);
}
