//! The kernel's own firewall as a second opinion: a random configuration stands as a
//! ruleset of nftables on taps of a namespace and in the loaded programs, the same
//! conversations go through both, and what is delivered is compared byte by byte.
//!
//! Known differences, which are not errors of either:
//! - Between guests of one subnet the programs stand for a switch and leave the hop
//!   limit as it is; nftables stands on a router, which takes one off.
//! - What belongs to no conversation (a TCP segment out of nowhere, an echo reply that
//!   nobody asked for) is conntrack's matter of taste: none is sent here.
//!
//! `HOSTPLANE_FULL=1` takes hundreds of configurations in place of tens.

use std::net::IpAddr;

use dataplane::compile::compile;
use dataplane::load::Loaded;
use ebpf::{GATEWAY_MAC, TRACE_MARK};
use etherparse::{PacketBuilder, PacketBuilderStep};
use nix::net::if_::if_nametoindex;
use rpc::dataplane::{Desired, Interface};

use crate::agree::{Bench, skipped};
use crate::nftables::{Router, TAG_LEN, ruleset};
use crate::random::{Random, many};
use crate::world::{PORTS, UPLINK, UPLINK_MAC, desired, devices, guest, guest_mac};

const CONFIGURATIONS: u16 = 24;
const CONFIGURATIONS_FULL: u16 = 400;
const CONVERSATIONS: u16 = 120;
/// The first network's.
const GUESTS: usize = 3;
const WORLD: [&str; 3] = ["203.0.113.9", "203.0.113.77", "8.8.8.8"];
const WORLD6: [&str; 2] = ["2001:db8:9::9", "2600::1"];

fn configurations() -> u16 {
    many(CONFIGURATIONS, CONFIGURATIONS_FULL)
}

/// One network with groups, prefix lists and elastic addresses: what a ruleset says too.
fn configuration(random: &mut Random) -> Desired {
    let rules_max = random.pick(&[2, 6, 20]);
    let mut desired = loop {
        let desired = desired(random, rules_max);
        if desired.uplink.is_some() && desired.interfaces.len() >= 3 {
            break desired;
        }
    };
    let uplink = desired.uplink.as_mut().unwrap();
    (uplink.bogons, uplink.gateway6) = (false, Some("fe80::1".parse().unwrap()));
    desired.blocklist.clear();
    desired.nat_gateways.clear();
    let first = desired.interfaces[0].vpc;
    desired.interfaces.retain(|i| i.vpc == first && i.mac != guest_mac(3));
    for interface in &mut desired.interfaces {
        (interface.route_table, interface.network_acl) = (None, None);
        interface.secondary.clear();
        interface.source_check = true;
    }
    desired
}

/// One end of a conversation.
#[derive(Debug, Clone, Copy)]
struct End {
    /// `None`: the world.
    guest: Option<usize>,
    own: IpAddr,
    /// As the world knows it.
    known: IpAddr,
    port: u16,
}

fn number(interface: &Interface) -> usize {
    (0..GUESTS).find(|n| guest_mac(*n) == interface.mac).unwrap()
}

fn guest_end(random: &mut Random, interface: &Interface, six: bool, port: u16) -> Option<End> {
    let (own, known) = match six {
        true if interface.ipv6.is_empty() => return None,
        true => {
            let own = random.pick(&interface.ipv6).into();
            (own, own)
        }
        false => (interface.address.into(), interface.elastic.unwrap_or(interface.address).into()),
    };
    Some(End { guest: Some(number(interface)), own, known, port })
}

/// Two ends, the first of which begins. The world cannot begin with who has no elastic
/// address, for it has no name for it.
fn ends(random: &mut Random, desired: &Desired, ports: (u16, u16), six: bool) -> Option<[End; 2]> {
    let i = random.below(desired.interfaces.len() as u64) as usize;
    let one = &desired.interfaces[i];
    let first = guest_end(random, one, six, ports.0)?;
    if random.chance(45) {
        let j = random.below(desired.interfaces.len() as u64) as usize;
        let second = guest_end(random, &desired.interfaces[j], six, ports.1)?;
        return (i != j).then_some([first, second]);
    }
    let address: IpAddr =
        if six { random.pick(&WORLD6) } else { random.pick(&WORLD) }.parse().unwrap();
    let world = |port| End { guest: None, own: address, known: address, port };
    match random.chance(50) {
        true => Some([first, world(ports.1)]),
        false if !six && one.elastic.is_none() => None,
        false => Some([world(ports.0), End { port: ports.1, ..first }]),
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Udp,
    Tcp,
    Echo,
}

/// The `step`th packet of a conversation; every second one is an answer.
fn frame(kind: Kind, [from, to]: [End; 2], step: u32, tag: [u8; TAG_LEN]) -> Vec<u8> {
    let (source_mac, gateway) = match from.guest {
        Some(n) => (guest_mac(n).octets(), GATEWAY_MAC),
        None => ([2, 0, 0, 0, 8, 8], UPLINK_MAC.octets()),
    };
    let destination = if from.guest.is_some() { to.own } else { to.known };
    let link = PacketBuilder::ethernet2(source_mac, gateway);
    let ip: PacketBuilderStep<etherparse::IpHeaders> = match (from.own, destination) {
        (IpAddr::V4(a), IpAddr::V4(b)) => link.ipv4(a.octets(), b.octets(), 64),
        (IpAddr::V6(a), IpAddr::V6(b)) => link.ipv6(a.octets(), b.octets(), 64),
        _ => unreachable!("both ends are of one family"),
    };
    let answer = step % 2 == 1;
    // Who began has a port of this conversation alone.
    let number = if answer { to.port } else { from.port };
    let mut bytes = Vec::new();
    match kind {
        Kind::Udp => ip.udp(from.port, to.port).write(&mut bytes, &tag),
        Kind::Tcp => {
            let tcp = ip.tcp(from.port, to.port, if step < 2 { 100 } else { 109 }, 4000);
            match step {
                0 => tcp.syn(),
                1 => tcp.syn().ack(109),
                _ => tcp.ack(109),
            }
            .write(&mut bytes, &tag)
        }
        Kind::Echo if from.own.is_ipv6() => match answer {
            false => ip.icmpv6_echo_request(number, 1).write(&mut bytes, &tag),
            true => ip.icmpv6_echo_reply(number, 1).write(&mut bytes, &tag),
        },
        Kind::Echo => match answer {
            false => ip.icmpv4_echo_request(number, 1).write(&mut bytes, &tag),
            true => ip.icmpv4_echo_reply(number, 1).write(&mut bytes, &tag),
        },
    }
    .unwrap();
    bytes
}

#[derive(Default, Debug)]
struct Tally {
    packets: u64,
    delivered: u64,
    dropped: u64,
    six: u64,
    translated: u64,
}

/// Both worlds, and what was seen of them.
struct Pair<'a> {
    loaded: &'a Loaded,
    router: &'a mut Router,
    tally: &'a mut Tally,
}

impl Pair<'_> {
    /// Whether both deliver the frame and the same bytes; `Err` tells how they differ.
    fn send(&mut self, ends: [End; 2], bytes: &[u8], tag: [u8; TAG_LEN]) -> Result<bool, String> {
        let device = ends[0].guest.map_or(UPLINK.to_owned(), guest);
        let run =
            self.loaded.run(if_nametoindex(device.as_str()).unwrap(), bytes, TRACE_MARK).unwrap();
        // Hardware addresses towards the world are the kernel's neighbour table's.
        let ours = (run.code == 7).then(|| run.frame[14..].to_vec());
        let theirs = self.router.send(&device, bytes, tag).map(|mut frame| {
            if one_subnet(ends) {
                give_back_the_hop(&mut frame);
            }
            frame[14..].to_vec()
        });
        self.tally.packets += 1;
        self.tally.six += u64::from(ends[0].own.is_ipv6());
        match ours {
            Some(_) => self.tally.delivered += 1,
            None => self.tally.dropped += 1,
        }
        self.tally.translated +=
            u64::from(ours.as_ref().is_some_and(|o| o[12..20] != bytes[26..34]));
        match ours == theirs {
            true => Ok(ours.is_some()),
            false => Err(format!(
                "{ends:?}: {:?}, rules {} and {}\n  {bytes:02x?}\nours   {ours:02x?}\ntheirs {theirs:02x?}",
                run.reason, run.egress_rule, run.ingress_rule
            )),
        }
    }

    /// A conversation goes on as long as what was said is heard.
    fn talk(&mut self, random: &mut Random, ends: [End; 2], tags: &mut u64) -> Result<(), String> {
        let kind = random.pick(&[Kind::Udp, Kind::Udp, Kind::Tcp, Kind::Tcp, Kind::Echo]);
        for step in 0..4 {
            *tags += 1;
            let tag = (0x6f72_6163_0000_0000 | *tags).to_be_bytes();
            let [a, b] = ends;
            let ends = if step % 2 == 0 { [a, b] } else { [b, a] };
            let heard = self.send(ends, &frame(kind, ends, step, tag), tag)?;
            if !heard {
                break;
            }
        }
        Ok(())
    }
}

/// The guests 0 and 1 share one, in both families.
fn one_subnet(ends: [End; 2]) -> bool {
    ends.iter().all(|end| end.guest.is_some_and(|n| n < 2))
}

fn give_back_the_hop(frame: &mut [u8]) {
    if frame[12..14] == [0x86, 0xdd] {
        frame[21] += 1;
        return;
    }
    frame[22] += 1;
    frame[24..26].fill(0);
    let sum: u32 =
        frame[14..34].chunks(2).map(|two| u32::from(u16::from_be_bytes([two[0], two[1]]))).sum();
    let sum = (sum & 0xffff) + (sum >> 16);
    frame[24..26].copy_from_slice(&(!((sum & 0xffff) + (sum >> 16)) as u16).to_be_bytes());
}

/// The first difference between what was loaded and the ruleset of what `told` makes of it.
fn differ(
    random: &mut Random,
    loaded: &mut Loaded,
    nth: u16,
    told: impl Fn(&mut Desired),
    tally: &mut Tally,
) -> Option<String> {
    let wish = configuration(random);
    let devices = devices(|name| if_nametoindex(name).unwrap());
    loaded.update(compile(&wish, &devices, loaded.tables()).unwrap()).unwrap();
    let mut other = wish.clone();
    told(&mut other);
    let text = ruleset(&other);
    let mut router = Router::new(&other, &text);
    let mut pair = Pair { loaded, router: &mut router, tally };
    let mut tags = 0;
    for n in 0..CONVERSATIONS {
        // No two conversations of a run meet: the programs keep flows across configurations.
        let high = 10_000 + nth * CONVERSATIONS + n;
        let port = random.pick(&PORTS);
        let ports = (high, port);
        let six = random.chance(40);
        let Some(ends) = ends(random, &wish, ports, six) else { continue };
        if let Err(difference) = pair.talk(random, ends, &mut tags) {
            return Some(format!("configuration {nth}: {difference}\n{text}"));
        }
    }
    None
}

fn can_run(test: &str) -> bool {
    let there = std::process::Command::new("nft").arg("--version").output().is_ok();
    if !there {
        skipped(test, "needs nft");
    }
    there
}

#[test]
fn nftables_delivers_the_same_bytes_of_the_same_conversations() {
    let name = "nftables_delivers_the_same_bytes_of_the_same_conversations";
    let Some(bench) = Bench::new(name).filter(|_| can_run(name)) else { return };
    let mut random = Random::seeded("oracle", 91);
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let mut tally = Tally::default();
    for nth in 0..configurations() {
        let difference = differ(&mut random, &mut loaded, nth, |_| {}, &mut tally);
        assert!(difference.is_none(), "{}", difference.unwrap());
    }
    eprintln!("{} configurations: {tally:?}", configurations());
    let least = tally.packets / 20;
    for (what, count) in [
        ("delivered", tally.delivered),
        ("dropped", tally.dropped),
        ("of IPv6", tally.six),
        ("translated", tally.translated),
    ] {
        assert!(count > least, "too few were {what} to prove anything: {tally:?}");
    }
}

#[test]
fn a_rule_that_nftables_was_not_told_of_is_noticed() {
    let name = "a_rule_that_nftables_was_not_told_of_is_noticed";
    let Some(bench) = Bench::new(name).filter(|_| can_run(name)) else { return };
    let mut random = Random::seeded("oracle, sabotaged", 92);
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let mut tally = Tally::default();
    // The planted fault: every group of the ruleset lacks its first rule inwards.
    let forget = |desired: &mut Desired| {
        desired.groups.iter_mut().filter(|g| !g.ingress.is_empty()).for_each(|g| {
            g.ingress.remove(0);
        });
    };
    let noticed = (0..CONFIGURATIONS)
        .any(|nth| differ(&mut random, &mut loaded, nth, forget, &mut tally).is_some());
    assert!(noticed, "nobody noticed the missing rules: {tally:?}");
}
