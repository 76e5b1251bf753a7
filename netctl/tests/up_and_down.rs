//! `netctl up` and `down` against stand-in daemons (`examples/stand-in.rs`), in a
//! network namespace of the test's own: whatever is killed in between, `up`
//! recovers and `down` leaves the host as it was.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::UdpSocket;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use sim::skip;
use tempfile::TempDir;

const DAEMONS: [&str; 4] = ["block-server", "dataplane", "control", "agent"];

/// A host of its own as far as devices go, with stand-ins for the daemons.
struct Host {
    name: String,
    namespace: String,
    home: TempDir,
    before: BTreeSet<String>,
}

impl Host {
    /// `letter` keeps the tests of one run apart. `None` where this machine
    /// lacks what the test needs.
    fn new(test: &str, letter: char) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            skip(test, "must be root");
            return None;
        }
        if !Path::new("/dev/net/tun").exists() {
            skip(test, "no /dev/net/tun");
            return None;
        }
        // A process id has at most seven digits; base 36 keeps it within five.
        let name = format!("t{letter}{}", base36(std::process::id()));
        let namespace = format!("{name}-host");
        run(Command::new("ip").args(["netns", "add", &namespace]));
        run(Command::new("ip").args(["-n", &namespace, "link", "set", "lo", "up"]));
        let home = tempfile::tempdir().unwrap();
        let libexec = home.path().join("libexec");
        fs::create_dir(&libexec).unwrap();
        for daemon in DAEMONS {
            fs::copy(stand_in(), libexec.join(daemon)).unwrap();
        }
        let mut host = Self { name, namespace, home, before: BTreeSet::new() };
        host.before = host.inventory();
        Some(host)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn netctl(&self, words: &[&str]) -> Output {
        Command::new("nsenter")
            .arg(format!("--net=/run/netns/{}", self.namespace))
            .arg("--")
            .arg(env!("CARGO_BIN_EXE_netctl"))
            .args(words)
            .env("HOSTPLANE_NAME", &self.name)
            .env("HOSTPLANE_STATE_DIR", self.path("state"))
            .env("HOSTPLANE_RUN_DIR", self.path("run"))
            .env("HOSTPLANE_LIBEXEC", self.path("libexec"))
            .output()
            .unwrap()
    }

    fn succeeds(&self, words: &[&str]) -> String {
        let output = self.netctl(words);
        assert!(output.status.success(), "netctl {words:?}: {}", said(&output));
        String::from_utf8(output.stdout).unwrap()
    }

    fn fails(&self, words: &[&str], code: i32) -> String {
        let output = self.netctl(words);
        assert_eq!(output.status.code(), Some(code), "netctl {words:?}: {}", said(&output));
        String::from_utf8(output.stderr).unwrap()
    }

    fn misbehave(&self, daemon: &str, how: &str) {
        fs::write(self.path("libexec").join(format!("{daemon}.does")), how).unwrap();
    }

    fn pid(&self, process: &str) -> Pid {
        let file = self.path("run").join("pids").join(format!("{process}.json"));
        let identity: serde_json::Value = serde_json::from_slice(&fs::read(file).unwrap()).unwrap();
        Pid::from_raw(i32::try_from(identity["pid"].as_i64().unwrap()).unwrap()).unwrap()
    }

    fn kill(&self, process: &str) {
        kill_process(self.pid(process), Signal::KILL).unwrap();
    }

    /// Kills it, and waits until it is gone for everybody.
    fn end(&self, process: &str) {
        let pid = self.pid(process);
        kill_process(pid, Signal::KILL).unwrap();
        let stat = format!("/proc/{}/stat", pid.as_raw_nonzero());
        eventually("it has ended", || {
            fs::read_to_string(&stat).map_or(true, |stat| stat.contains(") Z "))
        });
    }

    /// A daemon's part of `netctl status -o json`.
    fn status_of(&self, daemon: &str) -> serde_json::Value {
        let output = self.netctl(&["status", "-o", "json"]);
        let report: serde_json::Value = serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|e| panic!("{e}: {}", said(&output)));
        let daemons = report["daemons"].as_array().unwrap();
        daemons.iter().find(|d| d["name"] == daemon).unwrap().clone()
    }

    /// Everything that a deployment may leave: devices, namespaces, pins,
    /// processes, loop devices, and our directories.
    fn inventory(&self) -> BTreeSet<String> {
        let mut all = BTreeSet::new();
        for line in run(Command::new("ip").args(["-n", &self.namespace, "-o", "link"])).lines() {
            all.insert(format!("device {}", line.split(": ").nth(1).unwrap_or(line)));
        }
        let named = |dir: &str| -> Vec<String> {
            fs::read_dir(dir)
                .into_iter()
                .flatten()
                .flatten()
                .map(|e| e.file_name().to_string_lossy().into_owned())
                .filter(|n| n.contains(&self.name))
                .map(|n| format!("{dir}/{n}"))
                .collect()
        };
        all.extend(named("/run/netns"));
        all.extend(named("/sys/fs/bpf"));
        let home = self.home.path().to_string_lossy().into_owned();
        for entry in fs::read_dir("/proc").unwrap().flatten() {
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if line.contains(&home) {
                all.insert(format!("process {} {line}", entry.file_name().to_string_lossy()));
            }
        }
        for entry in fs::read_dir("/sys/block").unwrap().flatten() {
            let file = fs::read_to_string(entry.path().join("loop/backing_file"));
            if file.is_ok_and(|f| f.contains(&home)) {
                all.insert(format!("loop {}", entry.file_name().to_string_lossy()));
            }
        }
        if self.path("run").exists() {
            all.insert("run directory".to_owned());
        }
        all
    }

    fn assert_nothing_left(&self) {
        assert_eq!(self.inventory(), self.before);
    }
}

/// A test that fails half-way leaves the machine clean too.
impl Drop for Host {
    fn drop(&mut self) {
        for daemon in DAEMONS {
            let _ = fs::remove_file(self.path("libexec").join(format!("{daemon}.does")));
        }
        let output = self.netctl(&["down", "--purge"]);
        if !output.status.success() {
            eprintln!("{}", said(&output));
        }
        run(Command::new("ip").args(["netns", "del", &self.namespace]));
    }
}

/// Does something in a network namespace, on a thread of its own.
fn inside<T: Send>(namespace: &str, act: impl FnOnce() -> T + Send) -> T {
    let file = fs::File::open(Path::new("/run/netns").join(namespace)).unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            act()
        });
        thread.join().unwrap()
    })
}

fn base36(mut number: u32) -> String {
    let mut text = String::new();
    while number > 0 {
        text.insert(0, char::from_digit(number % 36, 36).unwrap());
        number /= 36;
    }
    text
}

fn stand_in() -> PathBuf {
    let netctl = Path::new(env!("CARGO_BIN_EXE_netctl"));
    let path = netctl.parent().unwrap().join("examples/stand-in");
    assert!(path.is_file(), "no {}: cargo build -p netctl --examples", path.display());
    path
}

fn run(command: &mut Command) -> String {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", said(&output));
    String::from_utf8(output.stdout).unwrap()
}

fn said(output: &Output) -> String {
    format!(
        "{}\nstdout: {}\nstderr: {}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

#[expect(clippy::disallowed_methods, reason = "a test waits for real processes")]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < Duration::from_secs(20), "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn up_prints_the_environment_and_twice_is_fine_and_down_leaves_nothing() {
    let Some(host) = Host::new("up_prints_the_environment", 'a') else { return };
    let first = host.succeeds(&["up"]);
    assert_eq!(
        first,
        "export AWS_ENDPOINT_URL=http://127.0.0.1:8773\nexport AWS_ACCESS_KEY_ID=AKIDSTANDIN\n\
         export AWS_SECRET_ACCESS_KEY=s3cret\nexport AWS_DEFAULT_REGION=local-1\n"
    );
    let agent = host.pid("agent");
    assert_eq!(host.succeeds(&["up"]), first);
    assert_eq!(host.pid("agent"), agent, "the second up started something");
    let status = host.succeeds(&["status"]);
    assert!(status.contains("block-server") && status.contains("ready"), "{status}");
    assert_ne!(host.inventory(), host.before, "the inventory sees nothing");
    host.succeeds(&["down"]);
    host.assert_nothing_left();
    assert_eq!(
        fs::read_to_string(host.path("state/teardowns")).unwrap(),
        "agent\ndataplane\n",
        "guests end before the taps that they hold"
    );
    host.succeeds(&["down"]);
    host.succeeds(&["down", "--purge"]);
    assert!(!host.path("state").exists());
}

#[test]
fn the_internet_of_an_own_uplink_is_reached_and_forwards_nothing() {
    let Some(host) = Host::new("the_internet_of_an_own_uplink", 'b') else { return };
    let json = host.succeeds(&["up", "--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["elastic_range"], "198.51.100.128/25");
    let internet = json["internet_namespace"].as_str().unwrap();
    let (near, far) = (host.namespace.clone(), internet.to_owned());
    let answerer = inside(&near, || UdpSocket::bind("198.51.100.2:9999").unwrap());
    let asker = inside(&far, || UdpSocket::bind("198.51.100.1:0").unwrap());
    asker.send_to(b"?", "198.51.100.2:9999").unwrap();
    answerer.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let (_, from) = answerer.recv_from(&mut [0; 9]).unwrap();
    assert_eq!(from, asker.local_addr().unwrap());
    for client in ["203.0.113.10:0", "203.0.113.77:0", "192.0.2.10:0"] {
        inside(&far, || UdpSocket::bind(client).unwrap());
    }
    let forwarding = run(Command::new("ip").args([
        "netns",
        "exec",
        internet,
        "cat",
        "/proc/sys/net/ipv4/ip_forward",
    ]));
    assert_eq!(forwarding.trim(), "0");
    host.succeeds(&["down"]);
    host.assert_nothing_left();
    // The range is remembered, so that addresses that were given out stay in it.
    host.succeeds(&["up", "--own-uplink-subnet", "198.18.7.0/24"]);
    host.succeeds(&["down"]);
    let again = host.succeeds(&["up", "--json"]);
    assert!(again.contains("198.18.7.128/25"), "{again}");
}

#[test]
fn a_killed_daemon_is_restarted_and_counted() {
    let Some(host) = Host::new("a_killed_daemon_is_restarted", 'c') else { return };
    host.succeeds(&["up"]);
    for daemon in DAEMONS {
        let victim = host.pid(daemon);
        host.kill(daemon);
        eventually(&format!("{daemon} is back"), || {
            host.pid(daemon) != victim && host.status_of(daemon)["state"] == "ready"
        });
        assert_eq!(host.status_of(daemon)["restarts"], 1, "{daemon}");
    }
    host.succeeds(&["status"]);
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

#[test]
fn up_after_the_supervisor_was_killed_takes_over() {
    let Some(host) = Host::new("up_after_the_supervisor_was_killed", 'd') else { return };
    host.succeeds(&["up"]);
    let (supervisor, agent) = (host.pid("supervisor"), host.pid("agent"));
    host.kill("supervisor");
    eventually("status sees it", || host.netctl(&["status"]).status.code() == Some(1));
    assert!(rustix::process::test_kill_process(agent).is_ok(), "daemons outlive their supervisor");
    assert_eq!(host.status_of("agent")["state"], "unsupervised");
    host.succeeds(&["up"]);
    assert_ne!(host.pid("supervisor"), supervisor);
    assert!(host.path("run/took-over").exists(), "the block server was ended, not taken over from");
    host.succeeds(&["status"]);
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

/// Puts another file in the place of the installed block server.
fn install(host: &Host, from: &Path) {
    let (pending, place) = (host.path("libexec/new"), host.path("libexec/block-server"));
    fs::copy(from, &pending).unwrap();
    fs::rename(pending, place).unwrap();
}

#[test]
fn a_newer_block_server_takes_the_place_of_the_one_that_serves() {
    let Some(host) = Host::new("a_newer_block_server_takes_the_place", 'x') else { return };
    host.succeeds(&["up"]);
    let old = host.pid("block-server");
    host.succeeds(&["up"]);
    assert_eq!(host.pid("block-server"), old, "it is the one that is installed");
    install(&host, &stand_in());
    let told = said(&host.netctl(&["up"]));
    assert!(told.contains("block-server: replaced"), "{told}");
    let new = host.pid("block-server");
    assert_ne!(new, old);
    assert!(rustix::process::test_kill_process(old).is_err(), "the old one is gone");
    assert!(host.path("run/took-over").exists());
    let status = host.status_of("block-server");
    assert_eq!((&status["state"], &status["restarts"]), (&"ready".into(), &0.into()), "{status}");

    // One that cannot serve changes nothing.
    install(&host, &stand_in());
    host.misbehave("block-server", "crash");
    let told = host.fails(&["up"], 1);
    assert!(told.contains("exit status: 3; the one that ran before serves on"), "{told}");
    assert!(told.contains("cannot find my glasses"), "{told}");
    assert_eq!(host.pid("block-server"), new);
    fs::remove_file(host.path("libexec/block-server.does")).unwrap();
    host.succeeds(&["up"]);
    assert_ne!(host.pid("block-server"), new);
    // And it is watched like the first.
    let victim = host.pid("block-server");
    host.kill("block-server");
    eventually("it is back", || host.pid("block-server") != victim);
    eventually("it is ready", || host.status_of("block-server")["state"] == "ready");
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

/// Whoever is killed in the middle of a replacement: `up` again repairs it.
#[test]
fn up_after_a_replacement_was_cut_short_repairs_it() {
    let Some(host) = Host::new("up_after_a_replacement_was_cut_short", 'y') else { return };
    for victims in [&["supervisor"][..], &["supervisor", "block-server"], &["supervisor", "next"]] {
        host.succeeds(&["up"]);
        install(&host, &stand_in());
        // The new one comes and never gets ready.
        host.misbehave("block-server", "hang");
        kill_process(host.pid("supervisor"), Signal::HUP).unwrap();
        let next = || host.path("run/pids/block-server.next.json").exists();
        eventually("the new one is there", next);
        for victim in victims {
            host.end(if *victim == "next" { "block-server.next" } else { victim });
        }
        fs::remove_file(host.path("libexec/block-server.does")).unwrap();
        host.succeeds(&["up"]);
        host.succeeds(&["status"]);
        eventually("nothing is left over", || !next());
        host.succeeds(&["down"]);
        host.assert_nothing_left();
    }
}

/// The real block server: a client goes on over the same connection.
#[test]
fn a_client_goes_on_while_up_replaces_the_block_server() {
    const TEST: &str = "a_client_goes_on_while_up_replaces_the_block_server";
    let real = Path::new(env!("CARGO_BIN_EXE_netctl")).with_file_name("block-server");
    if !real.exists() {
        return skip(TEST, "the block server is not built");
    }
    let Some(host) = Host::new(TEST, 'z') else { return };
    install(&host, &real);
    host.succeeds(&["up"]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let client = rpc::Client::new(host.path("run/block-server.sock"));
    let volume = model::VolumeId::from_random(1);
    let new = rpc::block::NewVolume { size_bytes: 1 << 20, source: None };
    let export = rpc::block::NewExport { volume, read_only: false, generation: 1, owner_uid: None };
    runtime.block_on(client.put_volume(volume, &new)).unwrap();
    let export = runtime.block_on(client.put_export("e", &export)).unwrap();
    let mut nbd = UnixStream::connect(&export.socket).unwrap();
    nbd.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
    let mut exchange = |send: &[u8], receive: usize| {
        nbd.write_all(send).unwrap();
        let mut answer = vec![0; receive];
        nbd.read_exact(&mut answer).unwrap();
        answer
    };
    assert_eq!(&exchange(b"", 18)[..8], b"NBDMAGIC");
    exchange(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x01e", 10);
    let mut request = |kind: u8, payload: &[u8]| {
        let mut bytes = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, kind, 0, 0, 0, 0, 0, 0, 0, 9];
        bytes.extend([0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
        bytes.extend(payload);
        let answer = exchange(&bytes, if kind == 0 { 16 + 512 } else { 16 });
        assert_eq!(answer[4..8], [0; 4], "an error");
        answer[16..].to_vec()
    };
    for round in 1..=3 {
        request(1, &[round; 512]);
        let old = host.pid("block-server");
        install(&host, &real);
        host.succeeds(&["up"]);
        assert_ne!(host.pid("block-server"), old);
        assert_eq!(request(0, &[]), [round; 512], "what was written by the same connection");
    }
    // The supervisor is killed: the next one's block server takes over, too.
    host.end("supervisor");
    let old = host.pid("block-server");
    host.succeeds(&["up"]);
    assert_ne!(host.pid("block-server"), old);
    assert_eq!(request(0, &[]), [3; 512]);
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

#[test]
fn down_after_everything_was_killed_leaves_nothing() {
    let Some(host) = Host::new("down_after_everything_was_killed", 'e') else { return };
    host.succeeds(&["up"]);
    host.kill("supervisor");
    for daemon in DAEMONS {
        host.kill(daemon);
    }
    host.succeeds(&["down"]);
    host.assert_nothing_left();

    host.succeeds(&["up"]);
    host.kill("supervisor");
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

#[test]
fn down_ends_a_daemon_that_heeds_no_sigterm() {
    let Some(host) = Host::new("down_ends_a_daemon_that_heeds_no_sigterm", 'f') else { return };
    host.misbehave("control", "deaf");
    host.succeeds(&["up"]);
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

#[test]
fn sigterm_of_the_supervisor_ends_its_daemons() {
    let Some(host) = Host::new("sigterm_of_the_supervisor", 'g') else { return };
    host.succeeds(&["up"]);
    let agent = host.pid("agent");
    kill_process(host.pid("supervisor"), Signal::TERM).unwrap();
    eventually("the agent is gone", || rustix::process::test_kill_process(agent).is_err());
    eventually("it is seen", || host.netctl(&["status"]).status.code() == Some(1));
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

#[test]
fn a_daemon_that_never_gets_ready_is_named_with_its_log() {
    let Some(host) = Host::new("a_daemon_that_never_gets_ready", 'h') else { return };
    host.misbehave("dataplane", "hang");
    let error = host.fails(&["up", "--ready-within", "1"], 1);
    assert!(error.contains("daemon dataplane: start: not ready within 1 s"), "{error}");
    assert!(error.contains("log/dataplane.log"), "{error}");
    assert!(error.contains("| dataplane: starting"), "{error}");
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

#[test]
fn a_daemon_that_crashes_again_and_again_is_reported_with_its_last_words() {
    let Some(host) = Host::new("a_daemon_that_crashes_again_and_again", 'i') else { return };
    host.misbehave("agent", "crash");
    let error = host.fails(&["up"], 1);
    assert!(error.contains("| agent: cannot find my glasses"), "{error}");
    let status = host.netctl(&["status"]);
    assert_eq!(status.status.code(), Some(1));
    let text = String::from_utf8(status.stdout).unwrap();
    assert!(text.contains("daemon agent crashes again and again: exit status: 3"), "{text}");
    // The cause is mended: the supervisor gets there by itself.
    fs::remove_file(host.path("libexec/agent.does")).unwrap();
    host.succeeds(&["up"]);
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

#[test]
fn a_dataplane_that_applies_nothing_is_told_of() {
    let Some(host) = Host::new("a_dataplane_that_applies_nothing", 'o') else { return };
    host.misbehave("dataplane", "idle");
    host.succeeds(&["up"]);
    let status = host.netctl(&["status"]);
    assert_eq!(status.status.code(), Some(1));
    let text = String::from_utf8(status.stdout).unwrap();
    assert!(text.contains("guests wait for their network"), "{text}");
    assert!(text.contains("next: netctl logs dataplane"), "{text}");
}

#[test]
fn a_teardown_that_fails_says_what_is_left() {
    let Some(host) = Host::new("a_teardown_that_fails", 'j') else { return };
    host.misbehave("dataplane", "fail-teardown");
    host.succeeds(&["up"]);
    let error = host.fails(&["down"], 1);
    assert!(error.contains("daemon dataplane: tear down"), "{error}");
    assert!(error.contains("the tap is stuck"), "{error}");
    fs::remove_file(host.path("libexec/dataplane.does")).unwrap();
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

#[test]
fn what_this_machine_lacks_is_said_a_line_each_and_nothing_is_started() {
    let Some(host) = Host::new("what_this_machine_lacks", 'k') else { return };
    fs::create_dir(host.path("run")).unwrap();
    fs::write(host.path("run/thesis.tex"), b"x").unwrap();
    let error = host.fails(&["up"], 2);
    assert!(error.contains("not Hostplane's") && error.contains("--run-dir"), "{error}");
    fs::remove_dir_all(host.path("run")).unwrap();

    fs::remove_file(host.path("libexec/agent")).unwrap();
    let words = ["up", "--uplink", "nodev0", "--uplink-gateway", "192.0.2.1", "--elastic-range"];
    let error = host.fails(&[&words[..], &["192.0.2.128/25"]].concat(), 2);
    for part in ["libexec/agent", "no such device"] {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!host.path("state").exists(), "a refused start leaves an empty directory");
    host.assert_nothing_left();
}

#[test]
fn two_ups_at_once_make_one_deployment() {
    let Some(host) = Host::new("two_ups_at_once", 'l') else { return };
    let answers = std::thread::scope(|scope| {
        let ups: Vec<_> = (0..4).map(|_| scope.spawn(|| host.succeeds(&["up"]))).collect();
        ups.into_iter().map(|up| up.join().unwrap()).collect::<BTreeSet<_>>()
    });
    assert_eq!(answers.len(), 1);
    let supervisors = host.inventory().iter().filter(|i| i.contains(" supervise ")).count();
    assert_eq!(supervisors, 1);
    host.succeeds(&["down"]);
    host.assert_nothing_left();
}

#[test]
fn two_deployments_stand_side_by_side() {
    let Some(one) = Host::new("two_deployments_stand_side_by_side", 'm') else { return };
    one.succeeds(&["up"]);
    // The second lives in the first one's network, and takes another subnet.
    let Some(mut two) = Host::new("two_deployments_stand_side_by_side", 'n') else { return };
    let own = std::mem::replace(&mut two.namespace, one.namespace.clone());
    two.before = two.inventory();
    let json = two.succeeds(&["up", "--listen", "127.0.0.1:8774", "--json"]);
    assert!(json.contains("198.18.0.128/25"), "{json}");
    one.succeeds(&["down"]);
    two.succeeds(&["status"]);
    two.succeeds(&["down"]);
    two.namespace = own;
    one.assert_nothing_left();
}
