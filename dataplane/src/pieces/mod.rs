//! Fragments that overtook the first of their datagram (`ebpf::held`): which of them are kept,
//! for how long, and when it is looked whether their first one has come. Pure: [`thread`] does it.

use std::collections::BTreeMap;
use std::time::Duration;

pub mod thread;

/// How long a fragment waits for its first one: longer than a reordering of the network, and
/// short beside the 15 to 60 s that a receiver waits (RFC 791, RFC 8200).
pub const WAIT_MAX: Duration = Duration::from_secs(1);
/// After this it is looked for the first time whether the first one has come; then after
/// twice as long, and so on.
const PAUSE_FIRST: Duration = Duration::from_millis(1);
/// Of one interface at once: some ten datagrams of the greatest size.
pub const BYTES_AN_INTERFACE_MAX: usize = 1 << 20;
/// Of all together.
pub const BYTES_MAX: usize = 16 << 20;

/// A fragment, as it came in by a device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    pub ifindex: u32,
    /// Of the interface that it concerns.
    pub slot: u32,
    pub frame: Vec<u8>,
}

/// What waits. Times are of any clock that only goes on.
#[derive(Debug, Default)]
pub struct Pieces {
    /// By when it is to be looked at, and the order in which they came.
    waiting: BTreeMap<(Duration, u64), Ask>,
    /// Bytes by slot.
    bytes: BTreeMap<u32, usize>,
    count: u64,
}

/// What becomes of a fragment whose time has come to be looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Due {
    /// Whether its first one has come is to be asked, and it to be given back where not.
    Ask(Ask),
    /// It has waited long enough.
    Late(Held),
}

/// A fragment, since when it waits, and how long it is let alone next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ask {
    pub held: Held,
    since: Duration,
    pause: Duration,
}

impl Pieces {
    /// Keeps it, or gives it back where there is no room.
    pub fn keep(&mut self, held: Held, now: Duration) -> Result<(), Held> {
        self.put(Ask { held, since: now, pause: PAUSE_FIRST }, now)
    }

    /// The same of one that was asked about in vain.
    pub fn put(&mut self, ask: Ask, now: Duration) -> Result<(), Held> {
        let Ask { held, since, pause } = ask;
        let all: usize = self.bytes.values().sum();
        let own = self.bytes.get(&held.slot).copied().unwrap_or(0);
        let more = held.frame.len();
        if own + more > BYTES_AN_INTERFACE_MAX || all + more > BYTES_MAX {
            return Err(held);
        }
        self.bytes.insert(held.slot, own + more);
        self.count += 1;
        let at = (now + pause).min(since + WAIT_MAX);
        self.waiting.insert((at, self.count), Ask { held, since, pause: pause * 2 });
        Ok(())
    }

    /// When something is to be looked at next.
    pub fn next(&self) -> Option<Duration> {
        self.waiting.keys().next().map(|(at, _)| *at)
    }

    /// What is due now, one after the other.
    pub fn due(&mut self, now: Duration) -> Option<Due> {
        let first = self.waiting.first_entry().filter(|entry| entry.key().0 <= now)?;
        let ask = first.remove();
        let slot = ask.held.slot;
        if let Some(own) = self.bytes.get_mut(&slot) {
            *own -= ask.held.frame.len();
            if *own == 0 {
                self.bytes.remove(&slot);
            }
        }
        Some(if now < ask.since + WAIT_MAX { Due::Ask(ask) } else { Due::Late(ask.held) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(slot: u32, length: usize) -> Held {
        Held { ifindex: 3, slot, frame: vec![slot as u8; length] }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn it_is_asked_after_1_2_4_milliseconds_and_given_up_after_a_second() {
        let mut pieces = Pieces::default();
        pieces.keep(held(1, 100), ms(5000)).unwrap();
        let mut asked = Vec::new();
        loop {
            let now = pieces.next().unwrap();
            assert_eq!(pieces.due(now - Duration::from_nanos(1)), None, "not before its time");
            match pieces.due(now).unwrap() {
                Due::Ask(ask) => {
                    asked.push((now - ms(5000)).as_millis());
                    pieces.put(ask, now).unwrap();
                }
                Due::Late(late) => {
                    assert_eq!((late, now), (held(1, 100), ms(5000) + WAIT_MAX));
                    break;
                }
            }
        }
        assert_eq!(asked, [1, 3, 7, 15, 31, 63, 127, 255, 511]);
        assert_eq!((pieces.next(), pieces.bytes.len()), (None, 0));
    }

    #[test]
    fn nobody_takes_more_than_his_room_and_all_together_no_more_than_there_is() {
        let mut pieces = Pieces::default();
        let each = BYTES_AN_INTERFACE_MAX / 8;
        for slot in 1..=BYTES_MAX / BYTES_AN_INTERFACE_MAX {
            let slot = slot as u32;
            assert!((0..8).all(|_| pieces.keep(held(slot, each), ms(0)).is_ok()));
            assert_eq!(pieces.keep(held(slot, 1), ms(0)), Err(held(slot, 1)));
        }
        assert_eq!(pieces.keep(held(99, 1), ms(0)), Err(held(99, 1)), "the host has no more");
        assert!(matches!(pieces.due(WAIT_MAX), Some(Due::Late(_))));
        assert!(pieces.keep(held(99, 1), ms(0)).is_ok());
    }
}
