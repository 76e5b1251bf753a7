//! Another layout of the maps takes over from the one before, and nobody notices.
//!
//! What a daemon finds of another layout is a folder of maps that is not its own and
//! links that run programs which use them. Here that folder is its own under another
//! name: the daemon makes new maps, carries over what stands in the old ones field by
//! field, and exchanges the links. That fields may differ is shown by `shape`'s tests.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use model::{Protocol, Rule, RuleId};

use crate::elastic::reachable_guest;
use crate::six::{WORLD, everyone, ip};
use crate::traffic::{Flow, Stream, connects, echo_datagrams, echo_server, inside, ping_flood};
use crate::world::{INTERNET, World, anywhere, group, now, ping, tcp};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const FLOWS: usize = 50;
const STREAMS: usize = 4;

fn pins(world: &World) -> PathBuf {
    Path::new("/sys/fs/bpf").join(format!("hostplane-{}", world.name))
}

/// The folders of maps.
fn layouts(world: &World) -> Vec<PathBuf> {
    let names = std::fs::read_dir(pins(world)).unwrap().flatten();
    let names = names.filter(|e| e.file_name().to_string_lossy().starts_with("maps-"));
    names.map(|e| e.path()).collect()
}

/// What is pinned is another layout's from now on, without its daemon.
pub fn estrange(world: &mut World, nth: usize) -> PathBuf {
    world.kill();
    let [own] = &layouts(world)[..] else { panic!("{:?}", layouts(world)) };
    let other = pins(world).join(format!("maps-{nth:016x}"));
    std::fs::rename(own, &other).unwrap();
    other
}

/// A guest with tracked flows of which no rule knows any more: nothing but the flow
/// table lets them pass.
fn tracked(world: &mut World) {
    reachable_guest(world, vec![(tcp(22), anywhere()), (ping(), anywhere())]);
    by_six_too(world);
    world.start();
    world.apply();
    echo_server(world, "g1", 22);
    echo_datagrams(world, "net", 5000);
}

/// The guest reaches the world by IPv6, by a route and an address set by hand.
fn by_six_too(world: &mut World) {
    const GUEST: &str = "2001:db8:1::1:5";
    let (host, net, guest) =
        (world.namespace("host"), world.namespace("net"), world.namespace("g1"));
    let uplink = world.desired.uplink.as_mut().unwrap();
    uplink.gateway6 = Some("fe80::1".parse().unwrap());
    ip(&format!("-n {host} addr add fe80::2/64 dev {} nodad", uplink.device));
    for address in ["fe80::1", WORLD] {
        ip(&format!("-n {net} addr add {address}/64 dev eth0 nodad"));
    }
    ip(&format!("-n {net} route add 2001:db8:1::/64 dev eth0"));
    ip(&format!("-n {guest} addr add {GUEST}/64 dev eth0 nodad"));
    ip(&format!("-n {guest} route add default via fe80::68:70ff:fe00:1 dev eth0"));
    let interface = &mut world.desired.interfaces[0];
    interface.ipv6 = vec![GUEST.parse().unwrap()];
    interface.subnet6 = Some("2001:db8:1::/64".parse().unwrap());
    let all = Rule { id: RuleId::from_random(66), protocol: Protocol::Any, peer: everyone() };
    world.desired.groups[0].egress.push(all);
}

fn forget_the_rules(world: &mut World) {
    world.desired.groups = vec![group(1, Vec::new())];
    world.apply();
    assert!(!connects(world, "net", ELASTIC, 22, Duration::from_secs(1)), "no rule allows it");
}

#[test]
fn another_layout_takes_over_fifty_connections_and_streams_without_a_loss() {
    let test = "another_layout_takes_over_fifty_connections_and_streams_without_a_loss";
    let Some(mut world) = World::new(test) else { return };
    tracked(&mut world);
    let pause = Duration::from_millis(20);
    let flows: Vec<Flow> =
        (0..FLOWS).map(|_| Flow::of(&world, "net", ELASTIC, 22, 100, pause)).collect();
    let streams: Vec<Stream> =
        (0..STREAMS).map(|_| Stream::open(&world, "g1", INTERNET, 5000)).collect();
    let pings = 1500;
    let flood = ping_flood(&world, "net", ELASTIC, pings, Duration::from_millis(3));
    // A question whose answer comes after all is over.
    let (asker, server, asked_from) = question(&world);
    let (asker6, server6, asked_from6) = question6(&world);
    std::thread::sleep(Duration::from_millis(300));
    forget_the_rules(&mut world);
    let before = world.status().interfaces[0].clone();
    assert!(before.flows >= FLOWS as u64, "{before:?}");

    // There and back, and once more.
    for nth in 0..3 {
        let other = estrange(&mut world, nth);
        world.start();
        let status = world.status();
        assert_eq!(status.generation, world.desired.generation, "{}", world.log());
        assert!(status.adopted);
        assert!(!other.exists(), "the old maps are removed");
        let after = &status.interfaces[0];
        assert!(after.flows >= before.flows, "{nth}: {before:?} {after:?}");
        // What the responder answers is counted by its daemon.
        let by_programs = |reason: &&String| !reason.starts_with("respond-");
        for (reason, count) in before.reasons.iter().filter(|(reason, _)| by_programs(reason)) {
            let now = after.reasons.get(reason).copied().unwrap_or(0);
            assert!(now >= *count, "{nth}: {reason}: {count} were counted, {now} are left");
        }
    }
    server.send_to(b"answer", asked_from).unwrap();
    let mut bytes = [0; 16];
    let length = asker.recv(&mut bytes).expect("the half-open flow went over too");
    assert_eq!(&bytes[..length], b"answer");
    server6.send_to(b"answer", asked_from6).unwrap();
    let length = asker6.recv(&mut bytes).expect("IPv6's went over too");
    assert_eq!(&bytes[..length], b"answer");
    for (n, flow) in flows.iter().enumerate() {
        let (rounds, begun) = (flow.rounds(), now());
        while flow.rounds() == rounds {
            assert!(now() - begun < Duration::from_secs(30), "connection {n} stands still");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
    for flow in flows {
        flow.finish().unwrap();
    }
    for stream in streams {
        let (sent, heard) = stream.finish();
        assert_eq!(heard, sent, "datagrams that came back");
    }
    assert_eq!(flood.join().unwrap(), usize::from(pings), "every ping came back");
    assert!(!connects(&world, "net", ELASTIC, 22, Duration::from_secs(1)), "still no rule");
}

/// A datagram of the guest's to the internet, not answered yet.
fn question(world: &World) -> (UdpSocket, UdpSocket, SocketAddr) {
    asked(world, "0.0.0.0:5001", "0.0.0.0:0", SocketAddr::new(INTERNET.into(), 5001))
}

fn question6(world: &World) -> (UdpSocket, UdpSocket, SocketAddr) {
    asked(world, "[::]:5002", "[::]:0", format!("[{WORLD}]:5002").parse().unwrap())
}

fn asked(
    world: &World,
    served_at: &'static str,
    asked_at: &'static str,
    to: SocketAddr,
) -> (UdpSocket, UdpSocket, SocketAddr) {
    let server = inside(world, "net", move || UdpSocket::bind(served_at).unwrap());
    let server = server.join().unwrap();
    let asker = inside(world, "g1", move || {
        let socket = UdpSocket::bind(asked_at).unwrap();
        socket.send_to(b"question", to).unwrap();
        socket
    });
    let asker = asker.join().unwrap();
    asker.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    server.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
    (asker, server, from)
}

/// The planted mistake: the flow table stays behind. The connection must be able to tell.
#[test]
fn an_upgrade_that_leaves_the_flows_behind_is_noticed() {
    let test = "an_upgrade_that_leaves_the_flows_behind_is_noticed";
    let Some(mut world) = World::new(test) else { return };
    tracked(&mut world);
    let flow = Flow::of(&world, "net", ELASTIC, 22, 100, Duration::from_millis(5));
    forget_the_rules(&mut world);
    let other = estrange(&mut world, 7);
    std::fs::remove_file(other.join("FLOWS")).unwrap();
    world.start();
    assert_eq!(world.status().generation, world.desired.generation);
    // What was under way before the exchange may still arrive.
    std::thread::sleep(Duration::from_millis(200));
    let rounds = flow.rounds();
    std::thread::sleep(Duration::from_millis(500));
    assert!(flow.rounds() <= rounds + 1, "without its flow a connection cannot go on");
}

/// Killed in the midst: both layouts stand, and the links run whichever they ran.
#[test]
fn an_upgrade_that_was_cut_short_is_done_again() {
    let test = "an_upgrade_that_was_cut_short_is_done_again";
    let Some(mut world) = World::new(test) else { return };
    tracked(&mut world);
    let flow = Flow::of(&world, "net", ELASTIC, 22, 100, Duration::from_millis(5));
    forget_the_rules(&mut world);
    let other = estrange(&mut world, 7);
    // Its uplink has another name: new maps are made, and nothing is applied.
    let record = world.path("state/dataplane/desired.json");
    let good = std::fs::read_to_string(&record).unwrap();
    std::fs::write(&record, good.replace("-up\"", "-gone\"")).unwrap();
    world.start();
    assert_eq!(world.status().generation, 0, "not applied");
    assert_eq!(layouts(&world).len(), 2);
    world.kill();
    std::fs::write(&record, good).unwrap();
    world.start();
    assert_eq!(world.status().generation, world.desired.generation);
    assert!(!other.exists());
    let (rounds, begun) = (flow.rounds(), now());
    while flow.rounds() < rounds + 5 {
        assert!(now() - begun < Duration::from_secs(30), "the connection stands still");
        std::thread::sleep(Duration::from_millis(5));
    }
    flow.finish().unwrap();
}
