//! What the daemon gives up once it knows its folders: to write anywhere else,
//! to run programs, to speak TCP. A peer that finds a fault in us finds little.

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, RulesetError, RulesetStatus, path_beneath_rules,
};
use landlock::{Ruleset, RulesetAttr, RulesetCreatedAttr};

/// What is asked for; an older kernel gives the part that it knows.
const WANTED: ABI = ABI::V5;

/// Confines this thread and all that it starts; so it must be called before any
/// is. A volume's source may lie anywhere, and so may be read anywhere.
pub fn to_folders(folders: &[&Path]) -> Result<&'static str, RulesetError> {
    let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(WANTED))?
        .handle_access(AccessNet::from_all(WANTED))?
        .create()?
        .add_rules(path_beneath_rules(["/"], read))?
        .add_rules(path_beneath_rules(folders, AccessFs::from_all(WANTED)))?
        .restrict_self()?;
    Ok(match status.ruleset {
        RulesetStatus::FullyEnforced => "confined by landlock",
        RulesetStatus::PartiallyEnforced => "confined in part: this kernel's landlock is older",
        RulesetStatus::NotEnforced => "not confined: this kernel has no landlock",
    })
}
