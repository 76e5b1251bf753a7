//! What one interface's guest heard, until it is too old.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::message::{Answer, Query};
use super::names::Owned;

/// Answers kept for an interface; at the limit the one that ends first gives way.
const ANSWERS_MAX: usize = 128;

/// The most that one answer may hold, and all of an interface: names that an answer
/// says once, and points to, are here as often as it has records.
const ANSWER_BYTES_MAX: usize = 16 * 1024;
const BYTES_MAX: usize = 512 * 1024;

/// A server's longer times are cut to these: what was wrong heals within them.
const LIFE_S_MAX: u32 = 3600;
const NONE_LIFE_S_MAX: u32 = 300;

/// Everything that an answer may depend on.
type Key = (Owned, u16, bool, bool);

struct Entry {
    answer: Arc<Answer>,
    bytes: usize,
    heard: Duration,
    ends: Duration,
}

#[derive(Default)]
pub struct Cache {
    entries: BTreeMap<Key, Entry>,
    bytes: usize,
}

fn key(query: &Query) -> Key {
    let dnssec = query.edns.is_some_and(|edns| edns.dnssec);
    (query.name.clone(), query.kind.to_int(), dnssec, query.unchecked)
}

impl Cache {
    /// The answer and its age in seconds.
    pub fn find(&self, query: &Query, now: Duration) -> Option<(Arc<Answer>, u32)> {
        let entry = self.entries.get(&key(query)).filter(|entry| now < entry.ends)?;
        let age = now.saturating_sub(entry.heard).as_secs();
        Some((entry.answer.clone(), u32::try_from(age).unwrap_or(u32::MAX)))
    }

    pub fn keep(&mut self, query: &Query, answer: &Arc<Answer>, now: Duration) {
        let most = if answer.answers.is_empty() { NONE_LIFE_S_MAX } else { LIFE_S_MAX };
        let life = answer.life_s().min(most);
        let bytes = answer.held_bytes();
        if life == 0 || bytes > ANSWER_BYTES_MAX {
            return;
        }
        let key = key(query);
        self.forget(&key);
        while self.entries.len() >= ANSWERS_MAX || self.bytes + bytes > BYTES_MAX {
            let first = self.entries.iter().min_by_key(|(_, e)| e.ends);
            let Some(first) = first.map(|(key, _)| key.clone()) else { break };
            self.forget(&first);
        }
        let ends = now + Duration::from_secs(life.into());
        self.bytes += bytes;
        self.entries.insert(key, Entry { answer: answer.clone(), bytes, heard: now, ends });
    }

    fn forget(&mut self, key: &Key) {
        if let Some(entry) = self.entries.remove(key) {
            self.bytes -= entry.bytes;
        }
    }
}
