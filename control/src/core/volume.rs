//! Volumes: made, attached, detached, deleted. The state that is shown follows
//! from the wish, from where a volume is attached, and from the host's word.

use std::borrow::Cow;

use model::volume_kind::Unfit;
use model::{InstanceState, VolumeId, VolumeKind, VolumeState};

use super::instance::{attachment_state, instance_state};
use super::launch::{redeem, remember};
use super::lookup::{find, find_all, with_tags};
use super::{Answer, Context, Draft, done, page_secret, tag};
use crate::api::{ApiError, Params, Struct, timestamp};
use crate::filter::{Filters, Page};
use crate::record::{Attachment, Instance, Volume};
use crate::state::State;

pub fn volume_state(state: &State, volume: &Volume) -> VolumeState {
    if volume.deleted_ms.is_some() {
        return VolumeState::Deleting;
    }
    let seen = state.observed_volumes.get(volume.id).map(|v| v.state);
    match (state.holder(volume.id), seen) {
        (_, Some(VolumeState::Error)) => VolumeState::Error,
        (Some(_), _) => VolumeState::InUse,
        (None, Some(VolumeState::Available | VolumeState::InUse)) => VolumeState::Available,
        (None, _) => VolumeState::Creating,
    }
}

pub fn kind_of(name: &str) -> Result<VolumeKind, ApiError> {
    name.parse().map_err(|why| {
        ApiError::new("Unsupported", format!("The volume type is not supported: {why}."))
    })
}

/// What a volume of that kind and size has, with EC2's codes where it cannot be.
pub fn provision(
    kind: VolumeKind,
    size_gib: u64,
    iops: Option<u64>,
    throughput: Option<u64>,
) -> Result<(Option<u64>, Option<u64>), ApiError> {
    kind.provision(size_gib, iops, throughput).map_err(|unfit| match unfit {
        Unfit::Size { gib, min, max } => ApiError::invalid(format!(
            "Volume of {gib}GiB is invalid for volume type '{kind}'; it must be between {min} and {max}."
        )),
        Unfit::NotSettable { .. } => ApiError::combination(format!(
            "The parameter is not supported for {kind} volumes: {unfit}."
        )),
        Unfit::Missing { .. } => ApiError::missing("Iops"),
        Unfit::Range { .. } | Unfit::IopsPerGib { .. } | Unfit::ThroughputPerIops { .. } => {
            ApiError::invalid(format!("For a {kind} volume: {unfit}."))
        }
    })
}

/// Kind, IOPS and throughput of a volume of that size, from parameters that
/// CreateVolume and RunInstances both have.
pub fn read_kind(
    params: Option<&Params>,
    size_gib: u64,
) -> Result<(String, Option<u64>, Option<u64>), ApiError> {
    let kind = kind_of(params.and_then(|p| p.text("VolumeType")).unwrap_or("gp3"))?;
    let number =
        |name: &str| params.and_then(|p| p.number(name)).map(|n| u64::try_from(n).unwrap_or(0));
    let (iops, throughput) = provision(kind, size_gib, number("Iops"), number("Throughput"))?;
    Ok((kind.name().to_owned(), iops, throughput))
}

pub fn create_volume(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let zone = match (params.text("AvailabilityZone"), params.text("AvailabilityZoneId")) {
        (Some(zone), _) => zone,
        (None, Some(id)) if id == format!("{}-az1", context.settings.region) => {
            &context.settings.zone
        }
        (None, Some(id)) => id,
        (None, None) => return Err(ApiError::missing("AvailabilityZone")),
    };
    if zone != context.settings.zone {
        return Err(ApiError::new(
            "InvalidZone.NotFound",
            format!("The zone '{zone}' does not exist."),
        ));
    }
    if params.flag("Encrypted") == Some(true) || params.flag("MultiAttachEnabled") == Some(true) {
        return Err(ApiError::new(
            "Unsupported",
            "Encrypted and MultiAttachEnabled are not supported.",
        ));
    }
    let size = params.number("Size").ok_or_else(|| ApiError::missing("Size"))?;
    let size_gib = u64::try_from(size).unwrap_or(0);
    let (kind, iops, throughput) = read_kind(Some(params), size_gib)?;
    let tags = tag::specified_one(params, "volume")?;
    let token = params.text("ClientToken").filter(|t| !t.is_empty());
    let fingerprint = params.fingerprint(&["ClientToken", "DryRun"]);
    if let Some(token) = token
        && let Some(made) = redeem(context, "CreateVolume", token, &fingerprint)?
    {
        return Ok(created(made));
    }
    let volume = Volume {
        id: VolumeId::from_random(draft.bits()),
        size_gib,
        zone: context.settings.zone.clone(),
        host: context.settings.host.clone(),
        image_name: None,
        kind,
        iops,
        throughput,
        created_ms: context.now_ms,
        generation: 0,
        client_token: token.map(str::to_owned),
        tags,
        deleted_ms: None,
        modification: None,
    };
    draft.plan.put(context.state, &volume);
    let made = volume.id.to_string();
    if let Some(token) = token {
        remember(context, draft, "CreateVolume", token, fingerprint, &made);
    }
    Ok(created(made))
}

fn created(id: String) -> Answer {
    Box::new(move |context| match context.state.volumes.get(&id) {
        Some(volume) => {
            let mut node = describe_one(context.state, volume);
            node.0.retain(|(name, _)| *name != "attachmentSet");
            node
        }
        None => Struct::new().with("volumeId", id),
    })
}

fn describe_one(state: &State, volume: &Volume) -> Struct {
    let attachments = state.holder(volume.id).into_iter().flat_map(|instance| {
        let of = instance.attachments.iter().filter(|a| a.volume == volume.id);
        of.map(|a| attachment_node(state, instance, a)).collect::<Vec<_>>()
    });
    let answer = Struct::new()
        .with("volumeId", volume.id)
        .with("size", volume.size_gib)
        .with("snapshotId", "")
        .with("availabilityZone", &volume.zone)
        .with("status", volume_state(state, volume))
        .with("createTime", timestamp(volume.created_ms))
        .list("attachmentSet", attachments)
        .with("volumeType", &volume.kind)
        .with_some("iops", volume.iops)
        .with_some("throughput", volume.throughput)
        .with("encrypted", false)
        .with("multiAttachEnabled", false);
    with_tags(answer, &volume.tags)
}

fn attachment_node(state: &State, instance: &Instance, attachment: &Attachment) -> Struct {
    Struct::new()
        .with("volumeId", attachment.volume)
        .with("instanceId", instance.id)
        .with("device", &attachment.device)
        .with("status", attachment_state(state, instance, attachment))
        .with("attachTime", timestamp(attachment.attached_ms))
        .with("deleteOnTermination", attachment.delete_on_termination)
}

const FILTERS: &[&str] = &[
    "attachment.attach-time",
    "attachment.delete-on-termination",
    "attachment.device",
    "attachment.instance-id",
    "attachment.status",
    "availability-zone",
    "create-time",
    "encrypted",
    "multi-attach-enabled",
    "size",
    "snapshot-id",
    "status",
    "tag-key",
    "volume-id",
    "volume-type",
];

fn field<'a>(state: &State, volume: &'a Volume, name: &str) -> Vec<Cow<'a, str>> {
    let of_attachment = |tell: &dyn Fn(&Instance, &Attachment) -> String| {
        state
            .holder(volume.id)
            .and_then(|i| {
                let found = i.attachments.iter().find(|a| a.volume == volume.id)?;
                Some(Cow::Owned(tell(i, found)))
            })
            .into_iter()
            .collect()
    };
    vec![Cow::Owned(match name {
        "attachment.attach-time" => return of_attachment(&|_, a| timestamp(a.attached_ms)),
        "attachment.delete-on-termination" => {
            return of_attachment(&|_, a| a.delete_on_termination.to_string());
        }
        "attachment.device" => return of_attachment(&|_, a| a.device.clone()),
        "attachment.instance-id" => return of_attachment(&|i, _| i.id.to_string()),
        "attachment.status" => {
            return of_attachment(&|i, a| attachment_state(state, i, a).to_string());
        }
        "availability-zone" => volume.zone.clone(),
        "create-time" => timestamp(volume.created_ms),
        "encrypted" | "multi-attach-enabled" => "false".to_owned(),
        "size" => volume.size_gib.to_string(),
        "status" => volume_state(state, volume).to_string(),
        "volume-id" => volume.id.to_string(),
        "volume-type" => volume.kind.clone(),
        _ => return Vec::new(),
    })]
}

fn selected<'a>(
    context: &Context<'a>,
    params: &Params,
    action: &str,
) -> Result<(Vec<&'a Volume>, Option<String>), ApiError> {
    page_of(context, params, action, FILTERS, |filters, v| {
        filters.admit(&v.tags, |name| field(context.state, v, name))
    })
}

/// The volumes that a describing action named or filtered, a page of them.
pub(super) fn page_of<'a>(
    context: &Context<'a>,
    params: &Params,
    action: &str,
    known: &[&str],
    admits: impl Fn(&Filters, &Volume) -> bool,
) -> Result<(Vec<&'a Volume>, Option<String>), ApiError> {
    let ids = params.texts("VolumeId");
    let filters = Filters::read(params)?.known(known)?;
    let secret = page_secret(context.state);
    let page = Page::read(params, action, !ids.is_empty(), &secret)?;
    let mut volumes: Vec<&Volume> = if ids.is_empty() {
        context.state.volumes.iter().collect()
    } else {
        find_all(context.state, &ids)?
    };
    volumes.sort_by_key(|v| v.id);
    let admitted = volumes.into_iter().filter(|v| admits(&filters, v));
    Ok(page.cut(admitted, |v| v.id.to_string(), action, &secret))
}

pub fn describe_volumes(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    let (volumes, next) = selected(context, params, "DescribeVolumes")?;
    let nodes = volumes.into_iter().map(|v| describe_one(context.state, v));
    Ok(Struct::new().list("volumeSet", nodes).with_some("nextToken", next))
}

pub fn describe_volume_status(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    let (volumes, next) = selected(context, params, "DescribeVolumeStatus")?;
    let nodes = volumes.into_iter().map(|volume| {
        let status = match volume_state(context.state, volume) {
            VolumeState::Error => "impaired",
            VolumeState::Creating => "insufficient-data",
            _ => "ok",
        };
        let detail = if status == "ok" { "passed" } else { status };
        let enabled = Struct::new().with("name", "io-enabled").with("status", detail);
        Struct::new()
            .with("volumeId", volume.id)
            .with("availabilityZone", &volume.zone)
            .with("volumeStatus", Struct::new().with("status", status).list("details", [enabled]))
            .list("actionsSet", Vec::<Struct>::new())
            .list("eventsSet", Vec::<Struct>::new())
    });
    Ok(Struct::new().list("volumeStatusSet", nodes).with_some("nextToken", next))
}

fn in_use(volume: &Volume, instance: &Instance) -> ApiError {
    ApiError::new(
        "VolumeInUse",
        format!("{} is already attached to an instance ({})", volume.id, instance.id),
    )
}

pub fn delete_volume(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let volume = find::<Volume>(state, params.need("VolumeId")?)?;
    if let Some(instance) = state.holder(volume.id) {
        return Err(ApiError::new(
            "VolumeInUse",
            format!("Volume {} is currently attached to {}", volume.id, instance.id),
        ));
    }
    if volume.deleted_ms.is_some() {
        return Ok(done());
    }
    let mut volume = volume.clone();
    volume.deleted_ms = Some(context.now_ms);
    draft.plan.put(state, &volume);
    Ok(done())
}

/// `/dev/sdf`, `/dev/xvdba`, `/dev/vdb`: EC2's names and virtio's.
pub fn check_device(device: &str) -> Result<(), ApiError> {
    let name = device.strip_prefix("/dev/").unwrap_or(device);
    let letters = ["sd", "xvd", "vd"].iter().find_map(|p| name.strip_prefix(p));
    let lawful = letters.is_some_and(|rest| {
        let end = rest.trim_end_matches(|c: char| c.is_ascii_digit());
        (1..=2).contains(&end.len())
            && end.bytes().all(|b| b.is_ascii_lowercase())
            && rest.len() <= 4
    });
    if lawful {
        Ok(())
    } else {
        Err(ApiError::invalid(format!(
            "Value ({device}) for parameter device is invalid. {device} is not a valid EBS device name."
        )))
    }
}

pub fn attach_volume(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let device = params.need("Device")?;
    check_device(device)?;
    let (volume_text, instance_text) = (params.need("VolumeId")?, params.need("InstanceId")?);
    super::lookup::parse::<Volume>(volume_text)?;
    super::lookup::parse::<Instance>(instance_text)?;
    let volume = find::<Volume>(state, volume_text)?;
    let instance = find::<Instance>(state, instance_text)?;
    let now = instance_state(state, instance);
    if !matches!(now, InstanceState::Running | InstanceState::Stopped) {
        return Err(ApiError::new(
            "IncorrectState",
            format!("Instance '{}' is not 'running' or 'stopped': it is {now}.", instance.id),
        ));
    }
    if let Some(holder) = state.holder(volume.id) {
        return Err(in_use(volume, holder));
    }
    let ready = volume_state(state, volume);
    if ready != VolumeState::Available {
        return Err(ApiError::new(
            "IncorrectState",
            format!("Volume '{}' is not 'available': it is {ready}.", volume.id),
        ));
    }
    if volume.zone != instance.zone {
        return Err(ApiError::new(
            "InvalidVolume.ZoneMismatch",
            format!(
                "The volume '{}' is not in the same availability zone as instance '{}'",
                volume.id, instance.id
            ),
        ));
    }
    if instance.attachments.iter().any(|a| a.device == device) {
        return Err(ApiError::invalid(format!(
            "Invalid value '{device}' for unixDevice. Attachment point {device} is already in use"
        )));
    }
    let max = model::instance_type::find(&instance.instance_type).map_or(1, |t| t.volumes_max);
    if instance.attachments.len() >= max as usize {
        return Err(ApiError::new(
            "AttachmentLimitExceeded",
            format!("{} takes at most {max} volumes.", instance.instance_type),
        ));
    }
    let (mut volume, mut instance) = (volume.clone(), instance.clone());
    volume.generation += 1;
    instance.attachments.push(Attachment {
        volume: volume.id,
        device: device.to_owned(),
        generation: volume.generation,
        boot: false,
        delete_on_termination: false,
        attached_ms: context.now_ms,
        detaching: false,
    });
    draft.plan.put(state, &volume);
    draft.plan.put(state, &instance);
    Ok(attachment_answer(volume.id))
}

fn attachment_answer(volume: VolumeId) -> Answer {
    Box::new(move |context| {
        let state = context.state;
        let found = state
            .holder(volume)
            .and_then(|i| Some((i, i.attachments.iter().find(|a| a.volume == volume)?)));
        match found {
            Some((instance, attachment)) => attachment_node(state, instance, attachment),
            None => Struct::new().with("volumeId", volume).with("status", "detached"),
        }
    })
}

pub fn detach_volume(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let volume_text = params.need("VolumeId")?;
    super::lookup::parse::<Volume>(volume_text)?;
    let instance_text = params.text("InstanceId").filter(|t| !t.is_empty());
    if let Some(text) = instance_text {
        super::lookup::parse::<Instance>(text)?;
    }
    let volume = find::<Volume>(state, volume_text)?;
    let named = instance_text.map(|t| find::<Instance>(state, t)).transpose()?;
    let holder = state.holder(volume.id).ok_or_else(|| {
        ApiError::new(
            "IncorrectState",
            format!("Volume '{}' is in the 'available' state.", volume.id),
        )
    })?;
    if named.is_some_and(|n| n.id != holder.id) {
        return Err(ApiError::new(
            "InvalidAttachment.NotFound",
            format!("Volume '{}' is not attached to that instance.", volume.id),
        ));
    }
    let mut instance = holder.clone();
    let stopped = instance_state(state, holder) == InstanceState::Stopped;
    for attachment in instance.attachments.iter_mut().filter(|a| a.volume == volume.id) {
        if params.text("Device").is_some_and(|d| d != attachment.device) {
            return Err(ApiError::new(
                "InvalidAttachment.NotFound",
                format!("Volume '{}' is attached as {}.", volume.id, attachment.device),
            ));
        }
        if attachment.boot && !stopped {
            return Err(ApiError::new(
                "OperationNotPermitted",
                format!(
                    "Unable to detach root volume '{}' from instance '{}'",
                    volume.id, instance.id
                ),
            ));
        }
        if attachment.boot {
            return Err(ApiError::new("Unsupported", "A root volume stays with its instance."));
        }
        if attachment.detaching {
            return Err(ApiError::new(
                "IncorrectState",
                format!("Volume '{}' is in the 'detaching' state.", volume.id),
            ));
        }
        attachment.detaching = true;
    }
    draft.plan.put(state, &instance);
    Ok(attachment_answer(volume.id))
}
