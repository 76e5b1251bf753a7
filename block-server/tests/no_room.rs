//! File systems that are full, and disks that fail a sync: what was acknowledged
//! stays, what cannot be done is said and not done by halves, and with room it goes on.

mod fixture;

use std::path::Path;
use std::process::{Child, Command, Stdio};

use fixture::client::{Client, FLUSH, FUA, NO_HOLE, READ, TRIM, WRITE, WRITE_ZEROES};
use fixture::disk::Stoppable;
use fixture::fuse::Fuse;
use fixture::home::{Home, MIB, id, writer};
use fixture::small::Small;
use fixture::wait::wait_for;
use fixture::{Bench, engines, run, skip, succeed, text};
use rpc::Kind;
use rpc::block::{NewExport, NewSize, NewVolume, Quality, Quiesce, VolumeHealth};

const ENOSPC: u32 = 28;
const EIO: u32 = 5;
const PIECE: u32 = 256 << 10;

/// A bound for a loaded machine.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(60);

/// A piece of the volume, filled with a byte of its own.
fn write(client: &mut Client, piece: u64, flags: u16) -> u32 {
    let bytes = vec![piece as u8 + 1; PIECE as usize];
    client.attempt((WRITE, flags), piece * u64::from(PIECE), PIECE, &bytes).unwrap()
}

fn holds(client: &mut Client, piece: u64, byte: u8) {
    let found = client.call(READ, piece * u64::from(PIECE), PIECE).unwrap();
    let other = found.iter().position(|b| *b != byte);
    assert_eq!(other, None, "piece {piece} is not what was acknowledged");
}

/// Writes pieces from `first` on until there is no room; gives the one that failed.
fn write_until_full(client: &mut Client, first: u64, flags: u16) -> u64 {
    for piece in first..200 {
        match write(client, piece, flags) {
            0 => {}
            error => {
                assert_eq!(error, ENOSPC, "piece {piece}");
                return piece;
            }
        }
    }
    panic!("50 MiB on a file system of 24");
}

#[test]
fn a_volume_without_room_says_so_loses_nothing_and_goes_on_with_room() {
    const TEST: &str = "a_volume_without_room_says_so_loses_nothing_and_goes_on_with_room";
    for engine in engines() {
        for cache in ["none", "writeback"] {
            let bench = Bench::new(1);
            let Some(small) = Small::mount(TEST, &bench.path("disk"), 24) else { return };
            let (image, socket) = (bench.path("disk/thin.img"), bench.socket());
            let thin = std::fs::File::create(&image).unwrap();
            thin.set_len(200 * u64::from(PIECE)).unwrap();
            let arguments =
                ["serve", "--file", text(&image), "--socket", text(&socket), "--cache", cache];
            let arguments = [&arguments[..], &["--engine", engine]].concat();
            let server = fixture::Server::start(&arguments);
            let mut client = Client::connect(&socket, "").unwrap();
            for piece in 0..8 {
                assert_eq!(write(&mut client, piece, 0), 0, "{engine} {cache}");
            }
            small.fill();
            let failed = write_until_full(&mut client, 8, 0);
            assert_eq!(client.attempt((FLUSH, 0), 0, 0, &[]).unwrap(), 0, "{engine} {cache}");
            // Durable writes and zeros with their blocks find none either.
            let beyond = (failed + 1) * u64::from(PIECE);
            assert_eq!(write(&mut client, failed + 1, FUA), ENOSPC);
            let zeros = (WRITE_ZEROES, NO_HOLE);
            assert_eq!(client.attempt(zeros, beyond, 8 << 20, &[]).unwrap(), ENOSPC);
            // What has its blocks is written over, and all that was acknowledged is there.
            assert_eq!(write(&mut client, 3, FUA), 0);
            for piece in 0..failed {
                holds(&mut client, piece, piece as u8 + 1);
            }
            // A trim is the guest's own way to room.
            assert_eq!(client.attempt((TRIM, FUA), 0, 4 * PIECE, &[]).unwrap(), 0);
            for piece in 0..4 {
                holds(&mut client, piece, 0);
            }
            assert_eq!(write(&mut client, 1, FUA), 0, "{engine} {cache}: after a trim");
            small.make_room();
            assert_eq!(write(&mut client, failed, FUA), 0, "{engine} {cache}: with room");
            assert_eq!(client.attempt(zeros, beyond, PIECE, &[]).unwrap(), 0);
            assert_eq!(client.attempt((FLUSH, 0), 0, 0, &[]).unwrap(), 0);
            server.kill();
            let _server = fixture::Server::start(&arguments);
            let mut client = Client::connect(&socket, "").unwrap();
            for piece in [1].into_iter().chain(4..=failed) {
                holds(&mut client, piece, piece as u8 + 1);
            }
            holds(&mut client, failed + 1, 0);
        }
    }
}

fn plain(mib: u64) -> NewVolume {
    NewVolume { size_bytes: mib * MIB, source: None }
}

fn of_no_room(error: &rpc::Error) {
    assert_eq!(error.kind, Kind::Unavailable, "{error}");
    let told = &error.message;
    assert!(told.contains("No space left") && told.contains("make room"), "{told}");
    assert!(told.contains("/s/block-server/"), "it names no file: {told}");
}

/// Until there is no room for a file's name any more; gives the first that was refused.
async fn create_until_refused(client: &rpc::Client) -> u128 {
    for number in 100..1000 {
        if let Err(error) = client.put_volume(id(number), &plain(1)).await {
            of_no_room(&error);
            return number;
        }
    }
    panic!("900 volumes on a file system that is full");
}

/// Until the catalogue has outgrown the room that it keeps; gives how many there are.
async fn export_until_refused(client: &rpc::Client) -> usize {
    let reader = NewExport { volume: id(1), read_only: true, generation: 0, owner_uid: None };
    for count in 0..1000 {
        if let Err(error) = client.put_export(&format!("r{count}"), &reader).await {
            of_no_room(&error);
            assert!(error.message.starts_with("catalogue "), "{error}");
            return count;
        }
    }
    panic!("1000 exports in a catalogue that cannot grow");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_without_room_does_nothing_by_halves_and_can_be_given_room_by_itself() {
    const TEST: &str =
        "a_daemon_without_room_does_nothing_by_halves_and_can_be_given_room_by_itself";
    let home = Home::new();
    let source = home.source(8);
    let Some(small) = Small::mount(TEST, &home.path("s"), 32) else { return };
    let (server, client) = home.start();
    let socket = home.export(1, "e1", 64).await;
    home.export(2, "e2", 64).await;
    let mut data = Client::connect(&home.path("r/nbd/e2.sock"), "e2").unwrap();
    for piece in 0..16 {
        assert_eq!(write(&mut data, piece, FUA), 0);
    }
    small.fill();

    // Data: the guest of another volume hears of it.
    let mut guest = Client::connect(&socket, "e1").unwrap();
    assert_eq!(write(&mut guest, 0, 0), ENOSPC);

    // A copy that finds no room leaves nothing behind, and says what and where.
    let copy = NewVolume { size_bytes: 8 * MIB, source: Some(source) };
    client.put_volume(id(3), &copy).await.unwrap();
    let reason = failure(&client, 3).await;
    assert!(reason.contains(".filling") && reason.contains("make room"), "{reason}");
    let left = std::fs::read_dir(home.volumes()).unwrap().flatten();
    let left: Vec<_> = left.map(|entry| entry.path()).collect();
    assert!(left.iter().all(|path| path.extension().is_some_and(|e| e == "img")), "{left:?}");
    client.delete_volume(id(3)).await.unwrap();

    // Files and records grow until they cannot: what was refused is not there.
    let refused = create_until_refused(&client).await;
    let known = client.volumes().await.unwrap();
    assert_eq!(known.len() as u128, 2 + refused - 100);
    assert!(known.iter().all(|volume| volume.state == VolumeHealth::Ready), "{known:?}");

    let readers = export_until_refused(&client).await;
    assert_eq!(client.exports().await.unwrap().len(), 2 + readers);
    assert!(!home.path(&format!("r/nbd/r{readers}.sock")).exists(), "it listens, and is no export");

    // Records that change their length or not, and what makes room, find theirs.
    client.delete_volume(id(refused - 1)).await.unwrap();
    client.delete_volume(id(refused - 2)).await.unwrap();
    client.set_quality(id(1), &Quality::default()).await.unwrap();
    client.resize_volume(id(1), NewSize { size_bytes: 128 * MIB, reconnect: false }).await.unwrap();
    client.quiesce_volume(id(1), Quiesce { deadline_ms: 60_000 }).await.unwrap();
    client.resume_volume(id(1)).await.unwrap();
    client.put_export("e1", &writer(id(1), 2)).await.unwrap();

    // A restart finds what was said, though nothing can be written beside it.
    let (volumes, exports) = (client.volumes().await.unwrap(), client.exports().await.unwrap());
    drop((guest, data));
    server.kill();
    let (_server, client) = home.start();
    assert_eq!(client.volumes().await.unwrap(), volumes);
    assert_eq!(names(&client.exports().await.unwrap()), names(&exports));
    let mut data = Client::connect(&home.path("r/nbd/e2.sock"), "e2").unwrap();
    for piece in 0..16 {
        holds(&mut data, piece, piece as u8 + 1);
    }
    drop(data);

    // Taking a volume away makes the room that others need.
    client.delete_export("e2").await.unwrap();
    client.delete_volume(id(2)).await.unwrap();
    let mut guest = Client::connect(&socket, "e1").unwrap();
    for piece in 0..4 {
        assert_eq!(write(&mut guest, piece, FUA), 0, "piece {piece} in the room of a volume");
    }
    client.put_volume(id(refused), &plain(1)).await.unwrap();
    small.make_room();
    client.put_volume(id(3), &copy).await.unwrap();
    // Without the two that made room for records, and the second.
    assert_eq!(client.volumes().await.unwrap().len() as u128, refused - 100 - 1 + 2);
}

/// The record that a volume is ready, or has failed, may fail itself. Whoever asks for
/// the volume again has it made.
#[tokio::test(flavor = "multi_thread")]
async fn a_volume_whose_last_record_could_not_be_written_is_made_when_it_is_asked_for_again() {
    const TEST: &str =
        "a_volume_whose_last_record_could_not_be_written_is_made_when_it_is_asked_for_again";
    let home = Home::new();
    let source = home.source(1);
    let disk = match Stoppable::new(home.path("outer"), home.volumes()) {
        Ok(disk) => disk,
        Err(reason) => return skip(TEST, &format!("no loop devices: {reason}")),
    };
    let (_server, client) = home.start();
    let catalogue = home.path("s/block-server/catalogue.new");
    for (number, source) in [(1, None), (2, Some(source))] {
        let new = NewVolume { size_bytes: MIB, source };
        let file = home.volumes().join(format!("{}.img", id(number)));
        let (pending, aside) = (file.with_extension("filling"), catalogue.with_extension("aside"));
        disk.stop();
        let (asking, asked) = (home.client(), new.clone());
        let asked = tokio::spawn(async move { asking.put_volume(id(number), &asked).await });
        // Its first record is written, and its file cannot be.
        wait_for("the file is made", PATIENCE, || pending.exists());
        std::fs::rename(&catalogue, &aside).unwrap();
        std::fs::create_dir(&catalogue).unwrap();
        disk.go_on();
        wait_for("the file is whole", PATIENCE, || file.exists());
        let told = asked.await.unwrap();
        if new.source.is_none() {
            let told = told.unwrap_err();
            assert!(told.message.starts_with("catalogue "), "{told}");
        }
        // As does that of another volume, which waits for its turn.
        client.put_volume(id(9), &plain(1)).await.unwrap_err();
        let found = client.volumes().await.unwrap();
        let found = found.iter().find(|volume| volume.id == id(number)).unwrap();
        assert_eq!(found.state, VolumeHealth::Filling);
        std::fs::remove_dir(&catalogue).unwrap();
        std::fs::rename(&aside, &catalogue).unwrap();

        let mut state = client.put_volume(id(number), &new).await.unwrap().state;
        for _ in 0..3000 {
            if state == VolumeHealth::Ready {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            state = client.put_volume(id(number), &new).await.unwrap().state;
        }
        assert_eq!(state, VolumeHealth::Ready, "volume {number}");
        client.put_export(&format!("e{number}"), &writer(id(number), 1)).await.unwrap();
    }
    // Both are what was asked for.
    for (number, byte) in [(1, 0), (2, 0x5a)] {
        let socket = home.path(&format!("r/nbd/e{number}.sock"));
        let mut guest = Client::connect(&socket, &format!("e{number}")).unwrap();
        holds(&mut guest, 0, byte);
    }
}

fn names(exports: &[rpc::block::Export]) -> Vec<(String, u64)> {
    exports.iter().map(|export| (export.name.clone(), export.generation)).collect()
}

/// Why a volume is failed, once it is.
async fn failure(client: &rpc::Client, number: u128) -> String {
    for _ in 0..3000 {
        let volumes = client.volumes().await.unwrap();
        let volume = volumes.into_iter().find(|volume| volume.id == id(number)).unwrap();
        if let VolumeHealth::Failed(reason) = volume.state {
            return reason;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("volume {number} did not fail");
}

/// A loop device, as long as this lives.
struct Loop(String);

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).output();
    }
}

/// The kernel took the writes and could not bring them to the disk: it says so to one
/// flush, and would let the next succeed.
#[test]
fn a_flush_that_failed_is_never_followed_by_one_that_succeeds() {
    const TEST: &str = "a_flush_that_failed_is_never_followed_by_one_that_succeeds";
    for engine in engines() {
        let bench = Bench::new(1);
        let Some(small) = Small::mount(TEST, &bench.path("disk"), 24) else { return };
        let image = bench.path("disk/thin.img");
        std::fs::File::create(&image).unwrap().set_len(64 * MIB).unwrap();
        let Some(device) = succeed(TEST, "losetup", &["-f", "--show", text(&image)]) else {
            return;
        };
        let device = Loop(device.trim().to_owned());
        let socket = bench.socket();
        let arguments = ["serve", "--file", &device.0, "--socket", text(&socket)];
        let more = ["--cache", "writeback", "--engine", engine];
        let _server = fixture::Server::start(&[&arguments[..], &more].concat());
        let mut client = Client::connect(&socket, "").unwrap();
        assert_eq!(write(&mut client, 0, FUA), 0, "{engine}");
        small.fill();
        for piece in 1..40 {
            // Into memory; perhaps it is written, and fails, before the flush.
            write(&mut client, piece, 0);
        }
        assert_eq!(client.attempt((FLUSH, 0), 0, 0, &[]).unwrap(), EIO, "{engine}");
        small.make_room();
        for (kind, payload) in [((FLUSH, 0), 0), ((WRITE, FUA), PIECE), ((READ, 0), 0)] {
            let bytes = vec![1; payload as usize];
            let length = if kind.0 == FLUSH { 0 } else { PIECE };
            let error = client.attempt(kind, 0, length, &bytes).unwrap();
            assert_eq!(error, EIO, "{engine}: {kind:?} after a flush that failed");
        }
    }
}

/// A disk whose flushes and writes fail while a file of that name is there: nbdkit with
/// scripts, as a file by nbdfuse.
struct Failing {
    fuse: Option<Fuse>,
    nbdkit: Child,
}

impl Failing {
    fn new(test: &str, folder: &Path) -> Option<Self> {
        std::fs::create_dir_all(folder).unwrap();
        let at = |name: &str| folder.join(name);
        let data = at("data");
        std::fs::File::create(&data).unwrap().set_len(8 * MIB).unwrap();
        let (data, socket) = (text(&data).to_owned(), at("socket"));
        let fails =
            |deed: &str| format!("if [ -e {} ]; then echo EIO >&2; exit 1; fi", text(&at(deed)));
        let nbdkit = Command::new("nbdkit")
            .args(["-f", "-U", text(&socket), "eval", "get_size=echo 8388608"])
            .arg(format!(
                "pread=dd if={data} skip=$4 count=$3 iflag=skip_bytes,count_bytes status=none"
            ))
            .arg(format!(
                "pwrite={}; dd of={data} seek=$4 conv=notrunc oflag=seek_bytes status=none",
                fails("writes-fail")
            ))
            .arg(format!("flush={}", fails("flushes-fail")))
            .args(["can_write=exit 0", "can_flush=exit 0"])
            .stdin(Stdio::null())
            .spawn();
        let nbdkit = match nbdkit {
            Ok(nbdkit) => nbdkit,
            Err(error) => {
                skip(test, &format!("nbdkit: {error}"));
                return None;
            }
        };
        let mut made = Self { fuse: None, nbdkit };
        for _ in 0..3000 {
            if socket.exists() {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let uri = format!("nbd+unix:///?socket={}", socket.display());
        made.fuse = Fuse::mount(at("fuse"), &uri);
        if made.fuse.is_none() {
            skip(test, "nbdfuse cannot mount");
            return None;
        }
        Some(made)
    }

    fn file(&self) -> std::path::PathBuf {
        self.fuse.as_ref().unwrap().file()
    }
}

impl Drop for Failing {
    fn drop(&mut self) {
        self.fuse = None;
        let _ = self.nbdkit.kill();
        let _ = self.nbdkit.wait();
    }
}

/// One file shown in another's place.
struct Bound<'a>(&'a Path);

impl Drop for Bound<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).output();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_that_fails_a_sync_stops_its_volume_also_after_a_restart() {
    const TEST: &str = "a_disk_that_fails_a_sync_stops_its_volume_also_after_a_restart";
    let home = Home::new();
    let folder = home.path("failing");
    let Some(disk) = Failing::new(TEST, &folder) else { return };
    let (server, client) = home.start();
    for number in [1, 2] {
        client.put_volume(id(number), &plain(8)).await.unwrap();
    }
    let file = home.volumes().join(format!("{}.img", id(1)));
    let bound = run(TEST, "mount", &["--bind", text(&disk.file()), text(&file)]).unwrap();
    assert!(bound.status.success(), "{bound:?}");
    let _bound = Bound(&file);
    for number in [1, 2] {
        let export = format!("e{number}");
        client.put_export(&export, &writer(id(number), 1)).await.unwrap();
    }
    let connect = |number: u128| {
        Client::connect(&home.path(&format!("r/nbd/e{number}.sock")), &format!("e{number}"))
            .unwrap()
    };
    let (mut guest, mut other) = (connect(1), connect(2));
    assert_eq!(write(&mut guest, 0, FUA), 0);

    // A write that fails is that write's failure.
    std::fs::write(folder.join("writes-fail"), "").unwrap();
    assert_eq!(write(&mut guest, 1, 0), EIO);
    std::fs::remove_file(folder.join("writes-fail")).unwrap();
    assert_eq!(write(&mut guest, 1, 0), 0);
    holds(&mut guest, 0, 1);

    // A sync that fails is the volume's.
    std::fs::write(folder.join("flushes-fail"), "").unwrap();
    assert_eq!(guest.attempt((FLUSH, 0), 0, 0, &[]).unwrap(), EIO);
    std::fs::remove_file(folder.join("flushes-fail")).unwrap();
    assert_eq!(guest.attempt((FLUSH, 0), 0, 0, &[]).unwrap(), EIO);
    assert_eq!(guest.attempt((READ, 0), 0, PIECE, &[]).unwrap(), EIO);
    assert_eq!(write(&mut other, 0, FUA), 0, "another volume is not touched");
    let reason = failure(&client, 1).await;
    assert!(reason.contains("sync failed"), "{reason}");
    let refused = client.set_quality(id(1), &Quality::default()).await.unwrap_err();
    assert_eq!(refused.kind, Kind::Damaged);

    server.kill();
    let (_server, client) = home.start();
    assert_eq!(failure(&client, 1).await, reason);
    let (mut guest, mut other) = (connect(1), connect(2));
    assert_eq!(guest.attempt((READ, 0), 0, PIECE, &[]).unwrap(), EIO);
    holds(&mut other, 0, 1);
}
