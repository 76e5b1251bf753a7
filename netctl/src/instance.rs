//! `netctl instance`: launch, watch and end instances.

use std::path::PathBuf;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use clap::{Args, Subcommand, ValueEnum};
use serde_json::json;

use crate::api::session::{Filter, Tag};
use crate::api::{Element, Parameters, Session};
use crate::deployment::config::Config;
use crate::failure::{Failure, Outcome};
use crate::listing::{Column, Listing, Shape};
use crate::output::{self, Format};
use crate::{group, image, naming, waiting};

#[derive(Debug, Subcommand)]
pub enum Instance {
    /// Launch instances from an image
    #[command(
        alias = "run",
        after_help = "EXAMPLES:
  netctl instance launch --image tiny --type t3.micro --key me --group web --wait
  netctl instance launch --image ami-0123456789abcdef0 --count 3 --tag Name=worker
  id=$(netctl instance launch --image tiny -o id)"
    )]
    Launch(Launch),
    /// List instances
    #[command(
        alias = "ls",
        after_help = "EXAMPLES:
  netctl instance list
  netctl instance list --filter instance-state-name=running --filter tag:Name=web
  netctl instance list -o json | jq -r '.[].private_address'"
    )]
    List(List),
    /// Show everything about an instance
    #[command(
        after_help = "EXAMPLES:\n  netctl instance show web\n  netctl instance show i-0123456789abcdef0 -o json"
    )]
    Show {
        #[command(flatten)]
        instance: One,
    },
    /// Start stopped instances
    #[command(after_help = "EXAMPLES:\n  netctl instance start web --wait")]
    Start(Act),
    /// Stop running instances; their volumes stay
    #[command(
        after_help = "EXAMPLES:\n  netctl instance stop web --wait\n  netctl instance stop web --force"
    )]
    Stop {
        #[command(flatten)]
        act: Act,
        /// Pull the plug rather than ask the guest
        #[arg(long)]
        force: bool,
    },
    /// Reboot running instances
    #[command(after_help = "EXAMPLES:\n  netctl instance reboot web")]
    Reboot {
        #[command(flatten)]
        instances: Many,
    },
    /// End instances for ever; their root volumes go with them
    #[command(
        alias = "rm",
        after_help = "EXAMPLES:\n  netctl instance terminate web worker --wait"
    )]
    Terminate(Act),
    /// Show what an instance wrote to its serial console
    #[command(after_help = "EXAMPLES:\n  netctl instance console web | tail")]
    Console {
        #[command(flatten)]
        instance: One,
    },
    /// Wait until instances are in a state
    #[command(
        after_help = "EXAMPLES:\n  netctl instance wait web --for running\n  netctl instance wait web worker --for terminated --timeout 60"
    )]
    Wait {
        #[command(flatten)]
        instances: Many,
        /// The state to wait for
        #[arg(long = "for", value_enum, default_value_t = State::Running)]
        state: State,
        /// Give up after so many seconds
        #[arg(long, default_value_t = 300, value_name = "SECONDS")]
        timeout: u64,
    },
    /// Print the ssh command that reaches an instance
    #[command(
        after_help = "EXAMPLES:\n  netctl instance ssh web --key-file me.pem\n  $(netctl instance ssh web --key-file me.pem) uptime"
    )]
    Ssh(Ssh),
}

#[derive(Debug, Args)]
pub struct Launch {
    /// The image: its id or its name
    #[arg(long, value_name = "IMAGE")]
    pub image: String,
    /// The instance type: how many vCPUs and how much memory (`netctl type list`)
    #[arg(long = "type", default_value = "t3.micro", value_name = "TYPE")]
    pub instance_type: String,
    /// The key pair whose public key the guest gets
    #[arg(long, value_name = "NAME")]
    pub key: Option<String>,
    /// Security groups, by id or name [default: the VPC's own]
    #[arg(long = "group", value_name = "GROUP")]
    pub groups: Vec<String>,
    /// The subnet to launch into
    #[arg(long, value_name = "SUBNET")]
    pub subnet: Option<String>,
    /// The availability zone
    #[arg(long)]
    pub zone: Option<String>,
    /// How many
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub count: u32,
    /// A file that the guest may read as its user data
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// Size of the root volume in GiB [default: the image's]
    #[arg(long, value_name = "GIB")]
    pub root_size: Option<u32>,
    /// A tag for the instances, KEY=VALUE; `Name` is what lists show
    #[arg(long = "tag", value_parser = Tag::parse, value_name = "KEY=VALUE")]
    pub tags: Vec<Tag>,
    /// The same token again gives the same instances again
    #[arg(long, value_name = "TOKEN")]
    pub client_token: Option<String>,
    /// Wait until they run
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub struct List {
    /// Only these
    #[arg(value_name = "INSTANCE")]
    pub instances: Vec<String>,
    /// Only those that fit, such as tag:Name=web or instance-state-name=running,stopped
    #[arg(long = "filter", value_parser = Filter::parse, value_name = "NAME=VALUE")]
    pub filters: Vec<Filter>,
}

#[derive(Debug, Args)]
pub struct One {
    /// Its id, or its tag `Name`
    #[arg(value_name = "INSTANCE")]
    pub instance: String,
}

#[derive(Debug, Args)]
pub struct Many {
    /// Their ids, or their tags `Name`
    #[arg(value_name = "INSTANCE", required = true)]
    pub instances: Vec<String>,
}

#[derive(Debug, Args)]
pub struct Act {
    #[command(flatten)]
    pub many: Many,
    /// Wait until it is done
    #[arg(long)]
    pub wait: bool,
}

#[derive(Debug, Args)]
pub struct Ssh {
    #[command(flatten)]
    pub one: One,
    /// Whom to log in as
    #[arg(long, short = 'l', default_value = "root")]
    pub user: String,
    /// The file with the private key
    #[arg(long, short = 'i', value_name = "FILE")]
    pub key_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum State {
    Pending,
    Running,
    Stopping,
    Stopped,
    ShuttingDown,
    Terminated,
}

impl State {
    const fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::ShuttingDown => "shutting-down",
            Self::Terminated => "terminated",
        }
    }
}

/// How long `--wait` waits: an emulated guest boots in seconds, and a large
/// image is copied in before.
const WAIT: Duration = Duration::from_secs(300);

const VOLUME: &[Column] = &[
    Column::new("DEVICE", "device", "deviceName"),
    Column::new("VOLUME", "volume", "ebs/volumeId"),
    Column::new("STATE", "state", "ebs/status"),
];

const COLUMNS: &[Column] = &[
    Column::new("INSTANCE", "id", "instanceId"),
    Column::new("NAME", "name", "tagSet/item").shape(Shape::Name),
    Column::new("STATE", "state", "instanceState/name"),
    Column::new("TYPE", "type", "instanceType"),
    Column::new("PRIVATE", "private_address", "privateIpAddress"),
    Column::new("PUBLIC", "public_address", "ipAddress"),
    Column::new("IMAGE", "image", "imageId"),
    Column::new("KEY", "key", "keyName").wide(),
    Column::new("GROUPS", "groups", "groupSet/item/groupId").shape(Shape::Texts).wide(),
    Column::new("ZONE", "zone", "placement/availabilityZone").wide(),
    Column::new("LAUNCHED", "launched_at", "launchTime").wide(),
    Column::new("", "vpc", "vpcId").json(),
    Column::new("", "subnet", "subnetId").json(),
    Column::new("", "interfaces", "networkInterfaceSet/item/networkInterfaceId")
        .shape(Shape::Texts)
        .json(),
    Column::new("", "volumes", "blockDeviceMapping/item").shape(Shape::Objects(VOLUME)).json(),
    Column::new("", "root_device", "rootDeviceName").json(),
    Column::new("", "reason", "stateReason/message").json(),
    Column::new("", "tags", "tagSet/item").shape(Shape::Tags).json(),
];

const LISTING: Listing = Listing { id: "id", columns: COLUMNS };

/// What starting, stopping and terminating answer.
const CHANGE: Listing = Listing {
    id: "id",
    columns: &[
        Column::new("INSTANCE", "id", "instanceId"),
        Column::new("STATE", "state", "currentState/name"),
        Column::new("BEFORE", "state_before", "previousState/name"),
    ],
};

pub fn run(session: &Session, noun: &Instance) -> Outcome {
    match noun {
        Instance::Launch(launch) => run_launch(session, launch),
        Instance::List(list) => {
            let ids = resolve_all(session, &list.instances)?;
            LISTING.show_all(session.format, &describe(session, &ids, &list.filters)?)
        }
        Instance::Show { instance } => {
            LISTING.show_one(session.format, &find(session, &instance.instance)?)
        }
        Instance::Start(act) => {
            change(session, act, "start", "StartInstances", State::Running, None)
        }
        Instance::Stop { act, force } => {
            let force = force.then_some("Force");
            change(session, act, "stop", "StopInstances", State::Stopped, force)
        }
        Instance::Terminate(act) => {
            change(session, act, "terminate", "TerminateInstances", State::Terminated, None)
        }
        Instance::Reboot { instances } => {
            let ids = resolve_all(session, &instances.instances)?;
            let deed = format!("instance {}: reboot", ids.join(", "));
            session.call(&deed, "RebootInstances", &Parameters::new().list("InstanceId", &ids))?;
            output::note(&format!("rebooting {}", ids.join(", ")));
            Ok(())
        }
        Instance::Console { instance } => run_console(session, &instance.instance),
        Instance::Wait { instances, state, timeout } => {
            let ids = resolve_all(session, &instances.instances)?;
            wait(session, &ids, *state, Duration::from_secs(*timeout))
        }
        Instance::Ssh(ssh) => run_ssh(session, ssh),
    }
}

fn run_launch(session: &Session, launch: &Launch) -> Outcome {
    let (names, group_ids): (Vec<&String>, Vec<&String>) =
        launch.groups.iter().partition(|g| !g.starts_with("sg-"));
    // RunInstances takes names only without a subnet; ids serve always.
    let mut groups: Vec<String> = group_ids.into_iter().cloned().collect();
    for name in names {
        groups.push(group::resolve(session, name)?);
    }
    let user_data =
        match &launch.user_data {
            Some(file) => Some(STANDARD.encode(std::fs::read(file).map_err(|e| {
                Failure::unfit(format!("user data {}: read: {e}", file.display()))
            })?)),
            None => None,
        };
    let (image, root_device) = image::resolve(session, &launch.image)?;
    let mut parameters = Parameters::new()
        .with("ImageId", &image)
        .with("InstanceType", &launch.instance_type)
        .with("MinCount", launch.count)
        .with("MaxCount", launch.count)
        .maybe("KeyName", launch.key.as_ref())
        .list("SecurityGroupId", &groups)
        .maybe("SubnetId", launch.subnet.as_ref())
        .maybe("Placement.AvailabilityZone", launch.zone.as_ref())
        .maybe("UserData", user_data)
        .maybe("ClientToken", launch.client_token.as_ref())
        .tags("instance", &launch.tags);
    if let Some(size) = launch.root_size {
        parameters = parameters
            .with("BlockDeviceMapping.1.DeviceName", &root_device)
            .with("BlockDeviceMapping.1.Ebs.VolumeSize", size);
    }
    let deed = format!("instance from {}: launch", launch.image);
    let answer = session.call(&deed, "RunInstances", &parameters)?;
    let mut instances: Vec<Element> =
        answer.all("instancesSet/item").into_iter().cloned().collect();
    if launch.wait {
        let ids: Vec<String> =
            instances.iter().map(|i| i.text_at("instanceId").to_owned()).collect();
        wait(session, &ids, State::Running, WAIT)?;
        instances = describe(session, &ids, &[])?;
    }
    LISTING.show_all(session.format, &instances)
}

fn change(
    session: &Session,
    act: &Act,
    verb: &str,
    action: &str,
    until: State,
    flag: Option<&str>,
) -> Outcome {
    let ids = resolve_all(session, &act.many.instances)?;
    let deed = format!("instance {}: {verb}", ids.join(", "));
    let parameters = Parameters::new().list("InstanceId", &ids).maybe_flag(flag);
    let answer = session.call(&deed, action, &parameters)?;
    if act.wait {
        wait(session, &ids, until, WAIT)?;
    }
    let changes: Vec<Element> = answer.all("instancesSet/item").into_iter().cloned().collect();
    CHANGE.show_all(session.format, &changes)
}

fn run_console(session: &Session, instance: &str) -> Outcome {
    let id = resolve(session, instance)?;
    let deed = format!("instance {id}: console");
    let answer =
        session.call(&deed, "GetConsoleOutput", &Parameters::new().with("InstanceId", &id))?;
    let bytes = STANDARD
        .decode(answer.text_at("output"))
        .map_err(|e| Failure::failed(format!("{deed}: the answer is not base64: {e}")))?;
    let text = String::from_utf8_lossy(&bytes);
    if session.format == Format::Json {
        return output::json(&json!({
            "id": id, "output": text, "changed_at": answer.text_at("timestamp"),
        }));
    }
    output::line(text.trim_end());
    Ok(())
}

fn run_ssh(session: &Session, ssh: &Ssh) -> Outcome {
    let instance = find(session, &ssh.one.instance)?;
    let id = instance.text_at("instanceId");
    let address = match instance.text_at("ipAddress") {
        "" => {
            return Err(Failure::failed(format!("instance {id}: ssh: it has no elastic address"))
                .hint(format!("netctl address associate $(netctl address allocate -o id) {id}")));
        }
        address => address,
    };
    let mut words = Vec::new();
    // The world of an own uplink is a namespace; only from there it is reached.
    let config = Config::read(&session.deployment)?;
    if config.is_some_and(|c| c.uplink.own_subnet.is_some()) {
        words.push(format!("ip netns exec {}", session.deployment.internet_namespace()));
    }
    words.push("ssh".to_owned());
    if let Some(file) = &ssh.key_file {
        words.push(format!("-i {}", file.display()));
    }
    words.push(format!("{}@{address}", ssh.user));
    output::line(&words.join(" "));
    Ok(())
}

fn describe(session: &Session, ids: &[String], filters: &[Filter]) -> Outcome<Vec<Element>> {
    session.describe(
        "instances: list",
        "DescribeInstances",
        &Parameters::new().list("InstanceId", ids).filters(filters),
        "reservationSet/item/instancesSet/item",
    )
}

/// The instance that an id or a name speaks of.
pub fn find(session: &Session, instance: &str) -> Outcome<Element> {
    let id = resolve(session, instance)?;
    let deed = format!("instance {id}: show");
    session
        .describe(
            &deed,
            "DescribeInstances",
            &Parameters::new().list("InstanceId", [&id]),
            "reservationSet/item/instancesSet/item",
        )?
        .into_iter()
        .next()
        .ok_or_else(|| {
            Failure::failed(format!("{deed}: it does not exist")).hint("netctl instance list")
        })
}

/// The id of the one living instance that has the tag `Name`.
pub fn resolve(session: &Session, instance: &str) -> Outcome<String> {
    if instance.starts_with("i-") {
        return Ok(instance.to_owned());
    }
    let living = Filter {
        name: "instance-state-name".to_owned(),
        values: ["pending", "running", "stopping", "stopped"].map(str::to_owned).to_vec(),
    };
    let found = describe(session, &[], &[Filter::new("tag:Name", instance), living])?;
    let ids: Vec<&str> = found.iter().map(|i| i.text_at("instanceId")).collect();
    naming::the_only("instance", instance, &ids)
}

fn resolve_all(session: &Session, instances: &[String]) -> Outcome<Vec<String>> {
    instances.iter().map(|i| resolve(session, i)).collect()
}

fn wait(session: &Session, ids: &[String], state: State, patience: Duration) -> Outcome {
    let what = format!("instance {}: wait for {}", ids.join(", "), state.name());
    waiting::until(&what, patience, || {
        let instances = describe(session, ids, &[])?;
        let mut progress = Vec::new();
        for instance in &instances {
            let (id, now) =
                (instance.text_at("instanceId"), instance.text_at("instanceState/name"));
            if is_hopeless(now, state) {
                let reason = instance.text_at("stateReason/message");
                return Err(Failure::failed(format!("{what}: {id} is {now}: {reason}"))
                    .hint(format!("netctl instance console {id}; netctl logs agent")));
            }
            progress.push(now.to_owned());
        }
        Ok(waiting::Look {
            is_done: instances.len() == ids.len() && progress.iter().all(|s| s == state.name()),
            seen: progress.join(", "),
        })
    })
}

/// Whether an instance in state `now` will not be `wanted` by itself.
fn is_hopeless(now: &str, wanted: State) -> bool {
    match now {
        "terminated" => wanted != State::Terminated,
        "shutting-down" => !matches!(wanted, State::Terminated | State::ShuttingDown),
        "stopped" => matches!(wanted, State::Stopping),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waiting_ends_where_the_state_cannot_come_any_more() {
        assert!(is_hopeless("terminated", State::Running));
        assert!(is_hopeless("shutting-down", State::Stopped));
        assert!(!is_hopeless("shutting-down", State::Terminated));
        assert!(!is_hopeless("stopped", State::Running), "a start may be on its way");
        assert!(!is_hopeless("pending", State::Running));
    }

    #[test]
    fn an_instance_is_shown_with_what_a_story_asks_for() {
        let element = Element::parse(
            b"<item><instanceId>i-1</instanceId><imageId>ami-1</imageId><instanceState><code>16</code>\
              <name>running</name></instanceState><privateIpAddress>10.0.0.5</privateIpAddress>\
              <ipAddress>198.51.100.129</ipAddress><blockDeviceMapping><item><deviceName>/dev/vda\
              </deviceName><ebs><volumeId>vol-1</volumeId><status>attached</status></ebs></item>\
              </blockDeviceMapping></item>",
        )
        .unwrap();
        let object = LISTING.object(&element);
        assert_eq!(object["state"], "running");
        assert_eq!(object["private_address"], "10.0.0.5");
        assert_eq!(object["public_address"], "198.51.100.129");
        assert_eq!(object["volumes"][0]["volume"], "vol-1");
        assert_eq!(object["name"], serde_json::Value::Null);
    }
}
