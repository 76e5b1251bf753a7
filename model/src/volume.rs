//! The life of a volume and of its attachment to an instance, as EC2 names it.
//!
//! ```text
//!   ──▶ creating ──▶ available ◀──▶ in-use         attaching ──▶ attached ──▶ detaching ──▶ (gone)
//!           │            │                              └────────────────────────▲
//!           v            v
//!         error       deleting ──▶ (gone)
//! ```

use std::fmt;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    Creating,
    Available,
    InUse,
    Deleting,
    Error,
}

impl VolumeState {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Creating => "creating",
            Self::Available => "available",
            Self::InUse => "in-use",
            Self::Deleting => "deleting",
            Self::Error => "error",
        }
    }

    /// A root volume is bound to its instance before its data is there, so
    /// `creating` may lead straight to `in-use`.
    pub const fn may_become(self, next: Self) -> bool {
        use VolumeState::{Available, Creating, Deleting, Error, InUse};
        matches!(
            (self, next),
            (Creating, Available | InUse | Error | Deleting)
                | (Available, InUse | Deleting | Error)
                | (InUse, Available | Error)
                | (Error, Deleting)
        )
    }
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AttachmentState {
    Attaching,
    Attached,
    Detaching,
}

impl AttachmentState {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Attaching => "attaching",
            Self::Attached => "attached",
            Self::Detaching => "detaching",
        }
    }
}

impl fmt::Display for AttachmentState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_in_use_is_never_deleted() {
        assert!(!VolumeState::InUse.may_become(VolumeState::Deleting));
    }
}
