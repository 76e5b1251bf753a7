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
use std::net::Ipv4Addr;

use ebpf::event::{Tally, TallyKey};
use ebpf::layout::{Interface, LocalKey};
use model::InterfaceId;
use rpc::dataplane::FlowLogFormat;
use serde_json::json;

use crate::compile::Tables;
use crate::observe::Directory;

pub mod file;

const RESOLVER: u32 = u32::from_be_bytes([169, 254, 169, 253]);
const TIME: u32 = u32::from_be_bytes([169, 254, 169, 123]);

/// What a record is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    interface: InterfaceId,
    source: u32,
    destination: u32,
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

/// The records that a tally counts for: its sender's, its receiver's, or both.
fn concerned(directory: &Directory, tally: &TallyKey) -> Vec<Key> {
    let mut keys = Vec::new();
    let accepted = tally.accepted == 1;
    let sender = directory.by_ifindex(tally.ifindex);
    let receiver = match sender {
        Some(_) => directory.by_slot(tally.slots[1]),
        None => directory.by_slot(tally.slots[0]),
    };
    let key = |interface, source, destination, accepted| Key {
        interface,
        source,
        destination,
        source_port: tally.source_port,
        destination_port: tally.destination_port,
        protocol: tally.protocol,
        accepted,
    };
    if let Some((id, interface)) = sender {
        if of_the_host(interface, tally.destination, tally) {
            return keys;
        }
        // Refused at the receiver's: it left here.
        let left = accepted || receiver.is_some();
        keys.push(key(id, tally.source, tally.destination, left));
    }
    if let Some((id, interface)) = receiver {
        let tables = directory.tables();
        let elastic = tables.elastics.get(&tally.destination);
        let elastic = elastic.filter(|e| e.interface.id == interface.id);
        let by_gateway = tables.elastics.get(&tally.destination).is_some_and(|e| e.nat != 0);
        let source = match sender {
            Some((_, sender)) if elastic.is_some() || by_gateway => {
                stands_for(tables, sender, tally)
            }
            _ => tally.source,
        };
        let destination = match elastic {
            Some(elastic) => elastic.address,
            None if by_gateway => interface.address,
            None => tally.destination,
        };
        // The responder's answers come out of the punt device, from these.
        if !of_the_host(interface, source, tally) {
            keys.push(key(id, source, destination, accepted));
        }
    }
    keys
}

/// A sender's private address as the world sees it: its elastic one, or a NAT gateway's.
fn stands_for(tables: &Tables, sender: &Interface, tally: &TallyKey) -> u32 {
    let destination = Ipv4Addr::from(tally.destination).into();
    if let Some(by) = tables.translated(sender.ifindex, destination, 0) {
        return by.address.into();
    }
    let key = LocalKey { vpc: sender.vpc, address: tally.source, zero: 0 };
    let local = tables.locals.get(&key);
    local.map(|l| l.elastic).filter(|elastic| *elastic != 0).unwrap_or(tally.source)
}

/// Whether it is between a guest and the host's own services.
fn of_the_host(interface: &Interface, other: u32, tally: &TallyKey) -> bool {
    const UDP: u8 = 17;
    let ports = [tally.source_port, tally.destination_port];
    let dhcp = tally.protocol == UDP && ports.iter().all(|p| matches!(p, 67 | 68));
    let dns = ports.contains(&53) && (other == RESOLVER || other == interface.subnet + 2);
    let router = other == interface.subnet + 1;
    dhcp || dns || router || other == ebpf::METADATA_ADDRESS || other == TIME
}

struct Writer<'a> {
    interval: Interval,
    format: FlowLogFormat,
    account: &'a str,
}

impl Writer<'_> {
    fn record(&self, key: &Key, sum: &Tally) -> String {
        let [source, destination] = [key.source, key.destination].map(Ipv4Addr::from);
        let start = (self.interval.boot + u64::from(sum.first_s)).max(self.interval.start);
        let end =
            (self.interval.boot + u64::from(sum.last_s)).clamp(start, self.interval.end.max(start));
        let action = if key.accepted { "ACCEPT" } else { "REJECT" };
        let Key { interface, source_port, destination_port, protocol, .. } = key;
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
