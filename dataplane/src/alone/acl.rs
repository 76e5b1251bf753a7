//! Network ACLs as a file writes them, and as people read them.

use std::collections::BTreeMap;

use ipnet::IpNet;
use model::network_acl::{ENTRIES_MAX, Entry, NUMBER_MAX};
use model::{Direction, NetworkAcl, NetworkAclId, Peer, Rule, RuleId};
use serde::Deserialize;
use toml::{Spanned, Value};

use super::file::{File, InterfaceEntry, Text, Wrong, network_id, number};
use super::rule;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AclEntry {
    pub network: Option<String>,
    #[serde(default)]
    ingress: Vec<Spanned<Line>>,
    #[serde(default)]
    egress: Vec<Spanned<Line>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    number: Spanned<u16>,
    allow: Option<Spanned<String>>,
    deny: Option<Spanned<String>>,
    protocol: Option<Spanned<Value>>,
    ports: Option<Spanned<Value>>,
    #[serde(rename = "type")]
    kind: Option<u8>,
    code: Option<u8>,
}

pub fn acl_id(name: &str) -> NetworkAclId {
    NetworkAclId::from_random(number("network-acl", name))
}

pub fn acl(text: &Text<'_>, name: &str, entry: &AclEntry) -> Result<NetworkAcl, Wrong> {
    let mut entries: Vec<Entry> = Vec::new();
    for (direction, lines) in
        [(Direction::Ingress, &entry.ingress), (Direction::Egress, &entry.egress)]
    {
        if let Some(line) = lines.get(ENTRIES_MAX) {
            let what = format!("network-acl {name}: {} {direction} entries", lines.len());
            return Err(text.wrong(line.span(), what, &format!("{ENTRIES_MAX} at most")));
        }
        for line in lines {
            let read = read(text, direction, line)?;
            let twice = |e: &Entry| e.direction == direction && e.number == read.number;
            if !(1..=NUMBER_MAX).contains(&read.number) || entries.iter().any(twice) {
                let what = format!("number: {} is there already, or no number", read.number);
                let instead = format!("1 to {NUMBER_MAX}, each once in a direction");
                return Err(text.wrong(line.get_ref().number.span(), what, &instead));
            }
            entries.push(read);
        }
    }
    let vpc = network_id(entry.network.as_deref());
    Ok(NetworkAcl { id: acl_id(name), vpc, entries })
}

fn read(text: &Text<'_>, direction: Direction, line: &Spanned<Line>) -> Result<Entry, Wrong> {
    let (at, line) = (line.span(), line.get_ref());
    let (allow, key, word) = match (&line.allow, &line.deny) {
        (Some(word), None) => (true, "allow", word),
        (None, Some(word)) => (false, "deny", word),
        _ => {
            let what = "an entry says either `allow` or `deny`, and whom";
            return Err(text.wrong(at, what, "allow = \"0.0.0.0/0\" for everyone"));
        }
    };
    let net: IpNet = text.parse(key, word, "a prefix", "192.0.2.0/24")?;
    let said = rule::Said {
        protocol: &line.protocol,
        ports: &line.ports,
        kind: line.kind,
        code: line.code,
    };
    let protocol = rule::protocol(text, said)?;
    Ok(Entry { number: *line.number.get_ref(), direction, allow, protocol, net: net.trunc() })
}

/// The ACL that an interface names.
pub fn of(
    text: &Text<'_>,
    entry: &InterfaceEntry,
    file: &File,
) -> Result<Option<NetworkAclId>, Wrong> {
    let Some(word) = &entry.network_acl else { return Ok(None) };
    let name = word.get_ref();
    let Some(known) = file.network_acl.get(name) else {
        let what = format!("network-acl: there is no network ACL `{name}`");
        return Err(text.wrong(word.span(), what, &format!("a table [network-acl.{name}]")));
    };
    if network_id(known.network.as_deref()) != network_id(entry.network.as_deref()) {
        let what = format!("network-acl: `{name}` belongs to another network");
        return Err(text.wrong(word.span(), what, "a network ACL of the same network"));
    }
    Ok(Some(acl_id(name)))
}

/// An entry as people read it.
pub fn told(entry: &Entry) -> String {
    let rule =
        Rule { id: RuleId::from_random(0), protocol: entry.protocol, peer: Peer::Cidr(entry.net) };
    let deed = if entry.allow { "allow" } else { "deny" };
    format!("{} {deed} {}", entry.number, rule::told(entry.direction, &rule, &BTreeMap::new()))
}
