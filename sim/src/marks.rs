//! Which interesting states a campaign has visited.

use std::collections::BTreeMap;

/// Counts visits by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Marks {
    visits: BTreeMap<&'static str, u64>,
}

impl Marks {
    pub fn hit(&mut self, mark: &'static str) {
        *self.visits.entry(mark).or_default() += 1;
    }

    pub fn hit_if(&mut self, mark: &'static str, happened: bool) {
        if happened {
            self.hit(mark);
        }
    }

    pub fn has(&self, mark: &'static str) -> bool {
        self.visits.contains_key(mark)
    }

    /// Fails unless every one of `marks` was visited.
    pub fn demand(&self, marks: &[&'static str]) {
        let missed: Vec<_> = marks.iter().filter(|m| !self.visits.contains_key(*m)).collect();
        assert!(missed.is_empty(), "never reached: {missed:?}; reached: {:?}", self.visits);
    }
}
