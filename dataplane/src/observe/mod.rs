//! What the programs told of single packets, in the terms of those who ask.
//!
//! ```text
//!  programs ─ring─▶ thread ─▶ described by the Directory ─▶ everyone who listens
//! ```
//! Pure but for [`thread`]. Every byte of an event's frame was written by a guest
//! or by the world.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf::Reason;
use ebpf::event::{CAPTURED_MAX, Event};
use ebpf::layout::Interface;
use model::{Direction, InterfaceId};
use rpc::dataplane::Seen;

use crate::compile::{Tables, acl_denied, group_rules};
use crate::load::named_rule;

pub mod thread;

/// Who is who while these tables are in force.
#[derive(Debug, Clone, Default)]
pub struct Directory {
    tables: Tables,
}

impl Directory {
    /// Only what names things is kept: policies' contents are many.
    pub fn new(tables: &Tables) -> Self {
        let tables = Tables { policies: BTreeMap::new(), ..tables.clone() };
        Self { tables }
    }

    fn interface(&self, slot: u32) -> Option<(InterfaceId, &Interface)> {
        let (ifindex, interface) = self.tables.interfaces.iter().find(|(_, i)| i.slot == slot)?;
        Some((*self.tables.names.interfaces.get(ifindex)?, interface))
    }

    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// The interface with this counter slot.
    pub fn by_slot(&self, slot: u32) -> Option<(InterfaceId, &Interface)> {
        if slot == 0 { None } else { self.interface(slot) }
    }

    /// The interface behind this device.
    pub fn by_ifindex(&self, ifindex: u32) -> Option<(InterfaceId, &Interface)> {
        let interface = self.tables.interfaces.get(&ifindex)?;
        Some((*self.tables.names.interfaces.get(&ifindex)?, interface))
    }

    /// An event as whoever listens reads it. `boot_ms`: when the monotonic clock
    /// began, since 1970.
    pub fn describe(&self, event: &Event, boot_ms: u64) -> Seen {
        let reason = Reason::from_number(event.reason).unwrap_or(Reason::Undecided);
        let slots = event.slots.map(|slot| self.by_slot(slot));
        // A guard's frame was on its way to the guest.
        let from_guest =
            reason != Reason::Unmarked && self.tables.interfaces.contains_key(&event.ifindex);
        let (sender, receiver) =
            if from_guest { (slots[0], slots[1]) } else { (None, slots[1].or(slots[0])) };
        let entries = (event.egress_rule, event.ingress_rule);
        let (egress, ingress) = group_rules(reason, entries);
        let ifindex = |end: Option<(InterfaceId, &Interface)>| end.map(|(_, i)| i.ifindex);
        let both = (ifindex(sender), ifindex(receiver));
        let rule = |end: Option<(InterfaceId, &Interface)>, direction, place| {
            named_rule(&self.tables, end?.1, direction, place)
        };
        let length = usize::from(event.captured).min(CAPTURED_MAX);
        let ends = Ends::read(&event.frame[..length]);
        let device = self.tables.attachments.get(&event.ifindex);
        let rules =
            (rule(sender, Direction::Egress, egress), rule(receiver, Direction::Ingress, ingress));
        let addresses = (ends.map(|e| e.source), ends.map(|e| e.destination));
        Seen {
            time_ms: boot_ms + event.time_ns / 1_000_000,
            interfaces: slots.iter().flatten().map(|(id, _)| *id).collect(),
            allowed: reason.accepts(),
            reason: reason.name().to_owned(),
            egress_rule: rules.0,
            ingress_rule: rules.1,
            listed: self.tables.names.both_listed(rules, addresses),
            device: device.map_or_else(|| event.ifindex.to_string(), |a| a.device.clone()),
            length: event.length,
            protocol: ends.map(|e| e.protocol),
            source: ends.map(|e| e.source),
            destination: ends.map(|e| e.destination),
            source_port: ends.and_then(|e| e.ports).map(|p| p.0),
            destination_port: ends.and_then(|e| e.ports).map(|p| p.1),
            denied: acl_denied(&self.tables, reason, both, entries),
            routed: ends.and_then(|e| self.tables.routed(event.ifindex, e.destination)),
            translated: ends.and_then(|e| {
                self.tables.translated(event.ifindex, e.destination, event.translated)
            }),
        }
    }
}

/// A frame's five-tuple, as far as it has one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    pub protocol: u8,
    pub source: IpAddr,
    pub destination: IpAddr,
    pub ports: Option<(u16, u16)>,
}

impl Ends {
    /// `None` where it is no IP packet, or too short to be one.
    pub fn read(frame: &[u8]) -> Option<Self> {
        match frame.get(12..14)? {
            [0x08, 0x00] => Self::v4(frame.get(14..)?),
            [0x86, 0xdd] => Self::v6(frame.get(14..)?),
            _ => None,
        }
    }

    fn v4(packet: &[u8]) -> Option<Self> {
        let header = usize::from(packet.first()? & 0x0f) * 4;
        let address = |at: usize| {
            let bytes = *packet.get(at..)?.first_chunk::<4>()?;
            Some(IpAddr::from(Ipv4Addr::from(bytes)))
        };
        let protocol = *packet.get(9)?;
        let first = u16::from_be_bytes(*packet.get(6..)?.first_chunk()?) & 0x1fff == 0;
        let ports = if first { ports(protocol, packet.get(header.max(20)..)) } else { None };
        Some(Self { protocol, source: address(12)?, destination: address(16)?, ports })
    }

    fn v6(packet: &[u8]) -> Option<Self> {
        let address = |at: usize| {
            let bytes = *packet.get(at..)?.first_chunk::<16>()?;
            Some(IpAddr::from(Ipv6Addr::from(bytes)))
        };
        let protocol = *packet.get(6)?;
        let ports = ports(protocol, packet.get(40..));
        Some(Self { protocol, source: address(8)?, destination: address(24)?, ports })
    }
}

/// TCP's and UDP's ports.
fn ports(protocol: u8, transport: Option<&[u8]>) -> Option<(u16, u16)> {
    if !matches!(protocol, 6 | 17) {
        return None;
    }
    let [a, b, c, d] = *transport?.first_chunk()?;
    Some((u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn both_ends_of_a_frame_are_read() {
        let udp = etherparse::PacketBuilder::ethernet2([1; 6], [2; 6])
            .ipv4([10, 0, 0, 5], [192, 0, 2, 1], 64)
            .udp(4000, 53);
        let mut frame = Vec::new();
        udp.write(&mut frame, b"x").unwrap();
        let ends = Ends::read(&frame).unwrap();
        assert_eq!((ends.source.to_string(), ends.ports), ("10.0.0.5".into(), Some((4000, 53))));
        let tcp = etherparse::PacketBuilder::ethernet2([1; 6], [2; 6])
            .ipv6([1; 16], [2; 16], 64)
            .tcp(1, 80, 0, 0);
        let mut frame = Vec::new();
        tcp.write(&mut frame, b"").unwrap();
        assert_eq!(Ends::read(&frame).unwrap().ports, Some((1, 80)));
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_description(frame in prop::collection::vec(any::<u8>(), 0..96)) {
            let mut event: Event = bytemuck::Zeroable::zeroed();
            event.frame[..frame.len()].copy_from_slice(&frame);
            event.captured = frame.len() as u8;
            Directory::default().describe(&event, 0);
            event.captured = u8::MAX;
            Directory::default().describe(&event, 0);
        }
    }
}
