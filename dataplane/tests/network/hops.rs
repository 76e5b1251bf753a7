//! What a router owes: ICMP errors about packets that are too old or too long, as the
//! world's own tools ask for them, to guests and to the world, of both families.

use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::AsRawFd as _;

use model::{GroupId, Protocol};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

use crate::six;
use crate::traffic::{Flow, PATIENCE, echo_server, inside};
use crate::world::{INTERNET, World, anywhere, group, has, ping, tcp};

const ELASTIC: &str = "198.51.100.130";
const HOST: &str = "198.51.100.2";

/// A guest with an elastic address whom everybody may ping and reach by port 7000.
fn one_guest(test: &str) -> Option<World> {
    let mut world = World::new(test)?;
    let interface = world.add_guest(1, 1, "10.0.0.5");
    interface.elastic = Some(ELASTIC.parse().unwrap());
    interface.groups = vec![GroupId::from_random(1)];
    interface.dhcp.mtu = 1500;
    let rules = vec![(ping(), anywhere()), (tcp(7000), anywhere())];
    world.desired.groups = vec![group(1, rules)];
    world.configure_guest(1);
    world.start();
    world.apply();
    Some(world)
}

/// The hops that `traceroute` names, one question each.
pub fn hops(world: &World, role: &str, how: &[&str], to: &str) -> Vec<String> {
    let mut command = world.command(role, "traceroute");
    // A hop that answers is not waited for any longer.
    let output =
        command.args(["-n", "-q", "1", "-N", "1", "-w", "30", "-m", "3"]).args(how).arg(to);
    let told = String::from_utf8(output.output().unwrap().stdout).unwrap();
    // A link-local address is told with its device.
    let hop = |line: &str| line.split_whitespace().nth(1)?.split('%').next().map(str::to_owned);
    told.lines().skip(1).filter_map(hop).collect()
}

#[test]
fn traceroute_sees_the_router_from_within_and_the_host_from_without() {
    let test = "traceroute_sees_the_router_from_within_and_the_host_from_without";
    if !has(test, "traceroute") {
        return;
    }
    let Some(world) = one_guest(test) else { return };
    let internet = INTERNET.to_string();
    // By UDP, whose checksum the guest leaves to the hardware; by echo; by TCP.
    for how in [&["-U", "-p", "7001"][..], &["-I"], &["-T", "-p", "7000"]] {
        assert_eq!(hops(&world, "g1", how, &internet), ["10.0.0.1", &internet], "{how:?}");
    }
    for how in [&["-I"][..], &["-T", "-p", "7000"]] {
        assert_eq!(hops(&world, "net", how, ELASTIC), [HOST, ELASTIC], "{how:?}");
    }
    let reasons = world.status().reasons;
    assert_eq!(reasons["ttl-expired"], 5);
    assert_eq!(reasons["icmp-error-sent"], 5);
    // Who may not come in is not told that there is anybody.
    let mut blind = world.command("net", "traceroute");
    let blind = blind.args(["-n", "-q", "1", "-w", "1", "-m", "1", "-T", "-p", "7002", ELASTIC]);
    let told = String::from_utf8(blind.output().unwrap().stdout).unwrap();
    assert!(told.contains("1  *"), "{told}");
    assert!(world.status().reasons["ingress-denied"] >= 1);
}

#[test]
fn traceroute_sees_the_hops_of_ipv6_too() {
    let test = "traceroute_sees_the_hops_of_ipv6_too";
    if !has(test, "traceroute") {
        return;
    }
    let ping6 = Protocol::Icmpv6 { kind: Some(128), code: None };
    let Some(mut world) = six::world(test, vec![(ping6, six::everyone())]) else { return };
    let (host, uplink) =
        (world.namespace("host"), world.desired.uplink.as_ref().unwrap().device.clone());
    six::ip(&format!("-n {host} addr add 2001:db8:9::2/64 dev {uplink} nodad"));
    // The host's address on the uplink is looked up at each change of the desired state.
    world.apply();
    assert!(six::pings(&world, "g1", six::WORLD), "neighbours know each other");
    let router = "fe80::68:70ff:fe00:1";
    let own = six::guest(1).to_string();
    for how in [&["-6", "-U", "-p", "7001"][..], &["-6", "-I"]] {
        assert_eq!(hops(&world, "g1", how, six::WORLD), [router, six::WORLD], "{how:?}");
    }
    assert!(six::pings(&world, "net", &own), "neighbours know each other");
    assert_eq!(hops(&world, "net", &["-6", "-I"], &own), ["2001:db8:9::2", &own]);
}

/// Makes the uplink shorter than the guests' own devices, at both of its ends.
fn narrow(world: &mut World, mtu: u16) {
    let (host, net) = (world.namespace("host"), world.namespace("net"));
    let uplink = world.desired.uplink.as_ref().unwrap().device.clone();
    six::ip(&format!("-n {host} link set {uplink} mtu {mtu}"));
    six::ip(&format!("-n {net} link set eth0 mtu {mtu}"));
    world.apply();
}

/// The text of a ping that forbids fragments, of so many bytes of data.
fn unfragmented(world: &World, role: &str, size: u16, to: &str) -> String {
    let mut ping = world.command(role, "ping");
    let size = size.to_string();
    let ping = ping.args(["-c", "1", "-W", "30", "-M", "do", "-s", &size, to]);
    let output = ping.output().unwrap();
    String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
}

#[test]
fn what_is_too_long_for_the_uplink_or_the_guest_is_told_the_mtu() {
    let test = "what_is_too_long_for_the_uplink_or_the_guest_is_told_the_mtu";
    let Some(mut world) = one_guest(test) else { return };
    narrow(&mut world, 1400);
    let internet = INTERNET.to_string();
    // The edge, and a byte more. Without the error ping would wait for its answer.
    let told = unfragmented(&world, "g1", 1372, &internet);
    assert!(told.contains(" 0% packet loss"), "{told}");
    let told = unfragmented(&world, "g1", 1373, &internet);
    assert!(told.contains("From 10.0.0.1") && told.contains("mtu = 1400"), "{told}");
    // A guest that takes less than the world sends.
    world.desired.interfaces[0].dhcp.mtu = 1300;
    world.apply();
    let told = unfragmented(&world, "net", 1272, ELASTIC);
    assert!(told.contains(" 0% packet loss"), "{told}");
    let told = unfragmented(&world, "net", 1273, ELASTIC);
    assert!(told.contains(&format!("From {HOST}")) && told.contains("mtu = 1300"), "{told}");
    assert_eq!(world.status().reasons["too-big"], 2);
    // TCP finds its way, superframes and all, though neither end knew of the others.
    world.desired.interfaces[0].dhcp.mtu = 1200;
    world.apply();
    echo_server(&world, "g1", 7000);
    let inward = Flow::open(&world, "net", ELASTIC.parse().unwrap(), 7000);
    echo_server(&world, "net", 7003);
    let outward = Flow::open(&world, "g1", INTERNET, 7003);
    inward.goes_on(3);
    outward.goes_on(3);
    inward.finish().unwrap();
    outward.finish().unwrap();
    assert!(world.status().reasons["too-big"] > 2);
}

#[test]
fn what_is_too_long_is_told_the_mtu_in_ipv6_too() {
    let test = "what_is_too_long_is_told_the_mtu_in_ipv6_too";
    let ping6 = Protocol::Icmpv6 { kind: Some(128), code: None };
    let rules = vec![(ping6, six::everyone()), (tcp(22), six::everyone())];
    let Some(mut world) = six::world(test, rules) else { return };
    world.desired.interfaces.iter_mut().for_each(|i| i.dhcp.mtu = 1500);
    narrow(&mut world, 1400);
    assert!(six::pings(&world, "g1", six::WORLD), "neighbours know each other");
    let told = unfragmented(&world, "g1", 1352, six::WORLD);
    assert!(told.contains(" 0% packet loss"), "{told}");
    let told = unfragmented(&world, "g1", 1353, six::WORLD);
    assert!(told.contains("From fe80::68:70ff:fe00:1") && told.contains("mtu=1400"), "{told}");
    six::echo_once(&world, "net", 7000);
    assert!(six::converses(&world, "g1", six::WORLD.parse().unwrap(), 7000).unwrap());
    six::echo_once(&world, "g2", 22);
    assert!(six::converses(&world, "net", six::guest(2), 22).unwrap());
}

/// The ICMP message that a raw socket hears next, if it is of this type.
fn heard(world: &World, role: &str, kind: u8, deed: impl FnOnce() + Send + 'static) -> Vec<u8> {
    let hear = inside(world, role, move || {
        let hears =
            socket(AddressFamily::Inet, SockType::Raw, SockFlag::empty(), SockProtocol::Icmp)
                .unwrap();
        let patience = TimeVal::new(PATIENCE.as_secs() as i64, 0);
        setsockopt(&hears, sockopt::ReceiveTimeout, &patience).unwrap();
        deed();
        let mut packet = [0; 2048];
        loop {
            let length = recv(hears.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap();
            if packet[20] == kind {
                return packet[20..length].to_vec();
            }
        }
    });
    hear.join().unwrap()
}

fn sums_up(message: &[u8]) -> bool {
    let word = |pair: &[u8]| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0));
    let sum: u32 = message.chunks(2).map(word).sum();
    (sum & 0xffff) + (sum >> 16) == 0xffff
}

/// The kernel takes an error's checksum for right where it believes that the hardware has
/// seen to it; this test does not.
#[test]
fn an_error_has_a_right_checksum_though_the_packet_had_left_its_own_to_the_hardware() {
    let test = "an_error_has_a_right_checksum_though_the_packet_had_left_its_own_to_the_hardware";
    let Some(mut world) = one_guest(test) else { return };
    // Only the host's end: the far one promises segments that do not fit.
    let uplink = world.desired.uplink.as_ref().unwrap().device.clone();
    six::ip(&format!("-n {} link set {uplink} mtu 1400", world.namespace("host")));
    world.apply();
    let old = heard(&world, "g1", 11, || {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).unwrap();
        socket.set_ttl(1).unwrap();
        socket.send_to(&[0x5a; 999], (INTERNET, 7001)).unwrap();
    });
    assert!(sums_up(&old), "{old:02x?}");
    assert_eq!(old.len(), 556, "576 bytes with its IP header");
    // A superframe of TCP: cut, it is none any more.
    echo_server(&world, "net", 7003);
    let long = heard(&world, "g1", 3, || {
        let to = SocketAddrV4::new(INTERNET, 7003).into();
        let mut stream = TcpStream::connect_timeout(&to, PATIENCE).unwrap();
        std::io::Write::write_all(&mut stream, &[0x5a; 20_000]).unwrap();
    });
    assert!(sums_up(&long), "{long:02x?}");
    assert_eq!(long[6..8], 1400_u16.to_be_bytes());
}
