//! Rules to class tables: one bit a rule, in the order in which `permits` asks them.
//!
//! A key (an address, an identity, a port) falls into a class; all keys of a class
//! are matched by the same rules, and that set of rules is its row. Classes are
//! found by their boundaries; neighbours with equal rows are one class.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ebpf::V6;
use ebpf::flow::{ICMP, ICMPV6, TCP, UDP};
use ebpf::layout::{SUMMARY, SUMMARY_BITS};
use ipnet::IpNet;
use model::{Direction, GroupId, Peer, PrefixList, Protocol, Rule, SecurityGroup};

use super::tables::{Class, Content};

/// A summary, whose bits name the words after it that are not 0; then a bit a rule, a
/// word each 64. Kept are those from the first that is not 0 to the last, mostly one.
type Row = Vec<u64>;

/// Words that a row takes, by its first: that one, and those which it names.
pub fn row_len(head: u64) -> u32 {
    let last = (head & SUMMARY).checked_ilog2().unwrap_or(0);
    (2 + last).saturating_sub((head >> SUMMARY_BITS) as u32)
}

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
}

/// Keys from the first to the last, and the bit of the rule that matches them.
type Stretch<K> = (K, K, usize);

/// The content of rules in the order in which they are asked.
pub fn of_rules(rules: Vec<&Rule>, identities: &Identities, lists: &[PrefixList]) -> Content {
    let rules: Vec<Asked<'_>> = rules.into_iter().map(|r| Asked::new(r, lists)).collect();
    let mut rows = Rows::new(rules.len());
    let details = |protocol| stretches(&rules, move |r| detail_range(r.rule, protocol));
    let classes = [
        rows.classes(stretches(&rules, |r| r.ranges.iter().copied()), u32::MAX.into()),
        rows.members(&rules, identities),
        rows.classes(details(TCP), 0xffff),
        rows.classes(details(UDP), 0xffff),
        rows.classes(details(ICMP), 0xffff),
        rows.classes(stretches(&rules, |r| protocol_range(r.rule)), 0xff),
        rows.classes(details(ICMPV6), 0xffff),
    ];
    let remotes6 = rows.classes(stretches(&rules, |r| r.ranges6.iter().copied()), u128::MAX);
    let wide = |class: Class<u128>| Class { key: V6::from_bits(class.key), row: class.row };
    let remotes6 = remotes6.into_iter().map(wide).collect();
    Content { classes, remotes6, rows: rows.content, allow: 0 }
}

fn stretches<'a, K, R: IntoIterator<Item = (K, K)>>(
    rules: &'a [Asked<'a>],
    ranges: impl Fn(&'a Asked<'a>) -> R,
) -> Vec<Stretch<K>> {
    let each = rules.iter().enumerate();
    each.flat_map(|(bit, r)| ranges(r).into_iter().map(move |(a, b)| (a, b, bit))).collect()
}

/// Equal rows are stored once, empty ones not at all.
struct Rows {
    rules: usize,
    words: usize,
    by_row: HashMap<Row, u32>,
    content: Vec<u64>,
}

impl Rows {
    fn new(rules: usize) -> Self {
        let words = if rules == 0 { 0 } else { 1 + rules.div_ceil(64) };
        Self { rules, words, by_row: HashMap::new(), content: Vec::new() }
    }

    /// Where the row begins.
    fn place(&mut self, row: &Row) -> Option<u32> {
        if row.first().is_none_or(|summary| *summary == 0) {
            return None;
        }
        if let Some(place) = self.by_row.get(row) {
            return Some(*place);
        }
        let next = self.content.len() as u32;
        let (summary, words) = (row[0], &row[1..]);
        let first = summary.trailing_zeros();
        let row_head = summary | u64::from(first) << SUMMARY_BITS;
        self.content.push(row_head);
        self.content.extend(&words[first as usize..][..row_len(row_head) as usize - 1]);
        self.by_row.insert(row.clone(), next);
        Some(next)
    }

    /// Classes that hold from their key up to the next one: one walk along the keys, on
    /// which each stretch is met where it begins and where it has ended.
    fn classes<K>(&mut self, stretches: Vec<Stretch<K>>, last_key: K) -> Vec<Class<K>>
    where
        K: Copy + Ord + From<u8> + std::ops::Add<Output = K>,
    {
        let mut edges: Vec<(K, bool, usize)> = Vec::with_capacity(2 * stretches.len());
        for (first, last, bit) in stretches {
            edges.push((first, true, bit));
            if last < last_key {
                edges.push((last + K::from(1), false, bit));
            }
        }
        edges.sort_unstable();
        let mut over = Over::new(self.rules, self.words);
        let mut classes: Vec<Class<K>> = Vec::new();
        let mut key = K::from(0);
        let mut edges = edges.into_iter().peekable();
        loop {
            while let Some((_, begins, bit)) = edges.next_if(|edge| edge.0 == key) {
                if begins { over.begin(bit) } else { over.end(bit) }
            }
            let row = self.place(&over.row);
            if classes.last().is_none_or(|last| last.row != row) {
                classes.push(Class { key, row });
            }
            match edges.peek() {
                Some(next) => key = next.0,
                None => return classes,
            }
        }
    }

    /// Classes of a single identity; those without a rule are left out.
    fn members(&mut self, rules: &[Asked<'_>], identities: &Identities) -> Vec<Class> {
        let mut by_group: BTreeMap<GroupId, Vec<usize>> = BTreeMap::new();
        for (bit, rule) in rules.iter().enumerate() {
            if let Peer::Group(group) = rule.rule.peer {
                by_group.entry(group).or_default().push(bit);
            }
        }
        let class = |(number, set): (&u64, &BTreeSet<GroupId>)| {
            let mut row = vec![0; self.words];
            set.iter().filter_map(|g| by_group.get(g)).flatten().for_each(|b| put(&mut row, *b));
            self.place(&row).map(|row| Class { key: *number, row: Some(row) })
        };
        identities.iter().filter_map(class).collect()
    }
}

/// The rules whose stretches cover the key that a walk has come to.
struct Over {
    /// How many stretches of each rule: those of a prefix list may overlap.
    times: Vec<u32>,
    row: Row,
}

impl Over {
    fn new(rules: usize, words: usize) -> Self {
        Self { times: vec![0; rules], row: vec![0; words] }
    }

    fn begin(&mut self, bit: usize) {
        self.times[bit] += 1;
        put(&mut self.row, bit);
    }

    fn end(&mut self, bit: usize) {
        self.times[bit] -= 1;
        if self.times[bit] == 0 {
            take(&mut self.row, bit);
        }
    }
}

fn put(row: &mut Row, bit: usize) {
    row[1 + bit / 64] |= 1 << (bit % 64);
    row[0] |= 1 << (bit / 64);
}

fn take(row: &mut Row, bit: usize) {
    row[1 + bit / 64] &= !(1 << (bit % 64));
    if row[1 + bit / 64] == 0 {
        row[0] &= !(1 << (bit / 64));
    }
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

/// The protocols that the rule matches where nothing is known of a packet but its protocol.
fn protocol_range(rule: &Rule) -> Option<(u64, u64)> {
    let number = match rule.protocol {
        Protocol::Any => return Some((0, 0xff)),
        Protocol::Number(number) => number,
        Protocol::Tcp(_) => TCP,
        Protocol::Udp(_) => UDP,
        Protocol::Icmp { .. } => ICMP,
        Protocol::Icmpv6 { .. } => ICMPV6,
    };
    let (first, _) = detail_range(rule, number)?;
    (first == 0).then_some((number.into(), number.into()))
}
