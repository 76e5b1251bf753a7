//! Rates with real TCP, whose superframes are counted as what they become.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use rpc::dataplane::{Allowance, Rates};

use crate::elastic::reachable_guest;
use crate::traffic::{Flow, echo_server, inside};
use crate::world::{World, anywhere, now, tcp};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const CREDIT_BYTES: u64 = 2_000_000;
const LONG: Duration = Duration::from_secs(60);

fn wait(what: &str, mut reached: impl FnMut() -> bool) {
    let begun = now();
    while !reached() {
        assert!(now() - begun < LONG, "{what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn a_guests_tcp_gets_its_credits_and_no_more_and_its_neighbour_talks_on() {
    let test = "a_guests_tcp_gets_its_credits_and_no_more_and_its_neighbour_talks_on";
    let Some(mut world) = World::new(test) else { return };
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    let groups = world.desired.interfaces[0].groups.clone();
    let neighbour = world.add_guest(2, 1, "10.0.0.6");
    neighbour.elastic = Some(Ipv4Addr::new(198, 51, 100, 201));
    neighbour.groups = groups;
    // 125 bytes a second besides: nothing, beside two million.
    let outgoing = Allowance { baseline: 1000, peak: 80_000_000_000, credit: CREDIT_BYTES * 8 };
    world.desired.interfaces[0].rates = Rates { outgoing: Some(outgoing), ..Rates::default() };
    world.start();
    world.apply();
    world.configure_guest(2);
    echo_server(&world, "g2", 22);
    let beside = Flow::open(&world, "net", Ipv4Addr::new(198, 51, 100, 201), 22);

    // The guest sends as much as it may, with its offloads as they are.
    let listener = inside(&world, "g1", || TcpListener::bind(("0.0.0.0", 22)).unwrap());
    let listener = listener.join().unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        while stream.write_all(&[0x5a; 65_536]).is_ok() {}
    });
    let heard = Arc::new(AtomicU64::new(0));
    let counter = heard.clone();
    _ = inside(&world, "net", move || {
        let mut stream = TcpStream::connect(SocketAddrV4::new(ELASTIC, 22)).unwrap();
        let mut buffer = vec![0; 65_536];
        while let Ok(count @ 1..) = stream.read(&mut buffer) {
            counter.fetch_add(count as u64, Ordering::Relaxed);
        }
    });
    let reasons = |world: &World| world.status().interfaces[0].reasons.clone();
    let limited = "bw-out-allowance-exceeded";
    wait("the limit was never met", || reasons(&world).contains_key(limited));
    wait("the credits were not spent", || heard.load(Ordering::Relaxed) > CREDIT_BYTES / 2);
    let rounds = beside.rounds();
    wait("the neighbour stands still", || beside.rounds() > rounds + 20);
    // Headers are paid for too, so less than the credits of payload.
    let bytes = heard.load(Ordering::Relaxed);
    assert!(bytes < CREDIT_BYTES, "{bytes} bytes");
    let status = world.status();
    let left = status.interfaces[0].credits.outgoing.unwrap();
    assert!(left < CREDIT_BYTES * 8 / 2, "{left} bits left");
    assert!(!status.interfaces[1].reasons.contains_key(limited), "{status:?}");
    beside.finish().unwrap();

    // Without the limit the same connection goes on.
    world.desired.interfaces[0].rates = Rates::default();
    world.apply();
    wait("it does not go on", || heard.load(Ordering::Relaxed) > CREDIT_BYTES * 2);
}
