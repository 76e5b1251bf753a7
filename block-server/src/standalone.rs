//! `block-server serve`: plain NBD for anyone, without catalogue or control.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use anyhow::{Context, ensure};
use rpc::block::Quality;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc::unbounded_channel;

use crate::backing::{self, Backing, Cache};
use crate::confine::{Needs, confine};
use crate::exposition;
use crate::handover::{self, Load, Sockets, Taken, Taking};
use crate::holding::{self, Held};
use crate::metrics::Counters;
use crate::notify::Manager;
use crate::plan::{ACTIVATED, Export, Listen, Place, Plan};
use crate::starter::{self, Starter};
use crate::worker::{Access, EngineChoice, Front, Handle, NewVolume, Parked, Served};
use crate::{socket, tls};

/// What a hand-over calls us; a `daemon` is another kind.
const KIND: &str = "block-server serve";

/// How long a successor may take to open its files; clients are served meanwhile.
const PREPARE_MAX: Duration = Duration::from_secs(60);

/// How long `--check` waits for who has just ended.
const CHECK_MAX: Duration = Duration::from_millis(200);

/// The name of the socket that metrics are asked at.
const METRICS: &str = "metrics";

/// The name of the socket that successors ask at.
const UPGRADES: &str = "take-over";

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
         "metrics", "slow_log_ms", "iops", "throughput_mib"])]
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
    take_over: Option<PathBuf>,
    /// Refuse every change.
    #[arg(long)]
    read_only: bool,
    /// Whether file operations go through the kernel's page cache.
    #[arg(long, value_enum, default_value = "none")]
    cache: Cache,
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
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
    fn plan(self, activated: bool) -> anyhow::Result<Plan> {
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
            listeners,
            exports,
            tls,
            metrics: self.metrics,
            slow_log: self.slow_log_ms.filter(|ms| *ms > 0).map(Duration::from_millis),
        })
    }
}

/// All that can fail for what the user wrote, before anybody is served.
struct Opened {
    exports: Vec<(Export, Backing)>,
    held: Held,
    /// Of block devices, by the name that a successor gets them by.
    claims: BTreeMap<String, OwnedFd>,
    listeners: Vec<Listener>,
    /// Where another server may ask for all this.
    upgrades: Option<OwnedFd>,
    metrics: Option<OwnedFd>,
}

struct Listener {
    /// What a successor knows it by.
    name: String,
    front: Front,
    access: Access,
    socket: OwnedFd,
}

/// `old`: sockets that a predecessor hands on.
fn open(
    plan: &Plan,
    take_over: Option<&Path>,
    activated: Vec<OwnedFd>,
    old: &mut Sockets,
) -> anyhow::Result<Opened> {
    let tls = load_tls(plan)?;
    let claims = claim_devices(plan, old)?;
    let (held, exports) = Held::open(&plan.exports, old, backing::FREED_WITHIN)?;
    let mut listeners = Vec::new();
    for listen in &plan.listeners {
        let access = access(listen, tls.as_ref());
        for (name, socket) in sockets_of(&listen.place, &activated, old)? {
            let front = listen.place.front();
            listeners.push(Listener { name, front, access: access.clone(), socket });
        }
    }
    let upgrades = match (old.listening.remove(UPGRADES), take_over) {
        (Some(socket), Some(_)) => Some(socket),
        (_, Some(path)) => Some(socket::listen(path, &[])?),
        (_, None) => None,
    };
    let metrics = match (&plan.metrics, old.listening.remove(METRICS)) {
        (Some(_), Some(socket)) => Some(socket),
        (Some(place), None) => Some(place.bind()?),
        (None, _) => None,
    };
    Ok(Opened { exports, held, claims, listeners, upgrades, metrics })
}

/// The sockets of one place, taken over, passed on or bound.
fn sockets_of(
    place: &Place,
    activated: &[OwnedFd],
    old: &mut Sockets,
) -> anyhow::Result<Vec<(String, OwnedFd)>> {
    let name = place.to_string();
    if let Some(socket) = old.listening.remove(&name) {
        if let Place::Unix(path, users) | Place::VhostUser(path, users) = place {
            socket::set_users(path, users)?;
        }
        return Ok(vec![(name, socket)]);
    }
    let bound = match place {
        Place::Unix(path, users) | Place::VhostUser(path, users) => socket::listen(path, users)?,
        Place::Tcp(address) => {
            socket::bind(*address).with_context(|| format!("cannot bind {address}"))?.into()
        }
        Place::Activated(_) => return passed_on(activated, old),
    };
    Ok(vec![(name, bound)])
}

fn passed_on(activated: &[OwnedFd], old: &mut Sockets) -> anyhow::Result<Vec<(String, OwnedFd)>> {
    let name = |index: usize| format!("{ACTIVATED} {index}");
    let mut found = Vec::new();
    while let Some(socket) = old.listening.remove(&name(found.len())) {
        found.push((name(found.len()), socket));
    }
    if found.is_empty() {
        for (index, socket) in activated.iter().enumerate() {
            found.push((name(index), socket.try_clone()?));
        }
    }
    ensure!(!found.is_empty(), "no socket was passed on (LISTEN_FDS)");
    Ok(found)
}

fn load_tls(plan: &Plan) -> anyhow::Result<Option<Arc<tls::Server>>> {
    plan.tls.as_ref().map(tls::Server::load).transpose().context("TLS")
}

/// Claims each device that is written to, once; a predecessor hands its claims on.
fn claim_devices(plan: &Plan, old: &mut Sockets) -> anyhow::Result<BTreeMap<String, OwnedFd>> {
    let mut claims = BTreeMap::new();
    for export in plan.exports.iter().filter(|export| !export.read_only) {
        let named = || format!("export {:?}", export.name);
        let path = std::fs::canonicalize(&export.path).with_context(named)?;
        let name = format!("claim {}", path.display());
        if claims.contains_key(&name) {
            continue;
        }
        let claim = match old.listening.remove(&name) {
            Some(handed_on) => Some(handed_on),
            None => backing::claim(&path).with_context(named)?,
        };
        claims.extend(claim.map(|claim| (name, claim)));
    }
    Ok(claims)
}

fn access(listen: &Listen, tls: Option<&Arc<tls::Server>>) -> Access {
    match (tls, &listen.place) {
        (Some(server), _) if listen.tls => Access::Certificate(Arc::clone(server)),
        (_, Place::Unix(_, users) | Place::VhostUser(_, users)) => {
            Access::Users(users.as_slice().into())
        }
        (_, Place::Activated(users)) if !users.is_empty() => Access::Users(users.as_slice().into()),
        (_, Place::Tcp(_) | Place::Activated(_)) => Access::Anyone,
    }
}

/// Where a predecessor may run, it has the devices' claims and the files' locks.
fn check(plan: &Plan, may_run: bool) -> anyhow::Result<()> {
    load_tls(plan)?;
    let nobody = &mut Sockets::default();
    if may_run {
        for export in &plan.exports {
            Backing::open_cached(&export.path, export.read_only, export.cache)
                .with_context(|| format!("export {:?}", export.name))?;
        }
    } else {
        claim_devices(plan, nobody)?;
        Held::open(&plan.exports, nobody, CHECK_MAX)?;
    }
    let (exports, sockets) = (plan.exports.len(), plan.listeners.len());
    println!("{exports} exports on {sockets} sockets: all could be served");
    Ok(())
}

/// What serves, and what a successor is given.
struct Serving {
    worker: Handle,
    /// Which listener has which name.
    names: BTreeMap<u32, String>,
    sockets: Sockets,
    metrics: Vec<(String, Arc<Counters>)>,
}

impl Serving {
    async fn start(
        worker: Handle,
        opened: Opened,
        load: Load,
    ) -> anyhow::Result<(Self, Option<OwnedFd>)> {
        let (mut exports, mut metrics) = (Vec::new(), Vec::new());
        for (export, backing) in opened.exports {
            let counters = Arc::<Counters>::default();
            metrics.push((export.path.display().to_string(), Arc::clone(&counters)));
            exports.push(add(&worker, export, backing, &load, counters).await?);
        }
        let mut serving =
            Self { worker, names: BTreeMap::new(), sockets: Sockets::default(), metrics };
        for Listener { name, front, access, socket } in opened.listeners {
            serving.sockets.listening.insert(name.clone(), socket.try_clone()?);
            let index = serving.worker.add_listener(socket, front, access, exports.clone()).await?;
            serving.names.insert(index, name);
        }
        serving.sockets.listening.extend(opened.claims);
        serving.sockets.listening.extend(opened.held.hand_on());
        if let Some(socket) = &opened.upgrades {
            serving.sockets.listening.insert(UPGRADES.to_owned(), socket.try_clone()?);
        }
        if let Some(socket) = opened.metrics {
            serving.sockets.listening.insert(METRICS.to_owned(), socket);
        }
        serving.take_up(load)?;
        Ok((serving, opened.upgrades))
    }

    fn take_up(&self, load: Load) -> anyhow::Result<()> {
        let place = |(name, mut parked): (String, Parked)| {
            parked.listener = *self.names.iter().find(|(_, own)| **own == name)?.0;
            Some(parked)
        };
        Ok(self.worker.add_connections(load.connections.into_iter().filter_map(place).collect())?)
    }

    async fn park(&self) -> std::io::Result<Load> {
        let still = self.worker.park().await.map_err(std::io::Error::other)?;
        let name = |parked: Parked| Some((self.names.get(&parked.listener)?.clone(), parked));
        let connections = still.connections.into_iter().filter_map(name).collect();
        Ok(Load { connections, volumes: still.volumes })
    }

    /// `None`: a successor serves, and we must not. Else why we serve on.
    fn give_to(&self, stream: UnixStream) -> anyhow::Result<Option<String>> {
        let runtime = tokio::runtime::Handle::current();
        let given = handover::give(stream, KIND, &self.sockets, PREPARE_MAX, || {
            runtime.block_on(self.park())
        });
        match given {
            Ok(()) => Ok(None),
            Err((error, load)) => {
                tracing::warn!("a successor came and failed; serving on: {error}");
                holding::keep(&self.sockets)?;
                self.take_up(load.unwrap_or_default())?;
                Ok(Some(error.to_string()))
            }
        }
    }
}

/// All that was read and opened, before any thread is started.
pub struct Prepared {
    plan: Plan,
    opened: Opened,
    taking: Option<Taking>,
    manager: Manager,
    /// Where a file says what is served, which may change.
    starter: Option<Starter>,
}

impl Prepared {
    /// Opens all that is to be served; `None` where only that was asked.
    pub fn new(options: Options) -> anyhow::Result<Option<Self>> {
        let (is_check, take_over) = (options.check, options.take_over.clone());
        // Before anything is opened, so that nobody else has it open, too.
        let predecessor = starter::predecessor().context("the predecessor's socket")?;
        let reloads = options.config.is_some() && !is_check;
        let starter = reloads.then(Starter::split_off).transpose().context("the starter")?;
        let manager = Manager::of_environment();
        let activated = socket::inherited();
        let mut old = Sockets::default();
        let mut taking = None;
        let asks = take_over.as_deref().filter(|_| predecessor.is_none());
        if let Some(stream) = predecessor {
            let (begun, sockets) = Taking::of_starter(stream, KIND).context("take over")?;
            (taking, old) = (Some(begun), sockets);
        }
        if let Some(path) = asks.filter(|_| !is_check) {
            let begun = Taking::begin(path, KIND)
                .with_context(|| format!("take over by {}", path.display()))?;
            if let Some((begun, sockets)) = begun {
                (taking, old) = (Some(begun), sockets);
            }
        }
        let has_activated =
            !activated.is_empty() || old.listening.keys().any(|name| name.starts_with(ACTIVATED));
        let plan = options.plan(has_activated)?;
        if is_check {
            check(&plan, take_over.is_some())?;
            return Ok(None);
        }
        let opened = open(&plan, take_over.as_deref(), activated, &mut old)?;
        Ok(Some(Self { plan, opened, taking, manager, starter }))
    }

    /// Gives up what serving does not need. Called before any thread is started.
    pub fn confine(&self) {
        let sockets = self.plan.listeners.iter().filter_map(|listen| match &listen.place {
            Place::Unix(path, _) | Place::VhostUser(path, _) => Some(path.as_path()),
            Place::Tcp(_) | Place::Activated(_) => None,
        });
        let metrics = match &self.plan.metrics {
            Some(exposition::Place::Unix(path)) => Some(path.as_path()),
            _ => None,
        };
        let folder = |path: &'_ Path| match path.parent() {
            Some(folder) if folder != Path::new("") => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        let folders: Vec<PathBuf> = sockets.chain(metrics).map(folder).collect();
        let folders = folders.iter().map(PathBuf::as_path).collect();
        let held = confine(&Needs::Serving { folders });
        tracing::info!("confined by {held}");
    }
}

/// Serves until `stop` resolves or a successor has taken over.
pub async fn run(prepared: Prepared, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    let Prepared { plan, mut opened, taking, manager, starter } = prepared;
    let is_successor = taking.is_some();
    // Heard from the beginning: it would end us.
    let hangups = starter.is_some().then(|| signal(SignalKind::hangup())).transpose();
    let hangups = hangups.context("cannot hear SIGHUP")?;
    let (events, _) = unbounded_channel();
    let worker = Handle::start(0, plan.engine, events).context("cannot start the I/O engine")?;
    let mut taken = match taking {
        Some(taking) => tokio::task::block_in_place(|| taking.finish()).context("take over")?,
        None => Taken::default(),
    };
    // Nobody else serves now; when we fail before `begin`, the predecessor goes on.
    if taken.has_crashed {
        tracing::warn!("the predecessor died; going on as after a crash");
        opened.held.take_from_the_dead(&mut opened.exports, backing::FREED_WITHIN)?;
    } else {
        opened.held.settle(handover::SETTLE_MAX)?;
    }
    if let Err(error) = taken.begin() {
        opened.held.give_back();
        return Err(error).context("take over");
    }
    opened.held.begun();
    if is_successor {
        // While the predecessor still lives: its end is not the service's then.
        manager.successor();
    }
    let load = std::mem::take(&mut taken.load);
    drop(taken);
    let taken = load.connections.len();
    let scraped_at = opened.metrics.as_ref().map(OwnedFd::try_clone).transpose()?;
    let (serving, upgrades) = Serving::start(worker, opened, load).await?;
    crate::worker::set_slow_log(plan.slow_log);
    let scraped = async {
        match (&plan.metrics, scraped_at) {
            (Some(place), Some(socket)) => {
                exposition::serve(place.clone(), socket, serving.metrics.clone()).await
            }
            _ => std::future::pending().await,
        }
    };
    let (engine, exports) = (serving.worker.engine(), plan.exports.len());
    tracing::info!(engine, exports, taken, "serving");
    if plan.listeners.iter().any(|listen| !matches!(listen.place, Place::Activated(_))) {
        println!("ready");
    } // Else whoever passed the sockets on has clients there already, and its output is not ours.
    manager.ready();
    tokio::select! {
        () = stop => {}
        reloaded = reloads(&serving, starter.zip(hangups), &manager) => {
            reloaded?;
            tracing::info!("a successor serves");
            return Ok(());
        }
        ended = scraped => ended.context("the metrics' socket failed")?,
        succeeded = succession(&serving, upgrades) => {
            succeeded?;
            tracing::info!("a successor serves");
            return Ok(());
        }
    }
    manager.stopping();
    tokio::task::block_in_place(|| {
        serving.worker.begin_stop();
        serving.worker.await_stop();
    });
    if let Some(exposition::Place::Unix(path)) = &plan.metrics {
        let _ = std::fs::remove_file(path);
    }
    for listen in &plan.listeners {
        if let Place::Unix(path, _) | Place::VhostUser(path, _) = &listen.place {
            let _ = std::fs::remove_file(path);
        }
    }
    Ok(())
}

/// Resolves when a successor has taken over.
async fn succession(serving: &Serving, upgrades: Option<OwnedFd>) -> anyhow::Result<()> {
    let Some(upgrades) = upgrades else { return std::future::pending().await };
    let asked = handover::Asked::new(upgrades)?;
    loop {
        let stream = asked.next().await?;
        if tokio::task::block_in_place(|| serving.give_to(stream))?.is_none() {
            return Ok(());
        }
    }
}

/// Resolves when SIGHUP has brought a successor that serves by the changed file.
async fn reloads(
    serving: &Serving,
    starter: Option<(Starter, Signal)>,
    manager: &Manager,
) -> anyhow::Result<()> {
    let Some((starter, mut hangups)) = starter else { return std::future::pending().await };
    loop {
        hangups.recv().await;
        tracing::info!("SIGHUP: starting a successor");
        manager.reloading();
        let given = tokio::task::block_in_place(|| match starter.start() {
            Ok(stream) => serving.give_to(stream),
            Err(error) => Ok(Some(format!("cannot start a successor: {error}"))),
        });
        match given? {
            None => return Ok(()),
            Some(why) => {
                tracing::warn!("not reloaded, serving on: {why}");
                manager.not_reloaded(&why);
            }
        }
    }
}

async fn add(
    worker: &Handle,
    export: Export,
    backing: Backing,
    load: &Load,
    counters: Arc<Counters>,
) -> anyhow::Result<Served> {
    let size = backing.geometry.size;
    let name = export.path.display().to_string();
    let volume = NewVolume {
        carried: load.carried(&name),
        name,
        fd: backing.fd,
        geometry: backing.geometry,
        generation: 0,
        counters,
        limits: export.limits,
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
