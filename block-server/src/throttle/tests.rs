//! Limits and turns on a clock and a disk that are numbers.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use model::{Limits, Rate, VolumeKind};
use proptest::prelude::*;

use super::*;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const SECOND: u64 = 1_000_000_000;

fn read(ticket: u32, offset: u64, length: u64) -> Arrival {
    Arrival { ticket, class: Class::Read, offset, length }
}

fn alone() -> Admission {
    Admission::new(Lane::alone())
}

fn threads(count: usize) -> Vec<Admission> {
    Lane::for_threads(count).into_iter().map(Admission::new).collect()
}

/// A disk that serves one request after the other, 1 byte a nanosecond, and the
/// clients of its volumes: `depth` requests of `length` at every time.
struct Bench {
    threads: Vec<Admission>,
    /// Of each volume.
    homes: Vec<usize>,
    now: u64,
    disk: VecDeque<(u32, u32)>,
    clients: Vec<(u64, u32)>,
    tickets: BTreeMap<u32, (u32, u64, u64)>,
    next_ticket: u32,
    served: Vec<u64>,
    /// Longest time from a request to its answer.
    worst: Vec<u64>,
    fair: bool,
}

impl Bench {
    fn new(clients: &[(u64, u32)], limits: Limits, fair: bool) -> Self {
        Self::spread(clients, &vec![0; clients.len()], limits, fair)
    }

    fn spread(clients: &[(u64, u32)], homes: &[usize], limits: Limits, fair: bool) -> Self {
        let mut bench = Self {
            threads: threads(homes.iter().max().unwrap() + 1),
            homes: homes.to_vec(),
            now: 0,
            disk: VecDeque::new(),
            clients: clients.to_vec(),
            tickets: BTreeMap::new(),
            next_ticket: 0,
            served: vec![0; clients.len()],
            worst: vec![0; clients.len()],
            fair,
        };
        for volume in 0..clients.len() {
            bench.home(volume as u32).add(volume as u32, limits);
        }
        for volume in (0..clients.len()).rev() {
            for _ in 0..clients[volume].1 {
                bench.ask(volume as u32);
            }
        }
        bench
    }

    fn home(&mut self, volume: u32) -> &mut Admission {
        &mut self.threads[self.homes[volume as usize]]
    }

    fn ask(&mut self, volume: u32) {
        let (length, _) = self.clients[volume as usize];
        let ticket = self.next_ticket;
        self.next_ticket += 1;
        self.tickets.insert(ticket, (volume, length, self.now));
        // Far apart, so that none are merged.
        let arrival = read(ticket, u64::from(ticket) << 30, length);
        let now = self.now;
        if !self.fair || self.home(volume).arrive(now, volume, &arrival) {
            self.disk.push_back((volume, ticket));
        }
    }

    /// Serves until `count` requests of all are answered.
    fn run(&mut self, count: u32) {
        for _ in 0..count {
            for thread in self.threads.iter_mut().filter(|_| self.fair) {
                while let Some(next) = thread.next(self.now) {
                    self.disk.push_back(next);
                }
            }
            let Some((volume, ticket)) = self.disk.pop_front() else {
                let wake = self.threads.iter().filter_map(Admission::wake_at).min();
                let wake = wake.expect("something will be able to go");
                assert!(wake > self.now, "a wait that is over is no wait");
                self.now = wake;
                continue;
            };
            let (_, length, asked) = self.tickets.remove(&ticket).expect("asked once");
            self.now += length;
            self.served[volume as usize] += length;
            let worst = &mut self.worst[volume as usize];
            *worst = (*worst).max(self.now - asked);
            if self.fair {
                self.home(volume).ended(volume, Class::Read, length);
            }
            self.ask(volume);
        }
    }
}

#[test]
fn a_thousand_large_requests_do_not_starve_a_neighbour_of_one_small() {
    let clients = [(MIB, 1000), (4 * KIB, 1)];
    let mut fair = Bench::new(&clients, Limits::none(), true);
    fair.run(20_000);
    let most = SHARED_BYTES_MAX + MIB + 8 * KIB;
    assert!(fair.worst[1] <= most, "{} bytes stood before it", fair.worst[1]);
    assert!(fair.served[1] >= 4 * KIB * 5000, "{:?}", fair.served);
    let mut unfair = Bench::new(&clients, Limits::none(), false);
    unfair.run(20_000);
    assert!(unfair.worst[1] > 900 * MIB, "the test sees the difference: {}", unfair.worst[1]);
}

#[test]
fn nor_do_they_on_another_thread() {
    let mut fair = Bench::spread(&[(MIB, 1000), (4 * KIB, 1)], &[0, 1], Limits::none(), true);
    fair.run(20_000);
    let most = SHARED_BYTES_MAX + MIB + 8 * KIB;
    assert!(fair.worst[1] <= most, "{} bytes stood before it", fair.worst[1]);
    assert!(fair.served[1] >= 4 * KIB * 5000, "{:?}", fair.served);
}

#[test]
fn those_that_ask_for_all_get_the_same_in_bytes_on_whichever_thread() {
    for homes in [[0, 1, 1, 1], [0, 0, 1, 1], [0, 1, 2, 3], [0, 0, 0, 1]] {
        let clients = [(128 * KIB, 100), (64 * KIB, 200), (16 * KIB, 1000), (128 * KIB, 64)];
        let mut bench = Bench::spread(&clients, &homes, Limits::none(), true);
        bench.run(60_000);
        let (least, most) =
            (bench.served.iter().min().unwrap(), bench.served.iter().max().unwrap());
        assert!(most - least < most / 5, "{homes:?}: {:?}", bench.served);
    }
}

#[test]
fn what_another_thread_has_left_a_volume_gets_again() {
    let mut both = threads(2);
    (0..2).for_each(|thread| both[thread].add(0, Limits::none()));
    let [flood, other] = &mut both[..] else { unreachable!("two threads") };
    assert!(other.arrive(0, 0, &read(0, 0, 4 * KIB)));
    let went = (1..=64).filter(|ticket| flood.arrive(1, 0, &read(*ticket, 0, MIB))).count();
    assert_eq!(went as u64, SHARED_BYTES_MAX / MIB);
    assert_eq!((flood.piece_max(1), flood.send_max(1)), (PIECE_BYTES, usize::MAX));
    other.ended(0, Class::Read, 4 * KIB);
    assert_eq!(flood.next(1), None, "it may come again at once");
    let later = flood.wake_at().expect("it looks again even if nothing of its own ends");
    assert!(later <= 1 + SHARED_NS, "{later}");
    let rest = std::iter::from_fn(|| flood.next(later)).count();
    assert_eq!(went + rest, 64);
    assert_eq!(flood.piece_max(later), usize::MAX);
}

#[test]
fn two_that_ask_for_all_get_the_same_in_bytes() {
    let mut bench =
        Bench::new(&[(MIB, 64), (16 * KIB, 1000), (128 * KIB, 64)], Limits::none(), true);
    bench.run(40_000);
    let (least, most) = (bench.served.iter().min().unwrap(), bench.served.iter().max().unwrap());
    assert!(most - least < 8 * MIB + most / 50, "{:?}", bench.served);
}

#[test]
fn alone_a_volume_has_all_of_the_disk() {
    let mut bench = Bench::new(&[(MIB, 200)], Limits::none(), true);
    assert_eq!(bench.disk.len(), 200, "all of them are on their way");
    bench.run(1000);
    assert_eq!(bench.now, 1000 * MIB, "it never stood still");
}

#[test]
fn while_volumes_share_large_requests_go_by_pieces() {
    let mut admission = alone();
    (0..2).for_each(|volume| admission.add(volume, Limits::default()));
    assert!(admission.arrive(0, 0, &read(1, 0, MIB)));
    assert_eq!((admission.piece_max(0), admission.send_max(0)), (usize::MAX, usize::MAX));
    assert!(admission.arrive(1, 1, &read(2, 0, 4 * KIB)));
    assert_eq!((admission.piece_max(1), admission.send_max(1)), (PIECE_BYTES, SEND_BYTES));
    let alone = 1 + SHARED_NS;
    assert_eq!((admission.piece_max(alone), admission.send_max(alone)), (usize::MAX, usize::MAX));
}

#[test]
fn a_volume_gets_its_rate_and_its_burst_and_no_more() {
    let gp3 = VolumeKind::Gp3.limits(10, None, None).unwrap();
    let mut bench = Bench::new(&[(4 * KIB, 64)], gp3, true);
    while bench.now < 10 * SECOND {
        bench.run(1);
    }
    let count = bench.served[0] / (4 * KIB);
    assert!((30_000..=30_000 + 300 + 64).contains(&count), "{count} in ten seconds");
    let mut bench = Bench::new(&[(MIB, 8)], gp3, true);
    while bench.now < 10 * SECOND {
        bench.run(1);
    }
    let mib = bench.served[0] / MIB;
    assert!((1250..=1250 + 14 + 8).contains(&mib), "{mib} MiB in ten seconds");
}

#[test]
fn credits_are_spent_at_the_peak_and_then_it_is_the_base() {
    let rate = Rate { sustained: 100, peak: 1000, credits: 4500 };
    let limits = Limits { operations: Some(rate), ..Limits::none() };
    let mut bench = Bench::new(&[(512, 32)], limits, true);
    let mut at = |second: u64| {
        while bench.now < second * SECOND {
            bench.run(1);
        }
        bench.served[0] / 512
    };
    // 900 a second more than it earns: after five seconds the credits are gone.
    let (four, eight, ten) = (at(4), at(8), at(10));
    assert!((4000..=4150).contains(&four), "{four}");
    assert!((5280..=5420).contains(&eight), "{eight}");
    assert!((195..=205).contains(&(ten - eight)), "{}", ten - eight);
}

#[test]
fn limits_change_under_waiting_requests_and_lose_none() {
    let slow = Limits { operations: Some(Rate::steady(1)), ..Limits::none() };
    let mut admission = alone();
    admission.add(0, slow);
    let mut waiting = BTreeSet::new();
    for ticket in 0..100 {
        if !admission.arrive(0, 0, &read(ticket, u64::from(ticket) << 30, 4096)) {
            waiting.insert(ticket);
        }
    }
    assert_eq!((waiting.len(), admission.waiting(0)), (99, 99));
    assert_eq!(admission.next(0), None);
    assert!(admission.arrive(0, 0, &Arrival { class: Class::Flush, ..read(500, 0, 0) }));
    // Faster, for a moment; then without any limit.
    let fast = Limits { operations: Some(Rate::steady(1000)), ..Limits::none() };
    admission.set_limits(SECOND, 0, fast);
    for now in [SECOND, SECOND + 2_000_000] {
        while let Some((_, ticket)) = admission.next(now) {
            assert!(waiting.remove(&ticket), "{ticket} goes once");
        }
    }
    assert!((0..99).contains(&waiting.len()), "{}", waiting.len());
    admission.set_limits(SECOND + 2_000_000, 0, Limits::none());
    while let Some((_, ticket)) = admission.next(SECOND + 2_000_000) {
        assert!(waiting.remove(&ticket), "{ticket} goes once");
    }
    assert_eq!((waiting.len(), admission.waiting(0)), (0, 0));
}

#[test]
fn while_a_volume_is_held_changes_wait_and_reads_go() {
    let mut admission = alone();
    admission.add(0, Limits::none());
    admission.hold(0);
    let write = Arrival { class: Class::Write, ..read(1, 0, 4096) };
    assert!(!admission.arrive(0, 0, &write));
    assert!(!admission.arrive(0, 0, &Arrival { ticket: 2, class: Class::Change, ..write }));
    assert!(!admission.arrive(0, 0, &Arrival { ticket: 3, ..write }));
    assert!(admission.arrive(0, 0, &read(4, 0, 4096)));
    assert_eq!(admission.next(1), None);
    admission.forget(0, 2);
    admission.release(0);
    assert_eq!([admission.next(2), admission.next(2)], [Some((0, 1)), Some((0, 3))]);
    assert_eq!(admission.next(2), None);
}

/// Of the property's volumes.
const fn home(volume: u32) -> usize {
    volume as usize % 2
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]
    /// Whatever comes in whatever order: each request goes exactly once.
    #[test]
    fn each_request_goes_exactly_once(
        script in prop::collection::vec((0_u8..9, 0_u32..4, 1_u64..8 * MIB, 0_u64..SECOND), 1..300),
    ) {
        let mut threads = threads(2);
        for volume in 0..4 {
            threads[home(volume)].add(volume, Limits::none());
        }
        let (mut now, mut ticket) = (0, 0);
        let mut waiting = BTreeSet::new();
        let mut running: VecDeque<(u32, Class, u64)> = VecDeque::new();
        let mut known = BTreeMap::new();
        for (deed, volume, size, pause) in script {
            match deed {
                0..=4 => {
                    let class = [Class::Read, Class::Write, Class::Change, Class::Ask, Class::Read]
                        [usize::from(deed)];
                    let arrival = Arrival { ticket, class, offset: size, length: size };
                    known.insert(ticket, (class, size));
                    if threads[home(volume)].arrive(now, volume, &arrival) {
                        running.push_back((volume, class, size));
                    } else {
                        waiting.insert(ticket);
                    }
                    ticket += 1;
                }
                5 => {
                    let rate = Some(Rate { sustained: size, peak: size * 2, credits: size });
                    let limits = Limits { operations: rate, bytes: rate, unit_bytes: 0 };
                    threads[home(volume)].set_limits(now, volume, if size % 2 == 0 { limits } else { Limits::none() });
                }
                6 if threads[home(volume)].is_held(volume) => threads[home(volume)].release(volume),
                6 => threads[home(volume)].hold(volume),
                7 => {
                    if let Some((volume, class, size)) = running.pop_front() {
                        threads[home(volume)].ended(volume, class, size);
                    }
                }
                _ => now += pause,
            }
            while let Some((volume, ticket)) = threads.iter_mut().find_map(|t| t.next(now)) {
                prop_assert!(waiting.remove(&ticket));
                let (class, size) = known[&ticket];
                running.push_back((volume, class, size));
            }
        }
        for volume in 0..4 {
            threads[home(volume)].release(volume);
            threads[home(volume)].set_limits(now, volume, Limits::none());
        }
        loop {
            while let Some((volume, ticket)) = threads.iter_mut().find_map(|t| t.next(now)) {
                prop_assert!(waiting.remove(&ticket));
                let (class, size) = known[&ticket];
                running.push_back((volume, class, size));
            }
            let Some((volume, class, size)) = running.pop_front() else { break };
            threads[home(volume)].ended(volume, class, size);
        }
        prop_assert!(waiting.is_empty(), "{} never went", waiting.len());
        for volume in 0..4 {
            threads[home(volume)].remove(volume);
        }
    }
}
