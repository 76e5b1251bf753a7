//! Serves an `axum` router on a unix socket to those whom the kernel vouches for.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use axum::Router;
use axum::extract::connect_info::Connected;
use axum::serve::{IncomingStream, Listener};
use tokio::net::unix::UCred;
use tokio::net::{UnixListener, UnixStream};

/// Who is at the other end of a connection, as the kernel tells (`SO_PEERCRED`).
#[derive(Debug, Clone, Copy)]
pub struct Peer {
    pub uid: u32,
    pub gid: u32,
    pub pid: Option<i32>,
}

impl From<UCred> for Peer {
    fn from(cred: UCred) -> Self {
        Self { uid: cred.uid(), gid: cred.gid(), pid: cred.pid() }
    }
}

/// A control socket: binds, replacing what a dead daemon left, and lets in only
/// root and the user that the daemon runs as.
#[derive(Debug)]
pub struct ControlListener {
    listener: UnixListener,
    path: PathBuf,
    own_uid: u32,
}

impl ControlListener {
    /// The socket file is made under another name and moved into place, so that
    /// a client finds either a socket that listens or none.
    pub fn bind(path: &Path) -> io::Result<Self> {
        let pending = path.with_extension("sock.new");
        match std::fs::remove_file(&pending) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let listener = UnixListener::bind(&pending)?;
        std::fs::set_permissions(&pending, std::fs::Permissions::from_mode(0o600))?;
        std::fs::rename(&pending, path)?;
        let own_uid = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(path)?);
        Ok(Self { listener, path: path.to_owned(), own_uid })
    }

    /// Serves at a socket that is listening already: one that another process
    /// handed on, or that will be handed on.
    pub fn adopt(socket: OwnedFd, path: &Path) -> io::Result<Self> {
        let listener = std::os::unix::net::UnixListener::from(socket);
        listener.set_nonblocking(true)?;
        let own_uid = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(path)?);
        Ok(Self { listener: UnixListener::from_std(listener)?, path: path.to_owned(), own_uid })
    }

    fn admits(&self, stream: &UnixStream) -> bool {
        match stream.peer_cred() {
            Ok(cred) if cred.uid() == 0 || cred.uid() == self.own_uid => true,
            Ok(cred) => {
                tracing::warn!(socket = %self.path.display(), uid = cred.uid(), "refused a stranger");
                false
            }
            Err(error) => {
                tracing::warn!(socket = %self.path.display(), %error, "refused a peer without credentials");
                false
            }
        }
    }
}

impl Listener for ControlListener {
    type Io = UnixStream;
    type Addr = Peer;

    async fn accept(&mut self) -> (UnixStream, Peer) {
        loop {
            match self.listener.accept().await {
                Ok((stream, _)) if self.admits(&stream) => {
                    if let Ok(cred) = stream.peer_cred() {
                        return (stream, cred.into());
                    }
                }
                Ok(_) => {}
                Err(error) => {
                    // Out of file descriptors, most likely: wait for some to come back.
                    tracing::error!(socket = %self.path.display(), %error, "cannot accept");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Peer> {
        Ok(Peer { uid: self.own_uid, gid: 0, pid: None })
    }
}

impl Connected<IncomingStream<'_, ControlListener>> for Peer {
    fn connect_info(stream: IncomingStream<'_, ControlListener>) -> Self {
        *stream.remote_addr()
    }
}

/// Serves `router` at `path` until the process ends or the future is dropped.
pub async fn serve(path: &Path, router: Router) -> io::Result<()> {
    let listener = ControlListener::bind(path)?;
    axum::serve(listener, router.into_make_service_with_connect_info::<Peer>()).await
}

#[cfg(test)]
mod tests {
    use axum::Json;
    use axum::routing::get;

    use super::*;
    use crate::{Client, Error, Kind};

    #[tokio::test]
    async fn a_client_reads_the_answer_and_the_error_that_the_server_gave() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.sock");
        let router = Router::new().route("/ok", get(|| async { Json(vec![1, 2, 3]) })).route(
            "/no",
            get(|| async { Error::conflict("volume vol-x: delete: it is attached") }),
        );
        let listener = ControlListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            axum::serve(listener, router.into_make_service_with_connect_info::<Peer>()).await
        });
        let client = Client::new(&path);
        assert_eq!(client.get::<Vec<u32>>("/ok").await.unwrap(), [1, 2, 3]);
        assert_eq!(client.get::<()>("/no").await.unwrap_err().kind, Kind::Conflict);
        assert_eq!(client.get::<()>("/else").await.unwrap_err().kind, Kind::Unavailable);
        server.abort();
    }

    #[tokio::test]
    async fn a_daemon_that_is_not_there_is_unavailable_and_named() {
        let error = Client::new("/nonexistent/x.sock").get::<()>("/").await.unwrap_err();
        assert_eq!(error.kind, Kind::Unavailable);
        assert!(error.message.contains("/nonexistent/x.sock"), "{error}");
    }
}
