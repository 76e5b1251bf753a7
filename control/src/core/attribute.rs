//! Single attributes of an instance, read and changed.

use model::InstanceState;

use super::group_rule::groups_named;
use super::instance::{attachment_state, instance_state};
use super::interface::only_interface;
use super::lookup::find;
use super::{Answer, Context, Draft, done, launch};
use crate::api::{ApiError, Node, Params, Struct, timestamp};
use crate::record::{Group, Instance, Interface};

pub fn describe_attribute(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    let instance = find::<Instance>(context.state, params.need("InstanceId")?)?;
    let answer = Struct::new().with("instanceId", instance.id);
    let one = |value: Node| Struct::new().with("value", value);
    let name = params.need("Attribute")?;
    Ok(match name {
        "instanceType" => answer.with("instanceType", one((&instance.instance_type).into())),
        "userData" => answer.with(
            "userData",
            match &instance.user_data {
                Some(data) => one(data.into()),
                None => Struct::new(),
            },
        ),
        "disableApiTermination" => {
            answer.with("disableApiTermination", one(instance.disable_api_termination.into()))
        }
        "disableApiStop" => answer.with("disableApiStop", one(instance.disable_api_stop.into())),
        "instanceInitiatedShutdownBehavior" => {
            let value = if instance.terminate_on_shutdown { "terminate" } else { "stop" };
            answer.with("instanceInitiatedShutdownBehavior", one(value.into()))
        }
        "rootDeviceName" => answer.with("rootDeviceName", one((&instance.root_device).into())),
        "ebsOptimized" => answer.with("ebsOptimized", one(false.into())),
        "enaSupport" => answer.with("enaSupport", one(false.into())),
        "sourceDestCheck" => {
            let check = only_interface(instance)?.is_none_or(|n| n.source_check);
            answer.with("sourceDestCheck", one(check.into()))
        }
        "groupSet" => {
            let ids = only_interface(instance)?.into_iter().flat_map(|n| &n.groups);
            let nodes = ids.map(|id| {
                let name = context.state.groups.get(id).map_or("", |g| g.name.as_str());
                Struct::new().with("groupId", *id).with("groupName", name)
            });
            answer.list("groupSet", nodes)
        }
        "blockDeviceMapping" => {
            let nodes = instance.attachments.iter().map(|a| {
                Struct::new().with("deviceName", &a.device).with(
                    "ebs",
                    Struct::new()
                        .with("volumeId", a.volume)
                        .with("status", attachment_state(context.state, instance, a))
                        .with("attachTime", timestamp(a.attached_ms))
                        .with("deleteOnTermination", a.delete_on_termination),
                )
            });
            answer.list("blockDeviceMapping", nodes)
        }
        "productCodes" => answer.list("productCodes", Vec::<Struct>::new()),
        "kernel" => answer.with("kernel", Struct::new()),
        "ramdisk" => answer.with("ramdisk", Struct::new()),
        "sriovNetSupport" => answer.with("sriovNetSupport", Struct::new()),
        other => {
            return Err(ApiError::new(
                "Unsupported",
                format!("The attribute {other} is not supported."),
            ));
        }
    })
}

/// A value in the form `InstanceType.Value`, or by `Attribute` and `Value`.
fn given<'p>(params: &'p Params, parameter: &str, attribute: &str) -> Option<&'p str> {
    let named = params.text("Attribute") == Some(attribute);
    params
        .inner(parameter)
        .and_then(|p| p.text("Value"))
        .or_else(|| params.text("Value").filter(|_| named))
}

pub fn flag(text: &str) -> Result<bool, ApiError> {
    match text.to_ascii_lowercase().as_str() {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => {
            Err(ApiError::invalid(format!("Value ({text}) is invalid: it must be true or false.")))
        }
    }
}

pub fn modify_attribute(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let before = find::<Instance>(state, params.need("InstanceId")?)?;
    let mut instance = before.clone();
    let mut changes = 0;
    let now = instance_state(state, before);
    let stopped = || match now {
        InstanceState::Stopped => Ok(()),
        _ => Err(ApiError::new(
            "IncorrectInstanceState",
            format!("The instance '{}' is not in the 'stopped' state.", before.id),
        )),
    };
    if let Some(kind) = given(params, "InstanceType", "instanceType") {
        let kind = launch::instance_type(kind)?;
        if kind.volumes_max < instance.attachments.len() as u32 {
            return Err(ApiError::new(
                "AttachmentLimitExceeded",
                format!("{} takes at most {} volumes.", kind.name, kind.volumes_max),
            ));
        }
        stopped()?;
        instance.instance_type = kind.name.to_owned();
        changes += 1;
    }
    if let Some(data) = given(params, "UserData", "userData") {
        let data = launch::user_data(Some(data))?;
        stopped()?;
        instance.user_data = data;
        changes += 1;
    }
    if let Some(text) = given(params, "DisableApiTermination", "disableApiTermination") {
        instance.disable_api_termination = flag(text)?;
        changes += 1;
    }
    if let Some(text) = given(params, "DisableApiStop", "disableApiStop") {
        instance.disable_api_stop = flag(text)?;
        changes += 1;
    }
    if let Some(text) =
        given(params, "InstanceInitiatedShutdownBehavior", "instanceInitiatedShutdownBehavior")
    {
        instance.terminate_on_shutdown = match text {
            "stop" => false,
            "terminate" => true,
            _ => {
                return Err(ApiError::invalid(format!(
                    "Invalid value '{text}' for instanceInitiatedShutdownBehavior."
                )));
            }
        };
        changes += 1;
    }
    if let Some(text) = given(params, "SourceDestCheck", "sourceDestCheck") {
        let check = flag(text)?;
        only_interface(&instance)?;
        for interface in &mut instance.interfaces {
            interface.source_check = check;
        }
        changes += 1;
    }
    changes += modify_groups(context, params, draft, &mut instance)?;
    changes += modify_mappings(params, &mut instance)?;
    if changes == 0 {
        return Err(ApiError::combination("No attributes specified."));
    }
    if changes > 1 {
        return Err(ApiError::combination(
            "Fields for multiple attribute types specified: one attribute can be changed in a call.",
        ));
    }
    if now == InstanceState::Terminated {
        return Err(ApiError::new(
            "IncorrectInstanceState",
            format!("The instance '{}' is terminated.", before.id),
        ));
    }
    draft.plan.put(state, &instance);
    Ok(done())
}

fn modify_groups(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
    instance: &mut Instance,
) -> Result<usize, ApiError> {
    let ids = params.texts("GroupId");
    if ids.is_empty() || only_interface(instance)?.is_none() {
        return Ok(0);
    }
    for interface in &mut instance.interfaces {
        set_groups(context, draft, interface, &ids)?;
    }
    Ok(1)
}

pub fn set_groups(
    context: &Context<'_>,
    draft: &mut Draft,
    interface: &mut Interface,
    ids: &[&str],
) -> Result<(), ApiError> {
    let groups = groups_named(context.state, ids)?;
    let most = context.settings.rule_limits.groups_an_interface as usize;
    if groups.len() > most {
        return Err(ApiError::new(
            "SecurityGroupsPerInterfaceLimitExceeded",
            format!("The maximum number of security groups per interface is {most}."),
        ));
    }
    for group in &groups {
        if group.vpc != interface.vpc {
            return Err(ApiError::invalid(format!(
                "The group {} is of another network.",
                group.id
            )));
        }
        draft.plan.depends::<Group>(context.state, group.id);
    }
    interface.groups = groups.iter().map(|g| g.id).collect();
    Ok(())
}

fn modify_mappings(params: &Params, instance: &mut Instance) -> Result<usize, ApiError> {
    let mut changes = 0;
    for mapping in params.structs("BlockDeviceMapping") {
        let device = mapping.need("DeviceName")?;
        let attachment = instance.attachments.iter_mut().find(|a| a.device == device);
        let attachment = attachment.ok_or_else(|| {
            ApiError::new(
                "InvalidInstanceAttributeValue",
                format!("No device is currently mapped at {device}"),
            )
        })?;
        if let Some(delete) = mapping.inner("Ebs").and_then(|e| e.flag("DeleteOnTermination")) {
            attachment.delete_on_termination = delete;
            changes = 1;
        }
    }
    Ok(changes)
}
