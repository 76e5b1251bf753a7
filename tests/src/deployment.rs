//! A Hostplane of its own: brought up, looked into, taken down.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rpc::Client;
use rpc::control::AccessKey;
use tempfile::TempDir;

use crate::internet::Internet;
use crate::program;

pub const DAEMONS: [&str; 4] = ["block-server", "dataplane", "control", "agent"];

/// How long `netctl up` and `netctl down` may take.
const UP_BOUND: Duration = Duration::from_secs(120);

#[derive(Debug)]
pub struct Deployment {
    paths: rpc::Deployment,
    listen: String,
    programs: PathBuf,
    /// What `netctl up --block-front` is told; without it, nothing.
    front: Option<String>,
    /// Holds the state and run directories; removed with it.
    _home: TempDir,
}

impl Deployment {
    /// Chooses names and folders; starts nothing.
    pub fn new(name: &str, port: u16) -> anyhow::Result<Self> {
        Self::within(&std::env::temp_dir(), name, port)
    }

    /// The same, with its state in a folder of one's choice.
    pub fn within(folder: &Path, name: &str, port: u16) -> anyhow::Result<Self> {
        let home = tempfile::Builder::new().prefix("hostplane-").tempdir_in(folder)?;
        // Guests run under users of their own and must find their files.
        fs::set_permissions(home.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let paths = rpc::Deployment::new(name, home.path().join("state"), home.path().join("run"))?;
        let listen = format!("127.0.0.1:{port}");
        let front = std::env::var("HOSTPLANE_BLOCK_FRONT").ok();
        Ok(Self { paths, listen, programs: programs()?, front, _home: home })
    }

    /// How its guests reach their volumes, in the place of `HOSTPLANE_BLOCK_FRONT`.
    pub fn with_block_front(mut self, front: &str) -> Self {
        self.front = Some(front.to_owned());
        self
    }

    pub fn up(&self) -> anyhow::Result<String> {
        let mut up = self.netctl(["up"]);
        up.args(["--listen", &self.listen]);
        if let Some(front) = &self.front {
            up.arg("--block-front").arg(front);
        }
        program::output(&mut up, UP_BOUND)
    }

    /// Stops everything and removes what it made, its state included.
    pub fn down(&self) -> anyhow::Result<String> {
        program::output(&mut self.netctl(["down", "--purge"]), UP_BOUND)
    }

    pub fn paths(&self) -> &rpc::Deployment {
        &self.paths
    }

    pub fn endpoint(&self) -> String {
        format!("http://{}", self.listen)
    }

    pub fn internet(&self) -> Internet {
        Internet::new(self.paths.internet_namespace())
    }

    /// A `netctl` that speaks to this deployment.
    pub fn netctl<'a>(&self, words: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(self.programs.join("netctl"));
        command
            .args(words)
            .env("HOSTPLANE_NAME", self.paths.name())
            .env("HOSTPLANE_STATE_DIR", self.paths.state_dir())
            .env("HOSTPLANE_RUN_DIR", self.paths.run_dir());
        command
    }

    pub fn client(&self, daemon: &str) -> Client {
        Client::new(self.paths.socket_of(daemon))
    }

    pub fn access_key(&self) -> anyhow::Result<AccessKey> {
        Ok(ask(self.client("control").access_key())?)
    }

    /// The process id of one of this deployment's daemons, found by its command
    /// line: its program's name and our run directory.
    pub fn daemon(&self, name: &str) -> anyhow::Result<Pid> {
        self.processes(name).first().copied().ok_or_else(|| anyhow!("no process of {name}"))
    }

    /// By which front of the block server guests reach their volumes: that which was
    /// asked for, and every one of them.
    pub fn check_block_front(&self) -> anyhow::Result<&'static str> {
        let help = program::output(
            Command::new("qemu-system-x86_64").args(["-device", "help"]),
            Duration::from_secs(30),
        )?;
        let device = "vhost-user-blk-pci";
        let front = if self.front.as_deref() != Some("nbd") && help.contains(device) {
            "vhost-user"
        } else {
            "nbd"
        };
        let machines = self.machines();
        ensure!(!machines.is_empty(), "no guest runs");
        for machine in machines {
            let line = fs::read(format!("/proc/{machine}/cmdline"))?;
            let has_device = String::from_utf8_lossy(&line).contains(device);
            ensure!(has_device == (front == "vhost-user"), "guest {machine} is not on {front}");
        }
        let log = fs::read_to_string(self.paths.log_of("agent")).unwrap_or_default();
        ensure!(front == "nbd" || !log.contains("attached by NBD"), "a disk fell back: {log}");
        Ok(front)
    }

    /// The guests' QEMU processes.
    pub fn machines(&self) -> Vec<Pid> {
        self.processes("qemu-system-x86_64")
    }

    fn processes(&self, program: &str) -> Vec<Pid> {
        let home = self.paths.run_dir().to_string_lossy().into_owned();
        processes()
            .into_iter()
            .filter(|(_, words)| {
                let named = words.first().map(Path::new).and_then(Path::file_name);
                named.is_some_and(|n| n == program) && words.iter().any(|w| w.contains(&home))
            })
            .map(|(pid, _)| pid)
            .collect()
    }

    /// Kills a daemon as a crash would, and waits until its successor serves.
    pub fn kill_and_await(&self, name: &str) -> anyhow::Result<Duration> {
        let victim = self.daemon(name)?;
        let started = std::time::Instant::now();
        kill(victim, Signal::SIGKILL).with_context(|| format!("kill {name}"))?;
        program::eventually(
            &format!("{name} back after kill -9"),
            Duration::from_secs(30),
            || {
                let successor = self.daemon(name)?;
                if successor == victim {
                    bail!("{name} is still process {victim}");
                }
                let client = self.client(name);
                let path = if name == "control" { "/admin/v1/status" } else { "/v1/status" };
                ask(client.get::<serde_json::Value>(path)).map(drop).map_err(Into::into)
            },
        )?;
        Ok(started.elapsed())
    }

    /// The last lines of each daemon's log, for whoever reads of a failure.
    pub fn logs(&self) -> String {
        const LINES: usize = 25;
        let mut text = String::new();
        for daemon in DAEMONS.into_iter().chain(["supervisor"]) {
            let log = fs::read_to_string(self.paths.log_of(daemon)).unwrap_or_default();
            let lines: Vec<&str> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(LINES)..];
            text += &format!("--- {daemon}\n{}\n", last.join("\n"));
        }
        text
    }

    /// Everything on this host that this deployment may have left behind.
    pub fn leftovers(&self) -> anyhow::Result<BTreeSet<String>> {
        let mut left = BTreeSet::new();
        let home = self.paths.run_dir().parent().unwrap_or(Path::new("/")).to_owned();
        let ours = home.to_string_lossy().into_owned();
        let own_pid = Pid::this();
        for (pid, words) in processes() {
            if pid != own_pid && words.iter().any(|w| w.contains(&ours)) {
                left.insert(format!("process {pid}: {}", words.join(" ")));
            }
        }
        for path in [self.paths.bpf_dir(), self.paths.run_dir().to_owned()] {
            if path.exists() {
                left.insert(format!("{}", path.display()));
            }
        }
        let namespace = Path::new("/run/netns").join(self.paths.internet_namespace());
        if namespace.exists() {
            left.insert(format!("{}", namespace.display()));
        }
        let links =
            program::output(Command::new("ip").args(["-o", "link"]), Duration::from_secs(10))?;
        for device in [self.paths.own_uplink(), self.paths.punt_device()] {
            if links.contains(&format!(" {device}")) {
                left.insert(format!("device {device}"));
            }
        }
        Ok(left)
    }
}

/// A test that fails half-way still leaves the machine clean.
impl Drop for Deployment {
    fn drop(&mut self) {
        if self.paths.run_dir().exists()
            && let Err(error) = self.down()
        {
            eprintln!("taking the deployment {} down: {error:#}", self.paths.name());
        }
    }
}

/// Waits for an answer over a control socket.
pub fn ask<T>(call: impl Future<Output = Result<T, rpc::Error>>) -> Result<T, rpc::Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| rpc::Error::unavailable(format!("start a runtime: {e}")))?
        .block_on(call)
}

/// Where the programs under test lie: `HOSTPLANE_BIN_DIR`, else beside this
/// one (a test runs from `deps/`, one folder below them).
fn programs() -> anyhow::Result<PathBuf> {
    let own = std::env::current_exe()?;
    let candidates = std::env::var_os("HOSTPLANE_BIN_DIR")
        .map(PathBuf::from)
        .into_iter()
        .chain(own.ancestors().skip(1).take(2).map(Path::to_owned));
    candidates.into_iter().find(|dir| dir.join("netctl").is_file()).context(
        "no netctl beside this program: run `./x build`, or `cargo build --workspace --bins`",
    )
}

fn processes() -> Vec<(Pid, Vec<String>)> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else {
            continue;
        };
        // A process that ended meanwhile, or one of the kernel's, has no command line.
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let words: Vec<String> = line
            .split(|b| *b == 0)
            .filter(|w| !w.is_empty())
            .map(|w| String::from_utf8_lossy(w).into_owned())
            .collect();
        if !words.is_empty() {
            found.push((Pid::from_raw(pid), words));
        }
    }
    found
}
