//! `netctl up`: brings a deployment to where its four daemons serve, from
//! whatever an earlier run, or its crash, has left.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use clap::Args;
use ipnet::Ipv4Net;
use nix::fcntl::{Flock, FlockArg};
use rpc::control::AccessKey;
use rpc::{Client, Deployment};
use serde::{Deserialize, Serialize};

use super::config::{BlockFront, Config, Uplink, read_json, write_json};
use super::packets::Packets;
use super::place::{DAEMONS, Files, Place};
use super::process::{Identity, end_by_file};
use super::supervise::{DaemonPicture, Phase, Picture};
use super::{preflight, replace, report, uplink};
use crate::failure::{Failure, Outcome};
use crate::output::{self, Format};
use crate::waiting::{self, now};

/// How often the supervisor's picture is looked at while daemons start.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// The supervisor itself has only a file to write before it shows up.
const SUPERVISOR_WITHIN: Duration = Duration::from_secs(10);

/// Beyond the daemons' own bound, for the supervisor to say that it is over.
const SLACK: Duration = Duration::from_secs(2);

/// A daemon that ended so often while `up` looked on will not get well by
/// waiting; a single end may be a race with another daemon's start.
const ENDS_MAX: u32 = 3;

#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:
  netctl up
  eval \"$(netctl up)\"; aws ec2 describe-regions
  netctl up --name test --listen 127.0.0.1:8774
  netctl up --uplink eth1 --uplink-gateway 192.0.2.1 --elastic-range 192.0.2.128/25")]
pub struct Up {
    /// Where the EC2 API is served
    #[arg(long, default_value = "127.0.0.1:8773", value_name = "ADDRESS:PORT")]
    pub listen: SocketAddr,

    /// Name of the region
    #[arg(long, default_value = "local-1")]
    pub region: String,

    /// Name of the availability zone
    #[arg(long, default_value = "local-1a")]
    pub zone: String,

    /// This host's device towards the world; without it, `up` makes a veth into a namespace that plays the internet
    #[arg(long, value_name = "DEVICE", requires = "uplink_gateway", requires = "elastic_range")]
    pub uplink: Option<String>,

    /// The next hop for all that leaves by the uplink
    #[arg(long, value_name = "ADDRESS", requires = "uplink")]
    pub uplink_gateway: Option<Ipv4Addr>,

    /// Where elastic addresses are taken from
    #[arg(long, value_name = "CIDR", requires = "uplink")]
    pub elastic_range: Option<Ipv4Net>,

    /// Subnet of the uplink that `up` makes [default: 198.51.100.0/24, or a free one of 198.18.0.0/16]
    #[arg(long, value_name = "CIDR", conflicts_with = "uplink")]
    pub own_uplink_subnet: Option<Ipv4Net>,

    #[command(flatten)]
    pub packets: Packets,

    /// How long a daemon may take to start, in seconds
    #[arg(long, default_value_t = 60, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(1..=3600))]
    pub ready_within: u64,

    /// How guests reach their volumes
    #[arg(long, value_enum, default_value_t, value_name = "FRONT")]
    pub block_front: BlockFront,

    /// Print the endpoint and the key as JSON
    #[arg(long)]
    pub json: bool,
}

/// What the state directory remembers for the next `up`; `hostplane.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mark {
    pub name: String,
    /// So that elastic addresses, which are kept, stay within their range.
    pub own_subnet: Option<Ipv4Net>,
}

/// What `up --json` prints.
#[derive(Serialize)]
struct Endpoint<'a> {
    endpoint: String,
    access_key_id: &'a str,
    secret_access_key: &'a str,
    region: &'a str,
    run_dir: &'a Path,
    elastic_range: Ipv4Net,
    /// `null` where the uplink is the user's.
    internet_namespace: Option<String>,
}

pub fn run(place: &Place, up: &Up, format: Format) -> Outcome {
    let deployment = place.deployment()?;
    if let Some(line) = preflight::not_root() {
        return Err(Failure::unfit(line));
    }
    let running = running(&deployment)?;
    let is_ours = running.is_none();
    let config = match running {
        Some(config) => {
            let wanted = Config {
                libexec: config.libexec.clone(),
                host: config.host.clone(),
                ..wanted(&deployment, up)?
            };
            output::note("already up");
            if wanted != config {
                output::note(&format!(
                    "it keeps the options it was started with; to change them: netctl down{0} && netctl up{0} …",
                    place.as_options()
                ));
            }
            replace::replace_outdated(&deployment, &config)?;
            config
        }
        None => start(&deployment, up)?,
    };
    wait_until_ready(&deployment, &config, place, is_ours)?;
    tell(&deployment, &config, up.json || format == Format::Json)
}

/// The configuration of the supervisor that is alive, if one is.
fn running(deployment: &Deployment) -> Outcome<Option<Config>> {
    let identity = Identity::read(&deployment.pid_file("supervisor"))?;
    if identity.is_some_and(|i| i.is_alive()) { Config::read(deployment) } else { Ok(None) }
}

fn start(deployment: &Deployment, up: &Up) -> Outcome<Config> {
    if let Err(refusal) = preflight::check_directories(deployment) {
        // What is there may be the half-written mark of another `up`, which holds
        // the lock until it is done.
        if !deployment.state_dir().exists() {
            return Err(refusal);
        }
        let _alone = lock(deployment)?;
        preflight::check_directories(deployment)?;
    }
    let failed = |what: &Path, e: &dyn std::fmt::Display| {
        Failure::failed(format!("{}: prepare: {e}", what.display()))
    };
    let own = [deployment.run_dir(), deployment.state_dir()];
    for dir in own {
        // Guests run as users of their own, and must reach their own files below.
        fs::create_dir_all(dir)
            .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(0o755)))
            .map_err(|e| failed(dir, &e))?;
    }
    let _alone = lock(deployment)?;
    if let Some(config) = running(deployment)? {
        // Another `up` was faster.
        return Ok(config);
    }
    let fit = wanted(deployment, up)
        .and_then(|config| preflight_after_crash(deployment, &config).map(|()| config));
    let config = match fit {
        Ok(config) => config,
        Err(failure) => {
            for dir in own {
                // Only if it is empty, which is how we made it.
                let _ = fs::remove_dir(dir);
            }
            return Err(failure);
        }
    };
    // The marks come first: whatever is made after them, `down` knows as ours.
    write_json(&deployment.config_file(), &config)?;
    let mark = Mark { name: config.name.clone(), own_subnet: config.uplink.own_subnet };
    write_json(&deployment.state_marker(), &mark)?;
    for dir in ["pids", "log"] {
        let dir = deployment.run_dir().join(dir);
        fs::create_dir_all(&dir).map_err(|e| failed(&dir, &e))?;
    }
    match fs::remove_file(deployment.status_file()) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            return Err(failed(&deployment.status_file(), &e));
        }
        _ => {}
    }
    uplink::make(deployment, &config.uplink)?;
    spawn_supervisor(deployment).map_err(|e| failed(Path::new("supervisor"), &e))?;
    wait_for_supervisor(deployment)?;
    Ok(config)
}

/// A control daemon that outlived its supervisor still holds the port; it is
/// ended before the port is judged.
fn preflight_after_crash(deployment: &Deployment, config: &Config) -> Outcome {
    end_by_file(&deployment.pid_file("control"))?;
    preflight::check(config)
}

/// One `up` or `down` of a deployment at a time.
pub fn lock(deployment: &Deployment) -> Outcome<Flock<File>> {
    let dir = deployment.state_dir();
    let failed = |e: &dyn std::fmt::Display| {
        Failure::failed(format!("state directory {}: lock: {e}", dir.display()))
    };
    loop {
        let file = File::open(dir).map_err(|e| failed(&e))?;
        let held = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| failed(&e))?;
        // Meanwhile `down --purge` may have removed the directory that we waited
        // for; a lock on what is no longer there keeps nobody out.
        let inode = |meta: std::io::Result<fs::Metadata>| meta.map(|m| m.ino());
        let now = inode(fs::metadata(dir)).map_err(|e| failed(&e))?;
        if inode(held.metadata()).is_ok_and(|waited_for| waited_for == now) {
            return Ok(held);
        }
    }
}

fn wanted(deployment: &Deployment, up: &Up) -> Outcome<Config> {
    let uplink = match (&up.uplink, up.uplink_gateway, up.elastic_range) {
        (Some(device), Some(gateway), Some(elastic_range)) => {
            Uplink { device: device.clone(), gateway, elastic_range, own_subnet: None }
        }
        _ => uplink::describe(deployment, own_subnet(deployment, up)?)?,
    };
    Ok(Config {
        name: deployment.name().to_owned(),
        state_dir: deployment.state_dir().to_owned(),
        run_dir: deployment.run_dir().to_owned(),
        libexec: libexec(),
        host: host_name(),
        listen: up.listen,
        region: up.region.clone(),
        zone: up.zone.clone(),
        uplink,
        packets: up.packets.arguments()?,
        ready_within_s: up.ready_within,
        block_front: up.block_front,
    })
}

/// As asked for; else as the last time; else a free one.
fn own_subnet(deployment: &Deployment, up: &Up) -> Outcome<Ipv4Net> {
    if let Some(subnet) = up.own_uplink_subnet {
        return Ok(subnet);
    }
    let mark: Option<Mark> = read_json(&deployment.state_marker())?;
    match mark.and_then(|m| m.own_subnet) {
        Some(subnet) => Ok(subnet),
        None => uplink::choose_subnet(deployment),
    }
}

/// `HOSTPLANE_LIBEXEC`; else beside this program; else where a package puts them.
pub fn libexec() -> PathBuf {
    if let Some(dir) = std::env::var_os("HOSTPLANE_LIBEXEC") {
        return dir.into();
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.to_owned()));
    match beside {
        Some(dir) if dir.join(DAEMONS[0]).is_file() => dir,
        _ => PathBuf::from("/usr/libexec/hostplane"),
    }
}

fn host_name() -> String {
    nix::sys::utsname::uname()
        .ok()
        .and_then(|uname| uname.nodename().to_str().map(str::to_owned))
        .filter(|name| !name.is_empty())
        .unwrap_or_else(|| "localhost".to_owned())
}

fn spawn_supervisor(deployment: &Deployment) -> std::io::Result<()> {
    let log =
        fs::OpenOptions::new().create(true).append(true).open(deployment.log_of("supervisor"))?;
    Command::new(std::env::current_exe()?)
        .arg("supervise")
        .arg("--config")
        .arg(deployment.config_file())
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .map(drop)
}

/// Under the lock, so that a second `up` finds it.
fn wait_for_supervisor(deployment: &Deployment) -> Outcome {
    let deadline = now() + SUPERVISOR_WITHIN;
    while !deployment.status_file().exists() {
        if now() > deadline {
            let log = deployment.log_of("supervisor");
            return Err(Failure::failed(format!(
                "supervisor: start: it says nothing within {} s; its log is {}{}",
                SUPERVISOR_WITHIN.as_secs(),
                log.display(),
                report::quote_log(&log)
            )));
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// Waits until every daemon is ready, or until one has shown that it will not
/// be. `is_fresh`: this very command started them, so all their ends count.
fn wait_until_ready(
    deployment: &Deployment,
    config: &Config,
    place: &Place,
    is_fresh: bool,
) -> Outcome {
    let deadline = now() + Duration::from_secs(config.ready_within_s) + SLACK;
    let progress = waiting::spinner();
    let mut first: Option<Picture> = None;
    loop {
        if let Some(picture) = read_json::<Picture>(&deployment.status_file())? {
            progress.set_message(format!("starting: {}", one_line(&picture)));
            let first = first.get_or_insert_with(|| picture.clone());
            let ends_before = |i: usize| if is_fresh { 0 } else { first.daemons[i].ends };
            let mut waiting =
                picture.daemons.iter().enumerate().filter(|(_, d)| d.phase != Phase::Ready);
            let late = now() > deadline;
            let hopeless = waiting.clone().find(|(i, daemon)| {
                let ends = daemon.ends.saturating_sub(ends_before(*i));
                ends >= ENDS_MAX || ends > 0 && daemon.was_late()
            });
            let culprit = hopeless.or_else(|| waiting.clone().next().filter(|_| late));
            if let Some((_, daemon)) = culprit {
                progress.finish_and_clear();
                return Err(not_ready(deployment, config, place, daemon));
            }
            if waiting.next().is_none() {
                progress.finish_and_clear();
                return Ok(());
            }
        }
        if running(deployment)?.is_none() {
            progress.finish_and_clear();
            let log = deployment.log_of("supervisor");
            return Err(Failure::failed(format!(
                "supervisor: it ended while the daemons started{}",
                report::quote_log(&log)
            ))
            .hint(format!("netctl up{}", place.as_options())));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

fn not_ready(
    deployment: &Deployment,
    config: &Config,
    place: &Place,
    daemon: &DaemonPicture,
) -> Failure {
    let log = deployment.log_of(&daemon.name);
    let end = match &daemon.last_end {
        Some(end) => end.clone(),
        None => format!("not ready within {} s", config.ready_within_s),
    };
    Failure::failed(format!(
        "daemon {}: start: {end}; its log is {}{}",
        daemon.name,
        log.display(),
        report::quote_log(&log)
    ))
    .hint(format!("netctl status{0}, or give up with netctl down{0}", place.as_options()))
}

fn one_line(picture: &Picture) -> String {
    let words: Vec<String> = picture
        .daemons
        .iter()
        .map(|d| match d.phase {
            Phase::Ready => format!("{} ✓", d.name),
            phase => format!("{} {}", d.name, phase.name()),
        })
        .collect();
    words.join(", ")
}

fn tell(deployment: &Deployment, config: &Config, json: bool) -> Outcome {
    let client = Client::new(deployment.socket_of("control"));
    let key: AccessKey = crate::wait_for(client.access_key())
        .map_err(|e| Failure::daemon("daemon control: tell the access key", e))?;
    let endpoint = format!("http://{}", config.listen);
    let own = config.uplink.own_subnet.is_some();
    if json {
        return output::json(&Endpoint {
            endpoint,
            access_key_id: &key.access_key_id,
            secret_access_key: &key.secret_access_key,
            region: &config.region,
            run_dir: deployment.run_dir(),
            elastic_range: config.uplink.elastic_range,
            internet_namespace: own.then(|| deployment.internet_namespace()),
        });
    }
    output::note(&format!("the EC2 API is served at {endpoint}"));
    let internet = if own {
        format!("; the internet is played by namespace {}", deployment.internet_namespace())
    } else {
        String::new()
    };
    output::note(&format!(
        "elastic addresses come from {} on {}{internet}",
        config.uplink.elastic_range, config.uplink.device
    ));
    output::line(&format!("export AWS_ENDPOINT_URL={endpoint}"));
    output::line(&format!("export AWS_ACCESS_KEY_ID={}", key.access_key_id));
    output::line(&format!("export AWS_SECRET_ACCESS_KEY={}", key.secret_access_key));
    output::line(&format!("export AWS_DEFAULT_REGION={}", config.region));
    Ok(())
}
