//! ModifyVolume: another size, kind or speed for a volume, in use or not.
//!
//! The wish changes at once; the host makes the file larger, sets the limits, and
//! has a running guest see it. The modification is `modifying` until the host has
//! said that it looked at the wish and that the volume has the size, then
//! `completed`: nothing is moved in the background, so it is never `optimizing`.

use std::borrow::Cow;

use model::VolumeState;

use super::lookup::find;
use super::volume::{kind_of, page_of, provision, volume_state};
use super::{Answer, Context, Draft};
use crate::api::{ApiError, Params, Struct, timestamp};
use crate::record::{Modification, Volume};

pub fn modify_volume(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let volume = find::<Volume>(context.state, params.need("VolumeId")?)?;
    if params.flag("MultiAttachEnabled") == Some(true) {
        return Err(ApiError::new("Unsupported", "MultiAttachEnabled is not supported."));
    }
    let now = volume_state(context.state, volume);
    if !matches!(now, VolumeState::Available | VolumeState::InUse) {
        return Err(ApiError::new(
            "IncorrectState",
            format!("Volume '{}' is not 'available' or 'in-use': it is {now}.", volume.id),
        ));
    }
    if volume.modification.as_ref().is_some_and(|m| m.ended_ms.is_none()) {
        return Err(ApiError::new(
            "IncorrectModificationState",
            format!("Volume '{}' is being modified already.", volume.id),
        ));
    }
    let size_gib = match params.number("Size") {
        None => volume.size_gib,
        Some(size) => u64::try_from(size).unwrap_or(0),
    };
    if size_gib < volume.size_gib {
        return Err(ApiError::invalid("New size cannot be smaller than existing size"));
    }
    let kind = params.text("VolumeType").unwrap_or(&volume.kind);
    let number = |name| params.number(name).map(|n| u64::try_from(n).unwrap_or(0));
    // What was asked for stays as it was, where the kind does and it can be asked for.
    let same = kind == volume.kind;
    let kept = |asked: Option<u64>, present: Option<u64>, settable: bool| {
        asked.or(present.filter(|_| same && settable))
    };
    let parsed = kind_of(kind)?;
    let settable = parsed.settable();
    let iops = kept(number("Iops"), volume.iops, settable.0);
    let throughput = kept(number("Throughput"), volume.throughput, settable.1);
    let (iops, throughput) = provision(parsed, size_gib, iops, throughput)?;
    let mut new = volume.clone();
    new.modification = Some(Modification {
        started_ms: context.now_ms,
        ended_ms: None,
        size_gib: volume.size_gib,
        kind: volume.kind.clone(),
        iops: volume.iops,
        throughput: volume.throughput,
    });
    (new.size_gib, new.kind, new.iops, new.throughput) =
        (size_gib, kind.to_owned(), iops, throughput);
    draft.plan.put(context.state, &new);
    let id = volume.id.to_string();
    Ok(Box::new(move |context| {
        let node = context.state.volumes.get(&id).and_then(describe);
        Struct::new().with("volumeModification", node.unwrap_or_default())
    }))
}

fn state_of(modification: &Modification) -> &'static str {
    if modification.ended_ms.is_some() { "completed" } else { "modifying" }
}

fn describe(volume: &Volume) -> Option<Struct> {
    let before = volume.modification.as_ref()?;
    let node = Struct::new()
        .with("volumeId", volume.id)
        .with("modificationState", state_of(before))
        .with("targetSize", volume.size_gib)
        .with_some("targetIops", volume.iops)
        .with("targetVolumeType", &volume.kind)
        .with_some("targetThroughput", volume.throughput)
        .with("targetMultiAttachEnabled", false)
        .with("originalSize", before.size_gib)
        .with_some("originalIops", before.iops)
        .with("originalVolumeType", &before.kind)
        .with_some("originalThroughput", before.throughput)
        .with("originalMultiAttachEnabled", false)
        .with("progress", if before.ended_ms.is_some() { 100_u64 } else { 0 })
        .with("startTime", timestamp(before.started_ms))
        .with_some("endTime", before.ended_ms.map(timestamp));
    Some(node)
}

const FILTERS: &[&str] = &[
    "modification-state",
    "original-iops",
    "original-size",
    "original-volume-type",
    "start-time",
    "target-iops",
    "target-size",
    "target-volume-type",
    "volume-id",
];

fn field<'a>(volume: &'a Volume, name: &str) -> Vec<Cow<'a, str>> {
    let Some(before) = &volume.modification else { return Vec::new() };
    let number = |n: Option<u64>| n.map(|n| Cow::Owned(n.to_string())).into_iter().collect();
    vec![match name {
        "modification-state" => Cow::Borrowed(state_of(before)),
        "original-iops" => return number(before.iops),
        "original-size" => return number(Some(before.size_gib)),
        "original-volume-type" => Cow::Borrowed(&before.kind),
        "start-time" => Cow::Owned(timestamp(before.started_ms)),
        "target-iops" => return number(volume.iops),
        "target-size" => return number(Some(volume.size_gib)),
        "target-volume-type" => Cow::Borrowed(&volume.kind),
        "volume-id" => Cow::Owned(volume.id.to_string()),
        _ => return Vec::new(),
    }]
}

/// The last modification of each volume that had one.
pub fn describe_modifications(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    let (volumes, next) =
        page_of(context, params, "DescribeVolumesModifications", FILTERS, |filters, v| {
            v.modification.is_some() && filters.admit(&v.tags, |name| field(v, name))
        })?;
    let nodes = volumes.into_iter().filter_map(describe);
    Ok(Struct::new().list("volumeModificationSet", nodes).with_some("nextToken", next))
}
