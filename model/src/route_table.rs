//! Route tables: where a packet that leaves its subnet goes.
//!
//! The most specific route that contains the destination decides (EC2 user guide,
//! "How route tables work"). [`RouteTable::route`] is the plain, slow statement of that
//! sentence; what runs in the kernel is checked against it.

use std::fmt;
use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::id::{InterfaceId, NatGatewayId, RouteTableId, VpcId};

/// Routes a table has where nobody asked for more (EC2 quota), those to `local` aside.
pub const ROUTES_A_TABLE_DEFAULT: usize = 50;
/// Routes a table may have, each family by itself (EC2 quota, at its greatest).
pub const ROUTES_A_TABLE_MAX: usize = 1000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Target {
    /// Out by the uplink, with the interface's elastic address or its IPv6 one.
    InternetGateway,
    NatGateway(NatGatewayId),
    /// An appliance's interface.
    Interface(InterfaceId),
    /// Nowhere.
    Blackhole,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InternetGateway => f.write_str("internet"),
            Self::NatGateway(id) => id.fmt(f),
            Self::Interface(id) => id.fmt(f),
            Self::Blackhole => f.write_str("blackhole"),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Route {
    pub destination: IpNet,
    pub target: Target,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouteTable {
    pub id: RouteTableId,
    pub vpc: VpcId,
    /// The network's own prefixes. They are always there, and no route replaces one.
    pub local: Vec<IpNet>,
    #[serde(default)]
    pub routes: Vec<Route>,
}

/// What a table says of a destination, and by which prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// To whoever has the address in the network.
    Local(IpNet),
    Route(Route),
}

impl RouteTable {
    /// The longest prefix that contains `destination`; `None`: there is no route.
    pub fn route(&self, destination: IpAddr) -> Option<Way> {
        let local = self.local.iter().map(|net| (net.trunc(), Way::Local(net.trunc())));
        let routes = self.routes.iter().map(|route| {
            let destination = route.destination.trunc();
            (destination, Way::Route(Route { destination, ..*route }))
        });
        local
            .chain(routes)
            .filter(|(net, _)| net.contains(&destination))
            .max_by_key(|(net, _)| net.prefix_len())
            .map(|(_, way)| way)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> RouteTable {
        let route = |net: &str, target| Route { destination: net.parse().unwrap(), target };
        RouteTable {
            id: RouteTableId::from_random(1),
            vpc: VpcId::from_random(1),
            local: vec!["10.0.0.0/16".parse().unwrap(), "2001:db8:1::/56".parse().unwrap()],
            routes: vec![
                route("0.0.0.0/0", Target::InternetGateway),
                route("10.0.2.0/24", Target::Interface(InterfaceId::from_random(7))),
                route("203.0.113.0/24", Target::Blackhole),
            ],
        }
    }

    #[test]
    fn the_most_specific_route_decides_even_within_the_network() {
        let way = |to: &str| match table().route(to.parse().unwrap()) {
            Some(Way::Local(net)) => format!("local {net}"),
            Some(Way::Route(r)) => format!("{} {}", r.target, r.destination),
            None => "none".into(),
        };
        assert_eq!(way("10.0.1.9"), "local 10.0.0.0/16");
        assert_eq!(way("10.0.2.9"), "eni-00000000000000007 10.0.2.0/24");
        assert_eq!(way("8.8.8.8"), "internet 0.0.0.0/0");
        assert_eq!(way("203.0.113.200"), "blackhole 203.0.113.0/24");
        assert_eq!(way("2001:db8:1::7"), "local 2001:db8:1::/56");
        assert_eq!(way("2600::1"), "none");
    }
}
