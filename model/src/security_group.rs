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

use crate::id::{GroupId, RuleId, VpcId};

/// Groups an interface may have (EC2 quota, at its greatest).
pub const GROUPS_AN_INTERFACE_MAX: usize = 16;

/// Rules an interface may be subject to, over all its groups and one direction
/// (EC2 quota "rules per security group x groups per interface").
pub const RULES_AN_INTERFACE_MAX: usize = 1000;

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
    direction: Direction,
    remote_groups: &BTreeSet<GroupId>,
    header: &Header,
) -> Option<RuleId> {
    let peer_matches = |peer: &Peer| match peer {
        Peer::Cidr(net) => net.contains(&header.remote),
        Peer::Group(group) => remote_groups.contains(group),
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
        let permitted = |h: Header| permits([&ssh], Direction::Ingress, &BTreeSet::new(), &h);
        assert_eq!(permitted(header("203.0.113.9", 6, 22)), Some(RuleId::from_random(7)));
        assert_eq!(permitted(header("203.0.114.9", 6, 22)), None);
        assert_eq!(permitted(header("203.0.113.9", 6, 23)), None);
        assert_eq!(permitted(header("203.0.113.9", 17, 22)), None);
        assert_eq!(
            permits([&ssh], Direction::Egress, &BTreeSet::new(), &header("203.0.113.9", 6, 22)),
            None
        );
    }

    #[test]
    fn a_group_as_source_asks_for_membership_not_for_the_address() {
        let peers = group(Peer::Group(GroupId::from_random(1)), Protocol::Any);
        let own = BTreeSet::from([GroupId::from_random(1)]);
        let h = header("10.0.0.9", 6, 80);
        assert!(permits([&peers], Direction::Ingress, &own, &h).is_some());
        assert!(permits([&peers], Direction::Ingress, &BTreeSet::new(), &h).is_none());
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
                Direction::Ingress,
                &BTreeSet::new(),
                &header("192.0.2.1", 1, kind << 8),
            )
        };
        assert!(permitted(8).is_some());
        assert!(permitted(13).is_none());
    }

    #[test]
    fn an_empty_port_range_cannot_be_made_nor_read() {
        assert!(PortRange::new(2, 1).is_err());
        assert!(serde_json::from_str::<PortRange>("[2,1]").is_err());
    }
}
