//! What every contender must do: instances behind elastic addresses, and the
//! rules that let packets in. Pure; the contenders say it in their own tongue.

use std::net::Ipv4Addr;

/// EC2's greatest number of rules for one interface (`model::security_group`).
pub const RULES_AN_INSTANCE_MAX: usize = 1000;

/// The port that the measured flows go to.
pub const PORT: u16 = 5201;

/// Where the measured flows come from: a /16, as the last rule permits it.
pub const SOURCES: Network = Network { address: Ipv4Addr::new(198, 18, 0, 0), prefix: 16 };

/// The addresses of both ends of the uplink.
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
pub const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Network {
    pub address: Ipv4Addr,
    pub prefix: u8,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
}

/// Lets packets of `protocol` from `peer` to `port` in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rule {
    pub peer: Network,
    pub protocol: Protocol,
    pub port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub address: Ipv4Addr,
    pub elastic: Ipv4Addr,
    pub mac: [u8; 6],
    /// The name of its device in the router.
    pub device: String,
    pub rules: Vec<Rule>,
}

/// The first instance is the one that packets are sent to; the others are there
/// for their rules.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct World {
    pub instances: Vec<Instance>,
}

impl World {
    /// As few instances as can have `rules` rules between them.
    pub fn with_rules(rules: usize) -> Self {
        let count = rules.div_ceil(RULES_AN_INSTANCE_MAX).max(1);
        let share = |index: usize| (rules + index) / count;
        Self { instances: (0..count).map(|index| Instance::new(index, share(index))).collect() }
    }

    /// So many instances, each with a thousand rules that all of them share.
    pub fn sharing(count: usize) -> Self {
        let mut instances: Vec<Instance> = (0..count)
            .map(|index| {
                let [_, _, high, low] = (index as u32 + 10).to_be_bytes();
                Instance {
                    address: Ipv4Addr::new(10, 0, high, low),
                    elastic: Ipv4Addr::new(203, 0, 113 + high, low),
                    mac: [0x02, 0x62, 0x65, 0x00, high, low],
                    device: format!("tap{index}"),
                    rules: Vec::new(),
                }
            })
            .collect();
        let rules = RULES_AN_INSTANCE_MAX;
        instances[0].rules = (0..rules).map(|i| Rule::new(0, i, i + 1 == rules)).collect();
        Self { instances }
    }

    pub fn measured(&self) -> &Instance {
        &self.instances[0]
    }
}

impl Instance {
    fn new(index: usize, rules: usize) -> Self {
        let low = u8::try_from(10 + index).expect("at most 245 instances: 245 000 rules");
        Self {
            address: Ipv4Addr::new(10, 0, 0, low),
            elastic: Ipv4Addr::new(203, 0, 113, low),
            mac: [0x02, 0x62, 0x65, 0x00, 0x00, low],
            device: format!("tap{index}"),
            rules: (0..rules).map(|rule| Rule::new(index, rule, rule + 1 == rules)).collect(),
        }
    }
}

impl Rule {
    /// Rules of many networks and ports, as a grown group has them, other ones for each
    /// instance; only the last one permits the measured flows, so that order is no help
    /// to anyone.
    fn new(instance: usize, index: usize, last: bool) -> Self {
        if last {
            return Self { peer: SOURCES, protocol: Protocol::Udp, port: PORT };
        }
        let [_, _, high, low] = (index as u32).to_be_bytes();
        let (first, second) = (100 + (instance % 90) as u8, 64 + 4 * (instance / 90) as u8);
        Self {
            peer: Network { address: Ipv4Addr::new(first, second + high, low, 0), prefix: 24 },
            protocol: if index.is_multiple_of(2) { Protocol::Tcp } else { Protocol::Udp },
            port: 1000 + (index % 4000) as u16,
        }
    }
}

impl std::fmt::Display for Network {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

impl std::fmt::Display for Protocol {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// As `02:62:65:00:00:0a`.
pub fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_are_as_many_as_asked_for_and_no_instance_has_too_many() {
        for rules in [1, 10, 1000, 1001, 2500, 10_000] {
            let world = World::with_rules(rules);
            let counts: Vec<usize> = world.instances.iter().map(|i| i.rules.len()).collect();
            assert_eq!(counts.iter().sum::<usize>(), rules);
            assert!(counts.iter().all(|&c| (1..=RULES_AN_INSTANCE_MAX).contains(&c)), "{counts:?}");
        }
    }

    #[test]
    fn only_the_last_rule_permits_the_measured_flows() {
        let world = World::with_rules(1000);
        let permits = |rule: &Rule| rule.peer == SOURCES && rule.port == PORT;
        let rules = &world.measured().rules;
        assert!(permits(&rules[999]));
        assert!(!rules[..999].iter().any(permits));
    }

    #[test]
    fn no_two_rules_of_an_instance_are_the_same() {
        let rules = &World::with_rules(1000).instances[0].rules;
        for (i, rule) in rules.iter().enumerate() {
            assert!(!rules[..i].contains(rule), "{rule:?}");
        }
    }
}
