//! Datagrams in pieces, as kernels make them and nmap does, through an elastic address,
//! between guests of the host, and of both families.

use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use etherparse::{IpNumber, Ipv4Header, Ipv6Header, UdpHeader};
use model::{GroupId, PortRange, Protocol};
use socket2::{Domain, Socket, Type};

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
    // They wait for their first in vain.
    let (begun, least) = (now(), lost(&before) + 5);
    while lost(&world.status().reasons) < least {
        assert!(now() - begun < PATIENCE, "{:#?}", world.status().reasons);
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// A datagram to the port 7000, in three pieces with their IP headers.
fn pieces_of(from: IpAddr, to: IpAddr, port: u16, id: u16, said: &[u8]) -> Vec<Vec<u8>> {
    const PIECE: usize = 1448;
    let datagram = match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let ip = Ipv4Header::new(0, 64, IpNumber::UDP, from.octets(), to.octets()).unwrap();
            UdpHeader::with_ipv4_checksum(port, 7000, &ip, said).unwrap()
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let ip = Ipv6Header {
                source: from.octets(),
                destination: to.octets(),
                ..Ipv6Header::default()
            };
            UdpHeader::with_ipv6_checksum(port, 7000, &ip, said).unwrap()
        }
        _ => panic!("{from} and {to} are of two families"),
    };
    let whole = [&datagram.to_bytes()[..], said].concat();
    let count = whole.chunks(PIECE).count();
    let each = whole.chunks(PIECE).enumerate().map(|(n, piece)| {
        let (offset, more) = ((n * PIECE / 8) as u16, n + 1 < count);
        let mut packet = Vec::new();
        match (from, to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let length = piece.len() as u16;
                let (from, to) = (from.octets(), to.octets());
                let mut ip = Ipv4Header::new(length, 64, IpNumber::UDP, from, to).unwrap();
                ip.identification = id;
                ip.dont_fragment = false;
                ip.more_fragments = more;
                ip.fragment_offset = offset.try_into().unwrap();
                ip.header_checksum = ip.calc_header_checksum();
                ip.write(&mut packet).unwrap();
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let ip = Ipv6Header {
                    payload_length: (piece.len() + 8) as u16,
                    next_header: IpNumber::IPV6_FRAGMENTATION_HEADER,
                    hop_limit: 64,
                    source: from.octets(),
                    destination: to.octets(),
                    ..Ipv6Header::default()
                };
                ip.write(&mut packet).unwrap();
                let place = offset << 3 | u16::from(more);
                packet.extend([17, 0, (place >> 8) as u8, place as u8, 0, 0]);
                packet.extend(id.to_be_bytes());
            }
            _ => unreachable!(),
        }
        packet.extend(piece);
        packet
    });
    each.collect()
}

/// Whether a datagram whose pieces leave in that order, with pauses, comes back whole.
fn comes_back_in(world: &World, role: &str, to: IpAddr, from: IpAddr, order: &[usize]) -> bool {
    let order = order.to_vec();
    let asks = inside(world, role, move || {
        let any: IpAddr = if to.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
        let hears = UdpSocket::bind(SocketAddr::new(any, 0)).unwrap();
        hears.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        let port = hears.local_addr().unwrap().port();
        let domain = if to.is_ipv4() { Domain::IPV4 } else { Domain::IPV6 };
        // Whoever names this protocol writes IP's header himself.
        let raw = Socket::new(domain, Type::RAW, Some(socket2::Protocol::from(libc::IPPROTO_RAW)));
        let raw = raw.unwrap();
        let said: Vec<u8> = (0..4000_usize).map(|n| (n * 7) as u8).collect();
        let mut heard = vec![0; 65_536];
        let begun = now();
        // Each order has identifications of its own: a first piece is known for half a minute.
        for id in order.iter().fold(1, |all, n| all * 10 + *n as u16).. {
            let pieces = pieces_of(from, to, port, id, &said);
            for n in &order {
                raw.send_to(&pieces[*n], &SocketAddr::new(to, 0).into()).unwrap();
                std::thread::sleep(Duration::from_millis(20));
            }
            if hears.recv(&mut heard).is_ok_and(|length| heard[..length] == said) {
                return true;
            }
            if now() - begun > PATIENCE {
                break;
            }
        }
        false
    });
    asks.join().unwrap()
}

#[test]
fn pieces_that_overtake_the_first_wait_for_it() {
    let test = "pieces_that_overtake_the_first_wait_for_it";
    let rules = vec![(udp(7000), six::everyone()), (udp(7000), anywhere())];
    let Some(mut world) = six::world(test, rules) else { return };
    world.desired.interfaces.iter_mut().for_each(|i| i.dhcp.mtu = 1500);
    let first = &mut world.desired.interfaces[0];
    first.elastic = Some(ELASTIC.parse().unwrap());
    let own = IpAddr::V4(first.address);
    world.configure_guest(1);
    world.configure_guest(2);
    world.apply();
    for role in ["g1", "g2", "net"] {
        echo(&world, role, 7000);
    }
    let at = |text: &str| text.parse::<IpAddr>().unwrap();
    let (one, two) = (IpAddr::V6(six::guest(1)), IpAddr::V6(six::guest(2)));
    let ways = [
        ("net", IpAddr::V4(INTERNET), at(ELASTIC)),
        ("g1", own, IpAddr::V4(INTERNET)),
        ("g1", own, at(OTHER)),
        ("net", at(six::WORLD), one),
        ("g1", one, at(six::WORLD)),
        ("g1", one, two),
    ];
    // Neighbours have to know each other, or the kernel keeps only so many pieces for one.
    for (role, _, to) in ways {
        assert!(comes_back(&world, role, SocketAddr::new(to, 7000), 10, PATIENCE), "{role} {to}");
    }
    for (role, from, to) in ways {
        for order in [[2, 1, 0], [1, 0, 2], [2, 0, 1]] {
            assert!(comes_back_in(&world, role, to, from, &order), "{role} to {to}: {order:?}");
        }
    }
    let reasons = world.status().reasons;
    assert!(reasons["fragment-held"] >= 6 * 4, "{reasons:#?}");
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
