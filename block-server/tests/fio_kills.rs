//! fio's own verification, while the server is killed at random moments of its
//! work. fio's NBD client does not come back by itself, QEMU's does: it stands
//! between them (`qemu-nbd` over `driver=nbd`). The listening socket belongs to
//! the test, as it does to systemd for a service that it activates: a client that
//! comes between two servers waits in the backlog and is not refused.

mod fixture;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use fixture::{Bench, Server, engines, qemu_image, skip, succeed, text};
use sim::{Random, is_full, seed_from_environment};

const TEST: &str = "fio_finds_all_it_wrote_while_the_server_is_killed";

/// In `./x test` and in the long run, for each engine.
const KILLS: usize = 8;
const KILLS_FULL: usize = 200;

const SIZE_MIB: u64 = 8;

/// How long a part may take on a loaded machine before the test gives up: this
/// many looks, [`PAUSE`] apart.
const LOOKS_MAX: usize = 6000;
const PAUSE: Duration = Duration::from_millis(10);

/// Kept from server to server; ended with the test.
struct Proxy(Child);

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Proxy {
    /// QEMU's client of the socket `to`, and a server for whoever cannot reconnect.
    fn start(to: &Path, at: &Path) -> Option<Self> {
        let image = qemu_image(to, "");
        let child = Command::new("qemu-nbd")
            .args(["--persistent", "--shared=4", "--socket", text(at), "--image-opts", &image])
            .stdin(Stdio::null())
            .spawn()
            .ok()?;
        let proxy = Self(child);
        wait_until("qemu-nbd listens", || at.exists().then_some(()));
        Some(proxy)
    }
}

fn wait_until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    for _ in 0..LOOKS_MAX {
        if let Some(found) = look() {
            return found;
        }
        std::thread::sleep(PAUSE);
    }
    panic!("{what}: not after {:?}", PAUSE * LOOKS_MAX as u32);
}

/// Reads and writes that this server has answered.
fn answered(metrics: &Path) -> Option<u64> {
    let told = fixture::metrics(metrics)?;
    let counts = told.lines().filter(|line| {
        line.starts_with("hostplane_volume_operations_total")
            && (line.contains("kind=\"write\"") || line.contains("kind=\"read\""))
    });
    counts.map(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).sum()
}

/// Beside the writes, those of a while ago are looked at. (With it, `--verify_only`
/// would look at nothing.)
const WRITE: &str = "--verify_backlog=64";
const LOOK: &str = "--verify_only";

/// One job: random writes of mixed sizes, each with its checksum, or a look at them.
fn job(uri: &str, seed: u64, more: &str) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-64k"])
        .args([&format!("--uri={uri}"), &format!("--size={SIZE_MIB}M")])
        .args([&format!("--randseed={seed}"), "--iodepth=16", "--fsync=64"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"])
        .args([more])
        .stdin(Stdio::null());
    fio
}

/// Round after round until it is told to stop; the seeds of the rounds that it
/// came to the end of, and `None` where there is no fio.
fn write_and_verify(uri: &str, first: u64, done: &AtomicBool) -> Option<Vec<u64>> {
    let mut rounds = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let seed = first.wrapping_add(rounds.len() as u64);
        let output = job(uri, seed, WRITE).output().ok()?;
        let told = String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "round {}: {told}", rounds.len());
        assert!(!told.contains("verify:"), "round {}: {told}", rounds.len());
        rounds.push(seed);
    }
    Some(rounds)
}

struct Place {
    bench: Bench,
    listener: OwnedFd,
    engine: &'static str,
}

impl Place {
    fn new(engine: &'static str) -> Self {
        let bench = Bench::new(SIZE_MIB);
        let listener = UnixListener::bind(bench.socket()).unwrap().into();
        Self { bench, listener, engine }
    }

    fn metrics(&self) -> PathBuf {
        self.bench.path("metrics.sock")
    }

    fn serve(&self) -> Server {
        let (image, metrics) = (self.bench.image(), self.metrics());
        let arguments =
            ["--file", text(&image), "--engine", self.engine, "--metrics", text(&metrics)];
        Server::activated(self.listener.try_clone().unwrap(), &arguments)
    }
}

fn kill_under_fio(engine: &'static str, kills: usize) -> Option<()> {
    let place = Place::new(engine);
    let seed = seed_from_environment();
    eprintln!("SEED={seed}");
    let mut random = Random::new(seed);
    let server = place.serve();
    let between = place.bench.path("qemu.sock");
    let Some(proxy) = Proxy::start(&place.bench.socket(), &between) else {
        skip(TEST, "qemu-nbd is not installed");
        return None;
    };
    let uri = format!("nbd+unix:///?socket={}", text(&between));
    let (done, first) = (AtomicBool::new(false), random.next() >> 32);
    let (rounds, server) = std::thread::scope(|scope| {
        let mut server = server;
        let fio = scope.spawn(|| write_and_verify(&uri, first, &done));
        for _ in 0..kills {
            // It dies at work, not while its client still looks for it.
            let at = 1 + random.below(400);
            wait_until("fio works", || {
                assert_eq!(server.has_ended(), None, "nobody asked it to");
                (fio.is_finished() || answered(&place.metrics())? >= at).then_some(())
            });
            if fio.is_finished() {
                break;
            }
            std::thread::sleep(Duration::from_micros(random.below(3000)));
            server.kill();
            server = place.serve();
        }
        done.store(true, Ordering::Relaxed);
        (fio.join().unwrap(), server)
    });
    let Some(rounds) = rounds else {
        skip(TEST, "fio is not installed");
        return None;
    };
    eprintln!("{engine}: {kills} kills, {} rounds of fio, each verified", rounds.len());
    drop(proxy);
    // Once more after the last kill, from the file, without anybody in between.
    server.kill();
    let server = place.serve();
    let last = rounds.last().expect("at least one round came to its end");
    let verified = job(&place.bench.uri(), *last, LOOK).output().unwrap();
    let told = String::from_utf8_lossy(&verified.stdout).into_owned()
        + &String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success() && !told.contains("verify:"), "{told}");
    server.terminate();
    Some(())
}

#[test]
fn fio_finds_all_it_wrote_while_the_server_is_killed() {
    for engine in engines() {
        let kills = if is_full() { KILLS_FULL } else { KILLS };
        if kill_under_fio(engine, kills).is_none() {
            return;
        }
    }
}

/// The account itself: fio notices one sector that is not what it wrote.
#[test]
fn fio_notices_a_sector_that_was_lost() {
    const TEST: &str = "fio_notices_a_sector_that_was_lost";
    let place = Place::new(engines()[0]);
    let server = place.serve();
    let uri = place.bench.uri();
    if succeed(TEST, "fio", &["--version"]).is_none() {
        return;
    }
    let written = job(&uri, 7, WRITE).output().unwrap();
    assert!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
    server.terminate();
    let mut bytes = std::fs::read(place.bench.image()).unwrap();
    bytes[3 << 20..][..512].fill(0);
    std::fs::write(place.bench.image(), bytes).unwrap();
    let _server = place.serve();
    let verified = job(&uri, 7, LOOK).output().unwrap();
    assert!(!verified.status.success(), "a lost sector was not found");
}
