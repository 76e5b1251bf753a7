//! Arbitrary bytes through the loaded programs: never a verdict that the decision on
//! the host denies, and never a right packet in and a wrong one out.
//!
//! 100 000 of them; ten million with `HOSTPLANE_FULL=1`. `HOSTPLANE_SEED` says from which seed.

use dataplane::compile::{Host, compile};
use dataplane::load::Loaded;
use ebpf::TRACE_MARK;
use ebpf::layout::Interface;
use nix::net::if_::if_nametoindex;

use crate::agree::{Bench, Tally, compare_frame};
use crate::checksum;
use crate::frames::{frame, responder_frame};
use crate::random::{Random, many};
use crate::world::{GUESTS, PUNT, UPLINK, desired, guest, narrow, narrow_devices};

const PACKETS: u64 = 100_000;
const PACKETS_FULL: u64 = 10_000_000;
/// Packets under one desired state.
const EPOCH: u64 = 5_000;
/// The kernel runs no frame that is shorter than an Ethernet header; one that says it
/// is IP must hold IP's header (BPF_PROG_TEST_RUN refuses it).
const LENGTH_MIN: usize = 14;

fn packets() -> u64 {
    many(PACKETS, PACKETS_FULL)
}

/// Whether the kernel would hand such a frame to a program at all.
fn arrives(frame: &[u8]) -> bool {
    match frame.get(12..14) {
        Some([8, 0]) => frame.len() >= 34,
        Some([0x86, 0xdd]) => frame.len() >= 54,
        Some(_) => frame.len() > LENGTH_MIN,
        None => false,
    }
}

/// A packet that could be right, and what an enemy makes of it.
fn hostile(random: &mut Random, from: Option<&Interface>, others: &[Interface]) -> Vec<u8> {
    let mut bytes = frame(random, from, others);
    match random.below(8) {
        // As it is.
        0 | 1 => {}
        // Bits at random.
        2 | 3 => {
            for _ in 0..=random.below(6) {
                let at = random.below(bytes.len() as u64) as usize;
                bytes[at] ^= 1 << random.below(8);
            }
        }
        // Extreme values in the headers.
        4 => {
            for _ in 0..=random.below(4) {
                let at = 14 + random.below(bytes.len() as u64 - 14) as usize;
                bytes[at] = random.pick(&[0, 1, 0x7f, 0x80, 0xfe, 0xff, 0x45, 0x4f]);
            }
        }
        // Cut, or with more behind it.
        5 => bytes.truncate(LENGTH_MIN + 1 + random.below(bytes.len() as u64 - 14) as usize),
        6 => bytes.extend((0..random.below(1400)).map(|n| n as u8)),
        // Nothing but noise behind the hardware addresses.
        _ => {
            let kind = random.pick(&[[8, 0], [8, 0], [8, 6], [0x86, 0xdd], [0x81, 0]]);
            bytes.truncate(12);
            bytes.extend(kind);
            bytes.extend((0..1 + random.below(120)).map(|_| random.next() as u8));
        }
    }
    bytes
}

/// Where the next frame comes in, and the frame.
fn next(random: &mut Random, loaded: &Loaded, guests: &[Interface]) -> Option<(u32, Vec<u8>)> {
    let index = |name: &str| if_nametoindex(name).unwrap();
    let (ifindex, frame) = match random.below(10) {
        0 => {
            let to = random.below(GUESTS as u64) as usize;
            (index(PUNT), responder_frame(random, index(&guest(to))))
        }
        1..=5 if !guests.is_empty() => {
            let from = random.pick(guests);
            (from.ifindex, hostile(random, Some(&from), guests))
        }
        _ if loaded.tables().config.uplink != 0 => (index(UPLINK), hostile(random, None, guests)),
        _ => return None,
    };
    arrives(&frame).then_some((ifindex, frame))
}

#[test]
fn arbitrary_bytes_get_no_verdict_that_the_model_denies_and_checksums_stay_right() {
    let name = "arbitrary_bytes_get_no_verdict_that_the_model_denies_and_checksums_stay_right";
    let Some(bench) = Bench::new(name) else {
        return;
    };
    let mut random = Random::seeded("fuzz", 71);
    let devices = narrow_devices();
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let mut host = Host::default();
    let mut tally = Tally::default();
    let (mut sent, mut whole) = (0_u64, 0_u64);
    while tally.packets < packets() {
        let rules_max = random.pick(&[1, 4, 30]);
        let desired = desired(&mut random, rules_max);
        let desired = narrow(&mut random, desired);
        let tables = compile(&desired, &devices, loaded.tables()).unwrap();
        loaded.update(tables.clone()).unwrap();
        host.load(tables);
        let guests: Vec<Interface> = loaded.tables().interfaces.values().copied().collect();
        for _ in 0..EPOCH {
            let Some((ifindex, frame)) = next(&mut random, &loaded, &guests) else { continue };
            let Some(run) = compare_frame(&loaded, &mut host, &mut tally, ifindex, &frame) else {
                continue;
            };
            sent += 1;
            // Only who sends right checksums has a claim to right ones.
            if checksum::wrong(&frame).is_none() {
                whole += 1;
                let wrong = checksum::wrong(&run);
                assert_eq!(wrong, None, "on {ifindex}:\n  {frame:02x?}\n→ {run:02x?}");
            }
        }
        assert!(tally.disagreements.is_empty(), "{}", tally.disagreements[0]);
    }
    eprintln!("{} packets, {sent} sent on, {whole} with right checksums", tally.packets);
    assert!(whole > tally.packets / 200, "too few packets went on to prove anything: {whole}");
    let asked = loaded.run(if_nametoindex(UPLINK).unwrap(), &[0; 60], TRACE_MARK);
    asked.expect("the programs still answer");
}
