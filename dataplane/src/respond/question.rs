//! What a guest's frame asks of the host, once its layers were found whole and its
//! sender right.
//!
//! ```text
//! IPv4, IPv6 ─┬ UDP ─ DHCP, time, name
//!             └ TCP ─ metadata, names by stream
//! IPv6 of the link, and DHCPv6 ─ its router, which reads on itself
//! ```

use std::net::{IpAddr, SocketAddr};

use smoltcp::wire::{
    DHCP_SERVER_PORT, EthernetProtocol, IPV6_HEADER_LEN, IpProtocol, Ipv4Packet, Ipv6Packet,
    TcpPacket, UdpPacket,
};

use super::{Served, dns, metadata, time};

#[derive(Debug, PartialEq, Eq)]
pub enum Question<'a> {
    /// The UDP payload.
    Dhcp(&'a [u8]),
    /// The IPv6 packet.
    Link(&'a [u8]),
    Time {
        server: IpAddr,
        asker: SocketAddr,
        message: &'a [u8],
    },
    /// The IP packet.
    Metadata(&'a [u8]),
    Name {
        server: IpAddr,
        asker: SocketAddr,
        message: &'a [u8],
    },
    /// The IP packet.
    NameStream(&'a [u8]),
}

/// Of a frame from its source address on.
const SOURCE_AND_TYPE: usize = 8;

/// An IP packet of either family.
struct Packet<'a> {
    source: IpAddr,
    destination: IpAddr,
    protocol: IpProtocol,
    /// Without what the frame has behind it.
    bytes: &'a [u8],
    payload: &'a [u8],
}

impl<'a> Question<'a> {
    /// `rest` is the frame from its source address on.
    pub fn parse(rest: &'a [u8], served: &Served) -> Option<Self> {
        let (head, bytes) = rest.split_first_chunk::<SOURCE_AND_TYPE>()?;
        if head[..6] != served.binding.mac.octets() {
            return None;
        }
        let kind = EthernetProtocol::from(u16::from_be_bytes([head[6], head[7]]));
        let packet = match kind {
            EthernetProtocol::Ipv4 => Packet::four(bytes)?,
            EthernetProtocol::Ipv6 => match Packet::six(bytes)? {
                packet if packet.is_of_the_link() => return Some(Self::Link(packet.bytes)),
                packet => packet,
            },
            _ => return None,
        };
        match packet.protocol {
            IpProtocol::Udp => Self::datagram(&packet, served),
            IpProtocol::Tcp => Self::stream(&packet, served),
            _ => None,
        }
    }

    fn datagram(packet: &Packet<'a>, served: &Served) -> Option<Self> {
        let udp = UdpPacket::new_checked(packet.payload).ok()?;
        if !udp.verify_checksum(&packet.source.into(), &packet.destination.into()) {
            return None;
        }
        let own = served.owns(packet.source);
        let (server, asker) = (packet.destination, (packet.source, udp.src_port()).into());
        let message = udp.payload();
        match udp.dst_port() {
            DHCP_SERVER_PORT if packet.source.is_ipv4() => {
                (own || packet.source.is_unspecified()).then_some(Self::Dhcp(message))
            }
            time::PORT if own && time::ADDRESSES.contains(&server) => {
                Some(Self::Time { server, asker, message })
            }
            dns::PORT if own && served.resolves_at(server) => {
                Some(Self::Name { server, asker, message })
            }
            _ => None,
        }
    }

    fn stream(packet: &Packet<'a>, served: &Served) -> Option<Self> {
        let tcp = TcpPacket::new_checked(packet.payload).ok()?;
        let server = packet.destination;
        match tcp.dst_port() {
            _ if !served.owns(packet.source) => None,
            dns::PORT if served.resolves_at(server) => Some(Self::NameStream(packet.bytes)),
            metadata::PORT if metadata::ADDRESSES.contains(&server) => {
                Some(Self::Metadata(packet.bytes))
            }
            _ => None,
        }
    }
}

impl<'a> Packet<'a> {
    fn four(bytes: &'a [u8]) -> Option<Self> {
        let ip = Ipv4Packet::new_checked(bytes).ok()?;
        // RFC 2131 and TCP both begin with whole datagrams.
        if ip.more_frags() || ip.frag_offset() != 0 || !ip.verify_checksum() {
            return None;
        }
        let bytes = bytes.get(..usize::from(ip.total_len()))?;
        Some(Self {
            source: ip.src_addr().into(),
            destination: ip.dst_addr().into(),
            protocol: ip.next_header(),
            bytes,
            payload: bytes.get(usize::from(ip.header_len())..)?,
        })
    }

    fn six(bytes: &'a [u8]) -> Option<Self> {
        let ip = Ipv6Packet::new_checked(bytes).ok()?;
        let bytes = bytes.get(..IPV6_HEADER_LEN + usize::from(ip.payload_len()))?;
        Some(Self {
            source: ip.src_addr().into(),
            destination: ip.dst_addr().into(),
            protocol: ip.next_header(),
            bytes,
            payload: &bytes[IPV6_HEADER_LEN..],
        })
    }

    fn is_of_the_link(&self) -> bool {
        let link = |address| matches!(address, IpAddr::V6(a) if a.is_unicast_link_local());
        self.source.is_unspecified() || link(self.source)
    }
}
