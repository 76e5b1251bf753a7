//! QEMU's own NBD client over TLS: its server is replaced and killed, and whoever
//! writes through it sees a pause.

mod fixture;

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use fixture::certificates::Certificates;
use fixture::wait::wait_for;
use fixture::{Bench, Server, engines, free_address, skip, text};

const PATIENCE: Duration = Duration::from_secs(60);

/// Replacements and deaths under each load.
const EVENTS: usize = 8;
/// A load that ended too soon is followed by another.
const LOADS_MAX: usize = 8;

/// Ended with the test, however that ends.
struct Relay(Child);

impl Drop for Relay {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// QEMU's block layer without a guest: its NBD client in front, its NBD server behind.
fn relay(folder: &Path, port: u16, behind: &Path) -> std::io::Result<Relay> {
    Command::new("qemu-storage-daemon")
        .arg("--object")
        .arg(format!("tls-creds-x509,id=t,endpoint=client,dir={}", text(folder)))
        .arg("--blockdev")
        .arg(format!(
            "driver=nbd,node-name=n,server.type=inet,server.host=127.0.0.1,server.port={port},\
             tls-creds=t,tls-hostname=localhost,reconnect-delay=300,cache.direct=on"
        ))
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", text(behind))])
        .args(["--export", "type=nbd,id=e,node-name=n,name=disk,writable=on"])
        .stdin(Stdio::null())
        .spawn()
        .map(Relay)
}

/// Writes, and reads all back; an I/O error or a lost connection ends it.
fn fio(behind: &Path) -> std::io::Result<Child> {
    Command::new("fio")
        .args(["--name=v", "--ioengine=nbd", "--rw=randwrite", "--bssplit=4k/50:64k/40:1m/10"])
        .arg(format!("--uri=nbd+unix:///disk?socket={}", text(behind)))
        .args(["--size=48M", "--io_size=48M", "--iodepth=16", "--rate=24m,24m"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--do_verify=1"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
}

#[test]
fn qemus_client_comes_again_over_tls_and_loses_nothing() {
    const TEST: &str = "qemus_client_comes_again_over_tls_and_loses_nothing";
    for engine in engines() {
        let bench = Bench::new(48);
        let Some(certificates) = Certificates::new(TEST, &bench) else { return };
        let folder = certificates.client("ca", "host-a", "DNS:host-a");
        let free = free_address();
        let (address, image) = (free.to_string(), bench.image());
        let (own, upgrades) = (bench.path("server"), bench.path("up.sock"));
        let serve = || {
            let files = ["serve", "--engine", engine, "--file", text(&image)];
            let place = ["--tcp", &address, "--tls-certificates", text(&own)];
            let more = ["--take-over", text(&upgrades)];
            Server::start(&[&files[..], &place, &more].concat())
        };
        let mut server = serve();
        let behind = bench.path("behind.sock");
        let _relay = match relay(&folder, free.port(), &behind) {
            Ok(relay) => relay,
            Err(error) => return skip(TEST, &format!("qemu-storage-daemon: {error}")),
        };
        wait_for("QEMU has come in and listens", PATIENCE, || UnixStream::connect(&behind).is_ok());
        let mut events = 0;
        for _ in 0..LOADS_MAX {
            let Ok(mut load) = fio(&behind) else { return skip(TEST, "fio is not installed") };
            while load.try_wait().unwrap().is_none() {
                std::thread::sleep(Duration::from_millis(200));
                if events % 4 == 2 {
                    server.kill();
                    server = serve();
                } else {
                    let successor = serve();
                    std::mem::replace(&mut server, successor).ended();
                }
                events += 1;
            }
            let output = load.wait_with_output().unwrap();
            let told = [output.stdout, output.stderr].concat();
            let told = String::from_utf8_lossy(&told);
            assert!(output.status.success() && told.contains("err= 0"), "{engine}: {told}");
            if events >= EVENTS {
                break;
            }
        }
        assert!(events >= EVENTS, "{events}");
        eprintln!("{engine}: {events} hand-overs and deaths");
        server.terminate();
    }
}
