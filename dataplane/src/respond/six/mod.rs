//! IPv6 of one interface: the subnet's router as its guest hears it (RFC 4861), and the
//! DHCPv6 server that the router names (`dhcp`).
//!
//! ```text
//! guest: router solicitation  → router advertisement, to who asked
//!        (nothing)            → one soon after it is configured, two more, then each 10 minutes
//!        DHCPv6 message       → what `dhcp` answers
//!        all else             → silence, counted
//! ```
//! Addresses come by DHCPv6 alone, as in EC2: the prefix is told as on the link and not for
//! making addresses from (flags L, not A), and the guest is told to ask (flags M and O).

pub mod dhcp;

use std::net::Ipv6Addr;
use std::time::Duration;

use ipnet::Ipv6Net;
use rpc::dataplane::Interface;
use smoltcp::phy::ChecksumCapabilities;
use smoltcp::wire::{
    EthernetAddress, IPV6_HEADER_LEN, Icmpv6Message, Icmpv6Packet, Icmpv6Repr, IpProtocol,
    Ipv6Packet, Ipv6Repr, NdiscPrefixInfoFlags, NdiscPrefixInformation, NdiscRepr,
    NdiscRouterFlags, UdpPacket,
};

use super::dns::ADDRESS6;
use super::interface::Counters;
use super::wire::{self, Wire};

/// The router's address on every guest's link.
pub const ROUTER: Ipv6Addr = Ipv6Addr::from_bits(ebpf::ROUTER_ADDRESS6.bits());
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// RFC 4861 section 6.2.1: the default `MaxRtrAdvInterval`, and thrice that for the route.
const INTERVAL: Duration = Duration::from_secs(600);
const ROUTER_LIFETIME_S: u64 = 1800;
/// RFC 4861 section 10: the first ones come sooner, should one be lost.
const INITIAL: u8 = 3;
const INITIAL_INTERVAL: Duration = Duration::from_secs(16);
/// The first waits until the program on the tap knows the interface.
const BEGINS_AFTER: Duration = Duration::from_secs(2);
/// For how long the prefix is on the link (RFC 4861 section 6.2.1: 30 days).
const PREFIX_LIFETIME_S: u64 = 30 * 24 * 3600;
/// What neighbours must have sent, so that it was sent on this link (RFC 4861).
const LINK_HOP_LIMIT: u8 = 255;
/// What guests are told to send with.
const HOP_LIMIT: u8 = 64;
/// The least MTU that IPv6 has (RFC 8200 section 5).
pub const MTU_MIN: u16 = 1280;

/// What one interface is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    pub subnet: Ipv6Net,
    pub mtu: u16,
    pub dhcp: dhcp::Binding,
}

impl Binding {
    /// `None`: the interface has no IPv6.
    pub fn of(interface: &Interface) -> Option<Self> {
        let dhcp = dhcp::Binding {
            addresses: interface.ipv6.clone(),
            // As over IPv4: whoever names no resolver is told ours.
            dns: interface
                .services
                .dns
                .iter()
                .filter(|_| interface.dhcp.dns.is_empty())
                .map(|_| ADDRESS6)
                .collect(),
            domain: interface.dhcp.domain.clone(),
        };
        Some(Self { subnet: interface.subnet6?, mtu: interface.dhcp.mtu, dhcp })
    }
}

/// The router of one interface's link.
pub struct Router {
    binding: Binding,
    /// When it speaks unasked.
    due: Duration,
    initial: u8,
}

impl Router {
    pub fn new(binding: Binding, now: Duration) -> Self {
        Self { binding, due: now + BEGINS_AFTER, initial: INITIAL }
    }

    /// What has changed is told soon.
    pub fn replace(&mut self, binding: Binding, now: Duration) {
        if self.binding != binding {
            *self = Self::new(binding, now);
        }
    }

    pub fn next_due(&self) -> Duration {
        self.due
    }

    pub fn elapse(&mut self, wire: &mut Wire, counters: &mut Counters, now: Duration) {
        if now < self.due {
            return;
        }
        self.initial = self.initial.saturating_sub(1);
        self.due = now + if self.initial > 0 { INITIAL_INTERVAL } else { INTERVAL };
        counters.routers_told += 1;
        wire.push(self.advertisement(ALL_NODES));
    }

    /// Takes an IPv6 packet of the guest's.
    pub fn receive(&self, packet: &[u8], wire: &mut Wire, counters: &mut Counters) {
        match Question::parse(packet) {
            Some(Question::Router { asker }) => {
                counters.routers_told += 1;
                // Who has no address yet is told with all.
                let to = if asker.is_unspecified() { ALL_NODES } else { asker };
                wire.push(self.advertisement(to));
            }
            Some(Question::Dhcp { asker, message }) => {
                match dhcp::answer(&self.binding.dhcp, message) {
                    Ok(reply) => {
                        counters.dhcp6_answered += 1;
                        let (from, to) = ((ROUTER, dhcp::SERVER_PORT), (asker, dhcp::CLIENT_PORT));
                        wire.push(wire::datagram(from.into(), to.into(), &reply));
                    }
                    Err(_) => counters.dhcp6_ignored += 1,
                }
            }
            None => counters.ignored += 1,
        }
    }

    fn advertisement(&self, to: Ipv6Addr) -> Vec<u8> {
        let Binding { subnet, mtu, .. } = &self.binding;
        let seconds = smoltcp::time::Duration::from_secs;
        let message = Icmpv6Repr::Ndisc(NdiscRepr::RouterAdvert {
            hop_limit: HOP_LIMIT,
            flags: NdiscRouterFlags::MANAGED | NdiscRouterFlags::OTHER,
            router_lifetime: seconds(ROUTER_LIFETIME_S),
            reachable_time: smoltcp::time::Duration::ZERO,
            retrans_time: smoltcp::time::Duration::ZERO,
            lladdr: Some(EthernetAddress(ebpf::GATEWAY_MAC).into()),
            mtu: Some((*mtu).into()),
            prefix_info: Some(NdiscPrefixInformation {
                prefix_len: subnet.prefix_len(),
                flags: NdiscPrefixInfoFlags::ON_LINK,
                valid_lifetime: seconds(PREFIX_LIFETIME_S),
                preferred_lifetime: seconds(PREFIX_LIFETIME_S),
                prefix: subnet.network(),
            }),
        });
        let ip = Ipv6Repr {
            src_addr: ROUTER,
            dst_addr: to,
            next_header: IpProtocol::Icmpv6,
            payload_len: message.buffer_len(),
            hop_limit: LINK_HOP_LIMIT,
        };
        let mut bytes = vec![0; IPV6_HEADER_LEN + ip.payload_len];
        ip.emit(&mut Ipv6Packet::new_unchecked(bytes.as_mut_slice()));
        let mut payload = Icmpv6Packet::new_unchecked(&mut bytes[IPV6_HEADER_LEN..]);
        message.emit(&ROUTER, &to, &mut payload, &ChecksumCapabilities::default());
        bytes
    }
}

/// What a packet asks, once its layers were found whole.
#[derive(Debug, PartialEq, Eq)]
enum Question<'a> {
    Router { asker: Ipv6Addr },
    Dhcp { asker: Ipv6Addr, message: &'a [u8] },
}

impl<'a> Question<'a> {
    fn parse(packet: &'a [u8]) -> Option<Self> {
        let ip = Ipv6Packet::new_checked(packet).ok()?;
        let (asker, to) = (ip.src_addr(), ip.dst_addr());
        let payload = packet.get(IPV6_HEADER_LEN..)?.get(..usize::from(ip.payload_len()))?;
        match ip.next_header() {
            IpProtocol::Icmpv6 if ip.hop_limit() == LINK_HOP_LIMIT => {
                let message = Icmpv6Packet::new_checked(payload).ok()?;
                let asks = message.msg_type() == Icmpv6Message::RouterSolicit
                    && message.msg_code() == 0
                    && message.verify_checksum(&asker, &to);
                let on_link = asker.is_unspecified() || asker.is_unicast_link_local();
                (asks && on_link).then_some(Self::Router { asker })
            }
            IpProtocol::Udp if asker.is_unicast_link_local() => {
                let udp = UdpPacket::new_checked(payload).ok()?;
                let ports = (udp.src_port(), udp.dst_port());
                let whole = udp.verify_checksum(&asker.into(), &to.into());
                let asks = ports == (dhcp::CLIENT_PORT, dhcp::SERVER_PORT) && whole;
                let length = usize::from(udp.len());
                asks.then(|| Self::Dhcp { asker, message: &payload[8..length] })
            }
            _ => None,
        }
    }
}

#[cfg(test)]
#[path = "router_tests.rs"]
mod tests;
