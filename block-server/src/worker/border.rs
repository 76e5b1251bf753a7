//! Where the worlds meet: what an NBD command is to a volume, what an errno is to
//! a client, who may come in, and what an operator hears.

use std::os::fd::OwnedFd;

use super::{Access, Served, Slots, Volume};
use crate::nbd;
use crate::socket;
use crate::tls::Names;
use crate::vhost::block::{Disk, QUEUES_MAX, id_of};
use crate::volume::{Core, Geometry, Kind, Trouble};

/// The exports of one socket, without those whose writer is fenced.
pub(super) struct View<'a> {
    pub exports: &'a [Served],
    pub volumes: &'a Slots<Volume>,
    /// Who the peer is, where TLS told.
    pub names: Option<&'a Names>,
}

impl View<'_> {
    fn is_open(&self, served: &Served) -> bool {
        let is_allowed = served
            .clients
            .as_ref()
            .is_none_or(|allowed| self.names.is_some_and(|names| names.any_of(allowed)));
        is_allowed && self.is_current(served)
    }

    fn is_current(&self, served: &Served) -> bool {
        // Elsewhere its home judges, as it does for each request.
        served.home.is_some()
            || self.volumes.get(served.volume).is_some_and(|v| lawful_writer(served, &v.core))
    }
}

impl nbd::Exports for View<'_> {
    fn find(&self, name: &str) -> Option<nbd::Export> {
        let at = if name.is_empty() {
            0
        } else {
            self.exports.iter().position(|served| served.name == name)?
        };
        let served = self.exports.get(at)?;
        if !self.is_open(served) {
            if let Some(names) = self.names {
                tracing::warn!("export {name:?}: refused to the certificate of {names}");
            }
            return None;
        }
        Some(nbd::Export {
            size: served.size,
            read_only: served.read_only,
            description: served.description.clone(),
            block_min: crate::BLOCK_MIN,
            key: at as u64,
        })
    }

    fn list(&self) -> Vec<(String, String)> {
        let open = self.exports.iter().filter(|served| self.is_open(served));
        open.map(|served| (served.name.clone(), served.description.clone())).collect()
    }
}

/// Whether whoever comes by this export is no fenced writer.
pub(super) fn lawful_writer(served: &Served, core: &Core) -> bool {
    served.read_only || served.generation >= core.generation()
}

/// The disk that a guest is shown.
pub(super) fn guest_disk(served: &Served, core: &Core, name: &str) -> Disk {
    Disk {
        geometry: Geometry { size: served.size, ..core.geometry() },
        read_only: served.read_only,
        queues: QUEUES_MAX,
        id: id_of(name),
    }
}

pub(super) fn kind_of(command: nbd::Command) -> Kind {
    match command {
        nbd::Command::Read => Kind::Read,
        nbd::Command::Write => Kind::Write,
        nbd::Command::Flush => Kind::Flush,
        nbd::Command::Trim => Kind::Trim,
        nbd::Command::Cache => Kind::Prefetch,
        nbd::Command::WriteZeroes { hole, fast } => Kind::Zero { hole, fast },
        nbd::Command::BlockStatus { .. } => Kind::Extents,
    }
}

pub(super) fn error_of(errno: i32) -> nbd::Error {
    match errno {
        libc::EPERM => nbd::Error::Perm,
        libc::ENOMEM => nbd::Error::NoMemory,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => nbd::Error::NoSpace,
        libc::EOPNOTSUPP => nbd::Error::NotSupported,
        _ => nbd::Error::Io,
    }
}

pub(super) fn report(volume: &str, trouble: &Trouble) {
    match trouble {
        Trouble::Refused { deed, offset, length, errno } => {
            let cause = std::io::Error::from_raw_os_error(*errno);
            tracing::warn!("volume {volume}: {deed} {length} bytes at {offset}: {cause}");
        }
        Trouble::Failed { reason } => {
            tracing::error!("volume {volume}: stopped, to keep what is there: {reason}");
        }
    }
}

pub(super) fn admits(access: &Access, socket: &OwnedFd) -> bool {
    let Access::Users(users) = access else { return true };
    match rustix::net::sockopt::socket_peercred(socket) {
        Ok(peer) => {
            let (uid, own) = (peer.uid.as_raw(), rustix::process::getuid().as_raw());
            let lawful = uid == 0 || uid == own || users.contains(&uid);
            if !lawful {
                let (place, pid) = (place_of(socket), peer.pid.as_raw_nonzero());
                tracing::warn!(
                    "refused user {uid} (process {pid}) at {place}: root, our own user {own} and \
                     {users:?} may connect"
                );
            }
            lawful
        }
        Err(error) => {
            tracing::warn!(%error, "refused a peer without credentials");
            false
        }
    }
}

/// Where a unix socket was bound; it may have been moved into its place since.
fn place_of(socket: &OwnedFd) -> String {
    let name = rustix::net::getsockname(socket).ok().and_then(|any| {
        let unix = rustix::net::SocketAddrUnix::try_from(any).ok()?;
        Some(unix.path()?.to_string_lossy().into_owned())
    });
    let name = name.unwrap_or_else(|| "its socket".to_owned());
    name.strip_suffix(socket::PENDING).unwrap_or(&name).to_owned()
}

/// Replies are gathered by us; the kernel must not wait for more. A unix socket
/// has no such thing, which is no error.
pub(super) fn set_no_delay(socket: &OwnedFd) {
    let _ = rustix::net::sockopt::set_tcp_nodelay(socket, true);
}
