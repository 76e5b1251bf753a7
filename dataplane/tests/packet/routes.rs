//! Route tables: what was compiled sends each destination where the model sends it.

use std::net::IpAddr;

use dataplane::compile::{Host, Tables, compile};
use ebpf::layout::Hop;
use ebpf::route::{BLACKHOLE, CHECKED, INTERFACE, INTERNET, LOCAL, NAT, NOWHERE};
use ebpf::{Tables as _, V6};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::route_table::{ROUTES_A_TABLE_MAX, Target, Way};
use model::{InterfaceId, Route, RouteTable, RouteTableId, VpcId};
use rpc::dataplane::Desired;

use crate::random::Random;
use crate::world::{
    GUESTS, any_address, any_address6, desired, gateway, imagined_devices, interface_id,
};

/// Two tables of the first network and one of the second, over the addresses that there are.
pub fn tables(random: &mut Random) -> Vec<RouteTable> {
    let net = |text: &str| text.parse::<IpNet>().unwrap();
    let table = |random: &mut Random, n: u64| {
        let (vpc, guests) = if n < 2 { (1, 0..3) } else { (2, 3..GUESTS) };
        let gateway = Target::NatGateway(gateway(vpc as u64).id);
        // The second's neighbour is not in it, or does not exist.
        let nobody = InterfaceId::from_random(999);
        let targets: Vec<InterfaceId> = guests.map(interface_id).chain([nobody]).collect();
        let mut local = vec![net("10.0.0.0/16")];
        if random.chance(90) {
            local.push(net(["2001:db8:1::/56", "2001:db8:1:1::/64"][random.below(2) as usize]));
        }
        let mut routes: Vec<Route> = Vec::new();
        let mut add = |destination: IpNet, target| {
            let destination = destination.trunc();
            let new = routes.iter().all(|r| r.destination != destination);
            if new && !local.contains(&destination) {
                routes.push(Route { destination, target });
            }
        };
        if random.chance(80) {
            let outside = random.pick(&[Target::InternetGateway, gateway]);
            add(net("0.0.0.0/0"), outside);
            add(net("::/0"), random.pick(&[Target::InternetGateway, outside]));
        }
        for _ in 0..random.below(12) {
            let destination = match random.chance(50) {
                true => {
                    let length = random.pick(&[8, 15, 17, 24, 28, 31, 32]);
                    Ipv4Net::new(any_address(random), length).unwrap().into()
                }
                false => {
                    let length = random.pick(&[16, 48, 60, 64, 112, 127, 128]);
                    Ipv6Net::new(any_address6(random), length).unwrap().into()
                }
            };
            let target = match random.below(5) {
                0 => Target::Blackhole,
                1 => Target::InternetGateway,
                2 => gateway,
                _ => Target::Interface(random.pick(&targets)),
            };
            add(destination, target);
        }
        RouteTable { id: table_id(n), vpc: VpcId::from_random(vpc), local, routes }
    };
    (0..3).map(|n| table(random, n)).collect()
}

pub fn table_id(n: u64) -> RouteTableId {
    RouteTableId::from_random(u128::from(n) + 50)
}

/// The model's answer in the tables' terms.
fn expected(desired: &Desired, tables: &Tables, table: &RouteTable, to: IpAddr) -> Hop {
    let hop = |kind, to| Hop { kind, to };
    let target = match table.route(to) {
        None => return hop(NOWHERE, 0),
        Some(Way::Local(_)) => return hop(LOCAL, 0),
        Some(Way::Route(route)) => route.target,
    };
    match target {
        Target::InternetGateway => hop(INTERNET, 0),
        Target::Blackhole => hop(BLACKHOLE, 0),
        Target::NatGateway(id) => match desired.nat_gateways.iter().find(|g| g.id == id) {
            Some(gateway) if to.is_ipv4() => hop(NAT, gateway.elastic.into()),
            _ => hop(BLACKHOLE, 0),
        },
        Target::Interface(id) => match desired.interfaces.iter().find(|i| i.id == id) {
            None => hop(BLACKHOLE, 0),
            Some(i) if i.source_check => hop(CHECKED, 0),
            Some(i) => {
                let mut all = tables.interfaces.values();
                let record = all.find(|r| r.mac == i.mac.octets()).unwrap();
                hop(INTERFACE, record.ifindex)
            }
        },
    }
}

/// Every interface's table on `count` destinations: disagreements, and hops by their kind.
fn compare(random: &mut Random, desired: &Desired, host: &Host, count: u64) -> (u64, [u64; 7]) {
    let (mut wrong, mut kinds) = (0, [0; 7]);
    for interface in &desired.interfaces {
        let Some(id) = interface.route_table else { continue };
        let table = desired.route_tables.iter().find(|t| t.id == id).unwrap();
        let mut records = host.tables().interfaces.values();
        let record = records.find(|r| r.mac == interface.mac.octets()).unwrap();
        for _ in 0..count {
            let (to, got): (IpAddr, Hop) = match random.chance(50) {
                true => {
                    let to = any_address(random);
                    (to.into(), host.hop(record.routes, to.into()))
                }
                false => {
                    let to = any_address6(random);
                    (to.into(), host.hop6(record.routes, V6::from_bits(to.to_bits())))
                }
            };
            kinds[got.kind as usize] += 1;
            wrong += u64::from(got != expected(desired, host.tables(), table, to));
        }
    }
    (wrong, kinds)
}

#[test]
fn a_compiled_table_sends_where_the_model_sends() {
    let mut random = Random::seeded("routes", 31);
    let devices = imagined_devices();
    let mut loaded = Tables::default();
    let mut kinds = [0; 7];
    for world in 0..300 {
        let desired = desired(&mut random, 0);
        let tables = compile(&desired, &devices, &loaded).unwrap();
        let (wrong, met) = compare(&mut random, &desired, &Host::new(tables.clone()), 100);
        assert_eq!(wrong, 0, "world {world}: {desired:#?}");
        kinds.iter_mut().zip(met).for_each(|(sum, met)| *sum += met);
        loaded = tables;
    }
    assert!(kinds.iter().all(|met| *met > 100), "{kinds:?}");
}

#[test]
fn a_route_left_out_is_noticed() {
    let mut random = Random::seeded("routes, sabotaged", 32);
    let mut noticed = 0;
    for _ in 0..20 {
        let desired = desired(&mut random, 0);
        let mut tables = compile(&desired, &imagined_devices(), &Tables::default()).unwrap();
        tables.routes.retain(|_, hop| hop.kind != LOCAL);
        noticed += u64::from(compare(&mut random, &desired, &Host::new(tables), 100).0 > 0);
    }
    assert!(noticed >= 10, "only {noticed} of 20 sabotaged worlds were noticed");
}

/// A world in which the first interface has the first table.
fn routed() -> Desired {
    let mut random = Random::seeded("routed", 33);
    let mut world = desired(&mut random, 0);
    while world.interfaces.len() < GUESTS {
        world = desired(&mut random, 0);
    }
    world.interfaces[0].route_table = Some(table_id(0));
    world
}

fn refused(world: &Desired) -> String {
    compile(world, &imagined_devices(), &Tables::default()).unwrap_err().to_string()
}

#[test]
fn a_thousand_routes_of_each_family_are_the_limit_and_work() {
    let mut world = routed();
    let v4 = |n: usize| format!("11.{}.{}.0/24", n / 256, n % 256);
    let v6 = |n: usize| format!("2001:db8:{n:x}::/48");
    let to = |net: String| Route {
        destination: net.parse().unwrap(),
        target: Target::Interface(interface_id(n_of(&net))),
    };
    fn n_of(net: &str) -> usize {
        net.bytes().map(usize::from).sum::<usize>() % 3
    }
    world.route_tables[0].local = vec!["10.0.0.0/16".parse().unwrap()];
    let all = (0..ROUTES_A_TABLE_MAX).flat_map(|n| [to(v4(n)), to(v6(n))]);
    world.route_tables[0].routes = all.collect();
    let tables = compile(&world, &imagined_devices(), &Tables::default()).unwrap();
    let mut random = Random::seeded("a thousand routes", 34);
    assert_eq!(compare(&mut random, &world, &Host::new(tables), 300).0, 0);
    world.route_tables[0].routes.push(to("12.0.0.0/24".into()));
    let said = refused(&world);
    assert!(said.contains("1001 routes of a family, but 1000 are the most"), "{said}");
}

#[test]
fn a_table_that_contradicts_itself_or_its_network_is_refused_by_name() {
    let mut world = routed();
    let route = Route { destination: "10.0.7.7/16".parse().unwrap(), target: Target::Blackhole };
    world.route_tables[0].routes = vec![route];
    let said = refused(&world);
    assert!(said.contains("route 10.0.0.0/16: there is one already, or it is local"), "{said}");

    let mut world = routed();
    let target = Target::Interface(interface_id(3));
    let destination = "9.0.0.0/8".parse().unwrap();
    world.route_tables[0].routes = vec![Route { destination, target }];
    assert!(refused(&world).contains("belongs to another network"));

    let mut world = routed();
    world.interfaces[0].route_table = Some(table_id(2));
    assert!(refused(&world).contains("belongs to another network"));
    world.interfaces[0].route_table = Some(table_id(9));
    assert!(refused(&world).contains("is not in the desired state"));
    let mut world = routed();
    let twice = world.route_tables[0].clone();
    world.route_tables.push(twice);
    assert!(refused(&world).contains("it appears twice"));
}

/// What changes in a table is written beside it, and packets see the one or the other.
#[test]
fn a_changed_table_has_another_number_and_an_unchanged_one_keeps_its_own() {
    let mut world = routed();
    let numbers =
        |tables: &Tables| -> Vec<u32> { tables.interfaces.values().map(|i| i.routes).collect() };
    let before = compile(&world, &imagined_devices(), &Tables::default()).unwrap();
    let again = compile(&world, &imagined_devices(), &before).unwrap();
    assert_eq!((numbers(&again), &again.routes), (numbers(&before), &before.routes));
    let destination = "77.0.0.0/8".parse().unwrap();
    world.route_tables[0].routes.push(Route { destination, target: Target::Blackhole });
    let after = compile(&world, &imagined_devices(), &before).unwrap();
    let changed = |i: &u32| before.interfaces[i].routes != after.interfaces[i].routes;
    for ifindex in before.interfaces.keys() {
        let first = before.names.route_tables.get(ifindex) == Some(&table_id(0));
        assert_eq!(changed(ifindex), first);
    }
    let same = |key| before.routes.get(key) == after.routes.get(key);
    assert!(after.routes.keys().filter(|key| before.routes.contains_key(key)).all(same));
}
