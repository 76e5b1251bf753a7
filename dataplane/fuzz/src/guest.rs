//! A hostile guest at its tap: what it may do to its interface's responder, and what
//! must hold whatever it does.
//!
//! ```text
//! input = what the interface is (1 byte), then deeds
//! deed  = kind (1)  how long its bytes are (2)  bytes
//! kind  = what (2 bits)  whether many times (1)  nothing (1)  time that passes after it (4)
//! ```
//! Guessing checksums and sequence numbers would take for ever, so a deed may leave
//! them to us; it may as well send its frame as it is.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use model::{InterfaceId, Mac, VpcId};
use rpc::dataplane::{Device, Dns, Interface, PrivateAddress, Tokens};
use smoltcp::wire::{
    Icmpv6Packet, IpAddress, IpProtocol, Ipv4Packet, Ipv6Packet, TcpPacket, TcpSeqNumber, UdpPacket,
};

use super::heap;
use super::respond::dns::Action;
use super::respond::metadata::TokenKey;
use super::respond::{Responders, Served};

pub const MAC: Mac = Mac([2, 0, 0, 0, 0, 7]);
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
pub const SECONDARY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 6);
pub const ADDRESS6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 5);
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
const IFINDEX: u32 = 11;

/// What an interface may hold on the heap, of all that its guest and name servers said:
/// the sum of what the limits of its services allow, and what bookkeeping adds.
const HELD_BYTES_MAX: isize = 3 << 20;

/// Frames that one frame of the guest's leads to, or one look at the clock.
const ANSWERS_MAX: usize = 256;

/// Looks at the clock after which a responder has nothing more to do at that time.
const LOOKS_MAX: usize = 8;

/// Frames of one input; more find nothing new and take longer.
const FRAMES_MAX: usize = 1500;
/// How many a deed sends that sends many.
const MANY: u16 = 40;

// Of a deed's kind.
pub const AS_IT_IS: u8 = 0;
pub const SET_RIGHT: u8 = 1;
/// Set right, and the next segment of its connection.
pub const CONTINUED: u8 = 2;
/// What a name server answers to the oldest question.
pub const HEARD: u8 = 3;
pub const MANY_TIMES: u8 = 4;

/// What a deed is: its kind and bytes, as an input has it.
pub fn deed(kind: u8, bytes: &[u8]) -> Vec<u8> {
    [&[kind], &(bytes.len() as u16).to_be_bytes()[..], bytes].concat()
}

/// What fuzzing tries.
pub fn hold(input: &[u8]) {
    let Some((kind, mut rest)) = input.split_first() else { return };
    let mut host = Host::new(*kind);
    while let [kind, high, low, tail @ ..] = rest {
        let length = usize::from(u16::from_be_bytes([*high, *low])).min(tail.len());
        host.suffer(*kind, &tail[..length]);
        rest = &tail[length..];
    }
}

/// The responders, and what of the talk decides how it may go on.
pub struct Host {
    responders: Responders,
    mtu: usize,
    now: Duration,
    frames: usize,
    /// Held before there were responders.
    held_before: isize,
    /// What each connection's next segment bears: sequence and acknowledgement.
    flows: BTreeMap<(IpAddr, u16), (i32, i32)>,
    /// Questions in flight to name servers.
    asked: BTreeMap<u64, Vec<u8>>,
    /// What the last TCP segment with a payload said.
    pub told: Vec<u8>,
}

impl Host {
    /// `kind` says what the interface has.
    pub fn new(kind: u8) -> Self {
        let has = |bit: u8| kind >> bit & 1 == 1;
        let interface = interface(kind);
        let served = Served::try_from(&interface).expect("a lawful interface");
        let servers = ["192.0.2.1:53", "192.0.2.2:53"].map(|s| s.parse().unwrap());
        let servers = if has(7) { vec![] } else { servers.to_vec() };
        let mut n = 0x9e37_79b9_7f4a_7c15_u128;
        let mut random = move || {
            n = n.wrapping_mul(0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645) + 7;
            n >> 32
        };
        let now = Duration::from_secs(100);
        let held_before = heap::held();
        let mut responders = Responders::new(TokenKey::new([5; 32]), random);
        responders.booted_at = Duration::from_secs(1_800_000_000);
        responders.configure(vec![(IFINDEX, served)], servers, &mut random, now);
        Self {
            responders,
            mtu: interface.dhcp.mtu.into(),
            now,
            frames: 0,
            held_before,
            flows: BTreeMap::new(),
            asked: BTreeMap::new(),
            told: Vec::new(),
        }
    }

    /// One deed.
    pub fn suffer(&mut self, kind: u8, bytes: &[u8]) {
        let many = kind & MANY_TIMES != 0;
        match kind & 3 {
            HEARD => {
                for _ in 0..if many { MANY } else { 1 } {
                    self.hear(bytes);
                }
            }
            // Which number of the frame counts up from one to the next.
            what if many => {
                let [high, low, frame @ ..] = bytes else { return };
                let at = usize::from(u16::from_be_bytes([*high, *low]));
                let mut frame = frame.to_vec();
                for _ in 0..MANY {
                    self.send(what, frame.clone());
                    if let Some(number) = frame.get_mut(at..at + 2) {
                        let next = u16::from_be_bytes([number[0], number[1]]).wrapping_add(1);
                        number.copy_from_slice(&next.to_be_bytes());
                    }
                }
            }
            what => self.send(what, bytes.to_vec()),
        }
        // From 3 ms to four hours.
        let passes = kind >> 4;
        if passes > 0 {
            self.now += Duration::from_millis(3_u64.pow(passes.into()));
        }
        self.come_to_rest();
        let held = heap::held() - self.held_before;
        assert!(held <= HELD_BYTES_MAX, "{held} bytes are held");
    }

    fn send(&mut self, what: u8, mut frame: Vec<u8>) {
        self.frames += 1;
        if self.frames > FRAMES_MAX || frame.len() < 6 {
            return;
        }
        if what != AS_IT_IS {
            set_right(&mut frame);
        }
        if what == CONTINUED {
            self.go_on(&mut frame);
            set_right(&mut frame);
        }
        // As the program on the tap addresses it to us.
        frame[..6].copy_from_slice(&ebpf::punt_mac(IFINDEX));
        let mut out = Vec::new();
        self.responders.receive(&frame, self.now, &mut out);
        self.act(&mut out);
        self.take(&out);
    }

    /// A name server's answer: the header's id and the question are the right ones.
    fn hear(&mut self, bytes: &[u8]) {
        let Some((token, question)) = self.asked.first_key_value() else { return };
        let token = *token;
        let (header, records) = bytes.split_at(bytes.len().min(10));
        let name = question[12..].iter().position(|b| *b == 0).map_or(12, |end| 12 + end + 5);
        let mut message = question[..2].to_vec();
        message.extend(header);
        message.resize(12, 0);
        message.extend(&question[12..name]);
        message.extend(records);
        let mut out = Vec::new();
        let message = Some(message.as_slice()).filter(|_| !bytes.is_empty());
        self.responders.hear(token, message, self.now);
        self.act(&mut out);
        self.take(&out);
    }

    /// As the thread does.
    fn act(&mut self, out: &mut Vec<Vec<u8>>) {
        while let Some(action) = self.responders.next_action(self.now, out) {
            match action {
                Action::Send { token, message, .. } => {
                    assert!(self.asked.insert(token, message).is_none(), "a token twice");
                }
                Action::Close { token } => {
                    assert!(self.asked.remove(&token).is_some(), "nothing to close");
                }
                Action::Answer { .. } => panic!("an answer is no deed of the thread's"),
            }
        }
    }

    /// Nothing is due for ever at one time: the thread would do nothing else.
    fn come_to_rest(&mut self) {
        for _ in 0..LOOKS_MAX {
            let mut out = Vec::new();
            self.responders.elapse(self.now, &mut out);
            self.act(&mut out);
            self.take(&out);
            if self.responders.next_due(self.now).is_none_or(|due| due > self.now) {
                return;
            }
        }
        panic!("it does not come to rest");
    }

    fn take(&mut self, out: &[Vec<u8>]) {
        assert!(out.len() <= ANSWERS_MAX, "{} frames at once", out.len());
        for frame in out {
            self.check(frame);
        }
    }

    /// What is sent is addressed to the guest, and whole; by another's parser.
    fn check(&mut self, frame: &[u8]) {
        assert_eq!(frame[..6], ebpf::punt_mac(IFINDEX), "to the guest");
        assert_eq!(frame[6..12], ebpf::GATEWAY_MAC, "from its router");
        let packet = &frame[14..];
        assert!(packet.len() <= self.mtu, "{} bytes, and an MTU of {}", packet.len(), self.mtu);
        let sliced = SlicedPacket::from_ethernet(frame).expect("a whole packet");
        let (from, to): (IpAddr, IpAddr) = match &sliced.net {
            Some(NetSlice::Ipv4(ip)) => {
                let header = ip.header();
                assert_eq!(usize::from(header.total_len()), packet.len());
                assert!(!header.is_fragmenting_payload(), "in pieces");
                let sum = header.to_header().calc_header_checksum();
                assert_eq!(header.header_checksum(), sum, "of the header");
                (header.source_addr().into(), header.destination_addr().into())
            }
            Some(NetSlice::Ipv6(ip)) => {
                let header = ip.header();
                assert_eq!(usize::from(header.payload_length()) + 40, packet.len());
                (header.source_addr().into(), header.destination_addr().into())
            }
            other => panic!("no IP packet: {other:?}"),
        };
        match sliced.transport.expect("a transport") {
            TransportSlice::Udp(udp) => {
                let header = udp.to_header();
                let sum = match (from, to) {
                    (IpAddr::V4(from), IpAddr::V4(to)) => {
                        header.calc_checksum_ipv4_raw(from.octets(), to.octets(), udp.payload())
                    }
                    (IpAddr::V6(from), IpAddr::V6(to)) => {
                        header.calc_checksum_ipv6_raw(from.octets(), to.octets(), udp.payload())
                    }
                    _ => panic!("both are of one family"),
                };
                assert_eq!(sum, Ok(header.checksum), "of UDP");
                assert_eq!(usize::from(header.length), 8 + udp.payload().len());
            }
            TransportSlice::Tcp(tcp) => {
                let sum = match (from, to) {
                    (IpAddr::V4(from), IpAddr::V4(to)) => {
                        tcp.calc_checksum_ipv4(from.octets(), to.octets())
                    }
                    (IpAddr::V6(from), IpAddr::V6(to)) => {
                        tcp.calc_checksum_ipv6(from.octets(), to.octets())
                    }
                    _ => panic!("both are of one family"),
                };
                assert_eq!(sum, Ok(tcp.checksum()), "of TCP");
                if !tcp.payload().is_empty() {
                    self.told = tcp.payload().to_vec();
                }
                let bytes =
                    tcp.payload().len() as u32 + u32::from(tcp.syn()) + u32::from(tcp.fin());
                let next = tcp.sequence_number().wrapping_add(bytes);
                let numbers = (tcp.acknowledgment_number() as i32, next as i32);
                self.flows.insert((from, tcp.destination_port()), numbers);
            }
            TransportSlice::Icmpv6(icmp) => {
                let (IpAddr::V6(from), IpAddr::V6(to)) = (from, to) else { panic!("over IPv4") };
                assert!(icmp.is_checksum_valid(from.octets(), to.octets()), "of ICMPv6");
            }
            other => panic!("neither UDP, TCP nor ICMPv6: {other:?}"),
        }
        let own = [ADDRESS.into(), SECONDARY.into(), ADDRESS6.into()];
        let of_the_link = match to {
            IpAddr::V4(to) => to.is_broadcast(),
            IpAddr::V6(to) => to.is_unicast_link_local() || to.is_multicast(),
        };
        assert!(own.contains(&to) || of_the_link, "{to} is not the guest's");
    }

    /// Gives a segment the numbers that its connection has come to.
    fn go_on(&mut self, frame: &mut [u8]) {
        let Some((_, to, IpProtocol::Tcp, payload)) = layers(frame) else { return };
        let Ok(mut tcp) = TcpPacket::new_checked(payload) else { return };
        let Some((sequence, next)) = self.flows.get(&(to.into(), tcp.src_port())) else { return };
        tcp.set_seq_number(TcpSeqNumber(*sequence));
        tcp.set_ack_number(TcpSeqNumber(*next));
    }
}

fn interface(kind: u8) -> Interface {
    let has = |bit: u8| kind >> bit & 1 == 1;
    let subnet = "10.0.0.0/24".parse().unwrap();
    let device = Device::Existing { name: "tap".into() };
    let at = (ADDRESS, subnet);
    let mut interface =
        Interface::new(InterfaceId::from_random(7), device, MAC, VpcId::from_random(7), at);
    interface.secondary = vec![PrivateAddress { address: SECONDARY, elastic: None }];
    interface.dhcp.mtu = [576, 1280, 1500, 9001][usize::from(kind & 3)];
    interface.dhcp.hostname = "h".repeat(if has(3) { 63 } else { 5 });
    interface.dhcp.domain = if has(3) { ["d"; 48].join(".") } else { "internal".into() };
    let services = &mut interface.services;
    if has(3) {
        services.ntp = vec![ADDRESS; 4];
        services.netbios = vec![ADDRESS; 4];
        services.netbios_node = Some(2);
    }
    if has(2) {
        interface.dhcp.mtu = interface.dhcp.mtu.max(1280);
        interface.ipv6 = vec![ADDRESS6];
        interface.subnet6 = Some("2001:db8:1::/64".parse().unwrap());
    }
    if !has(4) {
        let names = ["ip-10-0-0-5.r.internal", "i-7.r.internal"].map(str::to_owned).to_vec();
        services.dns = Some(Dns { address: Some(RESOLVER), names });
    }
    if !has(5) {
        let documents = [
            ("meta-data/instance-id", "i-7".to_owned()),
            ("meta-data/public-keys/0", "key".to_owned()),
            ("meta-data/public-keys/0/openssh-key", "ssh-ed25519 AAAA".to_owned()),
            ("user-data", "u".repeat(16 * 1024)),
        ];
        interface.metadata = Some(documents.map(|(path, value)| (path.to_owned(), value)).into());
    }
    if has(6) {
        interface.services.metadata_tokens = Tokens::Optional;
    }
    interface
}

type Layers<'a> = (IpAddress, IpAddress, IpProtocol, &'a mut [u8]);

/// Who sends to whom, and the payload.
fn layers(frame: &mut [u8]) -> Option<Layers<'_>> {
    let (head, packet) = frame.split_at_mut_checked(14)?;
    match head[12..] {
        [8, 0] => {
            let ip = Ipv4Packet::new_checked(&*packet).ok()?;
            let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
            let (protocol, begins) = (ip.next_header(), usize::from(ip.header_len()));
            Some((from, to, protocol, packet.get_mut(begins..)?))
        }
        [0x86, 0xdd] => {
            let ip = Ipv6Packet::new_checked(&*packet).ok()?;
            let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
            Some((from, to, ip.next_header(), packet.get_mut(40..)?))
        }
        _ => None,
    }
}

/// Gives a frame the lengths and checksums that it should have.
fn set_right(frame: &mut [u8]) {
    let Some((head, packet)) = frame.split_at_mut_checked(14) else { return };
    let length = packet.len().min(u16::MAX.into());
    match head[12..] {
        [8, 0] if length >= 20 => {
            let mut ip = Ipv4Packet::new_unchecked(&mut *packet);
            ip.set_total_len(length as u16);
            if ip.check_len().is_ok() {
                ip.fill_checksum();
            }
        }
        [0x86, 0xdd] if length >= 40 => {
            Ipv6Packet::new_unchecked(packet).set_payload_len(length as u16 - 40);
        }
        _ => return,
    }
    let Some((from, to, protocol, payload)) = layers(frame) else { return };
    match protocol {
        IpProtocol::Udp if payload.len() >= 8 => {
            let length = payload.len() as u16;
            let mut udp = UdpPacket::new_unchecked(payload);
            udp.set_len(length);
            udp.fill_checksum(&from, &to);
        }
        IpProtocol::Tcp => {
            if let Ok(mut tcp) = TcpPacket::new_checked(payload) {
                tcp.fill_checksum(&from, &to);
            }
        }
        IpProtocol::Icmpv6 => {
            let (IpAddress::Ipv6(from), IpAddress::Ipv6(to)) = (from, to) else { return };
            if let Ok(mut icmp) = Icmpv6Packet::new_checked(payload) {
                icmp.fill_checksum(&from, &to);
            }
        }
        _ => {}
    }
}
