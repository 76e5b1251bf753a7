//! What was compiled permits what the model permits, by the same rule.

use std::collections::BTreeSet;
use std::net::IpAddr;

use dataplane::compile::{Host, Tables, compile};
use ebpf::layout::{self, LocalKey};
use ebpf::tables::Question;
use ebpf::{Tables as _, V6};
use model::security_group::{Header, permits};
use model::{GroupId, RuleId, SecurityGroup};
use rpc::dataplane::{Desired, Interface};

use crate::random::Random;
use crate::world::{PORTS, any_address, any_address6, both_directions, desired, imagined_devices};

fn groups<'a>(desired: &'a Desired, interface: &Interface) -> Vec<&'a SecurityGroup> {
    let find = |id: &GroupId| desired.groups.iter().find(|g| g.id == *id).unwrap();
    interface.groups.iter().map(find).collect()
}

/// Groups of whoever has that address in the same network.
fn remote_groups(desired: &Desired, of: &Interface, address: IpAddr) -> BTreeSet<GroupId> {
    let has = |i: &Interface| match address {
        IpAddr::V4(address) => {
            i.address == address || i.secondary.iter().any(|s| s.address == address)
        }
        IpAddr::V6(address) => i.ipv6.contains(&address),
    };
    let owner = |i: &&Interface| i.vpc == of.vpc && has(i);
    desired
        .interfaces
        .iter()
        .find(owner)
        .map(|i| i.groups.iter().copied().collect())
        .unwrap_or_default()
}

fn header(random: &mut Random) -> Header {
    let protocol = random.pick(&[1, 1, 6, 6, 6, 17, 17, 47, 58, 132]);
    let six = random.chance(40);
    let detail = match protocol {
        1 if !six => (random.pick(&[0, 3, 8, 13, 200]) << 8) | random.below(3) as u16,
        58 if six => (random.pick(&[1, 128, 135, 200]) << 8) | random.below(3) as u16,
        6 | 17 if random.chance(80) => random.pick(&PORTS),
        6 | 17 => random.next() as u16,
        _ => 0,
    };
    let remote = match six {
        true => any_address6(random).into(),
        false => any_address(random).into(),
    };
    Header { remote, protocol, detail }
}

/// The compiled rule of either family, counted from 1.
fn classified(host: &Host, of: &layout::Interface, slot: u32, header: &Header) -> u32 {
    let Header { protocol, detail, .. } = *header;
    match header.remote {
        IpAddr::V4(remote) => {
            let remote = u32::from(remote);
            let local = host.local(&LocalKey { vpc: of.vpc, address: remote, zero: 0 });
            let identity = local.map_or(0, |l| l.identity);
            host.classify(slot, &Question { remote, identity, protocol, detail })
        }
        IpAddr::V6(remote) => {
            let remote = V6::from_bits(remote.to_bits());
            let near = host.holder(&remote).filter(|holder| holder.vpc == of.vpc);
            let identity = near.map_or(0, |holder| holder.identity);
            host.classify6(slot, &Question { remote, identity, protocol, detail })
        }
    }
}

/// Compares every interface's every direction on `headers` headers; the number of
/// disagreements, and of permissions.
fn compare(random: &mut Random, desired: &Desired, host: &Host, headers: u64) -> (u64, u64) {
    let (mut wrong, mut permitted) = (0, 0);
    for interface in &desired.interfaces {
        let record = host
            .tables()
            .interfaces
            .values()
            .find(|r| r.mac == interface.mac.octets())
            .copied()
            .unwrap();
        for direction in both_directions() {
            for _ in 0..headers {
                let header = header(random);
                let (got, expected) = both(desired, host, interface, &record, direction, &header);
                permitted += u64::from(expected.is_some());
                wrong += u64::from(got != expected);
            }
        }
    }
    (wrong, permitted)
}

/// The rule by which the tables permit a header, and the one by which the model does.
pub fn both(
    desired: &Desired,
    host: &Host,
    interface: &Interface,
    record: &ebpf::layout::Interface,
    direction: model::Direction,
    header: &Header,
) -> (Option<RuleId>, Option<RuleId>) {
    let slot = match direction {
        model::Direction::Ingress => record.ingress,
        model::Direction::Egress => record.egress,
    };
    let rule = classified(host, record, slot, header) as usize;
    let named = &host.tables().names.rules[&(record.ifindex, direction)];
    let got = rule.checked_sub(1).map(|bit| named[bit]);
    let remote_groups = remote_groups(desired, interface, header.remote);
    let groups = groups(desired, interface);
    (got, permits(groups, &desired.prefix_lists, direction, &remote_groups, header))
}

#[test]
fn what_was_compiled_permits_what_the_model_permits() {
    let mut random = Random::seeded("permits", 11);
    let devices = imagined_devices();
    let mut loaded = Tables::default();
    let (mut permitted, mut asked) = (0, 0);
    for world in 0..300 {
        let rules_max = random.pick(&[2, 8, 60]);
        let desired = desired(&mut random, rules_max);
        let tables = compile(&desired, &devices, &loaded).unwrap();
        let host = Host::new(tables.clone());
        let (wrong, some) = compare(&mut random, &desired, &host, 120);
        assert_eq!(wrong, 0, "world {world}: {desired:#?}");
        asked += desired.interfaces.len() * 240;
        permitted += some;
        loaded = tables;
    }
    let asked = asked as u64;
    assert!(permitted > asked / 20 && permitted < asked * 19 / 20, "{permitted} of {asked}");
}

#[test]
fn a_rule_left_out_is_noticed() {
    let mut random = Random::seeded("permits, sabotaged", 12);
    let devices = imagined_devices();
    let mut noticed = 0;
    for _ in 0..20 {
        let desired = desired(&mut random, 8);
        let mut tables = compile(&desired, &devices, &Tables::default()).unwrap();
        // The planted fault: the lowest bit of each row is lost.
        for placed in tables.policies.values_mut() {
            std::sync::Arc::make_mut(&mut placed.content)
                .rows
                .iter_mut()
                .for_each(|word| *word &= !1);
        }
        let (wrong, _) = compare(&mut random, &desired, &Host::new(tables), 120);
        noticed += u64::from(wrong > 0);
    }
    assert!(noticed >= 15, "only {noticed} of 20 sabotaged worlds were noticed");
}

#[test]
fn a_thousand_rules_are_the_limit_and_work() {
    use model::{Peer, PortRange, Protocol, Rule};
    let mut random = Random::seeded("limit", 13);
    let mut desired = desired(&mut random, 0);
    while desired.interfaces.is_empty() {
        desired = crate::world::desired(&mut random, 0);
    }
    let rule = |n: u32| Rule {
        id: RuleId::from_random(n.into()),
        protocol: Protocol::Tcp(PortRange::new((n * 2) as u16, (n * 2 + 40) as u16).unwrap()),
        peer: Peer::Cidr(format!("10.{}.{}.0/24", n / 256, n % 256).parse().unwrap()),
    };
    desired.interfaces.truncate(1);
    desired.interfaces[0].groups = vec![desired.groups[0].id];
    desired.interfaces[0].vpc = desired.groups[0].vpc;
    desired.groups[0].ingress = (0..1000).map(rule).collect();
    let devices = imagined_devices();
    let tables = compile(&desired, &devices, &Tables::default()).unwrap();
    let (wrong, _) = compare(&mut random, &desired, &Host::new(tables), 2000);
    assert_eq!(wrong, 0);
    desired.groups[0].ingress.push(rule(1000));
    let refused = compile(&desired, &devices, &Tables::default()).unwrap_err().to_string();
    assert!(refused.contains("1001 ingress rules, but 1000 are the most"), "{refused}");
}
