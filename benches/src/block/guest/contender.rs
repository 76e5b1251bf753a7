//! Whose server the guest's disk is served by, and by which front.

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context;

use crate::block::address::{Address, Transport};
use crate::block::contender::{self as over_nbd, Medium};
use crate::machine;
use crate::process::Background;

const LISTENS_WITHIN: Duration = Duration::from_secs(10);
const ASK_EVERY: Duration = Duration::from_millis(10);

/// In the order of the report: each front's peers, then ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    QemuNbd,
    Nbdkit,
    OursNbd,
    StorageDaemon,
    OursVhostUser,
}

impl Contender {
    pub fn of(medium: Medium) -> &'static [Self] {
        use Contender::{Nbdkit, OursNbd, OursVhostUser, QemuNbd, StorageDaemon};
        match medium {
            // nbdkit's file plugin knows no O_DIRECT.
            Medium::Disk => &[QemuNbd, OursNbd, StorageDaemon, OursVhostUser],
            Medium::PageCache => &[QemuNbd, Nbdkit, OursNbd, StorageDaemon, OursVhostUser],
        }
    }

    pub fn is_vhost_user(self) -> bool {
        matches!(self, Self::StorageDaemon | Self::OursVhostUser)
    }

    pub fn is_ours(self) -> bool {
        matches!(self, Self::OursNbd | Self::OursVhostUser)
    }

    /// Why it cannot take part, where it cannot.
    pub fn missing(self) -> Option<String> {
        let program = match self {
            Self::QemuNbd => "qemu-nbd",
            Self::Nbdkit => "nbdkit",
            Self::StorageDaemon => "qemu-storage-daemon",
            Self::OursNbd | Self::OursVhostUser => {
                return machine::own_program("block-server").is_none().then(|| {
                    "block-server is not built (HOSTPLANE_BIN_DIR names its folder)".into()
                });
            }
        };
        let absent = machine::version(program, "--version").is_none();
        absent.then(|| format!("{program} is not installed"))
    }

    /// Starts it on `file`; gives the server, and the socket at which it is.
    pub fn serve(self, medium: Medium, file: &Path) -> anyhow::Result<(Background, PathBuf)> {
        let address = Address::choose(Transport::Unix, file)?;
        let Address::Unix(socket) = &address else { unreachable!("a socket was asked for") };
        let command = match self {
            Self::QemuNbd => over_nbd::qemu_nbd("io_uring", medium, &address, file),
            Self::Nbdkit => over_nbd::nbdkit(&address, file),
            Self::OursNbd => ours("--socket", socket, medium, file)?,
            Self::OursVhostUser => ours("--vhost-user", socket, medium, file)?,
            Self::StorageDaemon => storage_daemon(socket, medium, file),
        };
        let mut server = Background::start(command)?;
        let mut waited = Duration::ZERO;
        // A vhost-user server is there for one guest: it is not tried.
        let is_there = || if self.is_vhost_user() { socket.exists() } else { address.listens() };
        while !is_there() {
            if let Some(epitaph) = server.epitaph()? {
                anyhow::bail!(epitaph);
            }
            anyhow::ensure!(waited < LISTENS_WITHIN, "{self}: does not listen");
            std::thread::sleep(ASK_EVERY);
            waited += ASK_EVERY;
        }
        Ok((server, socket.clone()))
    }
}

fn ours(front: &str, socket: &Path, medium: Medium, file: &Path) -> anyhow::Result<Command> {
    let mut command = Command::new(machine::own_program("block-server").context("not built")?);
    command.arg("serve").arg("--file").arg(file).arg(front).arg(socket);
    if medium == Medium::PageCache {
        command.args(["--cache", "writeback"]);
    }
    Ok(command)
}

fn storage_daemon(socket: &Path, medium: Medium, file: &Path) -> Command {
    let direct = match medium {
        Medium::Disk => "on",
        Medium::PageCache => "off",
    };
    let mut command = Command::new("qemu-storage-daemon");
    command.arg("--blockdev").arg(format!(
        "driver=file,node-name=f,filename={},cache.direct={direct},aio=io_uring",
        file.display()
    ));
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={},writable=on",
        socket.display()
    ));
    command
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::QemuNbd => "NBD: qemu-nbd aio=io_uring",
            Self::Nbdkit => "NBD: nbdkit file",
            Self::OursNbd => "NBD: hostplane block-server",
            Self::StorageDaemon => "vhost-user: qemu-storage-daemon",
            Self::OursVhostUser => "vhost-user: hostplane block-server",
        })
    }
}
