//! The fast path leaves the same bytes as tc's program, of packets of established
//! flows and of no others.

use ebpf::{Reason, TRACE_MARK};
use etherparse::{PacketBuilder, PacketHeaders, TransportHeader};
use rpc::dataplane::FastPath;

use crate::random::Random;
use crate::rates::{World, index};
use crate::world::{UPLINK, UPLINK_MAC, address, elastic, guest, guest_mac};

const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;
const REMOTE: [u8; 4] = [203, 0, 113, 9];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Tcp { opening: bool },
    Udp,
    Ping,
}

/// From the world to guest 0's elastic address, or the answer from guest 0.
fn frame(kind: Kind, port: u16, answer: bool, payload: &[u8]) -> Vec<u8> {
    let near = if answer { address(0) } else { elastic(0) }.octets();
    let (macs, from, to, ports) = match answer {
        false => (([4; 6], UPLINK_MAC.octets()), REMOTE, near, (port, 53)),
        true => ((guest_mac(0).octets(), [2; 6]), near, REMOTE, (53, port)),
    };
    let builder = PacketBuilder::ethernet2(macs.0, macs.1).ipv4(from, to, 64);
    let mut frame = Vec::new();
    match kind {
        Kind::Udp => builder.udp(ports.0, ports.1).write(&mut frame, payload),
        Kind::Ping if answer => builder.icmpv4_echo_reply(port, 1).write(&mut frame, payload),
        Kind::Ping => builder.icmpv4_echo_request(port, 1).write(&mut frame, payload),
        Kind::Tcp { opening } => {
            let tcp = builder.tcp(ports.0, ports.1, 77, 1000);
            let tcp = if opening { tcp.syn() } else { tcp };
            let tcp = if opening && !answer { tcp } else { tcp.ack(5) };
            tcp.write(&mut frame, payload)
        }
    }
    .unwrap();
    frame
}

fn assert_checksums(frame: &[u8]) {
    let headers = PacketHeaders::from_ethernet_slice(frame).unwrap();
    let Some(etherparse::NetHeaders::Ipv4(ip, _)) = headers.net else { panic!("no IPv4") };
    assert_eq!(ip.header_checksum, ip.calc_header_checksum());
    let payload = headers.payload.slice();
    let (is, ought) = match headers.transport.unwrap() {
        TransportHeader::Tcp(t) => (t.checksum, t.calc_checksum_ipv4(&ip, payload).unwrap()),
        TransportHeader::Udp(u) => (u.checksum, u.calc_checksum_ipv4(&ip, payload).unwrap()),
        TransportHeader::Icmpv4(i) => (i.checksum, i.icmp_type.calc_checksum(payload)),
        _ => panic!("nothing else was sent"),
    };
    assert_eq!(is, ought);
}

#[test]
fn the_fast_path_leaves_the_bytes_that_tc_leaves_and_takes_established_flows_alone() {
    let test = "the_fast_path_leaves_the_bytes_that_tc_leaves_and_takes_established_flows_alone";
    let Some(mut world) = World::new(test) else { return };
    world.desired.uplink.as_mut().unwrap().fast_path = FastPath::Declared;
    for interface in &mut world.desired.interfaces {
        interface.takes_frames = Some(true);
    }
    world.apply();
    let mut random = Random::seeded("fast", 8);
    let tc =
        |device: &str, frame: &[u8]| world.loaded.run(index(device), frame, TRACE_MARK).unwrap();
    let early = |frame: &[u8]| world.loaded.run_early_frame(frame).unwrap();
    let mut taken = 0;
    for port in 4000..4300 {
        let kind = random.pick(&[Kind::Tcp { opening: true }, Kind::Udp, Kind::Ping]);
        let later =
            if kind == (Kind::Tcp { opening: true }) { Kind::Tcp { opening: false } } else { kind };
        // Until it is established, it goes by tc.
        let first = frame(kind, port, false, b"");
        assert_eq!(early(&first), (XDP_PASS, first.clone()));
        assert_eq!(tc(UPLINK, &first).reason, Some(Reason::NewFlow));
        let answered = tc(&guest(0), &frame(kind, port, true, b"")).reason;
        assert_eq!(answered, Some(Reason::Established));
        let confirmed = frame(later, port, false, b"x");
        assert_eq!(tc(UPLINK, &confirmed).reason, Some(Reason::Established));
        for _ in 0..20 {
            let len = random.below(1400) as usize;
            let payload: Vec<u8> = (0..len).map(|_| random.next() as u8).collect();
            let sent = frame(later, port, false, &payload);
            let (code, got) = early(&sent);
            let expected = tc(UPLINK, &sent).frame;
            assert_checksums(&expected);
            // One checksum in 65 535 looks as if it were left to the hardware.
            if code == XDP_REDIRECT {
                assert_eq!(got, expected);
                taken += 1;
            } else {
                assert_eq!((code, got), (XDP_PASS, sent));
            }
        }
        // What the sender leaves to its hardware: the pseudo-header's sum and no more.
        if let Some(at) = match later {
            Kind::Tcp { .. } => Some(14 + 20 + 16),
            Kind::Udp => Some(14 + 20 + 6),
            Kind::Ping => None,
        } {
            let mut partial = frame(later, port, false, b"left to the hardware");
            let length = (partial.len() - 34) as u32;
            let words = partial[26..34].chunks(2).map(|w| u32::from(w[0]) << 8 | u32::from(w[1]));
            let sum = words.sum::<u32>() + u32::from(partial[23]) + length;
            let folded = (sum & 0xffff) + (sum >> 16);
            partial[at..at + 2].copy_from_slice(&(folded as u16).to_be_bytes());
            assert_eq!(early(&partial), (XDP_PASS, partial.clone()));
        }
    }
    assert!(taken >= 300 * 20 - 20, "{taken} were taken");
    // Who does not take frames gets none.
    world.desired.interfaces.iter_mut().for_each(|i| i.takes_frames = None);
    world.apply();
    let sent = frame(Kind::Udp, 4001, false, b"");
    assert_eq!(world.loaded.run_early_frame(&sent).unwrap().0, XDP_PASS);
}
