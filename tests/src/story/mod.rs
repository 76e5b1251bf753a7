//! The tale of one machine, told by `./x demo` and by the end-to-end tests:
//! from nothing to two guests, through faults, and back to nothing.
//!
//! Each step does one thing that a user would do and checks what that user
//! would see; the text that it gives back is what is worth telling. A step
//! stands on those before it: after a failure the rest cannot be told.

mod access;
mod faults;
mod launch;
mod life;
mod volumes;

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, bail};
use tempfile::TempDir;

use crate::deployment::Deployment;
use crate::guest::Guest;
use crate::internet::{FRIEND, Internet};
use crate::operator::{Address, Instance, Operator};
use crate::program;

/// How long a guest may take from the order to a changed state.
const STATE_BOUND: Duration = Duration::from_secs(120);

/// One step of the story.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// As a test's name.
    pub name: &'static str,
    /// As a sentence of the narration.
    pub title: &'static str,
    pub act: fn(&mut Story) -> anyhow::Result<String>,
}

/// All of them, in order.
pub const STEPS: &[Step] = &[
    Step { name: "starts", title: "Start Hostplane", act: launch::start },
    Step {
        name: "builds_and_registers_an_image",
        title: "Build and register a machine image",
        act: launch::image,
    },
    Step { name: "creates_a_key_pair", title: "Create a key pair", act: launch::key },
    Step {
        name: "creates_a_security_group",
        title: "Create a security group: port 22 from one network",
        act: launch::group,
    },
    Step {
        name: "runs_two_instances_of_different_types",
        title: "Run two instances of different types",
        act: launch::instances,
    },
    Step {
        name: "gives_each_an_elastic_address",
        title: "Give each an elastic IP",
        act: launch::addresses,
    },
    Step {
        name: "is_reached_by_ssh_with_the_key",
        title: "SSH in from the internet, by key",
        act: access::ssh,
    },
    Step {
        name: "is_not_reached_from_another_network",
        title: "Another network is kept out",
        act: access::stranger,
    },
    Step {
        name: "has_the_size_of_its_type",
        title: "Each guest sees its type's vCPUs and memory",
        act: access::size,
    },
    Step {
        name: "learns_of_itself_by_imdsv2_only",
        title: "Instance metadata: IMDSv2 answers, v1 does not",
        act: access::metadata,
    },
    Step {
        name: "opens_and_closes_a_port_live",
        title: "Open a blocked port by a rule, close it again",
        act: access::port,
    },
    Step {
        name: "lets_the_group_in_by_name",
        title: "Guest to guest: the group itself as source",
        act: access::group_source,
    },
    Step {
        name: "resolves_another_guests_names",
        title: "Names: another instance by its names, and its address back",
        act: access::names,
    },
    Step {
        name: "carries_tcp_both_ways_whole",
        title: "Bulk TCP through the elastic IP, both ways",
        act: access::bulk,
    },
    Step {
        name: "attaches_formats_and_writes_a_volume",
        title: "Attach a volume live, format it, write",
        act: volumes::write,
    },
    Step {
        name: "moves_the_volume_with_its_data",
        title: "Move the volume to the other instance",
        act: volumes::shift,
    },
    Step {
        name: "survives_kill_9_of_each_daemon",
        title: "kill -9 each daemon under load",
        act: faults::kill_daemons,
    },
    Step { name: "shows_its_console", title: "Read the console", act: life::console },
    Step { name: "reboots", title: "Reboot", act: life::reboot },
    Step {
        name: "stops_and_starts_with_its_data",
        title: "Stop and start; the data is still there",
        act: life::stop_start,
    },
    Step {
        name: "terminates_and_gives_all_back",
        title: "Terminate; give back addresses and the volume",
        act: life::terminate,
    },
    Step { name: "leaves_nothing_behind", title: "Shut down; nothing is left", act: life::down },
];

/// What the steps so far have made.
pub struct Story {
    pub deployment: Deployment,
    operator: Box<dyn Operator>,
    internet: Internet,
    key_file: PathBuf,
    image: String,
    group: String,
    /// The first is the smaller one.
    instances: Vec<Instance>,
    addresses: Vec<Address>,
    volume: String,
    digest: String,
    _keys: TempDir,
}

/// Made once the deployment runs: an operator needs its endpoint.
pub type MakeOperator = fn(&Deployment) -> anyhow::Result<Box<dyn Operator>>;

impl Story {
    /// Brings the deployment up: the first step's work, since all else needs its endpoint.
    pub fn begin(deployment: Deployment, make_operator: MakeOperator) -> anyhow::Result<Self> {
        deployment.up()?;
        let operator = make_operator(&deployment)?;
        let keys = tempfile::tempdir()?;
        Ok(Self {
            internet: deployment.internet(),
            deployment,
            operator,
            key_file: keys.path().join("key"),
            image: String::new(),
            group: String::new(),
            instances: Vec::new(),
            addresses: Vec::new(),
            volume: String::new(),
            digest: String::new(),
            _keys: keys,
        })
    }

    /// Tells the steps up to and with `last`.
    pub fn tell_until(&mut self, last: &str) -> anyhow::Result<()> {
        for step in STEPS {
            (step.act)(self).with_context(|| step.name)?;
            if step.name == last {
                return Ok(());
            }
        }
        bail!("the story has no step `{last}`")
    }

    /// Tells these steps alone, in the order given: all that they stand on is among them.
    pub fn tell_only(&mut self, names: &[&str]) -> anyhow::Result<()> {
        for name in names {
            let step = STEPS.iter().find(|step| step.name == *name);
            let step = step.with_context(|| format!("the story has no step `{name}`"))?;
            (step.act)(self).with_context(|| step.name)?;
        }
        Ok(())
    }

    /// The digest of what the story wrote to its volume.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// The id of the image that the guests were run from.
    pub fn image(&self) -> &str {
        &self.image
    }

    /// The `index`-th guest, spoken to through its elastic address.
    pub fn guest(&self, index: usize) -> anyhow::Result<Guest> {
        Ok(self.guest_at(self.address(index)?))
    }

    /// The guest at an elastic address, spoken to by a friend.
    pub fn guest_at(&self, address: Ipv4Addr) -> Guest {
        Guest::new(&self.internet, address, FRIEND, &self.key_file)
    }

    /// The security group of the guests, which lets friends in by SSH.
    pub fn group(&self) -> &str {
        &self.group
    }

    fn instance(&self, index: usize) -> anyhow::Result<&Instance> {
        self.instances.get(index).context("that instance was never run")
    }

    fn address(&self, index: usize) -> anyhow::Result<Ipv4Addr> {
        Ok(self.addresses.get(index).context("that address was never allocated")?.address)
    }

    fn await_state(&self, id: &str, state: &str) -> anyhow::Result<Instance> {
        program::eventually(&format!("{id} {state}"), STATE_BOUND, || {
            let seen = self.operator.instance(id)?;
            if seen.state != state {
                bail!("{id} is {}", seen.state);
            }
            Ok(seen)
        })
    }

    fn await_volume(&self, state: &str) -> anyhow::Result<()> {
        program::eventually(&format!("{} {state}", self.volume), STATE_BOUND, || {
            let seen = self.operator.volume_state(&self.volume)?;
            if seen != state {
                bail!("{} is {seen}", self.volume);
            }
            Ok(())
        })
    }
}
