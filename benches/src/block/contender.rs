//! Who serves the file: ours, the peers, and nobody at all (fio on the file).

use std::ffi::OsString;
use std::fmt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::Context;

use super::address::{Address, Transport};
use super::beside;
use crate::machine;
use crate::process::Background;

/// A server listens within milliseconds; one that does not within this long has failed.
const LISTENS_WITHIN: Duration = Duration::from_secs(10);
const ASK_EVERY: Duration = Duration::from_millis(10);

/// Where a server finds the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Medium {
    /// O_DIRECT, and nothing of the file in memory.
    Disk,
    /// All of the file in memory, served from there.
    PageCache,
}

/// In the order of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    RawFile,
    QemuUring,
    QemuNative,
    Nbdkit,
    /// Ours, with nobody beside the one who is measured.
    Alone,
    /// Another build of ours.
    Other,
    Ours,
}

impl Contender {
    /// Whether ours is compared with it.
    pub fn is_peer(self, medium: Medium) -> bool {
        match self {
            Self::QemuUring | Self::QemuNative | Self::Alone => true,
            // Its file plugin knows no O_DIRECT.
            Self::Nbdkit => medium == Medium::PageCache,
            Self::RawFile | Self::Other | Self::Ours => false,
        }
    }

    /// Why it cannot take part, where it cannot.
    pub fn missing(self) -> Option<String> {
        let absent = |program: &str| {
            machine::version(program, "--version")
                .is_none()
                .then(|| format!("{program} is not installed"))
        };
        match self {
            Self::RawFile | Self::Other => None,
            Self::QemuUring | Self::QemuNative => absent("qemu-nbd"),
            Self::Nbdkit => absent("nbdkit"),
            Self::Ours | Self::Alone => match machine::own_program("block-server") {
                None => {
                    Some("block-server is not built (HOSTPLANE_BIN_DIR names its folder)".into())
                }
                Some(_) => None,
            },
        }
    }

    /// Starts it on `file`; `None` where there is no server.
    pub fn serve(
        self,
        medium: Medium,
        transport: Transport,
        file: &Path,
        other: Option<&Path>,
    ) -> anyhow::Result<Option<Server>> {
        let address = Address::choose(transport, file)?;
        let command = match self {
            Self::RawFile => return Ok(None),
            Self::QemuUring => qemu_nbd("io_uring", medium, &address, file),
            Self::QemuNative => qemu_nbd("native", medium, &address, file),
            Self::Nbdkit => nbdkit(&address, file),
            Self::Ours | Self::Alone => {
                let program = machine::own_program("block-server").context("not built")?;
                ours(&program, medium, &address, file)
            }
            Self::Other => ours(other.context("no other build")?, medium, &address, file),
        };
        Server::start(command, address).map(Some)
    }
}

pub(super) fn qemu_nbd(aio: &str, medium: Medium, address: &Address, file: &Path) -> Command {
    let mut command = Command::new("qemu-nbd");
    let cache = match medium {
        Medium::Disk => "none",
        Medium::PageCache => "writeback",
    };
    // As many clients as connections, and the socket's test.
    command
        .args(["--format=raw", "--persistent", "--shared=8"])
        .arg(format!("--cache={cache}"))
        .arg(format!("--aio={aio}"));
    match address {
        Address::Unix(socket) => command.arg("--socket").arg(socket),
        Address::Tcp(port) | Address::Tls(port, _) => {
            command.arg("--bind=127.0.0.1").arg(format!("--port={port}"))
        }
    };
    if let Address::Tls(_, certificates) = address {
        let folder = certificates.folder();
        let credentials = "tls-creds-x509,id=tls,endpoint=server,verify-peer=yes,dir=";
        command.arg("--object").arg(format!("{credentials}{}", folder.display()));
        command.arg("--tls-creds=tls");
    }
    command.arg(file);
    command
}

pub(super) fn nbdkit(address: &Address, file: &Path) -> Command {
    let mut command = Command::new("nbdkit");
    command.arg("--foreground");
    match address {
        Address::Unix(socket) => command.arg("--unix").arg(socket),
        Address::Tcp(port) | Address::Tls(port, _) => {
            command.arg("--ipaddr=127.0.0.1").arg(format!("--port={port}"))
        }
    };
    if let Address::Tls(_, certificates) = address {
        let folder = certificates.folder();
        command.args(["--tls=require", "--tls-verify-peer"]);
        command.arg(format!("--tls-certificates={}", folder.display()));
    }
    command.arg("file").arg(file);
    command
}

fn ours(program: &Path, medium: Medium, address: &Address, file: &Path) -> Command {
    let mut command = Command::new(program);
    command.arg("serve").arg("--file").arg(file);
    // A volume of its own for who stands beside the one who is measured.
    let mut beside = OsString::from(beside::EXPORT);
    beside.push("=");
    beside.push(super::file::beside(file));
    command.arg("--export").arg(beside);
    if medium == Medium::PageCache {
        command.args(["--cache", "writeback"]);
    }
    match address {
        Address::Unix(socket) => command.arg("--socket").arg(socket),
        Address::Tcp(port) | Address::Tls(port, _) => {
            command.arg("--tcp").arg(format!("127.0.0.1:{port}"))
        }
    };
    if let Address::Tls(_, certificates) = address {
        command.arg("--tls-certificates").arg(certificates.folder());
    }
    command
}

/// A server that listens. Dropping it ends it.
#[derive(Debug)]
pub struct Server {
    process: Background,
    address: Address,
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
        Ok(Self { process, address })
    }

    pub fn id(&self) -> u32 {
        self.process.id()
    }

    pub fn address(&self) -> &Address {
        &self.address
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RawFile => "no server: fio on the file",
            Self::QemuUring => "qemu-nbd aio=io_uring",
            Self::QemuNative => "qemu-nbd aio=native",
            Self::Nbdkit => "nbdkit file",
            Self::Alone => "ours, nobody beside",
            Self::Ours => "hostplane block-server",
            Self::Other => "another build of ours",
        })
    }
}
