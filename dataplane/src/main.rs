//! The dataplane's daemon: arguments, the lock, signals.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt as _};
use std::path::Path;

use anyhow::Context as _;
use clap::Parser as _;
use dataplane::apply::{Applier, Handle};
use dataplane::cli::{self, Arguments, Deed, Place};
use dataplane::device::Host;
use dataplane::lock::{self, Lock};
use dataplane::respond::metadata::TokenKey;
use dataplane::respond::thread::{RespondThread, random};
use dataplane::{alone, confine, load, serve};
use rpc::Deployment;
use rpc::server::{ControlListener, Peer};
use tokio::signal::unix::{SignalKind, signal};

fn main() -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
    die_whole();
    match Arguments::parse().deed {
        Deed::Check { file } => {
            alone::read(&file)?;
            say(false, &(), format!("{}: right", file.display()))
        }
        Deed::Apply(deed) => put(&deed),
        Deed::Show(deed) => show(&deed),
        Deed::Remove(deed) => remove(&deed),
        Deed::Serve { file, folders } => {
            let deployment = folders.deployment(&alone::read(&file)?.deployment)?;
            lock::folders(&deployment)?;
            daemon(&deployment, Some(&file))
        }
        Deed::Daemon(place) => daemon(&of(&place)?, None),
        Deed::Teardown(place) => teardown(&of(&place)?),
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

fn of(place: &Place) -> anyhow::Result<Deployment> {
    let deployment = Deployment::new(&place.name, &place.state_dir, &place.run_dir)?;
    lock::folders(&deployment)?;
    Ok(deployment)
}

fn put(deed: &cli::Apply) -> anyhow::Result<()> {
    let plan = alone::read(&deed.file)?;
    let deployment = deed.folders.deployment(&plan.deployment)?;
    let outcome = alone::apply(plan, &deployment, deed.dry_run)?;
    say(deed.json, &outcome, outcome.told())
}

fn show(deed: &cli::Alone) -> anyhow::Result<()> {
    let shown = alone::look(&deed.folders.deployment(&deed.name)?)?;
    say(deed.json, &shown, shown.told().trim_end().to_owned())
}

fn remove(deed: &cli::Alone) -> anyhow::Result<()> {
    let deployment = deed.folders.deployment(&deed.name)?;
    lock::folders(&deployment)?;
    teardown(&deployment)?;
    for folder in [deployment.state_dir(), deployment.run_dir()] {
        fs::remove_dir_all(folder).with_context(|| format!("remove {}", folder.display()))?;
    }
    Ok(())
}

fn say(json: bool, value: &impl serde::Serialize, text: String) -> anyhow::Result<()> {
    let text = if json { serde_json::to_string_pretty(value)? } else { text };
    Ok(writeln!(std::io::stdout(), "{text}")?)
}

/// `file`: what it is to hold, read again on SIGHUP; else it is told by its socket.
fn daemon(deployment: &Deployment, file: Option<&Path>) -> anyhow::Result<()> {
    let _lock = lock(deployment)?;
    let mut host = Host::open(deployment)?;
    let punt = host.open_punt()?;
    let key = token_key(&deployment.run_dir().join("dataplane.tokens"))?;
    // Programs are verified and loaded with all that root may; what comes after needs
    // little of it.
    let loaded = load::Loaded::open(deployment)?;
    confine::confine().context("give up privileges")?;
    let respond = RespondThread::start(punt, key).context("start the responders")?;
    let applier = Applier::start(deployment, host, loaded, respond)?;
    let handle = Handle::start(applier).context("start the applier")?;
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .context("start the control socket's runtime")?
        .block_on(listen(deployment, handle, file))
}

async fn listen(
    deployment: &Deployment,
    handle: Handle,
    file: Option<&Path>,
) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut hangup = signal(SignalKind::hangup())?;
    if let Some(file) = file {
        renew(file, deployment, &handle).await?;
    }
    let path = deployment.socket_of("dataplane");
    let listener =
        ControlListener::bind(&path).with_context(|| format!("listen on {}", path.display()))?;
    let service = serve::router(handle.clone()).into_make_service_with_connect_info::<Peer>();
    println!("ready");
    std::io::stdout().flush()?;
    let renewing = async {
        // Whoever is told by its socket ends by SIGHUP, as any program does.
        while let (Some(()), Some(file)) = (hangup.recv().await, file) {
            if let Err(error) = renew(file, deployment, &handle).await {
                tracing::error!("{error:#}; what was in force stays");
            }
        }
    };
    tokio::select! {
        served = axum::serve(listener, service) => served.context("serve the control socket")?,
        () = renewing => tracing::info!("ended by SIGHUP; packets flow on"),
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

/// Puts what a file says in force, by the daemon of this process.
async fn renew(file: &Path, deployment: &Deployment, handle: &Handle) -> anyhow::Result<()> {
    let prepared = alone::Prepared::new(alone::read(file)?, deployment)?;
    prepared.begin()?;
    let applied = handle.apply(prepared.desired.clone()).await?;
    for line in &prepared.finish(applied)?.difference {
        tracing::info!("{line}");
    }
    Ok(())
}

fn lock(deployment: &Deployment) -> anyhow::Result<Lock> {
    lock::take(deployment)?.with_context(|| {
        format!("deployment {}: another dataplane is alive: end it first", deployment.name())
    })
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
