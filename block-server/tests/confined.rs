//! The whole program, confined as it always is: what the kernel says of its
//! threads, and what it does where io_uring is not to be had.

mod fixture;

use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use fixture::{Bench, Server, succeed, text};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter};

/// Only where the limit of locked memory cannot be lifted.
const IPC_LOCK: u64 = 1 << 14;

/// Of each thread: no way to new privileges, a filter, and these capabilities.
fn assert_confined(pid: u32, capabilities: u64) {
    let mut threads = 0;
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().flatten() {
        let status = std::fs::read_to_string(task.path().join("status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().last().unwrap().to_owned()
        };
        assert_eq!((&*field("NoNewPrivs:"), &*field("Seccomp:")), ("1", "2"), "{status}");
        for kind in ["CapEff:", "CapPrm:", "CapInh:"] {
            let held = u64::from_str_radix(&field(kind), 16).unwrap();
            assert_eq!(held & !capabilities, 0, "{kind} {status}");
        }
        threads += 1;
    }
    assert!(threads > 2, "{threads}");
}

#[test]
fn a_server_has_few_capabilities_and_few_system_calls() {
    for engine in fixture::engines() {
        let bench = Bench::new(4);
        let server = bench.serve(&["--engine", engine]);
        assert_confined(server.pid(), IPC_LOCK);
        server.terminate();
        assert!(!bench.socket().exists(), "it could still remove its socket");
    }
}

#[test]
fn a_daemon_may_give_sockets_away_and_no_more() {
    const CHOWN: u64 = 1;
    let bench = Bench::new(1);
    let (state, run) = (bench.path("s"), bench.path("r"));
    let server = Server::start(&[
        "daemon",
        "--name",
        "confined",
        "--state-dir",
        text(&state),
        "--run-dir",
        text(&run),
    ]);
    assert_confined(server.pid(), CHOWN | IPC_LOCK);
    server.terminate();
}

/// As a host where a filter, or `kernel.io_uring_disabled`, takes the ring away.
#[test]
fn without_io_uring_threads_serve_and_the_log_says_so() {
    const TEST: &str = "without_io_uring_threads_serve_and_the_log_says_so";
    let bench = Bench::new(4);
    let arch = std::env::consts::ARCH.try_into().unwrap();
    let refused = SeccompAction::Errno(libc::EPERM as u32);
    let rules = [(libc::SYS_io_uring_setup, Vec::new())].into_iter().collect();
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refused, arch).unwrap();
    let program: BpfProgram = filter.try_into().unwrap();
    let (image, socket) = (bench.image(), bench.socket());
    let mut command = Command::new(env!("CARGO_BIN_EXE_block-server"));
    command
        .args(["serve", "--file", text(&image), "--socket", text(&socket)])
        .env("RUST_LOG", "info")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: between fork and exec only a system call is made.
    unsafe {
        command.pre_exec(move || seccompiler::apply_filter(&program).map_err(std::io::Error::other))
    };
    let mut server = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(server.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "ready\n");
    let script =
        ["-f", "raw", "-c", "write -P 4 0 2M", "-c", "flush", "-c", "read -P 4 0 2M", &bench.uri()];
    let told = succeed(TEST, "qemu-io", &script);
    server.kill().unwrap();
    let output = server.wait_with_output().unwrap();
    let log = String::from_utf8_lossy(&output.stderr);
    assert!(log.contains("io_uring is not to be had") && log.contains("threads"), "{log}");
    assert!(log.contains("confined by") && log.contains("seccomp"), "{log}");
    assert!(told.is_none_or(|told| !told.contains("failed")));
}
