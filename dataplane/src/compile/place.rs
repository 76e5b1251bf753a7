//! Places for policies in the kernel's arrays.
//!
//! A policy that the kernel has already keeps its place. A new one is put where
//! neither the loaded tables nor the new ones have anything, so that no packet is
//! ever judged by half a policy: it is written in full, then the interface's
//! record names it, and only after that may its predecessor's place be used again.
//! So a state may take a third of each table, and all of it may be exchanged at once.

use std::collections::BTreeMap;
use std::sync::Arc;

use ebpf::layout::{POLICIES_MAX, STEPS_MAX, STEPS6_MAX, WORDS_MAX};

use super::Error;
use super::tables::{Content, Placed};

/// What one state may take of each table: a third, so that the state which follows it has
/// room beside it, however little the two have in common, and a third is left for gaps. Of the
/// policies it is half: they leave none.
pub const POLICIES_A_STATE_MAX: u32 = POLICIES_MAX / 2;
pub const STEPS_A_STATE_MAX: u32 = STEPS_MAX / 3;
pub const STEPS6_A_STATE_MAX: u32 = STEPS6_MAX / 3;
pub const WORDS_A_STATE_MAX: u32 = WORDS_MAX / 3;

pub struct Places {
    /// What may not be written: loaded and new.
    taken: BTreeMap<u32, Placed>,
    /// Where a content is in the new tables, or was in the loaded ones.
    by_content: BTreeMap<Arc<Content>, u32>,
    /// The new tables' own.
    pub placed: BTreeMap<u32, Placed>,
    /// What they take.
    used: Used,
}

#[derive(Default)]
struct Used {
    steps: u32,
    steps6: u32,
    words: u32,
}

impl Places {
    pub fn new(loaded: &BTreeMap<u32, Placed>) -> Self {
        let by_content = loaded.iter().map(|(slot, p)| (p.content.clone(), *slot)).collect();
        let used = Used::default();
        Self { taken: loaded.clone(), by_content, placed: BTreeMap::new(), used }
    }

    /// The slot of `content`, old or new.
    pub fn slot(&mut self, content: Content) -> Result<u32, Error> {
        if let Some(slot) = self.by_content.get(&content).copied() {
            if !self.placed.contains_key(&slot) {
                self.pay(&content)?;
                self.placed.insert(slot, self.taken[&slot].clone());
            }
            return Ok(slot);
        }
        self.pay(&content)?;
        let slot = (0..POLICIES_MAX)
            .find(|slot| !self.taken.contains_key(slot))
            .ok_or(Error::Full { table: "policies", limit: POLICIES_A_STATE_MAX })?;
        let content = Arc::new(content);
        let steps = self.taken.values().map(|p| (p.first_step, p.content.steps_len()));
        let first_step = gap("policy steps", steps, content.steps_len(), STEPS_MAX)?;
        let steps6 = self.taken.values().map(|p| (p.first_step6, p.content.steps6_len()));
        let first_step6 = gap("IPv6 policy steps", steps6, content.steps6_len(), STEPS6_MAX)?;
        let words = self.taken.values().map(|p| (p.first_word, p.content.words_len()));
        let first_word = gap("policy words", words, content.words_len(), WORDS_MAX)?;
        let placed = Placed { content: content.clone(), first_step, first_step6, first_word };
        self.by_content.insert(content, slot);
        self.taken.insert(slot, placed.clone());
        self.placed.insert(slot, placed);
        Ok(slot)
    }

    fn pay(&mut self, content: &Content) -> Result<(), Error> {
        let Used { steps, steps6, words } = &mut self.used;
        *steps += content.steps_len();
        *steps6 += content.steps6_len();
        *words += content.words_len();
        for (table, used, limit) in [
            ("policies", self.placed.len() as u32 + 1, POLICIES_A_STATE_MAX),
            ("policy steps", *steps, STEPS_A_STATE_MAX),
            ("IPv6 policy steps", *steps6, STEPS6_A_STATE_MAX),
            ("policy words", *words, WORDS_A_STATE_MAX),
        ] {
            if used > limit {
                return Err(Error::Full { table, limit });
            }
        }
        Ok(())
    }
}

/// The first gap of `len` between the extents.
fn gap(
    table: &'static str,
    extents: impl Iterator<Item = (u32, u32)>,
    len: u32,
    end: u32,
) -> Result<u32, Error> {
    let mut extents: Vec<(u32, u32)> = extents.filter(|(_, len)| *len > 0).collect();
    extents.sort_unstable();
    let mut free = 0;
    for (first, taken) in extents {
        if first.saturating_sub(free) >= len {
            break;
        }
        free = free.max(first + taken);
    }
    match free.checked_add(len) {
        Some(last) if last <= end => Ok(free),
        _ => Err(Error::Scattered { table, len }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gap_is_found_between_before_and_after_extents() {
        let gap =
            |extents: &[(u32, u32)], len, end| gap("steps", extents.iter().copied(), len, end).ok();
        assert_eq!(gap(&[], 4, 4), Some(0));
        assert_eq!(gap(&[(0, 2)], 3, 4), None);
        assert_eq!(gap(&[(4, 2), (0, 2)], 2, 8), Some(2));
        assert_eq!(gap(&[(4, 2), (0, 2)], 3, 9), Some(6));
        assert_eq!(gap(&[(2, 2)], 2, 4), Some(0));
    }

    /// A policy like no other, of so many rows.
    fn content(number: &mut u64, rows: usize) -> Content {
        *number += 1;
        Content { rows: vec![*number; rows], ..Content::default() }
    }

    #[test]
    fn a_state_may_take_a_third_and_no_more() {
        let (mut places, mut number) = (Places::new(&BTreeMap::new()), 0);
        let most = WORDS_A_STATE_MAX as usize;
        places.slot(content(&mut number, most - 1)).unwrap();
        let again = places.slot(content(&mut number, 1)).unwrap();
        number -= 1;
        assert_eq!(places.slot(content(&mut number, 1)), Ok(again), "shared, and not paid twice");
        let full = Error::Full { table: "policy words", limit: WORDS_A_STATE_MAX };
        assert_eq!(places.slot(content(&mut number, 1)), Err(full));
    }

    /// Each state takes all that it may, some of its policies are the last one's, and their sizes are
    /// drawn anew: thousands of them follow each other, and each finds its places.
    #[test]
    fn states_that_take_all_they_may_follow_each_other_for_ever() {
        let mut number = 0;
        let mut dice = 0x9e37_79b9_7f4a_7c15_u64;
        let mut roll = |below: u64| {
            dice = dice.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (dice >> 33) % below
        };
        // As large as the largest that compile makes, and as small.
        let largest = 17 * 2048;
        let mut loaded: BTreeMap<u32, Placed> = BTreeMap::new();
        for state in 0..1000 {
            let mut places = Places::new(&loaded);
            let mut left = WORDS_A_STATE_MAX;
            let stay = roll(101);
            for placed in loaded.values() {
                if roll(100) < stay {
                    places.slot((*placed.content).clone()).unwrap();
                    left -= placed.content.words_len();
                }
            }
            while left > 0 {
                let most = if roll(2) == 0 { largest } else { largest / 100 };
                let rows = (1 + roll(most) as u32).min(left);
                let placed = places.slot(content(&mut number, rows as usize));
                placed.unwrap_or_else(|error| panic!("state {state}: {error}"));
                left -= rows;
                if places.placed.len() as u32 + 1 == POLICIES_A_STATE_MAX {
                    break;
                }
            }
            loaded = places.placed;
        }
    }
}
