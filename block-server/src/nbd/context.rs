//! Metadata contexts: what BLOCK_STATUS can tell. A context is a row of a table;
//! one that joins (what changed since a snapshot, say) touches nothing else.

use serde::{Deserialize, Serialize};

use super::wire::state;

/// Reads a context's state out of what the volume says of an extent.
type States = fn(u32) -> u32;

/// Names and states: `base:allocation` by the NBD document ("Metadata contexts"),
/// `qemu:allocation-depth` by QEMU's docs/interop/nbd.txt: 0 is not allocated,
/// 1 is allocated here.
const TABLE: [(&str, States); 2] = [
    ("base:allocation", |word| word),
    ("qemu:allocation-depth", |word| u32::from(word & state::HOLE == 0)),
];

/// Contexts that a client chose: a bit a row of the table.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Chosen(u32);

impl Chosen {
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// What queries name by whole names.
    pub fn named(queries: &[&str]) -> Self {
        Self::of(|name| queries.contains(&name))
    }

    /// What queries ask to be listed: whole names, or all of a namespace by its
    /// name and a colon; without any query, everything.
    pub fn listed(queries: &[&str]) -> Self {
        let asks = |query: &&str, name: &str| {
            name == *query || query.ends_with(':') && name.starts_with(*query)
        };
        Self::of(|name| queries.is_empty() || queries.iter().any(|query| asks(query, name)))
    }

    fn of(wanted: impl Fn(&str) -> bool) -> Self {
        let rows = TABLE.iter().enumerate().filter(|(_, (name, _))| wanted(name));
        Self(rows.fold(0, |bits, (row, _)| bits | 1 << row))
    }

    /// Numbers and names. A number is ours to give, and not 0.
    pub fn names(self) -> impl Iterator<Item = (u32, &'static str)> {
        self.rows().map(|row| (row as u32 + 1, TABLE[row].0))
    }

    /// For each context its number and its view of the volume's extents.
    pub fn views(self, extents: &[(u64, u32)]) -> impl Iterator<Item = (u32, Vec<(u64, u32)>)> {
        self.rows().map(|row| (row as u32 + 1, view(extents, TABLE[row].1)))
    }

    fn rows(self) -> impl Iterator<Item = usize> {
        (0..TABLE.len()).filter(move |row| self.0 >> row & 1 == 1)
    }
}

/// Adjoining extents of one state are one.
fn view(extents: &[(u64, u32)], states: States) -> Vec<(u64, u32)> {
    let mut seen: Vec<(u64, u32)> = Vec::with_capacity(extents.len());
    for &(length, word) in extents {
        let state = states(word);
        match seen.last_mut().filter(|last| last.1 == state) {
            Some(last) => last.0 += length,
            None => seen.push((length, state)),
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(chosen: Chosen) -> Vec<&'static str> {
        chosen.names().map(|(_, name)| name).collect()
    }

    #[test]
    fn a_context_is_chosen_by_its_name_and_listed_by_its_namespace_too() {
        assert_eq!(names(Chosen::named(&["base:allocation", "x:y"])), ["base:allocation"]);
        assert!(Chosen::named(&["base:", "qemu:", "base:alloc", ""]).is_empty());
        assert_eq!(names(Chosen::listed(&[])), ["base:allocation", "qemu:allocation-depth"]);
        assert_eq!(names(Chosen::listed(&["qemu:"])), ["qemu:allocation-depth"]);
        assert!(Chosen::listed(&["", "base", "other:"]).is_empty());
    }

    #[test]
    fn each_context_has_its_own_view_of_the_same_extents() {
        let hole = state::HOLE | state::ZERO;
        let all = Chosen::listed(&[]);
        let views: Vec<_> = all.views(&[(10, hole), (5, 0), (7, state::ZERO), (3, hole)]).collect();
        assert_eq!(views[0].1, [(10, hole), (5, 0), (7, state::ZERO), (3, hole)]);
        assert_eq!(views[1].1, [(10, 0), (12, 1), (3, 0)]);
        assert_eq!((views[0].0, views[1].0), (1, 2));
    }
}
