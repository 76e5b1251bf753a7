//! The time, told by the simple network time protocol (RFC 5905, 14), as a core:
//! message in, message out.
//!
//! ```text
//!  0   1        2     3          4           8                12            16
//!  |LVM|stratum |poll |precision | root delay| root dispersion| reference id| four timestamps
//! ```
//! A timestamp is seconds since 1900, which begin anew in 2036, and a fraction in 32 bits.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

pub const ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::from_bits(ebpf::TIME_ADDRESS)),
    IpAddr::V6(Ipv6Addr::from_bits(ebpf::TIME_ADDRESS6.bits())),
];
pub const PORT: u16 = 123;

const LENGTH: usize = 48;
const CLIENT: u8 = 3;
const SERVER: u8 = 4;
const VERSIONS: std::ops::RangeInclusive<u8> = 1..=4;

/// Whoever keeps the host's clock, we do not ask it how well: the stratum of a clock
/// that nobody vouches for, so that a guest with a better source prefers that one.
const STRATUM: u8 = 10;
/// What stands for the host's own clock in a reference id.
const LOCAL_CLOCK: [u8; 4] = [127, 127, 1, 1];
/// A power of two of a second: about a microsecond, as the kernel's clock is read.
const PRECISION: i8 = -20;
/// In 65536ths of a second: 15 ms, more than a host disciplined over the internet is off.
const DISPERSION: u32 = 1024;

/// From 1900 to 1970.
const ERA_S: u64 = 2_208_988_800;

/// Answers a client's question; `None` for all that is none.
pub fn answer(message: &[u8], since_1970: Duration) -> Option<[u8; LENGTH]> {
    let question: &[u8; LENGTH] = message.first_chunk()?;
    let version = question[0] >> 3 & 7;
    if question[0] & 7 != CLIENT || !VERSIONS.contains(&version) {
        return None;
    }
    let now = timestamp(since_1970);
    let mut reply = [0; LENGTH];
    reply[0] = version << 3 | SERVER;
    reply[1] = STRATUM;
    reply[2] = question[2];
    reply[3] = PRECISION.to_be_bytes()[0];
    reply[8..12].copy_from_slice(&DISPERSION.to_be_bytes());
    reply[12..16].copy_from_slice(&LOCAL_CLOCK);
    reply[16..24].copy_from_slice(&now);
    // The client's transmit time comes back: so it knows its own question.
    reply[24..32].copy_from_slice(&question[40..48]);
    reply[32..40].copy_from_slice(&now);
    reply[40..48].copy_from_slice(&now);
    Some(reply)
}

fn timestamp(since_1970: Duration) -> [u8; 8] {
    let seconds = (since_1970.as_secs() + ERA_S) & u64::from(u32::MAX);
    let fraction = (u64::from(since_1970.subsec_nanos()) << 32) / 1_000_000_000;
    (seconds << 32 | fraction).to_be_bytes()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn question(first: u8) -> [u8; LENGTH] {
        let mut question = [0; LENGTH];
        question[0] = first;
        question[40..48].copy_from_slice(b"transmit");
        question
    }

    #[test]
    fn a_client_is_told_the_time_in_its_own_version() {
        // 2024-01-01T00:00:00.5Z, by another's arithmetic.
        let now = Duration::from_millis(1_704_067_200_500);
        for version in VERSIONS {
            let reply = answer(&question(version << 3 | CLIENT), now).unwrap();
            assert_eq!((reply[0], reply[1]), (version << 3 | SERVER, STRATUM));
            assert_eq!(&reply[24..32], b"transmit");
            assert_eq!(reply[40..44], 0xe93c_7f00_u32.to_be_bytes());
            assert_eq!(reply[44..48], 0x8000_0000_u32.to_be_bytes());
        }
    }

    #[test]
    fn the_era_ends_in_2036_and_the_seconds_begin_anew() {
        let last = Duration::from_secs((1 << 32) - 1 - ERA_S);
        assert_eq!(timestamp(last)[..4], [0xff; 4]);
        assert_eq!(timestamp(last + Duration::from_secs(1))[..4], [0; 4]);
    }

    proptest! {
        #[test]
        fn whatever_is_no_clients_question_is_not_answered(
            bytes in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let asked = bytes.len() >= LENGTH
                && bytes[0] & 7 == CLIENT
                && VERSIONS.contains(&(bytes[0] >> 3 & 7));
            prop_assert_eq!(answer(&bytes, Duration::ZERO).is_some(), asked);
        }
    }
}
