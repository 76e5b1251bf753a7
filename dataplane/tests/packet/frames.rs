//! Random frames, and what a verdict makes of one, computed apart from the programs.

use ebpf::layout::Interface;
use ebpf::packet::mac_bytes;
use ebpf::rewrite::corrected;
use ebpf::verdict::PortChange;
use ebpf::{
    Action, DNS_ADDRESS, GATEWAY_MAC, Head, METADATA_ADDRESS, TIME_ADDRESS, Work, punt_mac,
};
use etherparse::{IpNumber, PacketBuilder, PacketBuilderStep, TcpHeader};

use crate::random::Random;
use crate::world::{PORTS, RESOLVER, TO_SECONDARY, UPLINK_MAC, any_address};

/// A frame that may arrive from this guest (or from the uplink: `None`).
pub fn frame(random: &mut Random, from: Option<&Interface>, others: &[Interface]) -> Vec<u8> {
    let mut frame = match random.below(100) {
        0..=5 => arp(random, from),
        6..=13 => icmp_error(random, from, others),
        14..=17 => dhcp(random, from),
        18 | 19 => other_kind(random, from),
        _ => packet(random, from, others),
    };
    if random.chance(6) {
        let at = random.below(frame.len() as u64) as usize;
        frame[at] ^= 1 << random.below(8);
    }
    if random.chance(3) && frame[12..14] != [0x86, 0xdd] {
        // The kernel runs no frame that is shorter than its IP header.
        let len = 34 + random.below(frame.len() as u64 - 33) as usize;
        frame.truncate(len);
    }
    frame
}

struct Ends {
    source_mac: [u8; 6],
    destination_mac: [u8; 6],
    source: [u8; 4],
    destination: [u8; 4],
}

fn ends(random: &mut Random, from: Option<&Interface>, others: &[Interface]) -> Ends {
    let any = |random: &mut Random| any_address(random).octets();
    match from {
        Some(interface) => Ends {
            source_mac: if random.chance(97) { interface.mac } else { [2, 0, 0, 0, 9, 9] },
            destination_mac: GATEWAY_MAC,
            source: match random.below(100) {
                0..=6 => any(random),
                7..=20 => (interface.address + TO_SECONDARY).to_be_bytes(),
                _ => interface.address.to_be_bytes(),
            },
            destination: match random.below(20) {
                0 => METADATA_ADDRESS.to_be_bytes(),
                1 => TIME_ADDRESS.to_be_bytes(),
                2 => random.pick(&[DNS_ADDRESS.to_be_bytes(), RESOLVER.octets()]),
                _ => any(random),
            },
        },
        None => Ends {
            source_mac: [2, 0, 0, 0, 8, 8],
            destination_mac: if random.chance(97) { UPLINK_MAC.octets() } else { [0xff; 6] },
            source: any(random),
            destination: match others.is_empty() {
                false if random.chance(75) => {
                    let i = random.below(others.len() as u64) as usize;
                    let second = if random.chance(25) { TO_SECONDARY } else { 0 };
                    (others[i].elastic + second).to_be_bytes()
                }
                _ => any(random),
            },
        },
    }
}

fn builder(ends: &Ends, ttl: u8) -> PacketBuilderStep<etherparse::IpHeaders> {
    PacketBuilder::ethernet2(ends.source_mac, ends.destination_mac).ipv4(
        ends.source,
        ends.destination,
        ttl,
    )
}

fn ttl(random: &mut Random) -> u8 {
    if random.chance(96) { 64 } else { random.below(3) as u8 }
}

/// A step of a connection's life, or one that belongs to none.
pub fn with_flags(
    random: &mut Random,
    tcp: PacketBuilderStep<TcpHeader>,
) -> PacketBuilderStep<TcpHeader> {
    match random.below(8) {
        0..=2 => tcp.syn(),
        3 => tcp.syn().ack(1),
        4 => tcp.fin().ack(1),
        5 => tcp.rst(),
        _ => tcp.ack(1),
    }
}

/// Few ports on both sides, so that answers to what was sent come about by chance.
fn packet(random: &mut Random, from: Option<&Interface>, others: &[Interface]) -> Vec<u8> {
    let ends = ends(random, from, others);
    let step = builder(&ends, ttl(random));
    let source = random.pick(&PORTS);
    let asks_time = ends.destination == TIME_ADDRESS.to_be_bytes() && random.chance(75);
    let resolver = [DNS_ADDRESS.to_be_bytes(), RESOLVER.octets()].contains(&ends.destination);
    let asks_name = resolver && random.chance(75);
    let destination = match (asks_time, asks_name) {
        (true, _) => 123,
        (_, true) => 53,
        _ => random.pick(&PORTS),
    };
    let payload = [0x5a; 24];
    let payload = &payload[..random.below(24) as usize];
    let mut frame = Vec::new();
    match random.below(10) {
        0..=4 => {
            let tcp = step.tcp(source, destination, 1, 1000);
            with_flags(random, tcp).write(&mut frame, payload).unwrap();
        }
        5..=7 => {
            step.udp(source, destination).write(&mut frame, payload).unwrap();
            if random.chance(15) {
                // UDP without a checksum.
                (frame[40], frame[41]) = (0, 0);
            }
        }
        8 => {
            let identifier = random.below(3) as u16;
            match random.chance(60) {
                true => step.icmpv4_echo_request(identifier, 1).write(&mut frame, payload),
                false => step.icmpv4_echo_reply(identifier, 1).write(&mut frame, payload),
            }
            .unwrap();
        }
        _ => {
            let number = random.pick(&[47, 50, 132, 89]);
            step.write(&mut frame, IpNumber(number), payload).unwrap();
        }
    }
    if random.chance(20) {
        become_part(random, &mut frame);
    }
    frame
}

/// A piece of the one datagram: mostly what a first or a later one looks like.
pub fn become_part(random: &mut Random, frame: &mut Vec<u8>) {
    let whole = frame.len() - 34;
    let even = if random.chance(90) { whole & !7 } else { whole };
    frame.truncate(34 + even.max(8));
    let len = (frame.len() - 14) as u16;
    frame[16..18].copy_from_slice(&len.to_be_bytes());
    frame[19] = 7;
    let (more, at) = (0x2000, random.pick(&[1, 1, 2, 3, 4, 6, 185, 0x1fff]));
    let place: u16 = match random.below(10) {
        0..=4 => more,
        5 | 6 => more | at,
        _ => at,
    };
    frame[20..22].copy_from_slice(&place.to_be_bytes());
    let sum: u32 = (14..34)
        .step_by(2)
        .filter(|at| *at != 24)
        .map(|at| u32::from(u16::from_be_bytes([frame[at], frame[at + 1]])))
        .sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    frame[24..26].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
}

/// About a packet between the same two ends, the other way.
fn icmp_error(random: &mut Random, from: Option<&Interface>, others: &[Interface]) -> Vec<u8> {
    let outer = ends(random, from, others);
    let sent = Ends {
        source: if random.chance(85) { outer.destination } else { any_address(random).octets() },
        destination: if random.chance(85) { outer.source } else { any_address(random).octets() },
        ..outer
    };
    let mut inner = Vec::new();
    let ports = (random.pick(&PORTS), random.pick(&PORTS));
    match random.chance(60) {
        true => builder(&sent, 60).udp(ports.0, ports.1).write(&mut inner, &[1; 8]),
        false => builder(&sent, 60).tcp(ports.0, ports.1, 1, 1).write(&mut inner, &[1; 8]),
    }
    .unwrap();
    let unreachable = etherparse::Icmpv4Type::DestinationUnreachable(
        etherparse::icmpv4::DestUnreachableHeader::FragmentationNeeded { next_hop_mtu: 1400 },
    );
    let mut frame = Vec::new();
    builder(&outer, 60).icmpv4(unreachable).write(&mut frame, &inner[14..42]).unwrap();
    frame
}

/// IPv6, and something that is neither.
fn other_kind(random: &mut Random, from: Option<&Interface>) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend(from.map_or([2; 6], |i| i.mac));
    frame.extend(random.pick(&[0x86dd_u16, 0x8847, 0x8100]).to_be_bytes());
    frame.extend([0x60; 46]);
    frame
}

fn dhcp(random: &mut Random, from: Option<&Interface>) -> Vec<u8> {
    let mac = from.map_or([2; 6], |i| i.mac);
    let own = from.map_or([0; 4], |i| i.address.to_be_bytes());
    let reply = random.chance(25);
    let mut frame = Vec::new();
    PacketBuilder::ethernet2(mac, [0xff; 6])
        .ipv4(if reply { own } else { [0; 4] }, [255; 4], 64)
        .udp(if reply { 67 } else { 68 }, if reply { 68 } else { 67 })
        .write(&mut frame, &[1; 16])
        .unwrap();
    frame
}

fn arp(random: &mut Random, from: Option<&Interface>) -> Vec<u8> {
    let mac = from.map_or([2, 0, 0, 0, 8, 8], |i| i.mac);
    let sender = from.map_or([203, 0, 113, 9], |i| i.address.to_be_bytes());
    let target = any_address(random).octets();
    let mut frame = vec![0xff; 6];
    frame.extend(mac);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1 + u8::from(random.chance(10))]);
    frame.extend(mac);
    frame.extend(if random.chance(90) { sender } else { [10, 9, 9, 9] });
    frame.extend([0; 6]);
    frame.extend(target);
    frame
}

/// What an answer of the responder's looks like.
pub fn responder_frame(random: &mut Random, ifindex: u32) -> Vec<u8> {
    let destination = if random.chance(80) { punt_mac(ifindex) } else { [2, 0, 0, 0, 0, 1] };
    let source = if random.chance(50) { METADATA_ADDRESS.to_be_bytes() } else { [10, 0, 0, 1] };
    let mut frame = Vec::new();
    PacketBuilder::ethernet2([2; 6], destination)
        .ipv4(source, [10, 0, 0, 10], 64)
        .tcp(80, 40_000, 1, 1000)
        .ack(1)
        .write(&mut frame, &[7; 9])
        .unwrap();
    frame
}

/// The frame that a verdict makes of `frame`, by whole recomputation of nothing:
/// headers by the library, the transport's checksum by RFC 1624 in this file.
pub fn carried_out(frame: &[u8], work: &Work) -> Option<Vec<u8>> {
    let (mut out, verdict) = (frame.to_vec(), &work.verdict);
    match verdict.action {
        Action::Drop | Action::Pass | Action::AnswerNeighbour | Action::Translate => return None,
        Action::AnswerArp => {
            let mac = mac_bytes(verdict.rewrite.source_mac);
            out[0..6].copy_from_slice(&frame[22..28]);
            out[6..12].copy_from_slice(&mac);
            out[21] = 2;
            out[22..28].copy_from_slice(&mac);
            out[28..32].copy_from_slice(&frame[38..42]);
            out[32..38].copy_from_slice(&frame[22..28]);
            out[38..42].copy_from_slice(&frame[28..32]);
        }
        Action::Deliver | Action::Leave | Action::Enter => {
            let head = Head::of(frame[..34].try_into().ok()?);
            change_port(&mut out, &work.nat.ports);
            out[..34].copy_from_slice(&verdict.rewrite.apply(&head).bytes());
            if let Some((old, new)) = verdict.rewrite.transport_delta(&head) {
                correct_transport(&mut out, old, new);
            }
            let at = verdict.inner.offset as usize;
            if at != 0 {
                out[at..at + 10].copy_from_slice(&verdict.inner.bytes);
            }
        }
    }
    Some(out)
}

/// The packet through a NAT gateway has another port.
fn change_port(out: &mut [u8], change: &PortChange) {
    if change.at == 0 {
        return;
    }
    let [at, sum_at] = [change.at, change.checksum_at].map(|at| at as usize);
    let found = u16::from_be_bytes([out[at], out[at + 1]]);
    assert_eq!(found, change.old, "the port that is exchanged");
    out[at..at + 2].copy_from_slice(&change.new.to_be_bytes());
    let before = u16::from_be_bytes([out[sum_at], out[sum_at + 1]]);
    if change.udp && before == 0 {
        return;
    }
    let after = match corrected(before, change.old.into(), change.new.into()) {
        0 if change.udp => 0xffff,
        after => after,
    };
    out[sum_at..sum_at + 2].copy_from_slice(&after.to_be_bytes());
}

fn correct_transport(out: &mut [u8], old: u32, new: u32) {
    // A later fragment has no transport header.
    if u16::from_be_bytes([out[20], out[21]]) & 0x1fff != 0 {
        return;
    }
    let transport = 14 + usize::from(out[14] & 15) * 4;
    let at = match out[23] {
        6 => transport + 16,
        17 => transport + 6,
        _ => return,
    };
    let before = u16::from_be_bytes([out[at], out[at + 1]]);
    if out[23] == 17 && before == 0 {
        return;
    }
    let mut after = corrected(before, old, new);
    if out[23] == 17 && after == 0 {
        after = 0xffff;
    }
    out[at..at + 2].copy_from_slice(&after.to_be_bytes());
}
