//! Network interfaces: what the API tells of them.

use std::borrow::Cow;
use std::net::Ipv4Addr;

use model::InterfaceId;

use super::attribute::{flag, set_groups};
use super::lookup::tag_set;
use super::{Answer, Context, Draft, done, page_secret};
use crate::api::{ApiError, Params, Struct, timestamp};
use crate::filter::{Filters, Page};
use crate::record::{Address, Association, Instance, Interface, OWNER_ID};
use crate::state::State;

pub fn private_dns_name(settings: &crate::settings::Settings, interface: &Interface) -> String {
    dns_name(settings, interface.address)
}

fn dns_name(settings: &crate::settings::Settings, address: Ipv4Addr) -> String {
    let [a, b, c, d] = address.octets();
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

/// The elastic address that stands for one of an interface's private ones.
pub fn public_address(state: &State, interface: &Interface, private: Ipv4Addr) -> Option<Ipv4Addr> {
    held(state, interface, private).map(|a| a.address)
}

fn held<'a>(state: &'a State, interface: &Interface, private: Ipv4Addr) -> Option<&'a Address> {
    let stands = |s: &Association| s.interface == interface.id && s.private == private;
    state.addresses.iter().find(|a| a.association.as_ref().is_some_and(stands))
}

/// The elastic address of an instance's primary interface, its primary address's.
pub fn instance_public(state: &State, instance: &Instance) -> Option<Ipv4Addr> {
    instance.primary().and_then(|n| public_address(state, n, n.address))
}

/// Who names an instance and means an interface means its only one, as in EC2.
pub fn only_interface(instance: &Instance) -> Result<Option<&Interface>, ApiError> {
    if instance.interfaces.len() > 1 {
        return Err(ApiError::new(
            "InvalidInstanceID",
            format!(
                "There are multiple interfaces attached to instance '{}'. Please specify an interface ID for the operation instead.",
                instance.id
            ),
        ));
    }
    Ok(instance.primary())
}

pub fn find_interface<'a>(
    state: &'a State,
    id: &str,
) -> Result<(&'a Instance, &'a Interface), ApiError> {
    let parsed = parse_id(id)?;
    let all = state.instances.iter().flat_map(|i| i.interfaces.iter().map(move |n| (i, n)));
    all.into_iter().find(|(_, n)| n.id == parsed).ok_or_else(|| missing_interface(id))
}

fn parse_id(id: &str) -> Result<InterfaceId, ApiError> {
    id.parse().map_err(|_| {
        ApiError::new("InvalidNetworkInterfaceId.Malformed", format!("Invalid id: \"{id}\""))
    })
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
    let association = |private: Ipv4Addr| {
        let a = held(state, interface, private)?;
        let mut node = Struct::new()
            .with("publicIp", a.address)
            .with("ipOwnerId", OWNER_ID)
            .with("publicDnsName", "");
        if !within {
            node = node
                .with("allocationId", a.allocation)
                .with_some("associationId", a.association.as_ref().map(|s| s.id));
        }
        Some(node)
    };
    let mut attachment = Struct::new()
        .with("attachmentId", &interface.attachment)
        .with("attachTime", timestamp(interface.attached_ms))
        .with("deleteOnTermination", true)
        .with("deviceIndex", interface.device_index)
        .with("status", "attached");
    if !within {
        attachment = attachment.with("instanceId", instance.id).with("instanceOwnerId", OWNER_ID);
    }
    let private = interface.addresses().map(|address| {
        Struct::new()
            .with("primary", address == interface.address)
            .with("privateDnsName", dns_name(context.settings, address))
            .with("privateIpAddress", address)
            .with_some("association", association(address))
    });
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
        .with_some("association", association(interface.address))
        .list("privateIpAddressesSet", private);
    if !within {
        answer = answer
            .with("availabilityZone", &instance.zone)
            .with("requesterManaged", false)
            .list("tagSet", tag_set(&interface.tags));
    }
    answer
}

const INTERFACE_FILTERS: &[&str] = &[
    "addresses.association.public-ip",
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

/// What an instance with several interfaces is asked by the interface, one attribute a call.
pub fn modify_attribute(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let (instance, found) = find_interface(context.state, params.need("NetworkInterfaceId")?)?;
    let value = |name: &str| params.inner(name).and_then(|p| p.text("Value"));
    let groups = params.texts("SecurityGroupId");
    let (check, description) = (value("SourceDestCheck"), value("Description"));
    let given = [check.is_some(), description.is_some(), !groups.is_empty()];
    match given.into_iter().filter(|g| *g).count() {
        0 => return Err(ApiError::combination("No attributes specified.")),
        1 => {}
        _ => {
            return Err(ApiError::combination(
                "Fields for multiple attribute types specified: one attribute can be changed in a call.",
            ));
        }
    }
    let id = found.id;
    let mut instance = instance.clone();
    for interface in instance.interfaces.iter_mut().filter(|n| n.id == id) {
        if let Some(text) = check {
            interface.source_check = flag(text)?;
        }
        if let Some(text) = description {
            text.clone_into(&mut interface.description);
        }
        if !groups.is_empty() {
            set_groups(context, draft, interface, &groups)?;
        }
    }
    draft.plan.put(context.state, &instance);
    Ok(done())
}

pub fn describe_interfaces(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    const ACTION: &str = "DescribeNetworkInterfaces";
    let state = context.state;
    let ids = params.texts("NetworkInterfaceId");
    let filters = Filters::read(params)?.known(INTERFACE_FILTERS)?;
    let secret = page_secret(state);
    let page = Page::read(params, ACTION, !ids.is_empty(), &secret)?;
    let mut rows: Vec<(&Instance, &Interface)> =
        state.instances.iter().flat_map(|i| i.interfaces.iter().map(move |n| (i, n))).collect();
    rows.sort_by_key(|(_, n)| n.id);
    for id in &ids {
        find_interface(state, id)?;
    }
    let named = |n: &Interface| ids.is_empty() || ids.contains(&n.id.to_string().as_str());
    let admitted = rows
        .into_iter()
        .filter(|(i, n)| named(n) && filters.admit(&n.tags, |name| field(context, i, n, name)));
    let (rows, next) = page.cut(admitted, |(_, n)| n.id.to_string(), ACTION, &secret);
    let nodes = rows.into_iter().map(|(i, n)| interface_node(context, i, n, false));
    Ok(Struct::new().list("networkInterfaceSet", nodes).with_some("nextToken", next))
}

fn missing_interface(id: &str) -> ApiError {
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
    let public = |a| public_address(context.state, interface, a);
    vec![Cow::Owned(match name {
        "addresses.private-ip-address" => {
            return interface.addresses().map(|a| Cow::Owned(a.to_string())).collect();
        }
        "addresses.association.public-ip" | "association.public-ip" => {
            return interface
                .addresses()
                .filter_map(public)
                .map(|a| Cow::Owned(a.to_string()))
                .collect();
        }
        "private-ip-address" => interface.address.to_string(),
        "attachment.attachment-id" => interface.attachment.clone(),
        "attachment.device-index" => interface.device_index.to_string(),
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
