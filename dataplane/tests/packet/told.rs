//! ICMP errors of our own, as the library builds them, and who is told none.

use dataplane::compile::compile;
use dataplane::load::Loaded;
use ebpf::icmp::{ERRORS_A_SECOND_MAX, QUOTE_MAX, QUOTE6_MAX, Tell};
use ebpf::layout::Interface;
use ebpf::{GATEWAY_MAC, Reason, TRACE_MARK, V6, Verdict, Work};
use etherparse::icmpv4::{DestUnreachableHeader, TimeExceededCode};
use etherparse::{
    Icmpv4Type, Icmpv6Type, IpHeaders, Ipv4Extensions, Ipv4Header, Ipv6Extensions, Ipv6Header,
    PacketBuilder, PacketBuilderStep,
};
use model::{Peer, Protocol, Rule, RuleId};
use nix::net::if_::if_nametoindex;

use crate::agree::Bench;
use crate::checksum;
use crate::hostile::open_world;
use crate::random::Random;
use crate::world::{UPLINK, UPLINK_MAC, address6, devices};

fn back(frame: &[u8], to_world: bool) -> Option<PacketBuilderStep<etherparse::Ethernet2Header>> {
    if frame[0] & 1 != 0 {
        return None;
    }
    let ours = if to_world { frame[..6].try_into().ok()? } else { GATEWAY_MAC };
    Some(PacketBuilder::ethernet2(ours, frame[6..12].try_into().ok()?))
}

/// What the sender of a dropped frame is told.
pub fn told(frame: &[u8], verdict: &Verdict, to_world: bool) -> Option<Vec<u8>> {
    let error = match verdict.tell {
        Tell::Nothing => return None,
        Tell::TimeExceeded => Icmpv4Type::TimeExceeded(TimeExceededCode::TtlExceededInTransit),
        Tell::TooBig => {
            let next_hop_mtu = verdict.told_mtu;
            let why = DestUnreachableHeader::FragmentationNeeded { next_hop_mtu };
            Icmpv4Type::DestinationUnreachable(why)
        }
        Tell::Reset => return reset(frame),
    };
    let length = usize::from(u16::from_be_bytes([frame[16], frame[17]]));
    let quote = &frame[14..14 + length.min(QUOTE_MAX as usize)];
    let mut ip = Ipv4Header::new(0, 64, etherparse::IpNumber::ICMP, [0; 4], [0; 4]).unwrap();
    ip.source = verdict.teller.to_be_bytes();
    ip.destination = frame[26..30].try_into().unwrap();
    ip.dscp = 48_u8.try_into().unwrap();
    let mut out = Vec::new();
    let ip = IpHeaders::Ipv4(ip, Ipv4Extensions::default());
    back(frame, to_world)?.ip(ip).icmpv4(error).write(&mut out, quote).unwrap();
    Some(out)
}

/// A RST in the receiver's name, by the number that the packet acknowledges.
fn reset(frame: &[u8]) -> Option<Vec<u8>> {
    // By hand: the library reads no ports of a first piece, nor of what contradicts itself.
    let tcp = &frame[14 + 4 * usize::from(frame[14] & 0xf)..];
    let port = |at: usize| u16::from_be_bytes([tcp[at], tcp[at + 1]]);
    let acknowledged = u32::from_be_bytes(tcp[8..12].try_into().unwrap());
    let address = |at: usize| frame[at..at + 4].try_into().unwrap();
    let step = back(frame, false)?.ipv4(address(30), address(26), 64);
    let mut out = Vec::new();
    let answer = step.tcp(port(2), port(0), acknowledged, 0).rst();
    answer.write(&mut out, &[]).unwrap();
    Some(out)
}

/// [`told`] of the other family.
pub fn told6(frame: &[u8], verdict: &Verdict<V6>, to_world: bool) -> Option<Vec<u8>> {
    let error = match verdict.tell {
        Tell::Nothing => return None,
        Tell::TimeExceeded => {
            Icmpv6Type::TimeExceeded(etherparse::icmpv6::TimeExceededCode::HopLimitExceeded)
        }
        Tell::TooBig => Icmpv6Type::PacketTooBig { mtu: verdict.told_mtu.into() },
        Tell::Reset => unreachable!("NAT gateways are of IPv4"),
    };
    let length = 40 + usize::from(u16::from_be_bytes([frame[18], frame[19]]));
    let quote = &frame[14..14 + length.min(QUOTE6_MAX as usize)];
    let ip = Ipv6Header {
        hop_limit: 64,
        source: verdict.teller.bytes(),
        destination: frame[22..38].try_into().unwrap(),
        ..Ipv6Header::default()
    };
    let mut out = Vec::new();
    let ip = IpHeaders::Ipv6(ip, Ipv6Extensions::default());
    back(frame, to_world)?.ip(ip).icmpv6(error).write(&mut out, quote).unwrap();
    Some(out)
}

struct Open {
    loaded: Loaded,
    guest: Interface,
    uplink: u32,
    // Torn down when all is seen.
    _bench: Bench,
}

/// A world in which everything is allowed, and its first guest.
fn open(test: &str) -> Option<Open> {
    let bench = Bench::new(test)?;
    let mut random = Random::seeded("told", 92);
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let devices = devices(|name| if_nametoindex(name).unwrap());
    let mut world = open_world(&mut random);
    for (n, group) in world.groups.iter_mut().enumerate() {
        let id = RuleId::from_random(n as u128 + 100);
        let peer = Peer::Cidr("::/0".parse().unwrap());
        group.ingress.push(Rule { id, protocol: Protocol::Any, peer });
    }
    loaded.update(compile(&world, &devices, loaded.tables()).unwrap()).unwrap();
    let guest = loaded.tables().interfaces[&devices.by_name["g0"].ifindex];
    Some(Open { loaded, guest, uplink: devices.by_name[UPLINK].ifindex, _bench: bench })
}

const WORLD: [u8; 4] = [203, 0, 113, 9];

/// UDP, `size` bytes from the IP header on.
fn udp(open: &Open, to_world: bool, ttl: u8, size: usize) -> Vec<u8> {
    let (own, elastic) = (open.guest.address.to_be_bytes(), open.guest.elastic.to_be_bytes());
    let step = match to_world {
        true => PacketBuilder::ethernet2(open.guest.mac, GATEWAY_MAC).ipv4(own, WORLD, ttl),
        false => PacketBuilder::ethernet2([2, 0, 0, 0, 8, 8], UPLINK_MAC.octets())
            .ipv4(WORLD, elastic, ttl),
    };
    let mut frame = Vec::new();
    let payload: Vec<u8> = (0..size - 28).map(|n| n as u8).collect();
    step.udp(4000, 5000).write(&mut frame, &payload).unwrap();
    frame
}

#[test]
fn an_error_quotes_what_fits_and_its_checksums_are_right() {
    let Some(open) = open("an_error_quotes_what_fits_and_its_checksums_are_right") else { return };
    for to_world in [true, false] {
        let ifindex = if to_world { open.guest.ifindex } else { open.uplink };
        for size in [28, 29, 63, 64, 65, 127, 128, 129, 547, 548, 549, 600, 1499, 1500] {
            let run = open.loaded.run(ifindex, &udp(&open, to_world, 1, size), TRACE_MARK).unwrap();
            assert_eq!((run.reason, run.code), (Some(Reason::TtlExpired), 7), "{size}");
            assert_eq!(run.frame.len(), 42 + size.min(548), "{size}");
            assert_eq!(checksum::wrong(&run.frame), None, "{size}: {:02x?}", run.frame);
            assert_eq!(run.frame[34], 11);
        }
        // The edge: the MTU passes, and a byte more is told it.
        let run = open.loaded.run(ifindex, &udp(&open, to_world, 64, 1500), TRACE_MARK).unwrap();
        assert_eq!((run.reason.map(Reason::accepts), run.code), (Some(true), 7));
        let run = open.loaded.run(ifindex, &udp(&open, to_world, 64, 1501), TRACE_MARK).unwrap();
        assert_eq!((run.reason, run.code), (Some(Reason::TooBig), 7));
        assert_eq!(run.frame[34..36], [3, 4]);
        assert_eq!(run.frame[38..42], [0, 0, 5, 220]);
        assert_eq!(checksum::wrong(&run.frame), None);
        let router = if to_world { [10, 0, 0, 1] } else { [198, 51, 100, 1] };
        assert_eq!(run.frame[26..30], router);
    }
}

/// Frames whose sender would be told something if it were not for one thing.
#[test]
fn who_must_not_be_told_is_not() {
    let Some(open) = open("who_must_not_be_told_is_not") else { return };
    let silent = |ifindex: u32, frame: &[u8], reason: Reason| {
        let run = open.loaded.run(ifindex, frame, TRACE_MARK).unwrap();
        assert_eq!((run.reason, run.code), (Some(reason), 2), "{frame:02x?}");
    };
    // To a whole link.
    let mut frame = udp(&open, true, 1, 100);
    frame[..6].copy_from_slice(&[0xff; 6]);
    silent(open.guest.ifindex, &frame, Reason::TtlExpired);
    // About an error: the guest's, about a packet that had come in.
    let asked = udp(&open, false, 64, 100);
    open.loaded.run(open.uplink, &asked, TRACE_MARK).unwrap();
    let mut inner = asked[14..].to_vec();
    inner[16..20].copy_from_slice(&open.guest.address.to_be_bytes());
    let why = Icmpv4Type::DestinationUnreachable(DestUnreachableHeader::Port);
    for (ttl, reason, code) in [(1, Reason::TtlExpired, 2), (2, Reason::Related, 7)] {
        let mut frame = Vec::new();
        PacketBuilder::ethernet2(open.guest.mac, GATEWAY_MAC)
            .ipv4(open.guest.address.to_be_bytes(), WORLD, ttl)
            .icmpv4(why.clone())
            .write(&mut frame, &inner)
            .unwrap();
        let run = open.loaded.run(open.guest.ifindex, &frame, TRACE_MARK).unwrap();
        assert_eq!((run.reason, run.code), (Some(reason), code));
    }
    // Whoever only asks leaves no trace.
    let run = open.loaded.run(open.uplink, &udp(&open, false, 1, 60), ebpf::ASK_MARK).unwrap();
    assert_eq!((run.reason, run.code), (Some(Reason::TtlExpired), 2));
}

#[test]
fn an_interface_is_told_so_many_errors_a_second_and_no_more() {
    let Some(open) = open("an_interface_is_told_so_many_errors_a_second_and_no_more") else {
        return;
    };
    let frame = udp(&open, true, 1, 100);
    let begun = now_ms();
    let flood = 40 * ERRORS_A_SECOND_MAX;
    let told =
        (0..flood).filter(|_| open.loaded.run(open.guest.ifindex, &frame, 0).unwrap().code == 7);
    let told = told.count() as u64;
    // A full bucket, and what time gave; the clock of the bucket moves by up to 10 ms.
    let most = ERRORS_A_SECOND_MAX + (now_ms() - begun + 20) * ERRORS_A_SECOND_MAX / 1000 + 1;
    assert!((ERRORS_A_SECOND_MAX..=most).contains(&told), "{told} of {flood}, {most} at most");
    // The world has a bucket of its own.
    let run = open.loaded.run(open.uplink, &udp(&open, false, 1, 100), 0).unwrap();
    assert_eq!(run.code, 7);
    let counters = open.loaded.counters().unwrap().interfaces;
    let sent: u64 = counters.values().filter_map(|r| r.get("icmp-error-sent")).sum();
    assert_eq!(sent, told + 1);
}

fn now_ms() -> u64 {
    use nix::time::{ClockId, clock_gettime};
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap();
    std::time::Duration::from(now).as_millis() as u64
}

#[test]
fn ipv6_is_told_as_much_as_fits_into_1280_bytes() {
    let Some(open) = open("ipv6_is_told_as_much_as_fits_into_1280_bytes") else { return };
    let own = address6(0, 0).octets();
    let world = "2600::9".parse::<std::net::Ipv6Addr>().unwrap().octets();
    for size in [48, 49, 1231, 1232, 1233, 1500, 1501] {
        let mut frame = Vec::new();
        let ttl = if size > 1500 { 64 } else { 1 };
        PacketBuilder::ethernet2([2, 0, 0, 0, 8, 8], UPLINK_MAC.octets())
            .ipv6(world, own, ttl)
            .udp(4000, 5000)
            .write(&mut frame, &vec![7; size - 48])
            .unwrap();
        let run = open.loaded.run(open.uplink, &frame, TRACE_MARK).unwrap();
        let reason = if size > 1500 { Reason::TooBig } else { Reason::TtlExpired };
        assert_eq!((run.reason, run.code), (Some(reason), 7), "{size}");
        assert_eq!(run.frame.len(), 62 + size.min(1232));
        let mut work: Work<V6> = bytemuck::Zeroable::zeroed();
        let verdict = &mut work.verdict;
        (verdict.tell, verdict.told_mtu) = match reason {
            Reason::TooBig => (Tell::TooBig, 1500),
            _ => (Tell::TimeExceeded, 0),
        };
        // The host has no global address on the uplink: it answers by the one it was asked by.
        verdict.teller = V6::of(&own);
        assert_eq!(Some(run.frame), told6(&frame, verdict, true), "{size}");
    }
}
