//! Rules whose flows EC2 does not track: everybody may begin them, and every answer passes.
//!
//! Of TCP and of UDP, in each family by itself: a rule for `0.0.0.0/0` (or `::/0`) where the
//! other direction has one for all ports of it too. They make a policy of their own, which is
//! asked where no flow is known. A group or a prefix list as the other end is not everybody.

use std::collections::BTreeMap;

use ebpf::layout::Interface;
use ipnet::IpNet;
use model::{Direction, Peer, PortRange, Protocol, Rule, RuleId, SecurityGroup};
use rpc::dataplane;

use super::{Compiler, Error, id_number, policy};

const TRANSPORTS: [u8; 2] = [Protocol::TCP, Protocol::UDP];

/// Policies of open rules by the interface's groups: ingress and egress, counted from 1.
pub type Opens = BTreeMap<Vec<model::GroupId>, (u16, u16)>;

impl Compiler<'_> {
    /// Both policies, and the epoch that they have.
    pub(super) fn open(&mut self, i: &dataplane::Interface) -> Result<(u16, u16, u16), Error> {
        let (ingress, egress) = if i.untracked { self.open_policies(i)? } else { (0, 0) };
        let id = id_number(&i.id.digits());
        let before = self.loaded.get(&id).map(|r| (r.open_ingress, r.open_egress, r.epoch));
        let epoch = match before {
            Some((old_ingress, old_egress, epoch))
                if (old_ingress, old_egress) == (ingress, egress) =>
            {
                epoch
            }
            Some((.., epoch)) => later(epoch, self.generation),
            None => self.generation,
        };
        Ok((ingress, egress, epoch))
    }

    fn open_policies(&mut self, i: &dataplane::Interface) -> Result<(u16, u16), Error> {
        if let Some(known) = self.opens.get(&i.groups) {
            return Ok(*known);
        }
        let groups: Vec<&SecurityGroup> =
            i.groups.iter().filter_map(|group| self.groups.get(group).copied()).collect();
        let mut place = |direction| -> Result<u16, Error> {
            let rules = open_rules(&groups, direction);
            if rules.is_empty() {
                return Ok(0);
            }
            let content = policy::of_rules(rules.iter().collect(), &BTreeMap::new(), &[]);
            Ok(self.places.slot(content)? as u16 + 1)
        };
        let both = (place(Direction::Ingress)?, place(Direction::Egress)?);
        self.opens.insert(i.groups.clone(), both);
        Ok(both)
    }
}

/// An epoch after that one: the state's own number where it is later, so that an interface
/// that goes and comes back has none that flows of before have.
fn later(epoch: u16, generation: u16) -> u16 {
    match generation.wrapping_sub(epoch) {
        1..=0x7fff => generation,
        _ => epoch.wrapping_add(1),
    }
}

/// What a compiler remembers of the records that are loaded, by their ids.
pub fn loaded(tables: &super::Tables) -> BTreeMap<u64, &Interface> {
    tables.interfaces.values().map(|record| (record.id, record)).collect()
}

fn open_rules(groups: &[&SecurityGroup], direction: Direction) -> Vec<Rule> {
    let of = |direction| groups.iter().flat_map(move |group| group.rules(direction));
    let other = match direction {
        Direction::Ingress => Direction::Egress,
        Direction::Egress => Direction::Ingress,
    };
    let mut open = Vec::new();
    for everybody in ["0.0.0.0/0", "::/0"].map(|net| net.parse::<IpNet>().expect("a network")) {
        for transport in TRANSPORTS {
            let ports = |rule: &Rule| ports(rule, everybody, transport);
            if !of(other).any(|rule| ports(rule) == Some(PortRange::ALL)) {
                continue;
            }
            open.extend(of(direction).filter_map(ports).map(|ports| {
                let tcp = transport == Protocol::TCP;
                let protocol = if tcp { Protocol::Tcp(ports) } else { Protocol::Udp(ports) };
                Rule { id: RuleId::from_random(0), protocol, peer: Peer::Cidr(everybody) }
            }));
        }
    }
    open
}

/// The ports that the rule opens to everybody.
fn ports(rule: &Rule, everybody: IpNet, transport: u8) -> Option<PortRange> {
    if rule.peer != Peer::Cidr(everybody) {
        return None;
    }
    match rule.protocol {
        Protocol::Any => Some(PortRange::ALL),
        Protocol::Number(number) if number == transport => Some(PortRange::ALL),
        Protocol::Tcp(ports) if transport == Protocol::TCP => Some(ports),
        Protocol::Udp(ports) if transport == Protocol::UDP => Some(ports),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(ingress: &[(&str, Protocol)], egress: &[(&str, Protocol)]) -> SecurityGroup {
        let rules = |rules: &[(&str, Protocol)]| {
            let rule = |(net, protocol): &(&str, Protocol)| Rule {
                id: RuleId::from_random(0),
                protocol: *protocol,
                peer: Peer::Cidr(net.parse().unwrap()),
            };
            rules.iter().map(rule).collect()
        };
        SecurityGroup {
            id: model::GroupId::from_random(1),
            vpc: model::VpcId::from_random(1),
            ingress: rules(ingress),
            egress: rules(egress),
        }
    }

    fn protocols(group: &SecurityGroup, direction: Direction) -> Vec<Protocol> {
        open_rules(&[group], direction).iter().map(|rule| rule.protocol).collect()
    }

    const SSH: Protocol = Protocol::Tcp(PortRange::single(22));
    const ALL_TCP: Protocol = Protocol::Tcp(PortRange::ALL);
    const ALL_UDP: Protocol = Protocol::Udp(PortRange::ALL);

    #[test]
    fn an_epoch_is_never_the_one_before() {
        assert_eq!(later(5, 9), 9);
        assert_eq!((later(5, 5), later(9, 5), later(u16::MAX, u16::MAX)), (6, 10, 0));
    }

    #[test]
    fn a_rule_for_everybody_is_open_where_every_answer_passes() {
        use Direction::{Egress, Ingress};
        let everybody = "0.0.0.0/0";
        let open = group(&[(everybody, SSH)], &[(everybody, Protocol::Any)]);
        assert_eq!(protocols(&open, Ingress), [SSH]);
        assert_eq!(protocols(&open, Egress), [], "not every answer to the instance passes");
        let closed = [
            group(&[("192.0.2.0/24", SSH)], &[(everybody, Protocol::Any)]),
            group(&[(everybody, SSH)], &[("192.0.2.0/24", Protocol::Any)]),
            group(&[(everybody, SSH)], &[("::/0", Protocol::Any)]),
            group(&[(everybody, SSH)], &[(everybody, SSH)]),
            group(&[(everybody, SSH)], &[(everybody, ALL_UDP)]),
            group(
                &[(everybody, Protocol::Icmp { kind: None, code: None })],
                &[(everybody, Protocol::Any)],
            ),
        ];
        for (n, group) in closed.iter().enumerate() {
            assert_eq!(protocols(group, Ingress), [], "{n}");
        }
        let both = group(
            &[(everybody, Protocol::Any)],
            &[(everybody, ALL_TCP), (everybody, Protocol::Number(17))],
        );
        assert_eq!(protocols(&both, Ingress), [ALL_TCP, ALL_UDP]);
        assert_eq!(protocols(&both, Egress), [ALL_TCP, ALL_UDP]);
    }
}
