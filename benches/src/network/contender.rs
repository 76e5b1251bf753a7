//! What each contender sets up in the router, and one measurement of it.

use std::fmt;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use model::{GroupId, InterfaceId, Peer, PortRange, Protocol, Rule, RuleId, SecurityGroup, VpcId};
use rpc::Deployment;
use rpc::dataplane::{Desired, Device, Dhcp, Interface, Uplink};

use super::frames::{Ends, Generator, NEW_FLOWS_MAX, OPEN_PORT, Traffic, frame, load_pass};
use super::kernel::{attach_xdp, open_pinned, run_live};
use super::topology::{
    CLIENT, ELASTIC, GUEST, GUEST_DEVICE, GUEST_MAC, ROUTER, Role, Topology, UPLINK,
};
use crate::machine;
use crate::process::{Background, output};

/// Frames before each measurement whose time is not counted.
const WARM_UP_FRAMES: u32 = 2_000;

/// How long the daemon may take to come up.
const START_PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    Ours,
    /// Sets and maps, established flows accepted first.
    Nftables,
    /// No rule, no address translation: what the stack costs by itself.
    Plain,
}

impl Contender {
    pub const ALL: [Self; 3] = [Self::Ours, Self::Nftables, Self::Plain];
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ours => "hostplane",
            Self::Nftables => "nftables",
            Self::Plain => "plain forwarding",
        })
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Measured {
    pub ns_a_packet: f64,
    pub lost: u64,
}

/// A router that is set up, with a flow that both sides know.
pub struct Ready {
    generators: [(Traffic, Generator); 2],
    ends: Ends,
    uplink: u32,
    /// Sources of new flows, a fresh one a measurement.
    next_source: u8,
    _attached: Option<OwnedFd>,
    _daemon: Option<Daemon>,
    /// Last, so that it goes after what stands in it.
    topology: Topology,
}

impl Ready {
    pub fn set_up(contender: Contender, rules: usize) -> anyhow::Result<Self> {
        let topology = Topology::build(match contender {
            Contender::Ours => "o",
            Contender::Nftables => "n",
            Contender::Plain => "p",
        })?;
        let (uplink_mac, uplink) = topology.device(Role::Router, UPLINK)?;
        let (client_mac, _) = topology.device(Role::Client, "eth0")?;
        let mut daemon = None;
        let destination = match contender {
            Contender::Ours => {
                daemon = Some(Daemon::start(&topology, rules)?);
                ELASTIC
            }
            Contender::Nftables => {
                topology.make_router_forward()?;
                topology.nft(Role::Router, &ruleset(rules))?;
                super::topology::ip(&format!(
                    "-n {} neigh add {ELASTIC} lladdr {} dev eth0",
                    topology.name(Role::Client),
                    hardware(uplink_mac)
                ))?;
                ELASTIC
            }
            Contender::Plain => {
                topology.make_router_forward()?;
                GUEST
            }
        };
        let generators = [
            (Traffic::Established, Generator::load(Traffic::Established)?),
            (Traffic::New, Generator::load(Traffic::New)?),
        ];
        let mut attached = None;
        match &daemon {
            Some(daemon) => {
                let program = daemon.uplink_xdp()?;
                for (_, generator) in &generators {
                    generator.call_next(&program).context("our XDP program: call it next")?;
                }
            }
            None => {
                let pass = load_pass()?;
                let link = topology
                    .inside(Role::Router, || Ok(attach_xdp(&pass, uplink)?))
                    .context("uplink: attach an XDP program that lets all pass")?;
                attached = Some(link);
            }
        }
        topology.open_known_flow(destination)?;
        let ends = Ends {
            source_mac: client_mac,
            destination_mac: uplink_mac,
            source: CLIENT,
            destination,
        };
        Ok(Self {
            generators,
            ends,
            uplink,
            next_source: 10,
            _attached: attached,
            _daemon: daemon,
            topology,
        })
    }

    pub fn measure(&mut self, traffic: Traffic, frames: u32) -> anyhow::Result<Measured> {
        ensure!(frames + WARM_UP_FRAMES <= NEW_FLOWS_MAX, "too many frames for one measurement");
        let mut ends = self.ends;
        if traffic == Traffic::New {
            // A new address each time, so that no flow of the last round is met.
            self.next_source = if self.next_source >= 120 { 10 } else { self.next_source + 1 };
            ends.source = Ipv4Addr::new(198, 51, 100, self.next_source);
        }
        let frame = frame(&ends);
        let generator = self
            .generators
            .iter()
            .find_map(|(t, g)| (*t == traffic).then_some(g))
            .context("a generator for each kind of traffic")?;
        generator.prepare(&frame).context("generator: prepare")?;
        let uplink = self.uplink;
        let run = |count| {
            self.topology.inside(Role::Router, || {
                run_live(&generator.program, &frame, uplink, count).context("live frames: run")
            })
        };
        run(WARM_UP_FRAMES)?;
        let before = self.settled()?;
        let ns = run(frames)?;
        let arrived = self.settled()? - before;
        Ok(Measured { ns_a_packet: ns.into(), lost: u64::from(frames).saturating_sub(arrived) })
    }

    /// What has arrived, once nothing more does.
    fn settled(&self) -> anyhow::Result<u64> {
        let mut last = self.topology.arrived()?;
        loop {
            std::thread::sleep(Duration::from_millis(20));
            let now = self.topology.arrived()?;
            if now == last {
                return Ok(now);
            }
            last = now;
        }
    }
}

fn hardware(mac: [u8; 6]) -> String {
    model::Mac(mac).to_string()
}

/// The rules that do not match: networks and ports that no frame has. The last matches.
fn rule(nth: usize, of: usize) -> (String, u16, u16) {
    if nth + 1 == of {
        return ("198.51.100.0/24".to_owned(), OPEN_PORT, OPEN_PORT);
    }
    let port = 10_000 + u16::try_from(nth % 20_000).unwrap_or(0) * 2;
    (format!("100.{}.{}.0/24", 64 + nth / 256 % 64, nth % 256), port, port + 1)
}

/// The best that nftables does for this: conntrack first, addresses in maps, the
/// group's rules in one set of concatenated intervals.
fn ruleset(rules: usize) -> String {
    let elements: Vec<String> = (0..rules)
        .map(|n| {
            let (network, first, last) = rule(n, rules);
            format!("{network} . {first}-{last}")
        })
        .collect();
    format!(
        "table ip host {{
 map to_private {{ type ipv4_addr : ipv4_addr; elements = {{ {ELASTIC} : {GUEST} }} }}
 map to_elastic {{ type ipv4_addr : ipv4_addr; elements = {{ {GUEST} : {ELASTIC} }} }}
 set spoof {{ type ifname . ether_addr . ipv4_addr; elements = {{ \"{GUEST_DEVICE}\" . {GUEST_MAC} . {GUEST} }} }}
 set group {{ type ipv4_addr . inet_service; flags interval; elements = {{ {} }} }}
 map guests {{ type ipv4_addr : verdict; elements = {{ {GUEST} : jump group }} }}
 chain raw {{ type filter hook prerouting priority raw; iifname \"{GUEST_DEVICE}\" iifname . ether saddr . ip saddr != @spoof drop; }}
 chain pre {{ type nat hook prerouting priority dstnat; dnat to ip daddr map @to_private; }}
 chain post {{ type nat hook postrouting priority srcnat; oifname \"{UPLINK}\" snat to ip saddr map @to_elastic; }}
 chain group {{ ip saddr . udp dport @group accept; }}
 chain forward {{ type filter hook forward priority filter; policy drop;
  ct state established,related accept; ct state invalid drop;
  iifname \"{GUEST_DEVICE}\" accept;
  ip daddr vmap @guests; }}
}}
",
        elements.join(", ")
    )
}

/// Our dataplane in the router's namespace, torn down when dropped.
struct Daemon {
    program: PathBuf,
    deployment: Deployment,
    router: String,
    folder: tempfile::TempDir,
    running: Option<Background>,
}

impl Daemon {
    fn start(topology: &Topology, rules: usize) -> anyhow::Result<Self> {
        let program = machine::own_program("dataplane")
            .context("the daemon `dataplane` is not built: cargo build --release -p dataplane")?;
        let folder = tempfile::tempdir().context("state folder: make")?;
        let name = format!("b{:x}", std::process::id() & 0xfff_ffff);
        let (state, run) = (folder.path().join("state"), folder.path().join("run"));
        let deployment = Deployment::new(&name, state, run)?;
        let router = topology.name(Role::Router);
        let mut daemon = Self { program, deployment, router, folder, running: None };
        daemon.running = Some(Background::start(daemon.command("daemon"))?);
        daemon.await_socket()?;
        daemon.apply(rules)?;
        Ok(daemon)
    }

    fn command(&self, deed: &str) -> Command {
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.router))
            .arg(&self.program)
            .args([deed, "--name", self.deployment.name(), "--state-dir"])
            .arg(self.deployment.state_dir())
            .arg("--run-dir")
            .arg(self.deployment.run_dir());
        command
    }

    #[expect(clippy::disallowed_methods, reason = "a benchmark waits in real time")]
    fn await_socket(&mut self) -> anyhow::Result<()> {
        let begun = Instant::now();
        while !self.deployment.socket_of("dataplane").exists() {
            if let Some(said) = self.running.as_mut().and_then(|r| r.epitaph().transpose()) {
                anyhow::bail!(said?);
            }
            ensure!(begun.elapsed() < START_PATIENCE, "the daemon did not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    fn apply(&self, rules: usize) -> anyhow::Result<()> {
        let desired = desired(rules)?;
        let client = rpc::Client::new(self.deployment.socket_of("dataplane"));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(client.dataplane_apply(&desired))?;
        Ok(())
    }

    /// The program that our uplink runs first.
    fn uplink_xdp(&self) -> anyhow::Result<OwnedFd> {
        let path = self.deployment.bpf_dir().join(UPLINK_XDP_PIN);
        open_pinned(&path).with_context(|| format!("{}: open", path.display()))
    }
}

/// Where `dataplane::load` pins the uplink's XDP program, below the deployment's folder.
const UPLINK_XDP_PIN: &str = "programs/uplink_xdp";

impl Drop for Daemon {
    fn drop(&mut self) {
        self.running = None;
        if let Err(error) = output(&mut self.command("teardown")) {
            eprintln!("{}: {error:#}", self.folder.path().display());
        }
    }
}

fn desired(rules: usize) -> anyhow::Result<Desired> {
    let (group, vpc) = (GroupId::from_random(1), VpcId::from_random(1));
    let ingress = (0..rules)
        .map(|n| {
            let (network, first, last) = rule(n, rules);
            Ok(Rule {
                id: RuleId::from_random(n as u128),
                protocol: Protocol::Udp(PortRange::new(first, last)?),
                peer: Peer::Cidr(network.parse()?),
            })
        })
        .collect::<anyhow::Result<_>>()?;
    let everything = Rule {
        id: RuleId::from_random(u128::from(u32::MAX)),
        protocol: Protocol::Any,
        peer: Peer::Cidr("0.0.0.0/0".parse()?),
    };
    let interface = Interface {
        id: InterfaceId::from_random(1),
        device: Device::Existing { name: GUEST_DEVICE.to_owned() },
        mac: GUEST_MAC.parse()?,
        vpc,
        address: GUEST,
        subnet: "10.0.0.0/24".parse()?,
        elastic: Some(ELASTIC),
        groups: vec![group],
        source_check: true,
        dhcp: Dhcp { hostname: String::new(), domain: String::new(), dns: vec![], mtu: 1500 },
        metadata: None,
    };
    // `ROUTER` answers for the host itself; the world is behind the client.
    debug_assert_ne!(ROUTER, CLIENT);
    Ok(Desired {
        generation: 1,
        uplink: Some(Uplink { device: UPLINK.to_owned(), gateway: CLIENT }),
        interfaces: vec![interface],
        groups: vec![SecurityGroup { id: group, vpc, ingress, egress: vec![everything] }],
        elastic_ranges: vec!["198.51.100.128/25".parse()?],
        ..Desired::default()
    })
}
