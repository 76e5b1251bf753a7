//! Security groups, and what they permit.
//!
//! A group holds allow rules only. An interface has one to sixteen groups, and
//! a new flow is permitted when any rule of any of them matches (EC2 user
//! guide, "Security group rules"). [`permits`] is the plain, slow statement of
//! that sentence; what runs in the kernel is checked against it.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::id::{GroupId, PrefixListId, RuleId, VpcId};
use crate::prefix_list::PrefixList;

/// Groups an interface may have (EC2 quota, at its greatest).
pub const GROUPS_AN_INTERFACE_MAX: usize = 16;

/// Rules an interface may be subject to, over all its groups and one direction
/// (EC2 quota "rules per security group x groups per interface").
pub const RULES_AN_INTERFACE_MAX: usize = 1000;

/// How many rules a group may have, and how many groups an interface (EC2 quotas, which
/// one may have raised as long as their product is at most 1000).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct RuleLimits {
    /// In one direction and of one address family.
    pub rules_a_group: u32,
    pub groups_an_interface: u32,
}

impl Default for RuleLimits {
    fn default() -> Self {
        Self { rules_a_group: 60, groups_an_interface: 5 }
    }
}

impl RuleLimits {
    /// Why nobody can have these limits, if so.
    pub fn refused(self) -> Option<String> {
        let Self { rules_a_group: rules, groups_an_interface: groups } = self;
        if rules == 0 || !(1..=GROUPS_AN_INTERFACE_MAX as u32).contains(&groups) {
            return Some(format!(
                "{rules} rules a group and {groups} groups an interface; give at least 1 rule, \
                 and 1 to {GROUPS_AN_INTERFACE_MAX} groups"
            ));
        }
        let product = u64::from(rules) * u64::from(groups);
        (product > RULES_AN_INTERFACE_MAX as u64).then(|| {
            format!(
                "{rules} rules a group x {groups} groups an interface are {product}, but \
                 {RULES_AN_INTERFACE_MAX} are the most: lower one of them"
            )
        })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Direction {
    /// Towards the instance.
    Ingress,
    /// From the instance.
    Egress,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// Destination ports from `first` to `last`, both included; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u16, u16)", into = "(u16, u16)")]
pub struct PortRange {
    first: u16,
    last: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the port range {first}-{last} is empty: its first port is above its last")]
pub struct EmptyPortRange {
    pub first: u16,
    pub last: u16,
}

impl PortRange {
    pub const ALL: Self = Self { first: 0, last: u16::MAX };

    pub const fn new(first: u16, last: u16) -> Result<Self, EmptyPortRange> {
        if first > last { Err(EmptyPortRange { first, last }) } else { Ok(Self { first, last }) }
    }

    pub const fn single(port: u16) -> Self {
        Self { first: port, last: port }
    }

    pub const fn first(self) -> u16 {
        self.first
    }

    pub const fn last(self) -> u16 {
        self.last
    }

    pub const fn contains(self, port: u16) -> bool {
        self.first <= port && port <= self.last
    }
}

impl TryFrom<(u16, u16)> for PortRange {
    type Error = EmptyPortRange;

    fn try_from((first, last): (u16, u16)) -> Result<Self, EmptyPortRange> {
        Self::new(first, last)
    }
}

impl From<PortRange> for (u16, u16) {
    fn from(range: PortRange) -> Self {
        (range.first, range.last)
    }
}

/// What a rule says of a packet's protocol. Numbers are IANA's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Protocol {
    Any,
    Tcp(PortRange),
    Udp(PortRange),
    /// `None` stands for every type, or every code of the type.
    Icmp {
        kind: Option<u8>,
        code: Option<u8>,
    },
    Icmpv6 {
        kind: Option<u8>,
        code: Option<u8>,
    },
    /// Any other protocol, by number.
    Number(u8),
}

impl Protocol {
    pub const TCP: u8 = 6;
    pub const UDP: u8 = 17;
    pub const ICMP: u8 = 1;
    pub const ICMPV6: u8 = 58;

    pub(crate) fn matches(self, header: &Header) -> bool {
        let icmp = |number, kind: Option<u8>, code: Option<u8>| {
            let [packet_kind, packet_code] = header.detail.to_be_bytes();
            header.protocol == number
                && kind.is_none_or(|k| k == packet_kind && code.is_none_or(|c| c == packet_code))
        };
        match self {
            Self::Any => true,
            Self::Tcp(ports) => header.protocol == Self::TCP && ports.contains(header.detail),
            Self::Udp(ports) => header.protocol == Self::UDP && ports.contains(header.detail),
            Self::Icmp { kind, code } => icmp(Self::ICMP, kind, code),
            Self::Icmpv6 { kind, code } => icmp(Self::ICMPV6, kind, code),
            Self::Number(number) => header.protocol == number,
        }
    }
}

/// The other end of the flow: its source for ingress, its destination for egress.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    Cidr(IpNet),
    /// Every interface of that group, by its private address.
    Group(GroupId),
    /// Whatever the list has.
    PrefixList(PrefixListId),
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Rule {
    pub id: RuleId,
    pub protocol: Protocol,
    pub peer: Peer,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecurityGroup {
    pub id: GroupId,
    pub vpc: VpcId,
    pub ingress: Vec<Rule>,
    pub egress: Vec<Rule>,
}

impl Rule {
    /// What it counts as among a group's rules, of IPv4 and of IPv6. A list counts as all
    /// that it has room for, and one that is still empty in both.
    pub fn weight(&self, lists: &[PrefixList]) -> [u32; 2] {
        match self.peer {
            Peer::Cidr(IpNet::V4(_)) => [1, 0],
            Peer::Cidr(IpNet::V6(_)) => [0, 1],
            Peer::Group(_) => [1, 1],
            Peer::PrefixList(id) => match lists.iter().find(|l| l.id == id) {
                None => [0, 0],
                Some(list) => match list.is_six() {
                    Some(false) => [list.entries_max, 0],
                    Some(true) => [0, list.entries_max],
                    None => [list.entries_max; 2],
                },
            },
        }
    }
}

impl SecurityGroup {
    pub fn rules(&self, direction: Direction) -> &[Rule] {
        match direction {
            Direction::Ingress => &self.ingress,
            Direction::Egress => &self.egress,
        }
    }
}

/// What a rule can see of the first packet of a flow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// The address of the other end.
    pub remote: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port; for ICMP the type in the high byte and the code in the low.
    pub detail: u16,
}

/// The first rule of `groups` that permits a new flow, or `None` where none does.
///
/// `remote_groups` are the groups of the interface that owns the remote address
/// in the same VPC; empty where no interface does.
pub fn permits<'a>(
    groups: impl IntoIterator<Item = &'a SecurityGroup>,
    lists: &[PrefixList],
    direction: Direction,
    remote_groups: &BTreeSet<GroupId>,
    header: &Header,
) -> Option<RuleId> {
    let peer_matches = |peer: &Peer| match peer {
        Peer::Cidr(net) => net.contains(&header.remote),
        Peer::Group(group) => remote_groups.contains(group),
        Peer::PrefixList(id) => lists.iter().any(|l| l.id == *id && l.contains(header.remote)),
    };
    groups
        .into_iter()
        .flat_map(|g| g.rules(direction))
        .find(|rule| rule.protocol.matches(header) && peer_matches(&rule.peer))
        .map(|rule| rule.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(peer: Peer, protocol: Protocol) -> SecurityGroup {
        let rule = Rule { id: RuleId::from_random(7), protocol, peer };
        SecurityGroup {
            id: GroupId::from_random(1),
            vpc: VpcId::from_random(1),
            ingress: vec![rule],
            egress: vec![],
        }
    }

    fn header(remote: &str, protocol: u8, detail: u16) -> Header {
        Header { remote: remote.parse().unwrap(), protocol, detail }
    }

    #[test]
    fn ssh_from_one_network_is_all_that_its_rule_permits() {
        let ssh = group(
            Peer::Cidr("203.0.113.0/24".parse().unwrap()),
            Protocol::Tcp(PortRange::single(22)),
        );
        let permitted = |h: Header| permits([&ssh], &[], Direction::Ingress, &BTreeSet::new(), &h);
        assert_eq!(permitted(header("203.0.113.9", 6, 22)), Some(RuleId::from_random(7)));
        assert_eq!(permitted(header("203.0.114.9", 6, 22)), None);
        assert_eq!(permitted(header("203.0.113.9", 6, 23)), None);
        assert_eq!(permitted(header("203.0.113.9", 17, 22)), None);
        assert_eq!(
            permits(
                [&ssh],
                &[],
                Direction::Egress,
                &BTreeSet::new(),
                &header("203.0.113.9", 6, 22)
            ),
            None
        );
    }

    #[test]
    fn a_group_as_source_asks_for_membership_not_for_the_address() {
        let peers = group(Peer::Group(GroupId::from_random(1)), Protocol::Any);
        let own = BTreeSet::from([GroupId::from_random(1)]);
        let h = header("10.0.0.9", 6, 80);
        assert!(permits([&peers], &[], Direction::Ingress, &own, &h).is_some());
        assert!(permits([&peers], &[], Direction::Ingress, &BTreeSet::new(), &h).is_none());
    }

    #[test]
    fn an_icmp_rule_narrows_by_type_and_code() {
        let echo = group(
            Peer::Cidr("0.0.0.0/0".parse().unwrap()),
            Protocol::Icmp { kind: Some(8), code: None },
        );
        let permitted = |kind: u16| {
            permits(
                [&echo],
                &[],
                Direction::Ingress,
                &BTreeSet::new(),
                &header("192.0.2.1", 1, kind << 8),
            )
        };
        assert!(permitted(8).is_some());
        assert!(permitted(13).is_none());
    }

    #[test]
    fn a_prefix_list_permits_what_it_has_and_counts_as_what_it_has_room_for() {
        let net = "192.0.2.0/24".parse().unwrap();
        let id = PrefixListId::from_random(5);
        let entry = crate::ListEntry { net, description: "office".into() };
        let mut list = PrefixList { id, version: 1, entries_max: 20, entries: vec![entry] };
        let office = group(Peer::PrefixList(id), Protocol::Any);
        let permitted = |lists: &[PrefixList], remote| {
            let h = header(remote, 6, 22);
            permits([&office], lists, Direction::Ingress, &BTreeSet::new(), &h).is_some()
        };
        let lists = [list.clone()];
        assert!(permitted(&lists, "192.0.2.9") && !permitted(&lists, "192.0.3.9"));
        assert!(!permitted(&[], "192.0.2.9"));
        assert_eq!(office.ingress[0].weight(&lists), [20, 0]);
        list.entries.clear();
        assert_eq!(office.ingress[0].weight(&[list]), [20, 20]);
    }

    #[test]
    fn limits_beyond_a_thousand_rules_an_interface_are_refused() {
        let refused = |rules_a_group, groups_an_interface| {
            RuleLimits { rules_a_group, groups_an_interface }.refused()
        };
        assert_eq!(RuleLimits::default().refused(), None);
        for (rules, groups) in [(60, 16), (62, 16), (1000, 1), (1, 1)] {
            assert_eq!(refused(rules, groups), None);
        }
        for (rules, groups) in [(63, 16), (1001, 1), (0, 5), (60, 17), (60, 0)] {
            assert!(refused(rules, groups).is_some(), "{rules} x {groups}");
        }
    }

    #[test]
    fn an_empty_port_range_cannot_be_made_nor_read() {
        assert!(PortRange::new(2, 1).is_err());
        assert!(serde_json::from_str::<PortRange>("[2,1]").is_err());
    }
}
