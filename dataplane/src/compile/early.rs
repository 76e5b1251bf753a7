//! What is dropped on the uplink before anything is spent on it: the blocklist, bogons, and
//! what is for nobody in ranges that are ours.

use std::net::IpAddr;

use ebpf::layout::{Config, PREFIXES_MAX, Prefix, Prefix6, RANGES_EARLY, RANGES_LATE};
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rpc::dataplane::Desired;

use super::{Devices, Error, Tables, limit};

/// Sources that cannot be in the internet: what IANA's registries of special addresses have
/// as not globally reachable (RFC 6890), the documentation's networks among them, and the
/// prefixes that are for nobody any more.
const BOGONS: [&str; 22] = [
    "0.0.0.0/8",
    "10.0.0.0/8",
    "100.64.0.0/10",
    "127.0.0.0/8",
    "169.254.0.0/16",
    "172.16.0.0/12",
    "192.0.0.0/24",
    "192.0.2.0/24",
    "192.168.0.0/16",
    "198.18.0.0/15",
    "198.51.100.0/24",
    "203.0.113.0/24",
    "224.0.0.0/3",
    // Unspecified, loopback, and IPv4 in disguise (RFC 4291, 2.5.5).
    "::/96",
    "::ffff:0:0/96",
    // Discard only (RFC 6666), benchmarks (RFC 5180), ORCHID (RFC 4843).
    "100::/64",
    "2001:2::/48",
    "2001:10::/28",
    // Documentation (RFC 3849, RFC 9637).
    "2001:db8::/32",
    "3fff::/20",
    // Unique local (RFC 4193); site-local, which is no more (RFC 3879).
    "fc00::/7",
    "fec0::/10",
];

pub fn add(desired: &Desired, devices: &Devices, tables: &mut Tables) -> Result<(), Error> {
    for net in desired.blocklist.iter().copied().chain(bogons(desired, devices)) {
        match net {
            IpNet::V4(net) => _ = tables.blocked.insert(prefix(net)),
            IpNet::V6(net) => _ = tables.blocked6.insert(prefix6(net)),
        }
    }
    for net in &desired.elastic_ranges {
        match net {
            IpNet::V4(net) => _ = tables.ranges.insert(prefix(*net), 1),
            IpNet::V6(net) => _ = tables.ranges6.insert(prefix6(*net), 1),
        }
    }
    let has = (!tables.ranges.is_empty(), !tables.ranges6.is_empty());
    for address in &devices.host_addresses {
        match IpNet::from(*address) {
            IpNet::V4(own) if has.0 => _ = tables.ranges.insert(prefix(own), 0),
            IpNet::V6(own) if has.1 => _ = tables.ranges6.insert(prefix6(own), 0),
            _ => {}
        }
    }
    limit("blocked prefixes", tables.blocked.len(), PREFIXES_MAX)?;
    limit("blocked IPv6 prefixes", tables.blocked6.len(), PREFIXES_MAX)?;
    limit("elastic ranges", tables.ranges.len(), PREFIXES_MAX)?;
    limit("elastic IPv6 ranges", tables.ranges6.len(), PREFIXES_MAX)?;
    tables.config.blocked = u32::from(!tables.blocked.is_empty());
    tables.config.blocked6 = u32::from(!tables.blocked6.is_empty());
    tables.config.ranges = if tables.ranges.is_empty() { 0 } else { RANGES_EARLY };
    tables.config.ranges6 = if tables.ranges6.is_empty() { 0 } else { RANGES_EARLY };
    Ok(())
}

/// Nothing of the uplink's is by XDP: tc's program looks into the ranges.
pub fn late(config: &mut Config) {
    for ranges in [&mut config.ranges, &mut config.ranges6] {
        *ranges = if *ranges == 0 { 0 } else { RANGES_LATE };
    }
}

fn bogons(desired: &Desired, devices: &Devices) -> Vec<IpNet> {
    let Some(uplink) = desired.uplink.as_ref().filter(|uplink| uplink.bogons) else {
        return Vec::new();
    };
    let gateways = [Some(IpAddr::from(uplink.gateway)), uplink.gateway6.map(IpAddr::from)];
    // A host in a private network talks to its neighbours. Every host has a loopback address,
    // and nobody on the uplink has one.
    let near = |net: &IpNet| {
        let own = devices.host_addresses.iter().filter(|address| !address.is_loopback());
        gateways.iter().flatten().chain(own).any(|address| net.contains(address))
    };
    BOGONS.iter().filter_map(|net| net.parse().ok()).filter(|net| !near(net)).collect()
}

fn prefix(net: Ipv4Net) -> Prefix {
    Prefix { length: net.prefix_len().into(), address: net.network().octets() }
}

fn prefix6(net: Ipv6Net) -> Prefix6 {
    Prefix6 { length: net.prefix_len().into(), address: net.network().octets() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bogons_leave_out_the_networks_of_the_gateway_and_the_host() {
        let mut desired = Desired::default();
        let own = ["192.168.3.4", "127.0.0.1", "::1", "fe80::1", "2001:db8::4"];
        let own: Vec<IpAddr> = own.iter().map(|a| a.parse().unwrap()).collect();
        let devices = Devices { host_addresses: own, ..Devices::default() };
        assert!(bogons(&desired, &devices).is_empty());
        desired.uplink = Some(rpc::dataplane::Uplink {
            device: "up0".into(),
            gateway: [10, 9, 9, 1].into(),
            gateway6: Some("fd00::1".parse().unwrap()),
            early_drop: None,
            bogons: true,
            source_packets: None,
            fast_path: Default::default(),
        });
        let nets = bogons(&desired, &devices);
        let has = |text: &str| nets.contains(&text.parse().unwrap());
        assert_eq!(nets.len(), BOGONS.len() - 4);
        assert!(has("172.16.0.0/12") && has("224.0.0.0/3") && has("127.0.0.0/8") && has("::/96"));
        assert!(!has("10.0.0.0/8") && !has("192.168.0.0/16"));
        assert!(!has("fc00::/7") && !has("2001:db8::/32"));
    }

    #[test]
    fn the_hosts_own_addresses_are_no_strangers_in_a_range_of_their_family() {
        let own = vec!["203.0.113.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let devices = Devices { host_addresses: own, ..Devices::default() };
        let ranges = vec!["2001:db8::/64".parse().unwrap()];
        let desired = Desired { elastic_ranges: ranges, ..Desired::default() };
        let mut tables = Tables::default();
        add(&desired, &devices, &mut tables).unwrap();
        let kinds: Vec<(u32, u32)> = tables.ranges6.iter().map(|(p, k)| (p.length, *k)).collect();
        assert_eq!(kinds, [(64, 1), (128, 0)]);
        assert!(tables.ranges.is_empty());
        assert_eq!((tables.config.ranges, tables.config.ranges6), (0, RANGES_EARLY));
        late(&mut tables.config);
        assert_eq!((tables.config.ranges, tables.config.ranges6), (0, RANGES_LATE));
    }
}
