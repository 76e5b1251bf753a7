//! SIGHUP: the file is read anew, clients go on, and the service manager is told.

mod fixture;

use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use fixture::client::{Client, READ, WRITE, request};
use fixture::wait::wait_for;
use fixture::{Bench, Server, engines, skip, text};
use rustix::process::{Pid, Signal, kill_process};

/// A bound for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ends a process that is not our child with the test.
struct Stranger(Pid);

impl Drop for Stranger {
    fn drop(&mut self) {
        let _ = kill_process(self.0, Signal::KILL);
    }
}

/// What systemd would hear.
struct Manager {
    socket: UnixDatagram,
}

impl Manager {
    fn at(path: &Path) -> Self {
        let socket = UnixDatagram::bind(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        Self { socket }
    }

    fn hears(&self) -> String {
        let mut bytes = [0; 4096];
        let told = loop {
            match self.socket.recv(&mut bytes) {
                // The end of a ring that this thread had may come now; a call with a time
                // limit is not begun anew by the kernel.
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                told => break told,
            }
        };
        let count = told.expect("it is told");
        String::from_utf8_lossy(&bytes[..count]).into_owned()
    }
}

fn write_file(bench: &Bench, engine: &str, exports: &[&str]) {
    let mut text =
        format!("engine = \"{engine}\"\n[[listen]]\nunix = \"{}\"\n", bench.socket().display());
    for name in exports {
        let path = bench.path(&format!("{name}.img"));
        if !path.exists() {
            std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        }
        text += &format!("[[export]]\nname = \"{name}\"\npath = \"{}\"\n", path.display());
    }
    std::fs::write(bench.path("serve.toml"), text).unwrap();
}

fn hang_up(pid: Pid) {
    kill_process(pid, Signal::HUP).unwrap();
}

fn write(client: &mut Client, byte: u8) {
    client.send(&[request(0, WRITE, 9, 0, 512), vec![byte; 512]].concat()).unwrap();
    assert_eq!(client.reply().unwrap(), (9, 0));
}

/// An export joins, another goes, a faulty file changes nothing; the connection that
/// was there before stays the same.
#[test]
fn a_hangup_reads_the_file_anew_and_clients_go_on() {
    for engine in engines() {
        let bench = Bench::new(4);
        let manager = Manager::at(&bench.path("notify"));
        write_file(&bench, engine, &["a", "b"]);
        let mut start = Command::new(env!("CARGO_BIN_EXE_block-server"));
        start
            .args(["serve", "--config", text(&bench.path("serve.toml"))])
            .env("NOTIFY_SOCKET", bench.path("notify"));
        let server = Server::ready(&mut start);
        assert!(manager.hears().starts_with("READY=1"));
        let socket = bench.socket();
        let mut stays = Client::connect(&socket, "a").unwrap();
        write(&mut stays, 1);

        let first = Pid::from_raw(server.pid() as i32).unwrap();
        std::fs::write(bench.path("serve.toml"), "[[listen]]\nunix = 3\n").unwrap();
        hang_up(first);
        assert!(manager.hears().starts_with("RELOADING=1\nMONOTONIC_USEC="));
        let told = manager.hears();
        assert!(told.starts_with("READY=1\nSTATUS=serving on; the reload failed"), "{told}");
        write(&mut stays, 2);

        write_file(&bench, engine, &["a", "c"]);
        hang_up(first);
        assert!(manager.hears().starts_with("RELOADING=1"));
        let told = manager.hears();
        let pid = told.strip_prefix("MAINPID=").expect(&told).parse().unwrap();
        let second = Stranger(Pid::from_raw(pid).unwrap());
        assert!(manager.hears().starts_with("READY=1"));
        server.ended();
        write(&mut stays, 3);
        let mut found = Client::connect(&socket, "c").unwrap();
        assert_eq!(found.call(READ, 0, 512).unwrap(), [0; 512]);
        assert!(Client::connect(&socket, "b").is_err(), "it is in the file no more");

        // A successor can be succeeded, too, and ends as any other.
        write_file(&bench, engine, &["a", "b", "c"]);
        hang_up(second.0);
        assert!(manager.hears().starts_with("RELOADING=1"));
        let told = manager.hears();
        let pid = told.strip_prefix("MAINPID=").expect(&told).parse().unwrap();
        let third = Stranger(Pid::from_raw(pid).unwrap());
        assert!(manager.hears().starts_with("READY=1"));
        let mut again = Client::connect(&socket, "b").unwrap();
        write(&mut again, 4);
        write(&mut stays, 5);
        assert_eq!(stays.call(READ, 0, 512).unwrap(), [5; 512]);
        kill_process(third.0, Signal::TERM).unwrap();
        assert!(manager.hears().starts_with("STOPPING=1"));
        wait_for("it takes its socket away", PATIENCE, || !socket.exists());
    }
}

/// The units are what systemd takes.
#[test]
fn systemd_understands_the_units() {
    const TEST: &str = "systemd_understands_the_units";
    if Command::new("systemd-analyze").arg("--version").output().is_err() {
        return skip(TEST, "systemd-analyze is not installed");
    }
    let bench = Bench::new(1);
    let dist = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../dist"));
    for unit in ["block-server.service", "block-server.socket"] {
        let source = std::fs::read_to_string(dist.join(unit)).unwrap();
        let ours = source.replace("/usr/bin/block-server", env!("CARGO_BIN_EXE_block-server"));
        // Its page is installed with a package.
        let ours = ours.replace("Documentation=man:block-server(8)\n", "");
        std::fs::write(bench.path(unit), ours).unwrap();
    }
    let verified = Command::new("systemd-analyze")
        .arg("verify")
        .args(["block-server.service", "block-server.socket"].map(|unit| bench.path(unit)))
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&verified.stderr);
    let ours: Vec<&str> = told.lines().filter(|line| line.contains("block-server")).collect();
    assert!(verified.status.success() && ours.is_empty(), "{told}");
}
