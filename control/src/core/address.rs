//! Elastic addresses: one-to-one public addresses that move between instances.

use std::borrow::Cow;
use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use model::{AllocationId, AssociationId, InstanceState};

use super::instance::instance_state;
use super::interface::{find_interface, only_interface};
use super::lookup::{find, find_all, with_tags};
use super::{Answer, Context, Draft, done, tag};
use crate::api::{ApiError, Params, Struct};
use crate::filter::Filters;
use crate::record::{Address, Association, Instance, Interface, Name, OWNER_ID};
use crate::state::State;

/// Addresses that are looked at for a free one: a larger range is used in part.
const RANGE_MAX: usize = 65_536;

/// What of the range may be given: neither the network's own address, nor its
/// broadcast address, nor what the uplink and its gateway have.
fn range<'a>(context: &Context<'a>) -> impl Iterator<Item = Ipv4Addr> + use<'a> {
    let settings = context.settings;
    let gateway = settings.uplink.as_ref().map(|u| u.gateway);
    let net: Option<Ipv4Net> = settings.elastic_range;
    net.into_iter()
        .flat_map(|net| net.hosts())
        .filter(move |a| Some(*a) != gateway && !settings.elastic_reserved.contains(a))
        .take(RANGE_MAX)
}

pub fn addresses_max(context: &Context<'_>) -> usize {
    range(context).count()
}

fn row_name(address: Ipv4Addr) -> String {
    format!("elastic/{address}")
}

pub fn allocate_address(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    if params.text("Domain").is_some_and(|d| d != "vpc") {
        return Err(ApiError::invalid(
            "Invalid value for parameter Domain: only 'vpc' is possible.",
        ));
    }
    let tags = tag::specified_one(params, "elastic-ip")?;
    let taken = |a: &Ipv4Addr| state.names.get(row_name(*a)).is_some();
    let address = match params.text("Address").filter(|t| !t.is_empty()) {
        Some(text) => {
            let wanted: Ipv4Addr = text
                .parse()
                .map_err(|_| ApiError::invalid(format!("Invalid IP address: {text}")))?;
            if !range(context).any(|a| a == wanted) {
                return Err(ApiError::new(
                    "InvalidAddress.NotFound",
                    format!("The address {wanted} is not one that can be allocated."),
                ));
            }
            if taken(&wanted) {
                return Err(ApiError::new(
                    "InvalidAddress.InUse",
                    format!("The address {wanted} is allocated already."),
                ));
            }
            wanted
        }
        None => range(context).find(|a| !taken(a)).ok_or_else(|| {
            ApiError::new(
                "AddressLimitExceeded",
                "The maximum number of addresses has been reached.",
            )
        })?,
    };
    let record = Address {
        allocation: AllocationId::from_random(draft.bits()),
        address,
        association: None,
        tags,
    };
    let row = Name { name: row_name(address), owner: record.allocation.to_string() };
    draft.plan.put(state, &row);
    draft.plan.put(state, &record);
    let region = context.settings.region.clone();
    Ok(Box::new(move |_| {
        Struct::new()
            .with("publicIp", address)
            .with("allocationId", record.allocation)
            .with("domain", "vpc")
            .with("publicIpv4Pool", "hostplane")
            .with("networkBorderGroup", region)
    }))
}

fn by_address<'a>(state: &'a State, text: &str) -> Result<&'a Address, ApiError> {
    let address: Ipv4Addr =
        text.parse().map_err(|_| ApiError::invalid(format!("Invalid IP address: {text}")))?;
    state.addresses.iter().find(|a| a.address == address).ok_or_else(|| {
        ApiError::new("InvalidAddress.NotFound", format!("Address '{text}' not found."))
    })
}

fn named<'a>(state: &'a State, params: &Params) -> Result<&'a Address, ApiError> {
    match (params.text("AllocationId"), params.text("PublicIp")) {
        (Some(_), Some(_)) => Err(ApiError::combination(
            "You may specify public IP or allocation id, but not both in the same call",
        )),
        (Some(id), None) => find(state, id),
        (None, Some(address)) => by_address(state, address),
        (None, None) => Err(ApiError::missing("AllocationId")),
    }
}

/// What an association is asked for: an interface, or an instance that has one only.
fn target<'a>(
    state: &'a State,
    params: &Params,
) -> Result<(&'a Instance, Option<&'a Interface>), ApiError> {
    let given = params.text("NetworkInterfaceId");
    if let (Some(id), None) = (params.text("InstanceId"), given) {
        let instance = find::<Instance>(state, id)?;
        return Ok((instance, only_interface(instance)?));
    }
    let id = given.ok_or_else(|| ApiError::missing("InstanceId"))?;
    let (instance, interface) = find_interface(state, id)?;
    if params.text("InstanceId").is_some_and(|i| i != instance.id.to_string()) {
        return Err(ApiError::combination("The interface is not the instance's."));
    }
    Ok((instance, Some(interface)))
}

pub fn associate_address(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let address = named(state, params)?;
    let (instance, interface) = target(state, params)?;
    let now = instance_state(state, instance);
    let interface = match interface {
        Some(interface)
            if !matches!(now, InstanceState::ShuttingDown | InstanceState::Terminated) =>
        {
            interface
        }
        _ => {
            return Err(ApiError::new(
                "InvalidInstanceID",
                format!(
                    "The instance '{}' is not in a valid state for this operation: it is {now}.",
                    instance.id
                ),
            ));
        }
    };
    let private = match params.text("PrivateIpAddress") {
        None => interface.address,
        Some(text) => interface.addresses().find(|a| a.to_string() == text).ok_or_else(|| {
            ApiError::invalid(format!(
                "The interface {} does not have the private address {text}.",
                interface.id
            ))
        })?,
    };
    let stands = |s: &Association| s.interface == interface.id && s.private == private;
    let mine = |a: &Address| a.association.as_ref().is_some_and(stands);
    // EC2 lets an address move by default, and refuses only when told not to.
    let may_move = params.flag("AllowReassociation").unwrap_or(true);
    if let Some(association) = &address.association {
        if mine(address) {
            let id = association.id;
            return Ok(associated(id));
        }
        if !may_move {
            return Err(ApiError::new(
                "Resource.AlreadyAssociated",
                format!(
                    "resource {} is already associated with associate-id {}",
                    address.allocation, association.id
                ),
            ));
        }
    }
    for mut other in state.addresses.iter().filter(|a| mine(a)).cloned() {
        if !may_move {
            return Err(ApiError::new(
                "Resource.AlreadyAssociated",
                format!("the interface {} already has the address {}", interface.id, other.address),
            ));
        }
        other.association = None;
        draft.plan.put(state, &other);
    }
    let id = AssociationId::from_random(draft.bits());
    let mut address = address.clone();
    address.association =
        Some(Association { id, instance: instance.id, interface: interface.id, private });
    draft.plan.put(state, &address);
    draft.plan.depends::<Instance>(state, instance.id);
    Ok(associated(id))
}

fn associated(id: AssociationId) -> Answer {
    Box::new(move |_| Struct::new().with("associationId", id))
}

pub fn disassociate_address(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let address = match (params.text("AssociationId"), params.text("PublicIp")) {
        (Some(id), _) => {
            let id: AssociationId = id.parse().map_err(|_| {
                ApiError::new(
                    "InvalidAssociationID.NotFound",
                    format!("The association ID '{id}' does not exist"),
                )
            })?;
            let held = |a: &&Address| a.association.as_ref().is_some_and(|s| s.id == id);
            state.addresses.iter().find(held).ok_or_else(|| {
                ApiError::new(
                    "InvalidAssociationID.NotFound",
                    format!("The association ID '{id}' does not exist"),
                )
            })?
        }
        (None, Some(text)) => by_address(state, text)?,
        (None, None) => return Err(ApiError::missing("AssociationId")),
    };
    let mut address = address.clone();
    address.association = None;
    draft.plan.put(state, &address);
    Ok(done())
}

pub fn release_address(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let address = named(state, params)?;
    if address.association.is_some() {
        return Err(ApiError::new(
            "InvalidIPAddress.InUse",
            format!("Address {} is in use.", address.address),
        ));
    }
    draft.plan.delete::<Address>(state, address.allocation);
    draft.plan.delete::<Name>(state, row_name(address.address));
    Ok(done())
}

const FILTERS: &[&str] = &[
    "allocation-id",
    "association-id",
    "domain",
    "instance-id",
    "network-border-group",
    "network-interface-id",
    "network-interface-owner-id",
    "private-ip-address",
    "public-ip",
    "tag-key",
];

pub fn describe_addresses(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    let state = context.state;
    let filters = Filters::read(params)?.known(FILTERS)?;
    let ids = params.texts("AllocationId");
    let texts = params.texts("PublicIp");
    let mut addresses: Vec<&Address> = find_all(state, &ids)?;
    for text in &texts {
        let found = by_address(state, text)?;
        if !addresses.contains(&found) {
            addresses.push(found);
        }
    }
    if ids.is_empty() && texts.is_empty() {
        addresses = state.addresses.iter().collect();
    }
    addresses.sort_by_key(|a| a.address);
    let nodes = addresses
        .into_iter()
        .filter(|a| {
            filters.admit(&a.tags, |name| {
                let of = |tell: &dyn Fn(&Association) -> String| {
                    a.association.as_ref().map(|s| Cow::Owned(tell(s))).into_iter().collect()
                };
                vec![Cow::Owned(match name {
                    "allocation-id" => a.allocation.to_string(),
                    "public-ip" => a.address.to_string(),
                    "domain" => "vpc".to_owned(),
                    "network-border-group" => context.settings.region.clone(),
                    "association-id" => return of(&|s| s.id.to_string()),
                    "instance-id" => return of(&|s| s.instance.to_string()),
                    "network-interface-id" => return of(&|s| s.interface.to_string()),
                    "network-interface-owner-id" => return of(&|_| OWNER_ID.to_owned()),
                    "private-ip-address" => return of(&|s| s.private.to_string()),
                    _ => return Vec::new(),
                })]
            })
        })
        .map(|a| node(context, a));
    Ok(Struct::new().list("addressesSet", nodes))
}

fn node(context: &Context<'_>, address: &Address) -> Struct {
    let mut answer = Struct::new()
        .with("publicIp", address.address)
        .with("allocationId", address.allocation)
        .with("domain", "vpc")
        .with("publicIpv4Pool", "hostplane")
        .with("networkBorderGroup", &context.settings.region);
    if let Some(association) = &address.association {
        answer = answer
            .with("associationId", association.id)
            .with("instanceId", association.instance)
            .with("networkInterfaceId", association.interface)
            .with("networkInterfaceOwnerId", OWNER_ID)
            .with("privateIpAddress", association.private);
    }
    with_tags(answer, &address.tags)
}
