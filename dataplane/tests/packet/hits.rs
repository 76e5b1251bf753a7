//! What rules have let in is counted by their ids, whatever becomes of their places.

use model::RuleId;

use crate::rates::World;
use crate::world::{address, guest, guest_mac};

/// Flows that the rule with this number let in, by the loaded programs' counters.
fn hits(world: &World, rule: u128) -> u64 {
    let all = world.loaded.watch.hits(world.loaded.tables()).unwrap();
    all.get(&RuleId::from_random(rule)).copied().unwrap_or(0)
}

/// New flows from the first guest to the second, each by ports of its own.
fn open(world: &World, ports: std::ops::Range<u16>) {
    for port in ports {
        let (from, to) = (address(0).octets(), address(1).octets());
        let mut frame = Vec::new();
        etherparse::PacketBuilder::ethernet2(guest_mac(0).octets(), [2; 6])
            .ipv4(from, to, 64)
            .udp(port, 9)
            .write(&mut frame, b"x")
            .unwrap();
        assert_eq!(world.run(&guest(0), &frame), ebpf::Reason::NewFlow);
    }
}

#[test]
fn a_rule_that_takes_anothers_place_does_not_take_what_that_had_counted() {
    let test = "a_rule_that_takes_anothers_place_does_not_take_what_that_had_counted";
    let Some(mut world) = World::new(test) else { return };
    assert_eq!((hits(&world, 1), hits(&world, 2)), (0, 0));
    open(&world, 4000..4010);
    assert_eq!((hits(&world, 1), hits(&world, 2)), (10, 10), "into the one, out of the other");
    // The same rule in the same place under another id, as when it is revoked and given again.
    world.desired.groups[0].egress[0].id = RuleId::from_random(3);
    world.apply();
    assert_eq!((hits(&world, 2), hits(&world, 3)), (10, 0));
    open(&world, 4010..4013);
    assert_eq!((hits(&world, 1), hits(&world, 2), hits(&world, 3)), (13, 10, 3));
}
