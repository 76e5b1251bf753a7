//! The daemon as it always runs: what the kernel says that it may.

use std::net::Ipv4Addr;
use std::time::Duration;

use crate::elastic::reachable_guest;
use crate::traffic::{connects, echo_server};
use crate::world::{World, anywhere, tcp};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const NET_ADMIN: u64 = 1 << 12;
const BPF: u64 = 1 << 39;

#[test]
fn the_daemon_has_two_capabilities_and_serves_with_them() {
    let test = "the_daemon_has_two_capabilities_and_serves_with_them";
    let Some(mut world) = World::new(test) else { return };
    world.start();
    // Devices, programs, maps, sockets: all of it is made by a daemon that is confined.
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.apply();
    echo_server(&world, "g1", 22);
    assert!(connects(&world, "net", ELASTIC, 22, Duration::from_secs(30)));

    let mut threads = 0;
    for task in std::fs::read_dir(format!("/proc/{}/task", world.pid())).unwrap().flatten() {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().last().unwrap().to_owned()
        };
        assert_eq!((&*field("NoNewPrivs:"), &*field("Seccomp:")), ("1", "2"), "{status}");
        for (kind, held) in [
            ("CapEff:", NET_ADMIN | BPF),
            ("CapPrm:", NET_ADMIN | BPF),
            ("CapInh:", 0),
            ("CapBnd:", 0),
        ] {
            assert_eq!(u64::from_str_radix(&field(kind), 16).unwrap(), held, "{kind} {status}");
        }
        threads += 1;
    }
    assert!(threads > 2, "{threads}");

    // A daemon that takes over, too.
    world.kill();
    world.start();
    assert!(world.status().adopted);
    world.apply();
    assert!(connects(&world, "net", ELASTIC, 22, Duration::from_secs(30)));
}
