//! Random IPv6 frames, and what a verdict makes of one, computed apart from the programs.

use std::net::Ipv6Addr;

use dataplane::compile::Tables;
use ebpf::layout::Interface;
use ebpf::packet::{HEAD6_LEN, mac_bytes};
use ebpf::{
    Action, DNS_ADDRESS6, GATEWAY_MAC, METADATA_ADDRESS6, ROUTER_ADDRESS6, TIME_ADDRESS6, V6,
    Verdict, punt_mac,
};
use etherparse::{Icmpv6Type, IpNumber, PacketBuilder, PacketBuilderStep};

use crate::frames::with_flags;
use crate::random::Random;
use crate::world::{PORTS, UPLINK_MAC, any_address6};

/// A frame that may arrive from this guest (or from the uplink: `None`).
pub fn frame(random: &mut Random, from: Option<&Interface>, tables: &Tables) -> Vec<u8> {
    let ends = ends(random, from, tables);
    let mut frame = match random.below(100) {
        0..=17 => on_link(random, &ends, from),
        18..=24 => icmp_error(random, &ends),
        25..=28 => dhcp(random, &ends),
        _ => packet(random, &ends),
    };
    // What only comes whole.
    if random.chance(2) && frame[20] != 44 {
        become_part(random, &mut frame);
    }
    if random.chance(5) {
        let at = random.below(frame.len() as u64) as usize;
        frame[at] ^= 1 << random.below(8);
    }
    if random.chance(3) {
        // The kernel runs no frame that is shorter than its IP header.
        let len = HEAD6_LEN + random.below((frame.len() - HEAD6_LEN) as u64 + 1) as usize;
        frame.truncate(len);
    }
    frame
}

/// The host's own, and one beside them.
const SERVICES6: [V6; 4] = [
    METADATA_ADDRESS6,
    TIME_ADDRESS6,
    DNS_ADDRESS6,
    V6 { high: METADATA_ADDRESS6.high, low: 0x250 },
];

struct Ends {
    source_mac: [u8; 6],
    destination_mac: [u8; 6],
    source: Ipv6Addr,
    destination: Ipv6Addr,
}

fn held(random: &mut Random, ifindex: Option<u32>, tables: &Tables) -> Option<Ipv6Addr> {
    let own = |holder: u32| ifindex.is_none_or(|ifindex| ifindex == holder);
    let all: Vec<V6> = tables
        .holders
        .iter()
        .filter(|(_, h)| own(h.ifindex))
        .map(|(address, _)| *address)
        .collect();
    (!all.is_empty()).then(|| Ipv6Addr::from_bits(random.pick(&all).bits()))
}

fn ends(random: &mut Random, from: Option<&Interface>, tables: &Tables) -> Ends {
    let any = any_address6(random);
    match from {
        Some(interface) => Ends {
            source_mac: if random.chance(97) { interface.mac } else { [2, 0, 0, 0, 9, 9] },
            destination_mac: GATEWAY_MAC,
            source: match held(random, Some(interface.ifindex), tables) {
                Some(own) if random.chance(93) => own,
                _ => any,
            },
            destination: match random.chance(6) {
                true => Ipv6Addr::from_bits(random.pick(&SERVICES6).bits()),
                false => any_address6(random),
            },
        },
        None => Ends {
            source_mac: [2, 0, 0, 0, 8, 8],
            destination_mac: if random.chance(95) { UPLINK_MAC.octets() } else { [0xff; 6] },
            source: any,
            destination: match held(random, None, tables) {
                Some(held) if random.chance(80) => held,
                _ => any_address6(random),
            },
        },
    }
}

fn builder(ends: &Ends, hop_limit: u8) -> PacketBuilderStep<etherparse::IpHeaders> {
    PacketBuilder::ethernet2(ends.source_mac, ends.destination_mac).ipv6(
        ends.source.octets(),
        ends.destination.octets(),
        hop_limit,
    )
}

fn packet(random: &mut Random, ends: &Ends) -> Vec<u8> {
    let hop_limit = if random.chance(96) { 64 } else { random.below(3) as u8 };
    let step = builder(ends, hop_limit);
    let (source, destination) = (random.pick(&PORTS), random.pick(&PORTS));
    let payload = &[0x5a; 24][..random.below(24) as usize];
    let mut frame = Vec::new();
    match random.below(10) {
        0..=4 => {
            let tcp = step.tcp(source, destination, 1, 1000);
            with_flags(random, tcp).write(&mut frame, payload).unwrap();
        }
        5..=7 => step.udp(source, destination).write(&mut frame, payload).unwrap(),
        8 => {
            let kind = random.pick(&[128, 128, 128, 129, 129, 140]);
            let rest = [0, random.below(3) as u8, 0, 1];
            step.icmpv6_raw(kind, 0, rest).write(&mut frame, payload).unwrap();
        }
        _ => {
            let number = random.pick(&[47, 50, 132, 59]);
            step.write(&mut frame, IpNumber(number), &[1; 12]).unwrap();
        }
    }
    if random.chance(12) {
        insert_extensions(random, &mut frame);
    } else if random.chance(35) {
        become_part(random, &mut frame);
    }
    frame
}

/// A piece of the one datagram: mostly what a first or a later one looks like.
fn become_part(random: &mut Random, frame: &mut Vec<u8>) {
    let whole = frame.len() - HEAD6_LEN;
    let even = if random.chance(90) { whole & !7 } else { whole };
    frame.truncate(HEAD6_LEN + even.max(8));
    let at = random.pick(&[1, 1, 1, 2, 2, 3, 6, 180, 0x1fff]) << 3;
    let place: u16 = match random.below(10) {
        0..=3 => 1,
        4 => 0,
        5 | 6 => at | 1,
        _ => at,
    };
    let [p0, p1] = place.to_be_bytes();
    let header = [frame[20], 0, p0, p1, 0, 0, 0, 7];
    frame[20] = 44;
    frame.splice(HEAD6_LEN..HEAD6_LEN, header);
    let len = (frame.len() - HEAD6_LEN) as u16;
    frame[18..20].copy_from_slice(&len.to_be_bytes());
}

/// Puts extension headers between the IPv6 header and what follows it.
fn insert_extensions(random: &mut Random, frame: &mut Vec<u8>) {
    let mut chain: Vec<u8> = (0..random.below(6))
        .map(|n| if n == 0 { random.pick(&[0, 60, 43, 44]) } else { random.pick(&[60, 60, 60, 0]) })
        .collect();
    let last = frame[20];
    chain.push(last);
    let mut headers = Vec::new();
    for pair in chain.windows(2) {
        let long = random.below(2) as u8;
        let mut header = vec![pair[1], long, 1, 4];
        header.resize(8 + usize::from(long) * 8, 0);
        headers.extend(header);
    }
    frame[20] = chain[0];
    let len = u16::from_be_bytes([frame[18], frame[19]]) + headers.len() as u16;
    frame[18..20].copy_from_slice(&len.to_be_bytes());
    frame.splice(HEAD6_LEN..HEAD6_LEN, headers);
}

/// About a packet between the same two ends, the other way.
fn icmp_error(random: &mut Random, ends: &Ends) -> Vec<u8> {
    let sent = Ends {
        source: if random.chance(85) { ends.destination } else { any_address6(random) },
        destination: if random.chance(85) { ends.source } else { any_address6(random) },
        ..*ends
    };
    let (source, destination) = (random.pick(&PORTS), random.pick(&PORTS));
    let mut inner = Vec::new();
    match random.chance(60) {
        true => builder(&sent, 60).udp(source, destination).write(&mut inner, &[1; 8]),
        false => builder(&sent, 60).tcp(source, destination, 1, 1).write(&mut inner, &[1; 8]),
    }
    .unwrap();
    let too_big = Icmpv6Type::PacketTooBig { mtu: 1400 };
    let mut frame = Vec::new();
    builder(ends, 60).icmpv6(too_big).write(&mut frame, &inner[14..]).unwrap();
    frame
}

/// Neighbours, routers, listeners: true and false.
fn on_link(random: &mut Random, ends: &Ends, from: Option<&Interface>) -> Vec<u8> {
    let source = match random.below(5) {
        0 => "fe80::ff:1".parse().unwrap(),
        1 => Ipv6Addr::UNSPECIFIED,
        2 if random.chance(20) => Ipv6Addr::from_bits(ROUTER_ADDRESS6.bits()),
        _ => ends.source,
    };
    let ends = Ends { source, ..*ends };
    let kind = random.pick(&[133, 134, 135, 135, 135, 135, 136, 136, 137, 143]);
    let target = match random.below(6) {
        0 => Ipv6Addr::from_bits(ROUTER_ADDRESS6.bits()),
        1 => source,
        _ => any_address6(random),
    };
    let mut body = if kind == 133 { Vec::new() } else { target.octets().to_vec() };
    let mac = if random.chance(90) { ends.source_mac } else { [2, 0, 0, 0, 9, 9] };
    if random.chance(70) {
        let nonce = [14, 1, 1, 2, 3, 4, 5, 6];
        let nonces = if random.chance(20) { random.below(5) } else { 0 };
        (0..nonces).for_each(|_| body.extend(nonce));
        body.extend([if kind == 136 { 2 } else { 1 }, 1]);
        body.extend(mac);
    }
    let hop_limit = if random.chance(95) { 255 } else { 64 };
    let mut frame = Vec::new();
    let rest = [0x60, 0, 0, 0];
    builder(&ends, hop_limit).icmpv6_raw(kind, 0, rest).write(&mut frame, &body).unwrap();
    if from.is_none() && random.chance(50) {
        frame[..6].copy_from_slice(&[0x33, 0x33, 0xff, 0, 0, 1]);
    }
    frame
}

fn dhcp(random: &mut Random, ends: &Ends) -> Vec<u8> {
    let source = if random.chance(80) { "fe80::ff:1".parse().unwrap() } else { ends.source };
    let ends = Ends { source, destination: "ff02::1:2".parse().unwrap(), ..*ends };
    let (source, destination) = if random.chance(25) { (547, 546) } else { (546, 547) };
    let mut frame = Vec::new();
    builder(&ends, 1).udp(source, destination).write(&mut frame, &[1; 16]).unwrap();
    frame
}

/// What an answer of the responder's looks like.
pub fn responder_frame(random: &mut Random, ifindex: u32) -> Vec<u8> {
    let to = if random.chance(80) { punt_mac(ifindex) } else { [2, 0, 0, 0, 0, 1] };
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2; 6], to)
        .ipv6(ROUTER_ADDRESS6.bytes(), Ipv6Addr::from_bits(0xff02 << 112 | 1).octets(), 255)
        .icmpv6_raw(134, 0, [64, 0, 0, 0])
        .write(&mut frame, &[0; 8])
        .unwrap();
    frame
}

/// The frame that a verdict makes of `frame`: the answer by the library, with its
/// checksum.
pub fn carried_out6(frame: &[u8], verdict: &Verdict<V6>) -> Option<Vec<u8>> {
    let rewrite = &verdict.rewrite;
    let (to_mac, from_mac) = (mac_bytes(rewrite.destination_mac), mac_bytes(rewrite.source_mac));
    match verdict.action {
        Action::Drop | Action::Pass | Action::AnswerArp | Action::Translate => None,
        Action::Deliver | Action::Leave | Action::Enter => {
            let mut out = frame.to_vec();
            out[..6].copy_from_slice(&to_mac);
            out[6..12].copy_from_slice(&from_mac);
            out[21] = rewrite.ttl;
            Some(out)
        }
        Action::AnswerNeighbour => {
            let asked_by: [u8; 16] = frame[22..38].try_into().ok()?;
            let asked_by = Ipv6Addr::from(asked_by);
            let known = !asked_by.is_unspecified();
            let to = if known { asked_by } else { "ff02::1".parse().unwrap() };
            let router = if from_mac == GATEWAY_MAC { 0x80 } else { 0 };
            let flags = router | 0x20 | if known { 0x40 } else { 0 };
            let target = rewrite.source.bytes();
            let mut body = target.to_vec();
            body.extend([2, 1]);
            body.extend(from_mac);
            let mut out = Vec::new();
            PacketBuilder::ethernet2(from_mac, frame[6..12].try_into().ok()?)
                .ipv6(target, to.octets(), 255)
                .icmpv6_raw(136, 0, [flags, 0, 0, 0])
                .write(&mut out, &body)
                .unwrap();
            Some(out)
        }
    }
}
