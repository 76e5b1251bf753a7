//! `serve` keeps its files to itself: from other servers, and from what a killed
//! one still has on its way to the disk.

mod fixture;

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use fixture::client::{Client, FUA, READ, WRITE, request};
use fixture::disk::Stoppable;
use fixture::relay::Relay;
use fixture::wait::wait_for;
use fixture::{Bench, Server, engines, skip, text};
use rustix::process::{Pid, Signal, kill_process};

/// A bound for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn check(bench: &Bench, more: &[&str]) -> Output {
    let (image, socket) = (bench.image(), bench.path("other.sock"));
    let own = ["serve", "--check", "--file", text(&image), "--socket", text(&socket)];
    let mut command = Command::new(env!("CARGO_BIN_EXE_block-server"));
    command.args(own).args(more).output().unwrap()
}

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A reply to one write.
fn write(client: &mut Client, byte: u8) {
    client.send(&[request(FUA, WRITE, 9, 0, 4096), vec![byte; 4096]].concat()).unwrap();
    assert_eq!(client.reply().unwrap(), (9, 0));
}

#[test]
fn a_file_has_one_writer_or_readers_and_the_refusal_names_file_and_process() {
    let bench = Bench::new(4);
    let server = bench.serve(&[]);
    for more in [&[][..], &["--read-only"]] {
        let refused = check(&bench, more);
        let told = told(&refused);
        assert!(!refused.status.success(), "{more:?}");
        for part in ["disk.img", &format!("process {}", server.pid())] {
            assert!(told.contains(part), "{part} in {told}");
        }
    }
    server.terminate();
    let reader = bench.serve(&["--read-only"]);
    assert!(check(&bench, &["--read-only"]).status.success(), "two may read");
    assert!(!check(&bench, &[]).status.success(), "a reader keeps writers off");
    reader.terminate();
    wait_for("the lock is free", PATIENCE, || check(&bench, &[]).status.success());
}

/// One process may serve a file twice: by one open file, and so by one lock.
#[test]
fn one_server_may_export_a_file_several_times() {
    let bench = Bench::new(4);
    let again = format!("again={}", bench.image().display());
    let server = bench.serve(&["--export", &again]);
    write(&mut Client::connect(&bench.socket(), "again").unwrap(), 5);
    let mut first = Client::connect(&bench.socket(), "").unwrap();
    assert_eq!(first.call(READ, 0, 4096).unwrap(), [5; 4096]);
    server.terminate();
}

/// Requests that the server has not answered, as its metrics tell.
fn in_flight(metrics: &Path) -> bool {
    let Ok(mut stream) = std::os::unix::net::UnixStream::connect(metrics) else { return false };
    let ask = b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    let mut told = String::new();
    let done = std::io::Write::write_all(&mut stream, ask)
        .and_then(|()| std::io::Read::read_to_string(&mut stream, &mut told));
    let is_one = |line: &str| {
        line.starts_with("hostplane_volume_requests_in_flight") && line.ends_with(" 1")
    };
    done.is_ok() && told.lines().any(is_one)
}

/// The same for `serve` as for the daemon: a write of a killed server that is still
/// on its way lands before its successor serves the file, or never.
#[test]
fn a_killed_serve_s_write_does_not_land_after_its_successor_s() {
    const TEST: &str = "a_killed_serve_s_write_does_not_land_after_its_successor_s";
    let bench = Bench::new(4);
    let disk = match Stoppable::new(bench.path("outer"), bench.path("inner")) {
        Ok(disk) => disk,
        Err(reason) => return skip(TEST, &format!("no loop devices: {reason}")),
    };
    let image = bench.path("inner/disk.img");
    std::fs::write(&image, vec![0; 1 << 20]).unwrap();
    std::fs::File::open(&image).unwrap().sync_all().unwrap();
    let (socket, metrics) = (bench.socket(), bench.path("m.sock"));
    let arguments = ["serve", "--file", text(&image), "--socket", text(&socket)];
    let server = Server::start(&[&arguments[..], &["--metrics", text(&metrics)]].concat());
    let mut old = Client::connect(&socket, "").unwrap();
    write(&mut old, 1);
    disk.stop();
    old.send(&[request(FUA, WRITE, 9, 0, 4096), vec![2; 4096]].concat()).unwrap();
    wait_for("the write is on its way", PATIENCE, || in_flight(&metrics));
    server.kill();
    let server = disk.is_waited_for(|| Server::start(&arguments));
    let mut new = Client::connect(&socket, "").unwrap();
    let found = new.call(READ, 0, 4096).unwrap();
    assert!(found == [1; 4096] || found == [2; 4096]);
    write(&mut new, 3);
    assert_eq!(new.call(READ, 0, 4096).unwrap(), [3; 4096]);
    server.terminate();
}

/// What a successor is started with, and whether the file is then locked for it alone.
const CHANGES: [(&[&str], bool); 7] = [
    (&[], true),
    (&["--cache", "writeback"], true),
    (&["--read-only"], false),
    (&["--read-only", "--cache", "writeback"], false),
    (&["--cache", "writeback"], true),
    (&[], true),
    (&[], true),
];

/// Whatever changes with an upgrade: writing or reading, by which cache, and another
/// file at the same path.
#[test]
fn the_lock_goes_with_every_upgrade() {
    for engine in engines() {
        let bench = Bench::new(4);
        let upgrades = bench.path("up.sock");
        let serve = |more: &[&str]| {
            let own = ["--engine", engine, "--take-over", text(&upgrades)];
            bench.serve(&[&own[..], more].concat())
        };
        let mut server = serve(&[]);
        for (more, is_alone) in CHANGES {
            let successor = serve(more);
            std::mem::replace(&mut server, successor).ended();
            assert!(!check(&bench, &[]).status.success(), "{engine} {more:?}: a second writer");
            let reader = check(&bench, &["--read-only"]);
            assert_eq!(reader.status.success(), !is_alone, "{engine} {more:?}: {}", told(&reader));
            if is_alone {
                write(&mut Client::connect(&bench.socket(), "").unwrap(), 7);
            }
        }
        // Another file under its name is another file.
        let other = bench.path("new.img");
        std::fs::write(&other, vec![9; 4 << 20]).unwrap();
        std::fs::rename(&other, bench.image()).unwrap();
        let successor = serve(&[]);
        std::mem::replace(&mut server, successor).ended();
        let mut client = Client::connect(&bench.socket(), "").unwrap();
        assert_eq!(client.call(READ, 0, 4096).unwrap(), [9; 4096]);
        assert!(!check(&bench, &[]).status.success());
        server.terminate();
        wait_for("the lock is free", PATIENCE, || check(&bench, &[]).status.success());
    }
}

/// One that would write where others read is refused before it is too late.
#[test]
fn a_successor_that_may_not_write_leaves_the_old_one_serving() {
    let bench = Bench::new(4);
    let upgrades = bench.path("up.sock");
    let server = bench.serve(&["--read-only", "--take-over", text(&upgrades)]);
    let (image, beside) = (bench.image(), bench.path("beside.sock"));
    let own = ["serve", "--file", text(&image), "--socket", text(&beside), "--read-only"];
    let reader = Server::start(&own);
    let mut client = Client::connect(&bench.socket(), "").unwrap();
    let refused = Command::new(env!("CARGO_BIN_EXE_block-server"))
        .args(["serve", "--file", text(&image), "--socket", text(&bench.socket())])
        .args(["--take-over", text(&upgrades)])
        .stdout(Stdio::null())
        .output()
        .unwrap();
    assert!(!refused.status.success());
    assert!(told(&refused).contains("disk.img"), "{}", told(&refused));
    client.call(READ, 0, 4096).unwrap();
    reader.terminate();
    assert!(!check(&bench, &[]).status.success(), "its lock is still there");
    server.terminate();
}

/// Ended with the test, whatever becomes of it.
struct Successor(Child);

impl Drop for Successor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// One that stood still when it was told to begin moves the lock to an open file of its
/// own when it goes on, learns that it is too late, and gives the lock back.
#[test]
fn a_successor_that_is_too_late_gives_the_lock_back() {
    let bench = Bench::new(4);
    let upgrades = bench.path("up.sock");
    let mut server = bench.serve(&["--take-over", text(&upgrades)]);
    let mut client = Client::connect(&bench.socket(), "").unwrap();
    write(&mut client, 1);
    let relay = Relay::at(&upgrades);
    let (image, socket) = (bench.image(), bench.socket());
    let successor = Command::new(env!("CARGO_BIN_EXE_block-server"))
        .args(["serve", "--file", text(&image), "--socket", text(&socket)])
        .args(["--take-over", text(&upgrades), "--cache", "writeback"])
        .stdout(Stdio::null())
        .spawn();
    let mut successor = Successor(successor.unwrap());
    let pid = Pid::from_child(&successor.0);
    let begun = relay.carry(|word, is_passed| {
        if word == "Go" && !is_passed {
            kill_process(pid, Signal::STOP).unwrap();
        }
    });
    assert!(!begun);
    write(&mut client, 2);
    kill_process(pid, Signal::CONT).unwrap();
    wait_for("it ends", PATIENCE, || successor.0.try_wait().unwrap().is_some());
    assert!(!successor.0.wait().unwrap().success());
    assert!(server.has_ended().is_none());
    assert!(!check(&bench, &[]).status.success(), "a second writer");
    write(&mut client, 3);
    server.terminate();
    wait_for("the lock is free", PATIENCE, || check(&bench, &[]).status.success());
}
