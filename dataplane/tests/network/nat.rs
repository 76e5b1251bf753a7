//! A NAT gateway with real traffic: private guests, one public address, the world beyond it.
//!
//! ```text
//!  g1 10.0.0.5 ─┐ 0.0.0.0/0 by the gateway ─┐
//!  g2 10.0.1.5 ─┘                           ├─ 198.51.100.201 ─ net 198.51.100.1
//!  g3 10.0.2.5 ─── 198.51.100.203, 1:1 ─────┘
//! ```

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use model::route_table::Target;
use model::{
    Direction, GroupId, InterfaceId, NatGatewayId, Protocol, Route, RouteTable, RouteTableId, VpcId,
};
use rpc::dataplane::{Explained, FrameQuestion, NatGateway, NatGatewayStatus, Question, Verdict};

use crate::pieces::{comes_back, echo};
use crate::traffic::ping_flood;
use crate::traffic::{Flow, PATIENCE, Stream, connects, echo_datagrams, echo_server, inside};
use crate::world::{INTERNET, World, group, has, now, run};

pub const PUBLIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 201);
const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 203);
const SHORT: Duration = Duration::from_secs(1);

pub fn world(test: &str, ports_max: Option<u16>) -> Option<World> {
    let mut world = World::new(test)?;
    let gateway = NatGatewayId::from_random(1);
    let table = RouteTable {
        id: RouteTableId::from_random(1),
        vpc: VpcId::from_random(1),
        local: vec!["10.0.0.0/16".parse().unwrap()],
        routes: vec![Route {
            destination: "0.0.0.0/0".parse().unwrap(),
            target: Target::NatGateway(gateway),
        }],
    };
    for n in 1..=3_u8 {
        let interface = world.add_guest(n, 1, &format!("10.0.{}.5", n - 1));
        interface.groups = vec![GroupId::from_random(u128::from(n))];
        interface.dhcp.mtu = 1500;
        interface.route_table = (n < 3).then_some(table.id);
        interface.elastic = (n == 3).then_some(ELASTIC);
        world.configure_guest(n);
    }
    // The private ones let nobody in; the third whoever comes by the gateway's address.
    let by_gateway = model::Peer::Cidr(format!("{PUBLIC}/32").parse().unwrap());
    world.desired.groups =
        vec![group(1, vec![]), group(2, vec![]), group(3, vec![(Protocol::Any, by_gateway)])];
    world.desired.route_tables = vec![table];
    world.desired.nat_gateways = vec![NatGateway {
        id: gateway,
        vpc: VpcId::from_random(1),
        address: Ipv4Addr::new(10, 0, 2, 9),
        elastic: PUBLIC,
        ports_max,
    }];
    world.start();
    world.apply();
    Some(world)
}

fn status(world: &World) -> NatGatewayStatus {
    world.status().nat_gateways.remove(0)
}

fn counted(world: &World, reason: &str) -> u64 {
    status(world).reasons.get(reason).copied().unwrap_or(0)
}

fn why(world: &World, port: u16) -> Verdict {
    world.why(&Question {
        interface: InterfaceId::from_random(1),
        direction: Direction::Egress,
        local: None,
        protocol: 6,
        remote: INTERNET.into(),
        remote_port: port,
        local_port: 41_000,
    })
}

/// What becomes of a TCP packet of the world's to the gateway's address.
fn explained(world: &World, ports: (u16, u16)) -> Explained {
    let device = world.desired.uplink.clone().unwrap().device;
    let mut ip = world.command("host", "ip");
    let told = run(ip.args(["-j", "link", "show", &device]));
    let told: serde_json::Value = serde_json::from_str(&told).unwrap();
    let mac: model::Mac = told[0]["address"].as_str().unwrap().parse().unwrap();
    let mut frame = Vec::new();
    etherparse::PacketBuilder::ethernet2([6; 6], mac.octets())
        .ipv4(INTERNET.octets(), PUBLIC.octets(), 64)
        .tcp(ports.0, ports.1, 1, 1000)
        .ack(1)
        .write(&mut frame, b"x")
        .unwrap();
    let question = FrameQuestion { interface: None, frame };
    world.ask(|c| async move { c.dataplane_explain(&question).await }).unwrap()
}

/// A connection from a port of a guest's own, and whom the other end takes it for.
pub fn from_port(
    world: &World,
    role: &str,
    port: u16,
    to: SocketAddrV4,
) -> (TcpStream, SocketAddr) {
    let asks = inside(world, role, move || {
        use nix::sys::socket::{
            AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket,
        };
        use std::os::fd::AsRawFd as _;
        let flags = SockFlag::empty();
        let fd = socket(AddressFamily::Inet, SockType::Stream, flags, None).unwrap();
        let own = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, port));
        bind(fd.as_raw_fd(), &own).unwrap();
        connect(fd.as_raw_fd(), &SockaddrIn::from(to)).unwrap();
        TcpStream::from(fd)
    });
    let mut stream = asks.join().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut told = [0; 64];
    let length = stream.read(&mut told).unwrap();
    let told = std::str::from_utf8(&told[..length]).unwrap().parse().unwrap();
    (stream, told)
}

/// Tells whoever connects whom it takes him for, and says back what it hears then.
pub fn tells_who(world: &World, role: &str, port: u16) {
    let listening =
        inside(world, role, move || TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
    let listener = listening.join().unwrap();
    std::thread::spawn(move || {
        while let Ok((mut stream, from)) = listener.accept() {
            std::thread::spawn(move || {
                _ = stream.write_all(from.to_string().as_bytes());
                let mut buffer = [0; 4096];
                while let Ok(n @ 1..) = stream.read(&mut buffer) {
                    _ = stream.write_all(&buffer[..n]);
                }
            });
        }
    });
}

pub fn says_back(stream: &mut TcpStream) {
    stream.write_all(b"hello").unwrap();
    let mut heard = [0; 5];
    stream.read_exact(&mut heard).unwrap();
    assert_eq!(&heard, b"hello");
}

#[test]
fn private_guests_reach_the_world_by_one_address_and_nobody_reaches_them() {
    let test = "private_guests_reach_the_world_by_one_address_and_nobody_reaches_them";
    let Some(world) = world(test, None) else { return };
    tells_who(&world, "net", 7);
    let server = SocketAddrV4::new(INTERNET, 7);
    // The same port of both to the same port of the same peer.
    let (mut first, one) = from_port(&world, "g1", 40_000, server);
    let (mut second, two) = from_port(&world, "g2", 40_000, server);
    assert_eq!((one.ip(), two.ip()), (PUBLIC.into(), PUBLIC.into()));
    assert_ne!(one.port(), two.port());
    says_back(&mut first);
    says_back(&mut second);
    // Many at once, on all CPUs: no two get one port.
    let many: Vec<_> = ["g1", "g2", "g1", "g2"]
        .map(|role| {
            inside(&world, role, move || {
                let connect = |_| {
                    let mut stream = TcpStream::connect_timeout(&server.into(), PATIENCE).unwrap();
                    stream.set_read_timeout(Some(PATIENCE)).unwrap();
                    let mut told = [0; 64];
                    let length = stream.read(&mut told).unwrap();
                    (std::str::from_utf8(&told[..length]).unwrap().to_owned(), stream)
                };
                (0..100).map(connect).collect::<Vec<_>>()
            })
        })
        .into_iter()
        .flat_map(|thread| thread.join().unwrap())
        .collect();
    let different: std::collections::BTreeSet<&str> = many.iter().map(|(who, _)| &**who).collect();
    assert_eq!(different.len(), 400, "each has a port of its own");
    drop(many);
    // An answer as it comes, and what nobody waits for.
    let told = explained(&world, (7, one.port()));
    assert_eq!(
        (told.reason.as_str(), told.receiver),
        ("established", Some(InterfaceId::from_random(1)))
    );
    let by = told.translated.unwrap();
    assert_eq!((by.gateway, by.port), (NatGatewayId::from_random(1), Some(one.port())));
    let told = explained(&world, (8, one.port()));
    assert_eq!((told.reason.as_str(), told.receiver), ("nat-unsolicited", None));
    // Superframes of TCP, datagrams, long ones in pieces, and pings from both at once.
    echo_server(&world, "net", 8);
    let flow = Flow::open(&world, "g1", INTERNET, 8);
    flow.goes_on(3);
    echo_datagrams(&world, "net", 5000);
    let streams = ["g1", "g2"].map(|role| Stream::open(&world, role, INTERNET, 5000));
    for stream in streams {
        let (sent, heard) = stream.finish();
        assert_eq!(heard, sent, "datagrams that came back");
    }
    let floods =
        ["g1", "g2"].map(|role| ping_flood(&world, role, INTERNET, 200, Duration::from_millis(1)));
    for flood in floods {
        assert_eq!(flood.join().unwrap(), 200, "pings that came back");
    }
    echo(&world, "net", 7000);
    let long = SocketAddr::from((INTERNET, 7000));
    assert!(comes_back(&world, "g1", long, 8000, PATIENCE), "a datagram in pieces");
    flow.finish().unwrap();
    // Who was not asked.
    echo_server(&world, "g1", 22);
    assert!(!connects(&world, "net", PUBLIC, 22, SHORT));
    assert!(!connects(&world, "net", PUBLIC, one.port(), SHORT));
    assert!(!connects(&world, "g2", PUBLIC, 22, SHORT), "from within neither");
    assert!(counted(&world, "nat-unsolicited") >= 2, "{:#?}", status(&world));
    assert!(counted(&world, "established") > 100);
    let begun = now();
    while status(&world).connections < 4 {
        assert!(now() - begun < PATIENCE, "{:?}", status(&world));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn errors_about_what_went_out_come_back_to_whom_they_concern() {
    let test = "errors_about_what_went_out_come_back_to_whom_they_concern";
    let Some(mut world) = world(test, None) else { return };
    // Nobody listens there: the world's kernel says so by ICMP.
    let refused = inside(&world, "g1", || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.connect((INTERNET, 9999)).unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
        let begun = now();
        while now() - begun < PATIENCE {
            _ = socket.send(b"?");
            let heard = socket.recv(&mut [0; 8]);
            if heard.is_err_and(|e| e.kind() == std::io::ErrorKind::ConnectionRefused) {
                return true;
            }
        }
        false
    });
    assert!(refused.join().unwrap(), "the port is unreachable");
    assert!(counted(&world, "related") > 0, "{:#?}", status(&world));
    if has(test, "traceroute") {
        let internet = INTERNET.to_string();
        for how in [&["-U", "-p", "7001"][..], &["-I"]] {
            let hops = crate::hops::hops(&world, "g1", how, &internet);
            assert_eq!(hops, ["10.0.0.1", &internet], "{how:?}");
        }
    }
    // A narrower uplink: TCP finds the path's MTU through the gateway.
    let uplink = world.desired.uplink.as_ref().unwrap().device.clone();
    crate::six::ip(&format!("-n {} link set {uplink} mtu 1300", world.namespace("host")));
    world.apply();
    echo_server(&world, "net", 8);
    let flow = Flow::open(&world, "g1", INTERNET, 8);
    flow.goes_on(3);
    flow.finish().unwrap();
    assert!(world.status().reasons["too-big"] > 0);
}

#[test]
fn a_gateway_without_a_free_port_says_so_everywhere() {
    let test = "a_gateway_without_a_free_port_says_so_everywhere";
    let Some(world) = world(test, Some(2)) else { return };
    tells_who(&world, "net", 7);
    tells_who(&world, "net", 8);
    let server = SocketAddrV4::new(INTERNET, 7);
    let said = why(&world, 7);
    assert_eq!(said.reason, "new-flow");
    let translated = said.translated.unwrap();
    assert_eq!((translated.gateway, translated.address), (NatGatewayId::from_random(1), PUBLIC));
    assert!(translated.port.is_some_and(|port| (1024..1026).contains(&port)), "{translated:?}");
    assert_eq!(said.routed.unwrap().destination, Some("0.0.0.0/0".parse().unwrap()));

    let events = crate::observe::listen(&world, false);
    let (mut first, one) = from_port(&world, "g1", 40_000, server);
    let opened = crate::observe::seen(&events, 7);
    let translated = opened.translated.unwrap();
    assert_eq!((translated.address, translated.port), (PUBLIC, Some(one.port())), "{opened:?}");
    let (mut second, two) = from_port(&world, "g2", 40_000, server);
    let mut ports = [one.port(), two.port()];
    ports.sort_unstable();
    assert_eq!(ports, [1024, 1025]);
    assert!(!connects(&world, "g1", INTERNET, 7, SHORT), "a third one");
    let said = why(&world, 7);
    assert_eq!((said.allowed, said.reason.as_str()), (false, "nat-port-allocation"));
    assert_eq!(said.translated.unwrap().port, None);
    assert!(counted(&world, "nat-port-allocation") > 0, "{:#?}", status(&world));
    // Towards another port of the peer they are free, and those that are open go on.
    from_port(&world, "g1", 40_001, SocketAddrV4::new(INTERNET, 8));
    says_back(&mut first);
    says_back(&mut second);
    // One that ends gives its port back.
    drop(first);
    let begun = now();
    while !connects(&world, "g1", INTERNET, 7, SHORT) {
        assert!(now() - begun < PATIENCE * 2, "no port was given back");
    }
}

#[test]
fn connections_through_a_gateway_outlive_the_daemon_and_its_layout() {
    let test = "connections_through_a_gateway_outlive_the_daemon_and_its_layout";
    let Some(mut world) = world(test, None) else { return };
    tells_who(&world, "net", 7);
    echo_server(&world, "net", 8);
    let (mut first, _) = from_port(&world, "g1", 40_000, SocketAddrV4::new(INTERNET, 7));
    let flow = Flow::of(&world, "g2", INTERNET, 8, 100, Duration::from_millis(5));
    world.kill();
    says_back(&mut first);
    world.start();
    assert!(world.status().adopted);
    world.desired.generation += 1;
    assert_eq!(world.try_apply().unwrap().changes, 0, "what was pinned is what is wanted");
    says_back(&mut first);
    flow.goes_on(3);
    for nth in 0..2 {
        let other = crate::upgrade::estrange(&mut world, nth);
        world.start();
        assert_eq!(world.status().generation, world.desired.generation, "{}", world.log());
        assert!(!other.exists());
        says_back(&mut first);
        flow.goes_on(3);
    }
    flow.finish().unwrap();
    // Without its gateway a route is a black hole, for what is open too.
    world.desired.nat_gateways.clear();
    world.apply();
    assert_eq!(why(&world, 7).reason, "blackhole");
    assert!(!connects(&world, "g1", INTERNET, 7, SHORT));
    assert!(!connects(&world, "net", PUBLIC, 7, SHORT));
}

#[test]
fn a_guest_with_an_elastic_address_is_reached_through_the_gateway() {
    let test = "a_guest_with_an_elastic_address_is_reached_through_the_gateway";
    let Some(world) = world(test, None) else { return };
    tells_who(&world, "g3", 7);
    let (mut stream, who) = from_port(&world, "g1", 40_000, SocketAddrV4::new(ELASTIC, 7));
    assert_eq!(who.ip(), PUBLIC, "the gateway's address, and not the private one");
    says_back(&mut stream);
    let (mut other, another) = from_port(&world, "g2", 40_000, SocketAddrV4::new(ELASTIC, 7));
    assert_ne!(who.port(), another.port());
    says_back(&mut other);
    assert_eq!(ping_flood(&world, "g1", ELASTIC, 50, Duration::from_millis(1)).join().unwrap(), 50);
    echo(&world, "g3", 7000);
    let long = SocketAddr::from((ELASTIC, 7000));
    assert!(comes_back(&world, "g1", long, 8000, PATIENCE), "a datagram in pieces");
    assert!(!connects(&world, "net", ELASTIC, 7, SHORT), "its group knows the gateway alone");
}
