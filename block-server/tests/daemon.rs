//! The daemon over its control socket: volumes, exports, fencing, crashes.

mod fixture;

use std::path::Path;
use std::time::Duration;

use block_server::vhost::memory::Memory;
use fixture::front::{DATA, Front, Machine};
use fixture::home::{Home, MIB, id, writer};
use fixture::{run, skip, succeed, text};
use model::VolumeId;
use rpc::block::{NewExport, NewSize, NewVolume, Quality, Quiesce, SlowLog, VolumeHealth};
use rpc::{Client, Kind};

async fn ready(client: &Client, volume: VolumeId) -> rpc::block::Volume {
    for _ in 0..200 {
        let found = client.volumes().await.unwrap().into_iter().find(|v| v.id == volume).unwrap();
        match found.state {
            VolumeHealth::Filling => tokio::time::sleep(Duration::from_millis(50)).await,
            VolumeHealth::Ready => return found,
            VolumeHealth::Failed(reason) => panic!("{reason}"),
        }
    }
    panic!("the volume was not filled within 10 s");
}

async fn metrics(client: &Client) -> String {
    let request = http::Request::builder()
        .uri("/metrics")
        .header("host", "localhost")
        .body(http_body_util::Full::default())
        .unwrap();
    let (status, body) = client.send(request).await.unwrap();
    assert!(status.is_success());
    String::from_utf8(body.to_vec()).unwrap()
}

fn uri(socket: &Path, name: &str) -> String {
    format!("nbd+unix:///{name}?socket={}", socket.display())
}

fn qemu_io(test: &str, uri: &str, commands: &[&str]) -> Option<bool> {
    let commands = commands.iter().flat_map(|c| ["-c", c]);
    let arguments: Vec<&str> = ["-f", "raw"].into_iter().chain(commands).chain([uri]).collect();
    let output = run(test, "qemu-io", &arguments)?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    Some(output.status.success() && !told.contains("failed") && !told.contains("rror"))
}

#[tokio::test]
async fn a_volume_and_its_export_survive_kill_9() {
    const TEST: &str = "a_volume_and_its_export_survive_kill_9";
    let home = Home::new();
    let source = home.source(2);
    let (server, client) = home.start();
    let new = NewVolume { size_bytes: 8 * MIB, source: Some(source.clone()) };
    client.put_volume(id(1), &new).await.unwrap();
    let volume = ready(&client, id(1)).await;
    assert_eq!(volume.size_bytes, 8 * MIB);
    assert!(volume.allocated_bytes < 4 * MIB, "{volume:?}");
    // The same again is no error.
    client.put_volume(id(1), &new).await.unwrap();
    let export = client.put_export("att-1", &writer(id(1), 3)).await.unwrap();
    let place = uri(&export.socket, "att-1");
    let first = ["read -P 0x5a 0 2M", "read -P 0 2M 6M", "write -P 7 4M 1M", "flush"];
    let Some(held) = qemu_io(TEST, &place, &first) else { return };
    assert!(held);
    server.kill();
    // Its source is not needed any more.
    std::fs::remove_file(&source).unwrap();
    let (server, client) = home.start();
    assert_eq!(client.exports().await.unwrap(), std::slice::from_ref(&export));
    assert!(qemu_io(TEST, &place, &["read -P 7 4M 1M", "read -P 0x5a 0 2M"]).unwrap());
    assert_eq!(client.block_status().await.unwrap().exports, 1);
    let metrics = metrics(&client).await;
    let counted = format!("hostplane_volume_bytes_total{{volume=\"{}\",kind=\"read\"}} ", id(1));
    let bytes = metrics.lines().find_map(|l| l.strip_prefix(&counted)?.parse::<u64>().ok());
    assert!(bytes.is_some_and(|bytes| bytes >= 3 * MIB), "{metrics}");
    server.terminate();
    let (_server, client) = home.start();
    client.delete_export("att-1").await.unwrap();
    client.delete_export("att-1").await.unwrap();
    assert!(!export.socket.exists());
    client.delete_volume(id(1)).await.unwrap();
    client.delete_volume(id(1)).await.unwrap();
    assert!(client.volumes().await.unwrap().is_empty());
    assert_eq!(std::fs::read_dir(home.path("s/block-server/volumes")).unwrap().count(), 0);
}

#[tokio::test]
async fn what_cannot_be_is_refused_with_its_reason() {
    let home = Home::new();
    let (_server, client) = home.start();
    let plain = |size_bytes| NewVolume { size_bytes, source: None };
    let refused = |size| {
        let client = client.clone();
        async move { client.put_volume(id(1), &plain(size)).await.unwrap_err().kind }
    };
    for size in [0, 4095, 4097, !4095] {
        assert_eq!(refused(size).await, Kind::Refused, "{size}");
    }
    let missing = NewVolume { size_bytes: MIB, source: Some(home.path("missing")) };
    assert_eq!(client.put_volume(id(1), &missing).await.unwrap_err().kind, Kind::Refused);
    let too_large = NewVolume { size_bytes: MIB, source: Some(home.source(2)) };
    assert_eq!(client.put_volume(id(1), &too_large).await.unwrap_err().kind, Kind::Refused);

    client.put_volume(id(1), &plain(MIB)).await.unwrap();
    let other = client.put_volume(id(1), &plain(2 * MIB)).await.unwrap_err();
    assert_eq!(other.kind, Kind::Conflict);
    let unknown = client.put_export("a", &writer(id(9), 1)).await.unwrap_err();
    assert_eq!(unknown.kind, Kind::NotFound);
    for name in ["", "..", "a%2fb", ".hidden", &"x".repeat(65)] {
        assert!(client.put_export(name, &writer(id(1), 1)).await.is_err(), "{name}");
    }
    client.put_export("a", &writer(id(1), 5)).await.unwrap();
    let in_use = client.delete_volume(id(1)).await.unwrap_err();
    assert_eq!(in_use.kind, Kind::Conflict);
    assert!(in_use.message.contains("exported as a"), "{in_use}");
    // An older writer, and a second one of the same generation.
    assert_eq!(client.put_export("a", &writer(id(1), 4)).await.unwrap_err().kind, Kind::Conflict);
    assert_eq!(client.put_export("b", &writer(id(1), 4)).await.unwrap_err().kind, Kind::Conflict);
    assert_eq!(client.put_export("b", &writer(id(1), 5)).await.unwrap_err().kind, Kind::Conflict);
    // Readers may be many.
    let reader = NewExport { volume: id(1), read_only: true, generation: 0, owner_uid: None };
    client.put_export("r1", &reader).await.unwrap();
    client.put_export("r2", &reader).await.unwrap();
}

/// While a writer is connected, a greater generation takes the volume: from
/// then on the old one fails and the new one writes.
#[tokio::test(flavor = "multi_thread")]
async fn a_greater_generation_fences_the_writer_that_is_connected() {
    const TEST: &str = "a_greater_generation_fences_the_writer_that_is_connected";
    let home = Home::new();
    let (_server, client) = home.start();
    client.put_volume(id(1), &NewVolume { size_bytes: 4 * MIB, source: None }).await.unwrap();
    let old = client.put_export("old", &writer(id(1), 1)).await.unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fenced.py");
    let place = old.socket.clone();
    let marker = home.path("wrote");
    let go_on = home.path("go-on");
    let (marker_text, go_on_text) = (text(&marker).to_owned(), text(&go_on).to_owned());
    match run(TEST, "/usr/bin/python3", &["-c", "import nbd"]) {
        Some(output) if output.status.success() => {}
        Some(_) => return skip(TEST, "python3-libnbd is not installed"),
        None => return,
    }
    let fenced = std::thread::spawn(move || {
        succeed(TEST, "/usr/bin/python3", &[script, text(&place), &marker_text, &go_on_text])
    });
    for _ in 0..200 {
        if marker.exists() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let new = client.put_export("new", &writer(id(1), 2)).await.unwrap();
    std::fs::write(&go_on, "").unwrap();
    fenced.join().unwrap();
    let held = qemu_io(TEST, &uri(&new.socket, "new"), &["read -P 1 0 4k", "write -P 3 0 4k"]);
    assert_ne!(held, Some(false));
    // Who is fenced does not come in again.
    let late = qemu_io(TEST, &uri(&old.socket, "old"), &["read 0 4k"]);
    assert_ne!(late, Some(true));
}

#[tokio::test]
async fn a_filling_that_was_cut_short_begins_anew() {
    let home = Home::new();
    let source = home.source(64);
    let (server, client) = home.start();
    let new = NewVolume { size_bytes: 96 * MIB, source: Some(source) };
    client.put_volume(id(1), &new).await.unwrap();
    server.kill();
    let (_server, client) = home.start();
    ready(&client, id(1)).await;
    let made = std::fs::read(home.path(&format!("s/block-server/volumes/{}.img", id(1)))).unwrap();
    assert_eq!(made.len() as u64, 96 * MIB);
    assert!(made[..(64 * MIB) as usize].iter().all(|b| *b == 0x5a));
    assert!(made[(64 * MIB) as usize..].iter().all(|b| *b == 0));
    assert_eq!(std::fs::read_dir(home.path("s/block-server/volumes")).unwrap().count(), 1);
}

#[tokio::test]
async fn a_volume_whose_file_is_gone_is_failed_and_the_others_are_served() {
    let home = Home::new();
    let (server, client) = home.start();
    for number in [1, 2] {
        client.put_volume(id(number), &NewVolume { size_bytes: MIB, source: None }).await.unwrap();
        client.put_export(&format!("e{number}"), &writer(id(number), 1)).await.unwrap();
    }
    server.kill();
    let folder = home.path("s/block-server/volumes");
    std::fs::remove_file(folder.join(format!("{}.img", id(1)))).unwrap();
    std::fs::write(folder.join("stranger.img"), "not ours").unwrap();
    let (_server, client) = home.start();
    let volumes = client.volumes().await.unwrap();
    assert!(matches!(volumes[0].state, VolumeHealth::Failed(_)), "{volumes:?}");
    assert_eq!(volumes[1].state, VolumeHealth::Ready);
    assert!(home.path("r/nbd/e2.sock").exists());
    assert!(folder.join("stranger.img").exists());
    assert_eq!(client.put_export("e1", &writer(id(1), 2)).await.unwrap_err().kind, Kind::Damaged);
}

#[tokio::test]
async fn a_second_daemon_on_the_same_volumes_is_refused() {
    let home = Home::new();
    let (_server, _client) = home.start();
    let (state, run) = (home.path("s"), home.path("r"));
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_block-server"))
        .args(["daemon", "--name", "blk", "--state-dir", text(&state), "--run-dir", text(&run)])
        .output()
        .unwrap();
    assert!(!output.status.success());
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(told.contains("another block-server holds it"), "{told}");
}

fn grown(size_bytes: u64, reconnect: bool) -> NewSize {
    NewSize { size_bytes, reconnect }
}

/// As `qemu-io`, beside what the test does meanwhile.
fn qemu_io_beside(
    test: &'static str,
    uri: &str,
    commands: &'static [&'static str],
) -> std::thread::JoinHandle<(Option<bool>, Duration)> {
    let uri = uri.to_owned();
    std::thread::spawn(move || {
        let begun = clock();
        (qemu_io(test, &uri, commands), begun.elapsed())
    })
}

#[expect(clippy::disallowed_methods, reason = "a test measures the clock of the world")]
fn clock() -> std::time::Instant {
    std::time::Instant::now()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_grows_while_it_is_served_and_stays_so() {
    const TEST: &str = "a_volume_grows_while_it_is_served_and_stays_so";
    let home = Home::new();
    let (server, client) = home.start();
    client.put_volume(id(1), &NewVolume { size_bytes: 4 * MIB, source: None }).await.unwrap();
    let export = client.put_export("e", &writer(id(1), 1)).await.unwrap();
    let place = uri(&export.socket, "e");
    let Some(held) = qemu_io(TEST, &place, &["write -P 7 3M 1M"]) else { return };
    assert!(held);
    assert_ne!(qemu_io(TEST, &place, &["write 4M 4k"]), Some(true), "it ends there");
    let resized = client.resize_volume(id(1), grown(8 * MIB, false)).await.unwrap();
    assert_eq!(resized.size_bytes, 8 * MIB);
    client.resize_volume(id(1), grown(8 * MIB, true)).await.unwrap();
    let all = ["read -P 7 3M 1M", "read -P 0 4M 4M", "write -P 9 7M 1M", "flush"];
    assert_eq!(qemu_io(TEST, &place, &all), Some(true));
    for (size, kind) in [
        (4 * MIB, Kind::Refused),
        (8 * MIB + 512, Kind::Refused),
        ((64 << 40) + 4096, Kind::Refused),
    ] {
        let error = client.resize_volume(id(1), grown(size, false)).await.unwrap_err();
        assert_eq!(error.kind, kind, "{size}");
    }
    let missing = client.resize_volume(id(2), grown(MIB, false)).await.unwrap_err();
    assert_eq!(missing.kind, Kind::NotFound);
    server.kill();
    // As a crash between the file and the record leaves it.
    let image = home.path(&format!("s/block-server/volumes/{}.img", id(1)));
    std::fs::File::options().write(true).open(image).unwrap().set_len(16 * MIB).unwrap();
    let (_server, client) = home.start();
    assert_eq!(client.volumes().await.unwrap()[0].size_bytes, 8 * MIB);
    assert_eq!(qemu_io(TEST, &place, &["read -P 9 7M 1M"]), Some(true));
    assert_ne!(qemu_io(TEST, &place, &["write 8M 4k"]), Some(true));
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_bind_at_once_for_what_waits_too_and_stay_over_a_restart() {
    const TEST: &str = "limits_bind_at_once_for_what_waits_too_and_stay_over_a_restart";
    let home = Home::new();
    let (server, client) = home.start();
    client.put_volume(id(1), &NewVolume { size_bytes: 8 * MIB, source: None }).await.unwrap();
    let export = client.put_export("e", &writer(id(1), 1)).await.unwrap();
    let place = uri(&export.socket, "e");
    let one = Quality { iops: Some(1), ..Quality::default() };
    let set = client.set_quality(id(1), &one).await.unwrap();
    assert_eq!(set.limits.operations.map(|r| r.sustained), Some(1));
    server.kill();
    let (_server, client) = home.start();
    assert_eq!(client.volumes().await.unwrap()[0].quality, one);
    // Apart, so that they are not merged: some minutes, at one a second.
    let beside = qemu_io_beside(
        TEST,
        &place,
        &["write 0 4k", "write 1M 4k", "write 2M 4k", "write 3M 4k", "write 4M 4k", "flush"],
    );
    let mut waits = false;
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        waits = client.connections().await.unwrap().iter().any(|c| c.waits);
        if waits || beside.is_finished() {
            break;
        }
    }
    client.set_quality(id(1), &Quality::default()).await.unwrap();
    let (held, took) = beside.join().unwrap();
    let Some(held) = held else { return };
    assert!(held && waits);
    assert!(took < Duration::from_secs(4), "it waited {took:?} after the limit had gone");
    let text = metrics(&client).await;
    let counted = format!("hostplane_volume_throttled_operations_total{{volume=\"{}\"}} ", id(1));
    let count = text.lines().find_map(|l| l.strip_prefix(&counted)?.parse::<u64>().ok());
    assert!(count.is_some_and(|count| count > 0), "{text}");
    let gp4 = Quality { iops: Some(0), ..Quality::default() };
    assert_eq!(client.set_quality(id(1), &gp4).await.unwrap_err().kind, Kind::Refused);
    let st1 = Quality { kind: Some(model::VolumeKind::St1), ..Quality::default() };
    let refused = client.set_quality(id(1), &st1).await.unwrap_err();
    assert!(refused.message.contains("between 125 and 16384 GiB"), "{refused}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_quiesced_volume_takes_no_change_until_it_is_resumed_or_overdue() {
    const TEST: &str = "a_quiesced_volume_takes_no_change_until_it_is_resumed_or_overdue";
    let home = Home::new();
    let (_server, client) = home.start();
    client.put_volume(id(1), &NewVolume { size_bytes: 4 * MIB, source: None }).await.unwrap();
    let export = client.put_export("e", &writer(id(1), 1)).await.unwrap();
    let place = uri(&export.socket, "e");
    let Some(held) = qemu_io(TEST, &place, &["write -P 1 0 64k"]) else { return };
    assert!(held);
    client.quiesce_volume(id(1), Quiesce { deadline_ms: 60_000 }).await.unwrap();
    let syncs = |all: Vec<rpc::block::VolumeStatistics>| all[0].syncs;
    assert!(syncs(client.volume_statistics().await.unwrap()) > 0, "it was made durable");
    assert_eq!(qemu_io(TEST, &place, &["read -P 1 0 64k"]), Some(true), "reads go on");
    let beside = qemu_io_beside(TEST, &place, &["write -P 2 0 64k"]);
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        if client.connections().await.unwrap().iter().any(|c| c.waits) {
            break;
        }
    }
    let image = home.path(&format!("s/block-server/volumes/{}.img", id(1)));
    assert!(std::fs::read(&image).unwrap()[..65536].iter().all(|b| *b == 1), "nothing changed");
    client.resume_volume(id(1)).await.unwrap();
    assert_eq!(beside.join().unwrap().0, Some(true));
    // And without anybody's word.
    client.quiesce_volume(id(1), Quiesce { deadline_ms: 100 }).await.unwrap();
    assert_eq!(qemu_io(TEST, &place, &["write -P 3 0 64k"]), Some(true));
    for deadline_ms in [0, 60_001] {
        let refused = client.quiesce_volume(id(1), Quiesce { deadline_ms }).await.unwrap_err();
        assert_eq!(refused.kind, Kind::Refused);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_listed_cut_and_drained() {
    const TEST: &str = "connections_are_listed_cut_and_drained";
    let home = Home::new();
    let (_server, client) = home.start();
    client.put_volume(id(1), &NewVolume { size_bytes: 4 * MIB, source: None }).await.unwrap();
    let export = client.put_export("e", &writer(id(1), 1)).await.unwrap();
    let connect = || std::os::unix::net::UnixStream::connect(&export.socket).unwrap();
    let (mut one, mut two) = (connect(), connect());
    let mut greeting = [0; 18];
    for stream in [&mut one, &mut two] {
        std::io::Read::read_exact(stream, &mut greeting).unwrap();
    }
    let all = client.connections().await.unwrap();
    assert_eq!(all.len(), 2, "{all:?}");
    let pid = format!("pid {}", std::process::id());
    assert!(all[0].peer.ends_with(&pid) && all[0].export.is_none(), "{all:?}");
    client.disconnect(all[0].id).await.unwrap();
    client.disconnect(all[0].id).await.unwrap();
    assert_eq!(std::io::Read::read(&mut one, &mut greeting).unwrap(), 0, "it is closed");
    // The peer hears of it a turn before the worker has buried the connection.
    let mut left = client.connections().await.unwrap();
    for _ in 0..100 {
        if left.len() == 1 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
        left = client.connections().await.unwrap();
    }
    assert_eq!(left.iter().map(|c| c.id).collect::<Vec<_>>(), [all[1].id]);
    client.drain_export("e").await.unwrap();
    assert_eq!(std::io::Read::read(&mut two, &mut greeting).unwrap(), 0, "it is closed");
    assert_eq!(std::io::Read::read(&mut connect(), &mut greeting).unwrap_or(0), 0, "refused");
    assert_ne!(qemu_io(TEST, &uri(&export.socket, "e"), &["read 0 4k"]), Some(true));
    client.undrain_export("e").await.unwrap();
    assert_ne!(qemu_io(TEST, &uri(&export.socket, "e"), &["read 0 4k"]), Some(false));
    assert_eq!(client.drain_export("f").await.unwrap_err().kind, Kind::NotFound);
    client.set_slow_log(SlowLog { threshold_ms: 1000 }).await.unwrap();
}

/// Who drained an export did so for a reason, which a crash does not undo.
#[tokio::test(flavor = "multi_thread")]
async fn a_drained_export_stays_drained_over_a_crash_until_it_is_undone() {
    let home = Home::new();
    let (server, client) = home.start();
    client.put_volume(id(1), &NewVolume { size_bytes: 4 * MIB, source: None }).await.unwrap();
    let export = client.put_export("e", &writer(id(1), 1)).await.unwrap();
    let is_served = || {
        let mut stream = std::os::unix::net::UnixStream::connect(&export.socket).unwrap();
        std::io::Read::read(&mut stream, &mut [0; 18]).unwrap_or(0) == 18
    };
    assert!(is_served());
    client.drain_export("e").await.unwrap();
    server.kill();
    let (server, client) = home.start();
    assert!(!is_served(), "after kill -9");
    client.put_export("e", &writer(id(1), 2)).await.unwrap();
    assert!(!is_served(), "on new terms");
    client.undrain_export("e").await.unwrap();
    assert!(is_served());
    server.kill();
    let (_server, client) = home.start();
    assert!(is_served(), "undone for good");
    client.delete_export("e").await.unwrap();
}

/// In a mount namespace of its own: a disk of 4 MiB under a volume of 16.
#[test]
fn a_full_disk_is_told_as_such_and_loses_nothing() {
    const TEST: &str = "a_full_disk_is_told_as_such_and_loses_nothing";
    let bench = fixture::Bench::new(1);
    let (mount, socket) = (bench.path("small"), bench.socket());
    std::fs::create_dir(&mount).unwrap();
    let script = format!(
        "mount -t tmpfs -o size=4m none {mount} && truncate -s 16M {mount}/disk.img && \
         exec {server} serve --file {mount}/disk.img --socket {socket}",
        mount = mount.display(),
        server = env!("CARGO_BIN_EXE_block-server"),
        socket = socket.display(),
    );
    let probe = run(TEST, "unshare", &["-m", "true"]);
    if !probe.is_some_and(|output| output.status.success()) {
        return skip(TEST, "unshare -m is not permitted (needs root)");
    }
    let mut server =
        std::process::Command::new("unshare").args(["-m", "sh", "-c", &script]).spawn().unwrap();
    for _ in 0..100 {
        if socket.exists() {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    let place = bench.uri();
    let full = ["write -P 5 0 1M", "flush", "write -P 6 2M 8M"];
    let commands = full.iter().flat_map(|c| ["-c", c]);
    let arguments: Vec<&str> = ["-f", "raw"].into_iter().chain(commands).chain([&*place]).collect();
    let told = run(TEST, "qemu-io", &arguments);
    let kept = qemu_io(TEST, &place, &["read -P 5 0 1M", "write -P 7 0 1M", "flush"]);
    server.kill().unwrap();
    server.wait().unwrap();
    if let Some(output) = told {
        let told = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(told.contains("No space left on device"), "{told}");
        assert_eq!(kept, Some(true), "what was acknowledged is there, and can be written again");
    }
}

/// What virtio calls a read and a write.
const IN: u32 = 0;
const OUT: u32 = 1;
const DONE: u8 = 0;
const FAILED: u8 = 1;

fn guest(export: &rpc::block::Export) -> (Front, Machine) {
    let mut machine = Machine::new(true);
    let mut front = Front::connect(export.vhost_user.as_deref().unwrap());
    front.start(&mut machine, 0);
    (front, machine)
}

/// Every export has two sockets, and what one front writes the other reads, under
/// the same generation, size, limits and counters.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_s_memory_and_nbd_reach_the_same_volume() {
    let test = "a_guest_s_memory_and_nbd_reach_the_same_volume";
    let home = Home::new();
    let (server, client) = home.start();
    client.put_volume(id(1), &NewVolume { size_bytes: 8 * MIB, source: None }).await.unwrap();
    let export = client.put_export("v", &writer(id(1), 1)).await.unwrap();
    let (mut front, mut machine) = guest(&export);
    machine.memory.write(DATA, &[0x77; 4096]).unwrap();
    assert_eq!(machine.ask(OUT, 8, &[(DATA, 4096)], false), DONE);
    qemu_io(test, &uri(&export.socket, "v"), &["read -P 0x77 4096 4096", "write -P 0x33 0 4096"]);
    assert_eq!(machine.ask(IN, 0, &[(DATA, 4096)], true), DONE);
    let counted = client.volume_statistics().await.unwrap();
    assert!(counted[0].kinds["write"].operations >= 1, "{counted:?}");

    // A new size is in what the guest reads of its disk; its connection stays.
    let size = NewSize { size_bytes: 16 * MIB, reconnect: true };
    client.resize_volume(id(1), size).await.unwrap();
    assert_eq!(front.config()[..8], (16 * MIB / 512).to_le_bytes());
    assert_eq!(machine.ask(OUT, 12 * MIB / 512, &[(DATA, 4096)], false), DONE);

    // Killed and started anew: the same socket serves the same guest.
    let base = machine.used();
    server.kill();
    let (server, client) = home.start();
    let mut front = Front::connect(export.vhost_user.as_deref().unwrap());
    front.start(&mut machine, base);
    assert_eq!(machine.ask(IN, 8, &[(DATA, 4096)], true), DONE);

    // A later writer fences this one; a guest that comes by its terms is served.
    client.put_export("v", &writer(id(1), 2)).await.unwrap();
    assert_eq!(machine.ask(OUT, 0, &[(DATA, 4096)], false), FAILED);
    client.delete_export("v").await.unwrap();
    assert!(!export.vhost_user.unwrap().exists());
    assert!(front.is_cut());
    server.terminate();
}
