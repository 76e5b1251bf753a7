//! Sockets that listen.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

#[derive(Debug, thiserror::Error)]
#[error("socket {}: {deed}: {cause}", path.display())]
pub struct Error {
    path: PathBuf,
    deed: &'static str,
    cause: io::Error,
}

/// Listens at `path`, in place of whatever a dead server left there. The file is
/// made under another name and moved, so that a client finds a socket that
/// listens or none. Its mode lets in our own user and `owner` only.
pub fn listen(path: &Path, owner: Option<u32>) -> Result<OwnedFd, Error> {
    let failed = |deed| move |cause| Error { path: path.to_owned(), deed, cause };
    let mut pending = path.as_os_str().to_owned();
    pending.push(".new");
    let pending = PathBuf::from(pending);
    match std::fs::remove_file(&pending) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            return Err(failed("remove the old one")(cause));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&pending).map_err(failed("bind"))?;
    std::fs::set_permissions(&pending, std::fs::Permissions::from_mode(0o600))
        .map_err(failed("set its mode"))?;
    set_owner(&pending, owner)?;
    std::fs::rename(&pending, path).map_err(failed("move into place"))?;
    Ok(listener.into())
}

/// Lets in `owner` beside root; `None` leaves the socket to our own user.
pub fn set_owner(path: &Path, owner: Option<u32>) -> Result<(), Error> {
    let uid = owner.unwrap_or_else(|| rustix::process::getuid().as_raw());
    let failed = |cause| Error { path: path.to_owned(), deed: "give it to its user", cause };
    chown(path, Some(uid), None).map_err(failed)
}

/// Listening sockets that whoever started us passes on (sd_listen_fds(3)):
/// systemd, or libnbd's socket activation.
pub fn inherited() -> Vec<OwnedFd> {
    const FIRST: i32 = 3;
    let number = |name| std::env::var(name).ok()?.parse::<u32>().ok();
    if number("LISTEN_PID") != Some(std::process::id()) {
        return Vec::new();
    }
    let count = number("LISTEN_FDS").map_or(0, |count| count.min(64) as i32);
    (FIRST..FIRST + count)
        // SAFETY: by that protocol these descriptors are open and ours; they are
        // taken once, at start, before anything else could have used the numbers.
        .map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
        .collect()
}

/// The kernel takes a killed server's ring down after its process, and with it the
/// sockets that it listened at: so long a successor waits for the address.
const FREED_WITHIN: Duration = Duration::from_secs(5);

/// A TCP socket that listens.
#[expect(
    clippy::disallowed_methods,
    reason = "a socket's address is the system's, and is waited for"
)]
pub fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let start = Instant::now();
    loop {
        match TcpListener::bind(address) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse && start.elapsed() < FREED_WITHIN =>
            {
                std::thread::sleep(Duration::from_millis(20));
            }
            bound => return bound,
        }
    }
}
