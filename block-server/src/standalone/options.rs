//! The words after `block-server serve`, and the [`Plan`] that they make.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use rpc::block::Quality;

use crate::backing::Cache;
use crate::plan::{Export, Listen, Place, Plan};
use crate::worker::{EngineChoice, THREADS_MAX};
use crate::{exposition, tls};

/// What `serve --help` ends with.
const EXAMPLES: &str = "\
Examples:
  block-server serve --file disk.img --socket /run/x.sock
  block-server serve --file disk.img --vhost-user /run/x.sock
  block-server serve --export root=/dev/vg/root --read-only --tcp 127.0.0.1:10809
  block-server serve --file disk.img --tcp 0.0.0.0:10809 --tls-certificates /etc/pki/nbd
  block-server serve --config /etc/block-server.toml --check

Clients:
  nbdinfo 'nbd+unix:///?socket=/run/x.sock'
  qemu-img info nbd://127.0.0.1/root

The page block-server(8) has the whole of it.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub struct Options {
    /// What to serve, as a TOML file; in place of the options that say so.
    #[arg(long, value_name = "FILE", conflicts_with_all =
        ["file", "export", "socket", "vhost_user", "tcp", "read_only", "cache", "engine", "tls_certificates",
         "metrics", "slow_log_ms", "iops", "throughput_mib", "threads"])]
    pub(super) config: Option<PathBuf>,
    /// Look whether all could be served, say what is wrong, and end.
    #[arg(long)]
    pub(super) check: bool,
    /// A file or block device, served as the default export.
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    /// A further export; may be given several times.
    #[arg(long, value_name = "NAME=PATH", value_parser = named)]
    export: Vec<(String, PathBuf)>,
    /// The unix socket to listen on, for our own user and root.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// A unix socket for QEMU's vhost-user-blk: a guest with shared memory on this
    /// host gets the only export as its disk.
    #[arg(long, value_name = "PATH")]
    vhost_user: Option<PathBuf>,
    /// The TCP address to listen on. Without --tls-certificates there is no
    /// encryption: stay on loopback or a network that you trust.
    #[arg(long, value_name = "ADDRESS:PORT")]
    tcp: Option<SocketAddr>,
    /// Require TLS on every socket. The folder holds server-cert.pem, server-key.pem,
    /// and ca-cert.pem: clients must show a certificate of that authority.
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// Ask the server that listens at this socket for its sockets and connections,
    /// so that its clients notice nothing; then listen there for a successor.
    #[arg(long, value_name = "PATH")]
    pub(super) take_over: Option<PathBuf>,
    /// Refuse every change.
    #[arg(long)]
    read_only: bool,
    /// Whether file operations go through the kernel's page cache.
    #[arg(long, value_enum, default_value = "none")]
    cache: Cache,
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
    /// Threads that serve, each file by one of them; by default one a core, at most four,
    /// and never more than there are files.
    #[arg(long, value_name = "COUNT",
        value_parser = clap::value_parser!(u16).range(1..=THREADS_MAX))]
    threads: Option<u16>,
    /// Operations a second that each export may do, 256 KiB each at most.
    #[arg(long, value_name = "COUNT")]
    iops: Option<u64>,
    /// MiB a second that each export may read and write.
    #[arg(long, value_name = "MIB")]
    throughput_mib: Option<u64>,
    /// Serve Prometheus' metrics there: GET /metrics.
    #[arg(long, value_name = "ADDRESS:PORT|PATH")]
    metrics: Option<exposition::Place>,
    /// Log requests that take as long, ten a second at most.
    #[arg(long, value_name = "MS")]
    slow_log_ms: Option<u64>,
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write NAME=PATH")?;
    Ok((name.to_owned(), path.into()))
}

impl Options {
    pub(super) fn plan(self, activated: bool) -> anyhow::Result<Plan> {
        if let Some(path) = &self.config {
            return Ok(Plan::read(path)?);
        }
        let quality = Quality { kind: None, iops: self.iops, throughput_mib: self.throughput_mib };
        let limits = quality.limits(0).map_err(anyhow::Error::msg)?;
        let all = self.file.map(|path| (String::new(), path)).into_iter().chain(self.export);
        let exports: Vec<Export> = all
            .map(|(name, path)| Export {
                name,
                read_only: self.read_only,
                cache: self.cache,
                description: path.display().to_string(),
                path,
                clients: None,
                limits,
            })
            .collect();
        ensure!(!exports.is_empty(), "name a --file, an --export or a --config");
        for (index, Export { name, .. }) in exports.iter().enumerate() {
            let is_taken = exports[..index].iter().any(|other| other.name == *name);
            ensure!(!is_taken, "--export {name}=…: another export has that name; write another");
        }
        let places = [
            activated.then(|| Place::Activated(Vec::new())),
            self.socket.map(|path| Place::Unix(path, Vec::new())),
            self.vhost_user.map(|path| Place::VhostUser(path, Vec::new())),
            self.tcp.map(Place::Tcp),
        ];
        let tls = self.tls_certificates.as_deref().map(tls::Files::of_folder);
        let listeners: Vec<Listen> = places
            .into_iter()
            .flatten()
            .map(|place| Listen { tls: tls.is_some() && !place.is_vhost_user(), place })
            .collect();
        ensure!(
            !listeners.is_empty(),
            "name a --socket, a --vhost-user socket or a --tcp address, or pass a socket as systemd does"
        );
        ensure!(
            exports.len() == 1 || !listeners.iter().any(|l| l.place.is_vhost_user()),
            "a --vhost-user socket serves one export: name only one"
        );
        Ok(Plan {
            engine: self.engine,
            threads: self.threads,
            listeners,
            exports,
            tls,
            metrics: self.metrics,
            slow_log: self.slow_log_ms.filter(|ms| *ms > 0).map(Duration::from_millis),
        })
    }
}
