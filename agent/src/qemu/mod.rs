//! The shell around QEMU: starts it, talks to it, finds it again. It decides
//! nothing; [`crate::lifecycle`] does.
//!
//! ```text
//!   <run>/agent/<instance>/plan.json    what the launcher is to do
//!                          lock         held by QEMU as long as it lives
//!                          pid          who it is, for the next agent
//!                          qmp.sock  serial.sock  qemu.log
//!   <state>/agent/instances/<instance>/console.log  console.old
//! ```
//! All of it belongs to root; QEMU, in a user of its own, got open files only.
//!
//! Each guest has one task, which owns its connection and hears of its end.
//! QEMU outlives the agent: it has a session of its own and no pipe to it.

mod arguments;
mod cgroup;
mod confine;
pub mod console;
mod front;
mod guest;
mod kernel_call;
mod plug;
mod probe;
mod process;
mod qmp;

use std::collections::BTreeMap;
use std::path::PathBuf;

use model::{InstanceId, VolumeId};
use rpc::Deployment;
use tokio::sync::mpsc;

pub use arguments::{Accelerator, RECONNECT_DELAY_S, SLOTS_MAX, serial, uuid};
pub use cgroup::Cgroups;
pub use confine::{EXIT_LOCKED, Error as ConfineError, Plan, confine};
pub use front::{Abilities, BlockFront, Fronts};
pub use probe::{Choice, choose};
pub use process::{Identity, Process};

use crate::image::Store;
use crate::lifecycle::{Effect, Event};

/// The program, as it is found in PATH.
pub const PROGRAM: &str = "qemu-system-x86_64";

/// Instances' users begin here: far above those of people and systems (up to
/// 65 535), so that a mistaken number never makes a guest root or a service. The
/// number itself comes from control, which gives each tap its owner.
pub const UID_MIN: u32 = 100_000;

/// What the instance's effects need beside themselves.
#[derive(Debug, Clone)]
pub struct Context {
    pub uid: u32,
    /// Of each exported volume.
    pub sockets: BTreeMap<VolumeId, Sockets>,
}

/// Where an export is served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sockets {
    pub nbd: PathBuf,
    /// `None` where the block server has no such front.
    pub vhost_user: Option<PathBuf>,
}

/// Something that runs guests. Results come as events, each in its time.
pub trait Hypervisor: Send + 'static {
    fn perform(&mut self, id: InstanceId, effect: Effect, context: Context);
    /// Pid, and whether an earlier agent started it.
    fn process(&self, id: InstanceId) -> Option<(u32, bool)>;
    fn accelerator(&self) -> &Choice;
}

/// Where events go.
pub type Reports = mpsc::Sender<(InstanceId, Event)>;

/// Where a guest's files are.
#[derive(Debug, Clone)]
pub struct Places {
    pub run: PathBuf,
    pub state: PathBuf,
}

impl Places {
    pub fn of(deployment: &Deployment, id: InstanceId) -> Self {
        Self {
            run: runs(deployment).join(id.to_string()),
            state: instances(deployment).join(id.to_string()),
        }
    }

    fn pid_file(&self) -> PathBuf {
        self.run.join("pid")
    }

    fn lock(&self) -> PathBuf {
        self.run.join("lock")
    }

    fn plan(&self) -> PathBuf {
        self.run.join("plan.json")
    }

    fn qmp(&self) -> PathBuf {
        self.run.join("qmp.sock")
    }

    fn serial(&self) -> PathBuf {
        self.run.join("serial.sock")
    }

    fn log(&self) -> PathBuf {
        self.run.join("qemu.log")
    }

    pub fn console(&self) -> PathBuf {
        self.state.join("console.log")
    }
}

/// Run files of all guests.
pub fn runs(deployment: &Deployment) -> PathBuf {
    deployment.run_dir().join("agent")
}

/// What is remembered of all guests.
pub fn instances(deployment: &Deployment) -> PathBuf {
    deployment.state_of("agent").join("instances")
}

#[derive(Debug)]
pub struct Qemu {
    shared: guest::Shared,
    accelerator: Choice,
    guests: BTreeMap<InstanceId, guest::Handle>,
}

impl Qemu {
    /// `launcher` is this program's own file, for `confine`.
    pub fn new(
        deployment: Deployment,
        images: Store,
        launcher: PathBuf,
        accelerator: Choice,
        fronts: Fronts,
        reports: Reports,
    ) -> Self {
        let cgroups = Cgroups::new(deployment.name());
        let shared = guest::Shared {
            deployment,
            images,
            launcher,
            cgroups,
            accelerator: accelerator.accelerator,
            fronts,
            kvm_group: accelerator.kvm_group,
            reports,
        };
        Self { shared, accelerator, guests: BTreeMap::new() }
    }
}

impl Hypervisor for Qemu {
    fn perform(&mut self, id: InstanceId, effect: Effect, context: Context) {
        match &effect {
            Effect::Adopt { epoch } | Effect::Start { epoch, .. } => {
                let handle = guest::spawn(self.shared.clone(), id, *epoch);
                handle.send(effect, context);
                self.guests.insert(id, handle);
            }
            _ => match self.guests.get(&id) {
                Some(handle) => handle.send(effect, context),
                None => tracing::error!(instance = %id, ?effect, "no guest to do this with"),
            },
        }
    }

    fn process(&self, id: InstanceId) -> Option<(u32, bool)> {
        self.guests.get(&id)?.process()
    }

    fn accelerator(&self) -> &Choice {
        &self.accelerator
    }
}
