//! How long tracked flows may be silent: EC2's ranges and defaults (user guide,
//! "Idle connection tracking timeout").

use std::ops::RangeInclusive;

use rpc::dataplane::IdleTimeouts;

pub const TCP_IDLE_S: u32 = 432_000;
pub const UDP_IDLE_S: u32 = 30;
pub const UDP_STREAM_IDLE_S: u32 = 180;
/// Of all other protocols; EC2 has no setting for it.
pub const OTHER_IDLE_S: u32 = 600;

const TCP_RANGE: RangeInclusive<u32> = 60..=432_000;
const UDP_RANGE: RangeInclusive<u32> = 30..=60;
const UDP_STREAM_RANGE: RangeInclusive<u32> = 60..=180;

/// Seconds, each inside its range.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Idle {
    pub tcp_established: u32,
    pub udp: u32,
    pub udp_stream: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{which} of {given} s is outside EC2's range")]
pub struct Wrong {
    pub which: &'static str,
    pub given: u32,
    pub least: u32,
    pub most: u32,
}

pub fn of(wanted: &IdleTimeouts) -> Result<Idle, Wrong> {
    Ok(Idle {
        tcp_established: one("tcp-established", wanted.tcp_established, TCP_IDLE_S, &TCP_RANGE)?,
        udp: one("udp", wanted.udp, UDP_IDLE_S, &UDP_RANGE)?,
        udp_stream: one("udp-stream", wanted.udp_stream, UDP_STREAM_IDLE_S, &UDP_STREAM_RANGE)?,
    })
}

fn one(
    which: &'static str,
    wanted: Option<u32>,
    default: u32,
    range: &RangeInclusive<u32>,
) -> Result<u32, Wrong> {
    let given = wanted.unwrap_or(default);
    if range.contains(&given) {
        return Ok(given);
    }
    Err(Wrong { which, given, least: *range.start(), most: *range.end() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn idle_timeouts_are_ec2s_at_first_and_inside_its_ranges_always() {
        let default = of(&IdleTimeouts::default()).unwrap();
        assert_eq!((default.tcp_established, default.udp, default.udp_stream), (432_000, 30, 180));
        type Set = fn(&mut IdleTimeouts, u32);
        let settings: [(Set, &str, u32, u32); 3] = [
            (|i, s| i.tcp_established = Some(s), "tcp-established", 60, 432_000),
            (|i, s| i.udp = Some(s), "udp", 30, 60),
            (|i, s| i.udp_stream = Some(s), "udp-stream", 60, 180),
        ];
        for (set, which, least, most) in settings {
            let asked = |seconds| {
                let mut wanted = IdleTimeouts::default();
                set(&mut wanted, seconds);
                of(&wanted)
            };
            assert!(asked(least).is_ok() && asked(most).is_ok(), "{which}");
            for given in [0, least - 1, most + 1, u32::MAX] {
                assert_eq!(asked(given), Err(Wrong { which, given, least, most }));
            }
        }
    }
}
