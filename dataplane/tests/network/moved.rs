//! An interface moves to another host, and its flows with it.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, UdpSocket};
use std::process::Command;
use std::time::Duration;

use model::NatGatewayId;
use rpc::dataplane::{Device, Imported, LeftOut, MovedFlow};

use crate::elastic::reachable_guest;
use crate::nat::{PUBLIC, from_port, says_back, tells_who};
use crate::traffic::{Flow, PATIENCE, echo_server, inside};
use crate::world::{INTERNET, World, anywhere, run, tcp};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);

fn ip(arguments: String) {
    run(Command::new("ip").args(arguments.split_whitespace()));
}

/// Another host for the first guest, who is at neither's cables yet.
///
/// ```text
///  net (of the first) ─eth0─ first host  ─g1─ guest eth0
///                     ─eth1─ second host ────  guest eth1
/// ```
fn second_host(test: &str, first: &World) -> Option<World> {
    let mut second = World::new(test)?;
    let (net, guest, host) =
        (first.namespace("net"), first.namespace("g1"), second.namespace("host"));
    let (uplink, tap) = (format!("{}-u2", second.name), format!("{}-t2", second.name));
    let interface = &first.desired.interfaces[0];
    ip(format!("link add {uplink} netns {host} type veth peer name eth1 netns {net}"));
    ip(format!("link add {tap} netns {host} type veth peer name eth1 netns {guest}"));
    ip(format!("-n {host} link set {uplink} up"));
    ip(format!("-n {host} link set {tap} up"));
    ip(format!("-n {net} link set eth1 up"));
    ip(format!("-n {guest} link set eth1 address {} up", interface.mac));
    ip(format!("-n {host} addr add 198.51.100.3/24 dev {uplink}"));
    second.desired = first.desired.clone();
    second.desired.uplink.as_mut().unwrap().device = uplink;
    second.desired.interfaces.truncate(1);
    second.desired.interfaces[0].device = Device::Existing { name: tap };
    second.start();
    second.apply();
    Some(second)
}

/// From here on the guest is at the second host's, and so is whoever asks for `public`.
fn change_cables(first: &World, public: Ipv4Addr) {
    let (net, guest) = (first.namespace("net"), first.namespace("g1"));
    let address = first.desired.interfaces[0].address;
    let [a, b, c, _] = address.octets();
    ip(format!("-n {guest} addr add {address}/24 dev eth1"));
    ip(format!("-n {guest} route replace default via {a}.{b}.{c}.1 dev eth1"));
    ip(format!("-n {guest} link set eth0 down"));
    ip(format!("-n {guest} route replace default via {a}.{b}.{c}.1 dev eth1"));
    ip(format!("-n {net} route replace {public}/32 dev eth1"));
    ip(format!("-n {net} route replace 198.51.100.3/32 dev eth1"));
}

#[test]
fn a_connection_goes_on_after_its_interface_has_moved_with_its_flows() {
    let test = "a_connection_goes_on_after_its_interface_has_moved_with_its_flows";
    let Some(mut first) = World::new(test) else { return };
    reachable_guest(&mut first, vec![(tcp(22), anywhere())]);
    first.start();
    first.apply();
    echo_server(&first, "g1", 22);
    let flow = Flow::open(&first, "net", ELASTIC, 22);
    let Some(second) = second_host(test, &first) else { return };

    let interface = first.desired.interfaces[0].id;
    let moved = first.ask(|c| async move { c.dataplane_export(interface).await }).unwrap();
    assert!(!moved.flows.is_empty(), "the open connection is among them");
    // The cables are changed, and the flows are not there yet: nothing passes.
    change_cables(&first, ELASTIC);
    std::thread::sleep(Duration::from_millis(300));
    let stalled = flow.rounds();
    std::thread::sleep(Duration::from_millis(700));
    assert!(flow.rounds() <= stalled + 1, "it went on without its flow");

    let id = moved.interface;
    let sent = moved.clone();
    let imported = second.ask(|c| async move { c.dataplane_import(&sent).await }).unwrap();
    assert_eq!(imported.flows, moved.flows.len() as u64);
    flow.goes_on(1);
    flow.finish().unwrap();

    // Twice is once; and what is out of bounds is refused and changes nothing.
    let again = moved.clone();
    let twice = second.ask(|c| async move { c.dataplane_import(&again).await }).unwrap();
    assert_eq!(twice.flows, 0);
    let mut newer = moved.clone();
    newer.version += 1;
    let mut odd = moved.clone();
    odd.flows[0].phase = 9;
    let mut many = moved.clone();
    many.flows = vec![MovedFlow { ..moved.flows[0] }; 16_385];
    for wrong in [newer, odd, many] {
        let error = second.ask(|c| async move { c.dataplane_import(&wrong).await }).unwrap_err();
        assert_eq!(error.kind, rpc::Kind::Refused, "{error}");
    }
    let open = second.status().interfaces[0].flows;
    assert!(open >= 1 && open <= moved.flows.len() as u64 + 1, "{open} flows of {id}");
}

/// Tells whoever sends a datagram whom it takes him for.
fn tells_senders(world: &World, role: &str, port: u16) {
    let bound =
        inside(world, role, move || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).unwrap());
    let socket = bound.join().unwrap();
    std::thread::spawn(move || {
        while let Ok((_, from)) = socket.recv_from(&mut [0; 64]) {
            _ = socket.send_to(from.to_string().as_bytes(), from);
        }
    });
}

fn whom(socket: &UdpSocket) -> String {
    let mut told = [0; 64];
    socket.send(b"?").unwrap();
    let length = socket.recv(&mut told).unwrap();
    std::str::from_utf8(&told[..length]).unwrap().to_owned()
}

#[test]
fn connections_through_a_nat_gateway_go_on_by_their_ports_after_their_interface_has_moved() {
    let test =
        "connections_through_a_nat_gateway_go_on_by_their_ports_after_their_interface_has_moved";
    let Some(first) = crate::nat::world(test, None) else { return };
    tells_who(&first, "net", 7);
    tells_senders(&first, "net", 5000);
    let (mut stream, _) = from_port(&first, "g1", 40_000, SocketAddrV4::new(INTERNET, 7));
    says_back(&mut stream);
    let bound = inside(&first, "g1", || UdpSocket::bind((Ipv4Addr::new(10, 0, 0, 5), 0)).unwrap());
    let socket = bound.join().unwrap();
    socket.connect((INTERNET, 5000)).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut lost, told) = from_port(&first, "g1", 40_001, SocketAddrV4::new(INTERNET, 7));
    says_back(&mut lost);
    let before = [(); 3].map(|()| whom(&socket));
    assert!(before[0].starts_with(&PUBLIC.to_string()) && before.iter().all(|b| *b == before[0]));
    let Some(second) = second_host(test, &first) else { return };

    let interface = first.desired.interfaces[0].id;
    let mut moved = first.ask(|c| async move { c.dataplane_export(interface).await }).unwrap();
    assert_eq!((moved.flows.len(), moved.ports.len()), (3, 3), "{moved:#?}");
    moved.ports.iter_mut().filter(|port| port.port == told.port()).for_each(|port| {
        port.gateway = NatGatewayId::from_random(9);
    });
    change_cables(&first, PUBLIC);
    let imported = second.ask(|c| async move { c.dataplane_import(&moved).await }).unwrap();
    let left_out = [(LeftOut::NoGateway, 1)].into();
    assert_eq!(imported, Imported { flows: 3, ports: 2, left_out });
    // A peer that saw another port would reset the one, and tell it of the other.
    says_back(&mut stream);
    assert_eq!(whom(&socket), before[0]);
    assert_eq!(second.status().nat_gateways[0].reasons.get("new-flow"), None);
    // Who was left out is told by the gateway itself: the peer hears nothing of it.
    lost.write_all(b"hello").unwrap();
    let error = lost.read(&mut [0; 5]).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
    let status = second.status();
    assert!(status.interfaces[0].reasons.contains_key("no-flow"), "{status:#?}");
}
