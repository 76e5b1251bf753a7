//! Sockets that listen.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// What is added to a socket's name until it listens.
pub const PENDING: &str = ".new";

#[derive(Debug, thiserror::Error)]
#[error("socket {}: {deed}: {cause}", path.display())]
pub struct Error {
    path: PathBuf,
    deed: &'static str,
    cause: io::Error,
}

/// Listens at `path`, in place of whatever a dead server left there. The file is
/// made under another name and moved, so that a client finds a socket that
/// listens or none. Its mode lets in our own user and a single one of `users` only;
/// several are told apart by the credentials of who connects.
pub fn listen(path: &Path, users: &[u32]) -> Result<OwnedFd, Error> {
    let failed = |deed| move |cause| Error { path: path.to_owned(), deed, cause };
    let mut pending = path.as_os_str().to_owned();
    pending.push(PENDING);
    let pending = PathBuf::from(pending);
    match std::fs::remove_file(&pending) {
        Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
            return Err(failed("remove the old one")(cause));
        }
        _ => {}
    }
    let listener = UnixListener::bind(&pending).map_err(failed("bind"))?;
    set_users(&pending, users)?;
    std::fs::rename(&pending, path).map_err(failed("move into place"))?;
    Ok(listener.into())
}

/// Lets them in beside root and ourselves, as far as a file's mode can tell.
pub fn set_users(path: &Path, users: &[u32]) -> Result<(), Error> {
    let (mode, uid) = match users {
        [] => (0o600, rustix::process::getuid().as_raw()),
        [user] => (0o600, *user),
        _ => (0o666, rustix::process::getuid().as_raw()),
    };
    let failed = |deed| move |cause| Error { path: path.to_owned(), deed, cause };
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))
        .map_err(failed("set its mode"))?;
    chown(path, Some(uid), None).map_err(failed("give it to its user"))
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
