//! Real QEMU, real kernel, real guest: the shell against the world.
//!
//! The root disk comes over NBD from `qemu-nbd` here, so that this crate's tests
//! need no other daemon of ours; the end-to-end tests use the block server.

use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{LazyLock, Mutex};
use std::time::{Duration, Instant};

use agent::image::{self, Store};
use agent::lifecycle::{Effect, Event, GuestRun, MachineEvent, StartDisk};
use agent::qemu::{Abilities, BlockFront, Choice, Context, Fronts, Hypervisor, Qemu, Sockets};
use model::{InstanceId, VolumeId};
use rpc::{Deployment, host};
use tokio::sync::mpsc;

/// Patience with a guest on a loaded machine.
const GUEST_TIMEOUT: Duration = Duration::from_secs(90);

/// Why real guests cannot run here, if they cannot.
fn obstacle() -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("needs root".into());
    }
    for program in ["qemu-system-x86_64", "qemu-nbd", "apt-get", "mke2fs"] {
        let mut version = Command::new(program);
        version.arg("--version").stderr(Stdio::null()).stdout(Stdio::null());
        if version.status().is_err() {
            return Some(format!("{program} is not installed"));
        }
    }
    None
}

/// The image is built once for all tests.
static IMAGES: LazyLock<Store> = LazyLock::new(|| {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let store = Store::open(folder.join("images")).unwrap();
    store.delete("tiny").unwrap();
    image::build_tiny(&store, "tiny", &folder.join("packages")).unwrap();
    store
});

struct World {
    dir: tempfile::TempDir,
    deployment: Deployment,
    servers: Vec<Child>,
    sockets: BTreeMap<VolumeId, Sockets>,
}

impl World {
    /// Several runs of these tests side by side must not meet.
    fn new(letter: char) -> Self {
        let name = format!("ag{letter}{:05x}", std::process::id() & 0xf_ffff);
        let dir = tempfile::tempdir().unwrap();
        // Instances' users must reach the block sockets.
        std::fs::set_permissions(dir.path(), PermissionsExt::from_mode(0o711)).unwrap();
        let deployment =
            Deployment::new(&name, dir.path().join("state"), dir.path().join("run")).unwrap();
        Self { dir, deployment, servers: Vec::new(), sockets: BTreeMap::new() }
    }

    /// A volume, from the image or empty, served over NBD.
    fn volume(&mut self, number: u128, image: Option<&str>) -> VolumeId {
        let id = VolumeId::from_random(number);
        let file = self.dir.path().join(id.to_string());
        match image {
            Some(name) => drop(std::fs::copy(IMAGES.root_of(name).unwrap(), &file).unwrap()),
            None => std::fs::File::create(&file).unwrap().set_len(64 << 20).unwrap(),
        }
        let socket = self.dir.path().join(format!("{id}.sock"));
        let mut server = Command::new("qemu-nbd");
        server
            .args(["-f", "raw", "-t", "-e", "4", "-x", &id.to_string(), "-k"])
            .arg(&socket)
            .arg(&file);
        self.servers.push(server.spawn().unwrap());
        eventually("qemu-nbd listens", || socket.exists());
        std::fs::set_permissions(&socket, PermissionsExt::from_mode(0o666)).unwrap();
        self.sockets.insert(id, Sockets { nbd: socket, vhost_user: None });
        id
    }

    fn context(&self) -> Context {
        Context { uid: 200_017, sockets: self.sockets.clone() }
    }

    fn qemu(&self) -> (Qemu, mpsc::Receiver<(InstanceId, Event)>) {
        self.qemu_with(Fronts::default())
    }

    fn qemu_with(&self, fronts: Fronts) -> (Qemu, mpsc::Receiver<(InstanceId, Event)>) {
        let (reports, inbox) = mpsc::channel(256);
        let accelerator = Choice {
            accelerator: agent::qemu::Accelerator::Tcg,
            reason: "tests".into(),
            kvm_group: None,
        };
        let launcher = PathBuf::from(env!("CARGO_BIN_EXE_agent"));
        let deployment = self.deployment.clone();
        (Qemu::new(deployment, IMAGES.clone(), launcher, accelerator, fronts, reports), inbox)
    }

    fn console(&self, id: InstanceId) -> String {
        let path = self.deployment.state_of("agent").join(format!("instances/{id}/console.log"));
        String::from_utf8_lossy(&std::fs::read(path).unwrap_or_default()).into_owned()
    }

    fn await_console(&self, id: InstanceId, text: &str) {
        eventually_or(
            &format!("the console says `{text}`"),
            || self.console(id).contains(text),
            || {
                let log = self.deployment.run_dir().join(format!("agent/{id}/qemu.log"));
                format!(
                    "console:\n{}\nlog:\n{}",
                    self.console(id),
                    std::fs::read_to_string(log).unwrap_or_default()
                )
            },
        );
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // A failed test leaves no guest behind either.
        if let Err(error) = agent::teardown::teardown(&self.deployment) {
            eprintln!("tear down {}: {error}", self.deployment.name());
        }
        for server in &mut self.servers {
            let _ = server.kill();
            let _ = server.wait();
        }
    }
}

async fn next(events: &mut mpsc::Receiver<(InstanceId, Event)>) -> Event {
    tokio::time::timeout(GUEST_TIMEOUT, events.recv()).await.expect("no event in time").unwrap().1
}

fn eventually(what: &str, condition: impl FnMut() -> bool) {
    eventually_or(what, condition, String::new);
}

#[expect(clippy::disallowed_methods, reason = "a test's patience with a real guest")]
fn eventually_or(what: &str, mut condition: impl FnMut() -> bool, state: impl Fn() -> String) {
    let start = Instant::now();
    while !condition() {
        assert!(
            start.elapsed() < GUEST_TIMEOUT,
            "not within {GUEST_TIMEOUT:?}: {what}\n{}",
            state()
        );
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn wish(id: InstanceId, volumes: &[VolumeId]) -> host::Instance {
    host::Instance {
        id,
        run: host::Run::Running,
        starts: 1,
        reboots: 0,
        vcpus: 1,
        memory_mib: 256,
        image: "tiny".into(),
        interfaces: Vec::new(),
        volumes: volumes
            .iter()
            .enumerate()
            .map(|(i, volume)| host::Attachment {
                volume: *volume,
                device: "/dev/sda".into(),
                generation: 1,
                boot: i == 0,
            })
            .collect(),
        volumes_max: 26,
    }
}

#[tokio::test(flavor = "multi_thread")]
#[expect(clippy::disallowed_methods, reason = "measures the boot")]
async fn a_guest_boots_and_powers_off_by_its_button() {
    if let Some(reason) = obstacle() {
        return sim::skip("a_guest_boots_and_powers_off_by_its_button", &reason);
    }
    let mut world = World::new('a');
    let root = world.volume(1, Some("tiny"));
    let id = InstanceId::from_random(0xa);
    let (mut qemu, mut events) = world.qemu();
    let disks = vec![StartDisk { volume: root, slot: 0, boot: true }];
    let start = Instant::now();
    qemu.perform(
        id,
        Effect::Start { epoch: 1, wish: Box::new(wish(id, &[root])), disks },
        world.context(),
    );
    let event = next(&mut events).await;
    let Event::Machine { event: MachineEvent::Seen(seen), .. } = event else {
        panic!("{event:?}\n{}", world.console(id))
    };
    assert_eq!(seen.run, GuestRun::Running);
    assert_eq!(seen.devices[&root].slot, 0);
    world.await_console(id, "hostplane: initrd up");
    println!("initrd after {:?}", start.elapsed());
    world.await_console(id, "hostplane: init up");
    println!("init after {:?}", start.elapsed());
    world.await_console(id, "hostplane: host key");
    println!("sshd after {:?}", start.elapsed());
    // As the core does: a guest that still boots does not notice the button.
    let event = loop {
        qemu.perform(id, Effect::PowerDown, world.context());
        if let Ok(event) = tokio::time::timeout(Duration::from_secs(3), events.recv()).await {
            break event.unwrap().1;
        }
    };
    assert!(matches!(event, Event::Machine { event: MachineEvent::GuestOff, .. }), "{event:?}");
    qemu.perform(id, Effect::Quit, world.context());
    let event = next(&mut events).await;
    assert!(matches!(event, Event::Machine { event: MachineEvent::Exited, .. }), "{event:?}");
    qemu.perform(id, Effect::CleanUp, world.context());
    let event = next(&mut events).await;
    assert!(
        matches!(event, Event::Machine { event: MachineEvent::CleanedUp(Ok(())), .. }),
        "{event:?}"
    );
    println!("{}", world.console(id));
}

/// The kernel's own messages tell what the guest sees.
static TALKATIVE: LazyLock<&'static str> = LazyLock::new(|| {
    IMAGES.delete("talkative").unwrap();
    let quiet = IMAGES.root_of("tiny").unwrap();
    let folder = quiet.parent().unwrap();
    let copy = folder.with_file_name("talkative");
    std::fs::create_dir(&copy).unwrap();
    for file in ["root.raw", "vmlinuz", "initrd"] {
        std::fs::hard_link(folder.join(file), copy.join(file)).unwrap();
    }
    let manifest = std::fs::read_to_string(folder.join("manifest.json")).unwrap();
    let manifest = manifest.replace(" quiet", "").replace("\"tiny\"", "\"talkative\"");
    std::fs::write(copy.join("manifest.json"), manifest).unwrap();
    "talkative"
});

async fn until(
    events: &mut mpsc::Receiver<(InstanceId, Event)>,
    what: &str,
    wanted: impl Fn(&MachineEvent) -> bool,
) -> MachineEvent {
    loop {
        let Event::Machine { event, .. } = next(events).await else { continue };
        if wanted(&event) {
            return event;
        }
        println!("awaiting {what}: {event:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_comes_and_goes_while_the_guest_runs_and_the_agent_dies_in_between() {
    let test = "a_disk_comes_and_goes_while_the_guest_runs_and_the_agent_dies_in_between";
    if let Some(reason) = obstacle() {
        return sim::skip(test, &reason);
    }
    let mut world = World::new('b');
    let id = InstanceId::from_random(0xb);
    let root = world.volume(2, Some(*TALKATIVE));
    let data = world.volume(3, None);
    let mut wish = wish(id, &[root]);
    wish.image = (*TALKATIVE).into();
    let disks = vec![StartDisk { volume: root, slot: 0, boot: true }];
    let start = |epoch| Effect::Start { epoch, wish: Box::new(wish.clone()), disks: disks.clone() };

    let (mut qemu, mut events) = world.qemu();
    qemu.perform(id, start(1), world.context());
    until(&mut events, "QEMU", |e| matches!(e, MachineEvent::Seen(_))).await;
    world.await_console(id, "hostplane: init up");
    let pid = qemu.process(id).unwrap().0;

    // The disk comes, in a slot of another device than the root's.
    qemu.perform(id, Effect::AddNode { volume: data }, world.context());
    let added = until(&mut events, "a node", |e| matches!(e, MachineEvent::NodeAdded(..))).await;
    assert_eq!(added, MachineEvent::NodeAdded(data, Ok(())));
    qemu.perform(id, Effect::AddDevice { volume: data, slot: 9, boot: false }, world.context());
    let added =
        until(&mut events, "a device", |e| matches!(e, MachineEvent::DeviceAdded(..))).await;
    assert_eq!(added, MachineEvent::DeviceAdded(data, Ok(())));
    world.await_console(id, "[vdb]");

    // The agent dies; another finds the same process and all that it holds.
    drop((qemu, events));
    let (mut qemu, mut events) = world.qemu();
    qemu.perform(id, Effect::Adopt { epoch: 1 }, world.context());
    let seen = until(&mut events, "the guest", |e| matches!(e, MachineEvent::Seen(_))).await;
    let MachineEvent::Seen(seen) = seen else { unreachable!("awaited above") };
    assert_eq!(seen.devices[&data].slot, 9);
    assert!(seen.nodes.contains(&data) && seen.nodes.contains(&root));
    assert_eq!(qemu.process(id), Some((pid, true)));

    // A mistaken second start comes to nothing: the kernel's lock forbids it.
    let (mut mistaken, mut its_events) = world.qemu();
    mistaken.perform(id, start(1), world.context());
    until(&mut its_events, "the refusal", |e| {
        matches!(e, MachineEvent::Exited | MachineEvent::StartFailed(_))
    })
    .await;
    drop((mistaken, its_events));

    // The disk goes.
    qemu.perform(id, Effect::DeleteDevice { volume: data }, world.context());
    until(&mut events, "its release", |e| *e == MachineEvent::DeviceGone(data)).await;
    qemu.perform(id, Effect::DeleteNode { volume: data }, world.context());
    let gone =
        until(&mut events, "the node's end", |e| matches!(e, MachineEvent::NodeDeleted(..))).await;
    assert_eq!(gone, MachineEvent::NodeDeleted(data, Ok(())));

    // The process is a user's of its own, in its own session, with the sandbox on.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    assert!(status.contains("Uid:\t200017\t200017\t200017\t200017"), "{status}");
    assert!(status.contains("Seccomp:\t2"), "{status}");
    assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
    assert!(status.contains("NoNewPrivs:\t1"), "{status}");

    // Nothing is left.
    qemu.perform(id, Effect::Kill, world.context());
    until(&mut events, "its end", |e| *e == MachineEvent::Exited).await;
    qemu.perform(id, Effect::CleanUp, world.context());
    until(&mut events, "the clean-up", |e| *e == MachineEvent::CleanedUp(Ok(()))).await;
    assert!(!world.deployment.run_dir().join(format!("agent/{id}")).exists());
    assert!(!Path::new(&format!("/proc/{pid}/exe")).exists());
    let groups = Command::new("find").args(["/sys/fs/cgroup", "-name", &id.to_string()]).output();
    assert_eq!(String::from_utf8_lossy(&groups.unwrap().stdout), "");
}

/// What the agent says, of all tests of this program.
static SAID: Mutex<Vec<u8>> = Mutex::new(Vec::new());

struct Said;

impl std::io::Write for Said {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        SAID.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// The last that was said of a volume's front.
fn said_of(volume: VolumeId) -> String {
    let said = String::from_utf8_lossy(&SAID.lock().unwrap()).into_owned();
    let mut lines = said.lines().filter(|l| l.contains(&volume.to_string()));
    lines.rfind(|l| l.contains("attached by NBD")).unwrap_or_default().to_owned()
}

/// Plugs a volume in; what came of the node, and of the device.
async fn plug(
    (qemu, events): &mut (Qemu, mpsc::Receiver<(InstanceId, Event)>),
    world: &World,
    id: InstanceId,
    (volume, slot): (VolumeId, u32),
) -> Result<(), String> {
    qemu.perform(id, Effect::AddNode { volume }, world.context());
    let added = until(events, "a node", |e| matches!(e, MachineEvent::NodeAdded(..))).await;
    let MachineEvent::NodeAdded(_, added) = added else { unreachable!("awaited above") };
    added?;
    qemu.perform(id, Effect::AddDevice { volume, slot, boot: false }, world.context());
    let added = until(events, "a device", |e| matches!(e, MachineEvent::DeviceAdded(..))).await;
    let MachineEvent::DeviceAdded(_, added) = added else { unreachable!("awaited above") };
    added
}

/// Each reason for which a disk cannot be on vhost-user, under real guests: their disks
/// work by NBD and the log says why; where NBD was not allowed, that is the error.
#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_cannot_be_on_vhost_user_is_on_nbd_and_the_log_says_why() {
    let test = "a_disk_that_cannot_be_on_vhost_user_is_on_nbd_and_the_log_says_why";
    if let Some(reason) = obstacle() {
        return sim::skip(test, &reason);
    }
    let able = Abilities::probe();
    if !able.has_vhost_user {
        return sim::skip(test, "QEMU has no vhost-user-blk-pci");
    }
    tracing_subscriber::fmt().with_ansi(false).with_writer(|| Said).init();
    let (auto, demanded) = [BlockFront::Auto, BlockFront::VhostUser]
        .map(|asked| Fronts::choose(asked, able).unwrap())
        .into();
    let mut world = World::new('d');
    let root = world.volume(5, Some(*TALKATIVE));
    let (data, more) = (world.volume(6, None), world.volume(7, None));
    // Whoever served the root's rings is gone, and nobody ever served the others'.
    let refused = world.dir.path().join("refused.sock");
    drop(std::os::unix::net::UnixListener::bind(&refused).unwrap());
    let missing = world.dir.path().join("missing.sock");
    world.sockets.get_mut(&root).unwrap().vhost_user = Some(refused.clone());
    world.sockets.get_mut(&data).unwrap().vhost_user = Some(missing);
    let wish = |id| {
        let mut wish = wish(id, &[root]);
        wish.image = (*TALKATIVE).into();
        let disks = vec![StartDisk { volume: root, slot: 0, boot: true }];
        Effect::Start { epoch: 1, wish: Box::new(wish), disks }
    };
    let seen = |e: &MachineEvent| matches!(e, MachineEvent::Seen(_));

    // Memory is shared, but nobody takes part.
    let id = InstanceId::from_random(0xd);
    let mut agent = world.qemu_with(auto);
    agent.0.perform(id, wish(id), world.context());
    until(&mut agent.1, "QEMU", seen).await;
    world.await_console(id, "hostplane: init up");
    let said = said_of(root);
    assert!(said.contains("refused.sock: connect: Connection refused"), "{said}");
    assert_eq!(plug(&mut agent, &world, id, (data, 9)).await, Ok(()));
    world.await_console(id, "[vdb]");
    let said = said_of(data);
    assert!(said.contains("missing.sock: connect: No such file or directory"), "{said}");
    assert_eq!(plug(&mut agent, &world, id, (more, 10)).await, Ok(()));
    world.await_console(id, "[vdc]");
    assert!(said_of(more).contains("offers no vhost-user socket"), "{}", said_of(more));
    drop(agent);

    // An agent that may not take NBD says what is in the way.
    let mut strict = world.qemu_with(demanded);
    strict.0.perform(id, Effect::Adopt { epoch: 1 }, world.context());
    until(&mut strict.1, "the guest", seen).await;
    let fourth = world.volume(8, None);
    world.sockets.get_mut(&fourth).unwrap().vhost_user = Some(refused);
    let error = plug(&mut strict, &world, id, (fourth, 11)).await.unwrap_err();
    assert!(error.contains("refused.sock: connect: Connection refused"), "{error}");
    strict.0.perform(id, Effect::Kill, world.context());
    until(&mut strict.1, "its end", |e| *e == MachineEvent::Exited).await;
    drop(strict);

    // A guest that an earlier agent started with memory of its own.
    let id = InstanceId::from_random(0xe);
    let mut earlier = world.qemu();
    earlier.0.perform(id, wish(id), world.context());
    until(&mut earlier.1, "QEMU", seen).await;
    drop(earlier);
    let mut agent = world.qemu_with(auto);
    agent.0.perform(id, Effect::Adopt { epoch: 1 }, world.context());
    until(&mut agent.1, "the guest", seen).await;
    let fifth = world.volume(9, None);
    let served = world.dir.path().join("served.sock");
    let _server = std::os::unix::net::UnixListener::bind(&served).unwrap();
    world.sockets.get_mut(&fifth).unwrap().vhost_user = Some(served);
    assert_eq!(plug(&mut agent, &world, id, (fifth, 9)).await, Ok(()));
    assert!(said_of(fifth).contains("memory of its own"), "{}", said_of(fifth));
    agent.0.perform(id, Effect::Kill, world.context());
    until(&mut agent.1, "its end", |e| *e == MachineEvent::Exited).await;
}

/// A boot sector that says `imported` on the first serial port and halts.
fn boot_sector() -> Vec<u8> {
    // mov dx,0x3f8; mov si,0x7c11; next: lodsb; test al,al; jz end; out dx,al; jmp next; end: hlt; jmp end
    let mut sector = vec![
        0xba, 0xf8, 0x03, 0xbe, 0x11, 0x7c, 0xac, 0x84, 0xc0, 0x74, 0x03, 0xee, 0xeb, 0xf8, 0xf4,
        0xeb, 0xfd,
    ];
    sector.extend(b"imported\r\n\0");
    sector.resize(510, 0);
    sector.extend([0x55, 0xaa]);
    sector
}

#[tokio::test(flavor = "multi_thread")]
async fn an_imported_disk_boots_by_its_own_loader() {
    if let Some(reason) = obstacle() {
        return sim::skip("an_imported_disk_boots_by_its_own_loader", &reason);
    }
    let mut world = World::new('c');
    let file = world.dir.path().join("disk.raw");
    let mut disk = boot_sector();
    disk.resize(1 << 20, 0);
    std::fs::write(&file, disk).unwrap();
    IMAGES.delete("sector").unwrap();
    let image = image::import(&IMAGES, &file, "sector").unwrap();
    assert!(!image.direct_boot());
    let root = world.volume(4, Some("sector"));
    let id = InstanceId::from_random(0xc);
    let mut wish = wish(id, &[root]);
    wish.image = "sector".into();
    let (mut qemu, mut events) = world.qemu();
    let disks = vec![StartDisk { volume: root, slot: 0, boot: true }];
    qemu.perform(id, Effect::Start { epoch: 1, wish: Box::new(wish), disks }, world.context());
    until(&mut events, "QEMU", |e| matches!(e, MachineEvent::Seen(_))).await;
    world.await_console(id, "imported");
    qemu.perform(id, Effect::Kill, world.context());
    until(&mut events, "its end", |e| *e == MachineEvent::Exited).await;
}
