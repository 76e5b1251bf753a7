//! The dataplane alone: a file says what is to hold, a command puts it in force,
//! and the kernel goes on by itself.
//!
//! ```text
//!  check   FILE ─read─▶ Plan
//!  apply   FILE ─read─▶ Plan ─▶ difference ─▶ a daemon is alive? ask it : enforce here
//!  serve   FILE ─▶ the daemon, which also answers DHCP, ages flows, tells what it sees
//!  show    maps as pinned ─▶ text
//!  remove  everything of that name
//! ```
//! What may never be true: a half-read file changes anything.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use rpc::Deployment;
use rpc::dataplane::{Applied, Desired};
use serde::{Deserialize, Serialize};

use crate::apply::enforce;
use crate::device::Host;
use crate::{lock, record};

mod acl;
pub mod difference;
pub mod file;
mod list;
mod nat;
mod progress;
mod rate;
mod route;
mod rule;
mod services;
mod show;

use difference::{Line, difference, named};
use file::Plan;
use progress::Progress;
pub use show::{Shown, look};

/// What people call things, beside the desired state of ids.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Names {
    names: BTreeMap<String, String>,
}

/// Where a stand-alone deployment keeps its things.
#[derive(Debug, Clone, clap::Args)]
pub struct Folders {
    /// What must outlive a reboot [default: /var/lib/dataplane/NAME]
    #[arg(long)]
    pub state_dir: Option<PathBuf>,
    /// Sockets and locks; gone after a reboot [default: /run/dataplane/NAME]
    #[arg(long)]
    pub run_dir: Option<PathBuf>,
}

impl Folders {
    pub fn deployment(&self, name: &str) -> anyhow::Result<Deployment> {
        let under = |given: &Option<PathBuf>, root: &str| {
            given.clone().unwrap_or_else(|| Path::new(root).join(name))
        };
        let state = under(&self.state_dir, "/var/lib/dataplane");
        let run = under(&self.run_dir, "/run/dataplane");
        Ok(Deployment::new(name, state, run)?)
    }
}

/// Reads a file, or says what is wrong in it.
pub fn read(path: &Path) -> anyhow::Result<Plan> {
    let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
    file::read(&text).with_context(|| path.display().to_string())
}

/// What an application would do, or has done.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub deployment: String,
    pub difference: Vec<Line>,
    /// Devices that are named and not on this host.
    pub missing: Vec<String>,
    /// What it took in the kernel; `None` where nothing was tried.
    pub changes: Option<usize>,
}

impl Outcome {
    pub fn told(&self) -> String {
        let mut lines: Vec<String> = self.difference.iter().map(Line::to_string).collect();
        if self.difference.is_empty() {
            lines.push("nothing to change: the file says what was last applied".into());
        }
        for device in &self.missing {
            lines.push(format!("! device {device}: it is not on this host yet"));
        }
        lines.push(match self.changes {
            None => format!("{}: nothing was changed", self.deployment),
            Some(0) => format!("{}: in force as it was", self.deployment),
            Some(n) => format!("{}: in force, after {n} changes", self.deployment),
        });
        lines.join("\n")
    }
}

/// A plan beside what was last applied.
pub struct Prepared {
    pub outcome: Outcome,
    pub desired: Desired,
    /// Of this plan alone; while it is being applied both are on disk.
    names: Names,
    both: Names,
    place: PathBuf,
}

impl Prepared {
    pub fn new(plan: Plan, deployment: &Deployment) -> anyhow::Result<Self> {
        let accepted = accepted(deployment)?;
        let place = deployment.state_of("dataplane").join("names.json");
        let mut both = record::read::<Names>(&place)?.unwrap_or_default();
        both.names.extend(plan.names.clone());
        let mut desired = plan.desired;
        let difference = difference(&accepted, &desired, &both.names);
        let missing = Host::open(deployment)?.missing(&desired)?;
        desired.generation = accepted.generation;
        if desired != accepted || accepted.generation == 0 {
            desired.generation += 1;
        }
        let deployment = deployment.name().to_owned();
        let outcome = Outcome { deployment, difference, missing, changes: None };
        Ok(Self { outcome, desired, names: Names { names: plan.names }, both, place })
    }

    /// Called before the state is applied.
    pub fn begin(&self) -> anyhow::Result<()> {
        if let Some(device) = self.outcome.missing.first() {
            bail!("device {device}: it is not on this host: make it first, or use `tap`");
        }
        Ok(record::write(&self.place, &self.both)?)
    }

    /// Called after it.
    pub fn finish(mut self, applied: Applied) -> anyhow::Result<Outcome> {
        record::write(&self.place, &self.names)?;
        self.outcome.changes = Some(applied.changes);
        Ok(self.outcome)
    }
}

/// Puts a plan in force, or (`dry`) only says what that would change.
pub fn apply(plan: Plan, deployment: &Deployment, dry: bool) -> anyhow::Result<Outcome> {
    let prepared = Prepared::new(plan, deployment)?;
    if dry {
        return Ok(prepared.outcome);
    }
    lock::folders(deployment)?;
    prepared.begin()?;
    let applied = put_in_force(deployment, prepared.desired.clone())?;
    prepared.finish(applied)
}

pub fn accepted(deployment: &Deployment) -> anyhow::Result<Desired> {
    let place = deployment.state_of("dataplane").join("desired.json");
    Ok(record::read(&place)?.unwrap_or_default())
}

/// A daemon that is alive does it; else it is done here.
fn put_in_force(deployment: &Deployment, desired: Desired) -> anyhow::Result<Applied> {
    match lock::take(deployment)? {
        Some(_lock) => {
            let mut progress = Progress::default();
            Ok(enforce(deployment, desired, &mut |done, all| progress.tell(done, all))?)
        }
        None => {
            let client = rpc::Client::new(deployment.socket_of("dataplane"));
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(runtime.block_on(client.dataplane_apply(&desired))?)
        }
    }
}
