//! A host with an uplink and two instances behind it:
//!
//! ```text
//!   world            host                     flooded, neighbour
//!   eth0 ──veth── uplink0   tap0, tap1 ──veth── eth0
//! ```

use std::fs;
use std::net::Ipv4Addr;
use std::thread::JoinHandle;

use anyhow::Context;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use crate::packet::namespace::Namespace;
use crate::packet::scene::{CLIENT_MAC, UPLINK, UPLINK_INDEX, UPLINK_MAC, ip, nft, silence_ipv6};
use crate::packet::world::{CLIENT, ROUTER, mac_text};

/// Connections that speak, sleep and carry go here.
pub const SPOKEN_PORT: u16 = 5000;
/// Where the flood goes: a rule permits it, so each opening is a new flow.
pub const FLOODED_PORT: u16 = 80;
/// The router of the instances' subnet.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);

/// The flood has a core of its own, as a card's queue has; all others share the next.
pub const FLOOD_CPU: usize = 0;
pub const WORK_CPU: usize = 1;

#[derive(Debug)]
pub struct Instance {
    pub place: usize,
    pub address: Ipv4Addr,
    pub elastic: Ipv4Addr,
    pub mac: [u8; 6],
    pub device: &'static str,
}

pub const FLOODED: Instance = Instance {
    place: 0,
    address: Ipv4Addr::new(10, 0, 0, 10),
    elastic: Ipv4Addr::new(203, 0, 113, 10),
    mac: [0x02, 0x62, 0x65, 0x03, 0, 10],
    device: "tap0",
};

pub const NEIGHBOUR: Instance = Instance {
    place: 1,
    address: Ipv4Addr::new(10, 0, 0, 11),
    elastic: Ipv4Addr::new(203, 0, 113, 11),
    mac: [0x02, 0x62, 0x65, 0x03, 0, 11],
    device: "tap1",
};

#[derive(Debug)]
pub struct Scene {
    pub world: Namespace,
    pub host: Namespace,
    instances: [Namespace; 2],
}

/// In the flooded instance: nobody there spends anything on the flood.
const DEAF: &str = "
table netdev deaf {
    chain ingress {
        type filter hook ingress device eth0 priority 0; policy accept;
        tcp dport 80 drop
    }
}
";

impl Scene {
    pub fn build() -> anyhow::Result<Self> {
        let scene = Self {
            world: Namespace::create()?,
            host: Namespace::create()?,
            instances: [Namespace::create()?, Namespace::create()?],
        };
        join(&scene.world, &scene.host)?;
        scene.host.within(|| ip(&scene.devices()))?;
        for instance in [&FLOODED, &NEIGHBOUR] {
            let (mac, address) = (mac_text(instance.mac), instance.address);
            let gateway = mac_text(ebpf::GATEWAY_MAC);
            scene.of(instance).within(|| {
                ip(&format!(
                    "link set dev lo up\n\
                     link set dev eth0 address {mac} up\n\
                     address add {address}/24 dev eth0\n\
                     neighbour add {GATEWAY} lladdr {gateway} dev eth0 nud permanent\n\
                     route add default via {GATEWAY}\n"
                ))
            })?;
        }
        scene.of(&FLOODED).within(|| nft(DEAF))?;
        Ok(scene)
    }

    fn devices(&self) -> String {
        let mut text = String::new();
        for instance in [&FLOODED, &NEIGHBOUR] {
            let Instance { device, address, mac, .. } = instance;
            let (tap_mac, mac) = (mac_text(ebpf::GATEWAY_MAC), mac_text(*mac));
            text.push_str(&format!(
                "link add name {device} address {tap_mac} type veth peer name eth0 netns {}\n\
                 link set dev {device} up\n\
                 neighbour add {address} lladdr {mac} dev {device} nud permanent\n\
                 route add {address}/32 dev {device}\n",
                self.of(instance).path()
            ));
        }
        text
    }

    pub fn of(&self, instance: &Instance) -> &Namespace {
        &self.instances[instance.place]
    }
}

/// A cable from the world to the host's uplink, and the ways at both ends.
pub fn join(world: &Namespace, host: &Namespace) -> anyhow::Result<()> {
    let (mac, up_mac) = (mac_text(CLIENT_MAC), mac_text(UPLINK_MAC));
    let far = world.path();
    host.within(|| {
        silence_ipv6()?;
        fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("ip_forward: write")?;
        for which in ["all", "default"] {
            let path = format!("/proc/sys/net/ipv4/conf/{which}/rp_filter");
            fs::write(&path, "0").with_context(|| format!("{path}: write"))?;
        }
        ip(&format!(
            "link add name {UPLINK} index {UPLINK_INDEX} address {up_mac} type veth peer name eth0 netns {far}\n\
             link set dev {UPLINK} up\n\
             address add {ROUTER}/24 dev {UPLINK}\n\
             neighbour add {CLIENT} lladdr {mac} dev {UPLINK} nud permanent\n\
             route add default via {CLIENT} dev {UPLINK}\n"
        ))
    })?;
    world.within(|| {
        ip(&format!(
            "link set dev lo up\n\
             link set dev eth0 address {mac} up\n\
             address add {CLIENT}/24 dev eth0\n\
             neighbour add {ROUTER} lladdr {up_mac} dev eth0 nud permanent\n\
             route add 203.0.113.0/24 via {ROUTER}\n\
             route add 10.0.0.0/24 via {ROUTER}\n"
        ))
    })
}

/// A thread in that namespace, on the core that all but the flood share.
pub fn inside<T: Send + 'static>(
    namespace: &Namespace,
    deed: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<JoinHandle<anyhow::Result<T>>> {
    inside_on(namespace, WORK_CPU, deed)
}

pub fn inside_on<T: Send + 'static>(
    namespace: &Namespace,
    cpu: usize,
    deed: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<JoinHandle<anyhow::Result<T>>> {
    // A thread begins where its parent is.
    namespace.within(|| {
        Ok(std::thread::spawn(move || {
            let mut cpus = CpuSet::new();
            cpus.set(cpu)?;
            sched_setaffinity(Pid::from_raw(0), &cpus).context("thread: bind to a core")?;
            deed()
        }))
    })
}

/// What the thread found, or why it ended.
pub fn joined<T>(thread: JoinHandle<anyhow::Result<T>>) -> anyhow::Result<T> {
    thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?
}
