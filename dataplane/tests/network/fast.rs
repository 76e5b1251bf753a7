//! The XDP fast path never breaks TCP: what has complete checksums goes by it, and
//! what was left to the hardware goes by tc, though the uplink was declared.

use std::net::Ipv4Addr;
use std::time::Duration;

use rpc::dataplane::FastPath;

use crate::elastic::reachable_guest;
use crate::traffic::{Flow, echo_server};
use crate::world::{World, anywhere, has, now, run, tcp};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const LONG: Duration = Duration::from_secs(30);

fn ethtool(world: &World, role: &str, feature: &str, state: &str) {
    run(world.command(role, "ethtool").args(["-K", "eth0", feature, state]));
}

fn counted(world: &World, reason: &str) -> u64 {
    world.status().interfaces[0].reasons.get(reason).copied().unwrap_or(0)
}

fn world(test: &str) -> Option<World> {
    let mut world = World::new(test)?;
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    // Its end of the cable takes frames once it has GRO.
    ethtool(&world, "g1", "gro", "on");
    world.desired.interfaces[0].takes_frames = Some(true);
    world.desired.uplink.as_mut().unwrap().fast_path = FastPath::Declared;
    world.start();
    world.apply();
    echo_server(&world, "g1", 22);
    Some(world)
}

/// Rounds of 20 000 bytes there and back, each compared.
fn converse(flow: &Flow, world: &World) {
    let (begun, rounds) = (now(), flow.rounds());
    while flow.rounds() < rounds + 50 {
        assert!(now() - begun < LONG, "it stands still: {:?}", world.status().reasons);
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn complete_checksums_go_by_the_fast_path_and_tcp_is_whole() {
    let test = "complete_checksums_go_by_the_fast_path_and_tcp_is_whole";
    if !has(test, "ethtool") {
        return;
    }
    let Some(mut world) = world(test) else { return };
    ethtool(&world, "net", "tx", "off");
    let flow = Flow::open(&world, "net", ELASTIC, 22);
    converse(&flow, &world);
    let early = counted(&world, "established-early");
    assert!(early >= 50, "{:?}", world.status().reasons);
    // It is taken away and given back while the connection lives.
    for declared in [FastPath::Off, FastPath::Declared] {
        world.desired.uplink.as_mut().unwrap().fast_path = declared;
        world.apply();
        let before = counted(&world, "established-early");
        converse(&flow, &world);
        let after = counted(&world, "established-early");
        assert_eq!(after > before, declared == FastPath::Declared, "{before} {after}");
    }
    flow.finish().unwrap();
}

#[test]
fn checksums_left_to_the_hardware_go_by_tc_though_the_uplink_was_declared() {
    let test = "checksums_left_to_the_hardware_go_by_tc_though_the_uplink_was_declared";
    if !has(test, "ethtool") {
        return;
    }
    let Some(world) = world(test) else { return };
    // The sender's offloads are on, as they are by default.
    let flow = Flow::open(&world, "net", ELASTIC, 22);
    converse(&flow, &world);
    flow.finish().unwrap();
    let (early, tc) = (counted(&world, "established-early"), counted(&world, "established"));
    assert!(early * 10 < tc, "{early} early, {tc} by tc");
}
