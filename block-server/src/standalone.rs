//! `block-server serve`: plain NBD for anyone, without catalogue or control.

use std::net::{SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use anyhow::{Context, ensure};
use tokio::sync::mpsc::unbounded_channel;

use crate::backing::{Backing, Cache};
use crate::plan::{Export, Listen, Place, Plan};
use crate::worker::{Access, EngineChoice, Handle, NewVolume, Served};
use crate::{socket, tls};

/// What `serve --help` ends with.
const EXAMPLES: &str = "\
Examples:
  block-server serve --file disk.img --socket /run/x.sock
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
        ["file", "export", "socket", "tcp", "read_only", "cache", "engine", "tls_certificates"])]
    config: Option<PathBuf>,
    /// Look whether all could be served, say what is wrong, and end.
    #[arg(long)]
    check: bool,
    /// A file or block device, served as the default export.
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    /// A further export; may be given several times.
    #[arg(long, value_name = "NAME=PATH", value_parser = named)]
    export: Vec<(String, PathBuf)>,
    /// The unix socket to listen on, for our own user and root.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The TCP address to listen on. Without --tls-certificates there is no
    /// encryption: stay on loopback or a network that you trust.
    #[arg(long, value_name = "ADDRESS:PORT")]
    tcp: Option<SocketAddr>,
    /// Require TLS on every socket. The folder holds server-cert.pem, server-key.pem,
    /// and ca-cert.pem: clients must show a certificate of that authority.
    #[arg(long, value_name = "DIR")]
    tls_certificates: Option<PathBuf>,
    /// Refuse every change.
    #[arg(long)]
    read_only: bool,
    /// Whether file operations go through the kernel's page cache.
    #[arg(long, value_enum, default_value = "none")]
    cache: Cache,
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write NAME=PATH")?;
    Ok((name.to_owned(), path.into()))
}

impl Options {
    fn plan(self, activated: bool) -> anyhow::Result<Plan> {
        if let Some(path) = &self.config {
            return Ok(Plan::read(path)?);
        }
        let all = self.file.map(|path| (String::new(), path)).into_iter().chain(self.export);
        let exports: Vec<Export> = all
            .map(|(name, path)| Export {
                name,
                read_only: self.read_only,
                cache: self.cache,
                description: path.display().to_string(),
                path,
                clients: None,
            })
            .collect();
        ensure!(!exports.is_empty(), "name a --file, an --export or a --config");
        let places = [
            activated.then_some(Place::Activated),
            self.socket.map(|path| Place::Unix(path, None)),
            self.tcp.map(Place::Tcp),
        ];
        let tls = self.tls_certificates.as_deref().map(tls::Files::of_folder);
        let listeners: Vec<Listen> = places
            .into_iter()
            .flatten()
            .map(|place| Listen { place, tls: tls.is_some() })
            .collect();
        ensure!(
            !listeners.is_empty(),
            "name a --socket or a --tcp address, or pass a socket as systemd does"
        );
        Ok(Plan { engine: self.engine, threads: None, listeners, exports, tls })
    }
}

/// A plan whose files, keys and sockets are open.
struct Opened {
    exports: Vec<(Export, Backing)>,
    listeners: Vec<(Access, OwnedFd)>,
}

/// All that can fail for what the user wrote, before anybody is served.
fn open(plan: &Plan, mut activated: Vec<OwnedFd>) -> anyhow::Result<Opened> {
    let tls = load_tls(plan)?;
    let exports = open_exports(plan)?;
    let mut listeners = Vec::new();
    for listen in &plan.listeners {
        let access = access(listen, tls.as_ref());
        match &listen.place {
            Place::Activated => {
                ensure!(!activated.is_empty(), "no socket was passed on (LISTEN_FDS)");
                listeners.extend(activated.drain(..).map(|socket| (access.clone(), socket)));
            }
            place => listeners.push((access, bind(place)?)),
        }
    }
    Ok(Opened { exports, listeners })
}

fn load_tls(plan: &Plan) -> anyhow::Result<Option<Arc<tls::Server>>> {
    plan.tls.as_ref().map(tls::Server::load).transpose().context("TLS")
}

fn open_exports(plan: &Plan) -> anyhow::Result<Vec<(Export, Backing)>> {
    plan.exports
        .iter()
        .map(|export| {
            let backing = Backing::open_cached(&export.path, export.read_only, export.cache)
                .with_context(|| format!("export {:?}", export.name))?;
            Ok((export.clone(), backing))
        })
        .collect()
}

fn access(listen: &Listen, tls: Option<&Arc<tls::Server>>) -> Access {
    match (tls, &listen.place) {
        (Some(server), _) if listen.tls => Access::Certificate(Arc::clone(server)),
        (_, Place::Unix(_, user)) => Access::Owner(*user),
        (_, Place::Tcp(_) | Place::Activated) => Access::Anyone,
    }
}

fn bind(place: &Place) -> anyhow::Result<OwnedFd> {
    match place {
        Place::Unix(path, user) => Ok(socket::listen(path, *user)?),
        Place::Tcp(address) => {
            Ok(TcpListener::bind(address).with_context(|| format!("cannot bind {address}"))?.into())
        }
        Place::Activated => anyhow::bail!("an activated socket is passed on, not bound"),
    }
}

/// Serves until `stop` resolves.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let activated = socket::inherited();
    let check = options.check;
    let plan = options.plan(!activated.is_empty())?;
    if check {
        load_tls(&plan)?;
        let exports = open_exports(&plan)?;
        println!("{} exports on {} sockets: ready", exports.len(), plan.listeners.len());
        return Ok(());
    }
    let Opened { exports: files, listeners } = open(&plan, activated)?;
    let (events, _) = unbounded_channel();
    let worker = Handle::start(0, plan.engine, events).context("cannot start the I/O engine")?;
    let mut exports = Vec::new();
    for (export, backing) in files {
        exports.push(add(&worker, export, backing).await?);
    }
    for (access, listener) in listeners {
        worker.add_listener(listener, access, exports.clone()).await?;
    }
    tracing::info!(engine = worker.engine(), exports = exports.len(), "serving");
    println!("ready");
    stop.await;
    tokio::task::block_in_place(|| {
        worker.begin_stop();
        worker.await_stop();
    });
    for listen in &plan.listeners {
        if let Place::Unix(path, _) = &listen.place {
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(())
}

async fn add(worker: &Handle, export: Export, backing: Backing) -> anyhow::Result<Served> {
    let size = backing.geometry.size;
    let volume = NewVolume {
        name: export.path.display().to_string(),
        fd: backing.fd,
        geometry: backing.geometry,
        generation: 0,
        failed: None,
        counters: Arc::default(),
        limits: model::Limits::none(),
    };
    Ok(Served {
        name: export.name,
        volume: worker.add_volume(volume).await?,
        size,
        read_only: export.read_only,
        generation: 0,
        description: export.description,
        clients: export.clients.map(Into::into),
        connections: Arc::new(AtomicU32::new(0)),
    })
}
