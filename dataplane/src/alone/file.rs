//! A TOML file of interfaces, groups and addresses, as a desired state.
//!
//! ```text
//! text ─toml─▶ File ─▶ Plan { deployment, Desired, names }
//!        └──── Wrong: file, line, what is wrong, what to write
//! ```
//! Pure. Ids follow from the names, and a rule's id from what it says, so that
//! the same file gives the same ids for ever: flows and counters of what stays
//! are kept, whatever moves around it.

use std::collections::BTreeMap;
use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Range;
use std::path::PathBuf;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::{GroupId, InterfaceId, Mac, RuleLimits, SecurityGroup, VpcId};
use rpc::dataplane::{
    Desired, Device, Dhcp, FastPath, FlowLog, FlowLogFormat, IdleTimeouts, Interface,
    PrivateAddress, Uplink,
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use toml::Spanned;

use super::{acl, list, nat, rate, route, rule, services};
use crate::compile::idle;
use crate::respond::Served;

/// The deployment of a file that names none.
pub const NAME_DEFAULT: &str = "alone";
const NETWORK_DEFAULT: &str = "default";
const MTU_DEFAULT: u16 = 1500;
/// AWS' shorter aggregation interval.
const INTERVAL_S_DEFAULT: u32 = 60;
const FILE_BYTES_MAX_DEFAULT: u64 = 64 << 20;
const FILES_KEPT_DEFAULT: u32 = 7;

/// What is wrong in a file, where, and what to write in its place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {what}; {instead}")]
pub struct Wrong {
    pub line: usize,
    pub what: String,
    pub instead: String,
}

/// A file, understood.
#[derive(Debug, Clone, PartialEq)]
pub struct Plan {
    pub deployment: String,
    /// Its generation is 0: whoever applies it knows the one before.
    pub desired: Desired,
    /// What people call a thing, by its id.
    pub names: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct File {
    name: Option<Spanned<String>>,
    uplink: Option<UplinkEntry>,
    flow_log: Option<FlowLogEntry>,
    #[serde(default)]
    blocklist: Vec<Spanned<String>>,
    #[serde(default)]
    name_servers: Vec<Spanned<String>>,
    limits: Option<Spanned<RuleLimits>>,
    #[serde(default)]
    prefix_list: BTreeMap<String, list::Entry>,
    #[serde(default)]
    group: BTreeMap<String, GroupEntry>,
    #[serde(default)]
    pub route_table: BTreeMap<String, route::Entry>,
    #[serde(default)]
    pub network_acl: BTreeMap<String, acl::AclEntry>,
    #[serde(default)]
    pub nat_gateway: BTreeMap<String, nat::Entry>,
    #[serde(default)]
    pub interface: BTreeMap<String, Spanned<InterfaceEntry>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct UplinkEntry {
    device: String,
    gateway: Spanned<String>,
    gateway6: Option<Spanned<String>>,
    /// Where elastic addresses are taken from.
    #[serde(default)]
    ranges: Vec<Spanned<String>>,
    early_drop: Option<bool>,
    #[serde(default)]
    bogons: bool,
    source_packets: Option<u64>,
    #[serde(default)]
    fast_path: FastPath,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct FlowLogEntry {
    directory: Spanned<PathBuf>,
    #[serde(default)]
    format: FlowLogFormat,
    account: Option<String>,
    interval: Option<Spanned<u32>>,
    file_bytes_max: Option<u64>,
    files_kept: Option<u32>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct GroupEntry {
    network: Option<String>,
    #[serde(default)]
    ingress: Vec<Spanned<rule::Entry>>,
    egress: Option<Vec<Spanned<rule::Entry>>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct InterfaceEntry {
    device: Option<Spanned<String>>,
    tap: Option<Spanned<String>>,
    owner: Option<u32>,
    mac: Spanned<String>,
    address: Spanned<String>,
    /// With the prefix length of its subnet, the same for all.
    #[serde(default)]
    ipv6: Vec<Spanned<String>>,
    pub network: Option<String>,
    elastic: Option<Spanned<String>>,
    #[serde(default)]
    secondary: Vec<SecondaryEntry>,
    #[serde(default)]
    groups: Vec<Spanned<String>>,
    source_check: Option<bool>,
    pub route_table: Option<Spanned<String>>,
    pub network_acl: Option<Spanned<String>>,
    #[serde(default)]
    pub rates: rate::Entry,
    takes_frames: Option<bool>,
    idle: Option<Spanned<IdleTimeouts>>,
    #[serde(default)]
    loose_tcp: bool,
    #[serde(default)]
    untracked: bool,
    hostname: Option<String>,
    domain: Option<String>,
    #[serde(default)]
    dns: Vec<Spanned<String>>,
    mtu: Option<u16>,
    #[serde(default)]
    services: services::Entry,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct SecondaryEntry {
    address: Spanned<String>,
    elastic: Option<Spanned<String>>,
}

/// Places in the text, as lines.
pub struct Text<'a>(pub &'a str);

impl Text<'_> {
    fn line(&self, at: Range<usize>) -> usize {
        1 + self.0.bytes().take(at.start).filter(|b| *b == b'\n').count()
    }

    pub fn wrong(&self, at: Range<usize>, what: impl fmt::Display, instead: &str) -> Wrong {
        Wrong { line: self.line(at), what: what.to_string(), instead: format!("write {instead}") }
    }

    /// A word of the file, as the kind that it should be.
    pub fn parse<T: std::str::FromStr>(
        &self,
        key: &str,
        word: &Spanned<String>,
        kind: &str,
        example: &str,
    ) -> Result<T, Wrong> {
        let text = word.get_ref();
        text.trim().parse().map_err(|_| {
            let instead = format!("{key} = \"{example}\"");
            self.wrong(word.span(), format_args!("{key}: `{text}` is not {kind}"), &instead)
        })
    }
}

/// Reads a file's text.
pub fn read(text: &str) -> Result<Plan, Wrong> {
    let file: File = toml::from_str(text).map_err(|error| Wrong {
        line: error.span().map_or(1, |at| Text(text).line(at)),
        what: error.message().trim().replace('\n', " "),
        instead: "docs/guide/dataplane.md lists every key".into(),
    })?;
    Reader { text: Text(text), names: BTreeMap::new() }.plan(&file)
}

struct Reader<'a> {
    text: Text<'a>,
    names: BTreeMap<String, String>,
}

impl Reader<'_> {
    fn plan(mut self, file: &File) -> Result<Plan, Wrong> {
        let deployment = match &file.name {
            Some(name) => self.deployment(name)?,
            None => NAME_DEFAULT.to_owned(),
        };
        let mut desired = Desired { uplink: self.uplink(file)?, ..Desired::default() };
        desired.elastic_ranges = match &file.uplink {
            Some(uplink) => self.prefixes("ranges", &uplink.ranges)?,
            None => Vec::new(),
        };
        desired.name_servers = services::name_servers(&self.text, &file.name_servers)?;
        desired.flow_log = file.flow_log.as_ref().map(|log| self.flow_log(log)).transpose()?;
        desired.blocklist = self.prefixes::<IpNet>("blocklist", &file.blocklist)?;
        desired.rule_limits = Some(list::limits(&self.text, file.limits.as_ref())?);
        for (name, entry) in &file.prefix_list {
            let list = list::list(&self.text, name, entry)?;
            self.names.insert(list.id.to_string(), name.clone());
            desired.prefix_lists.push(list);
        }
        for (name, entry) in &file.group {
            desired.groups.push(self.group(name, entry, file)?);
        }
        for (name, entry) in &file.route_table {
            let table = route::table(&self.text, name, entry, file)?;
            self.names.insert(table.id.to_string(), name.clone());
            desired.route_tables.push(table);
        }
        for (name, entry) in &file.network_acl {
            let acl = acl::acl(&self.text, name, entry)?;
            self.names.insert(acl.id.to_string(), name.clone());
            desired.network_acls.push(acl);
        }
        for (name, entry) in &file.nat_gateway {
            let gateway = nat::gateway(&self.text, name, entry)?;
            self.names.insert(gateway.id.to_string(), name.clone());
            desired.nat_gateways.push(gateway);
        }
        for (name, entry) in &file.interface {
            desired.interfaces.push(self.interface(name, entry, file)?);
        }
        Ok(Plan { deployment, desired, names: self.names })
    }

    fn deployment(&self, name: &Spanned<String>) -> Result<String, Wrong> {
        match rpc::Deployment::new(name.get_ref(), "/", "/") {
            Ok(_) => Ok(name.get_ref().clone()),
            Err(error) => {
                let example = format!("name = \"{NAME_DEFAULT}\", or leave it out");
                Err(self.text.wrong(name.span(), error.message, &example))
            }
        }
    }

    fn uplink(&self, file: &File) -> Result<Option<Uplink>, Wrong> {
        let Some(entry) = &file.uplink else { return Ok(None) };
        let gateway = self.text.parse("gateway", &entry.gateway, "an IPv4 address", "192.0.2.1")?;
        let gateway6 = match &entry.gateway6 {
            Some(word) => Some(self.text.parse("gateway6", word, "an IPv6 address", "fe80::1")?),
            None => None,
        };
        Ok(Some(Uplink {
            device: entry.device.clone(),
            gateway,
            gateway6,
            early_drop: entry.early_drop,
            bogons: entry.bogons,
            source_packets: entry.source_packets,
            fast_path: entry.fast_path,
        }))
    }

    fn flow_log(&self, entry: &FlowLogEntry) -> Result<FlowLog, Wrong> {
        let directory = entry.directory.get_ref();
        if !directory.is_absolute() {
            let what = format!("directory: `{}` is no absolute path", directory.display());
            let instead = "directory = \"/var/log/dataplane\"";
            return Err(self.text.wrong(entry.directory.span(), what, instead));
        }
        let interval_s = entry.interval.as_ref().map_or(INTERVAL_S_DEFAULT, |i| *i.get_ref());
        if let Some(given) = entry.interval.as_ref().filter(|_| interval_s == 0) {
            let what = "interval: an interval of no time";
            return Err(self.text.wrong(given.span(), what, "seconds: interval = 60"));
        }
        Ok(FlowLog {
            directory: directory.clone(),
            format: entry.format,
            account: entry.account.clone().unwrap_or_else(|| "-".into()),
            interval_s,
            file_bytes_max: entry.file_bytes_max.unwrap_or(FILE_BYTES_MAX_DEFAULT),
            files_kept: entry.files_kept.unwrap_or(FILES_KEPT_DEFAULT),
        })
    }

    fn prefixes<T: std::str::FromStr>(
        &self,
        key: &str,
        words: &[Spanned<String>],
    ) -> Result<Vec<T>, Wrong> {
        let one = |word| self.text.parse(key, word, "a prefix", "192.0.2.0/24");
        words.iter().map(one).collect()
    }

    fn group(
        &mut self,
        name: &str,
        entry: &GroupEntry,
        file: &File,
    ) -> Result<SecurityGroup, Wrong> {
        let id = group_id(name);
        self.names.insert(id.to_string(), name.to_owned());
        let rules = |direction, entries: &[Spanned<rule::Entry>]| {
            let mut all = Vec::new();
            for entry in entries {
                let known = |kind: &str, name: &str| match kind {
                    rule::LIST => file.prefix_list.contains_key(name),
                    _ => file.group.contains_key(name),
                };
                all.extend(rule::rules(&self.text, name, direction, entry, &known)?);
            }
            Ok(all)
        };
        let ingress = rules(model::Direction::Ingress, &entry.ingress)?;
        let egress = match &entry.egress {
            Some(entries) => rules(model::Direction::Egress, entries)?,
            // As a new group of EC2's has it.
            None => rule::anything(name),
        };
        Ok(SecurityGroup { id, vpc: network_id(entry.network.as_deref()), ingress, egress })
    }

    fn interface(
        &mut self,
        name: &str,
        entry: &Spanned<InterfaceEntry>,
        file: &File,
    ) -> Result<Interface, Wrong> {
        let (at, entry) = (entry.span(), entry.get_ref());
        let text = &self.text;
        let id = interface_id(name);
        let (address, subnet) = self.address(&entry.address)?;
        let (ipv6, subnet6) = self.ipv6(&entry.ipv6)?;
        let device = self.device(name, &at, entry)?;
        let mac =
            text.parse::<Mac>("mac", &entry.mac, "a hardware address", "02:00:00:00:00:0a")?;
        let vpc = network_id(entry.network.as_deref());
        let interface = entry.services.complete(Interface {
            ipv6,
            subnet6,
            elastic: self.elastic(entry.elastic.as_ref(), file)?,
            secondary: self.secondary(entry, subnet, file)?,
            groups: self.groups(entry, file)?,
            source_check: entry.source_check.unwrap_or(true),
            route_table: route::of(text, entry, file)?,
            network_acl: acl::of(text, entry, file)?,
            rates: rate::rates(text, &entry.rates)?,
            rates_of: rate::payer(text, &entry.rates, file)?,
            takes_frames: entry.takes_frames,
            idle: self.idle(entry)?,
            loose_tcp: entry.loose_tcp,
            untracked: entry.untracked,
            dhcp: Dhcp {
                hostname: entry.hostname.clone().unwrap_or_else(|| name.to_owned()),
                domain: entry.domain.clone().unwrap_or_else(|| "internal".into()),
                dns: self.resolvers(&entry.dns)?,
                mtu: entry.mtu.unwrap_or(MTU_DEFAULT),
            },
            ..Interface::new(id, device, mac, vpc, (address, subnet))
        });
        if let Err(error) = Served::try_from(&interface) {
            let what = format!("interface {name}: {}", error.cause);
            return Err(text.wrong(at, what, "what a guest can be given"));
        }
        self.names.insert(id.to_string(), name.to_owned());
        Ok(interface)
    }

    fn device(
        &self,
        name: &str,
        at: &Range<usize>,
        entry: &InterfaceEntry,
    ) -> Result<Device, Wrong> {
        let word = match (&entry.device, &entry.tap) {
            (Some(word), None) | (None, Some(word)) => word,
            _ => {
                let what = format!("interface {name}: it must have either `device` or `tap`");
                let instead = "device = \"veth0\" for one that is there, \
                               or tap = \"tap0\" for one to be made";
                return Err(self.text.wrong(at.clone(), what, instead));
            }
        };
        // linux/if.h, IFNAMSIZ with its ending zero.
        if !(1..=15).contains(&word.get_ref().len()) || word.get_ref().contains(['/', ' ']) {
            let what = format!("interface {name}: `{}` cannot be a device", word.get_ref());
            return Err(self.text.wrong(word.span(), what, "1 to 15 letters and digits"));
        }
        let name = word.get_ref().clone();
        Ok(match entry.tap {
            Some(_) => Device::Tap { name, owner_uid: entry.owner.unwrap_or(0) },
            None => Device::Existing { name },
        })
    }

    fn address(&self, word: &Spanned<String>) -> Result<(Ipv4Addr, Ipv4Net), Wrong> {
        let kind = "an address with its prefix length";
        let net: Ipv4Net = self.text.parse("address", word, kind, "10.0.0.10/24")?;
        if net.prefix_len() > 30 || net.addr() == net.network() || net.addr() == net.broadcast() {
            let what = format!("address: `{}` leaves no room for a router", word.get_ref());
            return Err(self.text.wrong(word.span(), what, "address = \"10.0.0.10/24\""));
        }
        if Some(net.addr()) == net.hosts().next() {
            let what = format!("address: `{}` is the subnet's router", net.addr());
            return Err(self.text.wrong(word.span(), what, "any later address of the subnet"));
        }
        Ok((net.addr(), net.trunc()))
    }

    fn ipv6(&self, words: &[Spanned<String>]) -> Result<(Vec<Ipv6Addr>, Option<Ipv6Net>), Wrong> {
        let (mut addresses, mut subnet) = (Vec::new(), None);
        for word in words {
            let kind = "an IPv6 address with its prefix length";
            let net: Ipv6Net = self.text.parse("ipv6", word, kind, "2001:db8::10/64")?;
            if *subnet.get_or_insert(net.trunc()) != net.trunc() {
                let what = format!("ipv6: `{net}` is in another subnet than the first");
                return Err(self.text.wrong(word.span(), what, "addresses of one subnet"));
            }
            addresses.push(net.addr());
        }
        Ok((addresses, subnet))
    }

    fn secondary(
        &self,
        entry: &InterfaceEntry,
        subnet: Ipv4Net,
        file: &File,
    ) -> Result<Vec<PrivateAddress>, Wrong> {
        let one = |entry: &SecondaryEntry| {
            let word = &entry.address;
            let address: Ipv4Addr =
                self.text.parse("address", word, "an IPv4 address", "10.0.0.11")?;
            let taken = [Some(subnet.network()), Some(subnet.broadcast()), subnet.hosts().next()];
            if !subnet.contains(&address) || taken.contains(&Some(address)) {
                let what = format!("secondary: `{address}` is no host of {subnet}");
                let instead = "a later address of the interface's subnet than its router's";
                return Err(self.text.wrong(word.span(), what, instead));
            }
            let elastic = self.elastic(entry.elastic.as_ref(), file)?;
            Ok(PrivateAddress { address, elastic })
        };
        entry.secondary.iter().map(one).collect()
    }

    fn elastic(
        &self,
        word: Option<&Spanned<String>>,
        file: &File,
    ) -> Result<Option<Ipv4Addr>, Wrong> {
        let Some(word) = word else { return Ok(None) };
        if file.uplink.is_none() {
            let what = "elastic: it is reached by the uplink, and the file names none";
            let instead = "a table [uplink] with device and gateway";
            return Err(self.text.wrong(word.span(), what, instead));
        }
        self.text.parse("elastic", word, "an IPv4 address", "192.0.2.10").map(Some)
    }

    fn idle(&self, entry: &InterfaceEntry) -> Result<IdleTimeouts, Wrong> {
        let Some(idle) = &entry.idle else { return Ok(IdleTimeouts::default()) };
        match idle::of(idle.get_ref()) {
            Ok(_) => Ok(*idle.get_ref()),
            Err(wrong) => {
                let instead = format!("{} to {} there", wrong.least, wrong.most);
                Err(self.text.wrong(idle.span(), format_args!("idle: {wrong}"), &instead))
            }
        }
    }

    fn groups(&self, entry: &InterfaceEntry, file: &File) -> Result<Vec<GroupId>, Wrong> {
        let mut groups = Vec::new();
        for word in &entry.groups {
            let name = word.get_ref();
            let known = file.group.get(name).ok_or_else(|| {
                let instead = format!("a table [group.{name}], or one of: {}", listed(file));
                self.text.wrong(
                    word.span(),
                    format!("groups: there is no group `{name}`"),
                    &instead,
                )
            })?;
            if network_id(known.network.as_deref()) != network_id(entry.network.as_deref()) {
                let what = format!("groups: group `{name}` belongs to another network");
                return Err(self.text.wrong(word.span(), what, "a group of the same network"));
            }
            groups.push(group_id(name));
        }
        Ok(groups)
    }

    fn resolvers(&self, words: &[Spanned<String>]) -> Result<Vec<Ipv4Addr>, Wrong> {
        let one = |word| self.text.parse("dns", word, "an IPv4 address", "192.0.2.53");
        words.iter().map(one).collect()
    }
}

fn listed(file: &File) -> String {
    let names: Vec<&str> = file.group.keys().map(String::as_str).collect();
    if names.is_empty() { "(there are none)".into() } else { names.join(", ") }
}

pub fn group_id(name: &str) -> GroupId {
    GroupId::from_random(number("group", name))
}

pub fn interface_id(name: &str) -> InterfaceId {
    InterfaceId::from_random(number("interface", name))
}

pub fn network_id(name: Option<&str>) -> VpcId {
    VpcId::from_random(number("network", name.unwrap_or(NETWORK_DEFAULT)))
}

/// What stands for a name of its kind: the first bits of a digest of both.
pub fn number(kind: &str, name: &str) -> u128 {
    let digest = Sha256::digest(format!("{kind}\0{name}").as_bytes());
    digest.iter().take(16).fold(0, |n, byte| n << 8 | u128::from(*byte))
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
