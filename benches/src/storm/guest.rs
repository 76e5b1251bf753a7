//! A guest's own TCP, with the offloads that it has by default: through its elastic
//! address, and by plain routing over the same tap.
//!
//! ```text
//!   world            host                  QEMU
//!   eth0 ──veth── uplink0   tap0 ──virtio── eth0
//! ```

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use super::keeper::Host;
use super::now;
use super::scene::{FLOODED, GATEWAY, SPOKEN_PORT, inside, join, joined};
use crate::machine;
use crate::packet::namespace::Namespace;
use crate::packet::scene::ip;
use crate::packet::world::mac_text;
use crate::process::{self, Background};
use crate::statistic::Sample;

/// An emulated processor on a loaded machine.
const BOOT_PATIENCE: Duration = Duration::from_secs(120);
const LOOK_EVERY: Duration = Duration::from_millis(100);
const CONNECT_PATIENCE: Duration = Duration::from_secs(30);
/// Before a transfer is looked at, and how long it is.
const WARM_UP: Duration = Duration::from_millis(500);
const PIECE: usize = 256 * 1024;

/// MB/s of the transfers.
#[derive(Debug, Clone, Default)]
pub struct Carried {
    pub to_guest: Ways,
    pub from_guest: Ways,
}

#[derive(Debug, Clone, Default)]
pub struct Ways {
    pub plain: Sample,
    pub elastic: Sample,
}

struct Scene {
    world: Namespace,
    host: Namespace,
    guest: Background,
}

/// Each round carries both ways, plainly and through the elastic address.
pub fn carry(rounds: usize, length: Duration) -> anyhow::Result<Carried> {
    let scene = Scene::build()?;
    let mut carried = Carried::default();
    for round in 0..=rounds {
        let plain = both(&scene, FLOODED.address, length)?;
        let host = Host::ours(&scene.host, &[&FLOODED])?;
        let elastic = both(&scene, FLOODED.elastic, length)?;
        drop(host);
        eprintln!("a guest's TCP, round {round}: plain {plain:?}, elastic {elastic:?} MB/s");
        // The first warms up.
        if round > 0 {
            carried.to_guest.plain.push(plain.0);
            carried.to_guest.elastic.push(elastic.0);
            carried.from_guest.plain.push(plain.1);
            carried.from_guest.elastic.push(elastic.1);
        }
    }
    Ok(carried)
}

fn both(scene: &Scene, to: Ipv4Addr, length: Duration) -> anyhow::Result<(f64, f64)> {
    let into = joined(inside(&scene.world, move || give(connect(to, SPOKEN_PORT)?, length))?)?;
    let out = inside(&scene.world, move || take(connect(to, SPOKEN_PORT + 1)?, length))?;
    Ok((into, joined(out)?))
}

/// The guest listens for one connection after the other: the next may come too early.
fn connect(to: Ipv4Addr, port: u16) -> anyhow::Result<TcpStream> {
    let begun = now();
    loop {
        match TcpStream::connect_timeout(&(to, port).into(), CONNECT_PATIENCE) {
            Ok(stream) => return Ok(stream),
            Err(e) if begun.elapsed() > CONNECT_PATIENCE => {
                return Err(e).with_context(|| format!("guest: connect to {to}:{port}"));
            }
            Err(_) => std::thread::sleep(LOOK_EVERY),
        }
    }
}

fn give(mut stream: TcpStream, length: Duration) -> anyhow::Result<f64> {
    let piece = vec![0x5a; PIECE];
    measure(length, || stream.write(&piece).context("guest: send"))
}

fn take(mut stream: TcpStream, length: Duration) -> anyhow::Result<f64> {
    let mut piece = vec![0; PIECE];
    measure(length, || stream.read(&mut piece).context("guest: receive"))
}

/// MB/s, once it is under way.
fn measure(
    length: Duration,
    mut carry: impl FnMut() -> anyhow::Result<usize>,
) -> anyhow::Result<f64> {
    let begun = now();
    while begun.elapsed() < WARM_UP {
        carry()?;
    }
    let (begun, mut bytes) = (now(), 0);
    while begun.elapsed() < length {
        let count = carry()?;
        anyhow::ensure!(count > 0, "guest: it hung up");
        bytes += count;
    }
    Ok(bytes as f64 / 1e6 / begun.elapsed().as_secs_f64())
}

impl Scene {
    fn build() -> anyhow::Result<Self> {
        let (kernel, initrd) = image()?;
        let (world, host) = (Namespace::create()?, Namespace::create()?);
        join(&world, &host)?;
        let (tap, address, mac) = (FLOODED.device, FLOODED.address, mac_text(FLOODED.mac));
        let router_mac = mac_text(ebpf::GATEWAY_MAC);
        let console = tempfile::NamedTempFile::new().context("console: make")?;
        let mut qemu = Command::new("qemu-system-x86_64");
        qemu.args(["-accel", "tcg", "-m", "256", "-nodefaults", "-no-reboot", "-display", "none"])
            .arg("-kernel")
            .arg(kernel)
            .arg("-initrd")
            .arg(initrd)
            .arg("-append")
            .arg(format!(
                "console=ttyS0 panic=-1 quiet tsc=reliable no_timer_check \
                 address={address} router={GATEWAY} router_mac={router_mac}"
            ))
            .arg("-serial")
            .arg(format!("file:{}", console.path().display()))
            .arg("-netdev")
            .arg(format!("tap,id=n,ifname={tap},script=no,downscript=no,vhost=off"))
            .arg("-device")
            .arg(format!("virtio-net-pci,netdev=n,mac={mac},romfile="));
        let guest = host.within(|| {
            ip(&format!(
                "tuntap add name {tap} mode tap vnet_hdr\n\
                 link set dev {tap} address {router_mac} up\n\
                 neighbour add {address} lladdr {mac} dev {tap} nud permanent\n\
                 route add {address}/32 dev {tap}\n"
            ))?;
            Background::start(qemu)
        })?;
        let mut scene = Self { world, host, guest };
        scene.await_guest(console.path())?;
        Ok(scene)
    }

    fn await_guest(&mut self, console: &Path) -> anyhow::Result<()> {
        let begun = now();
        loop {
            let said = std::fs::read(console).unwrap_or_default();
            let said = String::from_utf8_lossy(&said);
            if said.contains("guest: ready") {
                return Ok(());
            }
            if let Some(epitaph) = self.guest.epitaph()? {
                anyhow::bail!("{epitaph}");
            }
            anyhow::ensure!(begun.elapsed() < BOOT_PATIENCE, "guest: not ready: {}", said.trim());
            std::thread::sleep(LOOK_EVERY);
        }
    }
}

/// Kernel and initrd, made beside this program.
fn image() -> anyhow::Result<(PathBuf, PathBuf)> {
    let folder = machine::own_folder()?.join("storm-guest");
    let source = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut make = Command::new("sh");
    make.arg(source.join("../tests/guest/make.sh")).arg(&folder);
    make.arg(source.join("guest/init.sh")).args(["", "virtio_pci virtio_net"]);
    process::output(make.stderr(Stdio::piped())).context("guest: make its image")?;
    Ok((folder.join("vmlinuz"), folder.join("initrd")))
}
