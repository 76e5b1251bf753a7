//! The daemon replaced by another: its clients see nothing of it, and what it
//! knew is known by its successor.

mod fixture;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use block_server::vhost::memory::Memory;
use fixture::client::{BLOCK, Client, FUA, Ledger, READ, WRITE, request};
use fixture::disk::Stoppable;
use fixture::engines;
use fixture::front::{DATA, Front, Machine};
use fixture::home::{Home, MIB, id, writer};
use fixture::wait::wait_for;
use rpc::block::{NewVolume, Quality, Quiesce, VolumeHealth};
use sim::Random;

const WRITERS: usize = 2;
const BLOCKS_A_WRITER: usize = 256;
/// Blocks of a volume; beyond the writers' there is one for the pulse.
const PULSE_AT: u64 = (WRITERS * BLOCKS_A_WRITER * BLOCK) as u64;

const IN: u32 = 0;
const OUT: u32 = 1;
const DONE: u8 = 0;

/// A bound for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

#[expect(clippy::disallowed_methods, reason = "a test against a real program takes real time")]
fn now() -> Instant {
    Instant::now()
}

/// Bursts over one connection, which may never be lost.
fn write_on(socket: &Path, export: &str, first: u64, done: &AtomicBool, bursts: &AtomicU64) {
    let mut client = Client::connect(socket, export).unwrap();
    let mut ledger = Ledger::new(first, BLOCKS_A_WRITER);
    let mut random = Random::new(first + 1);
    while !done.load(Ordering::Relaxed) {
        ledger.burst(&mut client, &mut random, |_| ()).expect("no error and no reconnection");
        bursts.fetch_add(1, Ordering::Relaxed);
    }
    ledger.verify(&mut client, "at the end", |l, i| l.acknowledged[i]).unwrap();
}

/// One small write after another; the longest that one took since it was asked.
fn pulse(socket: &Path, export: &str, done: &AtomicBool, longest_us: &AtomicU64) {
    let mut client = Client::connect(socket, export).unwrap();
    while !done.load(Ordering::Relaxed) {
        let begun = now();
        let bytes = [request(0, WRITE, 5, PULSE_AT, 512), vec![1; 512]].concat();
        client.send(&bytes).unwrap();
        assert_eq!(client.reply().expect("no error and no reconnection"), (5, 0));
        longest_us.fetch_max(begun.elapsed().as_micros() as u64, Ordering::Relaxed);
    }
}

/// Several exports, several connections each, and a successor with another number
/// of threads each time.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_is_replaced_twenty_times_and_no_client_notices() {
    for engine in engines() {
        let home = Home::new();
        let (mut server, client) = home.start_with(&["--engine", engine]);
        let mut exports: Vec<(PathBuf, String)> = Vec::new();
        for number in 1..=4 {
            let name = format!("e{number}");
            exports.push((home.export(number, &name, 8).await, name));
        }
        let done = AtomicBool::new(false);
        let bursts: Vec<AtomicU64> = (0..4 * WRITERS).map(|_| AtomicU64::new(0)).collect();
        let pulses: Vec<AtomicU64> = (0..4).map(|_| AtomicU64::new(0)).collect();
        let mut pauses = Vec::new();
        std::thread::scope(|scope| {
            for (at, (socket, name)) in exports.iter().enumerate() {
                for writer in 0..WRITERS {
                    let (done, bursts) = (&done, &bursts[at * WRITERS + writer]);
                    let first = (writer * BLOCKS_A_WRITER) as u64;
                    scope.spawn(move || write_on(socket, name, first, done, bursts));
                }
                let (done, longest) = (&done, &pulses[at]);
                scope.spawn(move || pulse(socket, name, done, longest));
            }
            let busy = || {
                let before: Vec<u64> = bursts.iter().map(|b| b.load(Ordering::Relaxed)).collect();
                wait_for("every writer goes on", PATIENCE, || {
                    bursts.iter().zip(&before).all(|(b, was)| b.load(Ordering::Relaxed) > was + 1)
                });
            };
            for round in 0..20 {
                busy();
                for longest in &pulses {
                    longest.store(0, Ordering::Relaxed);
                }
                let threads = (round % 4 + 1).to_string();
                let more = ["--engine", engine, "--threads", &threads, "--take-over"];
                let (successor, _) = home.start_with(&more);
                std::mem::replace(&mut server, successor).ended();
                busy();
                pauses.extend(pulses.iter().map(|p| p.load(Ordering::Relaxed)));
            }
            done.store(true, Ordering::Relaxed);
        });
        pauses.sort_unstable();
        let at = |part: usize| pauses[(pauses.len() - 1) * part / 100] as f64 / 1000.0;
        let total: u64 = bursts.iter().map(|b| b.load(Ordering::Relaxed)).sum();
        eprintln!(
            "{engine}: 20 hand-overs, {total} bursts without an error; longest write beside one: \
             p50 {:.1} ms, p99 {:.1} ms, greatest {:.1} ms",
            at(50),
            at(99),
            at(100)
        );
        assert_eq!(client.exports().await.unwrap().len(), 4);
        server.terminate();
    }
}

/// Drains, quiesces, limits, failures and copies that run.
#[tokio::test(flavor = "multi_thread")]
async fn a_successor_knows_what_its_predecessor_knew() {
    let home = Home::new();
    let (server, client) = home.start();
    let open = home.export(1, "open", 4).await;
    let drained = home.export(2, "drained", 4).await;
    let held = home.export(3, "held", 4).await;
    let slow = home.export(4, "slow", 32).await;
    client.drain_export("drained").await.unwrap();
    let one = Quality { iops: Some(1), ..Quality::default() };
    client.set_quality(id(4), &one).await.unwrap();

    let mut writer_of_open = Client::connect(&open, "open").unwrap();
    let mut writer_of_held = Client::connect(&held, "held").unwrap();
    let mut writer_of_slow = Client::connect(&slow, "slow").unwrap();
    client.quiesce_volume(id(3), Quiesce { deadline_ms: 60_000 }).await.unwrap();
    let write = [request(0, WRITE, 9, 0, 512), vec![7; 512]].concat();
    writer_of_held.send(&write).unwrap();
    // A debt of a minute: one large operation is taken whole.
    writer_of_slow.call(READ, 0, 16 << 20).unwrap();
    // A copy that is cut, whatever has become of it by then.
    let source = home.source(96);
    let new = NewVolume { size_bytes: 128 * MIB, source: Some(source) };
    client.put_volume(id(5), &new).await.unwrap();
    wait_for("the held write waits", PATIENCE, || {
        let all = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(client.connections())
        });
        all.unwrap().iter().any(|c| c.export.as_deref() == Some("held") && c.waits)
    });

    let (server, client) = {
        let (successor, client) = home.start_with(&["--take-over"]);
        server.ended();
        (successor, client)
    };
    // The connections are the same ones.
    writer_of_open.call(READ, 0, 512).unwrap();
    assert!(Client::connect(&drained, "drained").is_err(), "it is drained");
    // It still waits: a read behind the write is not answered, and another's is.
    let mut reader = Client::connect(&held, "held").unwrap();
    assert_eq!(reader.call(READ, 0, 512).unwrap(), vec![0; 512], "the write came through");
    client.resume_volume(id(3)).await.unwrap();
    assert_eq!(writer_of_held.reply().unwrap(), (9, 0));
    assert_eq!(reader.call(READ, 0, 512).unwrap(), vec![7; 512]);
    // Its bucket is as empty as it was: the next operation waits.
    writer_of_slow.send(&request(0, READ, 4, 0, 512)).unwrap();
    wait_for("the limited read waits", PATIENCE, || {
        let all = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(client.connections())
        });
        all.unwrap().iter().any(|c| c.export.as_deref() == Some("slow") && c.waits)
    });
    for _ in 0..600 {
        let found = client.volumes().await.unwrap().into_iter().find(|v| v.id == id(5)).unwrap();
        assert!(!matches!(found.state, VolumeHealth::Failed(_)), "{found:?}");
        if found.state == VolumeHealth::Ready {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let made = std::fs::read(home.path(&format!("s/block-server/volumes/{}.img", id(5)))).unwrap();
    assert_eq!(made.len() as u64, 128 * MIB);
    assert!(made[..96 << 20].iter().all(|b| *b == 0x5a), "the copy was done anew");
    // Fences hold: a greater generation takes the volume from the connection that came over.
    client.put_export("open", &writer(id(1), 2)).await.unwrap();
    writer_of_open.send(&write).unwrap();
    assert_eq!(writer_of_open.reply().unwrap().1, 1, "EPERM");
    server.terminate();
}

/// A guest on vhost-user is told the end, comes again by the same socket, and
/// finds what it wrote.
#[tokio::test(flavor = "multi_thread")]
async fn a_guest_comes_again_to_the_successor() {
    let home = Home::new();
    let (server, client) = home.start();
    home.export(1, "v", 4).await;
    let place = client.exports().await.unwrap()[0].vhost_user.clone().unwrap();
    let mut machine = Machine::new(true);
    let mut front = Front::connect(&place);
    front.start(&mut machine, 0);
    machine.memory.write(DATA, &[0x77; 4096]).unwrap();
    assert_eq!(machine.ask(OUT, 8, &[(DATA, 4096)], false), DONE);
    let base = machine.used();
    let (successor, _) = home.start_with(&["--take-over"]);
    server.ended();
    assert!(front.is_cut());
    let mut front = Front::connect(&place);
    front.start(&mut machine, base);
    machine.memory.write(DATA, &[0; 4096]).unwrap();
    assert_eq!(machine.ask(IN, 8, &[(DATA, 4096)], true), DONE);
    let mut found = [0; 4096];
    machine.memory.read(DATA, &mut found).unwrap();
    assert_eq!(found, [0x77; 4096]);
    successor.terminate();
}

/// A successor that cannot be: the old one goes on with its connections.
#[tokio::test(flavor = "multi_thread")]
async fn a_successor_that_fails_before_it_is_ready_changes_nothing() {
    let home = Home::new();
    let (server, client) = home.start();
    let socket = home.export(1, "e", 4).await;
    let mut stays = Client::connect(&socket, "e").unwrap();
    let catalogue = home.path("s/block-server/catalogue.json");
    let good = std::fs::read(&catalogue).unwrap();
    std::fs::write(&catalogue, "{").unwrap();
    let failed = Command::new(env!("CARGO_BIN_EXE_block-server"))
        .args(home.arguments(&["--take-over"]))
        .output()
        .unwrap();
    assert!(!failed.status.success());
    let told = String::from_utf8_lossy(&failed.stderr);
    assert!(told.contains("catalogue"), "{told}");
    std::fs::write(&catalogue, good).unwrap();
    let bytes = [request(0, WRITE, 3, 0, 512), vec![7; 512]].concat();
    stays.send(&bytes).unwrap();
    assert_eq!(stays.reply().unwrap(), (3, 0));
    // Calls that waited for the decision are answered by the old one.
    client.put_export("e2", &writer(id(1), 2)).await.unwrap();
    // And without the option there is no second one, as ever.
    let second = Command::new(env!("CARGO_BIN_EXE_block-server"))
        .args(home.arguments(&[]))
        .output()
        .unwrap();
    assert!(String::from_utf8_lossy(&second.stderr).contains("another block-server holds it"));
    let (successor, client) = home.start_with(&["--take-over"]);
    server.ended();
    assert_eq!(client.exports().await.unwrap().len(), 2);
    successor.terminate();
}

/// A write of a killed server is still on its way to the disk: its successor
/// serves the volume only when that has landed, so that nothing lands later.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_server_s_write_does_not_land_after_its_successor_s() {
    const TEST: &str = "a_dead_server_s_write_does_not_land_after_its_successor_s";
    let home = Home::new();
    let disk = match Stoppable::new(home.path("outer"), home.volumes()) {
        Ok(disk) => disk,
        Err(reason) => return fixture::skip(TEST, &format!("no loop devices: {reason}")),
    };
    let (server, client) = home.start();
    let socket = home.export(1, "e", 4).await;
    let write = |byte: u8| [request(FUA, WRITE, 9, 0, 4096), vec![byte; 4096]].concat();
    let mut old = Client::connect(&socket, "e").unwrap();
    old.send(&write(1)).unwrap();
    assert_eq!(old.reply().unwrap(), (9, 0));
    disk.stop();
    old.send(&write(2)).unwrap();
    wait_for("the write is on its way", PATIENCE, || {
        let all = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(client.connections())
        });
        all.unwrap().iter().any(|c| c.in_flight == 1 && !c.waits)
    });
    server.kill();
    let server = disk.is_waited_for(|| home.start().0);
    let mut new = Client::connect(&socket, "e").unwrap();
    let found = new.call(READ, 0, 4096).unwrap();
    assert!(found == [1; 4096] || found == [2; 4096]);
    new.send(&write(3)).unwrap();
    assert_eq!(new.reply().unwrap(), (9, 0));
    assert_eq!(new.call(READ, 0, 4096).unwrap(), [3; 4096]);
    server.terminate();
}

/// A quiesce outlives kill -9: no change comes through before it is resumed.
#[tokio::test(flavor = "multi_thread")]
async fn a_quiesced_volume_stays_so_over_a_crash_until_it_is_resumed() {
    let home = Home::new();
    let (server, client) = home.start();
    let socket = home.export(1, "e", 4).await;
    client.quiesce_volume(id(1), Quiesce { deadline_ms: 60_000 }).await.unwrap();
    server.kill();
    let (server, client) = home.start();
    let mut writer = Client::connect(&socket, "e").unwrap();
    writer.send(&[request(0, WRITE, 9, 0, 512), vec![7; 512]].concat()).unwrap();
    wait_for("the write waits", PATIENCE, || {
        let all = tokio::task::block_in_place(|| {
            tokio::runtime::Handle::current().block_on(client.connections())
        });
        all.unwrap().iter().any(|c| c.waits)
    });
    client.resume_volume(id(1)).await.unwrap();
    assert_eq!(writer.reply().unwrap(), (9, 0));
    // What was resumed stays resumed.
    server.kill();
    let (server, _) = home.start();
    let mut writer = Client::connect(&socket, "e").unwrap();
    writer.send(&[request(0, WRITE, 9, 0, 512), vec![8; 512]].concat()).unwrap();
    assert_eq!(writer.reply().unwrap(), (9, 0));
    server.terminate();
}
