//! `netctl volume`: disks that outlive the instances that they are attached to.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use crate::api::session::{Filter, Tag};
use crate::api::{Element, Parameters, Session};
use crate::failure::{Failure, Outcome};
use crate::listing::{Column, Listing, Shape};
use crate::{instance, naming, output, volume_live, waiting, zone};

#[derive(Debug, Subcommand)]
pub enum Volume {
    /// Create a volume
    #[command(
        after_help = "EXAMPLES:\n  netctl volume create --size 10 --tag Name=data\n  vol=$(netctl volume create --size 1 --wait -o id)"
    )]
    Create(Create),
    /// List volumes
    #[command(
        alias = "ls",
        after_help = "EXAMPLES:\n  netctl volume list\n  netctl volume list --filter status=available"
    )]
    List {
        /// Only these
        #[arg(value_name = "VOLUME")]
        volumes: Vec<String>,
        /// Only those that fit, such as status=available or tag:Name=data
        #[arg(long = "filter", value_parser = Filter::parse, value_name = "NAME=VALUE")]
        filters: Vec<Filter>,
    },
    /// Show everything about a volume
    #[command(after_help = "EXAMPLES:\n  netctl volume show data")]
    Show {
        /// Its id, or its tag `Name`
        volume: String,
    },
    /// Attach a volume to an instance, running or stopped
    #[command(
        after_help = "EXAMPLES:\n  netctl volume attach data web --wait\n  netctl volume attach vol-0123456789abcdef0 i-0123456789abcdef0 --device /dev/sdg"
    )]
    Attach {
        /// Its id, or its tag `Name`
        volume: String,
        /// Its id, or its tag `Name`
        instance: String,
        /// The name under which the API knows it [default: the first free of /dev/sdf to /dev/sdp]
        #[arg(long, value_name = "DEVICE")]
        device: Option<String>,
        /// Wait until the guest has it
        #[arg(long)]
        wait: bool,
    },
    /// Detach a volume from its instance; unmount it in the guest before
    #[command(after_help = "EXAMPLES:\n  netctl volume detach data --wait")]
    Detach {
        /// Its id, or its tag `Name`
        volume: String,
        /// Do not ask the guest
        #[arg(long)]
        force: bool,
        /// Wait until it is available again
        #[arg(long)]
        wait: bool,
    },
    /// Delete a volume and its data for ever
    #[command(alias = "rm", after_help = "EXAMPLES:\n  netctl volume delete data")]
    Delete {
        /// Its id, or its tag `Name`
        volume: String,
    },
    /// Change a volume's size, type or speed, in use or not; it only grows
    #[command(
        after_help = "EXAMPLES:\n  netctl volume modify data --size 20 --wait\n  netctl volume modify data --type gp3 --iops 6000 --throughput 250"
    )]
    Modify(Modify),
    /// Show what the volumes of this host do now: requests, bytes, latencies, queues
    #[command(
        after_help = "EXAMPLES:\n  netctl volume top\n  netctl volume top --once --sort p99 -o json\n\nTHROTTLED is the share of requests that waited for the volume's limit or its turn."
    )]
    Top(volume_live::Top),
    /// Make all that was acknowledged durable, and let changes wait until resumed
    #[command(after_help = "EXAMPLES:\n  netctl volume quiesce data --for 30")]
    Quiesce {
        /// Its id, or its tag `Name`
        volume: String,
        /// Seconds after which changes go on by themselves
        #[arg(long = "for", default_value_t = 30, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(1..=60))]
        seconds: u32,
    },
    /// Let the changes of a quiesced volume go on
    #[command(after_help = "EXAMPLES:\n  netctl volume resume data")]
    Resume {
        /// Its id, or its tag `Name`
        volume: String,
    },
    /// Finish what is in flight, close a volume's connections and refuse new ones
    #[command(
        after_help = "EXAMPLES:\n  netctl volume drain data\n  netctl volume drain data --undo"
    )]
    Drain {
        /// Its id, or its tag `Name`
        volume: String,
        /// Accept connections again
        #[arg(long)]
        undo: bool,
    },
    /// List who is connected to the block server of this host
    #[command(after_help = "EXAMPLES:\n  netctl volume connections")]
    Connections,
    /// Close one connection, once what it has in flight is answered
    #[command(after_help = "EXAMPLES:\n  netctl volume disconnect 12")]
    Disconnect {
        /// As `netctl volume connections` names it
        connection: u64,
    },
    /// Wait until volumes are in a state
    #[command(after_help = "EXAMPLES:\n  netctl volume wait data --for available")]
    Wait {
        /// Their ids, or their tags `Name`
        #[arg(required = true, value_name = "VOLUME")]
        volumes: Vec<String>,
        /// The state to wait for
        #[arg(long = "for", value_enum, default_value_t = State::Available)]
        state: State,
        /// Give up after so many seconds
        #[arg(long, default_value_t = 120, value_name = "SECONDS")]
        timeout: u64,
    },
}

#[derive(Debug, Args)]
pub struct Modify {
    /// Its id, or its tag `Name`
    pub volume: String,
    #[command(flatten)]
    pub change: Change,
    /// Wait until it is done
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
pub struct Change {
    /// Its new size in GiB
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub size: Option<u32>,
    /// gp3, gp2, io1, io2, st1, sc1 or standard
    #[arg(long = "type", value_name = "TYPE")]
    pub kind: Option<model::VolumeKind>,
    /// Operations a second, for gp3, io1 and io2
    #[arg(long)]
    pub iops: Option<u32>,
    /// MiB a second, for gp3
    #[arg(long, value_name = "MIB")]
    pub throughput: Option<u32>,
}

#[derive(Debug, Args)]
pub struct Create {
    /// Its size in GiB
    #[arg(long, value_name = "GIB", value_parser = clap::value_parser!(u32).range(1..))]
    pub size: u32,
    /// gp3, gp2, io1, io2, st1, sc1 or standard [default: gp3]
    #[arg(long = "type", value_name = "TYPE")]
    pub kind: Option<model::VolumeKind>,
    /// Operations a second, for gp3, io1 and io2
    #[arg(long)]
    pub iops: Option<u32>,
    /// MiB a second, for gp3
    #[arg(long, value_name = "MIB")]
    pub throughput: Option<u32>,
    /// The availability zone [default: the first]
    #[arg(long)]
    pub zone: Option<String>,
    /// A tag, KEY=VALUE; `Name` is what lists show
    #[arg(long = "tag", value_parser = Tag::parse, value_name = "KEY=VALUE")]
    pub tags: Vec<Tag>,
    /// The same token again gives the same volume again
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
    /// Wait until it is available
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum State {
    Available,
    InUse,
    Deleted,
}

/// How long `--wait` waits.
const WAIT: Duration = Duration::from_secs(120);

const ATTACHMENT: &[Column] = &[
    Column::new("INSTANCE", "instance", "instanceId"),
    Column::new("DEVICE", "device", "device"),
    Column::new("STATE", "state", "status"),
];

const COLUMNS: &[Column] = &[
    Column::new("VOLUME", "id", "volumeId"),
    Column::new("NAME", "name", "tagSet/item").shape(Shape::Name),
    Column::new("STATE", "state", "status"),
    Column::new("GIB", "size_gib", "size").shape(Shape::Number),
    Column::new("INSTANCE", "instance", "attachmentSet/item/instanceId"),
    Column::new("DEVICE", "device", "attachmentSet/item/device"),
    Column::new("ATTACHMENT", "attachment_state", "attachmentSet/item/status").wide(),
    Column::new("ZONE", "zone", "availabilityZone").wide(),
    Column::new("CREATED", "created_at", "createTime").wide(),
    Column::new("TYPE", "type", "volumeType").wide(),
    Column::new("IOPS", "iops", "iops").shape(Shape::Number).wide(),
    Column::new("MIB/S", "throughput_mib", "throughput").shape(Shape::Number).wide(),
    Column::new("", "attachments", "attachmentSet/item").shape(Shape::Objects(ATTACHMENT)).json(),
    Column::new("", "tags", "tagSet/item").shape(Shape::Tags).json(),
];

const LISTING: Listing = Listing { id: "id", columns: COLUMNS };

/// What modifying answers.
const MODIFICATION: Listing = Listing {
    id: "id",
    columns: &[
        Column::new("VOLUME", "id", "volumeId"),
        Column::new("STATE", "state", "modificationState"),
        Column::new("GIB", "size_gib", "targetSize").shape(Shape::Number),
        Column::new("TYPE", "type", "targetVolumeType"),
        Column::new("IOPS", "iops", "targetIops").shape(Shape::Number),
        Column::new("MIB/S", "throughput_mib", "targetThroughput").shape(Shape::Number),
    ],
};

/// What attaching and detaching answer.
const CHANGE: Listing = Listing {
    id: "id",
    columns: &[
        Column::new("VOLUME", "id", "volumeId"),
        Column::new("INSTANCE", "instance", "instanceId"),
        Column::new("DEVICE", "device", "device"),
        Column::new("STATE", "state", "status"),
    ],
};

pub fn run(session: &Session, noun: &Volume) -> Outcome {
    match noun {
        Volume::Create(create) => run_create(session, create),
        Volume::List { volumes, filters } => {
            let ids = resolve_all(session, volumes)?;
            LISTING.show_all(session.format, &describe(session, &ids, filters)?)
        }
        Volume::Show { volume } => LISTING.show_one(session.format, &find(session, volume)?),
        Volume::Attach { volume, instance, device, wait } => {
            run_attach(session, volume, instance, device.as_deref(), *wait)
        }
        Volume::Detach { volume, force, wait } => {
            let id = resolve(session, volume)?;
            let parameters =
                Parameters::new().with("VolumeId", &id).maybe_flag(force.then_some("Force"));
            let answer =
                session.call(&format!("volume {id}: detach"), "DetachVolume", &parameters)?;
            if *wait {
                self::wait(session, &[id], State::Available, WAIT)?;
            }
            CHANGE.show_one(session.format, &answer)
        }
        Volume::Delete { volume } => {
            let id = resolve(session, volume)?;
            let parameters = Parameters::new().with("VolumeId", &id);
            session.call(&format!("volume {id}: delete"), "DeleteVolume", &parameters)?;
            output::note(&format!("deleted {id}"));
            Ok(())
        }
        Volume::Modify(modify) => run_modify(session, modify),
        Volume::Top(top) => volume_live::run_top(session, top),
        Volume::Quiesce { volume, seconds } => {
            volume_live::quiesce(session, &resolve(session, volume)?, *seconds)
        }
        Volume::Resume { volume } => volume_live::resume(session, &resolve(session, volume)?),
        Volume::Drain { volume, undo } => {
            volume_live::drain(session, &resolve(session, volume)?, *undo)
        }
        Volume::Connections => volume_live::connections(session),
        Volume::Disconnect { connection } => volume_live::disconnect(session, *connection),
        Volume::Wait { volumes, state, timeout } => {
            let ids = resolve_all(session, volumes)?;
            wait(session, &ids, *state, Duration::from_secs(*timeout))
        }
    }
}

fn run_create(session: &Session, create: &Create) -> Outcome {
    let zone = match &create.zone {
        Some(zone) => zone.clone(),
        None => zone::first(session)?,
    };
    let parameters = Parameters::new()
        .with("AvailabilityZone", zone)
        .with("Size", create.size)
        .maybe("VolumeType", create.kind.map(|k| k.name()))
        .maybe("Iops", create.iops)
        .maybe("Throughput", create.throughput)
        .maybe("ClientToken", create.client_token.as_ref())
        .tags("volume", &create.tags);
    let deed = format!("volume of {} GiB: create", create.size);
    let mut volume = session.call(&deed, "CreateVolume", &parameters)?;
    if create.wait {
        let id = volume.text_at("volumeId").to_owned();
        wait(session, std::slice::from_ref(&id), State::Available, WAIT)?;
        volume = find(session, &id)?;
    }
    LISTING.show_one(session.format, &volume)
}

fn run_modify(session: &Session, modify: &Modify) -> Outcome {
    let id = resolve(session, &modify.volume)?;
    let Change { size, kind, iops, throughput } = &modify.change;
    let parameters = Parameters::new()
        .with("VolumeId", &id)
        .maybe("Size", *size)
        .maybe("VolumeType", kind.map(|k| k.name()))
        .maybe("Iops", *iops)
        .maybe("Throughput", *throughput);
    let answer = session.call(&format!("volume {id}: modify"), "ModifyVolume", &parameters)?;
    let mut shown = answer.at("volumeModification").unwrap_or(&answer).clone();
    if modify.wait {
        let ids = [id.clone()];
        waiting::until(&format!("volume {id}: wait for completed"), WAIT, || {
            let deed = format!("volume {id}: modification");
            let parameters = Parameters::new().list("VolumeId", &ids);
            let found = session.describe(
                &deed,
                "DescribeVolumesModifications",
                &parameters,
                "volumeModificationSet/item",
            )?;
            let seen = match found.into_iter().next() {
                Some(found) => {
                    shown = found;
                    shown.text_at("modificationState").to_owned()
                }
                None => String::new(),
            };
            Ok(waiting::Look { is_done: seen == "completed", seen })
        })?;
    }
    MODIFICATION.show_one(session.format, &shown)
}

fn run_attach(
    session: &Session,
    volume: &str,
    instance: &str,
    device: Option<&str>,
    wait: bool,
) -> Outcome {
    let id = resolve(session, volume)?;
    let (instance, device) = match device {
        Some(device) => (instance::resolve(session, instance)?, device.to_owned()),
        None => {
            let instance = instance::find(session, instance)?;
            let taken = instance.all("blockDeviceMapping/item/deviceName");
            let taken: Vec<&str> = taken.iter().map(|e| e.text.trim()).collect();
            let id = instance.text_at("instanceId").to_owned();
            let device = free_device(&taken).ok_or_else(|| {
                Failure::unfit(format!("instance {id}: attach: /dev/sdf to /dev/sdp are taken"))
                    .hint("give one with --device")
            })?;
            (id, device)
        }
    };
    let parameters = Parameters::new()
        .with("VolumeId", &id)
        .with("InstanceId", &instance)
        .with("Device", &device);
    let deed = format!("volume {id}: attach to {instance}");
    let mut answer = session.call(&deed, "AttachVolume", &parameters)?;
    if wait {
        waiting::until(&format!("volume {id}: wait for attached"), WAIT, || {
            let volume = find(session, &id)?;
            let seen = volume.text_at("attachmentSet/item/status").to_owned();
            if let Some(attachment) = volume.at("attachmentSet/item") {
                answer = attachment.clone();
            }
            Ok(waiting::Look { is_done: seen == "attached", seen })
        })?;
    }
    CHANGE.show_one(session.format, &answer)
}

/// EC2 recommends /dev/sdf to /dev/sdp for volumes (EC2 user guide, "Device names").
fn free_device(taken: &[&str]) -> Option<String> {
    ('f'..='p').map(|letter| format!("/dev/sd{letter}")).find(|d| !taken.contains(&d.as_str()))
}

fn describe(session: &Session, ids: &[String], filters: &[Filter]) -> Outcome<Vec<Element>> {
    session.describe(
        &match ids {
            [] => "volumes: list".to_owned(),
            ids => format!("volume {}: show", ids.join(", ")),
        },
        "DescribeVolumes",
        &Parameters::new().list("VolumeId", ids).filters(filters),
        "volumeSet/item",
    )
}

fn find(session: &Session, volume: &str) -> Outcome<Element> {
    let id = resolve(session, volume)?;
    describe(session, std::slice::from_ref(&id), &[])?.into_iter().next().ok_or_else(|| {
        Failure::failed(format!("volume {id}: it does not exist")).hint("netctl volume list")
    })
}

/// The id of the one volume that has the tag `Name`.
fn resolve(session: &Session, volume: &str) -> Outcome<String> {
    if volume.starts_with("vol-") {
        return Ok(volume.to_owned());
    }
    let found = describe(session, &[], &[Filter::new("tag:Name", volume)])?;
    let ids: Vec<&str> = found.iter().map(|v| v.text_at("volumeId")).collect();
    naming::the_only("volume", volume, &ids)
}

fn resolve_all(session: &Session, volumes: &[String]) -> Outcome<Vec<String>> {
    volumes.iter().map(|v| resolve(session, v)).collect()
}

fn wait(session: &Session, ids: &[String], state: State, patience: Duration) -> Outcome {
    let wanted = match state {
        State::Available => "available",
        State::InUse => "in-use",
        State::Deleted => "deleted",
    };
    let what = format!("volume {}: wait for {wanted}", ids.join(", "));
    waiting::until(&what, patience, || {
        let volumes = match describe(session, ids, &[]) {
            Err(Failure::Api { code, .. })
                if state == State::Deleted && code == "InvalidVolume.NotFound" =>
            {
                return Ok(waiting::Look { is_done: true, seen: wanted.to_owned() });
            }
            other => other?,
        };
        let seen: Vec<&str> = volumes.iter().map(|v| v.text_at("status")).collect();
        if seen.contains(&"error") {
            return Err(Failure::failed(format!("{what}: it is error"))
                .hint("netctl logs agent; netctl logs block-server"));
        }
        let is_done = match state {
            State::Deleted => volumes.is_empty(),
            _ => volumes.len() == ids.len() && seen.iter().all(|s| *s == wanted),
        };
        Ok(waiting::Look { is_done, seen: seen.join(", ") })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_free_device_is_taken() {
        assert_eq!(free_device(&["/dev/vda"]).unwrap(), "/dev/sdf");
        assert_eq!(free_device(&["/dev/sdf", "/dev/sdg"]).unwrap(), "/dev/sdh");
        let all: Vec<String> = ('f'..='p').map(|l| format!("/dev/sd{l}")).collect();
        assert_eq!(free_device(&all.iter().map(String::as_str).collect::<Vec<_>>()), None);
    }
}
