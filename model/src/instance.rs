//! The life of an instance, as EC2 names it.
//!
//! ```text
//!            ┌────────── start ──────────┐
//!            v                           │
//!   ──▶ pending ──▶ running ──▶ stopping ──▶ stopped
//!            │         │            │           │
//!            └─────────┴── shutting-down ◀──────┘
//!                            │
//!                            v
//!                       terminated
//! ```
//! Source: EC2 user guide, "Instance lifecycle"; numbers from the API's
//! `InstanceState` (low byte).

use std::fmt;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InstanceState {
    Pending,
    Running,
    ShuttingDown,
    Terminated,
    Stopping,
    Stopped,
}

impl InstanceState {
    pub const ALL: [Self; 6] = [
        Self::Pending,
        Self::Running,
        Self::ShuttingDown,
        Self::Terminated,
        Self::Stopping,
        Self::Stopped,
    ];

    /// The number that the API shows beside the name.
    pub const fn code(self) -> u8 {
        match self {
            Self::Pending => 0,
            Self::Running => 16,
            Self::ShuttingDown => 32,
            Self::Terminated => 48,
            Self::Stopping => 64,
            Self::Stopped => 80,
        }
    }

    pub const fn name(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Running => "running",
            Self::ShuttingDown => "shutting-down",
            Self::Terminated => "terminated",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
        }
    }

    /// Whether an instance may go straight from `self` to `next`.
    ///
    /// A guest may power itself off while it boots or runs, so `stopped` follows
    /// from `pending` and `running` too; a failed boot ends in `terminated`
    /// by way of `shutting-down`.
    pub const fn may_become(self, next: Self) -> bool {
        use InstanceState::{Pending, Running, ShuttingDown, Stopped, Stopping, Terminated};
        matches!(
            (self, next),
            (Pending, Running | Stopping | Stopped | ShuttingDown)
                | (Running, Stopping | Stopped | ShuttingDown)
                | (Stopping, Stopped | ShuttingDown)
                | (Stopped, Pending | ShuttingDown)
                | (ShuttingDown, Terminated)
        )
    }
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_terminated_instance_never_comes_back() {
        for next in InstanceState::ALL {
            assert!(!InstanceState::Terminated.may_become(next));
        }
    }

    #[test]
    fn every_state_leads_to_terminated() {
        for start in InstanceState::ALL {
            let mut reached = vec![start];
            while let Some(next) = InstanceState::ALL
                .into_iter()
                .find(|n| !reached.contains(n) && reached.iter().any(|r| r.may_become(*n)))
            {
                reached.push(next);
            }
            assert!(reached.contains(&InstanceState::Terminated), "{start} is a dead end");
        }
    }

    #[test]
    fn a_state_is_written_as_the_api_names_it() {
        for state in InstanceState::ALL {
            assert_eq!(serde_json::to_string(&state).unwrap(), format!("\"{state}\""));
        }
    }
}
