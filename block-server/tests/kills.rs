//! The server is killed again and again under load that is verified.

mod fixture;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use fixture::client::{Client, Ledger};
use fixture::{Bench, engines, qemu_image, skip};
use sim::{Random, is_full, seed_from_environment};

const VOLUMES: usize = 3;
const WRITERS_A_VOLUME: usize = 2;
const BLOCKS_A_WRITER: usize = 256;

/// From the kill to the answer to the first client: a bound for a loaded machine.
const RECOVERY_MAX: Duration = Duration::from_secs(10);

#[expect(clippy::disallowed_methods, reason = "a test against a real program takes real time")]
fn now() -> Instant {
    Instant::now()
}

/// Writes, flushes and reads until it is told to stop; comes back after each
/// kill and finds all that was acknowledged. Gives its ledger and its returns.
fn write_on(
    socket: &Path,
    export: &str,
    first: u64,
    seed: u64,
    done: &AtomicBool,
    slowest_return_ms: &AtomicU64,
) -> (Ledger, u64) {
    let mut ledger = Ledger::new(first, BLOCKS_A_WRITER);
    let (mut random, mut returns) = (Random::new(seed), 0);
    while !done.load(Ordering::Relaxed) {
        let left = now();
        let mut client = reconnect(socket, export);
        // What was sent and not answered may be there or not; the rest must be.
        if ledger.verify(&mut client, "after a kill", |l, i| l.acknowledged[i]).is_err() {
            continue;
        }
        slowest_return_ms.fetch_max(left.elapsed().as_millis() as u64, Ordering::Relaxed);
        returns += 1;
        // What was read is what counts now: a lost write may not come up later.
        while !done.load(Ordering::Relaxed) {
            if ledger.burst(&mut client, &mut random, |_| ()).is_err() {
                break;
            }
        }
    }
    (ledger, returns)
}

fn reconnect(socket: &Path, export: &str) -> Client {
    let start = now();
    loop {
        match Client::connect(socket, export) {
            Ok(client) => return client,
            Err(error) => {
                assert!(start.elapsed() < RECOVERY_MAX, "{export}: not back: {error}");
                std::thread::sleep(Duration::from_millis(2));
            }
        }
    }
}

/// QEMU's client, round after round: it must never be told of an error.
fn qemu_on(socket: &Path, done: &AtomicBool) -> Option<u64> {
    let image = qemu_image(socket, "qemu");
    let mut rounds = 0;
    // Once nobody is killed any more a round comes to its end.
    while !done.load(Ordering::Relaxed) || rounds == 0 {
        let mut commands = Vec::new();
        for step in 0..40_u64 {
            let (pattern, at) = ((rounds * 40 + step) % 255 + 1, step * 37 % 100 * 64);
            commands.push(format!("write -P {pattern} {at}k 64k"));
            commands.push(if step % 5 == 0 { "flush" } else { "sleep 5" }.to_owned());
            commands.push(format!("read -P {pattern} {at}k 64k"));
        }
        let output = Command::new("qemu-io")
            .args(["--image-opts", &image])
            .args(commands.iter().flat_map(|c| ["-c", c]))
            .stdin(Stdio::null())
            .output()
            .ok()?;
        let told = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        // Only its very first connection may meet a server that is just dead.
        if told.contains("Failed to connect") || told.contains("can't open") {
            continue;
        }
        assert!(output.status.success() && !told.contains("failed"), "{told}");
        assert!(!told.contains("rror"), "{told}");
        rounds += 1;
    }
    Some(rounds)
}

fn kill_again_and_again(engine: &str, kills: usize) {
    let bench = Bench::new(8);
    let names = ["a", "b", "c", "qemu"];
    let mut exports = Vec::new();
    for name in names {
        let path: PathBuf = bench.path(&format!("{name}.img"));
        std::fs::File::create(&path).unwrap().set_len(8 << 20).unwrap();
        exports.push(format!("{name}={}", path.display()));
    }
    let mut arguments = vec!["--engine", engine];
    arguments.extend(exports.iter().flat_map(|e| ["--export", e.as_str()]));
    let seed = seed_from_environment();
    eprintln!("SEED={seed}");
    let (done, slowest) = (AtomicBool::new(false), AtomicU64::new(0));
    let socket = bench.socket();
    let mut random = Random::new(seed);
    let server = bench.serve(&arguments);
    let server = std::thread::scope(|scope| {
        let mut server = server;
        let mut writers = Vec::new();
        for export in names.into_iter().take(VOLUMES) {
            for writer in 0..WRITERS_A_VOLUME {
                let first = (writer * BLOCKS_A_WRITER) as u64;
                let (seed, socket) = (random.next(), &socket);
                let (done, slowest) = (&done, &slowest);
                writers.push(
                    scope.spawn(move || write_on(socket, export, first, seed, done, slowest)),
                );
            }
        }
        let qemu = scope.spawn(|| qemu_on(&socket, &done));
        let mut slowest_start = Duration::ZERO;
        for _ in 0..kills {
            std::thread::sleep(Duration::from_millis(10 + random.below(60)));
            server.kill();
            let start = now();
            server = bench.serve(&arguments);
            slowest_start = slowest_start.max(start.elapsed());
        }
        std::thread::sleep(Duration::from_millis(300));
        done.store(true, Ordering::Relaxed);
        let (mut writes, mut flushes, mut returns) = (0, 0, 0);
        for writer in writers {
            let (ledger, back) = writer.join().unwrap();
            writes += ledger.writes;
            flushes += ledger.flushes;
            returns += back;
        }
        match qemu.join().unwrap() {
            Some(rounds) => {
                assert!(rounds > 0, "QEMU's client never came to the end of a round");
                eprintln!("{engine}: QEMU's client: {rounds} rounds without an error");
            }
            None => skip("kills_under_verified_load_lose_nothing", "qemu-io is not installed"),
        }
        eprintln!(
            "{engine}: {kills} kills, {returns} returns, {writes} writes and {flushes} flushes \
             acknowledged; slowest start {slowest_start:?}, slowest return {} ms",
            slowest.load(Ordering::Relaxed)
        );
        assert!(slowest_start < RECOVERY_MAX && flushes > 0);
        assert!(returns > kills as u64, "the writers were seldom there: {returns} returns");
        server
    });
    server.terminate();
}

/// Several volumes, two writers each, and QEMU's client beside them.
#[test]
fn kills_under_verified_load_lose_nothing() {
    for engine in engines() {
        kill_again_and_again(engine, if is_full() { 2000 } else { 200 });
    }
}

/// The account itself: a write that is taken back behind the server is found.
#[test]
fn the_account_finds_a_write_that_was_lost() {
    let bench = Bench::new(1);
    let _server = bench.serve(&[]);
    let mut client = reconnect(&bench.socket(), "");
    let (mut ledger, mut random) = (Ledger::new(0, 16), Random::new(1));
    let mut old = Vec::new();
    for round in 0..40 {
        ledger.burst(&mut client, &mut random, |_| ()).unwrap();
        if round == 20 {
            old = std::fs::read(bench.image()).unwrap();
        }
    }
    ledger.verify(&mut client, "at first", |l, i| l.acknowledged[i]).unwrap();
    std::fs::write(bench.image(), old).unwrap();
    let found = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        ledger.verify(&mut client, "then", |l, i| l.acknowledged[i])
    }));
    assert!(found.is_err(), "a lost write was not found");
}
