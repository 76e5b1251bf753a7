//! The networks, as far as they are shown: the default VPC, its subnets, and the
//! interface of each instance.

use std::borrow::Cow;

use model::InterfaceId;

use super::instance::{interface_node, public_address};
use super::launch::used_addresses;
use super::lookup::{find_all, with_tags};
use super::{Context, page_secret};
use crate::api::{ApiError, Params, Struct};
use crate::filter::{Filters, Page};
use crate::record::{Instance, Interface, OWNER_ID, Subnet, Vpc};

pub fn describe_vpcs(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    const ACTION: &str = "DescribeVpcs";
    let ids = params.texts("VpcId");
    let filters = Filters::read(params)?.known(&[
        "cidr",
        "cidr-block-association.cidr-block",
        "dhcp-options-id",
        "is-default",
        "isDefault",
        "owner-id",
        "state",
        "tag-key",
        "vpc-id",
    ])?;
    let secret = page_secret(context.state);
    let page = Page::read(params, ACTION, !ids.is_empty(), &secret)?;
    let mut vpcs: Vec<&Vpc> = if ids.is_empty() {
        context.state.vpcs.iter().collect()
    } else {
        find_all(context.state, &ids)?
    };
    vpcs.sort_by_key(|v| v.id);
    let admitted = vpcs.into_iter().filter(|vpc| {
        filters.admit(&vpc.tags, |name| {
            vec![Cow::Owned(match name {
                "cidr" | "cidr-block-association.cidr-block" => vpc.cidr.to_string(),
                "is-default" | "isDefault" => vpc.default.to_string(),
                "owner-id" => OWNER_ID.to_owned(),
                "state" => "available".to_owned(),
                "vpc-id" => vpc.id.to_string(),
                _ => return Vec::new(),
            })]
        })
    });
    let (vpcs, next) = page.cut(admitted, |v| v.id.to_string(), ACTION, &secret);
    let nodes = vpcs.into_iter().map(|vpc| {
        let block = Struct::new()
            .with("associationId", format!("vpc-cidr-assoc-{}", vpc.id.digits()))
            .with("cidrBlock", vpc.cidr)
            .with("cidrBlockState", Struct::new().with("state", "associated"));
        let answer = Struct::new()
            .with("vpcId", vpc.id)
            .with("ownerId", OWNER_ID)
            .with("state", "available")
            .with("cidrBlock", vpc.cidr)
            .list("cidrBlockAssociationSet", [block])
            .with("instanceTenancy", "default")
            .with("isDefault", vpc.default);
        with_tags(answer, &vpc.tags)
    });
    Ok(Struct::new().list("vpcSet", nodes).with_some("nextToken", next))
}

pub fn describe_subnets(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    const ACTION: &str = "DescribeSubnets";
    let ids = params.texts("SubnetId");
    let filters = Filters::read(params)?.known(&[
        "availability-zone",
        "availabilityZone",
        "available-ip-address-count",
        "cidr",
        "cidr-block",
        "cidrBlock",
        "default-for-az",
        "defaultForAz",
        "map-public-ip-on-launch",
        "owner-id",
        "state",
        "subnet-id",
        "tag-key",
        "vpc-id",
    ])?;
    let secret = page_secret(context.state);
    let page = Page::read(params, ACTION, !ids.is_empty(), &secret)?;
    let mut subnets: Vec<&Subnet> = if ids.is_empty() {
        context.state.subnets.iter().collect()
    } else {
        find_all(context.state, &ids)?
    };
    subnets.sort_by_key(|s| s.id);
    let admitted = subnets.into_iter().filter(|subnet| {
        filters.admit(&subnet.tags, |name| {
            vec![Cow::Owned(match name {
                "availability-zone" | "availabilityZone" => subnet.zone.clone(),
                "available-ip-address-count" => free_count(context, subnet).to_string(),
                "cidr" | "cidr-block" | "cidrBlock" => subnet.cidr.to_string(),
                "default-for-az" | "defaultForAz" => subnet.default.to_string(),
                "map-public-ip-on-launch" => "false".to_owned(),
                "owner-id" => OWNER_ID.to_owned(),
                "state" => "available".to_owned(),
                "subnet-id" => subnet.id.to_string(),
                "vpc-id" => subnet.vpc.to_string(),
                _ => return Vec::new(),
            })]
        })
    });
    let (subnets, next) = page.cut(admitted, |s| s.id.to_string(), ACTION, &secret);
    let nodes = subnets.into_iter().map(|subnet| {
        let answer = Struct::new()
            .with("subnetId", subnet.id)
            .with("vpcId", subnet.vpc)
            .with("ownerId", OWNER_ID)
            .with("state", "available")
            .with("cidrBlock", subnet.cidr)
            .with("availabilityZone", &subnet.zone)
            .with("availabilityZoneId", format!("{}-az1", context.settings.region))
            .with("availableIpAddressCount", free_count(context, subnet))
            .with("defaultForAz", subnet.default)
            .with("mapPublicIpOnLaunch", false)
            .with("assignIpv6AddressOnCreation", false);
        with_tags(answer, &subnet.tags)
    });
    Ok(Struct::new().list("subnetSet", nodes).with_some("nextToken", next))
}

/// Without the five that EC2 keeps for itself.
fn free_count(context: &Context<'_>, subnet: &Subnet) -> u64 {
    let all = 1u64 << (32 - subnet.cidr.prefix_len());
    all.saturating_sub(5).saturating_sub(used_addresses(context, subnet).len() as u64)
}

const INTERFACE_FILTERS: &[&str] = &[
    "addresses.private-ip-address",
    "association.public-ip",
    "attachment.attachment-id",
    "attachment.device-index",
    "attachment.instance-id",
    "attachment.status",
    "availability-zone",
    "description",
    "group-id",
    "group-name",
    "interface-type",
    "mac-address",
    "network-interface-id",
    "owner-id",
    "private-dns-name",
    "private-ip-address",
    "source-dest-check",
    "status",
    "subnet-id",
    "tag-key",
    "vpc-id",
];

pub fn describe_interfaces(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    const ACTION: &str = "DescribeNetworkInterfaces";
    let state = context.state;
    let ids = params.texts("NetworkInterfaceId");
    let filters = Filters::read(params)?.known(INTERFACE_FILTERS)?;
    let secret = page_secret(state);
    let page = Page::read(params, ACTION, !ids.is_empty(), &secret)?;
    let mut rows: Vec<(&Instance, &Interface)> =
        state.instances.iter().filter_map(|i| Some((i, i.interface.as_ref()?))).collect();
    rows.sort_by_key(|(_, n)| n.id);
    for id in &ids {
        let malformed = |_| {
            ApiError::new("InvalidNetworkInterfaceId.Malformed", format!("Invalid id: \"{id}\""))
        };
        let id: InterfaceId = id.parse().map_err(malformed)?;
        if !rows.iter().any(|(_, n)| n.id == id) {
            return Err(missing_interface(&id.to_string()));
        }
    }
    let named = |n: &Interface| ids.is_empty() || ids.contains(&n.id.to_string().as_str());
    let admitted = rows
        .into_iter()
        .filter(|(i, n)| named(n) && filters.admit(&n.tags, |name| field(context, i, n, name)));
    let (rows, next) = page.cut(admitted, |(_, n)| n.id.to_string(), ACTION, &secret);
    let nodes = rows.into_iter().map(|(i, n)| interface_node(context, i, n, false));
    Ok(Struct::new().list("networkInterfaceSet", nodes).with_some("nextToken", next))
}

pub fn missing_interface(id: &str) -> ApiError {
    ApiError::new(
        "InvalidNetworkInterfaceID.NotFound",
        format!("The networkInterface ID '{id}' does not exist"),
    )
}

fn field<'a>(
    context: &Context<'a>,
    instance: &'a Instance,
    interface: &'a Interface,
    name: &str,
) -> Vec<Cow<'a, str>> {
    vec![Cow::Owned(match name {
        "addresses.private-ip-address" | "private-ip-address" => interface.address.to_string(),
        "association.public-ip" => match public_address(context.state, instance) {
            Some(address) => address.to_string(),
            None => return Vec::new(),
        },
        "attachment.attachment-id" => interface.attachment.clone(),
        "attachment.device-index" => "0".to_owned(),
        "attachment.instance-id" => instance.id.to_string(),
        "attachment.status" => "attached".to_owned(),
        "availability-zone" => instance.zone.clone(),
        "description" => interface.description.clone(),
        "group-id" => return interface.groups.iter().map(|g| Cow::Owned(g.to_string())).collect(),
        "group-name" => {
            let groups = interface.groups.iter().filter_map(|g| context.state.groups.get(g));
            return groups.map(|g| Cow::Borrowed(g.name.as_str())).collect();
        }
        "interface-type" => "interface".to_owned(),
        "mac-address" => interface.mac.to_string(),
        "network-interface-id" => interface.id.to_string(),
        "owner-id" => OWNER_ID.to_owned(),
        "private-dns-name" => super::instance::private_dns_name(context.settings, interface),
        "source-dest-check" => interface.source_check.to_string(),
        "status" => "in-use".to_owned(),
        "subnet-id" => interface.subnet.to_string(),
        "vpc-id" => interface.vpc.to_string(),
        _ => return Vec::new(),
    })]
}
