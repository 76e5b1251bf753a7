//! Places for policies in the kernel's arrays.
//!
//! A policy that the kernel has already keeps its place. A new one is put where
//! neither the loaded tables nor the new ones have anything, so that no packet is
//! ever judged by half a policy: it is written in full, then the interface's
//! record names it, and only after that may its predecessor's place be used again.

use std::collections::BTreeMap;
use std::sync::Arc;

use ebpf::layout::{POLICIES_MAX, STEPS_MAX, STEPS6_MAX, WORDS_MAX};

use super::Error;
use super::tables::{Content, Placed};

pub struct Places {
    /// What may not be written: loaded and new.
    taken: BTreeMap<u32, Placed>,
    /// Where a content is in the new tables, or was in the loaded ones.
    by_content: BTreeMap<Arc<Content>, u32>,
    /// The new tables' own.
    pub placed: BTreeMap<u32, Placed>,
}

impl Places {
    pub fn new(loaded: &BTreeMap<u32, Placed>) -> Self {
        let by_content = loaded.iter().map(|(slot, p)| (p.content.clone(), *slot)).collect();
        Self { taken: loaded.clone(), by_content, placed: BTreeMap::new() }
    }

    /// The slot of `content`, old or new.
    pub fn slot(&mut self, content: Content) -> Result<u32, Error> {
        if let Some(slot) = self.by_content.get(&content) {
            let placed = self.taken[slot].clone();
            self.placed.insert(*slot, placed);
            return Ok(*slot);
        }
        let slot = (0..POLICIES_MAX)
            .find(|slot| !self.taken.contains_key(slot))
            .ok_or(Error::Full { table: "policies", limit: POLICIES_MAX })?;
        let content = Arc::new(content);
        let steps = self.taken.values().map(|p| (p.first_step, p.content.steps_len()));
        let first_step = gap(steps, content.steps_len(), STEPS_MAX)
            .ok_or(Error::Full { table: "policy steps", limit: STEPS_MAX })?;
        let steps6 = self.taken.values().map(|p| (p.first_step6, p.content.steps6_len()));
        let first_step6 = gap(steps6, content.steps6_len(), STEPS6_MAX)
            .ok_or(Error::Full { table: "IPv6 policy steps", limit: STEPS6_MAX })?;
        let words = self.taken.values().map(|p| (p.first_word, p.content.words_len()));
        let first_word = gap(words, content.words_len(), WORDS_MAX)
            .ok_or(Error::Full { table: "policy words", limit: WORDS_MAX })?;
        let placed = Placed { content: content.clone(), first_step, first_step6, first_word };
        self.by_content.insert(content, slot);
        self.taken.insert(slot, placed.clone());
        self.placed.insert(slot, placed);
        Ok(slot)
    }
}

/// The first gap of `len` between the extents.
fn gap(extents: impl Iterator<Item = (u32, u32)>, len: u32, end: u32) -> Option<u32> {
    let mut extents: Vec<(u32, u32)> = extents.filter(|(_, len)| *len > 0).collect();
    extents.sort_unstable();
    let mut free = 0;
    for (first, taken) in extents {
        if first.saturating_sub(free) >= len {
            break;
        }
        free = free.max(first + taken);
    }
    (free.checked_add(len)? <= end).then_some(free)
}

#[cfg(test)]
mod tests {
    use super::gap;

    #[test]
    fn a_gap_is_found_between_before_and_after_extents() {
        assert_eq!(gap([].into_iter(), 4, 4), Some(0));
        assert_eq!(gap([(0, 2)].into_iter(), 3, 4), None);
        assert_eq!(gap([(4, 2), (0, 2)].into_iter(), 2, 8), Some(2));
        assert_eq!(gap([(4, 2), (0, 2)].into_iter(), 3, 9), Some(6));
        assert_eq!(gap([(2, 2)].into_iter(), 2, 4), Some(0));
    }
}
