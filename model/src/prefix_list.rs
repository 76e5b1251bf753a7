//! Prefix lists: networks under one name, which rules name instead of a network.
//!
//! A list says how many entries it may ever have, and a rule that names it counts as that
//! many (EC2 user guide, "Customer-managed prefix lists"): a list that grows within its
//! bound never makes a group too large. Its version tells which of its states is in force.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::id::PrefixListId;

/// Entries that a list may have room for (EC2 quota).
pub const ENTRIES_MAX: u32 = 1000;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListEntry {
    pub net: IpNet,
    #[serde(default)]
    pub description: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefixList {
    pub id: PrefixListId,
    /// From 1; grows with each change of the entries.
    pub version: u64,
    /// How many entries it has room for: what a rule that names it counts as.
    pub entries_max: u32,
    /// All of one family.
    #[serde(default)]
    pub entries: Vec<ListEntry>,
}

impl PrefixList {
    pub fn contains(&self, address: IpAddr) -> bool {
        self.entries.iter().any(|e| e.net.contains(&address))
    }

    /// The narrowest entry that contains the address.
    pub fn entry(&self, address: IpAddr) -> Option<&ListEntry> {
        let within = self.entries.iter().filter(|e| e.net.contains(&address));
        within.max_by_key(|e| e.net.prefix_len())
    }

    /// Whether its entries are of IPv6; `None` where it has none.
    pub fn is_six(&self) -> Option<bool> {
        self.entries.first().map(|e| matches!(e.net, IpNet::V6(_)))
    }

    /// Why it is no list, if it is none.
    pub fn refused(&self) -> Option<String> {
        let Self { entries, entries_max: max, .. } = self;
        if !(1..=ENTRIES_MAX).contains(max) {
            return Some(format!("room for {max} entries; 1 to {ENTRIES_MAX} are lawful"));
        }
        if entries.len() > *max as usize {
            let count = entries.len();
            return Some(format!("{count} entries, but it has room for {max}: raise its maximum"));
        }
        let six = self.is_six();
        if entries.iter().any(|e| Some(matches!(e.net, IpNet::V6(_))) != six) {
            return Some("entries of both families; make a list for each".to_owned());
        }
        let twice = |n: usize| entries[..n].iter().any(|e| e.net.trunc() == entries[n].net.trunc());
        let doubled = (0..entries.len()).find(|n| twice(*n))?;
        Some(format!("{} is there twice", entries[doubled].net.trunc()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn list(entries_max: u32, nets: &[&str]) -> PrefixList {
        let entry = |n: &&str| ListEntry { net: n.parse().unwrap(), description: String::new() };
        let entries = nets.iter().map(entry).collect();
        PrefixList { id: PrefixListId::from_random(1), version: 1, entries_max, entries }
    }

    #[test]
    fn the_narrowest_entry_is_named() {
        let list = list(3, &["10.0.0.0/8", "10.1.0.0/16"]);
        let entry = list.entry("10.1.2.3".parse().unwrap()).unwrap();
        assert_eq!(entry.net.to_string(), "10.1.0.0/16");
        assert!(list.contains("10.2.0.0".parse().unwrap()));
        assert_eq!(list.entry("11.0.0.0".parse().unwrap()), None);
    }

    #[test]
    fn a_list_that_contradicts_itself_is_refused_with_the_reason() {
        let refused = |max, nets: &[&str]| list(max, nets).refused().unwrap_or_default();
        assert_eq!(refused(2, &["10.0.0.0/8", "10.1.0.0/16"]), "");
        assert!(refused(1, &["10.0.0.0/8", "10.1.0.0/16"]).contains("room for 1"));
        assert!(refused(2, &["10.0.0.0/8", "10.9.0.0/8"]).contains("twice"));
        assert!(refused(2, &["10.0.0.0/8", "::/0"]).contains("both families"));
        assert!(refused(0, &[]).contains("1 to 1000"));
        assert!(refused(1001, &[]).contains("1 to 1000"));
        assert_eq!(refused(1000, &[]), "");
    }
}
