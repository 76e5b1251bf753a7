//! By which front of the block server disks are reached, and what QEMU can.
//!
//! ```text
//!   --block-front   QEMU has the device   memory    a disk is
//!   nbd             –                     private   nbd
//!   auto            no                    private   nbd
//!   auto            yes                   shared    vhost-user, nbd where that fails
//!   vhost-user      yes                   shared    vhost-user, or it is not attached
//!   vhost-user      no                    –         refused at the agent's start
//! ```

use std::process::Command;

use super::PROGRAM;
use super::arguments::VHOST_USER_DEVICE;

/// What the operator asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum BlockFront {
    /// vhost-user where QEMU has it, NBD otherwise.
    #[default]
    Auto,
    Nbd,
    /// vhost-user, and an error where it cannot be.
    VhostUser,
}

/// What the QEMU of this host can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Abilities {
    pub has_vhost_user: bool,
    /// `reconnect-ms` (QEMU 9.2) in the place of `reconnect`, which it removes later.
    pub reconnects_in_ms: bool,
}

impl Abilities {
    /// The option by which a socket is connected anew, and its value for a second.
    pub const fn reconnect(self) -> (&'static str, u32) {
        if self.reconnects_in_ms { ("reconnect-ms", 1000) } else { ("reconnect", 1) }
    }

    /// Asks QEMU. One that cannot be asked can nothing; what runs it says why.
    pub fn probe() -> Self {
        let said = |arguments: &[&str]| {
            let output = Command::new(PROGRAM).args(arguments).output();
            output.map_or_else(
                |_| String::new(),
                |output| String::from_utf8_lossy(&output.stdout).into_owned(),
            )
        };
        Self {
            has_vhost_user: said(&["-device", "help"]).contains(VHOST_USER_DEVICE),
            reconnects_in_ms: version(&said(&["--version"])).is_some_and(|v| v >= (9, 2)),
        }
    }
}

fn version(said: &str) -> Option<(u32, u32)> {
    let mut numbers = said.split("version ").nth(1)?.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

/// How guests of this agent get their disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Fronts {
    pub asked: BlockFront,
    pub abilities: Abilities,
}

impl Fronts {
    /// What was asked for, with what this host's QEMU can; or why that cannot be.
    pub fn choose(asked: BlockFront, abilities: Abilities) -> Result<Self, String> {
        if asked == BlockFront::VhostUser && !abilities.has_vhost_user {
            return Err(format!(
                "block front vhost-user: {PROGRAM} has no device {VHOST_USER_DEVICE}; \
                 use --block-front auto or nbd"
            ));
        }
        Ok(Self { asked, abilities })
    }

    /// Whether guests are started with memory that the block server may map.
    pub const fn share_memory(self) -> bool {
        self.abilities.has_vhost_user && !matches!(self.asked, BlockFront::Nbd)
    }

    /// Whether a disk that cannot be on vhost-user is attached by NBD.
    pub const fn may_fall_back(self) -> bool {
        !matches!(self.asked, BlockFront::VhostUser)
    }

    pub fn describe(self) -> &'static str {
        match (self.asked, self.share_memory()) {
            (BlockFront::Nbd, _) => "nbd, as asked",
            (_, true) => "vhost-user",
            (_, false) => "nbd: QEMU has no vhost-user-blk-pci",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vhost_user_is_taken_where_it_can_be_and_demanded_only_where_it_is() {
        let able = Abilities { has_vhost_user: true, reconnects_in_ms: false };
        let unable = Abilities::default();
        let shares = |asked, abilities| Fronts::choose(asked, abilities).unwrap().share_memory();
        assert!(shares(BlockFront::Auto, able));
        assert!(!shares(BlockFront::Auto, unable));
        assert!(!shares(BlockFront::Nbd, able));
        assert!(shares(BlockFront::VhostUser, able));
        assert!(Fronts::choose(BlockFront::VhostUser, unable).is_err());
        assert!(!Fronts::choose(BlockFront::VhostUser, able).unwrap().may_fall_back());
    }

    #[test]
    fn qemu_s_version_is_read_however_it_is_packaged() {
        assert_eq!(version("QEMU emulator version 7.2.15 (Debian 1:7.2)"), Some((7, 2)));
        assert_eq!(version("QEMU emulator version 10.0.2"), Some((10, 0)));
        assert_eq!(version(""), None);
    }
}
