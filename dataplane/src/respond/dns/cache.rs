//! What one interface's guest heard, until it is too old.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::message::{Answer, Query};
use super::names::Owned;

/// Answers kept for an interface; at the limit the one that ends first gives way.
const ANSWERS_MAX: usize = 128;

/// The longest answer that is kept, on the wire: an interface holds under 256 KiB so.
pub const ANSWER_BYTES_MAX: usize = 2048;

/// A server's longer times are cut to these: what was wrong heals within them.
const LIFE_S_MAX: u32 = 3600;
const NONE_LIFE_S_MAX: u32 = 300;

/// Everything that an answer may depend on.
type Key = (Owned, u16, bool, bool);

struct Entry {
    answer: Arc<Answer>,
    heard: Duration,
    ends: Duration,
}

#[derive(Default)]
pub struct Cache(BTreeMap<Key, Entry>);

fn key(query: &Query) -> Key {
    let dnssec = query.edns.is_some_and(|edns| edns.dnssec);
    (query.name.clone(), query.kind.to_int(), dnssec, query.unchecked)
}

impl Cache {
    /// The answer and its age in seconds.
    pub fn find(&self, query: &Query, now: Duration) -> Option<(Arc<Answer>, u32)> {
        let entry = self.0.get(&key(query)).filter(|entry| now < entry.ends)?;
        let age = now.saturating_sub(entry.heard).as_secs();
        Some((entry.answer.clone(), u32::try_from(age).unwrap_or(u32::MAX)))
    }

    pub fn keep(&mut self, query: &Query, answer: &Arc<Answer>, bytes: usize, now: Duration) {
        let most = if answer.answers.is_empty() { NONE_LIFE_S_MAX } else { LIFE_S_MAX };
        let life = answer.life_s().min(most);
        if life == 0 || bytes > ANSWER_BYTES_MAX {
            return;
        }
        let key = key(query);
        if self.0.len() >= ANSWERS_MAX && !self.0.contains_key(&key) {
            let first = self.0.iter().min_by_key(|(_, e)| e.ends).map(|(key, _)| key.clone());
            first.map(|first| self.0.remove(&first));
        }
        let ends = now + Duration::from_secs(life.into());
        self.0.insert(key, Entry { answer: answer.clone(), heard: now, ends });
    }
}
