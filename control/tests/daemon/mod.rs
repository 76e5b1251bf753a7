//! A real daemon in a temporary folder, a scripted agent that speaks
//! `rpc::host` like the real one, and the stock clients.

#![allow(dead_code, reason = "each test file uses its part")]

use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use model::{AttachmentState, InstanceState, VolumeState};
use rpc::agent::Image;
use rpc::host::{Desired, Observed, ObservedAttachment, ObservedInstance, ObservedVolume, Run};

pub const IMAGE: &str = "tiny";
pub const HOST: &str = "host-1";

pub struct Daemon {
    folder: tempfile::TempDir,
    child: Option<Child>,
    pub endpoint: SocketAddr,
    extra: Vec<String>,
}

impl Daemon {
    pub fn start(extra: &[&str]) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), extra)
    }

    pub fn start_in(folder: tempfile::TempDir, extra: &[&str]) -> Self {
        // The port is free now; that another process takes it meanwhile is possible
        // and makes the start fail, loudly.
        let endpoint = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let extra = extra.iter().map(|s| (*s).to_owned()).collect();
        let mut daemon = Self { folder, child: None, endpoint, extra };
        daemon.restart();
        daemon
    }

    pub fn restart(&mut self) {
        assert!(self.child.is_none());
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .unwrap();
        let mut child = Command::new(env!("CARGO_BIN_EXE_control"))
            .args(["daemon", "--name", "t", "--host", HOST, "--region", "local-1"])
            .args(["--elastic-range", "198.51.100.0/28"])
            .args(["--uplink", "t-up", "--uplink-gateway", "198.51.100.1"])
            .arg("--state-dir")
            .arg(self.folder.path().join("state"))
            .arg("--run-dir")
            .arg(self.folder.path().join("run"))
            .arg("--listen")
            .arg(self.endpoint.to_string())
            .args(&self.extra)
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n", "the daemon did not start: {}", self.log());
        self.child = Some(child);
    }

    /// Waits for the daemon to end by itself.
    pub fn await_end(&mut self) -> std::process::ExitStatus {
        self.child.take().unwrap().wait().unwrap()
    }

    /// kill -9.
    pub fn kill(&mut self) {
        let mut child = self.child.take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    pub fn control(&self) -> rpc::Client {
        rpc::Client::new(self.folder.path().join("run/control.sock"))
    }

    pub fn credentials(&self) -> PathBuf {
        self.folder.path().join("state/control/credentials")
    }

    /// Runs a program of the venv against the daemon.
    pub fn client(&self, program: &Path) -> Command {
        let mut command = Command::new(program);
        command
            .env("AWS_ENDPOINT_URL", format!("http://{}", self.endpoint))
            .env("AWS_SHARED_CREDENTIALS_FILE", self.credentials())
            .env("AWS_CONFIG_FILE", self.folder.path().join("no-config"))
            .env("AWS_DEFAULT_REGION", "local-1")
            .env("AWS_EC2_METADATA_DISABLED", "true")
            .env("AWS_PAGER", "")
            .env("AWS_MAX_ATTEMPTS", "1");
        command
    }

    /// `aws ec2 …`, whose answer is JSON.
    pub fn aws(&self, venv: &Path, arguments: &[&str]) -> Result<serde_json::Value, String> {
        let output = self
            .client(&venv.join("bin/python"))
            .arg(venv.join("bin/aws"))
            .args(["ec2", "--output", "json"])
            .args(arguments)
            .output()
            .unwrap();
        read(&output)
    }
}

fn read(output: &Output) -> Result<serde_json::Value, String> {
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    }
    if output.stdout.iter().all(u8::is_ascii_whitespace) {
        return Ok(serde_json::Value::Null);
    }
    Ok(serde_json::from_slice(&output.stdout).unwrap())
}

impl Drop for Daemon {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if std::thread::panicking() {
            eprintln!("the daemon's log:\n{}", self.log());
        }
    }
}

/// Where awscli and boto3 are: `HOSTPLANE_VENV`, or `.venv` in the tree.
pub fn venv(test: &str) -> Option<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join(".venv");
    let venv = std::env::var_os("HOSTPLANE_VENV").map_or(own, PathBuf::from);
    if venv.join("bin/aws").exists() {
        return Some(venv);
    }
    sim::skip(test, &format!("{}: no awscli; `./x setup` makes it", venv.display()));
    None
}

/// Does at once what a host would do, as it would tell it.
pub struct Agent {
    pub observed: Arc<Mutex<Observed>>,
    task: tokio::task::JoinHandle<()>,
    socket: tokio::task::JoinHandle<()>,
}

/// What every guest of the scripted agent has written to its console.
pub const CONSOLE: &str = "booted\n";

async fn console() -> axum::Json<rpc::agent::Console> {
    use base64::Engine;
    axum::Json(rpc::agent::Console {
        output_base64: base64::engine::general_purpose::STANDARD.encode(CONSOLE),
        changed_at_s: 1_788_004_800,
    })
}

impl Agent {
    pub async fn start(control: rpc::Client) -> Self {
        let observed = Arc::new(Mutex::new(Observed {
            accelerator: "tcg".to_owned(),
            vcpus: 16,
            memory_mib: 16 * 1024,
            images: vec![Image {
                name: IMAGE.to_owned(),
                size_bytes: 48 << 20,
                direct_boot: true,
                sha256: "00".repeat(32),
            }],
            ..Observed::default()
        }));
        let first = observed.lock().unwrap().clone();
        control.host_observed(HOST, &first).await.unwrap();
        let path = control.socket().with_file_name("agent.sock");
        let routes =
            axum::Router::new().route("/v1/instances/{id}/console", axum::routing::get(console));
        let socket = tokio::spawn(async move { rpc::server::serve(&path, routes).await.unwrap() });
        let task = tokio::spawn(run(control, Arc::clone(&observed)));
        Self { observed, task, socket }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.task.abort();
        self.socket.abort();
    }
}

async fn run(control: rpc::Client, observed: Arc<Mutex<Observed>>) {
    let mut after = 0;
    loop {
        let Ok(desired) = control.host_desired(HOST, after, 2000).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        // Each state is told for itself, as a slow host would.
        loop {
            let (report, settled) = {
                let mut observed = observed.lock().unwrap();
                let settled = step(&mut observed, &desired);
                (observed.clone(), settled)
            };
            if control.host_observed(HOST, &report).await.is_err() {
                break;
            }
            after = desired.revision;
            if settled {
                break;
            }
        }
    }
}

/// Goes one step towards what is desired; `true`: there was nothing left to do.
fn step(observed: &mut Observed, desired: &Desired) -> bool {
    let before = observed.clone();
    observed.revision = desired.revision;
    observed.network_generation = desired.network.generation;
    observed.volumes = desired
        .volumes
        .iter()
        .filter(|v| !v.deleted)
        .map(|v| ObservedVolume {
            id: v.id,
            state: VolumeState::Available,
            reason: None,
            size_bytes: v.size_bytes,
        })
        .collect();
    observed.instances = desired
        .instances
        .iter()
        .map(|wish| {
            let seen = before.instances.iter().find(|i| i.id == wish.id);
            let state = match (wish.run, seen.map(|s| (s.state, s.starts))) {
                (Run::Running, Some((InstanceState::Pending | InstanceState::Running, starts)))
                    if starts == wish.starts =>
                {
                    InstanceState::Running
                }
                (Run::Running, Some((InstanceState::Stopped, starts))) if starts == wish.starts => {
                    InstanceState::Stopped
                }
                (Run::Running, _) => InstanceState::Pending,
                (Run::Stopped, Some((InstanceState::Stopping | InstanceState::Stopped, _))) => {
                    InstanceState::Stopped
                }
                (Run::Stopped, _) => InstanceState::Stopping,
                (Run::Terminated, Some((InstanceState::ShuttingDown, _))) => {
                    InstanceState::Terminated
                }
                (Run::Terminated, Some((InstanceState::Terminated, _))) => {
                    InstanceState::Terminated
                }
                (Run::Terminated, _) => InstanceState::ShuttingDown,
            };
            let attached = state == InstanceState::Running;
            ObservedInstance {
                id: wish.id,
                state,
                starts: wish.starts,
                reboots: wish.reboots,
                reason: None,
                attachments: wish
                    .volumes
                    .iter()
                    .filter(|_| attached)
                    .map(|v| ObservedAttachment {
                        volume: v.volume,
                        state: AttachmentState::Attached,
                    })
                    .collect(),
            }
        })
        .collect();
    *observed == before
}
