//! The network part of RunInstances: subnets, groups and addresses of what is launched.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use model::GroupId;

use super::Wish;
use crate::api::{ApiError, Params};
use crate::core::lookup::find_all;
use crate::core::{Context, group};
use crate::record::{Interface, Subnet};

/// The network part, said either at the top or by the first interface.
#[derive(Default)]
pub struct Network<'p> {
    pub subnet: Option<&'p str>,
    pub group_ids: Vec<&'p str>,
    pub group_names: Vec<&'p str>,
    pub address: Option<Ipv4Addr>,
    pub description: String,
}

impl<'p> Network<'p> {
    pub fn read(params: &'p Params) -> Result<Self, ApiError> {
        let interfaces = params.structs("NetworkInterface");
        let top = Self {
            subnet: params.text("SubnetId").filter(|t| !t.is_empty()),
            group_ids: params.texts("SecurityGroupId"),
            group_names: params.texts("SecurityGroup"),
            address: private_address(params.text("PrivateIpAddress"))?,
            description: String::new(),
        };
        let Some(first) = interfaces.first() else { return Ok(top) };
        if top.subnet.is_some()
            || top.address.is_some()
            || !top.group_ids.is_empty()
            || !top.group_names.is_empty()
        {
            return Err(ApiError::combination(
                "Network interfaces and an instance-level subnet ID, private IP address or security groups may not be specified on the same request",
            ));
        }
        if interfaces.len() > 1 || first.number("DeviceIndex").is_some_and(|n| n != 0) {
            return Err(ApiError::new(
                "Unsupported",
                "An instance has one network interface, with device index 0.",
            ));
        }
        for name in first.names() {
            let read = matches!(
                name,
                "DeviceIndex"
                    | "SubnetId"
                    | "SecurityGroupId"
                    | "PrivateIpAddress"
                    | "DeleteOnTermination"
                    | "Description"
                    | "AssociatePublicIpAddress"
                    | "InterfaceType"
                    | "NetworkCardIndex"
            );
            if !read {
                return Err(ApiError::new(
                    "Unsupported",
                    format!("NetworkInterface.1.{name} is not supported."),
                ));
            }
        }
        if first.flag("DeleteOnTermination") == Some(false) {
            return Err(ApiError::new("Unsupported", "An interface goes with its instance."));
        }
        if first.flag("AssociatePublicIpAddress") == Some(true) {
            return Err(ApiError::new(
                "Unsupported",
                "Public addresses are given by AllocateAddress and AssociateAddress only.",
            ));
        }
        Ok(Self {
            subnet: first.text("SubnetId").filter(|t| !t.is_empty()),
            group_ids: first.texts("SecurityGroupId"),
            group_names: Vec::new(),
            address: private_address(first.text("PrivateIpAddress"))?,
            description: first.text("Description").unwrap_or_default().to_owned(),
        })
    }

    pub fn groups(&self, context: &Context<'_>, subnet: &Subnet) -> Result<Vec<GroupId>, ApiError> {
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

fn private_address(text: Option<&str>) -> Result<Option<Ipv4Addr>, ApiError> {
    let Some(text) = text.filter(|t| !t.is_empty()) else { return Ok(None) };
    text.parse().map(Some).map_err(|_| ApiError::invalid(format!("Invalid IP address: {text}")))
}

/// EC2 keeps the first four addresses of a subnet and its last for itself.
const RESERVED_FIRST: u32 = 4;

pub fn addresses(
    context: &Context<'_>,
    wish: &Wish<'_>,
    count: usize,
) -> Result<Vec<Ipv4Addr>, ApiError> {
    let subnet = wish.subnet;
    let used: HashSet<Ipv4Addr> = used_addresses(context, subnet);
    let first = u32::from(subnet.cidr.network()) + RESERVED_FIRST;
    let last = u32::from(subnet.cidr.broadcast());
    if let Some(address) = wish.address {
        let number = u32::from(address);
        if number < first || number >= last {
            return Err(ApiError::invalid(format!(
                "Address {address} does not fall within the subnet's address range"
            )));
        }
        if used.contains(&address) {
            return Err(ApiError::new(
                "InvalidIPAddress.InUse",
                format!("Address {address} is in use."),
            ));
        }
        return Ok(vec![address]);
    }
    let free = (first..last).map(Ipv4Addr::from).filter(|a| !used.contains(a));
    let found: Vec<Ipv4Addr> = free.take(count).collect();
    if found.len() < count {
        return Err(ApiError::new(
            "InSufficientFreeAddressesInSubnet",
            format!(
                "There are not enough free addresses in subnet '{}' to satisfy the requested number of instances.",
                subnet.id
            ),
        ));
    }
    Ok(found)
}

pub fn used_addresses(context: &Context<'_>, subnet: &Subnet) -> HashSet<Ipv4Addr> {
    let interfaces = context.state.instances.iter().filter_map(|i| i.interface.as_ref());
    interfaces.filter(|n| n.subnet == subnet.id).map(|n| n.address).collect()
}

pub fn private_name(interface: &Interface) -> String {
    format!("private/{}/{}", interface.subnet, interface.address)
}
