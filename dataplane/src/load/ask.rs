//! The packet that a question is about: the first of a flow.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ebpf::flow::{ICMP, ICMPV6, TCP, UDP};
use ebpf::layout::{Interface, LocalKey};
use ebpf::rewrite::{corrected, sum32};
use ebpf::{GATEWAY_MAC, Reason, V6};
use model::Direction;
use rpc::dataplane::Question;

use super::{Error, Refused};
use crate::compile::Tables;

pub enum Asked {
    /// It would come in by this device.
    Frame(u32, Vec<u8>),
    /// It could come in nowhere.
    Refused(Reason),
}

/// An egress question is asked where the guest's packets come in; an ingress one
/// where the remote's would: at another local interface's device, where the remote
/// is one of the same network, else at the uplink.
pub fn asked(tables: &Tables, interface: &Interface, question: &Question) -> Result<Asked, Error> {
    match (question.remote, question.local) {
        (IpAddr::V4(remote), None) => {
            four(tables, interface, question, interface.address.into(), remote)
        }
        (IpAddr::V4(remote), Some(IpAddr::V4(own))) => {
            four(tables, interface, question, own, remote)
        }
        (IpAddr::V6(remote), None) => {
            let mut held = tables.holders.iter();
            match held.find(|(_, holder)| holder.ifindex == interface.ifindex) {
                Some((own, _)) => {
                    six(tables, interface, question, Ipv6Addr::from_bits(own.bits()), remote)
                }
                None => Ok(Asked::Refused(Reason::Ipv6)),
            }
        }
        (IpAddr::V6(remote), Some(IpAddr::V6(own))) => {
            six(tables, interface, question, own, remote)
        }
        (remote, Some(own)) => Err(refused(
            question,
            &format!("{own} and {remote} are of two families: give two of one"),
        )),
    }
}

fn refused(question: &Question, cause: &str) -> Error {
    Refused(format!("interface {}: ask: {cause}", question.interface)).into()
}

fn four(
    tables: &Tables,
    interface: &Interface,
    question: &Question,
    own: Ipv4Addr,
    remote: Ipv4Addr,
) -> Result<Asked, Error> {
    let (own, remote) = (u32::from(own), u32::from(remote));
    let key = LocalKey { vpc: interface.vpc, address: own, zero: 0 };
    let Some(local) = tables.locals.get(&key).filter(|l| l.ifindex == interface.ifindex) else {
        let cause = format!("{} is not its address", Ipv4Addr::from(own));
        return Err(refused(question, &cause));
    };
    if question.direction == Direction::Egress {
        let ports = (question.local_port, question.remote_port);
        let frame = frame(question, (interface.mac, GATEWAY_MAC), (own, remote), ports);
        return Ok(Asked::Frame(interface.ifindex, frame));
    }
    let ports = (question.remote_port, question.local_port);
    let key = LocalKey { vpc: interface.vpc, address: remote, zero: 0 };
    let sender = tables.locals.get(&key).and_then(|l| tables.interfaces.get(&l.ifindex));
    Ok(match sender {
        Some(sender) => {
            let macs = (sender.mac, GATEWAY_MAC);
            Asked::Frame(sender.ifindex, frame(question, macs, (remote, own), ports))
        }
        None if local.elastic == 0 => Asked::Refused(Reason::NoElastic),
        None if interface.uplink == 0 => Asked::Refused(Reason::NoUplink),
        None => {
            let macs = (GATEWAY_MAC, tables.config.uplink_mac);
            Asked::Frame(interface.uplink, frame(question, macs, (remote, local.elastic), ports))
        }
    })
}

fn six(
    tables: &Tables,
    interface: &Interface,
    question: &Question,
    own: Ipv6Addr,
    remote: Ipv6Addr,
) -> Result<Asked, Error> {
    let holder = |address: Ipv6Addr| tables.holders.get(&V6::from_bits(address.to_bits()));
    if holder(own).is_none_or(|holder| holder.ifindex != interface.ifindex) {
        return Err(refused(question, &format!("{own} is not its address")));
    }
    if question.direction == Direction::Egress {
        let ports = (question.local_port, question.remote_port);
        let frame = frame6(question, (interface.mac, GATEWAY_MAC), (own, remote), ports);
        return Ok(Asked::Frame(interface.ifindex, frame));
    }
    let ports = (question.remote_port, question.local_port);
    let near = holder(remote).filter(|holder| holder.vpc == interface.vpc);
    Ok(match near.and_then(|holder| tables.interfaces.get(&holder.ifindex)) {
        Some(sender) => {
            let macs = (sender.mac, GATEWAY_MAC);
            Asked::Frame(sender.ifindex, frame6(question, macs, (remote, own), ports))
        }
        None if interface.uplink == 0 => Asked::Refused(Reason::NoUplink),
        None => {
            let macs = (GATEWAY_MAC, tables.config.uplink_mac);
            Asked::Frame(interface.uplink, frame6(question, macs, (remote, own), ports))
        }
    })
}

/// For ICMP the ports are not ports: the local one (of the side that is asked about) holds
/// type and code, as in `model`'s header.
fn transport(question: &Question, source_port: u16, destination_port: u16) -> Vec<u8> {
    let [from_high, from_low] = source_port.to_be_bytes();
    let [to_high, to_low] = destination_port.to_be_bytes();
    match question.protocol {
        TCP => {
            let mut tcp = vec![0; 20];
            tcp[..4].copy_from_slice(&[from_high, from_low, to_high, to_low]);
            tcp[12] = 5 << 4;
            tcp[13] = 0x02; // SYN
            tcp
        }
        UDP => vec![from_high, from_low, to_high, to_low, 0, 8, 0, 0],
        ICMP | ICMPV6 => {
            let [kind, code] = question.remote_port.max(question.local_port).to_be_bytes();
            vec![kind, code, 0, 0, 0, 1, 0, 1]
        }
        _ => Vec::new(),
    }
}

fn frame(
    question: &Question,
    (source_mac, destination_mac): ([u8; 6], [u8; 6]),
    (source, destination): (u32, u32),
    (source_port, destination_port): (u16, u16),
) -> Vec<u8> {
    let transport = transport(question, source_port, destination_port);
    let mut frame = Vec::with_capacity(64);
    frame.extend_from_slice(&destination_mac);
    frame.extend_from_slice(&source_mac);
    frame.extend_from_slice(&[0x08, 0x00, 0x45, 0]);
    frame.extend_from_slice(&(20 + transport.len() as u16).to_be_bytes());
    frame.extend_from_slice(&[0, 0, 0x40, 0, 64, question.protocol]);
    let sum = 0x4500
        + 20
        + transport.len() as u32
        + 0x4000
        + (64 << 8)
        + u32::from(question.protocol)
        + sum32(source)
        + sum32(destination);
    // The checksum of a header that was all zeros is all ones.
    frame.extend_from_slice(&corrected(0xffff, 0, sum).to_be_bytes());
    frame.extend_from_slice(&Ipv4Addr::from(source).octets());
    frame.extend_from_slice(&Ipv4Addr::from(destination).octets());
    frame.extend_from_slice(&transport);
    frame
}

fn frame6(
    question: &Question,
    (source_mac, destination_mac): ([u8; 6], [u8; 6]),
    (source, destination): (Ipv6Addr, Ipv6Addr),
    (source_port, destination_port): (u16, u16),
) -> Vec<u8> {
    let transport = transport(question, source_port, destination_port);
    let mut frame = Vec::with_capacity(80);
    frame.extend_from_slice(&destination_mac);
    frame.extend_from_slice(&source_mac);
    frame.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
    frame.extend_from_slice(&(transport.len() as u16).to_be_bytes());
    frame.extend_from_slice(&[question.protocol, 64]);
    frame.extend_from_slice(&source.octets());
    frame.extend_from_slice(&destination.octets());
    frame.extend_from_slice(&transport);
    frame
}
