//! Who serves the file: ours, the peers, and nobody at all (fio on the file).

use std::fmt;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;

use crate::machine;
use crate::process::Background;

/// A server listens within milliseconds; one that does not within this long has failed.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);
const ASK_EVERY: Duration = Duration::from_millis(10);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Transport {
    Unix,
    Tcp,
}

/// In the order of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    RawFile,
    QemuUring,
    QemuNative,
    Nbdkit,
    Ours,
}

impl Contender {
    pub const ALL: [Self; 5] =
        [Self::RawFile, Self::QemuUring, Self::QemuNative, Self::Nbdkit, Self::Ours];

    /// Whether it is compared with ours: a server that goes to the disk as ours
    /// does. nbdkit's file plugin knows no O_DIRECT and serves from memory.
    pub fn is_peer(self) -> bool {
        matches!(self, Self::QemuUring | Self::QemuNative)
    }

    pub fn uses_page_cache(self) -> bool {
        self == Self::Nbdkit
    }

    /// Why it cannot take part, where it cannot.
    pub fn missing(self) -> Option<String> {
        let absent = |program: &str| {
            machine::version(program, "--version")
                .is_none()
                .then(|| format!("{program} is not installed"))
        };
        match self {
            Self::RawFile => None,
            Self::QemuUring | Self::QemuNative => absent("qemu-nbd"),
            Self::Nbdkit => absent("nbdkit"),
            Self::Ours => match machine::own_program("block-server") {
                None => {
                    Some("block-server is not built (HOSTPLANE_BIN_DIR names its folder)".into())
                }
                Some(_) => None,
            },
        }
    }

    /// Starts it on `file`; `None` where there is no server.
    pub fn serve(self, transport: Transport, file: &Path) -> anyhow::Result<Option<Server>> {
        let address = Address::choose(transport, file)?;
        let command = match self {
            Self::RawFile => return Ok(None),
            Self::QemuUring => qemu_nbd("io_uring", &address, file),
            Self::QemuNative => qemu_nbd("native", &address, file),
            Self::Nbdkit => nbdkit(&address, file),
            Self::Ours => ours(&address, file)?,
        };
        Server::start(command, address).map(Some)
    }
}

fn qemu_nbd(aio: &str, address: &Address, file: &Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    command.args(["--format=raw", "--persistent", "--cache=none"]).arg(format!("--aio={aio}"));
    match address {
        Address::Unix(socket) => command.arg("--socket").arg(socket),
        Address::Tcp(port) => command.arg("--bind=127.0.0.1").arg(format!("--port={port}")),
    };
    command.arg(file);
    command
}

fn nbdkit(address: &Address, file: &Path) -> Command {
    let mut command = Command::new("nbdkit");
    command.arg("--foreground");
    match address {
        Address::Unix(socket) => command.arg("--unix").arg(socket),
        Address::Tcp(port) => command.arg("--ipaddr=127.0.0.1").arg(format!("--port={port}")),
    };
    command.arg("file").arg(file);
    command
}

fn ours(address: &Address, file: &Path) -> anyhow::Result<Command> {
    let mut command = Command::new(machine::own_program("block-server").context("not built")?);
    command.arg("serve").arg("--file").arg(file);
    match address {
        Address::Unix(socket) => command.arg("--socket").arg(socket),
        Address::Tcp(port) => command.arg("--tcp").arg(format!("127.0.0.1:{port}")),
    };
    Ok(command)
}

#[derive(Debug)]
enum Address {
    Unix(PathBuf),
    Tcp(u16),
}

impl Address {
    /// A socket beside the file, or a port that is free now.
    fn choose(transport: Transport, file: &Path) -> anyhow::Result<Self> {
        Ok(match transport {
            Transport::Unix => {
                let socket = file.with_extension("sock");
                if socket.exists() {
                    std::fs::remove_file(&socket)?;
                }
                Self::Unix(socket)
            }
            Transport::Tcp => {
                let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
                Self::Tcp(listener.local_addr()?.port())
            }
        })
    }

    fn uri(&self) -> String {
        match self {
            Self::Unix(socket) => format!("nbd+unix:///?socket={}", socket.display()),
            Self::Tcp(port) => format!("nbd://127.0.0.1:{port}/"),
        }
    }

    fn listens(&self) -> bool {
        match self {
            Self::Unix(socket) => UnixStream::connect(socket).is_ok(),
            Self::Tcp(port) => TcpStream::connect((Ipv4Addr::LOCALHOST, *port)).is_ok(),
        }
    }
}

/// A server that listens. Dropping it ends it.
#[derive(Debug)]
pub struct Server {
    process: Background,
    uri: String,
}

impl Server {
    fn start(command: Command, address: Address) -> anyhow::Result<Self> {
        let mut process = Background::start(command)?;
        let mut waited = Duration::ZERO;
        while !address.listens() {
            if let Some(epitaph) = process.epitaph()? {
                anyhow::bail!(epitaph);
            }
            anyhow::ensure!(waited < LISTENS_WITHIN, "does not listen after {LISTENS_WITHIN:?}");
            std::thread::sleep(ASK_EVERY);
            waited += ASK_EVERY;
        }
        Ok(Self { process, uri: address.uri() })
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn uri(&self) -> &str {
        &self.uri
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unix => "unix socket",
            Self::Tcp => "TCP on loopback",
        })
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RawFile => "no server: fio, io_uring, O_DIRECT",
            Self::QemuUring => "qemu-nbd cache=none aio=io_uring",
            Self::QemuNative => "qemu-nbd cache=none aio=native",
            Self::Nbdkit => "nbdkit file (page cache) *",
            Self::Ours => "hostplane block-server",
        })
    }
}
