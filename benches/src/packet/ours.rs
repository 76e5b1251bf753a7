//! Our own contender: the dataplane's library, as its daemon uses it, in the
//! router's namespace.

use std::process::Command;

use anyhow::Context;
use dataplane::compile::{DeviceFact, DeviceKind, Devices, compile};
use dataplane::load::Loaded;
use ipnet::{IpNet, Ipv4Net};
use model::{GroupId, InterfaceId, Mac, Peer, PortRange, RuleId, SecurityGroup, VpcId};
use nix::net::if_::if_nametoindex;
use rpc::Deployment;
use rpc::dataplane::{Desired, Device, Dhcp, FastPath, Interface, Uplink};

use crate::packet::scene::{TAP_INDEX, UPLINK, UPLINK_INDEX, UPLINK_MAC, ip};
use crate::packet::world::{self, CLIENT, Instance, Network, ROUTER, World};
use crate::process;

/// Sixteen groups are the most that an interface may have, and a thousand rules.
const RULES_A_GROUP: usize = 100;

/// How packets go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// By tc, handed to the instance's device as to a tap.
    Tc,
    /// By tc, put into the instance's namespace at once.
    ToNamespace,
    /// By XDP first, then as `Tc`.
    Early,
    /// By XDP, delivered there.
    Fast,
}

#[derive(Debug)]
pub struct Ours {
    loaded: Loaded,
}

impl Ours {
    /// Loads the programs and makes the world theirs. Pins go to the bpffs of this
    /// process's own mount namespace.
    pub fn build(world: &World, way: Way) -> anyhow::Result<Self> {
        // The measured instance's device is there; the others' have nobody behind them.
        for instance in &world.instances[1..] {
            let tap = &instance.device;
            ip(&format!("tuntap add name {tap} mode tap\nlink set dev {tap} up\n"))?;
        }
        let mut loaded = Loaded::open(&deployment()?)?;
        let tables = compile(
            &desired(world, way)?,
            &devices(world, way == Way::ToNamespace)?,
            loaded.tables(),
        )?;
        loaded.update(tables)?;
        Ok(Self { loaded })
    }

    /// Number of the tc program on the uplink.
    pub fn uplink_program(&self) -> anyhow::Result<u32> {
        Ok(self.loaded.program_number("uplink_ingress")?)
    }

    /// As the daemon does each second.
    pub fn sweep(&mut self) -> anyhow::Result<()> {
        self.loaded.sweep()?;
        Ok(())
    }
}

/// One that keeps nothing on disk.
pub fn deployment() -> anyhow::Result<Deployment> {
    Ok(Deployment::new(&own_name(), "/nonexistent", "/nonexistent")?)
}

/// Devices of which all but the measured instance's are not there.
pub struct Imagined {
    pub devices: Devices,
    /// The name of the one with the greatest index: it is changed last.
    pub last: String,
}

pub fn imagined(world: &World) -> anyhow::Result<Imagined> {
    const FIRST: u32 = 100_000;
    let own = vec![ROUTER.into()];
    let mut devices = Devices { host_addresses: own, seed: 1, ..Devices::default() };
    let mut last = world.measured().device.clone();
    for (nth, instance) in (0..).zip(&world.instances) {
        let ifindex = if nth == 0 { TAP_INDEX } else { FIRST + nth };
        let fact =
            DeviceFact { ifindex, mac: Mac(ebpf::GATEWAY_MAC), kind: DeviceKind::Other, mtu: 1500 };
        devices.by_name.insert(instance.device.clone(), fact);
        last.clone_from(&instance.device);
    }
    let mac = Mac(UPLINK_MAC);
    let fact = DeviceFact { ifindex: UPLINK_INDEX, mac, kind: DeviceKind::Veth, mtu: 1500 };
    devices.by_name.insert(UPLINK.to_owned(), fact);
    Ok(Imagined { devices, last })
}

/// All have the first one's groups, whose last rule is for `port`.
pub fn desired_sharing(world: &World, port: u16) -> anyhow::Result<Desired> {
    let mut first = world.measured().clone();
    first.rules.last_mut().context("a rule")?.port = port;
    let groups = groups(0, &first)?;
    let mut desired = Desired {
        generation: 1,
        uplink: Some(uplink(Way::Tc)),
        groups: groups.clone(),
        ..Desired::default()
    };
    for (index, instance) in world.instances.iter().enumerate() {
        desired.interfaces.push(interface(index, instance, &groups)?);
    }
    Ok(desired)
}

fn uplink(way: Way) -> Uplink {
    Uplink {
        device: UPLINK.to_owned(),
        gateway: CLIENT,
        gateway6: None,
        early_drop: Some(matches!(way, Way::Early | Way::Fast)),
        bogons: false,
        source_packets: None,
        fast_path: if way == Way::Fast { FastPath::Declared } else { FastPath::Off },
    }
}

/// A name for each contender's pins: one a call.
fn own_name() -> String {
    use std::sync::atomic::{AtomicU32, Ordering};
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("b{}", COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Number of the XDP program on the uplink of the namespace that the thread is in.
pub fn early_program() -> anyhow::Result<u32> {
    let text = process::output(Command::new("ip").args(["-json", "link", "show", "dev", UPLINK]))?;
    let links: serde_json::Value = serde_json::from_str(&text).context("ip: its answer")?;
    let id = links[0]["xdp"]["prog"]["id"].as_u64().context("no XDP program on the uplink")?;
    u32::try_from(id).context("XDP program: its number")
}

fn devices(world: &World, to_namespace: bool) -> anyhow::Result<Devices> {
    let mut devices = Devices { host_addresses: vec![ROUTER.into()], ..Devices::default() };
    let names = world.instances.iter().map(|instance| instance.device.as_str());
    let measured = world.measured().device.as_str();
    for name in names.chain([UPLINK]) {
        let kind = match to_namespace && name == measured {
            true => DeviceKind::VethToNamespace,
            false => DeviceKind::Veth,
        };
        let ifindex = if_nametoindex(name).with_context(|| format!("device {name}: find"))?;
        let mac = Mac(if name == UPLINK { UPLINK_MAC } else { ebpf::GATEWAY_MAC });
        devices.by_name.insert(name.to_owned(), DeviceFact { ifindex, mac, kind, mtu: 1500 });
    }
    Ok(devices)
}

fn desired(world: &World, way: Way) -> anyhow::Result<Desired> {
    let mut desired = Desired {
        generation: 1,
        uplink: Some(uplink(way)),
        elastic_ranges: vec!["203.0.113.0/24".parse()?],
        ..Desired::default()
    };
    for (index, instance) in world.instances.iter().enumerate() {
        let groups = groups(index, instance)?;
        desired.interfaces.push(interface(index, instance, &groups)?);
        desired.groups.extend(groups);
    }
    Ok(desired)
}

fn interface(
    index: usize,
    instance: &Instance,
    groups: &[SecurityGroup],
) -> anyhow::Result<Interface> {
    Ok(Interface {
        elastic: Some(instance.elastic),
        groups: groups.iter().map(|group| group.id).collect(),
        takes_frames: Some(index == 0),
        dhcp: Dhcp { hostname: format!("i{index}"), ..Dhcp::default() },
        ..Interface::new(
            InterfaceId::from_random(index as u128 + 1),
            Device::Existing { name: instance.device.clone() },
            Mac(instance.mac),
            vpc(),
            (instance.address, "10.0.0.0/16".parse()?),
        )
    })
}

fn groups(index: usize, instance: &Instance) -> anyhow::Result<Vec<SecurityGroup>> {
    let mut groups = Vec::new();
    for (number, rules) in instance.rules.chunks(RULES_A_GROUP).enumerate() {
        let id = (index * 1000 + number) as u128;
        let mut ingress = Vec::new();
        for (place, rule) in rules.iter().enumerate() {
            ingress.push(self::rule(id * 1000 + place as u128, rule)?);
        }
        let outward = model::Rule {
            id: RuleId::from_random(1 << 40 | id),
            protocol: model::Protocol::Any,
            peer: Peer::Cidr("0.0.0.0/0".parse()?),
        };
        let id = GroupId::from_random(id + 1);
        groups.push(SecurityGroup { id, vpc: vpc(), ingress, egress: vec![outward] });
    }
    Ok(groups)
}

fn rule(id: u128, rule: &world::Rule) -> anyhow::Result<model::Rule> {
    let port = PortRange::single(rule.port);
    let Network { address, prefix } = rule.peer;
    Ok(model::Rule {
        id: RuleId::from_random(id),
        protocol: match rule.protocol {
            world::Protocol::Tcp => model::Protocol::Tcp(port),
            world::Protocol::Udp => model::Protocol::Udp(port),
        },
        peer: Peer::Cidr(IpNet::V4(Ipv4Net::new(address, prefix)?)),
    })
}

fn vpc() -> VpcId {
    VpcId::from_random(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn the_groups_permit_what_the_world_permits_and_nothing_else() {
        let world = World::with_rules(1500);
        let desired = desired(&world, Way::Early).unwrap();
        let groups = |interface: &Interface| {
            let own = interface.groups.clone();
            desired.groups.iter().filter(move |g| own.contains(&g.id))
        };
        let header = |port| model::security_group::Header {
            remote: "198.18.7.7".parse().unwrap(),
            protocol: 17,
            detail: port,
        };
        for (interface, instance) in desired.interfaces.iter().zip(&world.instances) {
            let permits = |port| {
                model::security_group::permits(
                    groups(interface),
                    &[],
                    model::Direction::Ingress,
                    &BTreeSet::new(),
                    &header(port),
                )
            };
            assert!(permits(world::PORT).is_some());
            assert!(permits(world::PORT + 1).is_none());
            let count: usize = groups(interface).map(|g| g.ingress.len()).sum();
            assert_eq!(count, instance.rules.len());
        }
    }
}
