//! The agent's command line and signals.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use agent::host::{Channels, Host, Memory, poll, report};
use agent::image::Store;
use agent::qemu::{self, Abilities, BlockFront, Fronts, Qemu};
use agent::serve::{Reception, router};
use agent::teardown::{ACCELERATOR_FILE, LOCK_FILE, teardown};
use anyhow::Context;
use clap::{Args, Parser, Subcommand};
use rpc::host::Observed;
use rpc::{Client, Deployment};
use tokio::signal::unix::{SignalKind, signal};

#[derive(Parser)]
#[command(version, about = "Brings this host to what control wants: guests, volumes, network")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Runs until told to end; guests run on.
    Daemon {
        #[command(flatten)]
        place: Place,
        /// The name by which control knows this host.
        #[arg(long, default_value = "local")]
        host: String,
        /// How guests reach their volumes.
        #[arg(long, value_enum, default_value_t)]
        block_front: BlockFront,
    },
    /// Ends every guest of the deployment and removes its run files and control groups.
    Teardown {
        #[command(flatten)]
        place: Place,
    },
    /// Becomes a guest's QEMU without privileges (the daemon runs this).
    #[command(hide = true)]
    Confine { plan: PathBuf },
}

#[derive(Args)]
struct Place {
    /// The deployment's name.
    #[arg(long, default_value = "hp")]
    name: String,
    /// What outlives a reboot.
    #[arg(long)]
    state_dir: PathBuf,
    /// Sockets and pid files.
    #[arg(long)]
    run_dir: PathBuf,
}

impl Place {
    fn deployment(&self) -> anyhow::Result<Deployment> {
        let path =
            |p: &Path| std::path::absolute(p).with_context(|| format!("find {}", p.display()));
        Ok(Deployment::new(&self.name, path(&self.state_dir)?, path(&self.run_dir)?)?)
    }
}

fn main() -> ExitCode {
    let result = match Arguments::parse().command {
        // Before any thread or runtime exists: this process becomes QEMU.
        Command::Confine { plan } => return confine(&plan),
        Command::Daemon { place, host, block_front } => {
            log_to_stderr();
            place.deployment().and_then(|deployment| daemon(deployment, host, block_front))
        }
        Command::Teardown { place } => {
            log_to_stderr();
            place.deployment().and_then(|deployment| {
                let ended = teardown(&deployment).context("tear down")?;
                tracing::info!(ended, "nothing is left of the guests");
                Ok(())
            })
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("agent: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn log_to_stderr() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();
}

fn confine(plan: &Path) -> ExitCode {
    let error = match read_plan(plan) {
        // Comes back only when it failed.
        Ok(plan) => qemu::confine(&plan),
        Err(error) => {
            eprintln!("agent confine: {error:#}");
            return ExitCode::FAILURE;
        }
    };
    eprintln!("agent confine: {error}");
    match error {
        qemu::ConfineError::Locked(_) => ExitCode::from(qemu::EXIT_LOCKED),
        qemu::ConfineError::Failed { .. } => ExitCode::FAILURE,
    }
}

fn read_plan(path: &Path) -> anyhow::Result<qemu::Plan> {
    let text = std::fs::read(path).with_context(|| format!("read {}", path.display()))?;
    serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))
}

fn daemon(deployment: Deployment, host: String, front: BlockFront) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the event loop")?;
    let result = runtime.block_on(run(deployment, host, front));
    // An image that is being built must not hold up the end.
    runtime.shutdown_background();
    result
}

async fn run(deployment: Deployment, host: String, front: BlockFront) -> anyhow::Result<()> {
    let state = deployment.state_of("agent");
    for folder in [&state, &deployment.run_dir().to_owned()] {
        std::fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    }
    let _only = only_one(&deployment)?;
    warn_of_closed_doors(&deployment);
    let images = Store::open(state.join("images"))?;
    let memory = Memory::open(&deployment).context("open the agent's memory")?;
    let choice = qemu::choose(&deployment.run_dir().join(ACCELERATOR_FILE));
    tracing::info!(
        accelerator = choice.accelerator.name(),
        reason = choice.reason,
        "guests run by"
    );
    let fronts = Fronts::choose(front, Abilities::probe()).map_err(anyhow::Error::msg)?;
    tracing::info!(front = fronts.describe(), "guests started from now on reach their volumes by");

    let channels = Channels::new();
    let desk = channels.desk();
    let launcher = PathBuf::from("/proc/self/exe");
    let qemu =
        Qemu::new(deployment.clone(), images.clone(), launcher, choice, fronts, channels.reports());
    let (observed, heard) = tokio::sync::watch::channel(Observed::default());
    let owner = Host::new(deployment.clone(), images.clone(), memory, qemu, channels, observed)
        .context("take up what was remembered")?;
    let control = Client::new(deployment.socket_of("control"));
    let (telling, known) = tokio::sync::watch::channel(Vec::new());
    let reception = Reception {
        deployment: deployment.clone(),
        images,
        packages: state.join("packages"),
        desk: desk.clone(),
        known,
    };
    let listener = rpc::server::ControlListener::bind(&deployment.socket_of("agent"))
        .context("listen at the control socket")?;
    let service = router(reception).into_make_service_with_connect_info::<rpc::server::Peer>();

    let owner = tokio::spawn(owner.run());
    tokio::spawn(poll(control.clone(), host.clone(), desk));
    tokio::spawn(report(control, host, heard, telling));
    let server = tokio::spawn(async move { axum::serve(listener, service).await });
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    println!("ready");
    std::io::stdout().flush()?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        // An owner that stopped is our mistake: end, and let the supervisor start anew.
        ended = owner => anyhow::bail!("the owner task ended: {ended:?}"),
        ended = server => anyhow::bail!("the control socket ended: {ended:?}"),
    }
    tracing::info!("ending; guests run on");
    Ok(())
}

/// Two agents of one deployment would pull at the same guests.
fn only_one(deployment: &Deployment) -> anyhow::Result<std::fs::File> {
    let path = deployment.run_dir().join(LOCK_FILE);
    let file =
        std::fs::File::create(&path).with_context(|| format!("create {}", path.display()))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).with_context(
        || format!("lock {}: another agent of this deployment runs", path.display()),
    )?;
    Ok(file)
}

/// Guests reach their volumes' sockets as users of their own, by path.
fn warn_of_closed_doors(deployment: &Deployment) {
    use std::os::unix::fs::PermissionsExt;
    for folder in deployment.run_dir().ancestors() {
        let open = std::fs::metadata(folder).is_ok_and(|m| m.permissions().mode() & 0o001 != 0);
        if !open {
            tracing::warn!(folder = %folder.display(), "guests cannot pass here to their volumes' sockets (chmod o+x)");
        }
    }
}
