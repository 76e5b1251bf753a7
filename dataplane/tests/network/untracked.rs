//! EC2's flows that are not tracked: open to everybody, with every answer let out.

use std::net::Ipv4Addr;
use std::time::Duration;

use model::Peer;

use crate::elastic::reachable_guest;
use crate::traffic::{Flow, PATIENCE, echo_server};
use crate::world::{INTERNET, World, anywhere, group, now, tcp};

const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);

/// A connection to port 22, which everybody may reach.
fn open_flow(test: &str) -> Option<(World, Flow)> {
    let mut world = World::new(test)?;
    reachable_guest(&mut world, vec![(tcp(22), anywhere())]);
    world.desired.interfaces[0].untracked = true;
    world.start();
    world.apply();
    echo_server(&world, "g1", 22);
    let flow = Flow::open(&world, "net", ELASTIC, 22);
    flow.goes_on(5);
    Some((world, flow))
}

fn let_in(world: &mut World, rules: Vec<(model::Protocol, Peer)>) {
    world.desired.groups = vec![group(1, rules)];
    world.apply();
}

#[test]
fn a_flow_that_is_open_to_everybody_is_not_tracked_and_ends_with_its_rule() {
    let test = "a_flow_that_is_open_to_everybody_is_not_tracked_and_ends_with_its_rule";
    let Some((mut world, flow)) = open_flow(test) else { return };
    assert_eq!(world.status().interfaces[0].flows, 0, "it counts for no limit");
    let counted = |world: &World, reason: &str| {
        world.status().interfaces[0].reasons.get(reason).copied().unwrap_or_default()
    };
    assert!(counted(&world, "untracked") > 0);
    let refused = counted(&world, "no-flow");
    let_in(&mut world, vec![]);
    let before = flow.rounds();
    // What was under way is sent again and again, and refused each time.
    let begun = now();
    while counted(&world, "no-flow") < refused + 4 {
        assert!(now() - begun < PATIENCE, "{:#?}", world.status().interfaces[0].reasons);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(flow.rounds() <= before + 1, "cut at once: one round's end was counted late at most");
    // Nothing was remembered, so nothing need be remembered for it to go on.
    let_in(&mut world, vec![(tcp(22), anywhere())]);
    flow.goes_on(5);
    flow.finish().unwrap();
}

#[test]
fn a_flow_whose_rule_is_narrowed_to_its_sender_goes_on_and_is_tracked_from_then_on() {
    let test = "a_flow_whose_rule_is_narrowed_to_its_sender_goes_on_and_is_tracked_from_then_on";
    let Some((mut world, flow)) = open_flow(test) else { return };
    let sender = Peer::Cidr(format!("{INTERNET}/32").parse().unwrap());
    let_in(&mut world, vec![(tcp(22), sender)]);
    flow.goes_on(5);
    assert_eq!(world.status().interfaces[0].flows, 1);
    let_in(&mut world, vec![]);
    flow.goes_on(5);
    flow.finish().unwrap();
}
