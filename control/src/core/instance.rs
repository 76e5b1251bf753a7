//! Instances: what state the API shows, what it tells of one, and the deeds that
//! change what a user wants of it.
//!
//! The state that is shown follows from the wish and from what the host last
//! said; which of the host's reports are believed is `observe`'s affair:
//!
//! ```text
//!   wish \ host says   nothing, or an     pending    running    stopping   stopped      terminated
//!                      older start
//!   running            pending            pending    running    stopping   stopped (1)  terminated
//!   stopped            stopping           stopping   stopping   stopping   stopped      terminated
//!   terminated         shutting-down …                                                  terminated
//! ```
//! (1) The guest powered itself off. `observe` turns the wish to stopped then.
//! A start raises the number of starts, so that an old report of `stopped`
//! never shows through: no stopping→pending→stopped flaps.

use std::borrow::Cow;

use model::{AttachmentState, InstanceState};
use rpc::host::Run;

use super::interface::{group_set, instance_public, interface_node, private_dns_name};
use super::lookup::{find_all, need_ids, parse, with_tags};
use super::{Answer, Context, Draft, done, page_secret, place};
use crate::api::{ApiError, Params, Struct, timestamp};
use crate::filter::{Filters, Page};
use crate::record::{Attachment, Instance, Interface, OWNER_ID, Reason};
use crate::state::State;

pub fn instance_state(state: &State, instance: &Instance) -> InstanceState {
    use InstanceState::{Pending, ShuttingDown, Stopped, Stopping, Terminated};
    if instance.terminated_ms.is_some() {
        return Terminated;
    }
    let seen = state.observed_instances.get(instance.id);
    let current = seen.filter(|s| s.starts >= instance.starts).map(|s| s.state);
    match (instance.run, current) {
        (Run::Terminated, _) => ShuttingDown,
        (Run::Stopped, Some(Stopped)) => Stopped,
        (Run::Stopped, _) => Stopping,
        (Run::Running, None) => Pending,
        (Run::Running, Some(ShuttingDown | Terminated)) => ShuttingDown,
        (Run::Running, Some(state)) => state,
    }
}

pub fn attachment_state(
    state: &State,
    instance: &Instance,
    attachment: &Attachment,
) -> AttachmentState {
    if attachment.detaching {
        return AttachmentState::Detaching;
    }
    let seen = state.observed_instances.get(instance.id);
    match seen.and_then(|s| s.attachments.get(&attachment.volume)) {
        Some(AttachmentState::Attached) => AttachmentState::Attached,
        // Without a guest there is nothing to wait for.
        _ if instance_state(state, instance) == InstanceState::Stopped => AttachmentState::Attached,
        _ => AttachmentState::Attaching,
    }
}

fn state_node(state: InstanceState) -> Struct {
    Struct::new().with("code", state.code()).with("name", state)
}

pub fn describe_one(context: &Context<'_>, instance: &Instance) -> Struct {
    let state = context.state;
    let now = instance_state(state, instance);
    let public = instance_public(state, instance);
    let mut answer = Struct::new()
        .with("instanceId", instance.id)
        .with("imageId", instance.image)
        .with("instanceState", state_node(now))
        .with("instanceType", &instance.instance_type)
        .with("launchTime", timestamp(instance.launched_ms))
        .with("amiLaunchIndex", instance.launch_index)
        .with("architecture", "x86_64")
        .with("hypervisor", "kvm")
        .with("virtualizationType", "hvm")
        .with("rootDeviceName", &instance.root_device)
        .with("rootDeviceType", "ebs")
        .with("ebsOptimized", false)
        .with("enaSupport", false)
        .with("currentInstanceBootMode", "legacy-bios")
        .with("reason", &instance.transition)
        .with("monitoring", Struct::new().with("state", "disabled"))
        .with("metadataOptions", super::metadata_options::shown(instance.metadata_options))
        .with(
            "placement",
            Struct::new().with("availabilityZone", &instance.zone).with("tenancy", "default"),
        )
        .with_some("keyName", instance.key_name.as_ref())
        .with_some("clientToken", instance.client_token.as_ref());
    if let Some(reason) = reason(now, instance) {
        answer = answer.with(
            "stateReason",
            Struct::new().with("code", &reason.code).with("message", &reason.message),
        );
    }
    if let Some(kind) = model::instance_type::find(&instance.instance_type) {
        answer = answer.with(
            "cpuOptions",
            Struct::new().with("coreCount", kind.vcpus).with("threadsPerCore", 1u8),
        );
    }
    let mappings = instance.attachments.iter().map(|a| mapping(state, instance, a));
    answer = answer.list("blockDeviceMapping", mappings);
    if let Some(interface) = instance.primary().filter(|_| now != InstanceState::Terminated) {
        answer = answer
            .with("privateDnsName", private_dns_name(context.settings, interface))
            .with("privateIpAddress", interface.address)
            .with("subnetId", interface.subnet)
            .with("vpcId", interface.vpc)
            .with("sourceDestCheck", interface.source_check)
            .list("groupSet", group_set(state, interface))
            .list(
                "networkInterfaceSet",
                instance.interfaces.iter().map(|n| interface_node(context, instance, n, true)),
            );
    }
    answer = answer.with("dnsName", "").with_some("ipAddress", public);
    with_tags(answer, &instance.tags)
}

/// The reason for a state that the user did not ask for passes as time does.
fn reason(now: InstanceState, instance: &Instance) -> Option<Reason> {
    let reason = instance.reason.as_ref()?;
    let fits = match reason.code.as_str() {
        "pending" => now == InstanceState::Pending,
        _ => !matches!(now, InstanceState::Pending | InstanceState::Running),
    };
    fits.then(|| reason.clone())
}

fn mapping(state: &State, instance: &Instance, attachment: &Attachment) -> Struct {
    Struct::new().with("deviceName", &attachment.device).with(
        "ebs",
        Struct::new()
            .with("volumeId", attachment.volume)
            .with("status", attachment_state(state, instance, attachment))
            .with("attachTime", timestamp(attachment.attached_ms))
            .with("deleteOnTermination", attachment.delete_on_termination),
    )
}

/// The answer of RunInstances.
pub fn reservation(context: &Context<'_>, id: &str) -> Struct {
    let mut instances: Vec<&Instance> =
        context.state.instances.iter().filter(|i| i.reservation.to_string() == id).collect();
    instances.sort_by_key(|i| i.launch_index);
    reservation_node(id, instances.iter().map(|i| describe_one(context, i)).collect())
}

fn reservation_node(id: &str, instances: Vec<Struct>) -> Struct {
    Struct::new()
        .with("reservationId", id)
        .with("ownerId", OWNER_ID)
        .list("groupSet", Vec::<Struct>::new())
        .list("instancesSet", instances)
}

const FILTERS: &[&str] = &[
    "affinity",
    "architecture",
    "availability-zone",
    "block-device-mapping.delete-on-termination",
    "block-device-mapping.device-name",
    "block-device-mapping.status",
    "block-device-mapping.volume-id",
    "client-token",
    "dns-name",
    "hypervisor",
    "image-id",
    "instance-id",
    "instance-state-code",
    "instance-state-name",
    "instance-type",
    "instance.group-id",
    "instance.group-name",
    "ip-address",
    "key-name",
    "launch-index",
    "launch-time",
    "network-interface.network-interface-id",
    "network-interface.subnet-id",
    "network-interface.vpc-id",
    "network-interface.group-id",
    "network-interface.mac-address",
    "network-interface.addresses.private-ip-address",
    "network-interface.private-ip-address",
    "owner-id",
    "private-dns-name",
    "private-ip-address",
    "reservation-id",
    "root-device-name",
    "root-device-type",
    "source-dest-check",
    "state-reason-code",
    "subnet-id",
    "tag-key",
    "tenancy",
    "virtualization-type",
    "vpc-id",
];

fn field<'a>(context: &Context<'a>, instance: &'a Instance, name: &str) -> Vec<Cow<'a, str>> {
    let state = context.state;
    let one = |text: String| vec![Cow::Owned(text)];
    let primary = instance.primary();
    let of_primary = |tell: &dyn Fn(&Interface) -> String| {
        primary.map(|n| Cow::Owned(tell(n))).into_iter().collect()
    };
    let of_interface = |tell: &dyn Fn(&Interface) -> String| {
        instance.interfaces.iter().map(|n| Cow::Owned(tell(n))).collect()
    };
    let of_mapping = |tell: &dyn Fn(&Attachment) -> String| {
        instance.attachments.iter().map(|a| Cow::Owned(tell(a))).collect()
    };
    match name {
        "architecture" => one("x86_64".to_owned()),
        "hypervisor" => one("kvm".to_owned()),
        "virtualization-type" => one("hvm".to_owned()),
        "tenancy" => one("default".to_owned()),
        "root-device-type" => one("ebs".to_owned()),
        "owner-id" => one(OWNER_ID.to_owned()),
        "availability-zone" => one(instance.zone.clone()),
        "block-device-mapping.device-name" => of_mapping(&|a| a.device.clone()),
        "block-device-mapping.volume-id" => of_mapping(&|a| a.volume.to_string()),
        "block-device-mapping.delete-on-termination" => {
            of_mapping(&|a| a.delete_on_termination.to_string())
        }
        "block-device-mapping.status" => {
            of_mapping(&|a| attachment_state(state, instance, a).to_string())
        }
        "client-token" => instance.client_token.iter().map(|t| Cow::Borrowed(t.as_str())).collect(),
        "image-id" => one(instance.image.to_string()),
        "instance-id" => one(instance.id.to_string()),
        "instance-state-code" => one(instance_state(state, instance).code().to_string()),
        "instance-state-name" => one(instance_state(state, instance).to_string()),
        "instance-type" => one(instance.instance_type.clone()),
        "network-interface.group-id" => instance
            .interfaces
            .iter()
            .flat_map(|n| n.groups.iter())
            .map(|g| Cow::Owned(g.to_string()))
            .collect(),
        "instance.group-id" => primary
            .iter()
            .flat_map(|n| n.groups.iter())
            .map(|g| Cow::Owned(g.to_string()))
            .collect(),
        "instance.group-name" => primary
            .iter()
            .flat_map(|n| n.groups.iter())
            .filter_map(|g| state.groups.get(g))
            .map(|g| Cow::Borrowed(g.name.as_str()))
            .collect(),
        "ip-address" => instance_public(state, instance)
            .map(|a| Cow::Owned(a.to_string()))
            .into_iter()
            .collect(),
        "key-name" => instance.key_name.iter().map(|t| Cow::Borrowed(t.as_str())).collect(),
        "launch-index" => one(instance.launch_index.to_string()),
        "launch-time" => one(timestamp(instance.launched_ms)),
        "network-interface.network-interface-id" => of_interface(&|n| n.id.to_string()),
        "network-interface.mac-address" => of_interface(&|n| n.mac.to_string()),
        "subnet-id" => of_primary(&|n| n.subnet.to_string()),
        "network-interface.subnet-id" => of_interface(&|n| n.subnet.to_string()),
        "vpc-id" => of_primary(&|n| n.vpc.to_string()),
        "network-interface.vpc-id" => of_interface(&|n| n.vpc.to_string()),
        "private-ip-address" => of_primary(&|n| n.address.to_string()),
        "network-interface.private-ip-address" => of_interface(&|n| n.address.to_string()),
        "network-interface.addresses.private-ip-address" => {
            let all = instance.interfaces.iter().flat_map(Interface::addresses);
            all.map(|a| Cow::Owned(a.to_string())).collect()
        }
        "private-dns-name" => of_primary(&|n| private_dns_name(context.settings, n)),
        "source-dest-check" => of_primary(&|n| n.source_check.to_string()),
        "reservation-id" => one(instance.reservation.to_string()),
        "root-device-name" => one(instance.root_device.clone()),
        "state-reason-code" => reason(instance_state(state, instance), instance)
            .map(|r| Cow::Owned(r.code))
            .into_iter()
            .collect(),
        _ => Vec::new(),
    }
}

/// The instances that a call means: by id, by filter, a page of them.
fn selected<'a>(
    context: &Context<'a>,
    params: &Params,
    action: &str,
    admit: impl Fn(&Instance) -> bool,
) -> Result<(Vec<&'a Instance>, Option<String>), ApiError> {
    let ids = params.texts("InstanceId");
    let known: Vec<&str> = FILTERS.iter().copied().chain(STATUS_FILTERS.iter().copied()).collect();
    let filters = Filters::read(params)?.known(&known)?;
    let secret = page_secret(context.state);
    let page = Page::read(params, action, !ids.is_empty(), &secret)?;
    let mut found: Vec<&Instance> = if ids.is_empty() {
        context.state.instances.iter().collect()
    } else {
        find_all(context.state, &ids)?
    };
    found.sort_by_key(|i| i.id);
    let admitted = found.into_iter().filter(|i| {
        admit(i)
            && filters.admit(&i.tags, |name| match name {
                "system-status.status" | "instance-status.status" => {
                    vec![Cow::Borrowed(health(context.state, i))]
                }
                name => field(context, i, name),
            })
    });
    Ok(page.cut(admitted, |i| i.id.to_string(), action, &secret))
}

pub fn describe_instances(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    let (instances, next) = selected(context, params, "DescribeInstances", |_| true)?;
    let mut reservations: Vec<(String, Vec<Struct>)> = Vec::new();
    for instance in instances {
        let id = instance.reservation.to_string();
        let node = describe_one(context, instance);
        match reservations.iter_mut().find(|(r, _)| *r == id) {
            Some((_, nodes)) => nodes.push(node),
            None => reservations.push((id, vec![node])),
        }
    }
    let nodes = reservations.into_iter().map(|(id, nodes)| reservation_node(&id, nodes));
    Ok(Struct::new().list("reservationSet", nodes).with_some("nextToken", next))
}

const STATUS_FILTERS: &[&str] = &["system-status.status", "instance-status.status"];

fn health(state: &State, instance: &Instance) -> &'static str {
    match instance_state(state, instance) {
        InstanceState::Running => "ok",
        InstanceState::Pending => "initializing",
        _ => "not-applicable",
    }
}

pub fn describe_instance_status(
    context: &Context<'_>,
    params: &Params,
) -> Result<Struct, ApiError> {
    let all = params.flag("IncludeAllInstances") == Some(true);
    let shown = |i: &Instance| all || instance_state(context.state, i) == InstanceState::Running;
    let (instances, next) = selected(context, params, "DescribeInstanceStatus", shown)?;
    let nodes = instances.into_iter().map(|instance| {
        let health = health(context.state, instance);
        let detail = match health {
            "ok" => "passed",
            other => other,
        };
        let status = |details: bool| {
            let node = Struct::new().with("status", health);
            if details && health != "not-applicable" {
                let reached = Struct::new().with("name", "reachability").with("status", detail);
                node.list("details", [reached])
            } else {
                node
            }
        };
        Struct::new()
            .with("instanceId", instance.id)
            .with("availabilityZone", &instance.zone)
            .with("instanceState", state_node(instance_state(context.state, instance)))
            .with("systemStatus", status(true))
            .with("instanceStatus", status(true))
    });
    Ok(Struct::new().list("instanceStatusSet", nodes).with_some("nextToken", next))
}

/// What Start, Stop and Terminate answer: each instance's state before and now.
fn changes(before: Vec<(model::InstanceId, InstanceState)>) -> Answer {
    Box::new(move |context| {
        let nodes = before.into_iter().map(|(id, previous)| {
            let now = context.state.instances.get(id);
            let now = now.map_or(previous, |i| instance_state(context.state, i));
            Struct::new()
                .with("instanceId", id)
                .with("currentState", state_node(now))
                .with("previousState", state_node(previous))
        });
        Struct::new().list("instancesSet", nodes)
    })
}

fn wrong_state(instance: &Instance, now: InstanceState, deed: &str) -> ApiError {
    ApiError::new(
        "IncorrectInstanceState",
        format!(
            "The instance '{}' is not in a state from which it can be {deed}: it is {now}.",
            instance.id
        ),
    )
}

fn initiated(now_ms: u64) -> String {
    let time = timestamp(now_ms);
    let (date, clock) = (&time[..10], &time[11..19]);
    format!("User initiated ({date} {clock} GMT)")
}

pub fn start_instances(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let mut before = Vec::new();
    let mut starting: Vec<(u32, u64, usize)> = Vec::new();
    for instance in find_all::<Instance>(state, &need_ids(params, "InstanceId")?)? {
        let now = instance_state(state, instance);
        before.push((instance.id, now));
        match now {
            InstanceState::Running | InstanceState::Pending => continue,
            InstanceState::Stopped => {}
            _ => return Err(wrong_state(instance, now, "started")),
        }
        let kind = super::launch::instance_type(&instance.instance_type)?;
        match starting.iter_mut().find(|(v, m, _)| (*v, *m) == (kind.vcpus, kind.memory_mib)) {
            Some((_, _, count)) => *count += 1,
            None => starting.push((kind.vcpus, kind.memory_mib, 1)),
        }
        let mut instance = instance.clone();
        instance.run = Run::Running;
        instance.starts += 1;
        instance.launched_ms = context.now_ms;
        instance.transition = String::new();
        instance.reason =
            Some(Reason { code: "pending".to_owned(), message: "pending".to_owned() });
        draft.plan.put(state, &instance);
    }
    for (vcpus, memory_mib, count) in starting {
        if place::room(context, vcpus, memory_mib, count) < count {
            return Err(place::no_room(context, &format!("{vcpus} vCPU, {memory_mib} MiB")));
        }
    }
    Ok(changes(before))
}

pub fn stop_instances(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let mut before = Vec::new();
    for instance in find_all::<Instance>(state, &need_ids(params, "InstanceId")?)? {
        let now = instance_state(state, instance);
        before.push((instance.id, now));
        if instance.disable_api_stop {
            return Err(ApiError::new(
                "OperationNotPermitted",
                format!(
                    "The instance '{}' may not be stopped. Modify its 'disableApiStop' instance attribute and try again.",
                    instance.id
                ),
            ));
        }
        match now {
            InstanceState::Stopped | InstanceState::Stopping => continue,
            InstanceState::Running => {}
            // InstanceStopped, the waiter, gives up at the sight of `pending`.
            _ => return Err(wrong_state(instance, now, "stopped")),
        }
        let mut instance = instance.clone();
        instance.run = Run::Stopped;
        instance.transition = initiated(context.now_ms);
        instance.reason = Some(Reason {
            code: "Client.UserInitiatedShutdown".to_owned(),
            message: "Client.UserInitiatedShutdown: User initiated shutdown".to_owned(),
        });
        draft.plan.put(state, &instance);
    }
    Ok(changes(before))
}

pub fn reboot_instances(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    for instance in find_all::<Instance>(state, &need_ids(params, "InstanceId")?)? {
        let now = instance_state(state, instance);
        if now != InstanceState::Running {
            return Err(wrong_state(instance, now, "rebooted"));
        }
        let mut instance = instance.clone();
        instance.reboots += 1;
        draft.plan.put(state, &instance);
    }
    Ok(done())
}

pub fn terminate_instances(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let mut before = Vec::new();
    for instance in find_all::<Instance>(state, &need_ids(params, "InstanceId")?)? {
        let now = instance_state(state, instance);
        before.push((instance.id, now));
        if matches!(now, InstanceState::ShuttingDown | InstanceState::Terminated) {
            continue;
        }
        if instance.disable_api_termination {
            return Err(ApiError::new(
                "OperationNotPermitted",
                format!(
                    "The instance '{}' may not be terminated. Modify its 'disableApiTermination' instance attribute and try again.",
                    instance.id
                ),
            ));
        }
        let mut instance = instance.clone();
        instance.run = Run::Terminated;
        instance.deleted_ms = Some(context.now_ms);
        instance.transition = initiated(context.now_ms);
        instance.reason = Some(Reason {
            code: "Client.UserInitiatedShutdown".to_owned(),
            message: "Client.UserInitiatedShutdown: User initiated shutdown".to_owned(),
        });
        draft.plan.put(state, &instance);
    }
    Ok(changes(before))
}

/// Which instance's console is asked for.
pub fn console_of(context: &Context<'_>, params: &Params) -> Result<model::InstanceId, ApiError> {
    let text = params.need("InstanceId")?;
    let id = parse::<Instance>(text)?;
    let found = context.state.instances.get(id);
    found.map(|i| i.id).ok_or_else(|| super::lookup::missing::<Instance>(&[text]))
}

/// A console that is not there yet is empty, not an error.
pub fn console_answer(
    id: model::InstanceId,
    console: Option<rpc::agent::Console>,
    now_ms: u64,
) -> Struct {
    let (output, at_ms) =
        console.map_or((String::new(), now_ms), |c| (c.output_base64, c.changed_at_s * 1000));
    Struct::new().with("instanceId", id).with("timestamp", timestamp(at_ms)).with("output", output)
}
