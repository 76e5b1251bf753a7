//! Who may come by a unix socket is a matter of who it is, not only of the file's mode.

mod fixture;

use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use fixture::wait::wait_for;
use fixture::{Bench, skip, text};

/// A bound for a loaded machine.
const PATIENCE: Duration = Duration::from_secs(60);

const ALLOWED: [u32; 2] = [64_101, 64_102];
const STRANGER: u32 = 64_103;

struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// nbdinfo as another user.
fn ask_as(uid: u32, socket: &Path) -> Option<Output> {
    let id = uid.to_string();
    Command::new("setpriv")
        .args(["--reuid", &id, "--regid", &id, "--clear-groups", "nbdinfo", "--size"])
        .arg(format!("nbd+unix:///?socket={}", socket.display()))
        .output()
        .ok()
}

fn log_of(bench: &Bench) -> String {
    std::fs::read_to_string(bench.path("log")).unwrap_or_default()
}

/// `serve` with these listeners, which writes its log to a file.
fn serve(bench: &Bench, listeners: &str, start: &mut Command) -> Ended {
    let config = bench.path("serve.toml");
    let image = bench.image();
    let export = format!("[[export]]\nname = \"\"\npath = \"{}\"\n", image.display());
    std::fs::write(&config, format!("{listeners}{export}")).unwrap();
    let child = start
        .arg("--config")
        .arg(&config)
        .stderr(std::fs::File::create(bench.path("log")).unwrap())
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    Ended(child)
}

/// Each of the allowed is served and the stranger is not, of whom the log tells.
fn only_the_allowed_come_in(test: &str, bench: &Bench, socket: &Path) {
    for uid in ALLOWED {
        let Some(asked) = ask_as(uid, socket) else { return skip(test, "no setpriv") };
        let told = String::from_utf8_lossy(&asked.stderr).into_owned();
        assert!(asked.status.success(), "{uid}: {told}");
        assert_eq!(String::from_utf8_lossy(&asked.stdout).trim(), "4194304");
    }
    let Some(refused) = ask_as(STRANGER, socket) else { return };
    assert!(!refused.status.success());
    let place = text(socket);
    wait_for("the log tells who was refused, where, and who is not", PATIENCE, || {
        let told = log_of(bench);
        let line = told.lines().find(|line| line.contains("refused user 64103")).unwrap_or("");
        line.contains(place) && line.contains("[64101, 64102]")
    });
}

fn ready(test: &str) -> Option<Bench> {
    if !rustix::process::geteuid().is_root() {
        skip(test, "only root may become another user");
        return None;
    }
    if Command::new("nbdinfo").arg("--version").output().is_err() {
        skip(test, "nbdinfo is not installed");
        return None;
    }
    let bench = Bench::new(4);
    // Others must come as far as the socket.
    std::fs::set_permissions(bench.path("."), std::fs::Permissions::from_mode(0o711)).unwrap();
    Some(bench)
}

#[test]
fn a_stranger_is_refused_by_who_he_is_and_the_log_says_so() {
    const TEST: &str = "a_stranger_is_refused_by_who_he_is_and_the_log_says_so";
    let Some(bench) = ready(TEST) else { return };
    let socket = bench.socket();
    let listen = format!("[[listen]]\nunix = \"{}\"\nusers = [64101, 64102]\n", text(&socket));
    let mut start = Command::new(env!("CARGO_BIN_EXE_block-server"));
    let _server = serve(&bench, &listen, start.arg("serve"));
    wait_for("it listens", PATIENCE, || socket.exists());
    only_the_allowed_come_in(TEST, &bench, &socket);
}

/// The same for a socket that systemd made, with whatever mode it has.
#[test]
fn a_passed_on_socket_may_be_for_certain_users_too() {
    const TEST: &str = "a_passed_on_socket_may_be_for_certain_users_too";
    let Some(bench) = ready(TEST) else { return };
    let socket = bench.socket();
    let listener = UnixListener::bind(&socket).unwrap();
    std::fs::set_permissions(&socket, std::fs::Permissions::from_mode(0o666)).unwrap();
    let listen = "[[listen]]\nactivated = true\nusers = [64101, 64102]\n";
    let mut start = Command::new("sh");
    start
        .args(["-c", "exec 3<&0 0</dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$@\"", "sh"])
        .args([env!("CARGO_BIN_EXE_block-server"), "serve"])
        .stdin(std::os::fd::OwnedFd::from(listener));
    let _server = serve(&bench, listen, &mut start);
    only_the_allowed_come_in(TEST, &bench, &socket);
}
