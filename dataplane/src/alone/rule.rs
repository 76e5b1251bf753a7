//! Rules as a file writes them, and as people read them.

use std::collections::BTreeMap;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::{Direction, Peer, PortRange, Protocol, Rule, RuleId};
use serde::Deserialize;
use toml::{Spanned, Value};

use super::file::{Text, Wrong, group_id, number};
use super::list::list_id;

/// What a peer begins with that is a group.
const GROUP: &str = "group:";
/// The same of a prefix list.
pub const LIST: &str = "list:";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    protocol: Option<Spanned<Value>>,
    ports: Option<Spanned<Value>>,
    #[serde(rename = "type")]
    kind: Option<u8>,
    code: Option<u8>,
    from: Option<Spanned<Value>>,
    to: Option<Spanned<Value>>,
}

/// A rule for each peer that the entry lists.
pub fn rules(
    text: &Text<'_>,
    group: &str,
    direction: Direction,
    entry: &Spanned<Entry>,
    known: &dyn Fn(&str, &str) -> bool,
) -> Result<Vec<Rule>, Wrong> {
    let (at, entry) = (entry.span(), entry.get_ref());
    let Entry { protocol: said, ports, kind, code, .. } = entry;
    let said = Said { protocol: said, ports, kind: *kind, code: *code };
    let protocol = protocol(text, said)?;
    let (key, peers, stray) = match direction {
        Direction::Ingress => ("from", &entry.from, &entry.to),
        Direction::Egress => ("to", &entry.to, &entry.from),
    };
    if let Some(stray) = stray {
        let what = format!("group {group}: an {direction} rule has no such end");
        return Err(text.wrong(stray.span(), what, &format!("{key} = \"0.0.0.0/0\"")));
    }
    let Some(peers) = peers else {
        let what = format!("group {group}: an {direction} rule must say `{key}` whom it counts");
        return Err(text.wrong(at, what, &format!("{key} = \"0.0.0.0/0\" for everyone")));
    };
    let words: Vec<&str> = match peers.get_ref() {
        Value::String(word) => vec![word],
        Value::Array(words) => words.iter().map(|w| w.as_str().unwrap_or("")).collect(),
        _ => vec![""],
    };
    let peer = |word: &str| match peer(word, known) {
        Some(peer) => Ok(rule(group, direction, protocol, peer)),
        None => {
            let what =
                format!("{key}: `{word}` is neither a prefix nor a group or list of this file");
            let instead = format!("{key} = \"192.0.2.0/24\", \"group:NAME\" or \"list:NAME\"");
            Err(text.wrong(peers.span(), what, &instead))
        }
    };
    words.into_iter().map(peer).collect()
}

fn rule(group: &str, direction: Direction, protocol: Protocol, peer: Peer) -> Rule {
    let words = format!("{group}\0{direction}\0{protocol:?}\0{peer:?}");
    Rule { id: RuleId::from_random(number("rule", &words)), protocol, peer }
}

/// Everything to everywhere.
pub fn anything(group: &str) -> Vec<Rule> {
    let to = |net| rule(group, Direction::Egress, Protocol::Any, Peer::Cidr(net));
    vec![to(Ipv4Net::default().into()), to(Ipv6Net::default().into())]
}

fn peer(word: &str, known: &dyn Fn(&str, &str) -> bool) -> Option<Peer> {
    if let Some(group) = word.strip_prefix(GROUP) {
        return known(GROUP, group).then(|| Peer::Group(group_id(group)));
    }
    if let Some(list) = word.strip_prefix(LIST) {
        return known(LIST, list).then(|| Peer::PrefixList(list_id(list)));
    }
    let address = || word.parse::<std::net::IpAddr>().map(IpNet::from).ok();
    word.parse::<IpNet>().ok().or_else(address).map(Peer::Cidr)
}

/// What a rule or an entry says of a protocol.
#[derive(Clone, Copy)]
pub struct Said<'a> {
    pub protocol: &'a Option<Spanned<Value>>,
    pub ports: &'a Option<Spanned<Value>>,
    pub kind: Option<u8>,
    pub code: Option<u8>,
}

pub fn protocol(text: &Text<'_>, entry: Said<'_>) -> Result<Protocol, Wrong> {
    let ports = || ports(text, entry);
    let (at, word) = match entry.protocol {
        None => (0..0, "any".to_owned()),
        Some(value) => match value.get_ref() {
            Value::String(word) => (value.span(), word.to_lowercase()),
            other => (value.span(), other.to_string()),
        },
    };
    let protocol = match word.as_str() {
        "any" | "all" | "-1" => Protocol::Any,
        "tcp" | "6" => return Ok(Protocol::Tcp(ports()?)),
        "udp" | "17" => return Ok(Protocol::Udp(ports()?)),
        "icmp" | "1" => Protocol::Icmp { kind: entry.kind, code: entry.code },
        "icmpv6" | "58" => Protocol::Icmpv6 { kind: entry.kind, code: entry.code },
        number => match number.parse() {
            Ok(number) => Protocol::Number(number),
            Err(_) => {
                let what = format!("protocol: `{number}` is none that is known");
                let instead = "protocol = \"tcp\", \"udp\", \"icmp\", \"any\" or a number";
                return Err(text.wrong(at, what, instead));
            }
        },
    };
    match entry.ports {
        Some(ports) => {
            let what = format!("ports: protocol `{word}` has none");
            Err(text.wrong(ports.span(), what, "protocol = \"tcp\" beside them"))
        }
        None => Ok(protocol),
    }
}

fn ports(text: &Text<'_>, entry: Said<'_>) -> Result<PortRange, Wrong> {
    let Some(value) = entry.ports else { return Ok(PortRange::ALL) };
    let range = match value.get_ref() {
        Value::Integer(port) => u16::try_from(*port).ok().map(PortRange::single),
        Value::String(word) => match word.split_once('-') {
            Some((first, last)) => first.trim().parse().ok().zip(last.trim().parse().ok()),
            None => word.trim().parse().ok().map(|port| (port, port)),
        }
        .and_then(|(first, last)| PortRange::new(first, last).ok()),
        _ => None,
    };
    range.ok_or_else(|| {
        let what = format!("ports: {} is no port and no range", value.get_ref());
        text.wrong(value.span(), what, "ports = 443 or ports = \"8000-8010\"")
    })
}

/// A rule as people read it; `names` are the groups'.
pub fn told(direction: Direction, rule: &Rule, names: &BTreeMap<String, String>) -> String {
    let ports = |range: &PortRange| match (range.first(), range.last()) {
        (0, u16::MAX) => String::new(),
        (first, last) if first == last => format!(" {first}"),
        (first, last) => format!(" {first}-{last}"),
    };
    let icmp = |kind: &Option<u8>, code: &Option<u8>| match (kind, code) {
        (Some(kind), Some(code)) => format!(" type {kind} code {code}"),
        (Some(kind), None) => format!(" type {kind}"),
        _ => String::new(),
    };
    let protocol = match &rule.protocol {
        Protocol::Any => "any".into(),
        Protocol::Tcp(range) => format!("tcp{}", ports(range)),
        Protocol::Udp(range) => format!("udp{}", ports(range)),
        Protocol::Icmp { kind, code } => format!("icmp{}", icmp(kind, code)),
        Protocol::Icmpv6 { kind, code } => format!("icmpv6{}", icmp(kind, code)),
        Protocol::Number(number) => format!("protocol {number}"),
    };
    let peer = match &rule.peer {
        Peer::Cidr(net) => net.to_string(),
        Peer::Group(group) => {
            let id = group.to_string();
            format!("{GROUP}{}", names.get(&id).unwrap_or(&id))
        }
        Peer::PrefixList(list) => {
            let id = list.to_string();
            format!("{LIST}{}", names.get(&id).unwrap_or(&id))
        }
    };
    let end = if direction == Direction::Ingress { "from" } else { "to" };
    format!("{direction} {protocol} {end} {peer}")
}
