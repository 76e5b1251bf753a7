//! What arrives, behind one gate.
//!
//! [`Frame`] hands out bytes or nothing; [`Packet::parse`] is the only reader of
//! hostile headers. After it no accessor can fail.
//!
//! ```text
//!   0            6            12   14                    34 (if no options)
//!   | destination | source     |type| IPv4 header          | TCP, UDP, ICMP …
//!   └────────────────── Head ────────────────────────────┘
//! ```

use crate::flow::{TCP, UDP};
use crate::ip::{Ip, V6};
use crate::reason::Reason;

/// The bytes of a frame, wherever they are: an skb, an XDP buffer, a slice.
pub trait Frame {
    fn size(&self) -> u32;

    /// Bytes of payload in each packet of a superframe; 0: it is none.
    #[inline(always)]
    fn segment(&self) -> u32 {
        0
    }

    /// `N` bytes from `offset`, or `None` where the frame ends before.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;
}

impl Frame for [u8] {
    fn size(&self) -> u32 {
        self.len() as u32
    }

    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        self.get(start..start.checked_add(N)?)?.try_into().ok()
    }
}

pub const HEAD_LEN: usize = 34;
pub const ETHERNET_LEN: u32 = 14;
const IPV4_LEN_MIN: u32 = 20;
pub const HEAD6_LEN: usize = 54;
/// IPv6 extension headers that are walked through; more are refused.
pub const EXTENSIONS_MAX: u32 = 4;
const TCP_LEN_MIN: u32 = 20;
const UDP_LEN: u32 = 8;
const ICMP_LEN: u32 = 8;

pub const ARP: u16 = 0x0806;
pub const IPV4: u16 = 0x0800;
pub const IPV6: u16 = 0x86dd;
/// 802.1Q and 802.1ad, where the device left the tag in the frame.
pub const VLAN: u16 = 0x8100;
pub const VLAN_OUTER: u16 = 0x88a8;

const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

#[inline(always)]
pub const fn be16(high: u8, low: u8) -> u16 {
    u16::from_be_bytes([high, low])
}

/// An address as a number, for a comparison without a call.
#[inline(always)]
pub const fn mac_number(m: [u8; 6]) -> u64 {
    u64::from_be_bytes([0, 0, m[0], m[1], m[2], m[3], m[4], m[5]])
}

/// The bytes of a hardware address, from its number.
#[inline(always)]
pub const fn mac_bytes(number: u64) -> [u8; 6] {
    let [_, _, a, b, c, d, e, f] = number.to_be_bytes();
    [a, b, c, d, e, f]
}

/// The Ethernet header and the fixed part of the IPv4 header, in the words in
/// which they are read and written: a byte at a time costs the programs a
/// quarter of their time.
///
/// ```text
///    0             8         12    14          18             22          26     30     34
///   | 6 destination + 6 source | type | first: 4 | second: 4 | third: 4 | source | dest. |
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head {
    /// Bytes 0 to 8: the destination's hardware address, and two of the source's.
    pub macs: u64,
    /// Bytes 8 to 12: the other four.
    pub macs_rest: u32,
    pub ether_type: u16,
    /// Version, header length, type of service, total length.
    pub first: u32,
    /// Identifier, flags and fragment offset.
    pub second: u32,
    /// Time to live, protocol, checksum.
    pub third: u32,
    pub source: u32,
    pub destination: u32,
}

impl Head {
    pub fn of(b: &[u8; HEAD_LEN]) -> Self {
        let word = |at: usize| u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        Self {
            macs: u64::from(word(0)) << 32 | u64::from(word(4)),
            macs_rest: word(8),
            ether_type: be16(b[12], b[13]),
            first: word(14),
            second: word(18),
            third: word(22),
            source: word(26),
            destination: word(30),
        }
    }

    pub fn bytes(&self) -> [u8; HEAD_LEN] {
        let mut b = [0; HEAD_LEN];
        b[..8].copy_from_slice(&self.macs.to_be_bytes());
        b[8..12].copy_from_slice(&self.macs_rest.to_be_bytes());
        b[12..14].copy_from_slice(&self.ether_type.to_be_bytes());
        let words = [self.first, self.second, self.third, self.source, self.destination];
        for (at, word) in (14..).step_by(4).zip(words) {
            b[at..at + 4].copy_from_slice(&word.to_be_bytes());
        }
        b
    }

    #[inline(always)]
    pub fn destination_mac(&self) -> u64 {
        self.macs >> 16
    }

    #[inline(always)]
    pub fn source_mac(&self) -> u64 {
        (self.macs & 0xffff) << 32 | self.macs_rest as u64
    }

    #[inline(always)]
    pub fn set_macs(&mut self, destination: u64, source: u64) {
        self.macs = destination << 16 | source >> 32;
        self.macs_rest = source as u32;
    }

    #[inline(always)]
    pub fn header_len(&self) -> u32 {
        (self.first >> 24 & 0x0f) * 4
    }

    #[inline(always)]
    pub fn ttl(&self) -> u8 {
        (self.third >> 24) as u8
    }

    #[inline(always)]
    pub fn protocol(&self) -> u8 {
        (self.third >> 16) as u8
    }
}

/// The Ethernet and IPv6 headers.
///
/// ```text
///    0             8         12    14         18                 22          38     54
///   | 6 destination + 6 source | type | first: 4 | len, next, hop: 4 | source: 16 | dest. |
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Head6 {
    pub macs: u64,
    pub macs_rest: u32,
    pub ether_type: u16,
    /// Version, traffic class, flow label.
    pub first: u32,
    /// Payload length, next header, hop limit.
    pub second: u32,
    pub source: V6,
    pub destination: V6,
}

impl Head6 {
    pub fn of(b: &[u8; HEAD6_LEN]) -> Self {
        let word = |at: usize| u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
        let long = |at: usize| u64::from(word(at)) << 32 | u64::from(word(at + 4));
        Self {
            macs: long(0),
            macs_rest: word(8),
            ether_type: be16(b[12], b[13]),
            first: word(14),
            second: word(18),
            source: V6 { high: long(22), low: long(30) },
            destination: V6 { high: long(38), low: long(46) },
        }
    }

    pub fn bytes(&self) -> [u8; HEAD6_LEN] {
        let mut b = [0; HEAD6_LEN];
        b[..8].copy_from_slice(&self.macs.to_be_bytes());
        b[8..12].copy_from_slice(&self.macs_rest.to_be_bytes());
        b[12..14].copy_from_slice(&self.ether_type.to_be_bytes());
        b[14..18].copy_from_slice(&self.first.to_be_bytes());
        b[18..22].copy_from_slice(&self.second.to_be_bytes());
        b[22..38].copy_from_slice(&self.source.bytes());
        b[38..].copy_from_slice(&self.destination.bytes());
        b
    }

    #[inline(always)]
    pub fn destination_mac(&self) -> u64 {
        self.macs >> 16
    }

    #[inline(always)]
    pub fn source_mac(&self) -> u64 {
        (self.macs & 0xffff) << 32 | self.macs_rest as u64
    }

    #[inline(always)]
    pub fn set_macs(&mut self, destination: u64, source: u64) {
        self.macs = destination << 16 | source >> 32;
        self.macs_rest = source as u32;
    }

    #[inline(always)]
    pub fn payload_len(&self) -> u32 {
        self.second >> 16
    }

    #[inline(always)]
    pub fn next_header(&self) -> u8 {
        (self.second >> 8) as u8
    }

    #[inline(always)]
    pub fn hop_limit(&self) -> u8 {
        self.second as u8
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Other = 0,
    Tcp = 1,
    Udp = 2,
    /// A question that has an answer of its own type: echo, timestamp, and the like.
    IcmpRequest = 3,
    IcmpReply = 4,
    /// About a packet whose beginning it carries.
    IcmpError = 5,
    /// IPv6: of the link alone, between neighbours, routers and listeners.
    Link = 6,
    /// A fragment that is not the first: it has no transport header.
    Later = 7,
}

/// Which part of a datagram a packet is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Part {
    Whole = 0,
    First = 1,
    Later = 2,
}

/// The packet that an ICMP error is about, as it was seen where the error was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inner<A = u32> {
    /// Where its IP header begins in the frame.
    pub offset: u32,
    /// Of its IPv4 header.
    pub checksum: u16,
    pub source: A,
    pub destination: A,
    pub protocol: u8,
    pub source_port: u16,
    pub destination_port: u16,
}

/// An IP packet that passed the gate: every header that is read later lies inside the frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet<A = u32> {
    pub source: A,
    pub destination: A,
    pub protocol: u8,
    pub ttl: u8,
    pub kind: Kind,
    pub tcp_flags: u8,
    /// The three numbers below are a fragment's only.
    pub part: Part,
    /// For ICMP requests the identifier is the sender's port and the other is 0,
    /// for replies the other way round: requests of both sides never meet.
    pub source_port: u16,
    pub destination_port: u16,
    /// What a rule sees: destination port, or ICMP type and code.
    pub detail: u16,
    /// Where the transport header begins.
    pub transport: u32,
    /// Its bytes from the IP header on; of a superframe, all of them.
    pub size: u32,
    /// Its identification, and which bytes of the datagram's data it has.
    pub fragment_id: u32,
    pub at: u32,
    pub end: u32,
}

impl Packet {
    /// Reads the headers into `self`, which is only then worth looking at.
    #[inline(always)]
    pub fn parse<F: Frame + ?Sized>(&mut self, frame: &F, head: &Head) -> Result<(), Reason> {
        let header_len = head.header_len();
        let total_len = head.first & 0xffff;
        let sane = head.first >> 28 == 4
            && header_len >= IPV4_LEN_MIN
            && total_len >= header_len
            && total_len <= frame.size().saturating_sub(ETHERNET_LEN);
        if !sane {
            return Err(Reason::Malformed);
        }
        self.source = head.source;
        self.destination = head.destination;
        self.protocol = head.protocol();
        self.ttl = head.ttl();
        self.kind = Kind::Other;
        self.tcp_flags = 0;
        self.source_port = 0;
        self.destination_port = 0;
        self.detail = 0;
        self.transport = ETHERNET_LEN + header_len;
        self.size = total_len;
        self.part = Part::Whole;
        let len = total_len - header_len;
        // More fragments follow, or this is not the first one.
        if head.second & 0x3fff != 0 {
            let (id, at) = (head.second >> 16, (head.second & 0x1fff) * 8);
            self.be_part(id, at, head.second & 0x2000 != 0, len)?;
        }
        self.parse_parts(frame, len)
    }
}

impl<A: Ip> Packet<A> {
    /// The transport header, which a first fragment must have whole and a later one must
    /// leave alone.
    #[inline(always)]
    fn parse_parts<F: Frame + ?Sized>(&mut self, frame: &F, len: u32) -> Result<(), Reason> {
        if self.part == Part::Later {
            self.kind = Kind::Later;
            let writes_header = self.protocol == TCP && self.at < TCP_LEN_MIN;
            return if writes_header { Err(Reason::FragmentTiny) } else { Ok(()) };
        }
        let parsed = self.parse_transport(frame, len);
        if self.part == Part::Whole {
            return parsed;
        }
        match (parsed, self.kind) {
            (Err(Reason::Malformed), _) => Err(Reason::FragmentTiny),
            (Ok(()), Kind::IcmpError | Kind::Link) => Err(Reason::Fragment),
            (parsed, _) => parsed,
        }
    }

    #[inline(always)]
    fn parse_transport<F: Frame + ?Sized>(&mut self, frame: &F, len: u32) -> Result<(), Reason> {
        let minimum = match self.protocol {
            TCP => TCP_LEN_MIN,
            UDP => UDP_LEN,
            icmp if icmp == A::ICMP => ICMP_LEN,
            _ => return Ok(()),
        };
        if len < minimum {
            return Err(Reason::Malformed);
        }
        let h: [u8; 8] = frame.load(self.transport).ok_or(Reason::Malformed)?;
        let (first, second, third) = (be16(h[0], h[1]), be16(h[2], h[3]), be16(h[4], h[5]));
        if self.protocol == A::ICMP {
            self.kind = A::icmp_kind(h[0])?;
            self.detail = first;
            match self.kind {
                Kind::IcmpRequest => self.source_port = third,
                Kind::IcmpReply => self.destination_port = third,
                _ => {}
            }
            return Ok(());
        }
        self.source_port = first;
        self.destination_port = second;
        self.detail = second;
        if self.protocol == UDP {
            self.kind = Kind::Udp;
            return if u32::from(third) < UDP_LEN { Err(Reason::Malformed) } else { Ok(()) };
        }
        self.kind = Kind::Tcp;
        let h: [u8; 2] = frame.load(self.transport + 12).ok_or(Reason::Malformed)?;
        let tcp_len = u32::from(h[0] >> 4) * 4;
        if tcp_len < TCP_LEN_MIN || tcp_len > len {
            return Err(Reason::Malformed);
        }
        self.tcp_flags = h[1];
        Ok(())
    }

    /// Whether it, or each packet of a superframe, has more than `mtu` bytes.
    #[inline(always)]
    pub fn exceeds<F: Frame + ?Sized>(&self, frame: &F, mtu: u16) -> bool {
        let mtu = u32::from(mtu);
        if self.size <= mtu {
            return false;
        }
        let segment = frame.segment();
        let transport_len = match self.kind {
            Kind::Tcp => {
                let h: [u8; 2] = frame.load(self.transport + 12).unwrap_or([0xf0, 0]);
                u32::from(h[0] >> 4) * 4
            }
            _ => UDP_LEN,
        };
        segment == 0 || self.transport - ETHERNET_LEN + transport_len + segment > mtu
    }

    #[inline(always)]
    pub fn opens_tcp(&self) -> bool {
        self.kind == Kind::Tcp && self.tcp_flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Whether it may lie in the midst of a connection: it acknowledges, and neither
    /// begins nor ends one.
    #[inline(always)]
    pub fn continues_tcp(&self) -> bool {
        self.kind == Kind::Tcp && self.tcp_flags & (SYN | ACK | RST | FIN) == ACK
    }

    /// Whether a RST may answer it by the number that it acknowledges.
    #[inline(always)]
    pub fn may_be_reset(&self) -> bool {
        self.kind == Kind::Tcp && self.tcp_flags & (SYN | ACK | RST) == ACK
    }

    /// Whether a TCP endpoint may have sent it at all: not what scans are made of.
    #[inline(always)]
    pub fn is_sound_tcp(&self) -> bool {
        let flags = self.tcp_flags & (SYN | ACK | RST | FIN);
        let one = flags & !ACK;
        // One of SYN, RST and FIN at most, and FIN never without an acknowledgement.
        let alone = one & one.wrapping_sub(1) == 0;
        self.kind == Kind::Tcp && alone && (flags & ACK != 0 || flags == SYN || flags == RST)
    }

    /// Whether a flow may begin with this packet.
    #[inline(always)]
    pub fn opens_flow(&self) -> bool {
        match self.kind {
            Kind::Tcp => self.opens_tcp(),
            Kind::Udp | Kind::IcmpRequest | Kind::Other => true,
            Kind::IcmpReply | Kind::IcmpError | Kind::Link | Kind::Later => false,
        }
    }

    #[inline(always)]
    pub fn is_fin(&self) -> bool {
        self.tcp_flags & FIN != 0
    }

    #[inline(always)]
    pub fn is_rst(&self) -> bool {
        self.tcp_flags & RST != 0
    }

    #[inline(always)]
    pub fn is_dhcp_reply(&self) -> bool {
        self.kind == Kind::Udp && self.source_port == 67 && self.destination_port == 68
    }

    #[inline(always)]
    pub fn is_dhcp_request(&self) -> bool {
        self.kind == Kind::Udp && self.source_port == 68 && self.destination_port == 67
    }
}

impl Packet<V6> {
    /// Reads the headers into `self`, which is only then worth looking at.
    #[inline(always)]
    pub fn parse6<F: Frame + ?Sized>(&mut self, frame: &F, head: &Head6) -> Result<(), Reason> {
        let end = head.payload_len() + HEAD6_LEN as u32;
        // A jumbogram has no length here, and no link of ours takes one.
        if head.first >> 28 != 6 || head.payload_len() == 0 || end > frame.size() {
            return Err(Reason::Malformed);
        }
        self.source = head.source;
        self.destination = head.destination;
        self.ttl = head.hop_limit();
        self.kind = Kind::Other;
        self.tcp_flags = 0;
        self.source_port = 0;
        self.destination_port = 0;
        self.detail = 0;
        self.protocol = head.next_header();
        self.transport = HEAD6_LEN as u32;
        self.size = end - ETHERNET_LEN;
        self.part = Part::Whole;
        self.skip_extensions(frame, end)?;
        if self.transport > end {
            return Err(Reason::Malformed);
        }
        self.parse_parts(frame, end - self.transport)
    }

    /// Finds the transport header (RFC 8200, section 4).
    #[inline(always)]
    fn skip_extensions<F: Frame + ?Sized>(&mut self, frame: &F, end: u32) -> Result<(), Reason> {
        let mut protocol = self.protocol;
        let mut at = self.transport;
        for n in 0..=EXTENSIONS_MAX {
            match protocol {
                // Options for every hop come first, or not at all.
                HOP_BY_HOP if n == 0 => {}
                HOP_BY_HOP => return Err(Reason::Malformed),
                DESTINATION_OPTIONS => {}
                FRAGMENT if self.part == Part::Whole => {
                    protocol = self.parse_fragment(frame, at, end)?;
                    at += FRAGMENT_LEN;
                    if self.part != Part::Later {
                        continue;
                    }
                    self.protocol = protocol;
                    self.transport = at;
                    return Ok(());
                }
                FRAGMENT => return Err(Reason::Malformed),
                // It would send the packet where no rule was asked about.
                ROUTING => return Err(Reason::ExtensionHeader),
                _ => {
                    self.protocol = protocol;
                    self.transport = at;
                    return Ok(());
                }
            }
            let h: [u8; 2] = frame.load(at).ok_or(Reason::Malformed)?;
            protocol = h[0];
            at += (u32::from(h[1]) + 1) * 8;
        }
        Err(Reason::ExtensionHeader)
    }

    /// The fragment header at `at`: what follows it. One that says that the packet is whole
    /// says nothing (RFC 6946).
    #[inline(always)]
    fn parse_fragment<F: Frame + ?Sized>(
        &mut self,
        frame: &F,
        at: u32,
        end: u32,
    ) -> Result<u8, Reason> {
        let h: [u8; 8] = frame.load(at).ok_or(Reason::Malformed)?;
        let [next, _, o0, o1, i0, i1, i2, i3] = h;
        let place = be16(o0, o1);
        if place & 0xfff9 != 0 {
            let id = u32::from_be_bytes([i0, i1, i2, i3]);
            let len = end.saturating_sub(at + FRAGMENT_LEN);
            self.be_part(id, u32::from(place & 0xfff8), place & 1 != 0, len)?;
        }
        Ok(next)
    }

    #[inline(always)]
    pub fn is_dhcp6_reply(&self) -> bool {
        self.kind == Kind::Udp && self.source_port == 547 && self.destination_port == 546
    }

    #[inline(always)]
    pub fn is_dhcp6_request(&self) -> bool {
        self.kind == Kind::Udp && self.source_port == 546 && self.destination_port == 547
    }
}

impl Inner<V6> {
    /// Reads the packet inside the ICMPv6 error `packet` into `self`. One with
    /// extension headers belongs to no flow.
    #[inline(always)]
    pub fn parse6<F: Frame + ?Sized>(
        &mut self,
        frame: &F,
        packet: &Packet<V6>,
    ) -> Result<(), Reason> {
        let offset = packet.transport + ICMP_LEN;
        let h: [u8; 8] = frame.load(offset).ok_or(Reason::Unrelated)?;
        if h[0] >> 4 != 6 {
            return Err(Reason::Unrelated);
        }
        let source: [u8; 16] = frame.load(offset + 8).ok_or(Reason::Unrelated)?;
        let destination: [u8; 16] = frame.load(offset + 24).ok_or(Reason::Unrelated)?;
        self.offset = offset;
        self.checksum = 0;
        self.source = V6::of(&source);
        self.destination = V6::of(&destination);
        self.protocol = h[6];
        let mut t: [u8; 8] = frame.load(offset + 40).ok_or(Reason::Unrelated)?;
        if h[6] == FRAGMENT {
            // A later fragment carries no ports.
            if be16(t[2], t[3]) & 0xfff8 != 0 {
                return Err(Reason::Unrelated);
            }
            self.protocol = t[0];
            t = frame.load(offset + 48).ok_or(Reason::Unrelated)?;
        }
        (self.source_port, self.destination_port) = inner_ports::<V6>(self.protocol, &t)?;
        Ok(())
    }
}

pub const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const FRAGMENT_LEN: u32 = 8;
pub const DESTINATION_OPTIONS: u8 = 60;

/// The ports of a packet inside an ICMP error, from its transport header.
#[inline(always)]
fn inner_ports<A: Ip>(protocol: u8, t: &[u8; 8]) -> Result<(u16, u16), Reason> {
    Ok(match protocol {
        TCP | UDP => (be16(t[0], t[1]), be16(t[2], t[3])),
        icmp if icmp == A::ICMP => match A::icmp_kind(t[0]) {
            Ok(Kind::IcmpRequest) => (be16(t[4], t[5]), 0),
            Ok(Kind::IcmpReply) => (0, be16(t[4], t[5])),
            _ => return Err(Reason::Unrelated),
        },
        _ => (0, 0),
    })
}

impl Inner {
    /// Reads the packet inside the ICMP error `packet` into `self`.
    #[inline(always)]
    pub fn parse<F: Frame + ?Sized>(&mut self, frame: &F, packet: &Packet) -> Result<(), Reason> {
        let offset = packet.transport + ICMP_LEN;
        let h: [u8; 20] = frame.load(offset).ok_or(Reason::Unrelated)?;
        let header_len = u32::from(h[0] & 0x0f) * 4;
        // A later fragment carries no ports.
        let later = be16(h[6], h[7]) & 0x1fff != 0;
        if h[0] >> 4 != 4 || header_len < IPV4_LEN_MIN || later {
            return Err(Reason::Unrelated);
        }
        self.offset = offset;
        self.checksum = be16(h[10], h[11]);
        self.source = u32::from_be_bytes([h[12], h[13], h[14], h[15]]);
        self.destination = u32::from_be_bytes([h[16], h[17], h[18], h[19]]);
        self.protocol = h[9];
        let t: [u8; 8] = frame.load(offset + header_len).ok_or(Reason::Unrelated)?;
        (self.source_port, self.destination_port) = inner_ports::<u32>(h[9], &t)?;
        Ok(())
    }
}
