//! Other people's test-suites, from their sources. They start servers by command
//! lines of nbdkit, qemu-nbd and nbd-server; `foreign/stand_in.py` stands there and
//! has our server do the work. The source is fetched and built once, below target/.

mod fixture;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use fixture::{skip, text};
use sim::is_full;

/// Each test of libnbd 1.14.2 that starts a server, but for those which cannot be:
///
/// - `oldstyle`, `newstyle-limited`, `info-oldstyle`: the protocol before 2011, or
///   a handshake without flags, which we do not speak; `info-packets`: an option
///   to refuse structured replies.
/// - `errors-client-unadvertised-cmd`, `errors-server-unadvertised-cmd`,
///   `errors-multiple-disconnects`, `eflags`, `meta-base-allocation`, `opt-info`,
///   `opt-list`, `copy-sparse*`, `copy-nbd-error`, `info-can*`, `info-description`,
///   `info-list*`, `info-map-*-weird`: the server's answers are scripts of nbdkit's
///   `sh` and `eval` plugins or made by its filters.
/// - `server-death`, `closure-lifetimes`: nbdkit's delay filter.
/// - `aio-parallel*`, `synch-parallel*`, `get-size`, `errors-server-invalid-offset`,
///   `copy-file-to-nbd`, `dump-*`: single bytes; a client that asks, as libnbd does,
///   is told sectors of 512 (ADR 0030). `copy-file-to-nbd` for a file of odd length.
/// - `errors-server-zerosize`: wants requests of no bytes refused; the protocol leaves
///   them open, and we let them succeed (`a_read_of_nothing_is_answered_without_data`).
/// - `info-map-*`, `copy-nbd-to-sparse-file`: the granularity of nbdkit's memory.
/// - `list-exports-nbdkit`, `info-null`, `info-uri`: exports of no bytes, which we refuse.
/// - `*-psk`, `copy-tls`: TLS with shared keys, which rustls has not.
/// - `interop-nbd-server-tls`, `list-exports-nbd-server`: nbd-server's own file;
///   `interop-qemu-nbd-tls-certs` asks with a shell that Debian has not as `sh`.
/// - `dirty-bitmap`, `structured-read`, `interop-qemu-*`: qcow2 inside the server.
const LIBNBD: [&str; 54] = [
    "interop/interop-nbd-server",
    "interop/interop-nbdkit",
    "interop/interop-nbdkit-tls-certs",
    "interop/interop-nbdkit-tls-certs-allow-enabled",
    "interop/interop-nbdkit-tls-certs-allow-fallback",
    "interop/interop-qemu-nbd",
    "interop/list-exports-qemu-nbd",
    "interop/socket-activation-nbdkit",
    "interop/socket-activation-qemu-nbd",
    "tests/aio-connect",
    "tests/aio-connect-port",
    "tests/connect-systemd-socket-activation",
    "tests/connect-tcp",
    "tests/connect-tcp6",
    "tests/connect-tls-certs",
    "tests/connect-unix",
    "tests/connect-uri-nbd",
    "tests/connect-uri-nbd-unix",
    "tests/connect-uri-nbds-certs",
    "tests/connect-uri-nbds-unix-certs",
    "tests/errors-bad-cookie",
    "tests/errors-client-oversize",
    "tests/errors-client-unaligned",
    "tests/errors-client-unknown-flags",
    "tests/errors-client-zerosize",
    "tests/errors-connect-twice",
    "tests/errors-not-negotiating",
    "tests/errors-notify-not-blocked",
    "tests/errors-pread-structured",
    "tests/errors-server-unaligned",
    "tests/errors-server-unknown-flags",
    "tests/opt-abort",
    "tests/opt-list-meta",
    "tests/pread-initialize",
    "tests/read-only-flag",
    "tests/read-write-flag",
    "tests/shutdown-flags",
    "copy/copy-nbd-to-file.sh",
    "copy/copy-nbd-to-nbd.sh",
    "copy/copy-nbd-to-null.sh",
    "copy/copy-nbd-to-small-nbd-error.sh",
    "copy/copy-nbd-to-stdout.sh",
    "copy/copy-progress-bar.sh",
    "copy/copy-stdin-to-nbd.sh",
    "copy/copy-zero-to-nbd.sh",
    "copy/test-verbose.sh",
    "info/info-can-connect.sh",
    "info/info-can-read.sh",
    "info/info-cmd-json.sh",
    "info/info-cmd-size.sh",
    "info/info-is-read-only.sh",
    "info/info-json.sh",
    "info/info-text.sh",
    "info/info-uri-nbds.sh",
];

/// Each of QEMU's block tests that lays its image behind `qemu-nbd` and looks at what
/// the server does, but for those which cannot be:
///
/// - `094`, `119`, `143`, `181`, `236`, `307`: a QEMU with its test accelerator, which
///   distributions leave out. `083`, `093`, `136`, `145`, `147`, `162`, `194`, `205`,
///   `208`, `218`: QEMU's client or its own server, no other.
/// - `241`: an image of 1000 bytes, a byte at a time (ADR 0030); `005`: five tebibytes.
const QEMU: [&str; 17] = [
    "001", "002", "003", "004", "008", "009", "010", "011", "021", "032", "033", "077", "104",
    "123", "197", "215", "259",
];

/// Kept from run to run beside the tests' own folder, so that it is fetched once.
fn kept(name: &str) -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().expect("target's own folder");
    target.join("foreign").join(name)
}

fn script(name: &str, arguments: &[&str]) -> Command {
    let mut command = Command::new("sh");
    command
        .arg(format!("{}/tests/foreign/{name}.sh", env!("CARGO_MANIFEST_DIR")))
        .args(arguments)
        .stdin(Stdio::null());
    command
}

/// Where a suite is, ready to run; `None` in the short run, and where it is not to be had.
fn suite(test: &str, name: &str) -> Option<PathBuf> {
    if !is_full() {
        eprintln!("{test}: in the long run only (HOSTPLANE_FULL=1)");
        return None;
    }
    let folder = kept(name);
    let made = script(name, &["get", text(&folder)]).output().unwrap();
    if made.status.success() {
        return Some(folder);
    }
    let told =
        String::from_utf8_lossy(&made.stdout).into_owned() + &String::from_utf8_lossy(&made.stderr);
    let last = told.lines().rev().take(3).collect::<Vec<_>>().join("; ");
    skip(test, &format!("the source of {name} could not be fetched or built: {last}"));
    None
}

/// Runs these of its tests against our server; each must pass.
fn all_pass(name: &str, folder: &Path, tests: &[&str], cache: &str) {
    let files = tempfile::tempdir().unwrap();
    let output = script(name, &["run", text(folder)])
        .args(tests)
        .env("STAND_IN_SERVER", env!("CARGO_BIN_EXE_block-server"))
        .env("STAND_IN_FOLDER", files.path())
        .env("STAND_IN_CACHE", cache)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    let failed: Vec<&str> = told.lines().filter(|line| !line.starts_with("PASS ")).collect();
    let why = String::from_utf8_lossy(&output.stderr);
    assert!(failed.is_empty(), "{failed:#?}\n{why}");
    assert_eq!(told.lines().count(), tests.len(), "{told}\n{why}");
    eprintln!("{} tests of {name} passed, cache {cache}", tests.len());
}

/// With `--full`: half a minute to build once, then as much to run.
#[test]
fn libnbds_own_tests_find_our_server_in_place_of_others() {
    const TEST: &str = "libnbds_own_tests_find_our_server_in_place_of_others";
    let Some(folder) = suite(TEST, "libnbd") else { return };
    all_pass("libnbd", &folder, &LIBNBD, "writeback");
}

/// With `--full`: some seconds to fetch, then a minute each; of that most is the
/// suite's own waiting for its servers.
#[test]
fn qemus_own_block_tests_find_our_server_in_place_of_qemu_nbd() {
    const TEST: &str = "qemus_own_block_tests_find_our_server_in_place_of_qemu_nbd";
    let Some(folder) = suite(TEST, "iotests") else { return };
    for cache in ["none", "writeback"] {
        all_pass("iotests", &folder, &QEMU, cache);
    }
}
