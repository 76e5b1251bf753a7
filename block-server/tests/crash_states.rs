//! Power losses of the real program, on a bare device and on a file system.
//!
//! ```text
//!   writers ─NBD─▶ block-server [─▶ ext4] ─▶ loop ─FUSE─▶ qemu-storage-daemon ─▶ disk
//!                                                              └── blklogwrites ─▶ log
//! ```
//! The log has every write of the disk in its order, and the flushes. A crash
//! state is the disk as it was at some place of the log: what a flush covered is
//! there, and each sector of what came after it may be there or not. On each
//! state (the file system recovers and) the program starts, and whatever was
//! durable at that place of the log must be served. What a write that ran beside a flush
//! may lose is the simulation's to try: here it counts as covered.

mod fixture;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use fixture::client::{Client, Ledger};
use fixture::{Server, run, skip, text};
use model::VolumeId;
use rpc::block::{NewExport, NewVolume};
use sim::{Random, is_full, seed_from_environment};

const DISK_BYTES: u64 = 8 << 20;
const BARE_BYTES: u64 = 1 << 20;
const VOLUMES: usize = 2;
const BLOCKS: usize = 64;
const SECTOR: usize = 512;

fn id(number: usize) -> VolumeId {
    VolumeId::from_random(number as u128 + 1)
}

/// Something that was mounted, and is not any more.
struct Mounted(PathBuf);

impl Mounted {
    fn new(disk: &Path, at: &Path) -> Result<Self, String> {
        let done = Command::new("mount").args(["-o", "loop"]).args([disk, at]).output();
        let done = done.map_err(|e| format!("mount: {e}"))?;
        if done.status.success() {
            return Ok(Self(at.to_owned()));
        }
        Err(String::from_utf8_lossy(&done.stderr).into_owned())
    }
}

impl Drop for Mounted {
    /// The kernel lets go of a killed process's ring a little later than of the process.
    fn drop(&mut self) {
        for _ in 0..2000 {
            let done = Command::new("umount").arg(&self.0).output();
            if done.is_ok_and(|output| output.status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        eprintln!("{}: still mounted", self.0.display());
    }
}

/// QEMU's storage daemon between the loop device and the disk's file.
struct Logging(Child);

impl Logging {
    fn start(disk: &Path, log: &Path, fuse: &Path, bytes: u64) -> Option<Self> {
        File::create(log).unwrap();
        File::create(fuse).unwrap();
        let file = |name: &str, path: &Path| {
            format!("driver=file,node-name={name},discard=unmap,filename={}", text(path))
        };
        let export =
            format!("type=fuse,id=e,node-name=logged,mountpoint={},writable=on", text(fuse));
        let child = Command::new("qemu-storage-daemon")
            .args(["--blockdev", &file("disk", disk), "--blockdev", &file("log", log)])
            .args([
                "--blockdev",
                "driver=blklogwrites,node-name=logged,discard=unmap,file=disk,log=log",
            ])
            .args(["--export", &export])
            .stdin(Stdio::null())
            .spawn()
            .ok()?;
        let logging = Self(child);
        for _ in 0..200 {
            if std::fs::metadata(fuse).is_ok_and(|m| m.len() == bytes) {
                return Some(logging);
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        None
    }
}

impl Drop for Logging {
    fn drop(&mut self) {
        let pid = rustix::process::Pid::from_child(&self.0);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let _ = self.0.wait();
    }
}

fn daemon(state: &Path, run: &Path) -> (Server, rpc::Client) {
    let arguments = ["daemon", "--name", "c", "--state-dir", text(state), "--run-dir", text(run)];
    let server = Server::start(&arguments);
    (server, rpc::Client::new(run.join("block-server.sock")))
}

/// What was durable from a place of the log on.
struct Promise {
    entries: u64,
    volume: usize,
    ledger: Ledger,
}

fn entries_logged(log: &File) -> u64 {
    let mut word = [0; 8];
    // Before the first flush it has no beginning.
    log.read_exact_at(&mut word, 16).map_or(0, |()| u64::from_le_bytes(word))
}

/// One entry of the log: format of dm-log-writes (Documentation/admin-guide/device-mapper/log-writes.rst).
struct Entry {
    sector: u64,
    flags: u64,
    data: Vec<u8>,
    discarded: u64,
}

const FLUSH: u64 = 1;
const DISCARD: u64 = 4;

fn read_log(path: &Path) -> Vec<Entry> {
    let bytes = std::fs::read(path).unwrap();
    let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
    assert_eq!(word(0), 0x6a_7366_7773_6872, "the log's magic number");
    let count = word(16);
    let grain = u32::from_le_bytes(bytes[24..28].try_into().unwrap()) as usize;
    let mut at = grain;
    let mut entries = Vec::new();
    for _ in 0..count {
        let (sector, sectors, flags) = (word(at), word(at + 8) as usize, word(at + 16));
        at += grain;
        let discard = flags & DISCARD != 0;
        let data = if discard { Vec::new() } else { bytes[at..at + sectors * grain].to_vec() };
        at += data.len();
        let discarded = if discard { sectors as u64 } else { 0 };
        entries.push(Entry { sector, flags, data, discarded });
    }
    entries
}

/// The disk as it may be after a crash, built up in the order of the log.
struct Replay {
    entries: Vec<Entry>,
    /// With everything in front of this entry.
    solid: Vec<u8>,
    solid_to: usize,
}

impl Replay {
    fn apply(disk: &mut [u8], entry: &Entry, mut kept: impl FnMut() -> bool) {
        for (index, sector) in entry.data.chunks(SECTOR).enumerate() {
            let at = (entry.sector as usize + index) * SECTOR;
            if kept() {
                disk[at..at + SECTOR].copy_from_slice(sector);
            }
        }
        let (from, count) = (entry.sector as usize * SECTOR, entry.discarded as usize * SECTOR);
        if count > 0 && kept() {
            disk[from..from + count].fill(0);
        }
    }

    /// Places of the log to crash at, in order.
    fn draw_cuts(&self, first: usize, count: usize, random: &mut Random) -> Vec<usize> {
        let places = (self.entries.len() - first + 1) as u64;
        let mut cuts: Vec<usize> =
            (0..count).map(|_| first + random.below(places) as usize).collect();
        cuts.sort_unstable();
        cuts
    }

    /// The state after a crash when `cut` entries had been logged; `cut` only grows.
    fn state(&mut self, cut: usize, random: &mut Random) -> Vec<u8> {
        let flushed = self.entries[..cut].iter().rposition(|e| e.flags & FLUSH != 0).unwrap_or(0);
        while self.solid_to < flushed {
            Self::apply(&mut self.solid, &self.entries[self.solid_to], || true);
            self.solid_to += 1;
        }
        let mut disk = self.solid.clone();
        let percent = [0, 30, 50, 90, 100][random.below(5) as usize];
        for entry in &self.entries[self.solid_to..cut] {
            Self::apply(&mut disk, entry, || random.chance(percent));
        }
        disk
    }
}

/// A state, and what must be found on it.
struct State {
    number: usize,
    cut: usize,
    disk: Vec<u8>,
    ledgers: Vec<Ledger>,
    generation: u64,
}

/// Lets the file system and the daemon recover, and looks.
fn recover(folder: &Path, state: &State) {
    let State { number, cut, .. } = *state;
    // A name of its own: the kernel may let go of the last state's loop device a
    // little later, and the next must not find that one's cache.
    let (disk, mnt) = (folder.join(format!("disk-{number}")), folder.join("mnt"));
    std::fs::create_dir_all(&mnt).unwrap();
    File::create(&disk).unwrap().write_all(&state.disk).unwrap();
    let _mounted = Mounted::new(&disk, &mnt)
        .unwrap_or_else(|e| panic!("state {number}, {cut} entries: the file system is lost: {e}"));
    let (server, control) = daemon(&mnt, &folder.join("run"));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let exports = runtime.block_on(control.exports()).unwrap();
    for (volume, ledger) in state.ledgers.iter().enumerate() {
        let name = format!("e{volume}");
        let export = exports.iter().find(|e| e.name == name);
        let Some(export) = export else { panic!("state {number}: {name} is lost: {exports:?}") };
        let mut client = Client::connect(&export.socket, &name).unwrap();
        let when = format!("state {number}, {cut} entries, volume {volume}");
        ledger.verify(&mut client, &when, |l, index| l.durable[index]).unwrap();
    }
    let reader = exports.iter().find(|e| e.name == "reader").map_or(1, |e| e.generation);
    assert!(reader >= state.generation, "state {number}: generation {reader} came back");
    server.kill();
    std::fs::remove_file(disk).unwrap();
}

/// What had been promised when `cut` entries were in the log.
fn promised(promises: &[Promise], cut: usize) -> Vec<Ledger> {
    let of = |volume| promises.iter().filter(move |p: &&Promise| p.volume == volume);
    let ledgers = (0..VOLUMES).map(|volume| {
        let until = of(volume).rfind(|p| p.entries <= cut as u64).expect("the first one");
        // What was sent by then is bounded by what was sent at all.
        let last = of(volume).next_back().expect("the first one");
        Ledger { sent: last.ledger.sent.clone(), ..until.ledger.clone() }
    });
    ledgers.collect()
}

/// From where every writer had promised something.
fn first_promise(promises: &[Promise]) -> usize {
    let first = |v| promises.iter().find(|p| p.volume == v).map_or(0, |p| p.entries as usize);
    (0..VOLUMES).map(first).max().unwrap_or(0)
}

const NO_LOG: &str = "no qemu-storage-daemon with FUSE exports here, or no /dev/fuse";

#[test]
fn crash_states_of_a_file_system_hold_what_was_durable() {
    const TEST: &str = "crash_states_of_a_file_system_hold_what_was_durable";
    let states = if is_full() { 5000 } else { 100 };
    let seed = seed_from_environment();
    eprintln!("SEED={seed}");
    let folder = tempfile::tempdir().unwrap();
    let [disk, log, fuse] = ["disk", "log", "fuse"].map(|name| folder.path().join(name));
    File::create(&disk).unwrap().set_len(DISK_BYTES).unwrap();
    let made = run(TEST, "mkfs.ext4", &["-q", "-F", "-J", "size=1", text(&disk)]);
    if !made.is_some_and(|output| output.status.success()) {
        return skip(TEST, "mkfs.ext4 cannot make a small file system");
    }
    let base = std::fs::read(&disk).unwrap();
    let Some(logging) = Logging::start(&disk, &log, &fuse, DISK_BYTES) else {
        return skip(TEST, NO_LOG);
    };
    let (promises, raised, end) = match run_load(folder.path(), &fuse, &log, seed) {
        Ok(found) => found,
        Err(reason) => return skip(TEST, &reason),
    };
    drop(logging);
    let mut entries = read_log(&log);
    entries.truncate(end);
    let flushes = entries.iter().filter(|e| e.flags & FLUSH != 0).count();
    eprintln!("{} promises, {} entries, {flushes} flushes", promises.len(), entries.len());
    assert!(flushes > 50 && promises.len() > 100);

    let mut random = Random::new(seed);
    let mut replay = Replay { entries, solid: base, solid_to: 0 };
    let cuts = replay.draw_cuts(first_promise(&promises), states, &mut random);
    let (sender, queue) = crossbeam_channel::bounded::<State>(2);
    std::thread::scope(|scope| {
        for worker in 0..2 {
            let (queue, folder) = (queue.clone(), folder.path().join(format!("w{worker}")));
            scope.spawn(move || queue.iter().for_each(|state| recover(&folder, &state)));
        }
        drop(queue);
        for (number, cut) in cuts.into_iter().enumerate() {
            let ledgers = promised(&promises, cut);
            let kept = raised.iter().filter(|(entries, _)| *entries <= cut as u64);
            let generation = kept.map(|(_, generation)| *generation).max().unwrap_or(1);
            let disk = replay.state(cut, &mut random);
            if sender.send(State { number, cut, disk, ledgers, generation }).is_err() {
                break;
            }
        }
        drop(sender);
    });
}

/// Bare: the program serves the loop device itself. Each state is an image, and
/// one server serves many of them.
#[test]
fn a_thousand_crash_states_of_a_device_hold_what_was_durable() {
    const TEST: &str = "a_thousand_crash_states_of_a_device_hold_what_was_durable";
    const STATES_A_SERVER: usize = 50;
    let states = if is_full() { 50_000 } else { 1000 };
    let seed = seed_from_environment();
    eprintln!("SEED={seed}");
    let folder = tempfile::tempdir().unwrap();
    let [disk, log, fuse] = ["disk", "log", "fuse"].map(|name| folder.path().join(name));
    File::create(&disk).unwrap().set_len(BARE_BYTES).unwrap();
    let Some(logging) = Logging::start(&disk, &log, &fuse, BARE_BYTES) else {
        return skip(TEST, NO_LOG);
    };
    let socket = folder.path().join("x.sock");
    let promises = {
        let device = match Device::new(&fuse) {
            Ok(device) => device,
            Err(reason) => return skip(TEST, &reason),
        };
        let (file, log) = (&device.0, File::open(&log).unwrap());
        let server = Server::start(&["serve", "--file", file, "--socket", text(&socket)]);
        let promises = Mutex::new(Vec::new());
        std::thread::scope(|scope| {
            for volume in 0..VOLUMES {
                let (socket, promises, log) = (&socket, &promises, &log);
                scope.spawn(move || {
                    let client = Client::connect(socket, "").unwrap();
                    write_and_promise(client, volume, (volume * BLOCKS) as u64, seed, log, |p| {
                        promises.lock().unwrap().push(p);
                    });
                });
            }
        });
        server.kill();
        promises.into_inner().unwrap()
    };
    drop(logging);
    let base = vec![0; BARE_BYTES as usize];
    let mut replay = Replay { entries: read_log(&log), solid: base, solid_to: 0 };
    eprintln!("{} promises, {} entries", promises.len(), replay.entries.len());
    let mut random = Random::new(seed);
    let cuts = replay.draw_cuts(first_promise(&promises), states, &mut random);
    for (round, cuts) in cuts.chunks(STATES_A_SERVER).enumerate() {
        let mut arguments =
            vec!["serve".to_owned(), "--socket".to_owned(), text(&socket).to_owned()];
        for (number, cut) in cuts.iter().enumerate() {
            let image = folder.path().join(format!("s{number}"));
            std::fs::write(&image, replay.state(*cut, &mut random)).unwrap();
            arguments.extend(["--export".to_owned(), format!("s{number}={}", image.display())]);
        }
        let server = Server::start(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        for (number, cut) in cuts.iter().enumerate() {
            let mut client = Client::connect(&socket, &format!("s{number}")).unwrap();
            for ledger in promised(&promises, *cut) {
                let when = format!("state {number} of round {round}, {cut} entries");
                ledger.verify(&mut client, &when, |l, index| l.durable[index]).unwrap();
            }
        }
        server.kill();
    }
}

/// A loop device.
struct Device(String);

impl Device {
    fn new(file: &Path) -> Result<Self, String> {
        let done = Command::new("losetup").args(["-f", "--show", text(file)]).output();
        let done = done.map_err(|e| format!("losetup: {e}"))?;
        if !done.status.success() {
            return Err(String::from_utf8_lossy(&done.stderr).into_owned());
        }
        Ok(Self(String::from_utf8_lossy(&done.stdout).trim().to_owned()))
    }
}

impl Drop for Device {
    /// It goes when the last who has it open is gone.
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).output();
    }
}

fn write_and_promise(
    mut client: Client,
    volume: usize,
    first: u64,
    seed: u64,
    log: &File,
    mut promise: impl FnMut(Promise),
) {
    let mut ledger = Ledger::new(first, BLOCKS);
    let mut random = Random::new(seed ^ volume as u64);
    let mut durable_now = |ledger: &Ledger| {
        promise(Promise { entries: entries_logged(log), volume, ledger: ledger.clone() });
    };
    durable_now(&ledger);
    for _ in 0..if is_full() { 1200 } else { 120 } {
        ledger.burst(&mut client, &mut random, &mut durable_now).unwrap();
    }
    durable_now(&ledger);
}

/// What was promised and when, the generations that were answered and when, and
/// the log's length at the end.
type Load = (Vec<Promise>, Vec<(u64, u64)>, usize);

/// Runs the load over the logged disk.
fn run_load(folder: &Path, disk: &Path, log: &Path, seed: u64) -> Result<Load, String> {
    let (state, run_dir) = (folder.join("mnt"), folder.join("run"));
    std::fs::create_dir_all(&state).unwrap();
    let _mounted = Mounted::new(disk, &state)?;
    let log = File::open(log).unwrap();
    let promises = Mutex::new(Vec::new());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let (server, control) = daemon(&state, &run_dir);
    let sockets = runtime.block_on(async {
        let mut sockets = Vec::new();
        for volume in 0..VOLUMES {
            let size_bytes = 1 << 20;
            control.put_volume(id(volume), &NewVolume { size_bytes, source: None }).await.unwrap();
            sockets.push(export(&control, volume, 1).await);
        }
        sockets
    });
    let raised = Mutex::new(Vec::new());
    std::thread::scope(|scope| {
        for (volume, socket) in sockets.iter().enumerate() {
            let (promises, log) = (&promises, &log);
            scope.spawn(move || {
                let client = Client::connect(socket, &format!("e{volume}")).unwrap();
                write_and_promise(client, volume, 0, seed, log, |promise| {
                    promises.lock().unwrap().push(promise);
                });
            });
        }
        // Meanwhile the catalogue changes.
        let (raised, control, log) = (&raised, &control, &log);
        scope.spawn(move || {
            runtime.block_on(async {
                for generation in 2..12 {
                    tokio::time::sleep(Duration::from_millis(40)).await;
                    let reader =
                        NewExport { volume: id(0), read_only: true, generation, owner_uid: None };
                    control.put_export("reader", &reader).await.unwrap();
                    raised.lock().unwrap().push((entries_logged(log), generation));
                }
            });
        });
    });
    server.kill();
    // What follows is ext4's own: it writes its superblock in place as it is
    // unmounted, and a torn one would be its loss, not ours.
    let end = entries_logged(&log) as usize;
    Ok((promises.into_inner().unwrap(), raised.into_inner().unwrap(), end))
}

async fn export(control: &rpc::Client, volume: usize, generation: u64) -> PathBuf {
    let new = NewExport { volume: id(volume), read_only: false, generation, owner_uid: None };
    control.put_export(&format!("e{volume}"), &new).await.unwrap().socket
}
