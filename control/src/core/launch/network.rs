//! The network part of RunInstances: subnets, groups and addresses of what is launched.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::Ipv4Addr;

use model::{GroupId, InstanceType, SubnetId};

use super::default_subnet;
use crate::api::{ApiError, Params};
use crate::core::lookup::{find, find_all};
use crate::core::{Context, group};
use crate::record::Subnet;

/// Private addresses of an interface, the primary one included: what EC2's largest types have.
pub const ADDRESSES_AN_INTERFACE_MAX: usize = 50;

/// An interface that each of the launched instances gets.
pub struct Network<'a> {
    pub device_index: u32,
    pub subnet: &'a Subnet,
    pub groups: Vec<GroupId>,
    pub description: String,
    address: Option<Ipv4Addr>,
    secondary: Vec<Ipv4Addr>,
    /// Further ones, whichever are free.
    secondary_count: usize,
}

impl Network<'_> {
    pub fn address_count(&self) -> usize {
        1 + self.secondary.len() + self.secondary_count
    }

    /// Addresses that the request names: they serve one instance only.
    pub fn named(&self) -> impl Iterator<Item = Ipv4Addr> {
        self.address.into_iter().chain(self.secondary.iter().copied())
    }
}

/// What is said of one interface, either at the top or by `NetworkInterface.N`.
#[derive(Default)]
struct Said<'p> {
    device_index: u32,
    subnet: Option<&'p str>,
    group_ids: Vec<&'p str>,
    group_names: Vec<&'p str>,
    address: Option<Ipv4Addr>,
    secondary: Vec<Ipv4Addr>,
    secondary_count: usize,
    description: String,
}

/// In the order of the device indices, the first of which is 0.
pub fn networks<'a>(
    context: &Context<'a>,
    params: &Params,
    kind: &InstanceType,
) -> Result<Vec<Network<'a>>, ApiError> {
    let mut all = read(params)?;
    if all.len() > kind.interfaces_max as usize {
        return Err(ApiError::new(
            "AttachmentLimitExceeded",
            format!(
                "Interface count {} exceeds the limit for {}: it takes at most {}.",
                all.len(),
                kind.name,
                kind.interfaces_max
            ),
        ));
    }
    all.sort_by_key(|said| said.device_index);
    let indices: BTreeSet<u32> = all.iter().map(|said| said.device_index).collect();
    if indices.len() < all.len() || !indices.contains(&0) {
        return Err(ApiError::invalid(
            "Each network interface requires a device index of its own, and one has 0.",
        ));
    }
    all.into_iter().map(|said| said.found(context, params)).collect()
}

fn read(params: &Params) -> Result<Vec<Said<'_>>, ApiError> {
    let interfaces = params.structs("NetworkInterface");
    let top = Said {
        subnet: params.text("SubnetId").filter(|t| !t.is_empty()),
        group_ids: params.texts("SecurityGroupId"),
        group_names: params.texts("SecurityGroup"),
        address: private_address(params.text("PrivateIpAddress"))?,
        ..Said::default()
    };
    if interfaces.is_empty() {
        return Ok(vec![top]);
    }
    if top.subnet.is_some()
        || top.address.is_some()
        || !top.group_ids.is_empty()
        || !top.group_names.is_empty()
    {
        return Err(ApiError::combination(
            "Network interfaces and an instance-level subnet ID, private IP address or security groups may not be specified on the same request",
        ));
    }
    let alone = interfaces.len() == 1;
    let each = interfaces.iter().enumerate();
    each.map(|(i, params)| Said::read(i + 1, params, alone)).collect()
}

impl<'p> Said<'p> {
    fn read(number: usize, params: &'p Params, alone: bool) -> Result<Self, ApiError> {
        refuse_unknown(number, params)?;
        let index = match params.number("DeviceIndex") {
            None if alone => 0,
            None => {
                return Err(ApiError::missing(&format!("NetworkInterface.{number}.DeviceIndex")));
            }
            Some(index) => u32::try_from(index)
                .ok()
                .filter(|i| *i < model::instance_type::INTERFACES_MAX)
                .ok_or_else(|| ApiError::invalid(format!("Invalid device index: {index}")))?,
        };
        let mut said = Self {
            device_index: index,
            subnet: params.text("SubnetId").filter(|t| !t.is_empty()),
            group_ids: params.texts("SecurityGroupId"),
            address: private_address(params.text("PrivateIpAddress"))?,
            description: params.text("Description").unwrap_or_default().to_owned(),
            ..Self::default()
        };
        said.read_addresses(params)?;
        Ok(said)
    }

    fn read_addresses(&mut self, params: &Params) -> Result<(), ApiError> {
        for given in params.structs("PrivateIpAddresses") {
            let address = private_address(Some(given.need("PrivateIpAddress")?))?;
            match given.flag("Primary") {
                Some(true) if self.address.is_some() => {
                    return Err(ApiError::combination(
                        "Only one primary private IP address can be specified.",
                    ));
                }
                Some(true) => self.address = address,
                _ => self.secondary.extend(address),
            }
        }
        if let Some(count) = params.number("SecondaryPrivateIpAddressCount") {
            if !self.secondary.is_empty() {
                return Err(ApiError::combination(
                    "Secondary private addresses are either named or counted.",
                ));
            }
            self.secondary_count = usize::try_from(count)
                .map_err(|_| ApiError::invalid(format!("Invalid count of addresses: {count}")))?;
        }
        if self.secondary.len().saturating_add(self.secondary_count) >= ADDRESSES_AN_INTERFACE_MAX {
            return Err(ApiError::new(
                "PrivateIpAddressLimitExceeded",
                format!(
                    "An interface has at most {ADDRESSES_AN_INTERFACE_MAX} private addresses, the primary one included."
                ),
            ));
        }
        Ok(())
    }

    fn found<'a>(self, context: &Context<'a>, params: &Params) -> Result<Network<'a>, ApiError> {
        let subnet = match self.subnet {
            Some(id) => find::<Subnet>(context.state, id)?,
            None => default_subnet(context, params)?,
        };
        if subnet.zone != context.settings.zone {
            return Err(ApiError::new("Unsupported", "The subnet is in a zone without hosts."));
        }
        Ok(Network {
            device_index: self.device_index,
            subnet,
            groups: self.groups(context, subnet)?,
            description: self.description,
            address: self.address,
            secondary: self.secondary,
            secondary_count: self.secondary_count,
        })
    }

    fn groups(&self, context: &Context<'_>, subnet: &Subnet) -> Result<Vec<GroupId>, ApiError> {
        let state = context.state;
        let mut groups: Vec<GroupId> = Vec::new();
        for group in find_all::<crate::record::Group>(state, &self.group_ids)? {
            if group.vpc != subnet.vpc {
                return Err(ApiError::invalid(format!(
                    "Security group {} and subnet {} belong to different networks.",
                    group.id, subnet.id
                )));
            }
            groups.push(group.id);
        }
        for name in &self.group_names {
            let group = group::by_name(state, subnet.vpc, name)?;
            if !groups.contains(&group.id) {
                groups.push(group.id);
            }
        }
        if groups.is_empty() {
            groups.push(group::by_name(state, subnet.vpc, "default")?.id);
        }
        let most = context.settings.rule_limits.groups_an_interface as usize;
        if groups.len() > most {
            return Err(ApiError::new(
                "SecurityGroupsPerInterfaceLimitExceeded",
                format!("The maximum number of security groups per interface is {most}."),
            ));
        }
        Ok(groups)
    }
}

/// Saying yes to what is not done would be a lie.
fn refuse_unknown(number: usize, params: &Params) -> Result<(), ApiError> {
    let refuse = |what: String| Err(ApiError::new("Unsupported", what));
    for name in params.names() {
        let read = matches!(
            name,
            "DeviceIndex"
                | "SubnetId"
                | "SecurityGroupId"
                | "PrivateIpAddress"
                | "PrivateIpAddresses"
                | "SecondaryPrivateIpAddressCount"
                | "DeleteOnTermination"
                | "Description"
                | "AssociatePublicIpAddress"
                | "InterfaceType"
                | "NetworkCardIndex"
        );
        if !read {
            return refuse(format!("NetworkInterface.{number}.{name} is not supported."));
        }
    }
    if params.flag("DeleteOnTermination") == Some(false) {
        return refuse("An interface goes with its instance.".to_owned());
    }
    if params.flag("AssociatePublicIpAddress") == Some(true) {
        return refuse(
            "Public addresses are given by AllocateAddress and AssociateAddress only.".to_owned(),
        );
    }
    Ok(())
}

fn private_address(text: Option<&str>) -> Result<Option<Ipv4Addr>, ApiError> {
    let Some(text) = text.filter(|t| !t.is_empty()) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| ApiError::invalid(format!("Invalid IP address: {text}")))
}

/// EC2 keeps the first four addresses of a subnet and its last for itself.
const RESERVED_FIRST: u32 = 4;

fn lendable(subnet: &Subnet) -> std::ops::Range<u32> {
    u32::from(subnet.cidr.network()) + RESERVED_FIRST..u32::from(subnet.cidr.broadcast())
}

type Used = BTreeMap<SubnetId, HashSet<Ipv4Addr>>;

/// For each instance, for each of its interfaces: the primary address, then the others.
pub fn addresses(
    context: &Context<'_>,
    networks: &[Network<'_>],
    count: usize,
) -> Result<Vec<Vec<Vec<Ipv4Addr>>>, ApiError> {
    let mut used = Used::new();
    for network in networks {
        let of_subnet = used
            .entry(network.subnet.id)
            .or_insert_with(|| used_addresses(context, network.subnet));
        for address in network.named() {
            if !lendable(network.subnet).contains(&u32::from(address)) {
                return Err(ApiError::invalid(format!(
                    "Address {address} does not fall within the subnet's address range"
                )));
            }
            if !of_subnet.insert(address) {
                return Err(ApiError::new(
                    "InvalidIPAddress.InUse",
                    format!("Address {address} is in use."),
                ));
            }
        }
    }
    (0..count).map(|_| networks.iter().map(|n| take(&mut used, n)).collect()).collect()
}

fn take(used: &mut Used, network: &Network<'_>) -> Result<Vec<Ipv4Addr>, ApiError> {
    let used = used.entry(network.subnet.id).or_default();
    let mut free = || {
        let found = lendable(network.subnet).map(Ipv4Addr::from).find(|a| !used.contains(a));
        used.extend(found);
        found.ok_or_else(|| {
            ApiError::new(
                "InSufficientFreeAddressesInSubnet",
                format!(
                    "There are not enough free addresses in subnet '{}' to satisfy the requested number of instances.",
                    network.subnet.id
                ),
            )
        })
    };
    let mut all = vec![network.address.map_or_else(&mut free, Ok)?];
    all.extend(&network.secondary);
    for _ in 0..network.secondary_count {
        all.push(free()?);
    }
    Ok(all)
}

pub fn used_addresses(context: &Context<'_>, subnet: &Subnet) -> HashSet<Ipv4Addr> {
    let interfaces = context.state.instances.iter().flat_map(|i| &i.interfaces);
    interfaces.filter(|n| n.subnet == subnet.id).flat_map(|n| n.addresses()).collect()
}

pub fn private_name(subnet: SubnetId, address: Ipv4Addr) -> String {
    format!("private/{subnet}/{address}")
}
