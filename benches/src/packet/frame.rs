//! The frames that are sent: 60 bytes of UDP, one template for each direction, or of
//! TCP's openings; and the places that differ from flow to flow.
//!
//! A flow is a number; it stands in the client's port (14 bits) and the lower
//! half of the client's address (16 bits). Wherever a 16-bit word is written, its
//! complement is written too, into a field that means nothing (the IP identifier,
//! the payload): a word and its complement add up to nothing in the Internet
//! checksum (RFC 1071), so all checksums stay right for every flow.
//!
//! ```text
//!  0 ethernet 14 IPv4 ──────────────── 34 UDP ────── 42 payload ──────── 60
//!                18 identifier: ~a     34 client's   42 ~p  44 ~a
//!                28 or 32: a           or 36 port: p
//! ```
//! An opening has them in its sequence number: 38 ~p, 40 ~a.

use std::net::Ipv4Addr;

use etherparse::PacketBuilder;

pub const FRAME_BYTES: usize = 60;

const PORT_BITS: u32 = 14;
/// Client ports are 16384..32768: none is zero, none is anyone's well-known one.
const PORT_BASE: u16 = 1 << PORT_BITS;
const TTL: u8 = 64;

const AT_IDENTIFIER: usize = 18;
const AT_PAYLOAD: usize = 42;
const AT_SEQUENCE: usize = 38;
/// As a busy client announces it.
const WINDOW: u16 = 64_240;

/// Which end the client is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    Sends,
    Receives,
}

/// The fixed ends of all flows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ends {
    pub source_mac: [u8; 6],
    pub destination_mac: [u8; 6],
    /// Network of the clients: its lower 16 bits are the flow's.
    pub clients: Ipv4Addr,
    pub server: Ipv4Addr,
    pub server_port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Template {
    pub bytes: [u8; FRAME_BYTES],
    client: Client,
    /// Where the transport takes the complements.
    complements_at: usize,
}

/// A 16-bit word, in network order, and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Word {
    /// Taken from the flow's number: shifted right by this,
    pub shift: u32,
    /// cut to these bits,
    pub mask: u16,
    /// and joined with these.
    pub base: u16,
    pub at: usize,
    /// Where its complement goes.
    pub complement_at: [Option<usize>; 2],
}

impl Template {
    pub fn new(ends: Ends, client: Client) -> Self {
        let [a, b, _, _] = ends.clients.octets();
        let client_address = [a, b, 0, 0];
        let mut ports = [PORT_BASE, ends.server_port];
        let mut addresses = [client_address, ends.server.octets()];
        if client == Client::Receives {
            ports.reverse();
            addresses.reverse();
        }
        let mut payload = [0; FRAME_BYTES - AT_PAYLOAD];
        payload[..2].copy_from_slice(&(!PORT_BASE).to_be_bytes());
        payload[2..4].copy_from_slice(&(!0_u16).to_be_bytes());
        let ip = ipv4(etherparse::IpNumber::UDP, addresses[0], addresses[1]);
        let builder = PacketBuilder::ethernet2(ends.source_mac, ends.destination_mac)
            .ip(etherparse::IpHeaders::Ipv4(ip, Default::default()))
            .udp(ports[0], ports[1]);
        let mut bytes = Vec::with_capacity(FRAME_BYTES);
        builder.write(&mut bytes, &payload).expect("a vector takes all that is written");
        let bytes = bytes.try_into().expect("14 + 20 + 8 + 18 bytes");
        Self { bytes, client, complements_at: AT_PAYLOAD }
    }

    /// The first packet of a TCP connection of a client's.
    pub fn opening(ends: Ends) -> Self {
        let [a, b, _, _] = ends.clients.octets();
        let ip = ipv4(etherparse::IpNumber::TCP, [a, b, 0, 0], ends.server.octets());
        let sequence = u32::from(!PORT_BASE) << 16 | 0xffff;
        let builder = PacketBuilder::ethernet2(ends.source_mac, ends.destination_mac)
            .ip(etherparse::IpHeaders::Ipv4(ip, Default::default()))
            .tcp(PORT_BASE, ends.server_port, sequence, WINDOW)
            .syn();
        let mut bytes = Vec::with_capacity(FRAME_BYTES);
        builder.write(&mut bytes, &[]).expect("a vector takes all that is written");
        // The least that a wire carries; the datagram is shorter.
        bytes.resize(FRAME_BYTES, 0);
        let bytes = bytes.try_into().expect("as many as it was made to be");
        Self { bytes, client: Client::Sends, complements_at: AT_SEQUENCE }
    }

    /// What differs from flow to flow.
    pub fn words(&self) -> [Word; 2] {
        let (port_at, address_at) = match self.client {
            Client::Sends => (34, 28),
            Client::Receives => (36, 32),
        };
        [
            Word {
                shift: 0,
                mask: PORT_BASE - 1,
                base: PORT_BASE,
                at: port_at,
                complement_at: [Some(self.complements_at), None],
            },
            Word {
                shift: PORT_BITS,
                mask: u16::MAX,
                base: 0,
                at: address_at,
                complement_at: [Some(self.complements_at + 2), Some(AT_IDENTIFIER)],
            },
        ]
    }
}

fn ipv4(
    protocol: etherparse::IpNumber,
    source: [u8; 4],
    destination: [u8; 4],
) -> etherparse::Ipv4Header {
    let mut ip = etherparse::Ipv4Header::new(0, TTL, protocol, source, destination)
        .expect("no payload is not too much payload");
    ip.identification = !0;
    ip
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::{NetSlice, SlicedPacket, TransportSlice};

    const ENDS: Ends = Ends {
        source_mac: [2, 0, 0, 0, 0, 1],
        destination_mac: [2, 0, 0, 0, 0, 2],
        clients: Ipv4Addr::new(198, 18, 0, 0),
        server: Ipv4Addr::new(203, 0, 113, 10),
        server_port: 5201,
    };

    /// What the program in the kernel does to the template.
    fn frame(template: &Template, flow: u32) -> [u8; FRAME_BYTES] {
        let mut bytes = template.bytes;
        for word in template.words() {
            let value = ((flow >> word.shift) as u16 & word.mask) | word.base;
            bytes[word.at..word.at + 2].copy_from_slice(&value.to_be_bytes());
            for at in word.complement_at.into_iter().flatten() {
                bytes[at..at + 2].copy_from_slice(&(!value).to_be_bytes());
            }
        }
        bytes
    }

    #[test]
    fn every_flow_has_right_checksums_both_ways() {
        for client in [Client::Sends, Client::Receives] {
            let template = Template::new(ENDS, client);
            for flow in (0..1 << 30).step_by(99_991) {
                let bytes = frame(&template, flow);
                let packet = SlicedPacket::from_ethernet(&bytes).unwrap();
                let Some(NetSlice::Ipv4(ip)) = &packet.net else { panic!("no IPv4") };
                let header = ip.header().to_header();
                assert_eq!(header.header_checksum, header.calc_header_checksum(), "flow {flow}");
                let Some(TransportSlice::Udp(udp)) = &packet.transport else { panic!("no UDP") };
                let expected = udp.to_header().calc_checksum_ipv4(&header, udp.payload()).unwrap();
                assert_eq!(udp.checksum(), expected, "flow {flow}");
            }
        }
    }

    #[test]
    fn every_opening_has_right_checksums() {
        let template = Template::opening(ENDS);
        for flow in (0..1 << 30).step_by(99_991) {
            let bytes = frame(&template, flow);
            let packet = SlicedPacket::from_ethernet(&bytes).unwrap();
            let Some(NetSlice::Ipv4(ip)) = &packet.net else { panic!("no IPv4") };
            let header = ip.header().to_header();
            assert_eq!(header.header_checksum, header.calc_header_checksum(), "flow {flow}");
            let Some(TransportSlice::Tcp(tcp)) = &packet.transport else { panic!("no TCP") };
            assert!(tcp.syn() && !tcp.ack());
            let expected = tcp.to_header().calc_checksum_ipv4(&header, tcp.payload()).unwrap();
            assert_eq!(tcp.checksum(), expected, "flow {flow}");
        }
    }

    #[test]
    fn flows_differ_in_the_clients_port_and_address_and_in_nothing_else() {
        let template = Template::new(ENDS, Client::Sends);
        let parse = |flow| {
            let bytes = frame(&template, flow);
            let packet = SlicedPacket::from_ethernet(&bytes).unwrap();
            let Some(NetSlice::Ipv4(ip)) = &packet.net else { panic!("no IPv4") };
            let Some(TransportSlice::Udp(udp)) = &packet.transport else { panic!("no UDP") };
            let header = ip.header();
            (
                header.source_addr(),
                udp.source_port(),
                header.destination_addr(),
                udp.destination_port(),
            )
        };
        assert_eq!(parse(0), (Ipv4Addr::new(198, 18, 0, 0), 16384, ENDS.server, 5201));
        assert_eq!(parse(1), (Ipv4Addr::new(198, 18, 0, 0), 16385, ENDS.server, 5201));
        assert_eq!(parse(16384 + 5), (Ipv4Addr::new(198, 18, 0, 1), 16389, ENDS.server, 5201));
    }

    #[test]
    fn an_answer_goes_back_to_where_its_flow_came_from() {
        let template = Template::new(ENDS, Client::Receives);
        let bytes = frame(&template, 16384 + 5);
        let packet = SlicedPacket::from_ethernet(&bytes).unwrap();
        let Some(NetSlice::Ipv4(ip)) = &packet.net else { panic!("no IPv4") };
        let Some(TransportSlice::Udp(udp)) = &packet.transport else { panic!("no UDP") };
        assert_eq!(ip.header().destination_addr(), Ipv4Addr::new(198, 18, 0, 1));
        assert_eq!(ip.header().source_addr(), ENDS.server);
        assert_eq!((udp.source_port(), udp.destination_port()), (5201, 16389));
    }
}
