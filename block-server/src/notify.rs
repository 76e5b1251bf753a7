//! What systemd is told of a service: sd_notify(3), by a datagram to the socket that
//! it names. Opened before we confine ourselves, since that takes the name away.

use std::os::unix::net::UnixDatagram;

/// Where to tell it; without a service manager nothing is told.
#[derive(Debug, Default)]
pub struct Manager(Option<UnixDatagram>);

impl Manager {
    pub fn of_environment() -> Self {
        let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return Self::default() };
        let socket = UnixDatagram::unbound().and_then(|socket| {
            let name = path.to_string_lossy();
            match name.strip_prefix('@') {
                Some(hidden) => {
                    use std::os::linux::net::SocketAddrExt;
                    let hidden = hidden.as_bytes();
                    let address = std::os::unix::net::SocketAddr::from_abstract_name(hidden)?;
                    socket.connect_addr(&address)?;
                }
                None => socket.connect(&path)?,
            }
            Ok(socket)
        });
        if let Err(error) = &socket {
            tracing::warn!("cannot reach the service manager at {}: {error}", path.display());
        }
        Self(socket.ok())
    }

    fn tell(&self, text: &str) {
        if let Some(Err(error)) = self.0.as_ref().map(|socket| socket.send(text.as_bytes())) {
            tracing::warn!("cannot tell the service manager {text:?}: {error}");
        }
    }

    pub fn ready(&self) {
        self.tell("READY=1\nSTATUS=serving");
    }

    /// We are the service's main process from now on, in place of a predecessor.
    pub fn successor(&self) {
        self.tell(&format!("MAINPID={}", std::process::id()));
    }

    pub fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let us = now.tv_sec * 1_000_000 + now.tv_nsec / 1000;
        self.tell(&format!("RELOADING=1\nMONOTONIC_USEC={us}\nSTATUS=starting a successor"));
    }

    /// Nothing has changed: we serve on.
    pub fn not_reloaded(&self, why: &str) {
        let line = why.replace('\n', " ");
        self.tell(&format!("READY=1\nSTATUS=serving on; the reload failed: {line}"));
    }

    pub fn stopping(&self) {
        self.tell("STOPPING=1");
    }
}
