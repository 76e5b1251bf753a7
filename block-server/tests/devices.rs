//! Exports of block devices: a loop device over a file, so that what each command
//! does can be seen from beneath.

mod fixture;

use std::io::Read;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use fixture::{Bench, Server, engines, run, skip, succeed, text};

/// A loop device, as long as this lives.
struct Loop(String);

impl Loop {
    /// `None`, and a word about it, where there are no loop devices.
    fn over(test: &str, file: &Path, sector: u32) -> Option<Self> {
        let sector = sector.to_string();
        let arguments = ["-f", "--show", "-b", &sector, text(file)];
        let output = run(test, "losetup", &arguments)?;
        if !output.status.success() {
            skip(test, &String::from_utf8_lossy(&output.stderr));
            return None;
        }
        Some(Self(String::from_utf8_lossy(&output.stdout).trim().to_owned()))
    }

    fn claimed_by_someone(&self) -> bool {
        let opened =
            std::fs::OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(&self.0);
        opened.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).output();
    }
}

fn serve(bench: &Bench, device: &Loop, more: &[&str]) -> Server {
    let socket = bench.socket();
    let own = ["serve", "--file", &device.0, "--socket", text(&socket)];
    Server::start(&[&own[..], more].concat())
}

/// What it says when it cannot serve.
fn refusal(bench: &Bench, device: &Loop, more: &[&str]) -> String {
    let socket = bench.socket();
    let mut child = Command::new(env!("CARGO_BIN_EXE_block-server"))
        .args(["serve", "--file", &device.0, "--socket", text(&socket)])
        .args(more)
        .stderr(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let mut told = String::new();
    child.stderr.take().unwrap().read_to_string(&mut told).unwrap();
    assert!(!child.wait().unwrap().success(), "{told}");
    told
}

#[test]
fn a_block_device_obeys_every_command() {
    const TEST: &str = "a_block_device_obeys_every_command";
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/device.py");
    for engine in engines() {
        for sector in [512, 4096] {
            let bench = Bench::new(32);
            let Some(device) = Loop::over(TEST, &bench.image(), sector) else { return };
            let _server = serve(&bench, &device, &["--engine", engine]);
            let (socket, image, sector) = (bench.socket(), bench.image(), sector.to_string());
            succeed(TEST, "/usr/bin/python3", &[script, text(&socket), text(&image), &sector]);
        }
    }
}

#[test]
fn a_device_that_is_mounted_is_not_written_to() {
    const TEST: &str = "a_device_that_is_mounted_is_not_written_to";
    let bench = Bench::new(32);
    if succeed(TEST, "mkfs.ext4", &["-q", "-F", text(&bench.image())]).is_none() {
        return;
    }
    let Some(device) = Loop::over(TEST, &bench.image(), 512) else { return };
    let place = bench.path("mnt");
    std::fs::create_dir(&place).unwrap();
    succeed(TEST, "mount", &[&device.0, text(&place)]);
    let told = std::panic::catch_unwind(|| {
        let told = refusal(&bench, &device, &[]);
        // Who only reads may look at it.
        drop(serve(&bench, &device, &["--read-only"]));
        told
    });
    succeed(TEST, "umount", &[text(&place)]);
    let told = told.unwrap();
    assert!(told.contains(&device.0) && told.contains("in use"), "{told}");
    assert!(told.contains("--read-only"), "{told}");
    drop(serve(&bench, &device, &[]));
}

#[test]
fn a_served_device_is_claimed_also_by_each_successor() {
    const TEST: &str = "a_served_device_is_claimed_also_by_each_successor";
    let bench = Bench::new(32);
    let Some(device) = Loop::over(TEST, &bench.image(), 512) else { return };
    let upgrades = bench.path("upgrade.sock");
    let mut server = serve(&bench, &device, &["--take-over", text(&upgrades)]);
    assert!(device.claimed_by_someone());
    let second = bench.path("second.sock");
    let told = refusal(&bench, &device, &["--socket", text(&second)]);
    assert!(told.contains("cannot be used multiple times") || told.contains("in use"), "{told}");
    for _ in 0..2 {
        let successor = serve(&bench, &device, &["--take-over", text(&upgrades)]);
        server.ended();
        server = successor;
        assert!(device.claimed_by_someone());
    }
    server.terminate();
    assert!(!device.claimed_by_someone());
}

#[test]
fn a_device_that_shrinks_fails_what_is_gone_and_serves_the_rest() {
    const TEST: &str = "a_device_that_shrinks_fails_what_is_gone_and_serves_the_rest";
    for engine in engines() {
        let bench = Bench::new(32);
        let Some(device) = Loop::over(TEST, &bench.image(), 512) else { return };
        let _server = serve(&bench, &device, &["--engine", engine]);
        let uri = bench.uri();
        let io = |command: &str| {
            let output = run(TEST, "qemu-io", &["-f", "raw", "-t", "none", "-c", command, &uri])?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            Some(said + &String::from_utf8_lossy(&output.stderr))
        };
        let Some(first) = io("write -P 7 0 32M") else { return };
        assert!(first.contains("wrote 33554432/33554432"), "{first}");
        std::fs::OpenOptions::new()
            .write(true)
            .open(bench.image())
            .and_then(|file| file.set_len(16 << 20))
            .unwrap();
        succeed(TEST, "losetup", &["-c", &device.0]);
        for command in ["read 24M 64k", "write 24M 64k", "read 15M 2M"] {
            let told = io(command).unwrap();
            assert!(
                told.contains("Input/output error") || told.contains("No space left"),
                "{told}"
            );
        }
        let rest = io("read -P 7 0 16M").unwrap();
        assert!(rest.contains("read 16777216/16777216"), "{rest}");
    }
}
