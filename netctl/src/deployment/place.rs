//! Which deployment a command speaks of, and where its own files are.

use std::path::PathBuf;

use clap::Args;
use rpc::Deployment;

use crate::failure::{Failure, Outcome};

pub const DEFAULT_NAME: &str = "hp";

/// Selects the deployment; several may stand side by side.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Deployment")]
pub struct Place {
    /// Name of the deployment; devices, namespaces and pins are named after it
    // Nouns have names of their own, and clap knows an argument by its id alone.
    #[arg(id = "deployment_name", long = "name", value_name = "NAME", global = true, env = "HOSTPLANE_NAME", default_value = DEFAULT_NAME, hide_env_values = true)]
    pub name: String,

    /// What outlives a reboot: volumes, images, records [default: /var/lib/hostplane, or /var/lib/hostplane-NAME]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "HOSTPLANE_STATE_DIR",
        hide_env_values = true
    )]
    pub state_dir: Option<PathBuf>,

    /// Sockets, pid files and logs [default: /run/hostplane, or /run/hostplane-NAME]
    #[arg(
        long,
        global = true,
        value_name = "DIR",
        env = "HOSTPLANE_RUN_DIR",
        hide_env_values = true
    )]
    pub run_dir: Option<PathBuf>,
}

impl Place {
    pub fn deployment(&self) -> Outcome<Deployment> {
        let under = |parent: &str| {
            PathBuf::from(if self.name == DEFAULT_NAME {
                format!("{parent}/hostplane")
            } else {
                format!("{parent}/hostplane-{}", self.name)
            })
        };
        let absolute = |dir: &Option<PathBuf>, parent: &str| {
            let dir = dir.clone().unwrap_or_else(|| under(parent));
            std::path::absolute(&dir)
                .map_err(|e| Failure::unfit(format!("directory `{}`: {e}", dir.display())))
        };
        Deployment::new(
            &self.name,
            absolute(&self.state_dir, "/var/lib")?,
            absolute(&self.run_dir, "/run")?,
        )
        .map_err(|e| Failure::unfit(e.message))
    }

    /// The options that select the same deployment again, for advice to the user.
    pub fn as_options(&self) -> String {
        let mut options = String::new();
        if self.name != DEFAULT_NAME {
            options.push_str(&format!(" --name {}", self.name));
        }
        if let Some(dir) = &self.state_dir {
            options.push_str(&format!(" --state-dir {}", dir.display()));
        }
        if let Some(dir) = &self.run_dir {
            options.push_str(&format!(" --run-dir {}", dir.display()));
        }
        options
    }
}

/// The four daemons, in the order in which they are started; they are stopped
/// the other way round.
pub const DAEMONS: [&str; 4] = ["block-server", "dataplane", "control", "agent"];

/// Files of ours under the run directory.
pub trait Files {
    fn config_file(&self) -> PathBuf;
    fn status_file(&self) -> PathBuf;
    fn pid_file(&self, process: &str) -> PathBuf;
    fn state_marker(&self) -> PathBuf;
}

impl Files for Deployment {
    /// Its presence says that the run directory is ours.
    fn config_file(&self) -> PathBuf {
        self.run_dir().join("deployment.json")
    }

    fn status_file(&self) -> PathBuf {
        self.run_dir().join("supervisor.json")
    }

    fn pid_file(&self, process: &str) -> PathBuf {
        self.run_dir().join("pids").join(format!("{process}.json"))
    }

    /// Its presence says that the state directory is ours; it remembers the
    /// uplink's subnet, so that elastic addresses keep their range.
    fn state_marker(&self) -> PathBuf {
        self.state_dir().join("hostplane.json")
    }
}
