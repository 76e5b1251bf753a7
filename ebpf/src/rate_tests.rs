use super::*;

/// Tokens in a jar, filled at each look: what a bucket is to be.
struct Jar {
    rate: u128,
    most: u128,
    /// In units of 1/(ticks a second).
    tokens: u128,
    at: u64,
}

impl Jar {
    fn new(rate: u64, burst: u64) -> Self {
        let most = u128::from(burst) * u128::from(TICKS_A_SECOND);
        Self { rate: rate.into(), most, tokens: most, at: 0 }
    }

    fn take(&mut self, now: u64, units: u64) -> bool {
        let grown = u128::from(now - self.at) * self.rate;
        (self.tokens, self.at) = ((self.tokens + grown).min(self.most), now);
        let asked = u128::from(units) * u128::from(TICKS_A_SECOND);
        let passes = asked <= self.tokens;
        if passes {
            self.tokens -= asked;
        }
        passes
    }
}

fn spend(limit: &Limit, full_at: &mut u64, now: u64, units: u64) -> bool {
    match ask(limit, *full_at, now, units) {
        None => return false,
        Some(Spend::Nothing) => {}
        Some(Spend::Begin(at)) => *full_at = at,
        Some(Spend::Add(ticks)) => *full_at += ticks,
    }
    true
}

fn random(seed: &mut u64) -> u64 {
    *seed ^= *seed << 13;
    *seed ^= *seed >> 7;
    *seed ^= *seed << 17;
    *seed
}

#[test]
fn a_bucket_passes_what_a_jar_of_tokens_passes() {
    // Rates whose unit costs whole parts of a tick, so that both count exactly.
    for (rate, burst) in [(125, 262_144), (1_000_000, 262_144), (8_000_000, 1 << 30)] {
        let limit = Limit::of(rate, burst, BYTES_MIN);
        assert_eq!(u128::from(limit.cost) * u128::from(rate), u128::from(TICKS_A_SECOND * 1024));
        let mut jar = Jar::new(rate, burst);
        let (mut full_at, mut now, mut seed, mut passed) = (0, 0, rate | 1, 0);
        for _ in 0..200_000 {
            let units = 60 + random(&mut seed) % 65_000;
            // A quarter more than the rate, over all.
            now += random(&mut seed) % (limit.price(65_000) * 4 / 5);
            let passes = spend(&limit, &mut full_at, now, units);
            assert_eq!(passes, jar.take(now, units), "{rate} at {now}");
            passed += u64::from(passes);
        }
        assert!(passed > 1000 && passed < 200_000, "{passed} at {rate}");
    }
}

#[test]
fn no_interval_gets_more_than_its_depth_and_its_rate() {
    for (rate, burst) in [(4_000_000, 5_000_000_000), (12_500_000_000, 0), (999_983, 300_000)] {
        let limit = Limit::of(rate, burst, BYTES_MIN);
        let (mut full_at, mut now, mut seed, mut sum) = (0, 1 << 40, 77 + rate, 0_u128);
        let begun = now;
        for _ in 0..100_000 {
            now += random(&mut seed) % (limit.price(9000) + 1);
            let units = 60 + random(&mut seed) % 9000;
            if spend(&limit, &mut full_at, now, units) {
                sum += u128::from(units);
            }
            let seconds_rate = u128::from(now - begun) * u128::from(rate);
            let depth = u128::from(limit.depth) * u128::from(rate);
            let most = (seconds_rate + depth) / u128::from(TICKS_A_SECOND);
            // Costs are rounded down by a part of a tick at most.
            assert!(sum <= most + most / 1000 + 1, "{sum} of {most} at {rate}");
        }
    }
}

#[test]
fn a_burst_spends_its_credits_and_then_goes_on_at_the_baseline() {
    // 10 MB/s at most, 1 MB/s for ever, 90 MB of credits: ten seconds of burst.
    let limits = [Limit::of(10_000_000, 0, BYTES_MIN), Limit::of(1_000_000, 90_000_000, BYTES_MIN)];
    let mut full_at = [0_u64; 2];
    let mut per_second = Vec::new();
    for second in 0..30_u64 {
        let mut passed = 0;
        for packet in 0..20_000 {
            let now = second * TICKS_A_SECOND + packet * (TICKS_A_SECOND / 20_000);
            let asked = [0, 1].map(|i| ask(&limits[i], full_at[i], now, 1000));
            if asked.iter().all(Option::is_some) {
                for i in 0..2 {
                    assert!(spend(&limits[i], &mut full_at[i], now, 1000));
                }
                passed += 1000;
            }
        }
        per_second.push(passed);
    }
    assert!(
        per_second[1..9].iter().all(|p| (9_990_000..=10_010_000).contains(p)),
        "{per_second:?}"
    );
    assert!(per_second[12..].iter().all(|p| (990_000..=1_010_000).contains(p)), "{per_second:?}");
}

#[test]
fn the_least_and_the_greatest_rate_stay_within_a_word() {
    for rate in [PACKETS_A_SECOND_MIN, BYTES_A_SECOND_MIN, UNITS_A_SECOND_MAX] {
        for burst in [0, 1, u64::MAX] {
            let limit = Limit::of(rate, burst, PACKETS_MIN);
            assert!(limit.cost > 0 && limit.depth > 0, "{rate}");
            let years = 9 * 365 * 86_400 * TICKS_A_SECOND;
            // The greatest superframe in the least packets.
            let units = if rate == PACKETS_A_SECOND_MIN { 65_536 } else { 65_536 * 67 };
            assert!(limit.cost.checked_mul(units).is_some());
            _ = ask(&limit, years, years - limit.depth, units);
        }
    }
    assert_eq!(ask(&Limit::NONE, u64::MAX, 0, u64::MAX), Some(Spend::Nothing));
    assert_eq!(ticks(1), 64);
}

#[test]
fn a_clock_that_goes_back_gives_nothing() {
    let limit = Limit::of(1_000_000, 0, BYTES_MIN);
    let mut full_at = 0;
    let now = 1 << 50;
    while spend(&limit, &mut full_at, now, 1500) {}
    assert!(!spend(&limit, &mut full_at, now - limit.depth, 1500));
    assert!(!spend(&limit, &mut full_at, now, 1500));
    assert!(spend(&limit, &mut full_at, now + limit.price(1500) + 1, 1500));
}

#[test]
fn what_is_missing_comes_back_under_another_limit() {
    let now = 5 << 40;
    let (slow, fast) = (Limit::of(1000, 500_000, 1), Limit::of(1_000_000, 500_000, 1));
    let full_at = slow.full_at(400_000, now);
    assert_eq!(slow.missing(full_at, now), 400_000);
    let moved = fast.full_at(slow.missing(full_at, now), now);
    assert_eq!(fast.missing(moved, now), 400_000);
    // Sooner paid, for it is faster.
    assert!(moved - now <= (full_at - now) / 999);
    assert_eq!(fast.missing(fast.full_at(u64::MAX, now), now), 500_000);
    assert_eq!(Limit::NONE.missing(u64::MAX, 0), 0);
    assert_eq!(Limit::NONE.full_at(9, now), now);
}

#[test]
fn two_sources_seldom_share_both_places() {
    let places = |n: u32| source_places(n.wrapping_mul(0x0101), 0x1234_5678_9abc_def1);
    let flood = places(7);
    let (mut one, mut both) = (0, 0);
    for n in 8..1_000_008_u32 {
        let here = places(n);
        assert!(here[0] < SOURCES_A_ROW && (SOURCES_A_ROW..2 * SOURCES_A_ROW).contains(&here[1]));
        let shared = here.iter().zip(flood).filter(|(a, b)| **a == *b).count();
        one += usize::from(shared == 1);
        both += usize::from(shared == 2);
    }
    assert!((20..=120).contains(&one) && both <= 2, "{one} share one place, {both} both");
}

#[test]
fn a_superframe_is_counted_as_what_it_becomes() {
    assert_eq!(on_the_wire(60, 54, 0), (1, 60));
    assert_eq!(on_the_wire(1514, 54, 1460), (1, 1514));
    assert_eq!(on_the_wire(1515, 54, 1460), (2, 1515 + 54));
    // 65 160 bytes in 45 segments of 1448, with timestamps.
    assert_eq!(on_the_wire(65_160 + 66, 66, 1448), (45, 65_160 + 45 * 66));
    assert_eq!(on_the_wire(0, 54, 1), (1, 0));
    assert_eq!(on_the_wire(u32::MAX, 0, 1).0, u32::MAX);
}
