//! Rules to class tables: one bit a rule, in the order in which `permits` asks them.
//!
//! A key (an address, an identity, a port) falls into a class; all keys of a class
//! are matched by the same rules, and that set of rules is its row. Classes are
//! found by their boundaries; neighbours with equal rows are one class.

use std::collections::{BTreeMap, BTreeSet};

use ebpf::V6;
use ebpf::flow::{ICMP, ICMPV6, TCP, UDP};
use ipnet::IpNet;
use model::{Direction, GroupId, Peer, PrefixList, Protocol, Rule, SecurityGroup};

use super::tables::{Class, Content};

/// A summary, whose bits name the words after it that are not 0; then a bit a rule, a
/// word each 64. Most rows have one or two such words.
type Row = Vec<u64>;

/// Every set of groups that an interface has, by the number that stands for it.
pub type Identities = BTreeMap<u64, BTreeSet<GroupId>>;

/// The content for `groups` in one direction.
pub fn content(
    groups: &[&SecurityGroup],
    direction: Direction,
    identities: &Identities,
    lists: &[PrefixList],
) -> Content {
    of_rules(groups.iter().flat_map(|g| g.rules(direction)).collect(), identities, lists)
}

/// A rule, and the addresses that it is about. However many networks a list has, its rule
/// is one bit.
struct Asked<'a> {
    rule: &'a Rule,
    ranges: Vec<(u64, u64)>,
    ranges6: Vec<(u128, u128)>,
}

impl<'a> Asked<'a> {
    fn new(rule: &'a Rule, lists: &[PrefixList]) -> Self {
        let nets = match rule.peer {
            Peer::Cidr(net) => vec![net],
            Peer::Group(_) => Vec::new(),
            Peer::PrefixList(id) => {
                let known = lists.iter().filter(|l| l.id == id);
                known.flat_map(|l| l.entries.iter().map(|e| e.net)).collect()
            }
        };
        Self {
            rule,
            ranges: nets.iter().filter_map(range).collect(),
            ranges6: nets.iter().filter_map(range6).collect(),
        }
    }

    fn has(&self, address: u64) -> bool {
        self.ranges.iter().any(|(first, last)| (*first..=*last).contains(&address))
    }

    fn has6(&self, address: u128) -> bool {
        self.ranges6.iter().any(|(first, last)| (*first..=*last).contains(&address))
    }
}

/// The content of rules in the order in which they are asked.
pub fn of_rules(rules: Vec<&Rule>, identities: &Identities, lists: &[PrefixList]) -> Content {
    let rules: Vec<Asked<'_>> = rules.into_iter().map(|r| Asked::new(r, lists)).collect();
    let words = if rules.is_empty() { 0 } else { 1 + rules.len().div_ceil(64) };
    let mut rows = Rows { words, by_row: BTreeMap::new(), content: Vec::new() };
    let members: Vec<(u64, Row)> = identities
        .iter()
        .map(|(number, set)| (*number, row(&rules, words, |r| is_member(&r.rule.peer, set))))
        .collect();
    let by = |protocol| move |r: &Asked<'_>, key| matches(r.rule, protocol, key);
    let classes = [
        rows.classes(address_bounds(&rules), |key| row(&rules, words, |r| r.has(key))),
        rows.exact(members),
        rows.classes(port_bounds(&rules, TCP), |k| row(&rules, words, |r| by(TCP)(r, k))),
        rows.classes(port_bounds(&rules, UDP), |k| row(&rules, words, |r| by(UDP)(r, k))),
        rows.classes(port_bounds(&rules, ICMP), |k| row(&rules, words, |r| by(ICMP)(r, k))),
        rows.classes((0..=255).collect(), |k| row(&rules, words, |r| by(k as u8)(r, 0))),
        rows.classes(port_bounds(&rules, ICMPV6), |k| row(&rules, words, |r| by(ICMPV6)(r, k))),
    ];
    let remotes6 = rows.classes(address6_bounds(&rules), |key| row(&rules, words, |r| r.has6(key)));
    let wide = |class: Class<u128>| Class { key: V6::from_bits(class.key), row: class.row };
    let remotes6 = remotes6.into_iter().map(wide).collect();
    Content { words: words as u32, classes, remotes6, rows: rows.content, allow: 0 }
}

fn row(rules: &[Asked<'_>], words: usize, matches: impl Fn(&Asked<'_>) -> bool) -> Row {
    let mut row = vec![0; words];
    for (bit, rule) in rules.iter().enumerate() {
        if matches(rule) {
            row[1 + bit / 64] |= 1 << (bit % 64);
            row[0] |= 1 << (bit / 64);
        }
    }
    row
}

/// Equal rows are stored once, empty ones not at all.
struct Rows {
    words: usize,
    by_row: BTreeMap<Row, u32>,
    content: Vec<u64>,
}

impl Rows {
    fn number(&mut self, row: Row) -> Option<u32> {
        if row.iter().all(|w| *w == 0) {
            return None;
        }
        let next = (self.content.len() / self.words) as u32;
        let content = &mut self.content;
        Some(*self.by_row.entry(row).or_insert_with_key(|row| {
            content.extend_from_slice(row);
            next
        }))
    }

    /// Classes that hold from their key up to the next one.
    fn classes<K: Copy>(
        &mut self,
        bounds: BTreeSet<K>,
        row_at: impl Fn(K) -> Row,
    ) -> Vec<Class<K>> {
        let mut classes: Vec<Class<K>> = Vec::new();
        for key in bounds {
            let row = self.number(row_at(key));
            if classes.last().is_none_or(|last| last.row != row) {
                classes.push(Class { key, row });
            }
        }
        classes
    }

    /// Classes of a single key; those without a rule are left out.
    fn exact(&mut self, members: Vec<(u64, Row)>) -> Vec<Class> {
        members
            .into_iter()
            .filter_map(|(key, row)| self.number(row).map(|row| Class { key, row: Some(row) }))
            .collect()
    }
}

fn is_member(peer: &Peer, set: &BTreeSet<GroupId>) -> bool {
    matches!(peer, Peer::Group(group) if set.contains(group))
}

/// First and last address of an IPv4 network; IPv6 networks match no IPv4 packet.
fn range(net: &IpNet) -> Option<(u64, u64)> {
    match net {
        IpNet::V4(net) => {
            Some((u32::from(net.network()).into(), u32::from(net.broadcast()).into()))
        }
        IpNet::V6(_) => None,
    }
}

/// First and last address of an IPv6 network.
fn range6(net: &IpNet) -> Option<(u128, u128)> {
    match net {
        IpNet::V6(net) => Some((net.network().into(), net.broadcast().into())),
        IpNet::V4(_) => None,
    }
}

fn address6_bounds(rules: &[Asked<'_>]) -> BTreeSet<u128> {
    bounds(rules.iter().flat_map(|r| r.ranges6.iter().copied()), u128::MAX)
}

fn address_bounds(rules: &[Asked<'_>]) -> BTreeSet<u64> {
    bounds(rules.iter().flat_map(|r| r.ranges.iter().copied()), u32::MAX.into())
}

/// What of the low 16 bits (port, or ICMP type and code) the rule matches.
fn detail_range(rule: &Rule, protocol: u8) -> Option<(u64, u64)> {
    let ports = |p: model::PortRange| (u64::from(p.first()), u64::from(p.last()));
    let icmp = |kind: Option<u8>, code: Option<u8>| match (kind, code) {
        (None, _) => (0, 0xffff),
        (Some(kind), None) => (u64::from(kind) << 8, u64::from(kind) << 8 | 0xff),
        (Some(kind), Some(code)) => {
            let detail = u64::from(kind) << 8 | u64::from(code);
            (detail, detail)
        }
    };
    match (rule.protocol, protocol) {
        (Protocol::Any, _) => Some((0, 0xffff)),
        (Protocol::Number(number), _) if number == protocol => Some((0, 0xffff)),
        (Protocol::Tcp(range), TCP) | (Protocol::Udp(range), UDP) => Some(ports(range)),
        (Protocol::Icmp { kind, code }, ICMP) => Some(icmp(kind, code)),
        (Protocol::Icmpv6 { kind, code }, Protocol::ICMPV6) => Some(icmp(kind, code)),
        _ => None,
    }
}

fn matches(rule: &Rule, protocol: u8, detail: u64) -> bool {
    detail_range(rule, protocol).is_some_and(|(first, last)| first <= detail && detail <= last)
}

fn port_bounds(rules: &[Asked<'_>], protocol: u8) -> BTreeSet<u64> {
    bounds(rules.iter().filter_map(|r| detail_range(r.rule, protocol)), 0xffff)
}

/// Where the set of matching ranges may change.
fn bounds<K>(ranges: impl Iterator<Item = (K, K)>, last_key: K) -> BTreeSet<K>
where
    K: Copy + Ord + From<u8> + std::ops::Add<Output = K>,
{
    let mut bounds = BTreeSet::from([K::from(0)]);
    for (first, last) in ranges {
        bounds.insert(first);
        if last < last_key {
            bounds.insert(last + K::from(1));
        }
    }
    bounds
}
