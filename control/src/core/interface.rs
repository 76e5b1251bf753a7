//! Network interfaces: what the API tells of them.

use std::borrow::Cow;

use model::InterfaceId;

use super::lookup::tag_set;
use super::{Context, page_secret};
use crate::api::{ApiError, Params, Struct, timestamp};
use crate::filter::{Filters, Page};
use crate::record::{Instance, Interface, OWNER_ID};
use crate::state::State;

pub fn private_dns_name(settings: &crate::settings::Settings, interface: &Interface) -> String {
    let [a, b, c, d] = interface.address.octets();
    format!("ip-{a}-{b}-{c}-{d}.{}.compute.internal", settings.region)
}

pub fn group_set(state: &State, interface: &Interface) -> Vec<Struct> {
    interface
        .groups
        .iter()
        .map(|id| {
            let name = state.groups.get(id).map_or("", |g| g.name.as_str());
            Struct::new().with("groupId", *id).with("groupName", name)
        })
        .collect()
}

pub fn public_address(state: &State, instance: &Instance) -> Option<std::net::Ipv4Addr> {
    let held = |a: &&crate::record::Address| {
        a.association.as_ref().is_some_and(|s| s.instance == instance.id)
    };
    state.addresses.iter().find(held).map(|a| a.address)
}

/// `within`: as part of an instance, which says less than the interface's own
/// Describe.
pub fn interface_node(
    context: &Context<'_>,
    instance: &Instance,
    interface: &Interface,
    within: bool,
) -> Struct {
    let state = context.state;
    let dns = private_dns_name(context.settings, interface);
    let association = state.addresses.iter().find_map(|a| {
        let held = a.association.as_ref().filter(|s| s.interface == interface.id)?;
        let mut node = Struct::new()
            .with("publicIp", a.address)
            .with("ipOwnerId", OWNER_ID)
            .with("publicDnsName", "");
        if !within {
            node = node.with("allocationId", a.allocation).with("associationId", held.id);
        }
        Some(node)
    });
    let mut attachment = Struct::new()
        .with("attachmentId", &interface.attachment)
        .with("attachTime", timestamp(interface.attached_ms))
        .with("deleteOnTermination", true)
        .with("deviceIndex", 0u8)
        .with("status", "attached");
    if !within {
        attachment = attachment.with("instanceId", instance.id).with("instanceOwnerId", OWNER_ID);
    }
    let private = Struct::new()
        .with("primary", true)
        .with("privateDnsName", &dns)
        .with("privateIpAddress", interface.address)
        .with_some("association", association.clone());
    let mut answer = Struct::new()
        .with("networkInterfaceId", interface.id)
        .with("subnetId", interface.subnet)
        .with("vpcId", interface.vpc)
        .with("description", &interface.description)
        .with("ownerId", OWNER_ID)
        .with("status", "in-use")
        .with("macAddress", interface.mac)
        .with("privateIpAddress", interface.address)
        .with("privateDnsName", dns)
        .with("sourceDestCheck", interface.source_check)
        .with("interfaceType", "interface")
        .list("groupSet", group_set(state, interface))
        .with("attachment", attachment)
        .with_some("association", association)
        .list("privateIpAddressesSet", [private]);
    if !within {
        answer = answer
            .with("availabilityZone", &instance.zone)
            .with("requesterManaged", false)
            .list("tagSet", tag_set(&interface.tags));
    }
    answer
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
        "private-dns-name" => private_dns_name(context.settings, interface),
        "source-dest-check" => interface.source_check.to_string(),
        "status" => "in-use".to_owned(),
        "subnet-id" => interface.subnet.to_string(),
        "vpc-id" => interface.vpc.to_string(),
        _ => return Vec::new(),
    })]
}
