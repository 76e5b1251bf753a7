//! TCP's corners, by the kernel's own TCP in two namespaces.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::os::fd::AsRawFd as _;
use std::sync::mpsc::channel;
use std::thread::JoinHandle;
use std::time::Duration;

use ebpf::flow::CLOSING_IDLE_S;
use model::GroupId;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrIn, bind, connect, socket};

use crate::elastic::{ELASTIC, reachable_guest};
use crate::traffic::{PATIENCE, echo_server, inside};
use crate::world::{World, anywhere, group, has, now, tcp};

const PORT: u16 = 4000;

/// Connects from [`PORT`] to [`PORT`], and says and hears a word.
fn open_both_ways(world: &World, role: &str, to: Ipv4Addr) -> JoinHandle<std::io::Result<[u8; 2]>> {
    inside(world, role, move || {
        let socket = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
        let own = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, PORT);
        bind(socket.as_raw_fd(), &SockaddrIn::from(own))?;
        connect(socket.as_raw_fd(), &SockaddrIn::from(SocketAddrV4::new(to, PORT)))?;
        let mut stream = TcpStream::from(socket);
        stream.set_read_timeout(Some(PATIENCE))?;
        echoed(&mut stream)
    })
}

/// Says a word, and hears one.
fn echoed(stream: &mut TcpStream) -> std::io::Result<[u8; 2]> {
    stream.write_all(b"hi")?;
    let mut heard = [0; 2];
    stream.read_exact(&mut heard)?;
    Ok(heard)
}

/// Nobody listens: that it opens at all says that both openings met.
#[test]
fn two_guests_open_one_connection_at_once() {
    let Some(mut world) = World::new("two_guests_open_one_connection_at_once") else { return };
    let addresses = ["10.0.0.5", "10.0.0.6"];
    for (n, address) in [1, 2].into_iter().zip(addresses) {
        world.add_guest(n, 1, address).groups = vec![GroupId::from_random(1)];
        world.configure_guest(n);
    }
    world.desired.groups = vec![group(1, vec![])];
    world.start();
    world.apply();
    let ends = [
        open_both_ways(&world, "g1", addresses[1].parse().unwrap()),
        open_both_ways(&world, "g2", addresses[0].parse().unwrap()),
    ];
    // The first opening of each is refused; both kernels send theirs again.
    let begun = now();
    let refused = |world: &World| {
        let told = |i: &rpc::dataplane::InterfaceStatus| i.reasons.contains_key("ingress-denied");
        world.status().interfaces.iter().all(told)
    };
    while !refused(&world) {
        assert!(now() - begun < PATIENCE, "{:?}", world.status());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    world.desired.groups = vec![group(1, vec![(tcp(PORT), anywhere())])];
    world.apply();
    for end in ends {
        assert_eq!(&end.join().unwrap().unwrap(), b"hi");
    }
}

#[test]
fn a_connection_goes_on_after_all_flows_were_lost_where_its_interface_is_loose() {
    let test = "a_connection_goes_on_after_all_flows_were_lost_where_its_interface_is_loose";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.desired.interfaces[0].loose_tcp = true;
    world.start();
    world.apply();
    echo_server(&world, "g1", 22);
    let elastic = world.desired.interfaces[0].elastic.unwrap();
    let (said, hears) = channel();
    let (goes_on, waits) = channel();
    // Silent meanwhile: what is lost on the way would be sent again later and later.
    let client = inside(&world, "net", move || {
        let address = SocketAddrV4::new(elastic, 22).into();
        let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let first = echoed(&mut stream)?;
        said.send(first).map_err(std::io::Error::other)?;
        waits.recv().map_err(std::io::Error::other)?;
        echoed(&mut stream)
    });
    assert_eq!(&hears.recv_timeout(PATIENCE).unwrap(), b"hi");
    world.kill();
    assert!(world.teardown().status.success());
    world.start();
    assert!(!world.status().adopted, "nothing was left");
    world.apply();
    goes_on.send(()).unwrap();
    assert_eq!(&client.join().unwrap().unwrap(), b"hi");
}

/// Whoever knows a connection's addresses and ports, and not its numbers, can do nothing to
/// it, though it is silent for longer than an ended one is remembered.
#[test]
fn a_silent_connection_outlives_forged_resets_and_openings() {
    let test = "a_silent_connection_outlives_forged_resets_and_openings";
    if !has(test, "hping3") {
        return;
    }
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.start();
    world.apply();
    echo_server(&world, "g1", 22);
    let connected = inside(&world, "net", || {
        let mut stream = TcpStream::connect_timeout(&(ELASTIC, 22).into(), PATIENCE)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        echoed(&mut stream)?;
        Ok::<_, std::io::Error>(stream)
    });
    let mut stream = connected.join().unwrap().unwrap();
    let port = stream.local_addr().unwrap().port().to_string();
    for forged in ["-R", "-S", "-R"] {
        let mut hping3 = world.command("net", "timeout");
        hping3.args(["60", "hping3", "-n", "-q", forged, "-k", "-s", &port, "-p", "22"]);
        let said = hping3.args(["-c", "5", "-i", "u10000", &ELASTIC.to_string()]).output().unwrap();
        let said = String::from_utf8_lossy(&said.stderr);
        assert!(said.contains("5 packets transmitted"), "{said}");
    }
    std::thread::sleep(Duration::from_secs(u64::from(CLOSING_IDLE_S) + 3));
    assert_eq!(&echoed(&mut stream).unwrap(), b"hi");
}
