//! What a new desired state would change, as people read it.

use std::collections::BTreeMap;
use std::fmt;

use model::{Direction, NetworkAcl, PrefixList, RouteTable, SecurityGroup};
use rpc::dataplane::{
    Allowance, Desired, FastPath, FlowLogFormat, IdleTimeouts, Interface, NatGateway,
    PrivateAddress,
};
use serde::Serialize;

use super::{acl, list, nat, rate, route, rule, services};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Sign {
    Added,
    Removed,
    Changed,
}

/// One line of a difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Line {
    pub sign: Sign,
    /// `interface`, `group`, `rule`, `route-table`, `route`, `nat-gateway`, `network-acl`,
    /// `entry`, `prefix-list`, `list-entry`, `limits`, `uplink`, `flow-log`, `blocklist`.
    pub what: &'static str,
    pub name: String,
    pub detail: String,
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.sign {
            Sign::Added => '+',
            Sign::Removed => '-',
            Sign::Changed => '~',
        };
        write!(f, "{sign} {} {}", self.what, self.name)?;
        if self.detail.is_empty() { Ok(()) } else { write!(f, ": {}", self.detail) }
    }
}

/// `names` are of both states.
pub fn difference(old: &Desired, new: &Desired, names: &BTreeMap<String, String>) -> Vec<Line> {
    let mut lines = Vec::new();
    single("uplink", &mut lines, told_uplink(old), told_uplink(new));
    single("name-servers", &mut lines, told_name_servers(old), told_name_servers(new));
    single("flow-log", &mut lines, told_flow_log(old), told_flow_log(new));
    let limits = |d: &Desired| list::told_limits(d.rule_limits);
    single("limits", &mut lines, limits(old), limits(new));
    compare("prefix-list", &mut lines, &lists(old, names), &lists(new, names));
    compare("list-entry", &mut lines, &list_entries(old, names), &list_entries(new, names));
    let tell = |i: &Interface| (named(&i.id.to_string(), names), told_interface(i, names));
    let interfaces = |d: &Desired| d.interfaces.iter().map(tell).collect();
    compare("interface", &mut lines, &interfaces(old), &interfaces(new));
    let groups = |d: &Desired| {
        d.groups.iter().map(|g| (named(&g.id.to_string(), names), Vec::new())).collect()
    };
    compare("group", &mut lines, &groups(old), &groups(new));
    compare("rule", &mut lines, &rules(old, names), &rules(new, names));
    compare("route-table", &mut lines, &route_tables(old, names), &route_tables(new, names));
    compare("route", &mut lines, &routes(old, names), &routes(new, names));
    let gateway = |g: &NatGateway| (named(&g.id.to_string(), names), nat::told(g));
    let gateways = |d: &Desired| d.nat_gateways.iter().map(gateway).collect();
    compare("nat-gateway", &mut lines, &gateways(old), &gateways(new));
    compare("network-acl", &mut lines, &acls(old, names), &acls(new, names));
    compare("entry", &mut lines, &entries(old, names), &entries(new, names));
    let prefixes = |all: &[ipnet::IpNet]| all.iter().map(|p| (p.to_string(), Vec::new())).collect();
    compare("blocklist", &mut lines, &prefixes(&old.blocklist), &prefixes(&new.blocklist));
    let ranges =
        |d: &Desired| d.elastic_ranges.iter().map(|p| (p.to_string(), Vec::new())).collect();
    compare("range", &mut lines, &ranges(old), &ranges(new));
    lines
}

/// What a thing is called, and its properties as `key value`.
type Things = BTreeMap<String, Vec<(&'static str, String)>>;

fn compare(what: &'static str, lines: &mut Vec<Line>, old: &Things, new: &Things) {
    let line = |sign, name: &String, detail| Line { sign, what, name: name.clone(), detail };
    let whole = |properties: &Vec<(&str, String)>| {
        let all: Vec<String> = properties
            .iter()
            .filter(|(_, value)| value != NONE)
            .map(|(key, value)| format!("{key} {value}"))
            .collect();
        all.join(", ")
    };
    for name in old.keys().filter(|name| !new.contains_key(*name)) {
        lines.push(line(Sign::Removed, name, String::new()));
    }
    for (name, properties) in new {
        let Some(before) = old.get(name) else {
            lines.push(line(Sign::Added, name, whole(properties)));
            continue;
        };
        let changed: Vec<String> = before
            .iter()
            .zip(properties)
            .filter(|(a, b)| a != b)
            .map(|((key, a), (_, b))| format!("{key} {a} → {b}"))
            .collect();
        if !changed.is_empty() {
            lines.push(line(Sign::Changed, name, changed.join(", ")));
        }
    }
}

const NONE: &str = "none";

fn single(what: &'static str, lines: &mut Vec<Line>, old: Option<String>, new: Option<String>) {
    let (sign, name, detail) = match (old, new) {
        (None, Some(new)) => (Sign::Added, new, String::new()),
        (Some(old), None) => (Sign::Removed, old, String::new()),
        (Some(old), Some(new)) if old != new => (Sign::Changed, old, format!("→ {new}")),
        _ => return,
    };
    lines.push(Line { sign, what, name, detail });
}

fn told_uplink(desired: &Desired) -> Option<String> {
    let uplink = desired.uplink.as_ref()?;
    let mut told = format!("{} by {}", uplink.device, uplink.gateway);
    if let Some(early) = uplink.early_drop {
        told += if early { ", early drop on" } else { ", early drop off" };
    }
    if uplink.fast_path == FastPath::Declared {
        told += ", fast path";
    }
    if uplink.bogons {
        told += ", no bogons";
    }
    if let Some(packets) = uplink.source_packets {
        told += &format!(", {packets} packets a second a source");
    }
    Some(told)
}

fn told_name_servers(desired: &Desired) -> Option<String> {
    let all: Vec<String> = desired.name_servers.iter().map(ToString::to_string).collect();
    Some(all.join(" ")).filter(|told| !told.is_empty())
}

fn told_idle(idle: &IdleTimeouts) -> String {
    let of = |which, seconds: Option<u32>| seconds.map(|s| format!("{which} {s} s"));
    let told: Vec<String> = [
        of("tcp-established", idle.tcp_established),
        of("udp", idle.udp),
        of("udp-stream", idle.udp_stream),
    ]
    .into_iter()
    .flatten()
    .collect();
    if told.is_empty() { NONE.into() } else { told.join(" ") }
}

fn told_interface(i: &Interface, names: &BTreeMap<String, String>) -> Vec<(&'static str, String)> {
    let groups: Vec<String> = i.groups.iter().map(|g| named(&g.to_string(), names)).collect();
    vec![
        ("device", i.device.name().to_owned()),
        ("mac", i.mac.to_string()),
        ("address", format!("{} in {}", i.address, i.subnet)),
        ("network", i.vpc.to_string()),
        ("elastic", i.elastic.map_or_else(|| NONE.into(), |e| e.to_string())),
        ("secondary", told_secondary(i)),
        ("groups", if groups.is_empty() { NONE.into() } else { groups.join(" ") }),
        (
            "route-table",
            i.route_table.map_or_else(|| NONE.into(), |t| named(&t.to_string(), names)),
        ),
        (
            "network-acl",
            i.network_acl.map_or_else(|| NONE.into(), |a| named(&a.to_string(), names)),
        ),
        ("outgoing", told_rate(i.rates.outgoing)),
        ("incoming", told_rate(i.rates.incoming)),
        ("packets", told_rate(i.rates.packets)),
        ("rates of", i.rates_of.map_or_else(|| NONE.into(), |of| named(&of.to_string(), names))),
        ("idle", told_idle(&i.idle)),
        ("untracked", if i.untracked { "on" } else { NONE }.into()),
        ("loose-tcp", if i.loose_tcp { "on" } else { NONE }.into()),
        ("source-check", if i.source_check { "on" } else { "off" }.into()),
        ("services", services::told(i).unwrap_or_else(|| NONE.into())),
        ("dhcp", format!("{} {} {} {:?}", i.dhcp.hostname, i.dhcp.domain, i.dhcp.mtu, i.dhcp.dns)),
    ]
}

fn told_secondary(i: &Interface) -> String {
    let one = |s: &PrivateAddress| match s.elastic {
        Some(elastic) => format!("{}={elastic}", s.address),
        None => s.address.to_string(),
    };
    let told: Vec<String> = i.secondary.iter().map(one).collect();
    if told.is_empty() { NONE.into() } else { told.join(" ") }
}

fn told_rate(allowance: Option<Allowance>) -> String {
    rate::told(allowance).unwrap_or_else(|| NONE.into())
}

fn told_flow_log(desired: &Desired) -> Option<String> {
    let log = desired.flow_log.as_ref()?;
    let directory = log.directory.display();
    let format = match log.format {
        FlowLogFormat::Aws => "aws",
        FlowLogFormat::Json => "json",
    };
    let (interval, files, bytes) = (log.interval_s, log.files_kept, log.file_bytes_max);
    Some(format!("{directory}, {format}, each {interval} s, {files} files of {bytes} bytes"))
}

fn rules(desired: &Desired, names: &BTreeMap<String, String>) -> Things {
    let of = |group: &SecurityGroup, direction: Direction| {
        let name = named(&group.id.to_string(), names);
        let tell = |r| (format!("{name}: {}", rule::told(direction, r, names)), Vec::new());
        group.rules(direction).iter().map(tell).collect::<Vec<_>>()
    };
    let both = |g| [of(g, Direction::Ingress), of(g, Direction::Egress)].concat();
    desired.groups.iter().flat_map(both).collect()
}

fn lists(desired: &Desired, names: &BTreeMap<String, String>) -> Things {
    let tell = |l: &PrefixList| {
        let told = vec![("version", l.version.to_string()), ("room", l.entries_max.to_string())];
        (named(&l.id.to_string(), names), told)
    };
    desired.prefix_lists.iter().map(tell).collect()
}

fn list_entries(desired: &Desired, names: &BTreeMap<String, String>) -> Things {
    let of = |l: &PrefixList| {
        let name = named(&l.id.to_string(), names);
        let tell = |e| (format!("{name}: {}", list::told(e)), Vec::new());
        l.entries.iter().map(tell).collect::<Vec<_>>()
    };
    desired.prefix_lists.iter().flat_map(of).collect()
}

fn route_tables(desired: &Desired, names: &BTreeMap<String, String>) -> Things {
    let tell = |t: &RouteTable| {
        let local: Vec<String> = t.local.iter().map(ToString::to_string).collect();
        let told = vec![("network", t.vpc.to_string()), ("local", local.join(" "))];
        (named(&t.id.to_string(), names), told)
    };
    desired.route_tables.iter().map(tell).collect()
}

fn routes(desired: &Desired, names: &BTreeMap<String, String>) -> Things {
    let of = |t: &RouteTable| {
        let name = named(&t.id.to_string(), names);
        let tell = |r| (format!("{name}: {}", route::told(r, names)), Vec::new());
        t.routes.iter().map(tell).collect::<Vec<_>>()
    };
    desired.route_tables.iter().flat_map(of).collect()
}

fn acls(desired: &Desired, names: &BTreeMap<String, String>) -> Things {
    let tell =
        |a: &NetworkAcl| (named(&a.id.to_string(), names), vec![("network", a.vpc.to_string())]);
    desired.network_acls.iter().map(tell).collect()
}

fn entries(desired: &Desired, names: &BTreeMap<String, String>) -> Things {
    let of = |a: &NetworkAcl| {
        let name = named(&a.id.to_string(), names);
        let tell = |e| (format!("{name}: {}", acl::told(e)), Vec::new());
        a.entries.iter().map(tell).collect::<Vec<_>>()
    };
    desired.network_acls.iter().flat_map(of).collect()
}

/// What people call it, or its id.
pub fn named(id: &str, names: &BTreeMap<String, String>) -> String {
    names.get(id).map_or_else(|| id.to_owned(), Clone::clone)
}
