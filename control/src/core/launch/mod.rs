//! RunInstances: from a wish to records, all or none.

mod disks;
mod network;

use std::collections::{BTreeSet, HashSet};
use std::net::Ipv4Addr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use model::{InstanceId, InstanceType, InterfaceId, Mac, ReservationId, VolumeId};
use rpc::host::Run;

use disks::{NewVolume, volumes};
pub use network::{ADDRESSES_AN_INTERFACE_MAX, private_name, used_addresses};
use network::{Network, addresses, networks};

use super::instance::reservation;
use super::lookup::find;
use super::{Answer, Context, Draft, place, tag};
use crate::api::{ApiError, Params};
use crate::record::{
    Attachment, Finalizer, Image, Instance, Interface, KeyPair, MetadataOptions, Name, Subnet,
    Tags, Token, Volume,
};

/// A transaction has at most 128 operations, and an instance needs three
/// records and one a further volume.
const RECORDS_MAX: usize = 120;

/// EC2's bound on the decoded text.
const USER_DATA_BYTES_MAX: usize = 16 * 1024;

/// The users that guests run as, one an instance: a range that neither Debian
/// (policy 9.2.2) nor systemd (UIDS-GIDS.md) hands out.
pub const UID_FIRST: u32 = 640_000;
pub const UID_LAST: u32 = 659_999;

/// Type where a request names none.
const TYPE_DEFAULT: &str = "t3.micro";

pub const GIB: u64 = 1 << 30;
/// What a request asks for, read and checked.
struct Wish<'a> {
    image: &'a Image,
    kind: &'static InstanceType,
    key: Option<&'a KeyPair>,
    networks: Vec<Network<'a>>,
    volumes: Vec<NewVolume>,
    user_data: Option<String>,
    tags: Vec<Tags>,
    count_min: usize,
    count_max: usize,
}

pub fn run_instances(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let token = params.text("ClientToken").filter(|t| !t.is_empty());
    let fingerprint = params.fingerprint(&["ClientToken", "DryRun"]);
    if let Some(token) = token
        && let Some(made) = redeem(context, "RunInstances", token, &fingerprint)?
    {
        return Ok(Box::new(move |context| reservation(context, &made)));
    }
    let wish = read(context, params)?;
    let count = place::room(context, wish.kind.vcpus, wish.kind.memory_mib, wish.count_max);
    if count < wish.count_min {
        return Err(place::no_room(context, wish.kind.name));
    }
    let reservation_id = ReservationId::from_random(draft.bits());
    let addresses = addresses(context, &wish.networks, count)?;
    let mut uids = free_uids(context);
    for (index, addresses) in addresses.into_iter().enumerate() {
        let uid = uids.next().ok_or_else(|| place::no_room(context, wish.kind.name))?;
        let instance =
            instance(context, params, draft, &wish, reservation_id, index as u32, addresses, uid)?;
        draft.plan.put(context.state, &instance);
    }
    draft.plan.depends::<Image>(context.state, wish.image.id);
    for group in wish.networks.iter().flat_map(|n| &n.groups) {
        draft.plan.depends::<crate::record::Group>(context.state, group);
    }
    let made = reservation_id.to_string();
    if let Some(token) = token {
        remember(context, draft, "RunInstances", token, fingerprint, &made);
    }
    Ok(Box::new(move |context| reservation(context, &made)))
}

/// What an earlier call with this token has made.
pub fn redeem(
    context: &Context<'_>,
    action: &str,
    token: &str,
    fingerprint: &str,
) -> Result<Option<String>, ApiError> {
    match context.state.tokens.get(format!("{action}/{token}")) {
        None => Ok(None),
        Some(earlier) if earlier.fingerprint == fingerprint => Ok(Some(earlier.made.clone())),
        Some(_) => Err(ApiError::new(
            "IdempotentParameterMismatch",
            "Arguments on this idempotent request are inconsistent with arguments used in previous request(s).",
        )),
    }
}

pub fn remember(
    context: &Context<'_>,
    draft: &mut Draft,
    action: &str,
    token: &str,
    fingerprint: String,
    made: &str,
) {
    let token = Token {
        token: format!("{action}/{token}"),
        fingerprint,
        made: made.to_owned(),
        created_ms: context.now_ms,
    };
    draft.plan.put(context.state, &token);
}

fn read<'a>(context: &Context<'a>, params: &Params) -> Result<Wish<'a>, ApiError> {
    let state = context.state;
    let (count_min, count_max) = counts(params)?;
    let kind = instance_type(params.text("InstanceType").unwrap_or(TYPE_DEFAULT))?;
    let user_data = user_data(params.text("UserData"))?;
    check_unsupported(params)?;
    let token = params.text("ClientToken").unwrap_or_default();
    if token.chars().count() > 64 {
        return Err(ApiError::invalid("The ClientToken has more than 64 characters."));
    }
    let tags = tag::specified(params, &["instance", "volume", "network-interface"])?;
    let image = find::<Image>(state, params.need("ImageId")?)?;
    let key = match params.text("KeyName").filter(|n| !n.is_empty()) {
        None => None,
        Some(name) => Some(super::key_pair::by_name(state, name)?),
    };
    let networks = networks(context, params, kind)?;
    let volumes = volumes(params, image, kind)?;
    let each = 1 + networks.iter().map(Network::address_count).sum::<usize>() + volumes.len();
    if count_min * each > RECORDS_MAX {
        return Err(ApiError::new(
            "InstanceLimitExceeded",
            format!("At most {} such instances can be launched at once.", RECORDS_MAX / each),
        ));
    }
    let count_max = count_max.min(RECORDS_MAX / each);
    if count_max > 1 && networks.iter().any(|n| n.named().next().is_some()) {
        return Err(ApiError::combination("A private address serves one instance only."));
    }
    Ok(Wish { image, kind, key, networks, volumes, user_data, tags, count_min, count_max })
}

fn counts(params: &Params) -> Result<(usize, usize), ApiError> {
    let count = |name: &str| {
        let number = params.number(name).ok_or_else(|| ApiError::missing(name))?;
        usize::try_from(number).ok().filter(|n| *n > 0).ok_or_else(|| {
            ApiError::invalid(format!(
                "Value ({number}) for parameter {name} is invalid. It must be at least 1."
            ))
        })
    };
    let (min, max) = (count("MinCount")?, count("MaxCount")?);
    if min > max {
        return Err(ApiError::combination("MinCount must not be greater than MaxCount"));
    }
    Ok((min, max))
}

pub fn instance_type(name: &str) -> Result<&'static InstanceType, ApiError> {
    let kind = model::instance_type::find(name).ok_or_else(|| {
        ApiError::new("InvalidInstanceType", format!("The instance type '{name}' does not exist"))
    })?;
    if kind.arm {
        return Err(ApiError::new(
            "Unsupported",
            format!("The instance type {name} is of the architecture arm64, the hosts are x86_64."),
        ));
    }
    Ok(kind)
}

pub fn user_data(text: Option<&str>) -> Result<Option<String>, ApiError> {
    let Some(text) = text.filter(|t| !t.is_empty()) else { return Ok(None) };
    let text: String = text.split_ascii_whitespace().collect();
    let bytes = STANDARD.decode(&text).map_err(|_| {
        ApiError::new("InvalidUserData.Malformed", "Invalid BASE64 encoding of user data.")
    })?;
    if bytes.len() > USER_DATA_BYTES_MAX {
        return Err(ApiError::invalid(format!(
            "User data is limited to {USER_DATA_BYTES_MAX} bytes"
        )));
    }
    Ok(Some(text))
}

/// Parts of structures that are read otherwise: saying yes to what is not done
/// would be a lie.
fn check_unsupported(params: &Params) -> Result<(), ApiError> {
    let refuse =
        |what: &str| Err(ApiError::new("Unsupported", format!("{what} is not supported.")));
    if let Some(placement) = params.inner("Placement") {
        for name in placement.names() {
            let harmless = match name {
                "AvailabilityZone" => true,
                "Tenancy" => placement.text(name) == Some("default"),
                "GroupName" | "Affinity" | "HostId" => placement.text(name) == Some(""),
                _ => false,
            };
            if !harmless {
                return refuse(&format!("Placement.{name}"));
            }
        }
    }
    if params.inner("Monitoring").and_then(|m| m.flag("Enabled")) == Some(true) {
        return refuse("Monitoring.Enabled");
    }
    Ok(())
}

fn metadata_options(params: &Params) -> Result<MetadataOptions, ApiError> {
    let plain = MetadataOptions::default();
    match params.inner("MetadataOptions") {
        Some(given) => super::metadata_options::changed(plain, given),
        None => Ok(plain),
    }
}

fn default_subnet<'a>(context: &Context<'a>, params: &Params) -> Result<&'a Subnet, ApiError> {
    let zone = params.inner("Placement").and_then(|p| p.text("AvailabilityZone"));
    let zone = zone.filter(|z| !z.is_empty()).unwrap_or(&context.settings.zone);
    if zone != context.settings.zone {
        return Err(ApiError::invalid(format!("Invalid availability zone: [{zone}]")));
    }
    context.state.subnets.iter().find(|s| s.zone == zone && s.default).ok_or_else(|| {
        ApiError::new(
            "MissingInput",
            "No subnets found for the default VPC. Please specify a subnet.",
        )
    })
}

fn free_uids(context: &Context<'_>) -> impl Iterator<Item = u32> + use<> {
    let held: HashSet<u32> = context
        .state
        .instances
        .iter()
        .filter(|i| i.terminated_ms.is_none())
        .map(|i| i.uid)
        .collect();
    (UID_FIRST..=UID_LAST).filter(move |uid| !held.contains(uid))
}

#[expect(clippy::too_many_arguments, reason = "one call, all of it is the instance")]
fn instance(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
    wish: &Wish<'_>,
    reservation: ReservationId,
    launch_index: u32,
    addresses: Vec<Vec<Ipv4Addr>>,
    uid: u32,
) -> Result<Instance, ApiError> {
    let state = context.state;
    let [instance_tags, volume_tags, interface_tags] = wish.tags.as_slice() else {
        return Err(ApiError::internal("tag specifications are of three kinds"));
    };
    let id = InstanceId::from_random(draft.bits());
    let mut interfaces = Vec::new();
    for (network, addresses) in wish.networks.iter().zip(addresses) {
        let interface = interface(context, draft, network, &addresses, interface_tags);
        for address in addresses {
            let name = private_name(interface.subnet, address);
            draft.plan.put(state, &Name { name, owner: id.to_string() });
        }
        interfaces.push(interface);
    }
    let mut attachments = Vec::new();
    for new in &wish.volumes {
        let volume = Volume {
            id: VolumeId::from_random(draft.bits()),
            size_gib: new.size_gib,
            zone: context.settings.zone.clone(),
            host: context.settings.host.clone(),
            image_name: new.boot.then(|| wish.image.location.clone()),
            kind: new.kind.clone(),
            iops: new.iops,
            throughput: new.throughput,
            created_ms: context.now_ms,
            generation: 1,
            client_token: None,
            tags: volume_tags.clone(),
            deleted_ms: None,
            modification: None,
        };
        draft.plan.put(state, &volume);
        attachments.push(Attachment {
            volume: volume.id,
            device: new.device.clone(),
            generation: 1,
            boot: new.boot,
            delete_on_termination: new.delete_on_termination,
            attached_ms: context.now_ms,
            detaching: false,
        });
    }
    Ok(Instance {
        id,
        reservation,
        launch_index,
        image: wish.image.id,
        image_name: wish.image.location.clone(),
        instance_type: wish.kind.name.to_owned(),
        key: wish.key.map(|k| k.id),
        key_name: wish.key.map(|k| k.name.clone()),
        host: context.settings.host.clone(),
        zone: context.settings.zone.clone(),
        launched_ms: context.now_ms,
        run: Run::Running,
        starts: 1,
        reboots: 0,
        uid,
        interfaces,
        attachments,
        root_device: wish.image.root_device.clone(),
        user_data: wish.user_data.clone(),
        tags: instance_tags.clone(),
        client_token: params.text("ClientToken").map(str::to_owned),
        metadata_options: metadata_options(params)?,
        disable_api_termination: params.flag("DisableApiTermination").unwrap_or(false),
        disable_api_stop: params.flag("DisableApiStop").unwrap_or(false),
        terminate_on_shutdown: params.text("InstanceInitiatedShutdownBehavior")
            == Some("terminate"),
        transition: String::new(),
        reason: Some(crate::record::Reason {
            code: "pending".to_owned(),
            message: "pending".to_owned(),
        }),
        deleted_ms: None,
        finalizers: BTreeSet::from([Finalizer::Host]),
        terminated_ms: None,
    })
}

fn interface(
    context: &Context<'_>,
    draft: &mut Draft,
    network: &Network<'_>,
    addresses: &[Ipv4Addr],
    tags: &Tags,
) -> Interface {
    Interface {
        id: InterfaceId::from_random(draft.bits()),
        attachment: format!("eni-attach-{:017x}", draft.bits() >> 60),
        device_index: network.device_index,
        mac: Mac::local_from_random(draft.bits() as u64),
        vpc: network.subnet.vpc,
        subnet: network.subnet.id,
        address: addresses[0],
        secondary: addresses[1..].to_vec(),
        groups: network.groups.clone(),
        source_check: true,
        description: network.description.clone(),
        attached_ms: context.now_ms,
        tags: tags.clone(),
    }
}
