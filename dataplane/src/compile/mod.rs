//! From the desired state and what the host says of its devices to tables.
//!
//! Pure. Called by `apply` for every new desired state, by tests and benches.
//! Numbers that stand in flows and keys (an interface's, a network's, a set of
//! groups') follow from the ids alone: compiling the same state anew after a
//! restart gives the same tables, whatever was loaded meanwhile.

mod acls;
mod early;
mod host;
pub mod idle;
mod lists;
mod nat;
mod open;
mod place;
mod policy;
mod private;
mod rate;
mod routes;
mod six;
mod tables;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use ebpf::V6;
use ebpf::layout::{
    self, DNS, INTERFACES_MAX, Interface, LIMITED, LOCALS_MAX, LOOSE_TCP, Local, LocalKey,
    METADATA, METADATA6, RESOLVER, SECONDARIES, SOURCE_CHECK, STEPS_A_TABLE_MAX, TAKES_FRAMES,
    TO_NAMESPACE,
};
use ipnet::Ipv4Net;
use model::security_group::{GROUPS_AN_INTERFACE_MAX, RULES_AN_INTERFACE_MAX};
use model::{
    Direction, GroupId, InterfaceId, Mac, NatGatewayId, NetworkAclId, PrefixList, PrefixListId,
    RouteTableId, RuleId, SecurityGroup,
};
use rpc::dataplane::{self, Desired, FastPath};
use sha2::{Digest, Sha256};

use crate::respond::dns::UPSTREAMS_MAX;

use place::Places;

pub use host::Host;
pub use idle::{OTHER_IDLE_S, TCP_IDLE_S, UDP_IDLE_S, UDP_STREAM_IDLE_S};
pub use policy::row_len;
pub use private::SECONDARIES_AN_INTERFACE_MAX;
pub use rate::payer;
pub use six::IPV6_AN_INTERFACE_MAX;
pub use tables::{Attachment, Class, Content, Names, Placed, Role, Tables};

/// Tracked flows an interface may have: a sixteenth of all, so that one guest
/// cannot take the others' places.
pub const FLOWS_AN_INTERFACE_MAX: u32 = layout::FLOWS_MAX / 16;

/// A network device as the host has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceFact {
    pub ifindex: u32,
    pub mac: Mac,
    pub kind: DeviceKind,
    pub mtu: u16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// One end of a pair, the other in this namespace too.
    Veth,
    /// One end of a pair, the other in another namespace.
    VethToNamespace,
    Other,
}

/// What `compile` needs to know of the host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices {
    /// Every device that `Desired` names, and the punt device.
    pub by_name: BTreeMap<String, DeviceFact>,
    /// Name of the punt device (`Deployment::punt_device`), also in `by_name`.
    pub punt: Option<String>,
    /// The host's own addresses: never dropped early, even inside an elastic range.
    pub host_addresses: Vec<IpAddr>,
    /// Those on the uplink: ICMP errors to the world come from them.
    pub uplink_address: Option<Ipv4Addr>,
    pub uplink_address6: Option<Ipv6Addr>,
    /// Spreads half-open flows where the kernel has no number for it yet: a secret.
    pub seed: u64,
}

/// The desired state is wrong as it stands; nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("interface {interface}: compile: device `{device}` is not on this host")]
    UnknownDevice { interface: String, device: String },
    #[error("{what}: compile: it appears twice, the second time for {interface}")]
    Duplicate { what: String, interface: InterfaceId },
    #[error("interface {interface}: compile: group {group} is not in the desired state")]
    UnknownGroup { interface: InterfaceId, group: GroupId },
    #[error("interface {interface}: compile: group {group} belongs to another network")]
    ForeignGroup { interface: InterfaceId, group: GroupId },
    #[error(
        "interface {interface}: compile: {count} groups, but {GROUPS_AN_INTERFACE_MAX} are the most"
    )]
    TooManyGroups { interface: InterfaceId, count: usize },
    #[error(
        "interface {interface}: compile: {count} {direction} rules, but {RULES_AN_INTERFACE_MAX} are the most"
    )]
    TooManyRules { interface: InterfaceId, direction: Direction, count: usize },
    #[error(
        "group {group}: compile: {count} {direction} rules of {family}, but {most} are the most: \
         take rules away, or raise rules-a-group (times groups-an-interface: \
         {RULES_AN_INTERFACE_MAX} at most)"
    )]
    GroupTooLarge {
        group: GroupId,
        direction: Direction,
        family: &'static str,
        count: u32,
        most: u32,
    },
    #[error(
        "interface {interface}: compile: {count} groups, but {most} are the most: take groups \
         away, or raise groups-an-interface (to {GROUPS_AN_INTERFACE_MAX} at most)"
    )]
    GroupsBeyondLimit { interface: InterfaceId, count: usize, most: usize },
    #[error("limits: compile: {cause}")]
    RuleLimits { cause: String },
    #[error("prefix list {list}: compile: {cause}")]
    PrefixList { list: PrefixListId, cause: String },
    #[error("group {group}: compile: prefix list {list} is not in the desired state")]
    UnknownList { group: GroupId, list: PrefixListId },
    #[error("interface {interface}: compile: address {address} is not inside its subnet {subnet}")]
    OutsideSubnet { interface: InterfaceId, address: Ipv4Addr, subnet: Ipv4Net },
    #[error(
        "interface {interface}: compile: {count} secondary addresses, but {SECONDARIES_AN_INTERFACE_MAX} are the most"
    )]
    TooManySecondaries { interface: InterfaceId, count: usize },
    #[error("interface {interface}: compile: idle: {wrong}; give it {least} to {most}, or nothing", least = wrong.least, most = wrong.most)]
    Idle { interface: InterfaceId, wrong: idle::Wrong },
    #[error("{object}: compile: rates: {which}: {cause}")]
    Rate { object: String, which: &'static str, cause: String },
    #[error(
        "interface {interface}: compile: IPv6 address {address} is not a global one inside its subnet6"
    )]
    OutsideSubnet6 { interface: InterfaceId, address: Ipv6Addr },
    #[error(
        "interface {interface}: compile: {count} IPv6 addresses, but {IPV6_AN_INTERFACE_MAX} are the most"
    )]
    TooManyAddresses { interface: InterfaceId, count: usize },
    #[error("route table {table}: compile: {cause}")]
    RouteTable { table: RouteTableId, cause: String },
    #[error("interface {interface}: compile: route table {table} is not in the desired state")]
    UnknownRouteTable { interface: InterfaceId, table: RouteTableId },
    #[error("interface {interface}: compile: route table {table} belongs to another network")]
    ForeignRouteTable { interface: InterfaceId, table: RouteTableId },
    #[error("network ACL {acl}: compile: {cause}")]
    NetworkAcl { acl: NetworkAclId, cause: String },
    #[error("interface {interface}: compile: network ACL {acl} is not in the desired state")]
    UnknownAcl { interface: InterfaceId, acl: NetworkAclId },
    #[error("interface {interface}: compile: network ACL {acl} belongs to another network")]
    ForeignAcl { interface: InterfaceId, acl: NetworkAclId },
    #[error("NAT gateway {gateway}: compile: {cause}")]
    NatGateway { gateway: NatGatewayId, cause: String },
    #[error("groups of {interface}: compile: their number is taken by another set of groups")]
    IdentityCollision { interface: InterfaceId },
    #[error("{table}: compile: more than {limit}")]
    Full { table: &'static str, limit: u32 },
    #[error(
        "{table}: compile: no {len} free places side by side, for what is loaded lies scattered: \
         apply this state in two steps, the first with fewer rules"
    )]
    Scattered { table: &'static str, len: u32 },
}

/// `loaded` is what the kernel has now: what stays keeps its place there.
pub fn compile(desired: &Desired, devices: &Devices, loaded: &Tables) -> Result<Tables, Error> {
    refuse_duplicates(desired)?;
    six::refuse(desired)?;
    limit("interfaces", desired.interfaces.len(), INTERFACES_MAX)?;
    private::refuse(desired)?;
    lists::refuse(desired)?;
    limit("name servers", desired.name_servers.len(), UPSTREAMS_MAX as u32)?;
    let groups: BTreeMap<GroupId, &SecurityGroup> =
        desired.groups.iter().map(|g| (g.id, g)).collect();
    let identities = identities(desired)?;
    let mut tables = Tables::default();
    tables.names.list(desired);
    let acls = acls::by_id(desired)?;
    let nat_gateways = nat::by_id(desired)?;
    let route_tables = routes::compile(desired, devices, (loaded, &nat_gateways), &mut tables)?;
    let mut compiler = Compiler {
        devices,
        route_tables,
        acls: &acls,
        groups: &groups,
        lists: &desired.prefix_lists,
        identities: &identities,
        places: Places::new(&loaded.policies),
        policies: BTreeMap::new(),
        opens: open::Opens::new(),
        loaded: open::loaded(loaded),
        generation: desired.generation as u16,
        slots: Slots::new(loaded),
        uplink: uplink(desired, devices)?,
        tables,
    };
    for interface in &desired.interfaces {
        compiler.add(desired, interface)?;
        compiler.add_six(desired, interface);
    }
    let Compiler { mut tables, places, uplink, mut slots, .. } = compiler;
    nat::add(desired, &mut slots, &mut tables)?;
    tables.policies = places.placed;
    tables.config.seed = match loaded.config.seed {
        0 => devices.seed,
        seed => seed,
    };
    early::add(desired, devices, &mut tables)?;
    rate::of_sources(desired, &mut tables)?;
    if let Some(uplink) = uplink {
        tables.config.uplink = uplink.ifindex;
        tables.config.uplink_mac = uplink.mac.octets();
        tables.config.fast = uplink.fast.into();
        tables.config.uplink_address = devices.uplink_address.map_or(0, Into::into);
        tables.config.uplink_address6 = devices.uplink_address6.map_or(V6::UNSPECIFIED, six::v6);
        if !uplink.early_drop {
            early::late(&mut tables.config);
        }
        let role = if uplink.early_drop { Role::UplinkEarly } else { Role::Uplink };
        let attachment = Attachment { device: uplink.device, role };
        tables.attachments.insert(uplink.ifindex, attachment);
    }
    if let Some((name, punt)) = punt(devices) {
        let attachment = Attachment { device: name.to_owned(), role: Role::Punt };
        tables.attachments.insert(punt.ifindex, attachment);
    }
    Ok(tables)
}

fn refuse_duplicates(desired: &Desired) -> Result<(), Error> {
    let mut seen = BTreeSet::new();
    let mut resolvers = Vec::new();
    for i in &desired.interfaces {
        // Whoever resolves names is no interface.
        let resolver = i.services.dns.as_ref().and_then(|dns| dns.address);
        resolvers.extend(resolver.map(|address| (format!("address {address} in {}", i.vpc), i.id)));
        let own = [format!("interface {}", i.id), format!("device `{}`", i.device.name())];
        for what in own.into_iter().chain(private::told(i)) {
            if !seen.insert(what.clone()) {
                return Err(Error::Duplicate { what, interface: i.id });
            }
        }
    }
    for gateway in &desired.nat_gateways {
        if let Some(what) = nat::told(gateway).into_iter().find(|what| !seen.insert(what.clone())) {
            let cause = format!("{what} is an interface's, or another gateway's");
            return Err(Error::NatGateway { gateway: gateway.id, cause });
        }
    }
    match resolvers.into_iter().find(|(what, _)| seen.contains(what)) {
        Some((what, interface)) => Err(Error::Duplicate { what, interface }),
        None => Ok(()),
    }
}

fn limit(table: &'static str, len: usize, limit: u32) -> Result<(), Error> {
    if len > limit as usize { Err(Error::Full { table, limit }) } else { Ok(()) }
}

/// Every set of groups that an interface has, by its number.
fn identities(desired: &Desired) -> Result<BTreeMap<u64, BTreeSet<GroupId>>, Error> {
    let mut identities = BTreeMap::new();
    for interface in &desired.interfaces {
        let set: BTreeSet<GroupId> = interface.groups.iter().copied().collect();
        let number = identity(&set);
        let known = identities.entry(number).or_insert_with(|| set.clone());
        if *known != set {
            return Err(Error::IdentityCollision { interface: interface.id });
        }
    }
    limit("sets of groups", identities.len(), STEPS_A_TABLE_MAX)?;
    Ok(identities)
}

/// The number that stands for a set of groups; 0 for the empty set.
fn identity(set: &BTreeSet<GroupId>) -> u64 {
    if set.is_empty() {
        return 0;
    }
    let mut hash = Sha256::new();
    for group in set {
        hash.update(group.digits());
    }
    first_word(&hash.finalize()).max(1)
}

fn first_word(digest: &[u8]) -> u64 {
    digest.iter().take(8).fold(0, |word, byte| word << 8 | u64::from(*byte))
}

/// The low 64 bits of an id's 68.
fn id_number(digits: &str) -> u64 {
    digits.bytes().fold(0, |n, b| n << 4 | u64::from((b as char).to_digit(16).unwrap_or(0)))
}

struct Uplink {
    device: String,
    ifindex: u32,
    mac: Mac,
    mtu: u16,
    gateway: Ipv4Addr,
    early_drop: bool,
    fast: bool,
}

fn uplink(desired: &Desired, devices: &Devices) -> Result<Option<Uplink>, Error> {
    let Some(uplink) = &desired.uplink else { return Ok(None) };
    let fact = devices.by_name.get(&uplink.device).ok_or_else(|| Error::UnknownDevice {
        interface: "uplink".to_owned(),
        device: uplink.device.clone(),
    })?;
    let device = uplink.device.clone();
    let fast = uplink.fast_path == FastPath::Declared;
    Ok(Some(Uplink {
        device,
        ifindex: fact.ifindex,
        mac: fact.mac,
        mtu: fact.mtu,
        gateway: uplink.gateway,
        early_drop: fast || uplink.early_drop.unwrap_or(fact.kind == DeviceKind::Other),
        fast,
    }))
}

fn punt(devices: &Devices) -> Option<(&str, DeviceFact)> {
    let name = devices.punt.as_deref()?;
    Some((name, *devices.by_name.get(name)?))
}

/// Counter slots: an interface that stays keeps its own.
struct Slots {
    given: BTreeMap<u64, u32>,
    taken: BTreeSet<u32>,
}

impl Slots {
    fn new(loaded: &Tables) -> Self {
        let gateways = loaded.nat_gateways().map(|(_, gateway)| gateway);
        let given: BTreeMap<u64, u32> =
            loaded.interfaces.values().chain(gateways).map(|i| (i.id, i.slot)).collect();
        Self { taken: given.values().copied().collect(), given }
    }

    fn slot(&mut self, id: u64) -> Result<u32, Error> {
        if let Some(slot) = self.given.get(&id) {
            return Ok(*slot);
        }
        let slot = (1..=INTERFACES_MAX)
            .find(|slot| !self.taken.contains(slot))
            .ok_or(Error::Full { table: "interfaces and NAT gateways", limit: INTERFACES_MAX })?;
        self.taken.insert(slot);
        self.given.insert(id, slot);
        Ok(slot)
    }
}

/// What the dataplane knows of one denial: which ACL, and by which entry.
pub use acls::{acl_denied, group_rules};

type SlotAndRules = (u32, Arc<[RuleId]>);

struct Compiler<'a> {
    devices: &'a Devices,
    groups: &'a BTreeMap<GroupId, &'a SecurityGroup>,
    lists: &'a [PrefixList],
    identities: &'a BTreeMap<u64, BTreeSet<GroupId>>,
    places: Places,
    /// Slots and rules of policies made already, by the groups in their order.
    policies: BTreeMap<(Direction, Vec<GroupId>), SlotAndRules>,
    opens: open::Opens,
    /// Records that are loaded, by their ids.
    loaded: BTreeMap<u64, &'a Interface>,
    /// Of the desired state, its low bits.
    generation: u16,
    slots: Slots,
    route_tables: routes::RouteTables,
    acls: &'a acls::ById<'a>,
    uplink: Option<Uplink>,
    tables: Tables,
}

impl Compiler<'_> {
    fn add(&mut self, desired: &Desired, interface: &dataplane::Interface) -> Result<(), Error> {
        let name = interface.device.name();
        let device = *self.devices.by_name.get(name).ok_or_else(|| Error::UnknownDevice {
            interface: interface.id.to_string(),
            device: name.to_owned(),
        })?;
        let ifindex = device.ifindex;
        let mut record = self.record(interface, device)?;
        let payer = rate::payer(desired, interface)?;
        let mut rates = rate::of(payer)?;
        if payer.id != interface.id {
            rates.payer = self.slots.slot(id_number(&payer.id.digits()))?.into();
        }
        if rates.limited() {
            record.flags |= LIMITED;
            self.tables.rates.insert(record.slot, rates);
        }
        if !interface.secondary.is_empty() {
            record.flags |= SECONDARIES;
        }
        let tables = &mut self.tables;
        tables.interfaces.insert(ifindex, record);
        private::add(interface, &record, tables);
        self.resolver(interface, record.vpc)?;
        let tables = &mut self.tables;
        let attachment = Attachment { device: name.to_owned(), role: Role::Guest };
        tables.attachments.insert(ifindex, attachment);
        tables.names.interfaces.insert(ifindex, interface.id);
        if let Some(table) = interface.route_table {
            tables.names.route_tables.insert(ifindex, table);
        }
        Ok(())
    }

    /// The network's own address for names, which every interface of it may name.
    fn resolver(&mut self, interface: &dataplane::Interface, vpc: u64) -> Result<(), Error> {
        let address = interface.services.dns.as_ref().and_then(|dns| dns.address);
        if let Some(address) = address {
            let key = LocalKey { vpc, address: address.into(), zero: 0 };
            let local = Local { identity: 0, ifindex: 0, service: RESOLVER, elastic: 0, zero: 0 };
            self.tables.locals.insert(key, local);
            limit("private addresses", self.tables.locals.len(), LOCALS_MAX)?;
        }
        Ok(())
    }

    fn add_six(&mut self, desired: &Desired, interface: &dataplane::Interface) {
        let device = self.devices.by_name.get(interface.device.name());
        if let Some(record) = device.and_then(|d| self.tables.interfaces.get(&d.ifindex)).copied() {
            six::add(desired, interface, &record, &mut self.tables);
        }
    }

    fn record(&mut self, i: &dataplane::Interface, device: DeviceFact) -> Result<Interface, Error> {
        let id = id_number(&i.id.digits());
        let idle = idle::of(&i.idle).map_err(|wrong| Error::Idle { interface: i.id, wrong })?;
        let source_check = if i.source_check { SOURCE_CHECK } else { 0 };
        let metadata = if i.metadata.is_some() { METADATA } else { 0 };
        let metadata6 = if i.services.metadata_ipv6 && metadata != 0 { METADATA6 } else { 0 };
        let loose_tcp = if i.loose_tcp { LOOSE_TCP } else { 0 };
        let dns = if i.services.dns.is_some() { DNS } else { 0 };
        let to_namespace = match device.kind {
            DeviceKind::VethToNamespace => TO_NAMESPACE,
            _ => 0,
        };
        let tap = matches!(i.device, dataplane::Device::Tap { .. });
        let takes_frames = if i.takes_frames.unwrap_or(tap) { TAKES_FRAMES } else { 0 };
        let set = i.groups.iter().copied().collect();
        let (ingress, egress) = (Direction::Ingress, Direction::Egress);
        let (ingress, egress) =
            (self.policy(i, device.ifindex, ingress)?, self.policy(i, device.ifindex, egress)?);
        let (open_ingress, open_egress, epoch) = self.open(i)?;
        Ok(Interface {
            id,
            vpc: id_number(&i.vpc.digits()),
            identity: identity(&set),
            ifindex: device.ifindex,
            slot: self.slots.slot(id)?,
            address: i.address.into(),
            elastic: i.elastic.map_or(0, Into::into),
            subnet: i.subnet.network().into(),
            mask: i.subnet.netmask().into(),
            uplink: self.uplink.as_ref().map_or(0, |u| u.ifindex),
            next_hop: self.uplink.as_ref().map_or(0, |u| u.gateway.into()),
            punt: punt(self.devices).map_or(0, |(_, fact)| fact.ifindex),
            ingress,
            egress,
            flows_max: FLOWS_AN_INTERFACE_MAX,
            tcp_idle_s: idle.tcp_established,
            udp_idle_s: idle.udp,
            udp_stream_idle_s: idle.udp_stream,
            other_idle_s: OTHER_IDLE_S,
            mac: i.mac.octets(),
            flags: source_check
                | metadata
                | metadata6
                | dns
                | to_namespace
                | takes_frames
                | loose_tcp,
            routes: self.route_tables.of(i)?,
            mtu: i.dhcp.mtu,
            uplink_mtu: self.uplink.as_ref().map_or(0, |u| u.mtu),
            acl_ingress: self.acl(i, device.ifindex, Direction::Ingress)?,
            acl_egress: self.acl(i, device.ifindex, Direction::Egress)?,
            open_ingress,
            open_egress,
            epoch,
            zero: [0; 3],
        })
    }

    fn policy(
        &mut self,
        i: &dataplane::Interface,
        ifindex: u32,
        direction: Direction,
    ) -> Result<u32, Error> {
        if i.groups.len() > GROUPS_AN_INTERFACE_MAX {
            let count = i.groups.len();
            return Err(Error::TooManyGroups { interface: i.id, count });
        }
        let mut groups = Vec::with_capacity(i.groups.len());
        for group in &i.groups {
            let found = self
                .groups
                .get(group)
                .ok_or(Error::UnknownGroup { interface: i.id, group: *group })?;
            if found.vpc != i.vpc {
                return Err(Error::ForeignGroup { interface: i.id, group: *group });
            }
            groups.push(*found);
        }
        let key = (direction, i.groups.clone());
        let names = &mut self.tables.names.rules;
        if let Some((slot, rules)) = self.policies.get(&key) {
            names.insert((ifindex, direction), rules.clone());
            return Ok(*slot);
        }
        let rules: Arc<[RuleId]> =
            groups.iter().flat_map(|g| g.rules(direction)).map(|r| r.id).collect();
        lists::rules_within(i, &groups, direction, self.lists)?;
        names.insert((ifindex, direction), rules.clone());
        let content = policy::content(&groups, direction, self.identities, self.lists);
        let slot = self.places.slot(content)?;
        self.policies.insert(key, (slot, rules));
        Ok(slot)
    }
}
