//! One interface's responder: DHCP at once, metadata over a TCP of its own.
//!
//! smoltcp runs here on bare IP: the program on the tap has let only the
//! interface's own addresses through, and the frame that goes back is addressed
//! by ifindex, so there is no neighbour to ask for and none to be fooled by.
//!
//! Checksums are verified on the way in and computed on the way out. A guest
//! that leaves them to its network card sends partial ones; the kernel completes
//! them before it hands a frame to a tap that was opened without
//! `TUNSETOFFLOAD`, as the punt device is.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

use model::InterfaceId;
use smoltcp::phy;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, IpAddress, IpProtocol, Ipv4Packet, Ipv4Repr,
    TcpPacket, UdpPacket, UdpRepr,
};

use super::Served;
use super::dhcp::{self, METADATA_ADDRESS, Silence};
use super::dns;
use super::limit::Bucket;
use super::metadata::{Service, TokenKey};
use super::six;
use super::stream::Metadata;
use super::time;
use super::wire::Wire;

/// Of answers over UDP.
const HOP_LIMIT: u8 = 64;

/// Of IPv4 and UDP.
const HEADER_BYTES: usize = 20 + 8;

pub const METADATA_PORT: u16 = 80;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub dhcp_answered: u64,
    /// Malformed, or not ours to answer.
    pub dhcp_ignored: u64,
    pub metadata_answered: u64,
    pub time_answered: u64,
    pub dhcp6_answered: u64,
    /// Malformed, or not ours to answer.
    pub dhcp6_ignored: u64,
    /// Router advertisements, asked for or not.
    pub routers_told: u64,
    pub dns: dns::Counters,
    /// Neither DHCP nor metadata, or not from the interface's own addresses.
    pub ignored: u64,
    /// Beyond the rate that an interface has.
    pub limited: u64,
}

impl Counters {
    /// As `status` names them.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        [
            ("respond-dhcp-answered", self.dhcp_answered),
            ("respond-dhcp-ignored", self.dhcp_ignored),
            ("respond-metadata-answered", self.metadata_answered),
            ("respond-time-answered", self.time_answered),
            ("respond-dhcp6-answered", self.dhcp6_answered),
            ("respond-dhcp6-ignored", self.dhcp6_ignored),
            ("respond-routers-told", self.routers_told),
            ("respond-dns-own", self.dns.own),
            ("respond-dns-remembered", self.dns.remembered),
            ("respond-dns-forwarded", self.dns.forwarded),
            ("respond-dns-failed", self.dns.failed),
            ("respond-dns-refused", self.dns.refused),
            ("respond-ignored", self.ignored),
            ("respond-limited", self.limited),
        ]
        .into_iter()
    }
}

pub struct Responder {
    served: Served,
    bucket: Bucket,
    counters: Counters,
    wire: Wire,
    metadata: Option<Metadata>,
    streams: Option<dns::Streams>,
    router: Option<six::Router>,
    /// What its guest wants resolved.
    asked: Vec<(dns::Origin, Vec<u8>)>,
}

impl Responder {
    pub fn new(
        served: Served,
        key: &TokenKey,
        random: &mut impl FnMut() -> u128,
        now: Duration,
    ) -> Self {
        let mtu = usize::from(served.binding.mtu);
        let mut responder = Self {
            served: Served { metadata: None, dns: None, ..served.clone() },
            bucket: Bucket::full(now),
            counters: Counters::default(),
            wire: Wire { incoming: None, outgoing: VecDeque::new(), mtu },
            metadata: None,
            streams: None,
            router: None,
            asked: Vec::new(),
        };
        responder.replace(served, key, random, now);
        responder
    }

    pub fn interface(&self) -> InterfaceId {
        self.served.interface
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// New answers for the same interface; connections stay where they can.
    pub fn replace(
        &mut self,
        served: Served,
        key: &TokenKey,
        random: &mut impl FnMut() -> u128,
        now: Duration,
    ) {
        self.wire.mtu = usize::from(served.binding.mtu);
        match (&served.metadata, &mut self.metadata) {
            (None, metadata) => *metadata = None,
            (Some(documents), Some(metadata)) => {
                metadata.service.replace(documents.clone(), served.tokens);
                metadata.limit_hops(served.hop_limit);
            }
            (Some(documents), metadata @ None) => {
                let mut service =
                    Service::new(served.interface, documents.clone(), key.clone(), random());
                service.replace(documents.clone(), served.tokens);
                let hops = served.hop_limit;
                *metadata = Some(Metadata::new(service, hops, &mut self.wire, random(), now));
            }
        }
        match (&served.six, &mut self.router) {
            (Some(binding), Some(router)) => router.replace(binding.clone(), now),
            (binding, router) => {
                *router = binding.clone().map(|binding| six::Router::new(binding, now));
            }
        }
        let servers =
            |served: &Served| served.dns.as_ref().map(|dns| dns.servers().collect::<Vec<_>>());
        let asked_at = servers(&served);
        if asked_at != servers(&self.served) {
            self.streams = asked_at.map(|addresses| {
                dns::Streams::new(addresses.into_iter(), &mut self.wire, random(), now)
            });
        }
        self.served = served;
    }

    /// Whose names its guest may ask for.
    pub fn network(&self) -> Option<model::VpcId> {
        self.served.dns.as_ref().map(|dns| dns.vpc)
    }

    pub fn take_asked(&mut self) -> Vec<(dns::Origin, Vec<u8>)> {
        std::mem::take(&mut self.asked)
    }

    /// Tells its guest what was found out.
    pub fn tell(&mut self, origin: dns::Origin, message: &[u8], now: Duration) {
        match origin {
            dns::Origin::Datagram { server, asker, .. } => {
                self.wire.push(udp_packet((server, dns::PORT), asker, message));
            }
            dns::Origin::Stream(name) => {
                if let Some(streams) = &mut self.streams {
                    streams.answer(name, message, now);
                }
                self.turn_streams(now);
            }
        }
    }

    fn turn_streams(&mut self, now: Duration) {
        let Some(streams) = &mut self.streams else { return };
        let mut asked = Vec::new();
        streams.turn(&mut self.wire, now, &mut asked);
        let named = asked.into_iter().map(|(name, message)| (dns::Origin::Stream(name), message));
        self.asked.extend(named);
    }

    /// Takes a frame without its destination address, as the guest sent it.
    /// `booted_at` is the zero of `now`, since 1970.
    pub fn receive(&mut self, rest: &[u8], now: Duration, booted_at: Duration) {
        if !self.bucket.admit(now) {
            self.counters.limited += 1;
            return;
        }
        if let Some(packet) = six_of(rest, &self.served) {
            match &self.router {
                Some(router) => router.receive(packet, &mut self.wire, &mut self.counters),
                None => self.counters.ignored += 1,
            }
            return;
        }
        match Question::parse(rest, &self.served) {
            Some(Question::Dhcp(message)) => self.answer_dhcp(message),
            Some(Question::Time { asker, message }) => {
                self.answer_time(asker, message, booted_at + now);
            }
            Some(Question::Metadata(packet)) => match &mut self.metadata {
                Some(metadata) => {
                    self.wire.incoming = Some(packet.to_vec());
                    metadata.turn(&mut self.wire, &mut self.counters, now);
                }
                None => self.counters.ignored += 1,
            },
            Some(Question::Name { server, asker, message }) => {
                let bytes_max = self.wire.mtu - HEADER_BYTES;
                let origin = dns::Origin::Datagram { server, asker, bytes_max };
                self.asked.push((origin, message.to_vec()));
            }
            Some(Question::NameStream(packet)) => {
                self.wire.incoming = Some(packet.to_vec());
                self.turn_streams(now);
            }
            None => self.counters.ignored += 1,
        }
    }

    pub fn elapse(&mut self, now: Duration) {
        self.turn_streams(now);
        if let Some(metadata) = &mut self.metadata {
            metadata.turn(&mut self.wire, &mut self.counters, now);
        }
        if let Some(router) = &mut self.router {
            router.elapse(&mut self.wire, &mut self.counters, now);
        }
    }

    pub fn next_due(&mut self, now: Duration) -> Option<Duration> {
        let metadata = self.metadata.as_mut().and_then(|m| m.next_due(now));
        let streams = self.streams.as_mut().and_then(|s| s.next_due(now));
        let router = self.router.as_ref().map(six::Router::next_due);
        metadata.into_iter().chain(streams).chain(router).min()
    }

    /// Moves what is to be sent into `out`, as frames to `destination`.
    pub fn drain(&mut self, destination: [u8; 6], out: &mut Vec<Vec<u8>>) {
        for packet in self.wire.outgoing.drain(..) {
            let mut frame = Vec::with_capacity(14 + packet.len());
            frame.extend(destination);
            frame.extend(ebpf::GATEWAY_MAC);
            let six = packet.first().is_some_and(|first| first >> 4 == 6);
            let kind = if six { EthernetProtocol::Ipv6 } else { EthernetProtocol::Ipv4 };
            frame.extend(u16::from(kind).to_be_bytes());
            frame.extend(packet);
            out.push(frame);
        }
    }

    fn answer_dhcp(&mut self, message: &[u8]) {
        match dhcp::answer(&self.served.binding, message) {
            Ok(reply) => {
                self.counters.dhcp_answered += 1;
                let from = (self.served.binding.router, smoltcp::wire::DHCP_SERVER_PORT);
                let to = (reply.destination, smoltcp::wire::DHCP_CLIENT_PORT);
                self.wire.push(udp_packet(from, to, &reply.message));
            }
            Err(silence) => {
                self.counters.dhcp_ignored += 1;
                if silence == Silence::Heard {
                    tracing::debug!(interface = %self.served.interface, "released its address");
                }
            }
        }
    }
}

impl Responder {
    fn answer_time(&mut self, asker: (Ipv4Addr, u16), message: &[u8], since_1970: Duration) {
        match time::answer(message, since_1970) {
            Some(reply) => {
                self.counters.time_answered += 1;
                self.wire.push(udp_packet((time::ADDRESS, time::PORT), asker, &reply));
            }
            None => self.counters.ignored += 1,
        }
    }
}

/// Of a frame from its source address on.
const SOURCE_AND_TYPE: usize = 8;

/// The IPv6 packet in a frame that the interface's guest sent.
fn six_of<'a>(rest: &'a [u8], served: &Served) -> Option<&'a [u8]> {
    let (head, packet) = rest.split_first_chunk::<SOURCE_AND_TYPE>()?;
    let ipv6 = u16::from(EthernetProtocol::Ipv6).to_be_bytes();
    (head[..6] == served.binding.mac.octets() && head[6..] == ipv6).then_some(packet)
}

/// What a frame asks, once its layers were found whole and its sender right.
enum Question<'a> {
    /// The UDP payload.
    Dhcp(&'a [u8]),
    Time {
        asker: (Ipv4Addr, u16),
        message: &'a [u8],
    },
    /// The IPv4 packet.
    Metadata(&'a [u8]),
    Name {
        server: Ipv4Addr,
        asker: (Ipv4Addr, u16),
        message: &'a [u8],
    },
    /// The IPv4 packet.
    NameStream(&'a [u8]),
}

impl<'a> Question<'a> {
    /// `rest` is the frame from its source address on.
    fn parse(rest: &'a [u8], served: &Served) -> Option<Self> {
        let (head, packet) = rest.split_first_chunk::<SOURCE_AND_TYPE>()?;
        let source = EthernetAddress::from_bytes(&head[..6]);
        let ipv4 = u16::from(EthernetProtocol::Ipv4).to_be_bytes();
        if source.0 != served.binding.mac.octets() || head[6..] != ipv4 {
            return None;
        }
        let ip = Ipv4Packet::new_checked(packet).ok()?;
        // RFC 2131 and TCP both begin with whole datagrams.
        if ip.more_frags() || ip.frag_offset() != 0 || !ip.verify_checksum() {
            return None;
        }
        let asker = ip.src_addr();
        let own = asker == served.binding.address || served.secondary.contains(&asker);
        let resolver =
            own && served.dns.as_ref().is_some_and(|dns| dns.servers().any(|s| s == ip.dst_addr()));
        match ip.next_header() {
            IpProtocol::Udp if own || ip.src_addr().is_unspecified() => {
                let length = usize::from(ip.total_len());
                let header = usize::from(ip.header_len());
                let udp = UdpPacket::new_checked(packet.get(header..length)?).ok()?;
                let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
                if !udp.verify_checksum(&from, &to) {
                    return None;
                }
                let (port, message) = (udp.src_port(), udp.payload());
                match (ip.dst_addr(), udp.dst_port()) {
                    (_, smoltcp::wire::DHCP_SERVER_PORT) => Some(Self::Dhcp(message)),
                    (time::ADDRESS, time::PORT) if own => {
                        Some(Self::Time { asker: (asker, port), message })
                    }
                    (server, dns::PORT) if resolver => {
                        Some(Self::Name { server, asker: (asker, port), message })
                    }
                    _ => None,
                }
            }
            IpProtocol::Tcp if own && (resolver || ip.dst_addr() == METADATA_ADDRESS) => {
                let length = usize::from(ip.total_len());
                let tcp = packet.get(usize::from(ip.header_len())..length)?;
                let tcp = TcpPacket::new_checked(tcp).ok()?;
                match tcp.dst_port() {
                    dns::PORT if resolver => Some(Self::NameStream(&packet[..length])),
                    METADATA_PORT if !resolver => Some(Self::Metadata(&packet[..length])),
                    _ => None,
                }
            }
            _ => None,
        }
    }
}

/// An IPv4 packet with `message` in UDP.
fn udp_packet(from: (Ipv4Addr, u16), to: (Ipv4Addr, u16), message: &[u8]) -> Vec<u8> {
    let checksums = phy::ChecksumCapabilities::default();
    let udp = UdpRepr { src_port: from.1, dst_port: to.1 };
    let ip = Ipv4Repr {
        src_addr: from.0,
        dst_addr: to.0,
        next_header: IpProtocol::Udp,
        payload_len: udp.header_len() + message.len(),
        hop_limit: HOP_LIMIT,
    };
    let mut bytes = vec![0; ip.buffer_len() + ip.payload_len];
    let mut packet = Ipv4Packet::new_unchecked(bytes.as_mut_slice());
    ip.emit(&mut packet, &checksums);
    udp.emit(
        &mut UdpPacket::new_unchecked(packet.payload_mut()),
        &IpAddress::Ipv4(from.0),
        &IpAddress::Ipv4(to.0),
        message.len(),
        |payload| payload.copy_from_slice(message),
        &checksums,
    );
    bytes
}

/// Where a frame's payload begins; pinned, because `receive` is given the frame
/// without its destination.
const _: () = assert!(EthernetFrame::<&[u8]>::header_len() == 14);
