//! Where a server listens.

use std::fmt;
use std::fs::File;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::certificates::Certificates;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    Unix,
    Tcp,
    /// TCP, and TLS with certificates on both sides.
    Tls,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    Unix(PathBuf),
    Tcp(u16),
    Tls(u16, Certificates),
}

impl Address {
    /// A socket beside the file, or a port that is free now.
    pub fn choose(transport: Transport, file: &Path) -> anyhow::Result<Self> {
        Ok(match transport {
            Transport::Unix => {
                let socket = file.with_extension("sock");
                if socket.exists() {
                    std::fs::remove_file(&socket)?;
                }
                Self::Unix(socket)
            }
            Transport::Tcp => Self::Tcp(free_port()?),
            Transport::Tls => Self::Tls(free_port()?, Certificates::beside(file)?),
        })
    }

    pub fn uri(&self) -> String {
        match self {
            Self::Unix(socket) => format!("nbd+unix:///?socket={}", socket.display()),
            Self::Tcp(port) => format!("nbd://127.0.0.1:{port}/"),
            // By the name that is in the server's certificate.
            Self::Tls(port, _) => format!("nbds://localhost:{port}/"),
        }
    }

    /// A socket is read and written as a file is.
    pub fn connect(&self) -> anyhow::Result<File> {
        let socket = match self {
            Self::Unix(path) => UnixStream::connect(path).map(OwnedFd::from),
            Self::Tcp(port) | Self::Tls(port, _) => {
                TcpStream::connect((Ipv4Addr::LOCALHOST, *port))
                    .and_then(|s| s.set_nodelay(true).map(|()| s.into()))
            }
        };
        socket.map(File::from).with_context(|| format!("{}: connect", self.uri()))
    }

    pub fn listens(&self) -> bool {
        self.connect().is_ok()
    }
}

fn free_port() -> anyhow::Result<u16> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?.port())
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unix => "unix socket",
            Self::Tcp => "TCP on loopback",
            Self::Tls => "TLS on loopback",
        })
    }
}
