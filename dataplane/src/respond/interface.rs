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
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use model::InterfaceId;
use smoltcp::wire::{EthernetFrame, EthernetProtocol};

use super::Served;
use super::dhcp::{self, Silence};
use super::dns;
use super::limit::Bucket;
use super::metadata::{Service, TokenKey};
use super::question::Question;
use super::six;
use super::stream::Metadata;
use super::time;
use super::wire::{Wire, datagram, room_for_message};

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
                self.wire.push(datagram((server, dns::PORT).into(), asker, message));
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
        match Question::parse(rest, &self.served) {
            Some(Question::Dhcp(message)) => self.answer_dhcp(message),
            Some(Question::Link(packet)) => match &self.router {
                Some(router) => router.receive(packet, &mut self.wire, &mut self.counters),
                None => self.counters.ignored += 1,
            },
            Some(Question::Time { server, asker, message }) => {
                self.answer_time((server, asker), message, booted_at + now);
            }
            Some(Question::Metadata(packet)) => match &mut self.metadata {
                Some(metadata) => {
                    self.wire.incoming = Some(packet.to_vec());
                    metadata.turn(&mut self.wire, &mut self.counters, now);
                }
                None => self.counters.ignored += 1,
            },
            Some(Question::Name { server, asker, message }) => {
                let bytes_max = room_for_message(self.wire.mtu, asker);
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
            // It names an address that is not its own.
            Ok(reply) if !reply.broadcast && !self.served.owns(reply.destination.into()) => {
                self.counters.dhcp_ignored += 1;
            }
            Ok(reply) => {
                self.counters.dhcp_answered += 1;
                let from = (self.served.binding.router, smoltcp::wire::DHCP_SERVER_PORT);
                let to = (reply.destination, smoltcp::wire::DHCP_CLIENT_PORT);
                self.wire.push(datagram(from.into(), to.into(), &reply.message));
            }
            Err(silence) => {
                self.counters.dhcp_ignored += 1;
                if silence == Silence::Heard {
                    tracing::debug!(interface = %self.served.interface, "released its address");
                }
            }
        }
    }

    fn answer_time(
        &mut self,
        (server, asker): (IpAddr, SocketAddr),
        message: &[u8],
        since_1970: Duration,
    ) {
        match time::answer(message, since_1970) {
            Some(reply) => {
                self.counters.time_answered += 1;
                self.wire.push(datagram((server, time::PORT).into(), asker, &reply));
            }
            None => self.counters.ignored += 1,
        }
    }
}

/// Where a frame's payload begins; pinned, because `receive` is given the frame
/// without its destination.
const _: () = assert!(EthernetFrame::<&[u8]>::header_len() == 14);
