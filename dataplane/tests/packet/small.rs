//! Every small world, and not only some: each pair of rules out of a menu that has one
//! of every kind, in one group and spread over two, asked about every header that the
//! menu can tell apart.

use dataplane::compile::{Host, Tables, compile};
use model::security_group::Header;
use model::{Direction, Peer, PortRange, Protocol, Rule, RuleId};
use rpc::dataplane::Desired;

use crate::permits::both;
use crate::random::Random;
use crate::world::{GUESTS, desired, group, guest_mac, imagined_devices};

fn protocols() -> Vec<Protocol> {
    let ports = |first, last| PortRange::new(first, last).unwrap();
    vec![
        Protocol::Any,
        Protocol::Tcp(PortRange::ALL),
        Protocol::Tcp(ports(80, 80)),
        Protocol::Tcp(ports(79, 81)),
        Protocol::Udp(ports(0, 80)),
        Protocol::Udp(ports(81, 65_535)),
        Protocol::Icmp { kind: None, code: None },
        Protocol::Icmp { kind: Some(8), code: None },
        Protocol::Icmp { kind: Some(3), code: Some(4) },
        Protocol::Number(6),
        Protocol::Number(47),
    ]
}

/// Nobody, everybody, one, a network, its own group, a neighbour's, one without members.
fn peers() -> Vec<Peer> {
    let cidr = |text: &str| Peer::Cidr(text.parse().unwrap());
    vec![
        cidr("0.0.0.0/0"),
        cidr("203.0.113.9/32"),
        cidr("203.0.113.8/31"),
        cidr("128.0.0.0/1"),
        Peer::Group(group(0)),
        Peer::Group(group(2)),
        Peer::Group(group(3)),
    ]
}

/// On both sides of every boundary of the menu.
fn headers() -> Vec<Header> {
    let remotes = ["203.0.113.9", "203.0.113.8", "203.0.113.10", "10.0.0.10", "10.0.0.11"];
    let mut details: Vec<(u8, u16)> = Vec::new();
    for port in [0, 78, 79, 80, 81, 82, 65_535] {
        details.extend([(6, port), (17, port)]);
    }
    details.extend([0x0800, 0x0801, 0x0000, 0x0304, 0x0303, 0x0b00].map(|detail| (1, detail)));
    details.extend([(47, 0), (50, 0)]);
    let header = |remote: &str, (protocol, detail)| Header {
        remote: remote.parse().unwrap(),
        protocol,
        detail,
    };
    remotes.iter().flat_map(|r| details.iter().map(move |d| header(r, *d))).collect()
}

/// Guest 0 in groups 0 and 1, guest 1 in group 2, and nobody in group 3.
fn world() -> Desired {
    let mut random = Random::seeded("small", 81);
    let mut world = desired(&mut random, 0);
    while world.interfaces.len() < GUESTS {
        world = desired(&mut random, 0);
    }
    world.interfaces.truncate(2);
    world.interfaces[0].groups = vec![group(0), group(1)];
    world.interfaces[1].groups = vec![group(2)];
    world.groups.truncate(4);
    world
}

/// Whether the tables and the model say the same, of every header and both directions;
/// how many they permit.
fn agree(world: &Desired, tables: Tables, headers: &[Header]) -> Result<usize, String> {
    let host = Host::new(tables);
    let records = &host.tables().interfaces;
    let record = *records.values().find(|r| r.mac == guest_mac(0).octets()).unwrap();
    let mut permitted = 0;
    for direction in [Direction::Ingress, Direction::Egress] {
        for header in headers {
            let (got, expected) =
                both(world, &host, &world.interfaces[0], &record, direction, header);
            if got != expected {
                return Err(format!("{got:?} ≠ {expected:?}: {direction:?} {header:?}"));
            }
            permitted += usize::from(got.is_some());
        }
    }
    Ok(permitted)
}

fn menu() -> Vec<(Protocol, Peer)> {
    let of = |protocol| peers().into_iter().map(move |peer| (protocol, peer));
    protocols().into_iter().flat_map(of).collect()
}

fn rule(id: u128, (protocol, peer): (Protocol, Peer)) -> Rule {
    Rule { id: RuleId::from_random(id), protocol, peer }
}

#[test]
fn in_every_small_world_the_tables_say_what_the_model_says() {
    let (menu, headers, devices) = (menu(), headers(), imagined_devices());
    let mut world = world();
    let (mut worlds, mut asked, mut permitted) = (0, 0, 0);
    for (i, first) in menu.iter().enumerate() {
        // Ordered both ways in one group is the same pair: the model takes the first.
        for second in &menu[i..] {
            for apart in [false, true] {
                let rules = [rule(1, *first), rule(2, *second)];
                world.groups[0].ingress = rules[..if apart { 1 } else { 2 }].to_vec();
                world.groups[1].ingress = rules[if apart { 1 } else { 2 }..].to_vec();
                for n in [0, 1] {
                    world.groups[n].egress = world.groups[n].ingress.clone();
                }
                let tables = compile(&world, &devices, &Tables::default()).unwrap();
                let said = agree(&world, tables, &headers);
                let said = said.unwrap_or_else(|e| panic!("{first:?}, {second:?}, {apart}: {e}"));
                permitted += said;
                asked += 2 * headers.len();
                worlds += 1;
            }
        }
    }
    eprintln!("{worlds} worlds, {asked} questions, {permitted} permitted, 0 disagreements");
    assert_eq!(worlds, menu.len() * (menu.len() + 1));
}

#[test]
fn a_rule_that_reaches_one_port_too_far_is_noticed_in_a_small_world() {
    let mut world = world();
    let right = rule(1, (Protocol::Tcp(PortRange::single(80)), peers()[0]));
    let wrong = Protocol::Tcp(PortRange::new(80, 81).unwrap());
    world.groups[0].ingress = vec![Rule { protocol: wrong, ..right.clone() }];
    let tables = compile(&world, &imagined_devices(), &Tables::default()).unwrap();
    assert!(agree(&world, tables.clone(), &headers()).is_ok());
    world.groups[0].ingress = vec![right];
    assert!(agree(&world, tables, &headers()).is_err());
}
