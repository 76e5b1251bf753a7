//! What a guest is made of, and how QEMU (7.2 or newer) is told.
//!
//! ```text
//!   pcie.0 ─┬─ 02.0  virtio-net, one a function
//!           ├─ 03.0  virtio-balloon     04.0  virtio-rng
//!           └─ 10.0 … 17.7  root ports, a hot-plug slot each: a virtio-blk disk
//! ```
//! Slots are fixed when QEMU starts. ACPI hot-plug stays on (q35's own): native
//! PCIe hot-unplug takes six seconds.

use std::path::{Path, PathBuf};

use model::{InstanceId, Mac, VolumeId};
use serde_json::{Value, json};

use super::front::Abilities;

/// Hot-plug slots a guest has at most, whatever its type allows: each root port costs
/// the guest's firmware and kernel some milliseconds at boot, and 64 fill the eight
/// devices of `pcie.0` set aside for them.
pub const SLOTS_MAX: u32 = 32;

/// How long a guest's reads and writes wait for a block server that is away
/// before they fail. Long, because an I/O error ruins file systems and a guest
/// that waits does not.
pub const RECONNECT_DELAY_S: u32 = 3600;

/// Translated code kept by TCG; its default is 1 GiB a guest.
const TRANSLATION_CACHE_MIB: u32 = 128;

pub const VHOST_USER_DEVICE: &str = "vhost-user-blk-pci";

pub const SANDBOX: &str = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    Kvm,
    Tcg,
}

impl Accelerator {
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    pub fn arguments(self) -> Vec<String> {
        match self {
            Self::Kvm => args(["-accel", "kvm", "-cpu", "host"]),
            Self::Tcg => vec![
                "-accel".into(),
                format!("tcg,thread=multi,tb-size={TRANSLATION_CACHE_MIB}"),
                "-cpu".into(),
                "max".into(),
            ],
        }
    }
}

/// By which of an export's sockets a disk is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Front {
    Nbd(PathBuf),
    /// The guest's memory is shared with the block server.
    VhostUser(PathBuf),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub volume: VolumeId,
    pub front: Front,
    pub slot: u32,
    pub boot: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    pub id: InstanceId,
    pub accelerator: Accelerator,
    pub vcpus: u32,
    pub memory_mib: u64,
    pub interfaces: Vec<(String, Mac)>,
    pub disks: Vec<Disk>,
    pub slots: u32,
    /// Whether the memory is a file that the block server may map: without that
    /// no disk, now or later, can be on vhost-user.
    pub shares_memory: bool,
    pub abilities: Abilities,
    /// Kernel, initrd and command line, where the image brings them.
    pub kernel: Option<Kernel>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    pub image: PathBuf,
    pub initrd: PathBuf,
    pub command_line: String,
}

fn args<const N: usize>(list: [&str; N]) -> Vec<String> {
    list.map(str::to_owned).to_vec()
}

/// `ec2` and the instance's digits: cloud-init's Ec2 source looks for that beginning.
pub fn uuid(id: InstanceId) -> String {
    let all = format!("ec2{}000000000000", id.digits());
    format!("{}-{}-{}-{}-{}", &all[..8], &all[8..12], &all[12..16], &all[16..20], &all[20..])
}

/// The disk's serial as the guest sees it: the id without its hyphen, which is
/// exactly the 20 bytes that virtio allows (VIRTIO_BLK_ID_BYTES).
pub fn serial(volume: VolumeId) -> String {
    let serial = format!("vol{}", volume.digits());
    assert_eq!(serial.len(), 20, "a volume's serial must fit virtio");
    serial
}

/// QEMU's name for the disk as a device.
pub fn device_id(volume: VolumeId) -> String {
    format!("disk{}", volume.digits())
}

/// QEMU's name for the disk's content (a node has at most 31 bytes).
pub fn node_name(volume: VolumeId) -> String {
    format!("node{}", volume.digits())
}

/// QEMU's name for the connection to the disk's vhost-user socket.
pub fn channel_name(volume: VolumeId) -> String {
    format!("chan{}", volume.digits())
}

/// Reads a volume back from [`device_id`], [`node_name`] or [`channel_name`].
pub fn volume_of(name: &str) -> Option<VolumeId> {
    let digits = ["disk", "node", "chan"].iter().find_map(|kind| name.strip_prefix(kind))?;
    format!("{}{digits}", VolumeId::PREFIX).parse().ok()
}

fn slot_name(slot: u32) -> String {
    format!("slot{slot}")
}

/// Reads a slot back from the `parent_bus` of a device, `/machine/peripheral/slot3/slot3`.
pub fn slot_of(bus: &str) -> Option<u32> {
    bus.rsplit('/').next()?.strip_prefix("slot")?.parse().ok()
}

/// The body of `blockdev-add`; the same stands behind `-blockdev`.
pub fn block_node(volume: VolumeId, socket: &Path) -> Value {
    json!({
        "driver": "nbd",
        "node-name": node_name(volume),
        "server": { "type": "unix", "path": socket },
        "export": volume.to_string(),
        "reconnect-delay": RECONNECT_DELAY_S,
        "cache": { "direct": true, "no-flush": false },
        "discard": "unmap",
    })
}

/// The body of `chardev-add`: QEMU comes again every second when the block server
/// is away, and the guest waits meanwhile.
pub fn channel(volume: VolumeId, socket: &Path, abilities: Abilities) -> Value {
    let (option, pause) = abilities.reconnect();
    let address = json!({ "type": "unix", "data": { "path": socket } });
    json!({
        "id": channel_name(volume),
        "backend": { "type": "socket", "data": { "addr": address, "server": false, option: pause } },
    })
}

/// The same for `-chardev`. A comma in a path is doubled there.
fn channel_option(volume: VolumeId, socket: &Path, abilities: Abilities) -> String {
    let (option, pause) = abilities.reconnect();
    let path = socket.display().to_string().replace(',', ",,");
    format!("socket,id={},path={path},{option}={pause}", channel_name(volume))
}

/// The body of `device_add` for a disk on vhost-user. Its serial is told by the
/// block server.
pub fn guest_device(volume: VolumeId, slot: u32, boot: bool) -> Value {
    let mut device = json!({
        "driver": VHOST_USER_DEVICE,
        "id": device_id(volume),
        "chardev": channel_name(volume),
        "bus": slot_name(slot),
    });
    if boot {
        device["bootindex"] = json!(1);
    }
    device
}

/// The body of `device_add`; the same stands behind `-device`.
/// Errors go to the guest: it shall see them, not stand still for ever.
pub fn block_device(volume: VolumeId, slot: u32, boot: bool) -> Value {
    let mut device = json!({
        "driver": "virtio-blk-pci",
        "id": device_id(volume),
        "drive": node_name(volume),
        "serial": serial(volume),
        "bus": slot_name(slot),
        "werror": "report",
        "rerror": "report",
    });
    if boot {
        device["bootindex"] = json!(1);
    }
    device
}

/// The command line, with `@console@`, `@memory@`, `@qmp@`, `@serial@`, `@kernel@`,
/// `@initrd@` and `@tapN@` for files that the launcher opens.
pub fn command_line(guest: &Guest) -> Vec<String> {
    let uuid = uuid(guest.id);
    let mut line = vec!["-name".into(), format!("guest={},debug-threads=on", guest.id)];
    line.extend(machine(guest));
    line.extend(args(["-display", "none", "-no-shutdown", "-rtc", "base=utc"]));
    line.extend(args(["-global", "ICH9-LPC.disable_s3=1", "-global", "ICH9-LPC.disable_s4=1"]));
    line.extend(args(["-sandbox", SANDBOX]));
    line.extend(guest.accelerator.arguments());
    line.extend(["-smp".into(), format!("{},sockets=1", guest.vcpus)]);
    line.extend(["-uuid".into(), uuid.clone()]);
    line.extend([
        "-smbios".into(),
        format!("type=1,manufacturer=Hostplane,product=HVM,serial={uuid},uuid={uuid}"),
    ]);
    line.extend(control_channels());
    line.extend(network(guest));
    line.extend(args([
        "-device",
        "virtio-balloon-pci,addr=0x3,disable-legacy=on,free-page-reporting=on,deflate-on-oom=on",
    ]));
    line.extend(args(["-object", "rng-builtin,id=rng"]));
    line.extend(args(["-device", "virtio-rng-pci,addr=0x4,disable-legacy=on,rng=rng"]));
    for slot in 0..guest.slots.min(SLOTS_MAX) {
        line.extend(["-device".into(), root_port(slot)]);
    }
    for disk in &guest.disks {
        let (volume, slot, boot) = (disk.volume, disk.slot, disk.boot);
        let device = match &disk.front {
            Front::Nbd(socket) => {
                line.extend(["-blockdev".into(), block_node(volume, socket).to_string()]);
                block_device(volume, slot, boot)
            }
            Front::VhostUser(socket) => {
                let channel = channel_option(volume, socket, guest.abilities);
                line.extend(["-chardev".into(), channel]);
                guest_device(volume, slot, boot)
            }
        };
        line.extend(["-device".into(), device.to_string()]);
    }
    if let Some(kernel) = &guest.kernel {
        let root = guest.disks.iter().find(|d| d.boot).map(|d| serial(d.volume));
        let append = format!("{} hostplane.root={}", kernel.command_line, root.unwrap_or_default());
        line.extend(args([
            "-kernel",
            "/proc/self/fd/@kernel@",
            "-initrd",
            "/proc/self/fd/@initrd@",
        ]));
        line.extend(["-append".into(), append]);
    }
    line
}

/// Memory that is shared is a file which the launcher has made.
fn machine(guest: &Guest) -> Vec<String> {
    let mut line = args(["-nodefaults", "-no-user-config"]);
    line.extend(["-m".into(), format!("size={}M", guest.memory_mib)]);
    let mut machine = "q35,usb=off,vmport=off".to_owned();
    if guest.shares_memory {
        machine += ",memory-backend=memory";
        line.extend([
            "-object".into(),
            format!(
                "memory-backend-file,id=memory,mem-path=/proc/self/fd/@memory@,size={}M,share=on",
                guest.memory_mib
            ),
        ]);
    }
    line.extend(["-machine".into(), machine]);
    line
}

fn control_channels() -> Vec<String> {
    args([
        "-add-fd",
        "fd=@console@,set=1",
        "-chardev",
        "socket,id=serial,fd=@serial@,server=on,wait=off,logfile=/dev/fdset/1,logappend=on",
        "-serial",
        "chardev:serial",
        "-chardev",
        "socket,id=qmp,fd=@qmp@,server=on,wait=off",
        "-mon",
        "chardev=qmp,mode=control",
    ])
}

fn network(guest: &Guest) -> Vec<String> {
    let mut line = Vec::new();
    for (i, (_, mac)) in guest.interfaces.iter().enumerate() {
        line.extend(["-netdev".into(), format!("tap,id=net{i},fd=@tap{i}@,vhost=off")]);
        line.extend([
            "-device".into(),
            format!(
                "virtio-net-pci,netdev=net{i},mac={mac},romfile=,disable-legacy=on,multifunction=on,addr=0x2.{i:#x}"
            ),
        ]);
    }
    line
}

/// No I/O ports are set aside behind a port: there are too few for all, and
/// virtio needs none.
fn root_port(slot: u32) -> String {
    format!(
        "pcie-root-port,id={},bus=pcie.0,chassis={},slot={},addr={:#x}.{:#x},multifunction=on,io-reserve=0",
        slot_name(slot),
        slot + 1,
        slot + 1,
        0x10 + slot / 8,
        slot % 8
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> VolumeId {
        "vol-0123456789abcdef0".parse().unwrap()
    }

    #[test]
    fn names_read_back_as_the_volume_and_the_slot() {
        assert_eq!(volume_of(&device_id(volume())), Some(volume()));
        assert_eq!(volume_of(&node_name(volume())), Some(volume()));
        assert_eq!(volume_of("disk12"), None);
        assert_eq!(slot_of("/machine/peripheral/slot31/slot31"), Some(31));
        assert_eq!(slot_of("/machine/unattached"), None);
        assert!(node_name(volume()).len() < 32);
        assert_eq!(serial(volume()), "vol0123456789abcdef0");
    }

    #[test]
    fn a_guest_is_known_to_cloud_init_by_its_uuid() {
        let id = "i-0123456789abcdef0".parse().unwrap();
        assert_eq!(uuid(id), "ec201234-5678-9abc-def0-000000000000");
    }

    #[test]
    fn a_guest_has_its_slots_up_to_the_bound_and_the_whole_sandbox() {
        let guest = Guest {
            id: InstanceId::from_random(7),
            accelerator: Accelerator::Tcg,
            vcpus: 2,
            memory_mib: 512,
            interfaces: vec![("hp-t0".into(), Mac([2, 0, 0, 0, 0, 1]))],
            disks: vec![Disk {
                volume: volume(),
                front: Front::Nbd("/x".into()),
                slot: 0,
                boot: true,
            }],
            slots: 1000,
            shares_memory: false,
            abilities: Abilities::default(),
            kernel: None,
        };
        let line = command_line(&guest).join(" ");
        assert_eq!(line.matches("pcie-root-port").count(), SLOTS_MAX as usize);
        assert!(line.contains(SANDBOX));
        assert!(line.contains("tb-size="));
        assert!(line.contains("\"bootindex\":1"));
        assert!(!line.contains("@memory@"));
    }

    #[test]
    fn a_guest_that_shares_its_memory_reaches_its_disk_by_vhost_user() {
        let mut guest = Guest {
            id: InstanceId::from_random(7),
            accelerator: Accelerator::Tcg,
            vcpus: 1,
            memory_mib: 256,
            interfaces: Vec::new(),
            disks: vec![Disk {
                volume: volume(),
                front: Front::VhostUser("/run/a,b.sock".into()),
                slot: 3,
                boot: true,
            }],
            slots: 4,
            shares_memory: true,
            abilities: Abilities::default(),
            kernel: None,
        };
        let line = command_line(&guest).join(" ");
        assert!(line.contains("mem-path=/proc/self/fd/@memory@,size=256M,share=on"), "{line}");
        assert!(line.contains("path=/run/a,,b.sock,reconnect=1"), "{line}");
        assert!(line.contains("\"driver\":\"vhost-user-blk-pci\""), "{line}");
        guest.abilities.reconnects_in_ms = true;
        assert!(command_line(&guest).join(" ").contains("reconnect-ms=1000"));
    }
}
