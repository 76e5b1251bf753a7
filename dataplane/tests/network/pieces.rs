//! Datagrams in pieces, as kernels make them and nmap does, through an elastic address,
//! between guests of the host, and of both families.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use model::{GroupId, PortRange, Protocol};

use crate::six;
use crate::traffic::{PATIENCE, echo_server, inside};
use crate::world::{INTERNET, World, anywhere, group, has, now, ping, tcp};

const ELASTIC: &str = "198.51.100.130";
/// Of the subnet's other guest.
const OTHER: &str = "10.0.0.6";
/// Six pieces, the last of them short.
const LONG: usize = 8000;

fn udp(port: u16) -> Protocol {
    Protocol::Udp(PortRange::single(port))
}

/// Two guests of one network; the first has an elastic address.
fn two_guests(test: &str) -> Option<World> {
    let mut world = World::new(test)?;
    for (n, address) in [(1, "10.0.0.5"), (2, OTHER)] {
        let interface = world.add_guest(n, 1, address);
        interface.groups = vec![GroupId::from_random(1)];
        interface.dhcp.mtu = 1500;
        interface.elastic = (n == 1).then(|| ELASTIC.parse().unwrap());
    }
    let rules = vec![(ping(), anywhere()), (udp(7000), anywhere()), (tcp(7000), anywhere())];
    world.desired.groups = vec![group(1, rules)];
    world.configure_guest(1);
    world.configure_guest(2);
    world.start();
    world.apply();
    Some(world)
}

/// Says back whatever comes to the port, of either family. It listens when this returns.
pub fn echo(world: &World, role: &str, port: u16) {
    let any = SocketAddr::new(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED), port);
    let socket = inside(world, role, move || UdpSocket::bind(any).unwrap()).join().unwrap();
    std::thread::spawn(move || {
        let mut buffer = vec![0; 65_536];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            _ = socket.send_to(&buffer[..length], from);
        }
    });
}

/// Whether a datagram of so many bytes comes back whole, asked again until it does.
pub fn comes_back(world: &World, role: &str, to: SocketAddr, size: usize, wait: Duration) -> bool {
    let asks = inside(world, role, move || {
        let any =
            if to.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { IpAddr::V6([0; 16].into()) };
        let socket = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let said: Vec<u8> = (0..size).map(|n| (n * 7) as u8).collect();
        let (begun, mut heard) = (now(), vec![0; 65_536]);
        while now() - begun < wait {
            socket.send_to(&said, to).unwrap();
            if socket.recv(&mut heard).is_ok_and(|length| heard[..length] == said) {
                return true;
            }
        }
        false
    });
    asks.join().unwrap()
}

#[test]
fn datagrams_in_pieces_pass_as_their_first_piece_does() {
    let test = "datagrams_in_pieces_pass_as_their_first_piece_does";
    let Some(world) = two_guests(test) else { return };
    let at = |to: &str, port| SocketAddr::new(to.parse().unwrap(), port);
    let internet = INTERNET.to_string();
    for (role, port) in [("g1", 7000), ("g1", 7001), ("g2", 7000), ("net", 7000)] {
        echo(&world, role, port);
    }
    assert!(comes_back(&world, "g1", at(&internet, 7000), LONG, PATIENCE), "to the world");
    assert!(comes_back(&world, "net", at(ELASTIC, 7000), LONG, PATIENCE), "from it");
    assert!(comes_back(&world, "g1", at(OTHER, 7000), LONG, PATIENCE), "to another guest");
    // The longest that there is.
    assert!(comes_back(&world, "net", at(ELASTIC, 7000), 65_507, PATIENCE), "45 pieces");
    for (role, to) in [("g1", internet.as_str()), ("net", ELASTIC), ("g1", OTHER)] {
        let mut ping = world.command(role, "ping");
        let pings = ping.args(["-c", "2", "-W", "30", "-s", "6000", to]).output().unwrap();
        assert!(pings.status.success(), "{role} to {to}: {pings:?}");
    }
    let before = world.status().reasons;
    assert!(before["fragment-follows"] > 100, "{before:#?}");
    assert!(!before.contains_key("overlapping-fragment"), "{before:#?}");
    // What the first piece may not, none may.
    let wait = Duration::from_millis(600);
    assert!(!comes_back(&world, "net", at(ELASTIC, 7001), LONG, wait), "no rule lets it in");
    let after = world.status().reasons;
    assert!(after["ingress-denied"] > before.get("ingress-denied").copied().unwrap_or(0));
    let lost = |r: &std::collections::BTreeMap<String, u64>| {
        r.get("fragment-without-first").copied().unwrap_or(0)
    };
    assert!(lost(&after) >= lost(&before) + 5, "{after:#?}");
}

#[test]
fn datagrams_in_pieces_pass_by_ipv6_too() {
    let test = "datagrams_in_pieces_pass_by_ipv6_too";
    let ping6 = Protocol::Icmpv6 { kind: Some(128), code: None };
    let rules = vec![(ping6, six::everyone()), (udp(7000), six::everyone())];
    let Some(mut world) = six::world(test, rules) else { return };
    world.desired.interfaces.iter_mut().for_each(|i| i.dhcp.mtu = 1500);
    world.apply();
    let at = |to: IpAddr| SocketAddr::new(to, 7000);
    let (first, second) = (IpAddr::V6(six::guest(1)), IpAddr::V6(six::guest(2)));
    let outside: IpAddr = six::WORLD.parse().unwrap();
    for role in ["g1", "g2", "net"] {
        echo(&world, role, 7000);
    }
    assert!(comes_back(&world, "g1", at(outside), LONG, PATIENCE), "to the world");
    assert!(comes_back(&world, "net", at(first), LONG, PATIENCE), "from it");
    assert!(comes_back(&world, "g1", at(second), LONG, PATIENCE), "to another guest");
    let mut ping = world.command("net", "ping");
    let to = first.to_string();
    let pings = ping.args(["-6", "-c", "2", "-W", "30", "-s", "6000", &to]).output().unwrap();
    assert!(pings.status.success(), "{pings:?}");
    assert!(world.status().reasons["fragment-follows"] > 40);
}

/// nmap's pieces are of eight bytes: no first one has TCP's header, and none passes.
#[test]
fn nmap_gets_no_packet_by_in_tiny_pieces() {
    let test = "nmap_gets_no_packet_by_in_tiny_pieces";
    if !has(test, "nmap") {
        return;
    }
    let Some(world) = two_guests(test) else { return };
    echo_server(&world, "g1", 7000);
    echo_server(&world, "g1", 7002);
    let scan = |pieces: &[&str]| {
        let mut nmap = world.command("net", "nmap");
        nmap.args(["-n", "-Pn", "-sS", "--max-retries", "1", "-p", "7000,7002"]);
        let output = nmap.args(pieces).arg(ELASTIC).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    let whole = scan(&[]);
    assert!(whole.contains("7000/tcp open") && whole.contains("7002/tcp filtered"), "{whole}");
    for tiny in [&["-f"][..], &["-f", "-f"]] {
        let told = scan(tiny);
        assert!(!told.contains("open "), "{tiny:?}: {told}");
        assert!(told.contains("7002/tcp filtered"), "{tiny:?}: {told}");
    }
    let reasons = world.status().reasons;
    assert!(reasons["tiny-fragment"] >= 4, "{reasons:#?}");
}
