//! Prefix lists and limits as a file writes them, and as people read them.

use ipnet::IpNet;
use model::{ListEntry, PrefixList, PrefixListId, RuleLimits};
use serde::Deserialize;
use toml::Spanned;

use super::file::{Text, Wrong, number};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Entry {
    version: Option<u64>,
    max_entries: Option<u32>,
    entries: Spanned<Vec<Line>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    prefix: Spanned<String>,
    #[serde(default)]
    description: String,
}

pub fn list_id(name: &str) -> PrefixListId {
    PrefixListId::from_random(number("prefix-list", name))
}

/// Without a maximum it has room for what it has.
pub fn list(text: &Text<'_>, name: &str, entry: &Entry) -> Result<PrefixList, Wrong> {
    let one = |line: &Line| {
        let net: IpNet = text.parse("prefix", &line.prefix, "a prefix", "192.0.2.0/24")?;
        Ok(ListEntry { net: net.trunc(), description: line.description.clone() })
    };
    let lines = entry.entries.get_ref();
    let entries = lines.iter().map(one).collect::<Result<Vec<_>, Wrong>>()?;
    let list = PrefixList {
        id: list_id(name),
        version: entry.version.unwrap_or(1),
        entries_max: entry.max_entries.unwrap_or(entries.len().max(1) as u32),
        entries,
    };
    match list.refused() {
        None => Ok(list),
        Some(cause) => {
            let what = format!("prefix-list {name}: {cause}");
            let instead = "entries of one family, each once, and a max-entries to hold them";
            Err(text.wrong(entry.entries.span(), what, instead))
        }
    }
}

pub fn limits(text: &Text<'_>, limits: Option<&Spanned<RuleLimits>>) -> Result<RuleLimits, Wrong> {
    let Some(limits) = limits else { return Ok(RuleLimits::default()) };
    match limits.get_ref().refused() {
        None => Ok(*limits.get_ref()),
        Some(cause) => {
            let instead = "rules-a-group = 60, groups-an-interface = 5";
            Err(text.wrong(limits.span(), format!("limits: {cause}"), instead))
        }
    }
}

/// A list's entries as people read them.
pub fn told(entry: &ListEntry) -> String {
    match entry.description.as_str() {
        "" => entry.net.to_string(),
        description => format!("{} ({description})", entry.net),
    }
}

pub fn told_limits(limits: Option<RuleLimits>) -> Option<String> {
    let limits = limits?;
    let RuleLimits { rules_a_group: rules, groups_an_interface: groups } = limits;
    Some(format!("{rules} rules a group, {groups} groups an interface"))
        .filter(|_| limits != RuleLimits::default())
}
