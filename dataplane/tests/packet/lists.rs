//! Prefix lists and the limits of rules, compiled.

use dataplane::compile::{Host, Tables, compile};
use model::{
    Direction, ListEntry, Peer, PortRange, PrefixList, Protocol, Rule, RuleId, RuleLimits,
};
use rpc::dataplane::Desired;

use crate::permits::both;
use crate::random::Random;
use crate::world::{desired, group, imagined_devices, list_id};

fn list(n: u64, entries_max: u32, nets: &[&str]) -> PrefixList {
    let entry =
        |net: &&str| ListEntry { net: net.parse().unwrap(), description: format!("the {net}") };
    let entries = nets.iter().map(entry).collect();
    PrefixList { id: list_id(n), version: 4, entries_max, entries }
}

/// One interface whose one group lets port 22 in from `lists`.
fn one_group(lists: Vec<PrefixList>) -> Desired {
    let mut random = Random::seeded("lists", 61);
    let mut state = desired(&mut random, 0);
    while state.interfaces.first().is_none_or(|i| i.vpc != state.groups[0].vpc) {
        state = desired(&mut random, 0);
    }
    state.interfaces.truncate(1);
    state.interfaces[0].groups = vec![group(0)];
    let rule = |(n, list): (usize, &PrefixList)| Rule {
        id: RuleId::from_random(n as u128 + 1),
        protocol: Protocol::Tcp(PortRange::single(22)),
        peer: Peer::PrefixList(list.id),
    };
    state.groups[0].ingress = lists.iter().enumerate().map(rule).collect();
    state.prefix_lists = lists;
    state
}

fn refused(state: &Desired) -> String {
    compile(state, &imagined_devices(), &Tables::default()).unwrap_err().to_string()
}

#[test]
fn a_rule_lets_in_what_its_list_has_and_tells_the_entry() {
    let lists = vec![
        list(0, 10, &["192.0.2.0/24", "192.0.2.64/26", "203.0.113.0/24"]),
        list(1, 10, &["2001:db8:9::/48"]),
        list(2, 10, &[]),
    ];
    let state = one_group(lists);
    let tables = compile(&state, &imagined_devices(), &Tables::default()).unwrap();
    let record = *tables.interfaces.values().next().unwrap();
    let host = Host::new(tables.clone());
    let asked = [
        ("192.0.2.1", Some((1, "192.0.2.0/24"))),
        ("192.0.2.65", Some((1, "192.0.2.64/26"))),
        ("203.0.113.255", Some((1, "203.0.113.0/24"))),
        ("203.0.114.0", None),
        ("2001:db8:9::1", Some((2, "2001:db8:9::/48"))),
        ("2001:db8:a::1", None),
    ];
    for (remote, expected) in asked {
        let remote = remote.parse().unwrap();
        let header = model::security_group::Header { remote, protocol: 6, detail: 22 };
        let interface = &state.interfaces[0];
        let (got, model) = both(&state, &host, interface, &record, Direction::Ingress, &header);
        assert_eq!(got, model, "{remote}");
        assert_eq!(got, expected.map(|(rule, _)| RuleId::from_random(rule)), "{remote}");
        let listed = tables.names.listed(got, Some(remote));
        assert_eq!(listed.as_ref().map(|l| l.net.to_string()), expected.map(|e| e.1.to_owned()));
        assert!(listed.is_none_or(|l| l.version == 4 && l.description == format!("the {}", l.net)));
    }
}

#[test]
fn a_changed_list_rewrites_the_policies_that_name_it_and_no_others() {
    let mut state = one_group(vec![list(0, 10, &["192.0.2.0/24"])]);
    let mut other = state.interfaces[0].clone();
    let names: Vec<String> = imagined_devices().by_name.keys().cloned().collect();
    let free = names.iter().find(|n| n.starts_with('g') && *n != other.device.name());
    let Some(free) = free else { panic!("{names:?}: a second guest's device") };
    other.id = model::InterfaceId::from_random(99);
    other.device = rpc::dataplane::Device::Existing { name: free.clone() };
    other.address = "10.0.0.222".parse().unwrap();
    (other.elastic, other.secondary, other.ipv6) = (None, vec![], vec![]);
    other.groups = vec![group(1)];
    state.groups[1].ingress = vec![Rule {
        id: RuleId::from_random(9),
        protocol: Protocol::Any,
        peer: Peer::Cidr("198.18.0.0/15".parse().unwrap()),
    }];
    state.interfaces.push(other);
    let devices = imagined_devices();
    let before = compile(&state, &devices, &Tables::default()).unwrap();
    // Another version with the same entries is no change in the kernel.
    state.prefix_lists[0].version += 1;
    let renamed = compile(&state, &devices, &before).unwrap();
    assert_eq!(renamed.policies, before.policies);
    assert_eq!(renamed.interfaces, before.interfaces);
    state.prefix_lists[0].entries.push(list(0, 1, &["203.0.113.0/24"]).entries.remove(0));
    let after = compile(&state, &devices, &before).unwrap();
    let ingress = |tables: &Tables, group: usize| {
        let mac = state.interfaces[group].mac.octets();
        let id = tables.names.interfaces.iter().find(|(_, id)| **id == state.interfaces[group].id);
        let record = tables.interfaces[id.unwrap().0];
        assert_eq!(record.mac, mac);
        record.ingress
    };
    // The changed policy stands in another place, and is in force when the record names it.
    assert_ne!(ingress(&before, 0), ingress(&after, 0));
    assert_eq!(ingress(&before, 1), ingress(&after, 1));
    let changed: Vec<u32> = after
        .policies
        .iter()
        .filter(|(slot, placed)| before.policies.get(slot) != Some(placed))
        .map(|(slot, _)| *slot)
        .collect();
    assert_eq!(changed, [ingress(&after, 0)]);
}

#[test]
fn a_list_that_is_not_there_twice_there_or_wrong_is_refused() {
    let mut state = one_group(vec![list(0, 10, &["192.0.2.0/24"])]);
    let whole = state.clone();
    state.prefix_lists.push(list(0, 10, &["192.0.2.0/24"]));
    assert!(refused(&state).contains("it appears twice"), "{}", refused(&state));
    state.prefix_lists.clear();
    let told = refused(&state);
    assert!(
        told.contains(&list_id(0).to_string()) && told.contains("not in the desired"),
        "{told}"
    );
    state = whole;
    state.prefix_lists[0].entries_max = 0;
    assert!(refused(&state).contains("1 to 1000 are lawful"), "{}", refused(&state));
}

#[test]
fn a_list_counts_as_all_that_it_has_room_for() {
    let mut state = one_group(vec![list(0, 59, &["192.0.2.0/24"])]);
    let plain = |n: u128| Rule {
        id: RuleId::from_random(100 + n),
        protocol: Protocol::Any,
        peer: Peer::Cidr("198.18.0.0/15".parse().unwrap()),
    };
    let six = |n: u128| Rule { peer: Peer::Cidr("2001:db8::/32".parse().unwrap()), ..plain(n) };
    state.rule_limits = Some(RuleLimits::default());
    let devices = imagined_devices();
    state.groups[0].ingress.push(plain(0));
    // The other family and the other direction count by themselves.
    state.groups[0].ingress.extend((1..61).map(six));
    state.groups[0].egress = (100..160).map(plain).collect();
    compile(&state, &devices, &Tables::default()).unwrap();
    state.groups[0].ingress.push(plain(200));
    let told = refused(&state);
    let group = group(0).to_string();
    for part in [&*group, "61 ingress rules of IPv4", "60 are the most", "rules-a-group"] {
        assert!(told.contains(part), "{told}");
    }
    state.rule_limits = Some(RuleLimits { rules_a_group: 61, groups_an_interface: 5 });
    compile(&state, &devices, &Tables::default()).unwrap();
}

#[test]
fn an_interface_has_as_many_groups_and_rules_as_the_limits_say_and_no_more() {
    let mut state = one_group(vec![list(0, 1000, &["192.0.2.0/24"])]);
    let devices = imagined_devices();
    compile(&state, &devices, &Tables::default()).unwrap();
    let one_more = Rule {
        id: RuleId::from_random(100),
        protocol: Protocol::Any,
        peer: Peer::Cidr("198.18.0.0/15".parse().unwrap()),
    };
    state.groups[0].ingress.push(one_more);
    let told = refused(&state);
    assert!(told.contains("1001 ingress rules, but 1000 are the most"), "{told}");
    // As many groups as are asked for, and one more.
    state.groups[0].ingress.clear();
    let vpc = state.interfaces[0].vpc;
    let more = (0..16).map(|n| model::SecurityGroup {
        id: model::GroupId::from_random(900 + n),
        vpc,
        ingress: vec![],
        egress: vec![],
    });
    state.groups.extend(more);
    for most in [5, 16] {
        let limits = RuleLimits { rules_a_group: 60, groups_an_interface: most };
        state.rule_limits = Some(limits);
        let named = (0..u128::from(most)).map(|n| model::GroupId::from_random(900 + n));
        state.interfaces[0].groups = named.collect();
        compile(&state, &devices, &Tables::default()).unwrap();
        state.interfaces[0].groups.push(group(0));
        let told = refused(&state);
        let beyond = format!("{} groups, but {most} are the most", most + 1);
        assert!(told.contains(&beyond) && told.contains("groups-an-interface"), "{told}");
    }
    state.rule_limits = Some(RuleLimits { rules_a_group: 63, groups_an_interface: 16 });
    assert!(refused(&state).contains("1008, but 1000 are the most"), "{}", refused(&state));
}
