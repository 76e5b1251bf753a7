//! Network ACLs: what may cross a subnet's border.
//!
//! Entries are asked in the order of their numbers, the first that matches decides, and
//! what none matches is denied (EC2 user guide, "Network ACL basics"). They know no
//! flows: each packet is asked, also an answer. [`NetworkAcl::decide`] is the plain, slow
//! statement of that; what runs in the kernel is checked against it.

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::id::{NetworkAclId, VpcId};
use crate::security_group::{Direction, Header, Protocol};

/// Entries of one direction where nobody asked for more (EC2 quota).
pub const ENTRIES_DEFAULT: usize = 20;
/// Entries of one direction (EC2 quota, at its greatest).
pub const ENTRIES_MAX: usize = 40;
/// The greatest number of an entry.
pub const NUMBER_MAX: u16 = 32_766;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Entry {
    /// From 1 to [`NUMBER_MAX`]; each once in its direction.
    pub number: u16,
    pub direction: Direction,
    pub allow: bool,
    /// Ports are those that the packet is for.
    pub protocol: Protocol,
    /// Of the other end.
    pub net: IpNet,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkAcl {
    pub id: NetworkAclId,
    pub vpc: VpcId,
    #[serde(default)]
    pub entries: Vec<Entry>,
}

impl NetworkAcl {
    /// The entries of a direction in the order in which they are asked.
    pub fn ordered(&self, direction: Direction) -> Vec<&Entry> {
        let mut entries: Vec<&Entry> =
            self.entries.iter().filter(|e| e.direction == direction).collect();
        entries.sort_by_key(|e| e.number);
        entries
    }

    /// The entry that decides on a packet; `None`: none matches, and it is denied.
    pub fn decide(&self, direction: Direction, header: &Header) -> Option<&Entry> {
        let matches = |e: &&Entry| e.net.contains(&header.remote) && e.protocol.matches(header);
        self.ordered(direction).into_iter().find(matches)
    }

    pub fn permits(&self, direction: Direction, header: &Header) -> bool {
        self.decide(direction, header).is_some_and(|e| e.allow)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::security_group::PortRange;

    #[test]
    fn the_lowest_number_that_matches_decides_and_nothing_is_denied_last() {
        let entry = |number, allow, net: &str| Entry {
            number,
            direction: Direction::Ingress,
            allow,
            protocol: Protocol::Tcp(PortRange::single(22)),
            net: net.parse().unwrap(),
        };
        let acl = NetworkAcl {
            id: NetworkAclId::from_random(1),
            vpc: VpcId::from_random(1),
            // In no order.
            entries: vec![
                entry(200, true, "0.0.0.0/0"),
                entry(100, false, "203.0.113.0/24"),
                entry(90, true, "203.0.113.9/32"),
            ],
        };
        let header =
            |remote: &str, detail| Header { remote: remote.parse().unwrap(), protocol: 6, detail };
        let number = |remote: &str, port| {
            acl.decide(Direction::Ingress, &header(remote, port)).map(|e| e.number)
        };
        assert_eq!(number("203.0.113.9", 22), Some(90));
        assert_eq!(number("203.0.113.8", 22), Some(100));
        assert_eq!(number("192.0.2.1", 22), Some(200));
        assert_eq!(number("192.0.2.1", 23), None);
        assert!(!acl.permits(Direction::Ingress, &header("203.0.113.8", 22)));
        assert!(!acl.permits(Direction::Egress, &header("192.0.2.1", 22)));
    }
}
