//! The dataplane's daemon: arguments, the lock, signals.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use clap::{Args, Parser, Subcommand};
use dataplane::apply::{Applier, Handle};
use dataplane::device::Host;
use dataplane::respond::metadata::TokenKey;
use dataplane::respond::thread::{RespondThread, random};
use dataplane::{load, serve};
use nix::fcntl::{Flock, FlockArg};
use rpc::Deployment;
use rpc::server::{ControlListener, Peer};
use tokio::signal::unix::{SignalKind, signal};

/// Packets: security groups, elastic addresses, DHCP and instance metadata.
#[derive(Parser)]
#[command(version)]
struct Arguments {
    #[command(subcommand)]
    deed: Deed,
}

#[derive(Subcommand)]
enum Deed {
    /// Serve `dataplane.sock` until SIGTERM. What is in the kernel stays when it ends.
    Daemon(Place),
    /// With no daemon alive: remove every device, program and map of this deployment.
    Teardown(Place),
}

#[derive(Args)]
struct Place {
    /// The deployment's name.
    #[arg(long)]
    name: String,
    /// What must outlive a reboot.
    #[arg(long)]
    state_dir: PathBuf,
    /// Sockets; gone after a reboot.
    #[arg(long)]
    run_dir: PathBuf,
}

fn main() -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    die_whole();
    match Arguments::parse().deed {
        Deed::Daemon(place) => daemon(&place.deployment()?),
        Deed::Teardown(place) => teardown(&place.deployment()?),
    }
}

/// A thread that panics ends the daemon: a supervisor starts it anew, and until
/// then packets flow as they did. Half a daemon would be noticed by nobody.
fn die_whole() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

impl Place {
    fn deployment(&self) -> anyhow::Result<Deployment> {
        let deployment = Deployment::new(&self.name, &self.state_dir, &self.run_dir)?;
        for folder in [deployment.run_dir(), &deployment.state_of("dataplane")] {
            fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        }
        Ok(deployment)
    }
}

fn daemon(deployment: &Deployment) -> anyhow::Result<()> {
    let _lock = lock(deployment)?;
    let mut host = Host::open(deployment)?;
    let punt = host.open_punt()?;
    let key = token_key(&deployment.run_dir().join("dataplane.tokens"))?;
    let respond = RespondThread::start(punt, key).context("start the responders")?;
    let applier = Applier::start(deployment, host, respond)?;
    let handle = Handle::start(applier).context("start the applier")?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the control socket's runtime")?
        .block_on(listen(deployment, handle))
}

async fn listen(deployment: &Deployment, handle: Handle) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let path = deployment.socket_of("dataplane");
    let listener =
        ControlListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
    let service = serve::router(handle).into_make_service_with_connect_info::<Peer>();
    println!("ready");
    std::io::stdout().flush()?;
    tokio::select! {
        served = axum::serve(listener, service) => served.context("serve the control socket")?,
        _ = terminate.recv() => tracing::info!("ended by SIGTERM; packets flow on"),
        _ = interrupt.recv() => tracing::info!("ended by SIGINT; packets flow on"),
    }
    match fs::remove_file(&path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", path.display()))
        }
        _ => Ok(()),
    }
}

fn teardown(deployment: &Deployment) -> anyhow::Result<()> {
    let _lock = lock(deployment)?;
    load::teardown(deployment)?;
    let removed = Host::open(deployment)?.teardown()?;
    for left in [deployment.socket_of("dataplane"), deployment.run_dir().join("dataplane.tokens")] {
        match fs::remove_file(&left) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("remove {}", left.display()));
            }
            _ => {}
        }
    }
    tracing::info!(devices = removed, "torn down");
    Ok(())
}

/// Held as long as the process lives; the kernel lets go of it on kill -9 too.
fn lock(deployment: &Deployment) -> anyhow::Result<Flock<File>> {
    let path = deployment.run_dir().join("dataplane.lock");
    let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(lock),
        Err((_, nix::errno::Errno::EWOULDBLOCK)) => {
            bail!("deployment {}: another dataplane is alive: end it first", deployment.name())
        }
        Err((_, error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

/// The key that metadata tokens are sealed with, made once a boot and kept where
/// a reboot removes it, so that a restarted daemon honours the tokens it gave.
fn token_key(path: &Path) -> anyhow::Result<TokenKey> {
    let mut bytes = [0; TokenKey::LENGTH];
    if let Ok(mut file) = File::open(path) {
        let private = file.metadata()?.permissions().mode() & 0o077 == 0;
        if private && file.read_exact(&mut bytes).is_ok() {
            return Ok(TokenKey::new(bytes));
        }
        fs::remove_file(path).with_context(|| format!("replace {}", path.display()))?;
    }
    bytes[..16].copy_from_slice(&random().to_ne_bytes());
    bytes[16..].copy_from_slice(&random().to_ne_bytes());
    let mut options = File::options();
    options.write(true).create_new(true).mode(0o600);
    options
        .open(path)
        .and_then(|mut file| file.write_all(&bytes))
        .with_context(|| format!("write {}", path.display()))?;
    Ok(TokenKey::new(bytes))
}
