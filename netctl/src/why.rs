//! `netctl why`: would a packet pass, and which rule says so? The dataplane asks
//! the very program that is loaded.

use std::net::IpAddr;

use clap::{Args, ValueEnum};
use model::{Direction, InterfaceId};
use rpc::dataplane::{AclDenied, FrameQuestion, Listed, Question, Routed, Translated};
use serde_json::json;

use crate::api::Session;
use crate::captured;
use crate::failure::{Failure, Outcome};
use crate::instance;
use crate::output::{self, Format};

/// What a client's end has where it is not said: the first of the ephemeral
/// ports (RFC 6335).
const EPHEMERAL_PORT: u16 = 49152;

#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:
  netctl why web --from 203.0.113.10 --port 22
  netctl why web --to 192.0.2.10 --protocol udp --port 53
  netctl why eni-0123456789abcdef0 --from 10.0.0.7 --protocol icmp --port 8
  netctl why web --from 2001:db8:9::1 --port 443
  netctl why web --packet capture.pcap --on-uplink

EXIT STATUS: 0 it is answered, whatever the answer; see `allowed` in -o json.")]
pub struct Why {
    /// An instance, or an interface's id
    #[arg(value_name = "INSTANCE")]
    pub target: String,
    /// A packet to the instance from this address
    #[arg(long, value_name = "ADDRESS", required_unless_present_any = ["to", "packet"], conflicts_with = "to")]
    pub from: Option<IpAddr>,
    /// A packet from the instance to this address
    #[arg(long, value_name = "ADDRESS")]
    pub to: Option<IpAddr>,
    /// Which of the interface's addresses; by default the first of the other end's family
    #[arg(long, value_name = "ADDRESS", conflicts_with = "packet")]
    pub address: Option<IpAddr>,
    /// The packet's protocol
    #[arg(long, short, value_enum, default_value_t = Protocol::Tcp)]
    pub protocol: Protocol,
    /// The port that it is for; for icmp its type
    #[arg(long, default_value_t = 0)]
    pub port: u16,
    /// A captured packet instead: a pcap file, or the frame in hexadecimal
    #[arg(long, value_name = "FILE|HEX", conflicts_with_all = ["from", "to"])]
    pub packet: Option<String>,
    /// Which packet of the file
    #[arg(long, default_value_t = 1, requires = "packet")]
    pub number: usize,
    /// The packet arrived on the uplink; else the instance sent it
    #[arg(long, requires = "packet")]
    pub on_uplink: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Protocol {
    Tcp,
    Udp,
    Icmp,
}

impl Protocol {
    const fn number(self, remote: IpAddr) -> u8 {
        match (self, remote) {
            (Self::Tcp, _) => model::Protocol::TCP,
            (Self::Udp, _) => model::Protocol::UDP,
            (Self::Icmp, IpAddr::V4(_)) => model::Protocol::ICMP,
            (Self::Icmp, IpAddr::V6(_)) => model::Protocol::ICMPV6,
        }
    }
}

pub fn run(session: &Session, why: &Why) -> Outcome {
    let deed = format!("why {}", why.target);
    let interface = interface(session, &why.target)?;
    if let Some(packet) = &why.packet {
        return explain(session, &deed, interface, packet, why);
    }
    let (direction, remote) = match (why.from, why.to) {
        (Some(from), _) => (Direction::Ingress, from),
        (None, Some(to)) => (Direction::Egress, to),
        (None, None) => return Err(Failure::unfit(format!("{deed}: give --from or --to"))),
    };
    let question = question(interface, direction, remote, why);
    let verdict = crate::wait_for(session.daemon("dataplane").dataplane_why(&question))
        .map_err(|e| session.unreachable(&deed, e))?;
    if session.format == Format::Json {
        return output::json(&json!({
            "interface": interface.to_string(),
            "direction": direction.to_string(),
            "allowed": verdict.allowed,
            "reason": verdict.reason,
            "rule": verdict.rule.map(|r| r.to_string()),
            "routed": verdict.routed,
            "denied": verdict.denied,
            "translated": verdict.translated,
            "listed": verdict.listed,
        }));
    }
    let word = if verdict.allowed { "allowed" } else { "dropped" };
    let rule = verdict.rule.map(|r| format!(" (rule {r})")).unwrap_or_default();
    output::line(&format!("{word}: {}{rule}", verdict.reason));
    tell_routed(verdict.routed);
    tell_translated(verdict.translated);
    tell_denied(verdict.denied);
    verdict.listed.iter().for_each(tell_listed);
    Ok(())
}

/// Runs the loaded program on the very frame.
fn explain(
    session: &Session,
    deed: &str,
    interface: InterfaceId,
    packet: &str,
    why: &Why,
) -> Outcome {
    let frame = captured::read(packet, why.number)
        .map_err(|e| Failure::unfit(format!("{deed}: --packet: {e}")))?;
    let question = FrameQuestion { interface: (!why.on_uplink).then_some(interface), frame };
    let told = crate::wait_for(session.daemon("dataplane").dataplane_explain(&question))
        .map_err(|e| session.unreachable(deed, e))?;
    if session.format == Format::Json {
        return output::json(&told);
    }
    let word = if told.allowed { "allowed" } else { "dropped" };
    output::line(&format!("{word}: {}", told.reason));
    output::line(&format!("  came in by: {}", told.device));
    for (way, rule) in [("egress", told.egress_rule), ("ingress", told.ingress_rule)] {
        if let Some(rule) = rule {
            output::line(&format!("  {way} rule: {rule}"));
        }
    }
    output::line(&format!("  route: {}", told.route));
    if let Some(receiver) = told.receiver {
        output::line(&format!("  receiver: {receiver}"));
    }
    tell_routed(told.routed);
    tell_translated(told.translated);
    tell_denied(told.denied);
    told.listed.iter().for_each(tell_listed);
    Ok(())
}

fn tell_denied(denied: Option<AclDenied>) {
    let Some(AclDenied { acl, entry }) = denied else { return };
    let by = entry.map_or_else(|| "no entry permits it".into(), |n| format!("entry {n}"));
    output::line(&format!("  network ACL: {acl}, {by}"));
}

fn tell_listed(listed: &Listed) {
    output::line(&format!("  prefix list: {listed}"));
}

fn tell_routed(routed: Option<Routed>) {
    let Some(Routed { table, destination }) = routed else { return };
    let by = destination.map_or_else(|| "has no route there".into(), |d| format!("by {d}"));
    output::line(&format!("  route table: {table} {by}"));
}

fn tell_translated(translated: Option<Translated>) {
    let Some(Translated { gateway, address, port }) = translated else { return };
    let port = port.map(|port| format!(" port {port}")).unwrap_or_default();
    output::line(&format!("  NAT gateway: {gateway}, as {address}{port}"));
}

pub fn interface(session: &Session, target: &str) -> Outcome<InterfaceId> {
    let text = if target.starts_with("eni-") {
        target.to_owned()
    } else {
        let instance = instance::find(session, target)?;
        instance.text_at("networkInterfaceSet/item/networkInterfaceId").to_owned()
    };
    text.parse().map_err(|e| Failure::unfit(format!("why {target}: {e}")))
}

fn question(interface: InterfaceId, direction: Direction, remote: IpAddr, why: &Why) -> Question {
    // Of ICMP the type stands where a port has its high byte, and the other end has none.
    let (from, to) = match why.protocol {
        Protocol::Icmp => (0, why.port << 8),
        Protocol::Tcp | Protocol::Udp => (EPHEMERAL_PORT, why.port),
    };
    let (remote_port, local_port) = match direction {
        Direction::Ingress => (from, to),
        Direction::Egress => (to, from),
    };
    Question {
        interface,
        direction,
        local: why.address,
        protocol: why.protocol.number(remote),
        remote,
        remote_port,
        local_port,
    }
}
