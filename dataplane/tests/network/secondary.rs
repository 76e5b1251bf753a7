//! Secondary private addresses, and elastic addresses that move between them.

use std::net::{IpAddr, Ipv4Addr, TcpListener, UdpSocket};
use std::process::Command;
use std::time::Duration;

use model::GroupId;
use rpc::dataplane::PrivateAddress;

use crate::traffic::{PATIENCE, Stream, echo_datagrams, inside, ping_flood};
use crate::world::{INTERNET, World, anywhere, group, now, ping, run, tcp, udp};

const FIRST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
const SECOND: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 15);
const OF_TWO: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 16);
const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const ELASTIC_OF_TWO: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 201);

/// Two guests; each has a second address with an elastic one, and the first ones have none.
fn two_guests(test: &str) -> Option<World> {
    let mut world = World::new(test)?;
    let rules = vec![(tcp(80), anywhere()), (udp(90), anywhere()), (ping(), anywhere())];
    world.desired.groups = vec![group(1, rules)];
    for (n, first, second, elastic) in
        [(1, FIRST, SECOND, ELASTIC), (2, Ipv4Addr::new(10, 0, 0, 6), OF_TWO, ELASTIC_OF_TWO)]
    {
        let interface = world.add_guest(n, 1, &first.to_string());
        interface.groups = vec![GroupId::from_random(1)];
        interface.secondary = vec![PrivateAddress { address: second, elastic: Some(elastic) }];
        world.configure_guest(n);
        add_address(&world, &format!("g{n}"), second);
    }
    world.start();
    world.apply();
    Some(world)
}

fn add_address(world: &World, role: &str, address: Ipv4Addr) {
    let address = format!("{address}/24");
    run(world.command(role, "ip").args(["addr", "add", &address, "dev", "eth0"]));
}

/// The ends of a connection, as its server sees them.
fn connection(
    world: &World,
    (client, from): (&str, Ipv4Addr),
    (server, to): (&str, Ipv4Addr),
) -> Option<(IpAddr, IpAddr)> {
    let listen = || {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, 80)).unwrap();
        listener.set_nonblocking(true).unwrap();
        listener
    };
    let listener = inside(world, server, listen).join().unwrap();
    let connect = move || {
        let curl = ["-s", "-m", "10", "--interface", &from.to_string(), &format!("http://{to}/")]
            .map(str::to_owned);
        Command::new("curl").args(curl).status().unwrap()
    };
    let client = inside(world, client, connect);
    let begun = now();
    let mut ends = None;
    while ends.is_none() && now() - begun < PATIENCE && !client.is_finished() {
        if let Ok((stream, peer)) = listener.accept() {
            ends = Some((stream.local_addr().unwrap().ip(), peer.ip()));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(listener);
    client.join().unwrap();
    ends
}

#[test]
fn a_secondary_address_is_reached_and_leaves_by_its_own_elastic_one() {
    let test = "a_secondary_address_is_reached_and_leaves_by_its_own_elastic_one";
    let Some(world) = two_guests(test) else { return };
    let of = |client, server| connection(&world, client, server);
    let ends = |local: Ipv4Addr, peer: Ipv4Addr| Some((local.into(), peer.into()));
    assert_eq!(of(("net", INTERNET), ("g1", ELASTIC)), ends(SECOND, INTERNET), "inward");
    assert_eq!(of(("g1", SECOND), ("net", INTERNET)), ends(INTERNET, ELASTIC), "outward");
    assert_eq!(of(("g1", FIRST), ("net", INTERNET)), None, "the first has no elastic address");
    assert_eq!(of(("g2", OF_TWO), ("g1", SECOND)), ends(SECOND, OF_TWO), "inside the network");
    assert_eq!(of(("g2", OF_TWO), ("g1", ELASTIC)), ends(SECOND, ELASTIC_OF_TWO), "hairpin");
    // One that is not its own is not heard.
    let stranger = Ipv4Addr::new(10, 0, 0, 25);
    add_address(&world, "g1", stranger);
    assert_eq!(of(("g1", stranger), ("g2", OF_TWO)), None, "as another");
    let spoofed = world.status().interfaces[0].reasons.get("spoofed-arp").copied();
    assert!(
        spoofed.is_some_and(|n| n > 0) || world.status().reasons.contains_key("spoofed-address")
    );
    assert_eq!(
        ping_flood(&world, "net", ELASTIC, 10, Duration::from_millis(5)).join().unwrap(),
        10
    );
}

/// Says which guest it is to every datagram.
fn name_server(world: &World, role: &'static str, own: Ipv4Addr) {
    let socket = inside(world, role, move || UdpSocket::bind((own, 90)).unwrap()).join().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 64];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            buffer[length] = role.as_bytes()[1];
            _ = socket.send_to(&buffer[..=length], from);
        }
    });
}

/// Who answers for the elastic address now; asked until someone does.
fn who_answers(world: &World) -> u8 {
    let ask = || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.connect((ELASTIC, 90)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let begun = now();
        while now() - begun < PATIENCE {
            socket.send(b"?").unwrap();
            let mut answer = [0; 2];
            if socket.recv(&mut answer).is_ok() {
                return answer[1];
            }
        }
        0
    };
    inside(world, "net", ask).join().unwrap()
}

#[test]
fn an_elastic_address_moves_between_private_ones_and_others_lose_nothing() {
    let test = "an_elastic_address_moves_between_private_ones_and_others_lose_nothing";
    let Some(mut world) = two_guests(test) else { return };
    world.desired.interfaces[1].secondary[0].elastic = None;
    world.desired.interfaces[1].elastic = Some(ELASTIC_OF_TWO);
    world.apply();
    echo_datagrams(&world, "g2", 80);
    world.desired.groups[0].ingress.push(group(9, vec![(udp(80), anywhere())]).ingress[0].clone());
    world.apply();
    let stream = Stream::open(&world, "net", ELASTIC_OF_TWO, 80);
    name_server(&world, "g1", SECOND);
    name_server(&world, "g2", OF_TWO);
    for round in 0..10 {
        let here = usize::from(round % 2 == 1);
        for (n, interface) in world.desired.interfaces.iter_mut().enumerate() {
            interface.secondary[0].elastic = (n == here).then_some(ELASTIC);
        }
        world.apply();
        assert_eq!(who_answers(&world), b'1' + here as u8, "round {round}");
    }
    let (sent, heard) = stream.finish();
    assert_eq!(heard, sent, "of the address that did not move");
}
