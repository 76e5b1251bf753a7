//! Who forwards the packets, and one measurement of it.

use std::fmt;
use std::net::Ipv4Addr;

use anyhow::Context;

use crate::packet::Flows;
use crate::packet::bpf::Sender;
use crate::packet::frame::{Client, Ends, Template};
use crate::packet::iptables;
use crate::packet::nftables::{self, Shape};
use crate::packet::ours::{self, Ours, Way};
use crate::packet::scene::{CLIENT_MAC, End, Scene, TAP_INDEX, UPLINK_INDEX, UPLINK_MAC, nft};
use crate::packet::world::{Instance, PORT, SOURCES, World};

/// In an elastic range, and nobody's.
const UNKNOWN: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 250);

/// In the order of the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Contender {
    /// Routing and nothing else: no address is translated, nothing is judged.
    Plain,
    Nft(Shape, usize),
    /// iptables-legacy, a line a rule.
    Iptables(usize),
    /// Ours with the early program by XDP before it, as on a device of its own driver.
    Ours(usize),
    /// Ours as it is on a veth: by tcx alone.
    OursOnTcx(usize),
    /// The same, and packets put into the instance's namespace at once, as they are
    /// where an instance is a namespace and not a guest.
    OursToNamespace(usize),
    /// Delivered by XDP on the uplink, to a far end that takes frames (GRO is on there).
    OursFast(usize),
}

/// New flows of one measurement, at most: the kernel's table of connections
/// holds 262 144 by default, and must not be what is measured.
const NEW_FLOWS_MAX: u32 = 65_536;

/// Sent before each measurement, to learn how long one takes.
const PROBE_FRAMES: u32 = 256;

/// A measurement is cut to about this long: one line a rule takes 300 µs a
/// packet at ten thousand rules.
const MEASURE_NS_MAX: u64 = 150_000_000;

/// A figure from fewer frames than this is none.
const FRAMES_MIN: u32 = 512;

/// How many distinct flows `Flows::New` draws on before one comes again.
const NEW_FLOWS_CYCLE: u32 = 1 << 30;

/// A contender at work in its namespaces.
#[derive(Debug)]
pub struct Stage {
    contender: Contender,
    scene: Scene,
    forward: Template,
    answer: Template,
    /// Number of the program that frames go through first.
    early: Option<u32>,
    new_flows: Sender,
    ours: Option<Ours>,
}

impl Contender {
    pub fn rules(self) -> usize {
        match self {
            Self::Plain => 1,
            Self::Nft(_, rules)
            | Self::Iptables(rules)
            | Self::Ours(rules)
            | Self::OursOnTcx(rules)
            | Self::OursToNamespace(rules)
            | Self::OursFast(rules) => rules,
        }
    }
}

impl Contender {
    /// What it is, whatever its number of rules.
    pub fn kind(self) -> String {
        let name = self.to_string();
        let rules = format!(", {} rules", self.rules());
        name.strip_suffix(&rules).unwrap_or(&name).to_owned()
    }
}

impl Stage {
    pub fn build(contender: Contender) -> anyhow::Result<Self> {
        let world = World::with_rules(contender.rules());
        let scene = Scene::build(world.measured())?;
        let (mut ours, mut early) = (None, None);
        match contender {
            Contender::Plain => {}
            Contender::Nft(shape, _) => {
                scene.router.within(|| nft(&nftables::ruleset(&world, shape)))?;
            }
            Contender::Iptables(_) => scene.router.within(|| iptables::apply(&world))?,
            Contender::Ours(_)
            | Contender::OursOnTcx(_)
            | Contender::OursToNamespace(_)
            | Contender::OursFast(_) => {
                let way = match contender {
                    Contender::OursToNamespace(_) => Way::ToNamespace,
                    Contender::Ours(_) => Way::Early,
                    Contender::OursFast(_) => Way::Fast,
                    _ => Way::Tc,
                };
                ours = Some(scene.router.within(|| Ours::build(&world, way))?);
                if let Contender::OursFast(_) = contender {
                    scene.take_frames()?;
                }
                if let Contender::Ours(_) | Contender::OursFast(_) = contender {
                    early = Some(scene.router.within(ours::early_program)?);
                }
            }
        }
        let (forward, answer) = templates(contender, world.measured());
        let new_flows = Sender::new(&forward, NEW_FLOWS_CYCLE, early)?;
        Ok(Self { contender, scene, forward, answer, early, new_flows, ours })
    }

    pub fn contender(&self) -> Contender {
        self.contender
    }

    /// Makes one flow known.
    pub fn establish_one(&self) -> anyhow::Result<()> {
        self.establish(&Sender::new(&self.forward, 1, self.early)?, 1)
    }

    /// Numbers of our programs on the uplink: by tc, and by XDP.
    pub fn programs(&self) -> anyhow::Result<(u32, u32)> {
        let ours = self.ours.as_ref().context("not ours")?;
        Ok((ours.uplink_program()?, self.early.context("no early program")?))
    }

    pub fn template(&self) -> &Template {
        &self.forward
    }

    /// Frames for an elastic address that nobody holds.
    pub fn unknown(&self) -> Template {
        Template::new(ends(UNKNOWN), Client::Sends)
    }

    /// In the router's namespace.
    pub fn within<T>(&self, work: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        self.scene.router.within(work)
    }

    /// Nanoseconds a packet.
    pub fn measure(&mut self, flows: Flows, frames: u32) -> anyhow::Result<f64> {
        self.tidy_flows()?;
        let measured = self.measure_flows(flows, frames);
        // All namespaces share one hash table of connections: what this contender
        // leaves in it would make the next one slower.
        self.tidy_flows()?;
        measured
    }

    fn tidy_flows(&mut self) -> anyhow::Result<()> {
        match &mut self.ours {
            Some(ours) => ours.sweep(),
            None => self.scene.router.within(nftables::forget_connections),
        }
    }

    fn measure_flows(&self, flows: Flows, frames: u32) -> anyhow::Result<f64> {
        match flows {
            Flows::New => {
                let probe = self.send(&self.new_flows, PROBE_FRAMES)?;
                self.send(&self.new_flows, enough(frames.min(NEW_FLOWS_MAX), probe))
            }
            Flows::Established(count) => {
                let sender = Sender::new(&self.forward, count, self.early)?;
                self.establish(&sender, count)?;
                let probe = self.send(&sender, PROBE_FRAMES)?;
                self.send(&sender, enough(frames, probe))
            }
        }
    }

    /// One packet of each flow, an answer to it and one more, all seen to arrive:
    /// now everyone calls the flow established.
    fn establish(&self, sender: &Sender, flows: u32) -> anyhow::Result<()> {
        self.send(sender, flows)?;
        let answers = Sender::new(&self.answer, flows, None)?;
        self.deliver(&answers, TAP_INDEX, End::Client, flows)?;
        self.send(sender, flows)?;
        Ok(())
    }

    fn send(&self, sender: &Sender, frames: u32) -> anyhow::Result<f64> {
        self.deliver(sender, UPLINK_INDEX, End::Instance, frames)
    }

    fn deliver(&self, sender: &Sender, by: u32, end: End, frames: u32) -> anyhow::Result<f64> {
        let before = self.scene.delivered(end)?;
        let ns = self.scene.router.within(|| sender.send(by, frames))?;
        let arrived = self.scene.await_delivered(end, before, u64::from(frames))?;
        anyhow::ensure!(arrived == u64::from(frames), "{arrived} of {frames} frames delivered");
        Ok(f64::from(ns))
    }
}

/// As many frames as asked for, or as fit into the time.
fn enough(frames: u32, probe_ns: f64) -> u32 {
    let fit = (MEASURE_NS_MAX as f64 / probe_ns.max(1.0)) as u32;
    frames.min(fit.max(FRAMES_MIN))
}

fn templates(contender: Contender, instance: &Instance) -> (Template, Template) {
    // Nothing translates on the plain way, so its packets go straight there.
    let server = match contender {
        Contender::Plain => instance.address,
        _ => instance.elastic,
    };
    let forward = ends(server);
    let answer = Ends {
        source_mac: instance.mac,
        destination_mac: ebpf::GATEWAY_MAC,
        server: instance.address,
        ..forward
    };
    (Template::new(forward, Client::Sends), Template::new(answer, Client::Receives))
}

/// Of frames from the clients.
pub fn ends(server: Ipv4Addr) -> Ends {
    Ends {
        source_mac: CLIENT_MAC,
        destination_mac: UPLINK_MAC,
        clients: SOURCES.address,
        server,
        server_port: PORT,
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plain => f.write_str("plain forwarding, no rules"),
            Self::Nft(Shape::Set, rules) => write!(f, "nftables, one set, {rules} rules"),
            Self::Nft(Shape::Sets, rules) => write!(f, "nftables, map and sets, {rules} rules"),
            Self::Nft(Shape::Lines, rules) => write!(f, "nftables, a line a rule, {rules} rules"),
            Self::Iptables(rules) => write!(f, "iptables, a line a rule, {rules} rules"),
            Self::Ours(rules) => write!(f, "hostplane, XDP early drop too, {rules} rules"),
            Self::OursToNamespace(rules) => write!(f, "hostplane, to a namespace, {rules} rules"),
            Self::OursOnTcx(rules) => write!(f, "hostplane, {rules} rules"),
            Self::OursFast(rules) => write!(f, "hostplane, XDP fast path, {rules} rules"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_contender_gets_fewer_frames_and_never_too_few() {
        assert_eq!(enough(100_000, 500.0), 100_000);
        assert_eq!(enough(100_000, 30_000.0), 5_000);
        assert_eq!(enough(100_000, 3_000_000.0), FRAMES_MIN);
    }
}
