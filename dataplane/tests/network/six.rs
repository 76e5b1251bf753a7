//! IPv6: between two guests of a network, out to the world and in from it, each as its
//! groups allow, by the kernel's own neighbour discovery on every side.

use std::io::{Read as _, Write as _};
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::time::Duration;

use model::{Direction, GroupId, Peer, Protocol};
use rpc::dataplane::{Dns, Question, Services};

use crate::observe::short_flow_log;
use crate::traffic::inside;
use crate::world::{World, group, has, now, run, tcp};

pub const WORLD: &str = "2001:db8:9::1";
const PATIENCE: Duration = Duration::from_secs(30);

pub fn ip(arguments: &str) {
    run(Command::new("ip").args(arguments.split_whitespace()));
}

pub fn everyone() -> Peer {
    Peer::Cidr("::/0".parse().unwrap())
}

/// Two guests of one network, `…:1::1:5` and `…:1::1:6`; the uplink's router is the world's
/// end, by a link-local address.
pub fn world(test: &str, ingress: Vec<(Protocol, Peer)>) -> Option<World> {
    let mut world = World::new(test)?;
    let (host, net) = (world.namespace("host"), world.namespace("net"));
    let uplink = world.desired.uplink.as_ref().unwrap().device.clone();
    ip(&format!("-n {host} addr add fe80::2/64 dev {uplink} nodad"));
    ip(&format!("-n {net} addr add fe80::1/64 dev eth0 nodad"));
    ip(&format!("-n {net} addr add {WORLD}/64 dev eth0 nodad"));
    // As a router of the region has it: the subnet is on the link.
    ip(&format!("-n {net} route add 2001:db8:1::/64 dev eth0"));
    world.desired.uplink.as_mut().unwrap().gateway6 = Some("fe80::1".parse().unwrap());
    let mut all = group(1, ingress);
    let rule = model::RuleId::from_random(66);
    all.egress.push(model::Rule { id: rule, protocol: Protocol::Any, peer: everyone() });
    for n in 1..=2_u8 {
        let address: Ipv6Addr = guest(n);
        let interface = world.add_guest(n, 1, &format!("10.0.0.{}", 4 + n));
        interface.ipv6 = vec![address];
        interface.subnet6 = Some("2001:db8:1::/64".parse().unwrap());
        interface.groups = vec![GroupId::from_random(1)];
        let inside = world.namespace(&format!("g{n}"));
        ip(&format!("-n {inside} addr add {address}/64 dev eth0 nodad"));
        ip(&format!("-n {inside} route add default via fe80::68:70ff:fe00:1 dev eth0"));
    }
    world.desired.groups = vec![all];
    world.start();
    world.apply();
    Some(world)
}

pub fn guest(n: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 1, 4 + u16::from(n))
}

/// Whether an echo comes back within the patience, asked again and again.
pub fn pings(world: &World, role: &str, to: &str) -> bool {
    let begun = now();
    while now() - begun < PATIENCE {
        let mut ping = world.command(role, "ping");
        if ping.args(["-6", "-c", "1", "-W", "1", to]).output().unwrap().status.success() {
            return true;
        }
    }
    false
}

/// A server that says back the first bytes that it hears, once.
pub fn echo_once(world: &World, role: &str, port: u16) {
    let listening =
        inside(world, role, move || TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).unwrap());
    let listener = listening.join().unwrap();
    std::thread::spawn(move || {
        let mut stream = listener.accept().unwrap().0;
        let mut heard = vec![0; SAID];
        stream.read_exact(&mut heard).unwrap();
        stream.write_all(&heard).unwrap();
    });
}

/// Long enough that a sender with offloads makes superframes of it.
const SAID: usize = 200_000;

pub fn converses(world: &World, role: &str, to: Ipv6Addr, port: u16) -> std::io::Result<bool> {
    let talk = inside(world, role, move || {
        let mut stream =
            TcpStream::connect_timeout(&SocketAddrV6::new(to, port, 0, 0).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let said: Vec<u8> = (0..SAID).map(|n| n as u8).collect();
        let mut writer = stream.try_clone()?;
        let saying = said.clone();
        let written = std::thread::spawn(move || writer.write_all(&saying));
        let mut heard = vec![0; SAID];
        stream.read_exact(&mut heard)?;
        written.join().unwrap()?;
        Ok(heard == said)
    });
    talk.join().unwrap()
}

#[test]
fn guests_and_the_world_reach_each_other_by_ipv6_as_their_groups_allow() {
    let test = "guests_and_the_world_reach_each_other_by_ipv6_as_their_groups_allow";
    let ping6 = Protocol::Icmpv6 { kind: Some(128), code: None };
    let ingress = vec![(ping6, everyone()), (tcp(22), everyone()), (tcp(23), everyone())];
    let Some(world) = world(test, ingress) else { return };
    let (first, second) = (guest(1), guest(2));
    assert!(pings(&world, "g1", &second.to_string()), "a guest, by the subnet's router");
    assert!(pings(&world, "g1", WORLD), "out by the uplink");
    assert!(pings(&world, "net", &first.to_string()), "in by it");
    echo_once(&world, "g2", 22);
    assert!(converses(&world, "g1", second, 22).unwrap(), "TCP between guests");
    echo_once(&world, "g2", 23);
    assert!(converses(&world, "net", second, 23).unwrap(), "TCP from the world");
    echo_once(&world, "net", 7000);
    assert!(converses(&world, "g1", WORLD.parse().unwrap(), 7000).unwrap(), "TCP to the world");
    let status = world.status();
    assert!(status.reasons["neighbour-answered"] > 0, "{:#?}", status.reasons);
    let flows = world.ask(|c| {
        let id = world.desired.interfaces[1].id;
        async move { c.dataplane_export(id).await }
    });
    let flows = flows.unwrap().flows;
    assert!(flows.iter().any(|f| f.local == second && f.local_port == 22), "{flows:#?}");
}

#[test]
fn what_no_rule_allows_does_not_come_in_by_ipv6() {
    let test = "what_no_rule_allows_does_not_come_in_by_ipv6";
    let ipv4_alone = vec![(Protocol::Any, Peer::Cidr("0.0.0.0/0".parse().unwrap()))];
    let Some(world) = world(test, ipv4_alone) else { return };
    assert!(pings(&world, "g1", WORLD), "the answer to its own question comes in");
    let mut ping = world.command("net", "ping");
    let to = guest(1).to_string();
    let refused = ping.args(["-6", "-c", "2", "-W", "1", &to]).output().unwrap();
    assert!(!refused.status.success(), "no IPv6 rule lets it in");
    assert!(world.status().reasons["ingress-denied"] >= 2);
}

#[test]
fn flow_logs_have_ipv6s_flows_with_their_own_addresses() {
    let test = "flow_logs_have_ipv6s_flows_with_their_own_addresses";
    let Some(mut world) = world(test, vec![(tcp(22), everyone())]) else { return };
    world.desired.flow_log = Some(short_flow_log(&world));
    world.apply();
    let (first, second) = (guest(1), guest(2));
    let provoke = || {
        // Longer than a frame: only its first piece has ports.
        let long = inside(&world, "g1", || {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
            let world = WORLD.parse::<Ipv6Addr>().unwrap();
            // The world says that nobody listens there.
            drop(socket.send_to(&[7; 4000], (world, 4009)));
        });
        long.join().unwrap();
        let mut ping = world.command("net", "ping");
        ping.args(["-6", "-c", "1", "-W", "1", &first.to_string()]).output().unwrap();
    };
    let udp = (format!("{first} {WORLD}"), "4009 17", "ACCEPT");
    let refused = (format!("{WORLD} {first} 0"), "0 58", "REJECT");
    logged(&world, &[udp, refused], &provoke);
    echo_once(&world, "g2", 22);
    assert!(converses(&world, "net", second, 22).unwrap());
    let there = (format!("{WORLD} {second}"), "22 6", "ACCEPT");
    let back = (format!("{second} {WORLD} 22"), "6", "ACCEPT");
    let text = logged(&world, &[there, back], &|| ());
    let link = text.lines().filter(|l| l.contains("fe80::") || l.contains(" ff02::"));
    assert_eq!(link.count(), 0, "of the link itself:\n{text}");
}

/// Waits until the flow log has such records, each with its ends, port or protocol, and
/// action; what it says by then.
fn logged(world: &World, records: &[(String, &str, &str)], provoke: &dyn Fn()) -> String {
    let begun = now();
    loop {
        provoke();
        let text = std::fs::read_to_string(world.path("flow-log/flow.log")).unwrap_or_default();
        let has = |(ends, protocol, action): &(String, &str, &str)| {
            text.lines().any(|line| {
                line.contains(ends)
                    && line.contains(&format!(" {protocol} "))
                    && line.ends_with(&format!(" {action} OK"))
            })
        };
        if records.iter().all(has) {
            return text;
        }
        assert!(now() - begun < Duration::from_secs(60), "{records:?} are not in the log:\n{text}");
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn why_answers_for_ipv6_as_the_packet_would_fare() {
    let test = "why_answers_for_ipv6_as_the_packet_would_fare";
    let ping6 = Protocol::Icmpv6 { kind: Some(128), code: None };
    let Some(world) = world(test, vec![(tcp(22), everyone()), (ping6, everyone())]) else { return };
    let asked = |direction, remote: &str, protocol, detail: u16| {
        let (remote_port, local_port) = match direction {
            Direction::Ingress => (0, detail),
            Direction::Egress => (detail, 0),
        };
        world.why(&Question {
            interface: world.desired.interfaces[0].id,
            direction,
            local: None,
            protocol,
            remote: remote.parse().unwrap(),
            remote_port,
            local_port,
        })
    };
    let let_in = asked(Direction::Ingress, WORLD, 6, 22);
    assert!(let_in.allowed && let_in.reason == "new-flow", "{let_in:?}");
    assert_eq!(let_in.rule, Some(world.desired.groups[0].ingress[0].id));
    assert_eq!(asked(Direction::Ingress, WORLD, 6, 23).reason, "ingress-denied");
    assert_eq!(asked(Direction::Ingress, WORLD, 58, 128 << 8).reason, "new-flow");
    assert_eq!(asked(Direction::Egress, WORLD, 17, 53).reason, "new-flow");
    let services = asked(Direction::Egress, "fd00:ec2::254", 6, 80);
    assert_eq!(services.reason, "no-metadata", "whoever is upstream could play it");
    let beside = asked(Direction::Egress, "fd00:ec2::250", 6, 80);
    assert_eq!(beside.reason, "no-route", "all of the prefix is the host's");
    let neighbour = asked(Direction::Ingress, &guest(2).to_string(), 6, 22);
    assert!(neighbour.allowed, "by its own device: {neighbour:?}");
    let mixed = Question {
        interface: world.desired.interfaces[0].id,
        direction: Direction::Egress,
        local: Some("10.0.0.5".parse().unwrap()),
        protocol: 6,
        remote: WORLD.parse().unwrap(),
        remote_port: 80,
        local_port: 1,
    };
    let refused = world.ask(|client| async move { client.dataplane_why(&mixed).await });
    let told = refused.unwrap_err().to_string();
    assert!(told.contains("two families"), "{told}");
}

#[test]
fn metadata_names_and_the_time_are_served_over_ipv6() {
    let test = "metadata_names_and_the_time_are_served_over_ipv6";
    if !["curl", "dig", "ntpdig"].iter().all(|program| has(test, program)) {
        return;
    }
    let Some(mut world) = world(test, vec![]) else { return };
    for (interface, id) in world.desired.interfaces.iter_mut().zip(["i-1", "i-2"]) {
        interface.metadata = Some([("meta-data/instance-id".into(), id.into())].into());
    }
    let names = vec!["i-1.net.internal".to_owned()];
    world.desired.interfaces[0].services = Services {
        metadata_ipv6: true,
        dns: Some(Dns { address: None, names }),
        ..Services::default()
    };
    world.apply();
    let curl = |role: &str, words: &[&str], path: &str| {
        let mut curl = world.command(role, "curl");
        curl.args(["-sg", "-m", "60"]).args(words);
        curl.arg(format!("http://[fd00:ec2::254]/latest/{path}"));
        curl
    };
    let lived = "X-aws-ec2-metadata-token-ttl-seconds: 60";
    let token = run(&mut curl("g1", &["-X", "PUT", "-H", lived], "api/token"));
    let shown = format!("X-aws-ec2-metadata-token: {token}");
    assert_eq!(run(&mut curl("g1", &["-H", &shown], "meta-data/instance-id")), "i-1");
    // A guest that takes the address for one of its link asks who has it.
    ip(&format!("-n {} route add fd00:ec2::254/128 dev eth0", world.namespace("g1")));
    assert_eq!(run(&mut curl("g1", &["-H", &shown], "meta-data/instance-id")), "i-1");
    let unserved =
        curl("g2", &["-X", "PUT", "-m", "2", "-H", lived], "api/token").output().unwrap();
    assert!(!unserved.status.success(), "over IPv4 alone, unless it was asked for");

    let name = "i-1.net.internal";
    for way in ["+notcp", "+tcp"] {
        let mut dig = world.command("g1", "dig");
        let dig = dig.args(["@fd00:ec2::253", "+short", "+timeout=30", way, name, "AAAA"]);
        assert_eq!(run(dig).trim(), guest(1).to_string(), "{way}");
    }
    let told = run(world.command("g1", "ntpdig").args(["-j", "-t", "30", "fd00:ec2::123"]));
    let told: serde_json::Value = serde_json::from_str(told.trim()).unwrap();
    assert_eq!(told["stratum"], 10, "{told}");
    let reasons = world.status().reasons;
    for reason in ["metadata", "dns", "time", "no-metadata"] {
        assert!(reasons[reason] > 0, "{reason}: {reasons:#?}");
    }
}

#[test]
fn the_early_drop_judges_ipv6_and_leaves_the_link_alone() {
    let test = "the_early_drop_judges_ipv6_and_leaves_the_link_alone";
    let ping6 = Protocol::Icmpv6 { kind: Some(128), code: None };
    let Some(mut world) = world(test, vec![(ping6, everyone()), (tcp(22), everyone())]) else {
        return;
    };
    world.desired.uplink.as_mut().unwrap().early_drop = Some(true);
    world.apply();
    // The router asks for the neighbour, by multicast first and by its address later.
    assert!(pings(&world, "net", &guest(1).to_string()), "in");
    assert!(pings(&world, "g1", WORLD), "out");
    echo_once(&world, "g2", 22);
    assert!(converses(&world, "net", guest(2), 22).unwrap(), "TCP in whole");
    // A neighbour's address and the host's own lie in the range too: what is asked on the link
    // is answered, and what is for the host arrives.
    let (host, net) = (world.namespace("host"), world.namespace("net"));
    let uplink = world.desired.uplink.as_ref().unwrap().device.clone();
    ip(&format!("-n {host} addr add 2001:db8:5::1/128 dev {uplink} nodad"));
    ip(&format!("-n {host} route add {WORLD} via fe80::1 dev {uplink}"));
    ip(&format!("-n {net} route add 2001:db8:5::/48 via fe80::2 dev eth0"));
    let ranges = ["2001:db8:1::/64", "2001:db8:5::/48"];
    world.desired.elastic_ranges = ranges.iter().map(|net| net.parse().unwrap()).collect();
    world.apply();
    assert!(pings(&world, "net", &guest(1).to_string()), "in a range of ours");
    assert!(pings(&world, "net", "2001:db8:5::1"), "the host's own");
    let mut ping = world.command("net", "ping");
    let ping = ping.args(["-6", "-c", "1", "-W", "1", "2001:db8:5::2"]).output().unwrap();
    assert!(!ping.status.success(), "nobody's");
    assert!(world.status().reasons["unknown-elastic-address"] > 0);
    world.desired.elastic_ranges.clear();
    world.desired.blocklist = vec![format!("{WORLD}/128").parse().unwrap()];
    world.apply();
    let mut ping = world.command("net", "ping");
    let guest = guest(1).to_string();
    let heard = ping.args(["-6", "-c", "3", "-i", "0.2", "-W", "1", "-I", WORLD, &guest]);
    assert!(!heard.output().unwrap().status.success(), "blocked");
    assert!(world.status().reasons["blocked"] >= 3);
    assert!(world.status().reasons["neighbour-answered"] > 0);
}
