//! Puts the daemon together.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, bail};
use ipnet::Ipv4Net;
use model::RuleLimits;
use rpc::Deployment;
use store::{Embedded, Etcd, Store};
use tokio::net::TcpListener;

use crate::api::ApiError;
use crate::auth::derive_public_key;
use crate::core;
use crate::credentials::Credentials;
use crate::front::{Front, Guard, listen};
use crate::packets::Packets;
use crate::record::AccessKey;
use crate::region::{Region, entropy};
use crate::serve::{Served, router};
use crate::settings::Settings;

/// How often time alone is looked at: terminated instances, client tokens.
const SWEEP_INTERVAL: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// Name of the deployment: one to eight of a-z and 0-9.
    #[arg(long)]
    pub name: String,
    /// Where the store is kept.
    #[arg(long)]
    pub state_dir: std::path::PathBuf,
    /// Where the control socket is.
    #[arg(long)]
    pub run_dir: std::path::PathBuf,
    /// Where the EC2 API is served.
    #[arg(long, default_value = "127.0.0.1:8773")]
    pub listen: SocketAddr,
    #[arg(long, default_value = "local-1")]
    pub region: String,
    /// The region's name and a letter, where it is not given.
    #[arg(long)]
    pub zone: Option<String>,
    /// The host that instances are placed on; this one's name, where it is not given.
    #[arg(long)]
    pub host: Option<String>,
    /// The host's device towards the world.
    #[arg(long, requires = "uplink_gateway")]
    pub uplink: Option<String>,
    /// The next hop for all that leaves by it.
    #[arg(long, requires = "uplink")]
    pub uplink_gateway: Option<Ipv4Addr>,
    /// Where elastic addresses are taken from.
    #[arg(long)]
    pub elastic_range: Option<Ipv4Net>,
    /// Addresses of that range that others have.
    #[arg(long)]
    pub elastic_reserved: Vec<Ipv4Addr>,
    /// A name server that is asked for what is no guest's name; without any, those of
    /// /etc/resolv.conf.
    #[arg(long)]
    pub dns: Vec<IpAddr>,
    /// Rules of a security group, each way and family; times the groups of an interface,
    /// 1000 at most.
    #[arg(long, default_value_t = RuleLimits::default().rules_a_group)]
    pub rules_a_group: u32,
    /// Security groups of an interface, 16 at most.
    #[arg(long, default_value_t = RuleLimits::default().groups_an_interface)]
    pub groups_an_interface: u32,
    #[command(flatten)]
    pub packets: Packets,
    /// Endpoints of an etcd to keep the state in; where none is given, it is
    /// kept in the state directory.
    #[arg(long)]
    pub etcd: Vec<String>,
    /// Calls that an access key may make at once.
    #[arg(long, default_value_t = crate::front::BURST)]
    pub burst: f64,
}

#[expect(clippy::disallowed_methods, reason = "the daemon's one clock")]
pub fn now_ms() -> u64 {
    let passed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    passed.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// Runs until it is told to end, or cannot go on.
pub async fn run(options: Options, end: impl Future<Output = ()>) -> anyhow::Result<()> {
    let deployment = Deployment::new(&options.name, &options.state_dir, &options.run_dir)?;
    let folder = deployment.state_of("control");
    make_folder(&folder)?;
    make_folder(deployment.run_dir())?;
    let listener = TcpListener::bind(options.listen)
        .await
        .with_context(|| format!("EC2 API: listen on {}", options.listen))?;
    let address = listener.local_addr().context("EC2 API: its address")?;
    let settings = settings(&options, address)?;
    let store: Arc<dyn Store> = if options.etcd.is_empty() {
        Arc::new(Embedded::open(&folder.join("state.redb"), Arc::new(now_ms))?)
    } else {
        Arc::new(Etcd::connect(&options.etcd).await?)
    };
    let mut rng = entropy()?;
    let credentials = Credentials::open(&folder.join("credentials"), &settings.region, &mut rng)?;
    let region = Arc::new(Region::open(store, settings, now_ms).await?);
    let follower = tokio::spawn({
        let region = Arc::clone(&region);
        async move { region.follow().await }
    });
    bootstrap(&region, &credentials).await?;
    let front = Arc::new(Front {
        region: Arc::clone(&region),
        agent: rpc::Client::new(deployment.socket_of("agent"))
            .with_timeout(Duration::from_secs(10)),
        secrets: Arc::new(credentials.clone()),
        guard: Guard::new(options.burst),
    });
    let socket = deployment.socket_of("control");
    let control = rpc::server::ControlListener::bind(&socket)
        .with_context(|| format!("control socket {}: bind", socket.display()))?;
    let routes = router(Served { front: Arc::clone(&front), credentials });
    let service = routes.into_make_service_with_connect_info::<rpc::server::Peer>();
    let port = tokio::spawn(listen(listener, front));
    let sweeper = tokio::spawn(sweep(Arc::clone(&region)));
    println!("ready");
    tracing::info!(endpoint = region.settings.endpoint, "serving");
    let outcome = tokio::select! {
        () = end => Ok(()),
        served = axum::serve(control, service).into_future() => served.context("control socket"),
        reason = region.broken() => Err(reason).context("the store takes no more"),
        reason = follower => match reason {
            Ok(error) => Err(error).context("the state cannot be followed"),
            Err(error) => Err(error).context("the state's task ended"),
        },
    };
    port.abort();
    sweeper.abort();
    outcome
}

fn make_folder(folder: &Path) -> anyhow::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
        .with_context(|| format!("folder {}: create", folder.display()))
}

fn settings(options: &Options, address: SocketAddr) -> anyhow::Result<Settings> {
    let lawful = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    let zone = options.zone.clone().unwrap_or_else(|| format!("{}a", options.region));
    for name in [&options.region, &zone] {
        if name.is_empty() || name.len() > 40 || !name.chars().all(lawful) {
            bail!("region or zone `{name}`: use up to 40 of a-z, 0-9 and -");
        }
    }
    let host = match &options.host {
        Some(host) => host.clone(),
        None => std::fs::read_to_string("/proc/sys/kernel/hostname")
            .context("host name: read /proc/sys/kernel/hostname; or use --host")?
            .trim()
            .to_owned(),
    };
    let uplink = options.uplink.clone().zip(options.uplink_gateway);
    let uplink = uplink.map(|(device, gateway)| options.packets.uplink(device, gateway));
    let rule_limits = RuleLimits {
        rules_a_group: options.rules_a_group,
        groups_an_interface: options.groups_an_interface,
    };
    if let Some(cause) = rule_limits.refused() {
        bail!("--rules-a-group, --groups-an-interface: {cause}");
    }
    let mut elastic_reserved = options.elastic_reserved.clone();
    if let Some(uplink) = &uplink {
        elastic_reserved.extend(addresses_of(&uplink.device));
    }
    Ok(Settings {
        region: options.region.clone(),
        zone,
        host,
        uplink,
        elastic_range: options.elastic_range,
        elastic_reserved,
        flow_log: options.packets.flow_log(),
        name_servers: name_servers(&options.dns),
        rule_limits,
        endpoint: format!("http://{address}"),
    })
}

/// As many as resolv.conf(5) reads.
const NAME_SERVERS_MAX: usize = 3;

fn name_servers(named: &[IpAddr]) -> Vec<IpAddr> {
    if !named.is_empty() {
        return named.to_vec();
    }
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    of_resolv_conf(&text)
}

/// A link-local server (`fe80::1%eth0`) is left out: its interface has no place here.
fn of_resolv_conf(text: &str) -> Vec<IpAddr> {
    let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let servers = words.filter_map(|words| match words[..] {
        ["nameserver", address, ..] => address.parse().ok(),
        _ => None,
    });
    servers.take(NAME_SERVERS_MAX).collect()
}

/// The uplink's own addresses, where it is there already.
fn addresses_of(device: &str) -> Vec<Ipv4Addr> {
    let Ok(all) = nix::ifaddrs::getifaddrs() else { return Vec::new() };
    all.filter(|a| a.interface_name == device)
        .filter_map(|a| a.address?.as_sockaddr_in().map(|s| s.ip()))
        .collect()
}

async fn bootstrap(region: &Region, credentials: &Credentials) -> anyhow::Result<()> {
    let public_key = derive_public_key(&credentials.id, &credentials.secret)
        .context("access key: no public key can be derived")?;
    region
        .write(|context, draft| {
            core::bootstrap(context, draft);
            let key = context.state.access_keys.get(&credentials.id);
            let created_ms = key.map_or(context.now_ms, |k| k.created_ms);
            let id = credentials.id.clone();
            draft
                .plan
                .put(context.state, &AccessKey { id, public_key: public_key.clone(), created_ms });
            Ok::<_, ApiError>(())
        })
        .await
        .context("store: write its first records")
}

async fn sweep(region: Arc<Region>) {
    loop {
        let swept = region
            .write(|context, draft| {
                core::sweep(context, draft);
                Ok(())
            })
            .await;
        if let Err(error) = swept {
            tracing::warn!(%error, "cannot sweep");
        }
        region.sweep_store().await;
        tokio::time::sleep(SWEEP_INTERVAL).await;
    }
}

#[cfg(test)]
mod tests {
    use super::of_resolv_conf;

    #[test]
    fn the_hosts_name_servers_are_read_and_no_more_than_three() {
        let text = "# nameserver 192.0.2.9\nsearch a b\nnameserver 127.0.0.53\n\
                    nameserver fe80::1%eth0\n nameserver\t2001:db8::1 # why\n\
                    nameserver 192.0.2.1\nnameserver 192.0.2.2\n";
        let servers = of_resolv_conf(text).iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(servers, ["127.0.0.53", "2001:db8::1", "192.0.2.1"]);
        assert!(of_resolv_conf("").is_empty());
    }
}
