//! What a route table and a network ACL add to a packet, by the kernel's own clock:
//! `HOSTPLANE_MEASURE=1 cargo test -p dataplane --test packet -- --nocapture cost::`.

use dataplane::compile::compile;
use dataplane::load::Loaded;
use ebpf::{GATEWAY_MAC, Reason};
use etherparse::PacketBuilder;
use model::network_acl::{ENTRIES_MAX, Entry};
use model::route_table::{ROUTES_A_TABLE_MAX, Target};
use model::{Direction, PortRange, Protocol, Route};
use nix::net::if_::if_nametoindex;
use rpc::dataplane::Desired;

use crate::acls::acl_id;
use crate::agree::Bench;
use crate::random::Random;
use crate::routes::table_id;
use crate::world::{devices, group, peopled};

const TIMES: u32 = 1_000_000;
const ROUNDS: usize = 9;
/// Behind the last route and the last entry.
const TO: [u8; 4] = [203, 0, 113, 9];

/// The first guest, to the world without an elastic address: dropped after everything that
/// is asked of the way.
fn bare() -> Desired {
    let mut random = Random::seeded("cost", 51);
    let mut world = peopled(&mut random);
    let first = &mut world.interfaces[0];
    (first.elastic, first.route_table, first.network_acl) = (None, None, None);
    first.groups = vec![group(0)];
    world
}

fn with_table(routes: usize) -> Desired {
    let mut world = bare();
    let route = |n: usize| Route {
        destination: format!("{}.{}.{}.0/24", 11 + n % 190, n / 256, n % 256).parse().unwrap(),
        target: Target::Blackhole,
    };
    let default =
        Route { destination: "0.0.0.0/0".parse().unwrap(), target: Target::InternetGateway };
    world.route_tables[0].local = vec!["10.0.0.0/16".parse().unwrap()];
    world.route_tables[0].routes = (1..routes).map(route).chain([default]).collect();
    world.interfaces[0].route_table = Some(table_id(0));
    world
}

/// With an elastic address and no rule that lets anything out; `entries` of an ACL, none of
/// which matches but the last, which permits all.
fn with_acl(entries: usize) -> Desired {
    let mut world = bare();
    world.interfaces[0].elastic = Some("198.51.100.10".parse().unwrap());
    world.groups.iter_mut().for_each(|g| g.egress.clear());
    let entry = |n: usize| Entry {
        number: n as u16,
        direction: Direction::Egress,
        allow: n == entries,
        protocol: match n == entries {
            true => Protocol::Any,
            false => Protocol::Tcp(PortRange::single(n as u16 + 1000)),
        },
        net: if n == entries { "0.0.0.0/0" } else { "198.18.0.0/15" }.parse().unwrap(),
    };
    world.network_acls[0].entries = (1..=entries).map(entry).collect();
    world.interfaces[0].network_acl = (entries > 0).then(|| acl_id(0));
    world
}

fn frame(world: &Desired) -> Vec<u8> {
    let first = &world.interfaces[0];
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(first.mac.octets(), GATEWAY_MAC)
        .ipv4(first.address.octets(), TO, 64)
        .udp(40_000, 9)
        .write(&mut frame, &[0; 22])
        .unwrap();
    frame
}

/// A few thousand runs prove that it can be measured; a million are the measurement.
#[test]
fn of_a_route_table_and_a_network_acl() {
    let times = match std::env::var_os("HOSTPLANE_MEASURE") {
        Some(_) => TIMES,
        None => TIMES / 1000,
    };
    let Some(bench) = Bench::new("of_a_route_table_and_a_network_acl") else { return };
    let devices = devices(|name| if_nametoindex(name).unwrap());
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let worlds = [
        ("no route table", bare(), Reason::NoElastic),
        ("a route table of 2 routes", with_table(2), Reason::NoElastic),
        ("a route table of 50 routes", with_table(50), Reason::NoElastic),
        ("a route table of 1000 routes", with_table(ROUTES_A_TABLE_MAX), Reason::NoElastic),
        ("no network ACL", with_acl(0), Reason::EgressDenied),
        ("a network ACL of 2 entries", with_acl(2), Reason::EgressDenied),
        ("a network ACL of 40 entries", with_acl(ENTRIES_MAX), Reason::EgressDenied),
    ];
    for (what, world, reason) in worlds {
        let tables = compile(&world, &devices, loaded.tables()).unwrap();
        loaded.update(tables).unwrap();
        let (frame, mac) = (frame(&world), world.interfaces[0].mac.octets());
        let ifindex = loaded.tables().interfaces.values().find(|i| i.mac == mac).unwrap().ifindex;
        let run = loaded.run(ifindex, &frame, ebpf::ASK_MARK).unwrap();
        assert_eq!(run.reason, Some(reason), "{what}");
        let one = |_| loaded.time(ifindex, &frame, times).unwrap();
        let mut rounds: Vec<_> = (0..ROUNDS).map(one).collect();
        rounds.sort();
        eprintln!("{what}: {:?} a packet ({:?} to {:?})", rounds[4], rounds[0], rounds[8]);
    }
}
