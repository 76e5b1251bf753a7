//! Network ACLs with the kernel's own packets: at a subnet's border, each way by itself,
//! and for open connections too.

use std::net::Ipv4Addr;
use std::time::Duration;

use model::network_acl::Entry;
use model::{Direction, GroupId, NetworkAcl, NetworkAclId, PortRange, Protocol, VpcId};
use rpc::dataplane::{AclDenied, Question};

use crate::traffic::{Flow, PATIENCE, connects, echo_server};
use crate::world::{World, anywhere, group, now, tcp};

const NEAR: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 6);
const FAR: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 5);
const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
const SHORT: Duration = Duration::from_secs(1);

fn entry(number: u16, direction: Direction, allow: bool, protocol: Protocol, net: &str) -> Entry {
    Entry { number, direction, allow, protocol, net: net.parse().unwrap() }
}

fn ephemeral() -> Protocol {
    Protocol::Tcp(PortRange::new(1024, 65_535).unwrap())
}

/// Two guests of one subnet and one of another; everything is open to groups. The
/// first two have the ACL.
fn world(test: &str, entries: Vec<Entry>) -> Option<World> {
    let mut world = World::new(test)?;
    world.desired.groups = vec![group(1, vec![(Protocol::Any, anywhere())])];
    for (n, address) in [(1, "10.0.0.5"), (2, "10.0.0.6"), (3, "10.0.1.5")] {
        let interface = world.add_guest(n, 1, address);
        interface.groups = vec![GroupId::from_random(1)];
        interface.network_acl = (n < 3).then(|| NetworkAclId::from_random(1));
        world.configure_guest(n);
    }
    world.desired.interfaces[0].elastic = Some(ELASTIC);
    let acl = NetworkAcl { id: NetworkAclId::from_random(1), vpc: VpcId::from_random(1), entries };
    world.desired.network_acls = vec![acl];
    world.start();
    world.apply();
    Some(world)
}

fn packets(world: &World, n: usize, reason: &str) -> u64 {
    world.status().interfaces[n - 1].reasons.get(reason).copied().unwrap_or(0)
}

#[test]
fn an_acl_guards_the_border_of_a_subnet_each_way_and_not_what_stays_in_it() {
    use Direction::{Egress, Ingress};
    let test = "an_acl_guards_the_border_of_a_subnet_each_way_and_not_what_stays_in_it";
    // Port 7 may come in, and answers go out; nothing may be asked.
    let entries = vec![
        entry(100, Ingress, false, tcp(7), "198.51.100.77/32"),
        entry(110, Ingress, true, tcp(7), "0.0.0.0/0"),
        entry(100, Egress, true, ephemeral(), "0.0.0.0/0"),
    ];
    let Some(mut world) = world(test, entries) else { return };
    for role in ["g1", "g2", "g3", "net"] {
        echo_server(&world, role, 7);
        echo_server(&world, role, 8);
    }
    assert!(connects(&world, "g3", NEAR, 7, PATIENCE), "in by entry 110, back by 100");
    assert!(connects(&world, "net", ELASTIC, 7, PATIENCE), "from the world, too");
    assert!(connects(&world, "g1", NEAR, 8, PATIENCE), "within the subnet nothing is asked");
    assert!(!connects(&world, "g3", NEAR, 8, SHORT), "no entry");
    assert!(!connects(&world, "net", ELASTIC, 8, SHORT));
    assert!(!connects(&world, "g1", FAR, 7, SHORT), "port 7 may not go out");
    assert!(packets(&world, 2, "acl-ingress-denied") > 0);
    assert!(packets(&world, 1, "acl-egress-denied") > 0);

    let asked = |direction, remote: Ipv4Addr, local_port, remote_port| {
        let interface = world.desired.interfaces[0].id;
        let question = Question {
            interface,
            direction,
            local: None,
            protocol: 6,
            remote: remote.into(),
            remote_port,
            local_port,
        };
        let told = world.why(&question);
        (told.reason, told.denied.map(|AclDenied { entry, .. }| entry))
    };
    let denied = |reason: &str, entry| (reason.to_owned(), Some(entry));
    assert_eq!(asked(Egress, FAR, 40_000, 7), denied("acl-egress-denied", None));
    let named = asked(Ingress, "198.51.100.77".parse().unwrap(), 7, 40_000);
    assert_eq!(named, denied("acl-ingress-denied", Some(100)));
    assert_eq!(asked(Ingress, "198.51.100.78".parse().unwrap(), 7, 40_000).1, None);

    // An answer is a packet like any other: without its entry, the open flow stands still.
    let flow = Flow::open(&world, "net", ELASTIC, 7);
    let answers = world.desired.network_acls[0].entries.pop().unwrap();
    world.apply();
    let begun = now();
    let before = packets(&world, 1, "acl-egress-denied");
    while packets(&world, 1, "acl-egress-denied") < before + 2 {
        assert!(now() - begun < PATIENCE, "the flow went on");
        std::thread::sleep(Duration::from_millis(20));
    }
    world.desired.network_acls[0].entries.push(answers);
    world.apply();
    flow.goes_on(3);
    // And over a daemon that was killed: what is pinned is what is wanted.
    world.kill();
    world.start();
    world.desired.generation += 1;
    assert_eq!(world.try_apply().unwrap().changes, 0);
    flow.goes_on(3);
    flow.finish().unwrap();
}
