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

use std::path::Path;
use std::process::Command;

use model::VolumeId;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::arguments::{Front, VHOST_USER_DEVICE};
use super::{PROGRAM, Sockets};

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

/// Says on which front a disk is that could not be on the better one, and why.
pub fn say_fallback(volume: VolumeId, reason: &str) {
    tracing::info!(%volume, reason, "attached by NBD");
}

/// Where the disk may be reached by vhost-user; or why it cannot be.
pub fn vhost_user_socket(sockets: &Sockets) -> Result<&Path, String> {
    let socket = sockets.vhost_user.as_ref();
    let socket = socket.ok_or("the block server offers no vhost-user socket")?;
    answers(socket)?;
    Ok(socket)
}

/// Whether somebody takes connections there. QEMU would wait for it, deaf to
/// everybody, until somebody does.
fn answers(path: &Path) -> Result<(), String> {
    let attempt = || {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        connect(&socket, &SocketAddrUnix::new(path)?)
    };
    attempt().map_err(|error| format!("{}: connect: {error}", path.display()))
}

impl Fronts {
    /// Of a disk that a guest starts with. Where nobody answers by either front the
    /// block server is on its way, and QEMU waits for it.
    pub fn at_start(self, volume: VolumeId, sockets: &Sockets) -> Result<Front, String> {
        if !self.share_memory() {
            return Ok(Front::Nbd(sockets.nbd.clone()));
        }
        match (vhost_user_socket(sockets), &sockets.vhost_user) {
            (Ok(socket), _) => Ok(Front::VhostUser(socket.to_owned())),
            (Err(reason), _) if self.may_fall_back() && answers(&sockets.nbd).is_ok() => {
                say_fallback(volume, &reason);
                Ok(Front::Nbd(sockets.nbd.clone()))
            }
            (Err(_), Some(socket)) => Ok(Front::VhostUser(socket.clone())),
            (Err(_), None) if self.may_fall_back() => Ok(Front::Nbd(sockets.nbd.clone())),
            (Err(reason), None) => Err(format!("volume {volume}: {reason}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn a_guest_starts_on_the_front_that_answers_and_awaits_the_better_one_where_none_does() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let able = Abilities { has_vhost_user: true, reconnects_in_ms: false };
        let front = |asked, vhost_user: bool| {
            let vhost_user = vhost_user.then(|| at("vhost"));
            let sockets = Sockets { nbd: at("nbd"), vhost_user };
            let fronts = Fronts::choose(asked, able).unwrap();
            fronts.at_start(VolumeId::from_random(1), &sockets)
        };
        let (nbd, vhost) = (|| Ok(Front::Nbd(at("nbd"))), || Ok(Front::VhostUser(at("vhost"))));
        assert_eq!(front(BlockFront::Auto, true), vhost());
        assert_eq!(front(BlockFront::Auto, false), nbd());
        let _nbd = UnixListener::bind(at("nbd")).unwrap();
        assert_eq!(front(BlockFront::Auto, true), nbd());
        assert_eq!(front(BlockFront::VhostUser, true), vhost());
        assert!(front(BlockFront::VhostUser, false).unwrap_err().contains("no vhost-user socket"));
        // A socket whose server has died refuses; that is as if there were none.
        drop(UnixListener::bind(at("vhost")).unwrap());
        assert_eq!(front(BlockFront::Auto, true), nbd());
        std::fs::remove_file(at("vhost")).unwrap();
        let _vhost = UnixListener::bind(at("vhost")).unwrap();
        assert_eq!(front(BlockFront::Auto, true), vhost());
        assert_eq!(front(BlockFront::Nbd, true), nbd());
    }

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
