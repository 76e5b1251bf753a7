//! The guest, its disks and their servers.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use serde_json::json;
use tempfile::TempDir;

use super::contender::Contender;
use super::inside::{ANSWER, Order, parse_answer};
use super::{Plan, Used};
use crate::block::contender::Medium;
use crate::block::file::DataFile;
use crate::block::load::Load;
use crate::machine;
use crate::process::{self, Background, cpu_seconds};

/// An emulated processor on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// PCI slots of the disks; those below are the chipset's.
const FIRST_SLOT: u8 = 0x10;
const MEMORY: &str = "256M";

struct Disk {
    contender: Contender,
    server: Background,
    socket: PathBuf,
    data: DataFile,
}

pub struct Scene {
    qemu: Background,
    console: BufReader<UnixStream>,
    disks: Vec<Disk>,
    medium: Medium,
    /// Holds the console's socket.
    _folder: TempDir,
}

impl Scene {
    pub fn build(plan: &Plan, medium: Medium, contenders: &[Contender]) -> anyhow::Result<Self> {
        let image = image()?;
        let mut disks = Vec::new();
        for &contender in contenders {
            let data = DataFile::create(&plan.directory, plan.size_mib)?;
            let (server, socket) = contender.serve(medium, data.path())?;
            disks.push(Disk { contender, server, socket, data });
        }
        let folder = tempfile::tempdir()?;
        let console = folder.path().join("console");
        let qemu = Background::start(qemu(&image, &console, &disks))?;
        let console = connect(&console).context("guest: its console")?;
        let console = BufReader::new(console);
        let mut scene = Self { qemu, console, disks, medium, _folder: folder };
        while scene.line()?.trim() != format!("{ANSWER}ready") {}
        Ok(scene)
    }

    fn line(&mut self) -> anyhow::Result<String> {
        let mut line = String::new();
        let read = self.console.read_line(&mut line);
        if let Some(epitaph) = self.qemu.epitaph()? {
            anyhow::bail!(epitaph);
        }
        anyhow::ensure!(read.context("guest: silent")? > 0, "guest: its console has ended");
        Ok(line)
    }

    /// Has the guest load the disk at this place of the contenders' list.
    pub fn load(&mut self, place: usize, load: Load, duration: Duration) -> anyhow::Result<Used> {
        let disk = &self.disks[place];
        match self.medium {
            Medium::Disk => disk.data.cool()?,
            Medium::PageCache => disk.data.warm()?,
        }
        let order = Order { slot: FIRST_SLOT + place as u8, load, duration };
        let (server, qemu) = (disk.server.id(), self.qemu.id());
        let before = (cpu_seconds(server)?, cpu_seconds(qemu)?);
        writeln!(self.console.get_mut(), "{}", order.text())?;
        let done = loop {
            let line = self.line()?;
            if let Some(done) = parse_answer(&line) {
                break done.with_context(|| self.disks[place].contender.to_string())?;
            }
        };
        Ok(Used {
            done,
            server_seconds: cpu_seconds(server)? - before.0,
            qemu_seconds: cpu_seconds(qemu)? - before.1,
        })
    }
}

fn connect(path: &Path) -> anyhow::Result<UnixStream> {
    let mut waited = Duration::ZERO;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => {
                stream.set_read_timeout(Some(PATIENCE))?;
                return Ok(stream);
            }
            Err(error) if waited >= PATIENCE => return Err(error.into()),
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
        waited += LOOK_EVERY;
    }
}

/// The disks are as the agent makes them: no thread of their own in QEMU, nothing cached.
fn qemu((kernel, initrd): &(PathBuf, PathBuf), console: &Path, disks: &[Disk]) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command
        .args(["-accel", "tcg", "-machine", "q35,memory-backend=m", "-m", MEMORY, "-smp", "1"])
        .args(["-object", &format!("memory-backend-memfd,id=m,size={MEMORY},share=on")])
        .args(["-nodefaults", "-no-reboot", "-display", "none", "-serial", "chardev:tty"])
        .args(["-append", "console=ttyS0 panic=-1 quiet loglevel=0 tsc=reliable no_timer_check"])
        .arg("-chardev")
        .arg(format!("socket,id=tty,path={},server=on,wait=on", console.display()));
    command.arg("-kernel").arg(kernel).arg("-initrd").arg(initrd);
    for (place, disk) in disks.iter().enumerate() {
        let (slot, socket) = (FIRST_SLOT + place as u8, disk.socket.display());
        if disk.contender.is_vhost_user() {
            command.args(["-chardev", &format!("socket,id=c{place},path={socket},reconnect=1")]);
            command.args([
                "-device",
                &format!("vhost-user-blk-pci,chardev=c{place},num-queues=1,addr={slot:#x}"),
            ]);
        } else {
            let node = json!({
                "driver": "nbd",
                "node-name": format!("n{place}"),
                "server": { "type": "unix", "path": disk.socket },
                "export": "",
                "cache": { "direct": true, "no-flush": false },
            });
            command.args(["-blockdev", &node.to_string()]);
            command.args(["-device", &format!("virtio-blk-pci,drive=n{place},addr={slot:#x}")]);
        }
    }
    command
}

/// Kernel and initrd, made beside this program.
fn image() -> anyhow::Result<(PathBuf, PathBuf)> {
    let own = machine::own_folder()?;
    let folder = own.join("block-guest");
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut make = Command::new("sh");
    make.arg(source.join("../tests/guest/make.sh")).arg(&folder);
    make.arg(source.join("guest/load.sh")).arg(own.join("guest-load"));
    make.arg("virtio_pci virtio_blk");
    process::output(make.stderr(Stdio::piped())).context("guest: make its image")?;
    Ok((folder.join("vmlinuz"), folder.join("initrd")))
}
