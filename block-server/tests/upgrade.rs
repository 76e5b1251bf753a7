//! A server replaced by another under load: clients that never connect anew see
//! nothing of it, and whoever dies in the middle, never do two serve.

mod fixture;

use std::io::{IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fixture::{Bench, Server, engines, free_address, run, skip, succeed, text};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

fn serve(bench: &Bench, engine: &str, more: &[&str]) -> Server {
    let upgrades = bench.path("upgrade.sock");
    let own = ["--engine", engine, "--take-over", text(&upgrades)];
    bench.serve(&[&own[..], more].concat())
}

/// fio writes and verifies by libnbd, which does not connect anew: any lost
/// connection is an error to it. Requests of up to 2 MiB are under way whenever
/// the server changes.
fn fio(uri: &str) -> Option<Child> {
    Command::new("fio")
        .args(["--name=v", "--ioengine=nbd", &format!("--uri={uri}"), "--rw=randwrite"])
        .args(["--bssplit=4k/40:64k/30:1m/20:2m/10", "--size=192M", "--io_size=192M"])
        .args(["--iodepth=16", "--verify=crc32c", "--verify_fatal=1", "--do_verify=1"])
        .args(["--rate=64m"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .ok()
}

fn assert_ended_well(fio: Child, what: &str) {
    let output = fio.wait_with_output().unwrap();
    let told = String::from_utf8_lossy(&output.stdout).into_owned()
        + &String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && told.contains("err= 0"), "{what}: {told}");
}

#[test]
fn many_upgrades_under_verified_load_are_not_noticed() {
    const TEST: &str = "many_upgrades_under_verified_load_are_not_noticed";
    for engine in engines() {
        let bench = Bench::new(192);
        let mut server = serve(&bench, engine, &[]);
        let Some(mut client) = fio(&bench.uri()) else { return skip(TEST, "fio is not installed") };
        let mut upgrades = 0;
        while client.try_wait().unwrap().is_none() {
            std::thread::sleep(Duration::from_millis(50));
            let successor = serve(&bench, engine, &[]);
            server.ended();
            server = successor;
            upgrades += 1;
        }
        assert_ended_well(client, engine);
        assert!(upgrades > 8, "{upgrades}");
        server.terminate();
    }
}

/// Many small requests on four connections, each cut at any place.
#[test]
fn copies_go_on_over_upgrades() {
    const TEST: &str = "copies_go_on_over_upgrades";
    let bench = Bench::new(256);
    let mut random = sim::Random::new(11);
    let bytes: Vec<u8> = (0..(256 << 20) / 8).flat_map(|_| random.next().to_le_bytes()).collect();
    std::fs::write(bench.path("source"), &bytes).unwrap();
    let free = free_address();
    let tcp = free.to_string();
    let mut server = serve(&bench, "auto", &["--tcp", &tcp]);
    let mut upgrades = 0;
    for _ in 0..3 {
        let copy = Command::new("nbdcopy")
            .args(["--connections=4", "--request-size=65536", "--flush"])
            .args([text(&bench.path("source")), &format!("nbd://{tcp}")])
            .stderr(Stdio::piped())
            .spawn();
        let Ok(mut copy) = copy else { return skip(TEST, "nbdcopy is not installed") };
        while copy.try_wait().unwrap().is_none() {
            let successor = serve(&bench, "auto", &["--tcp", &tcp]);
            server.ended();
            server = successor;
            upgrades += 1;
        }
        let output = copy.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(std::fs::read(bench.image()).unwrap() == bytes);
    }
    assert!(upgrades > 3, "{upgrades}");
    server.terminate();
}

/// A frame as the two servers exchange them.
fn frame(json: &str) -> Vec<u8> {
    [&(json.len() as u32).to_le_bytes()[..], &[0; 8], json.as_bytes()].concat()
}

fn read_frame(stream: &mut UnixStream) -> String {
    let mut header = [0; 12];
    stream.read_exact(&mut header).unwrap();
    let json = u32::from_le_bytes(header[..4].try_into().unwrap());
    let bytes = u64::from_le_bytes(header[4..].try_into().unwrap());
    let mut text = vec![0; json as usize];
    stream.read_exact(&mut text).unwrap();
    std::io::copy(&mut stream.take(bytes), &mut std::io::sink()).unwrap();
    String::from_utf8(text).unwrap()
}

const HELLO: &str = "{\"Hello\":{\"version\":4,\"kind\":\"block-server serve\"}}";

/// A successor that comes as far as `last` and dies.
fn false_successor(path: &Path, last: &str) {
    let mut stream = UnixStream::connect(path).unwrap();
    if last == "nothing" {
        return;
    }
    stream.write_all(&frame(HELLO)).unwrap();
    if last == "Hello" {
        return;
    }
    while read_frame(&mut stream) != "\"Welcome\"" {}
    if last == "Welcome" {
        return;
    }
    stream.write_all(&frame("\"Prepared\"")).unwrap();
    if last == "Prepared" {
        return;
    }
    while !read_frame(&mut stream).starts_with("{\"End\"") {}
}

#[test]
fn a_successor_that_dies_leaves_the_old_one_serving() {
    const TEST: &str = "a_successor_that_dies_leaves_the_old_one_serving";
    for engine in engines() {
        let bench = Bench::new(192);
        let server = serve(&bench, engine, &[]);
        let Some(mut client) = fio(&bench.uri()) else { return skip(TEST, "fio is not installed") };
        let mut tried = 0;
        'load: loop {
            for last in ["nothing", "Hello", "Welcome", "Prepared", "End"] {
                if client.try_wait().unwrap().is_some() {
                    break 'load;
                }
                false_successor(&bench.path("upgrade.sock"), last);
                tried += 1;
                std::thread::sleep(Duration::from_millis(30));
            }
        }
        assert_ended_well(client, engine);
        assert!(tried > 10, "{tried}");
        // One that cannot read its settings is none, either.
        let (missing, upgrades) = (bench.path("missing.toml"), bench.path("upgrade.sock"));
        let failed = Command::new(env!("CARGO_BIN_EXE_block-server"))
            .args(["serve", "--config", text(&missing), "--take-over", text(&upgrades)])
            .output()
            .unwrap();
        assert!(!failed.status.success());
        // Nor is one of another version.
        let mut stream = UnixStream::connect(&upgrades).unwrap();
        stream.write_all(&frame(&HELLO.replace(":4", ":999"))).unwrap();
        assert!(read_frame(&mut stream).contains("Refused"));
        let Some(told) = succeed(TEST, "nbdinfo", &[&bench.uri()]) else { return };
        assert!(told.contains("export-size: 201326592"), "{told}");
        server.terminate();
    }
}

/// Sends a frame with a descriptor.
fn send(stream: &UnixStream, json: &str, fd: BorrowedFd<'_>) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let fds = [fd];
    assert!(control.push(SendAncillaryMessage::ScmRights(&fds)));
    let bytes = frame(json);
    sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::empty()).unwrap();
}

/// The old one falls silent after `Ready`: while it lives the new one must not
/// serve; once it is dead the new one must. Nor must it when it was told to, and the old
/// one will hear no more that it does.
#[test]
fn a_successor_serves_only_when_the_old_one_said_so_or_is_dead() {
    for (old_lives, is_told) in [(true, false), (false, false), (true, true)] {
        let bench = Bench::new(4);
        let (path, upgrades) = (bench.socket(), bench.path("upgrade.sock"));
        let asked = UnixListener::bind(&upgrades).unwrap();
        let listening = UnixListener::bind(&path).unwrap();
        let mut old = Command::new("sleep").arg("100").spawn().unwrap();
        let pid = rustix::process::Pid::from_child(&old);
        let pidfd = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty()).unwrap();
        let image = bench.image();
        let mut successor = Command::new(env!("CARGO_BIN_EXE_block-server"))
            .args(["serve", "--file", text(&image), "--socket", text(&path)])
            .args(["--take-over", text(&upgrades)])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let (mut stream, _) = asked.accept().unwrap();
        assert_eq!(read_frame(&mut stream), HELLO);
        let name = format!("{{\"Socket\":{{\"name\":\"unix {}\"}}}}", path.display());
        send(&stream, &name, listening.as_fd());
        send(&stream, "\"Welcome\"", pidfd.as_fd());
        assert_eq!(read_frame(&mut stream), "\"Prepared\"");
        stream.write_all(&frame("{\"End\":{\"connections\":0}}")).unwrap();
        assert_eq!(read_frame(&mut stream), "\"Ready\"");
        if !old_lives {
            old.kill().unwrap();
            old.wait().unwrap();
        }
        if is_told {
            stream.shutdown(Shutdown::Read).unwrap();
            stream.write_all(&frame("\"Go\"")).unwrap();
        }
        drop(stream);
        if old_lives {
            assert!(!successor.wait().unwrap().success());
        } else {
            let info = run("upgrade", "nbdinfo", &[&bench.uri()]);
            assert!(info.is_none_or(|info| info.status.success()));
            assert!(successor.try_wait().unwrap().is_none());
            successor.kill().unwrap();
            successor.wait().unwrap();
        }
        let _ = old.kill();
        let _ = old.wait();
    }
}
