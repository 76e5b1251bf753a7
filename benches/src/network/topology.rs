//! Three namespaces in a row, removed when dropped.

use std::fs::File;
use std::net::{Ipv4Addr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, ensure};
use nix::sched::{CloneFlags, setns};

use super::frames::{KNOWN_PORT, OPEN_PORT};
use crate::process::output;

pub const CLIENT: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);
pub const ROUTER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 2);
pub const ELASTIC: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 200);
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
pub const GUEST_MAC: &str = "02:00:00:00:01:05";
pub const UPLINK: &str = "uplink0";
pub const GUEST_DEVICE: &str = "guest1";

#[derive(Debug, Clone, Copy)]
pub enum Role {
    Client,
    Router,
    Guest,
}

#[derive(Debug)]
pub struct Topology {
    prefix: String,
}

impl Topology {
    pub fn build(tag: &str) -> anyhow::Result<Self> {
        let topology = Self { prefix: format!("hpb{}{tag}", std::process::id()) };
        let (client, router, guest) =
            (topology.name(Role::Client), topology.name(Role::Router), topology.name(Role::Guest));
        for name in [&client, &router, &guest] {
            ip(&format!("netns add {name}"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        ip(&format!("link add {UPLINK} netns {router} type veth peer name eth0 netns {client}"))?;
        ip(&format!(
            "link add {GUEST_DEVICE} netns {router} type veth peer name eth0 netns {guest}"
        ))?;
        ip(&format!("-n {guest} link set eth0 address {GUEST_MAC}"))?;
        ip(&format!("-n {client} addr add {CLIENT}/24 dev eth0"))?;
        ip(&format!("-n {router} addr add {ROUTER}/24 dev {UPLINK}"))?;
        ip(&format!("-n {guest} addr add {GUEST}/24 dev eth0"))?;
        for (namespace, device) in
            [(&client, "eth0"), (&router, UPLINK), (&router, GUEST_DEVICE), (&guest, "eth0")]
        {
            ip(&format!("-n {namespace} link set {device} up"))?;
        }
        ip(&format!("-n {guest} route add default via {GATEWAY}"))?;
        Ok(topology)
    }

    pub fn name(&self, role: Role) -> String {
        let role = match role {
            Role::Client => 'c',
            Role::Router => 'r',
            Role::Guest => 'g',
        };
        format!("{}{role}", self.prefix)
    }

    pub fn command(&self, role: Role, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.name(role))).arg(program);
        command
    }

    /// A plain router: it knows both neighbours and forwards between them.
    pub fn make_router_forward(&self) -> anyhow::Result<()> {
        let router = self.name(Role::Router);
        ip(&format!("-n {router} addr add {GATEWAY}/24 dev {GUEST_DEVICE}"))?;
        output(self.command(Role::Router, "sysctl").args(["-qw", "net.ipv4.ip_forward=1"]))?;
        ip(&format!("-n {} route add {GUEST}/32 via {ROUTER}", self.name(Role::Client)))?;
        Ok(())
    }

    pub fn nft(&self, role: Role, rules: &str) -> anyhow::Result<()> {
        let path = tempfile::NamedTempFile::new().context("rule file: make")?;
        std::fs::write(path.path(), rules).context("rule file: write")?;
        output(self.command(role, "nft").arg("-f").arg(path.path()))?;
        Ok(())
    }

    /// One question and its answer between client and guest, so that both ends
    /// have spoken in the flow; from then on the guest counts and drops.
    pub fn open_known_flow(&self, destination: Ipv4Addr) -> anyhow::Result<()> {
        let guest = self.inside(Role::Guest, || {
            let socket = UdpSocket::bind((GUEST, OPEN_PORT))?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            Ok(socket)
        })?;
        let answering = std::thread::spawn(move || -> std::io::Result<()> {
            let mut said = [0; 64];
            for _ in 0..3 {
                let (length, from) = guest.recv_from(&mut said)?;
                guest.send_to(&said[..length], from)?;
            }
            Ok(())
        });
        let heard = self.inside(Role::Client, move || {
            let socket = UdpSocket::bind((CLIENT, KNOWN_PORT))?;
            socket.set_read_timeout(Some(Duration::from_secs(5)))?;
            let mut heard = [0; 64];
            for _ in 0..3 {
                socket.send_to(b"known", (destination, OPEN_PORT))?;
                socket.recv(&mut heard)?;
            }
            Ok(())
        });
        heard.context("the known flow: no answer from the guest")?;
        answering.join().map_err(|_| anyhow::anyhow!("the guest's thread panicked"))??;
        self.nft(
            Role::Guest,
            &format!(
                "table netdev arrived {{\n counter frames {{ }}\n chain inbound {{\n  \
                 type filter hook ingress device eth0 priority 0;\n  \
                 udp dport {OPEN_PORT} counter name frames drop\n }}\n}}\n"
            ),
        )
    }

    /// Frames that the guest has counted.
    pub fn arrived(&self) -> anyhow::Result<u64> {
        let said = output(
            self.command(Role::Guest, "nft")
                .args(["-j", "list", "counter", "netdev", "arrived", "frames"]),
        )?;
        let said: serde_json::Value = serde_json::from_str(&said).context("nft's counter: read")?;
        said["nftables"]
            .as_array()
            .and_then(|list| list.iter().find_map(|o| o["counter"]["packets"].as_u64()))
            .context("nft's counter: not in what it said")
    }

    /// Hardware address and index of a device.
    pub fn device(&self, role: Role, device: &str) -> anyhow::Result<([u8; 6], u32)> {
        let said = output(Command::new("ip").args([
            "-n",
            &self.name(role),
            "-j",
            "link",
            "show",
            device,
        ]))?;
        let said: serde_json::Value = serde_json::from_str(&said).context("ip link: read")?;
        let index = said[0]["ifindex"].as_u64().context("ip link: no index")?;
        let address = said[0]["address"].as_str().context("ip link: no address")?;
        let octets: Vec<u8> =
            address.split(':').filter_map(|o| u8::from_str_radix(o, 16).ok()).collect();
        ensure!(octets.len() == 6, "ip link: `{address}` is no hardware address");
        let mut mac = [0; 6];
        mac.copy_from_slice(&octets);
        Ok((mac, u32::try_from(index)?))
    }

    /// Does something in a thread that has entered a namespace.
    pub fn inside<T: Send>(
        &self,
        role: Role,
        deed: impl FnOnce() -> anyhow::Result<T> + Send,
    ) -> anyhow::Result<T> {
        let path = format!("/run/netns/{}", self.name(role));
        let namespace = File::open(&path).with_context(|| format!("{path}: open"))?;
        std::thread::scope(|scope| {
            scope
                .spawn(move || {
                    setns(&namespace, CloneFlags::CLONE_NEWNET).context("enter namespace")?;
                    deed()
                })
                .join()
                .map_err(|_| anyhow::anyhow!("a thread panicked"))?
        })
    }
}

impl Drop for Topology {
    fn drop(&mut self) {
        for role in [Role::Client, Role::Router, Role::Guest] {
            // One that was never made is not there to be removed.
            _ = Command::new("ip").args(["netns", "del", &self.name(role)]).output();
        }
    }
}

pub fn ip(arguments: &str) -> anyhow::Result<()> {
    output(Command::new("ip").args(arguments.split_whitespace())).map(drop)
}
