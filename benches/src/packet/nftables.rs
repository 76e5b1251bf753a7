//! The world as an nftables ruleset, written as an expert would for speed: the
//! state of the connection first, maps for the elastic addresses, one hashed set
//! against spoofing, and one set for all rules. And, for orientation, the same
//! with one rule a line, as most rulesets are.

use std::fmt::Write;
use std::io;

use anyhow::Context;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendto, socket,
};
use std::os::fd::AsRawFd;

use crate::packet::scene::UPLINK;
use crate::packet::world::{Instance, World, mac_text};

/// How the rules are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Shape {
    /// One set of (instance, source network, protocol, port).
    Set,
    /// A map from the instance to its chain, which has a set of its own.
    Sets,
    /// One line a rule, those of the measured instance last.
    Lines,
}

pub fn ruleset(world: &World, shape: Shape) -> String {
    let all = &world.instances;
    let elements =
        |each: &dyn Fn(&Instance) -> String| all.iter().map(each).collect::<Vec<_>>().join(",\n");
    let inward = elements(&|i| format!("{} : {}", i.elastic, i.address));
    let outward = elements(&|i| format!("{} : {}", i.address, i.elastic));
    let spoof = elements(&|i| format!("{} . {} . {}", i.device, mac_text(i.mac), i.address));
    let (sets, permit) = match shape {
        Shape::Set => one_set(world),
        Shape::Sets => a_set_each(world),
        Shape::Lines => lines(world),
    };
    format!(
        "table ip hostplane {{
  map inward {{ type ipv4_addr : ipv4_addr; elements = {{ {inward} }} }}
  map outward {{ type ipv4_addr : ipv4_addr; elements = {{ {outward} }} }}
  set own {{ type ifname . ether_addr . ipv4_addr; elements = {{ {spoof} }} }}
{sets}
  chain spoof {{
    type filter hook prerouting priority raw; policy accept;
    iif {UPLINK} accept
    iifname . ether saddr . ip saddr != @own drop
  }}
  chain arriving {{
    type nat hook prerouting priority dstnat; policy accept;
    iif {UPLINK} dnat to ip daddr map @inward
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    oif {UPLINK} snat to ip saddr map @outward
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state vmap {{ established : accept, related : accept, invalid : drop }}
    iif != {UPLINK} accept
    {permit}
  }}
}}
"
    )
}

fn one_set(world: &World) -> (String, String) {
    let mut elements = Vec::new();
    for instance in &world.instances {
        for rule in &instance.rules {
            let (to, from) = (instance.address, rule.peer);
            elements.push(format!("{to} . {from} . {} . {}", rule.protocol, rule.port));
        }
    }
    let set = format!(
        "  set permitted {{ type ipv4_addr . ipv4_addr . inet_proto . inet_service; flags interval;\n\
         elements = {{ {} }} }}",
        elements.join(",\n")
    );
    (set, "ip daddr . ip saddr . meta l4proto . th dport @permitted accept".to_owned())
}

fn a_set_each(world: &World) -> (String, String) {
    let mut sets = String::new();
    let mut ways = Vec::new();
    for (index, instance) in world.instances.iter().enumerate() {
        let elements: Vec<String> = instance
            .rules
            .iter()
            .map(|rule| format!("{} . {} . {}", rule.peer, rule.protocol, rule.port))
            .collect();
        let _ = write!(
            sets,
            "  set permitted{index} {{ type ipv4_addr . inet_proto . inet_service; flags interval;\n\
             elements = {{ {} }} }}\n\
             chain to{index} {{ ip saddr . meta l4proto . th dport @permitted{index} accept; drop; }}\n",
            elements.join(",\n")
        );
        ways.push(format!("{} : goto to{index}", instance.address));
    }
    (sets, format!("ip daddr vmap {{ {} }}", ways.join(", ")))
}

fn lines(world: &World) -> (String, String) {
    let mut lines = String::new();
    for instance in world.instances.iter().rev() {
        for rule in &instance.rules {
            let (to, from) = (instance.address, rule.peer);
            let _ = writeln!(
                lines,
                "    ip daddr {to} ip saddr {from} {} dport {} accept",
                rule.protocol, rule.port
            );
        }
    }
    (String::new(), lines)
}

/// Forgets all connections of the namespace that the thread is in, so that each
/// measurement begins with the same, empty table: `IPCTNL_MSG_CT_DELETE` without
/// a filter (linux/netfilter/nfnetlink_conntrack.h).
pub fn forget_connections() -> anyhow::Result<()> {
    /// `NFNL_SUBSYS_CTNETLINK` and the message's number.
    const DELETE: u16 = 1 << 8 | 2;
    /// `NLM_F_REQUEST | NLM_F_ACK`.
    const FLAGS: u16 = 1 | 4;
    const LENGTH: u32 = 16 + 4;
    let mut message = Vec::with_capacity(LENGTH as usize);
    message.extend(LENGTH.to_ne_bytes());
    message.extend(DELETE.to_ne_bytes());
    message.extend(FLAGS.to_ne_bytes());
    message.extend([0; 8]); // sequence and port: one question, one answer
    message.extend([0; 4]); // family: any; version 0; resource 0

    let netfilter = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkNetFilter,
    )
    .context("netfilter: socket")?;
    sendto(netfilter.as_raw_fd(), &message, &NetlinkAddr::new(0, 0), MsgFlags::empty())
        .context("connections: forget")?;
    let mut answer = [0; 64];
    let length = recv(netfilter.as_raw_fd(), &mut answer, MsgFlags::empty())
        .context("connections: answer")?;
    let error = answer[..length].get(16..20).context("connections: answer is too short")?;
    match i32::from_ne_bytes([error[0], error[1], error[2], error[3]]) {
        0 => Ok(()),
        code => Err(io::Error::from_raw_os_error(-code)).context("connections: forget"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_stands_in_the_ruleset_in_every_shape() {
        let world = World::with_rules(1500);
        for shape in [Shape::Set, Shape::Sets, Shape::Lines] {
            let text = ruleset(&world, shape);
            for instance in &world.instances {
                assert!(text.contains(&format!("{} : {}", instance.elastic, instance.address)));
                for rule in &instance.rules {
                    assert!(text.contains(&rule.peer.to_string()), "{shape:?}: {rule:?}");
                }
            }
            assert!(text.find("ct state").unwrap() < text.rfind("accept").unwrap());
        }
    }
}
