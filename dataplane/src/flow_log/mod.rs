//! Flow logs: what the programs tallied in an interval, as AWS's version-2 records.
//!
//! ```text
//!  tallies, one way each, as they came in ─▶ a record for each interface concerned ─▶ lines
//! ```
//! Pure but for [`file`]. As AWS has it, the addresses are the interface's private
//! ones, and what guests ask of the host itself is not recorded: DHCP, the metadata
//! service, the time, and DNS to the network's resolver.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf::event::{FOUR, Tally, TallyKey};
use ebpf::layout::{Interface, LocalKey};
use ipnet::Ipv6Net;
use model::InterfaceId;
use rpc::dataplane::FlowLogFormat;
use serde_json::json;

use crate::compile::Tables;
use crate::observe::Directory;

pub mod file;

/// `fd00:ec2::/32`, where EC2 has its services over IPv6.
const SERVICES6: Ipv6Net = Ipv6Net::new_assert(Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0), 32);

/// What a record is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    interface: InterfaceId,
    source: IpAddr,
    destination: IpAddr,
    source_port: u16,
    destination_port: u16,
    protocol: u8,
    accepted: bool,
}

/// An interval, in seconds since 1970.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interval {
    pub start: u64,
    pub end: u64,
    /// When the monotonic clock began.
    pub boot: u64,
    /// Whether some packets found no place in the tallies.
    pub skipped: bool,
}

/// The interval's records, a line each.
pub fn records(
    directory: &Directory,
    tallies: &[(TallyKey, Tally)],
    interval: Interval,
    format: FlowLogFormat,
    account: &str,
) -> Vec<String> {
    let mut sums: BTreeMap<Key, Tally> = BTreeMap::new();
    for (key, tally) in tallies {
        for record in concerned(directory, key) {
            let sum = sums.entry(record).or_insert(Tally { packets: 0, bytes: 0, ..*tally });
            sum.packets += tally.packets;
            sum.bytes += tally.bytes;
            sum.first_s = sum.first_s.min(tally.first_s);
            sum.last_s = sum.last_s.max(tally.last_s);
        }
    }
    let write = Writer { interval, format, account };
    let with_data: BTreeSet<InterfaceId> = sums.keys().map(|key| key.interface).collect();
    let mut lines: Vec<String> = sums.iter().map(|(key, sum)| write.record(key, sum)).collect();
    for id in directory.tables().names.interfaces.values() {
        match (with_data.contains(id), interval.skipped) {
            (false, false) => lines.push(write.nothing(*id, "NODATA")),
            (_, true) => lines.push(write.nothing(*id, "SKIPDATA")),
            (true, false) => {}
        }
    }
    lines
}

/// An end of a packet, as it stood there.
fn address(tally: &TallyKey, bytes: [u8; 16]) -> IpAddr {
    let [a, b, c, d, ..] = bytes;
    if tally.family == FOUR { [a, b, c, d].into() } else { bytes.into() }
}

/// The records that a tally counts for: its sender's, its receiver's, or both.
fn concerned(directory: &Directory, tally: &TallyKey) -> Vec<Key> {
    let mut keys = Vec::new();
    let accepted = tally.accepted == 1;
    let sender = directory.by_ifindex(tally.ifindex);
    let receiver = match sender {
        Some(_) => directory.by_slot(tally.slots[1]),
        None => directory.by_slot(tally.slots[0]),
    };
    let ends = [tally.source, tally.destination].map(|end| address(tally, end));
    let key = |interface, [source, destination]: [IpAddr; 2], accepted| Key {
        interface,
        source,
        destination,
        source_port: tally.source_port,
        destination_port: tally.destination_port,
        protocol: tally.protocol,
        accepted,
    };
    if let Some((id, interface)) = sender {
        if of_the_host(interface, ends[1], tally) {
            return keys;
        }
        // Refused at the receiver's: it left here.
        keys.push(key(id, ends, accepted || receiver.is_some()));
    }
    if let Some((id, interface)) = receiver {
        let sender = sender.map(|(_, sender)| sender);
        let seen = match ends {
            [IpAddr::V4(source), IpAddr::V4(destination)] => {
                let seen = inside(directory.tables(), sender, interface, [source, destination]);
                seen.map(IpAddr::V4)
            }
            ends => ends,
        };
        // The responder's answers come out of the punt device, from these.
        if !of_the_host(interface, seen[0], tally) {
            keys.push(key(id, seen, accepted));
        }
    }
    keys
}

/// The ends of a packet as its receiver knows them: IPv4 is translated on the way.
fn inside(
    tables: &Tables,
    sender: Option<&Interface>,
    receiver: &Interface,
    [source, destination]: [Ipv4Addr; 2],
) -> [Ipv4Addr; 2] {
    let Some(elastic) = tables.elastics.get(&destination.into()) else {
        return [source, destination];
    };
    let own = match elastic.nat {
        0 if elastic.interface.id != receiver.id => return [source, destination],
        0 => elastic.address,
        _ => receiver.address,
    };
    let source = sender.map_or(source, |sender| stands_for(tables, sender, source, destination));
    [source, own.into()]
}

/// A sender's private address as the world sees it: its elastic one, or a NAT gateway's.
fn stands_for(tables: &Tables, sender: &Interface, own: Ipv4Addr, to: Ipv4Addr) -> Ipv4Addr {
    if let Some(by) = tables.translated(sender.ifindex, to.into(), 0) {
        return by.address;
    }
    let key = LocalKey { vpc: sender.vpc, address: own.into(), zero: 0 };
    let elastic = tables.locals.get(&key).map(|l| l.elastic).filter(|elastic| *elastic != 0);
    elastic.map_or(own, Into::into)
}

/// Whether it is between a guest and the host's own services.
fn of_the_host(interface: &Interface, other: IpAddr, tally: &TallyKey) -> bool {
    const UDP: u8 = 17;
    let ports = [tally.source_port, tally.destination_port];
    let dhcp = tally.protocol == UDP && ports.iter().all(|p| matches!(p, 67 | 68 | 546 | 547));
    dhcp || match other {
        IpAddr::V4(other) => {
            let other = u32::from(other);
            let dns = ports.contains(&53)
                && (other == ebpf::DNS_ADDRESS || other == interface.subnet + 2);
            let router = other == interface.subnet + 1;
            dns || router || other == ebpf::METADATA_ADDRESS || other == ebpf::TIME_ADDRESS
        }
        IpAddr::V6(other) => is_link(other) || SERVICES6.contains(&other),
    }
}

/// Of the link itself: neighbours, routers and who listens to which group, which are to IPv6
/// what ARP is to IPv4.
fn is_link(address: Ipv6Addr) -> bool {
    address.is_unicast_link_local() || address.is_multicast() || address.is_unspecified()
}

struct Writer<'a> {
    interval: Interval,
    format: FlowLogFormat,
    account: &'a str,
}

impl Writer<'_> {
    fn record(&self, key: &Key, sum: &Tally) -> String {
        let start = (self.interval.boot + u64::from(sum.first_s)).max(self.interval.start);
        let end =
            (self.interval.boot + u64::from(sum.last_s)).clamp(start, self.interval.end.max(start));
        let action = if key.accepted { "ACCEPT" } else { "REJECT" };
        let Key { interface, source, destination, source_port, destination_port, protocol, .. } =
            key;
        let Tally { packets, bytes, .. } = sum;
        let account = self.account;
        match self.format {
            FlowLogFormat::Aws => format!(
                "2 {account} {interface} {source} {destination} {source_port} {destination_port} \
                 {protocol} {packets} {bytes} {start} {end} {action} OK"
            ),
            FlowLogFormat::Json => json!({
                "version": 2, "account-id": account, "interface-id": interface.to_string(),
                "srcaddr": source, "dstaddr": destination, "srcport": source_port,
                "dstport": destination_port, "protocol": protocol, "packets": packets,
                "bytes": bytes, "start": start, "end": end, "action": action, "log-status": "OK",
            })
            .to_string(),
        }
    }

    fn nothing(&self, interface: InterfaceId, status: &str) -> String {
        let Interval { start, end, .. } = self.interval;
        let account = self.account;
        match self.format {
            FlowLogFormat::Aws => {
                let mut line = format!("2 {account} {interface} - - - - - - - ");
                _ = write!(line, "{start} {end} - {status}");
                line
            }
            FlowLogFormat::Json => json!({
                "version": 2, "account-id": account, "interface-id": interface.to_string(),
                "start": start, "end": end, "log-status": status,
            })
            .to_string(),
        }
    }
}

#[cfg(test)]
#[path = "records_tests.rs"]
mod tests;
