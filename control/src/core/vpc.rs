//! The networks, as far as they are shown: the default VPC and its subnets.

use std::borrow::Cow;

use super::launch::used_addresses;
use super::lookup::{find_all, with_tags};
use super::{Context, page_secret};
use crate::api::{ApiError, Params, Struct};
use crate::filter::{Filters, Page};
use crate::record::{OWNER_ID, Subnet, Vpc};

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
