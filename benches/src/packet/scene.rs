//! Three namespaces in a row, for one contender:
//!
//! ```text
//!   client              router                     instance
//!   eth0 ──veth── uplink0       tap0 ───veth─── eth0
//!   counts answers   frames arrive here,         counts what was
//!   and drops them   or by tap0 for answers       delivered, drops it
//! ```

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use crate::packet::namespace::Namespace;
use crate::packet::world::{CLIENT, Instance, ROUTER, mac_text};
use crate::process;

pub const UPLINK: &str = "uplink0";
pub const UPLINK_INDEX: u32 = 10;
pub const TAP_INDEX: u32 = 11;

pub const UPLINK_MAC: [u8; 6] = [0x02, 0x62, 0x65, 0x01, 0x00, 0x01];
pub const CLIENT_MAC: [u8; 6] = [0x02, 0x62, 0x65, 0x01, 0x00, 0x02];

/// Frames may still be on their way when the sender's call returns.
const ARRIVE_WITHIN: Duration = Duration::from_secs(2);
const ASK_EVERY: Duration = Duration::from_millis(2);

#[derive(Debug)]
pub struct Scene {
    client: Namespace,
    pub router: Namespace,
    instance: Namespace,
}

/// Where frames end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    Client,
    Instance,
}

impl Scene {
    pub fn build(instance: &Instance) -> anyhow::Result<Self> {
        let scene = Self {
            client: Namespace::create()?,
            router: Namespace::create()?,
            instance: Namespace::create()?,
        };
        scene.router.within(|| {
            silence_ipv6()?;
            // Answers and elastic addresses are not the router's own.
            fs::write("/proc/sys/net/ipv4/ip_forward", "1").context("ip_forward: write")?;
            for which in ["all", "default"] {
                let path = format!("/proc/sys/net/ipv4/conf/{which}/rp_filter");
                fs::write(&path, "0").with_context(|| format!("{path}: write"))?;
            }
            ip(&scene.devices(instance))
        })?;
        for (end, mac) in [(&scene.client, CLIENT_MAC), (&scene.instance, instance.mac)] {
            end.within(|| {
                ip(&format!("link set dev eth0 address {} up\n", mac_text(mac)))?;
                nft(SINK)
            })?;
        }
        Ok(scene)
    }

    fn devices(&self, instance: &Instance) -> String {
        let (tap, address) = (&instance.device, instance.address);
        let (client_mac, mac) = (mac_text(CLIENT_MAC), mac_text(instance.mac));
        let (client, far) = (self.client.path(), self.instance.path());
        let (up_mac, tap_mac) = (mac_text(UPLINK_MAC), mac_text(ebpf::GATEWAY_MAC));
        format!(
            "link add name {UPLINK} index {UPLINK_INDEX} address {up_mac} type veth peer name eth0 netns {client}\n\
             link add name {tap} index {TAP_INDEX} address {tap_mac} type veth peer name eth0 netns {far}\n\
             link set dev {UPLINK} up\n\
             link set dev {tap} up\n\
             address add {ROUTER}/24 dev {UPLINK}\n\
             neighbour add {CLIENT} lladdr {client_mac} dev {UPLINK} nud permanent\n\
             route add default via {CLIENT} dev {UPLINK}\n\
             neighbour add {address} lladdr {mac} dev {tap} nud permanent\n\
             route add {address}/32 dev {tap}\n"
        )
    }

    /// Lets the instance's end take frames from XDP: it does where GRO is on.
    pub fn take_frames(&self) -> anyhow::Result<()> {
        let mut ethtool = Command::new("ethtool");
        ethtool.args(["-K", "eth0", "gro", "on"]);
        self.instance.within(|| process::output(&mut ethtool)).map(drop)
    }

    /// UDP packets that came to an end so far.
    pub fn delivered(&self, end: End) -> anyhow::Result<u64> {
        let namespace = match end {
            End::Client => &self.client,
            End::Instance => &self.instance,
        };
        let text = namespace.within(|| {
            process::output(
                Command::new("nft").args(["list", "counter", "netdev", "sink", "arrived"]),
            )
        })?;
        packets(&text).with_context(|| format!("nft: its counter: `{}`", text.trim()))
    }

    /// Waits until `count` have come to an end since `before`; how many have.
    pub fn await_delivered(&self, end: End, before: u64, count: u64) -> anyhow::Result<u64> {
        let mut waited = Duration::ZERO;
        loop {
            let arrived = self.delivered(end)? - before;
            if arrived >= count || waited >= ARRIVE_WITHIN {
                return Ok(arrived);
            }
            std::thread::sleep(ASK_EVERY);
            waited += ASK_EVERY;
        }
    }
}

/// Counts UDP as early as the kernel can after the device, and drops everything.
const SINK: &str = "
table netdev sink {
    counter arrived {}
    chain ingress {
        type filter hook ingress device eth0 priority 0; policy drop;
        ip protocol udp counter name arrived drop
    }
}
";

fn packets(text: &str) -> Option<u64> {
    let mut words = text.split_ascii_whitespace();
    words.find(|&word| word == "packets")?;
    words.next()?.parse().ok()
}

/// Without this, routers and listeners are looked for on every new device.
pub fn silence_ipv6() -> anyhow::Result<()> {
    for which in ["all", "default"] {
        let path = format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6");
        if Path::new(&path).exists() {
            fs::write(&path, "1").with_context(|| format!("{path}: write"))?;
        }
    }
    Ok(())
}

/// Commands for `ip`, one a line, in the namespace that the thread is in.
pub fn ip(commands: &str) -> anyhow::Result<()> {
    feed(Command::new("ip").args(["-batch", "-"]), commands)
}

/// A ruleset for `nft`, in the namespace that the thread is in.
pub fn nft(ruleset: &str) -> anyhow::Result<()> {
    feed(Command::new("nft").args(["-f", "-"]), ruleset)
}

pub fn feed(command: &mut Command, text: &str) -> anyhow::Result<()> {
    let mut file = tempfile::tempfile()?;
    std::io::Write::write_all(&mut file, text.as_bytes())?;
    std::io::Seek::rewind(&mut file)?;
    process::end_with_us(command);
    let output = command.stdin(Stdio::from(file)).output().context("start")?;
    anyhow::ensure!(
        output.status.success(),
        "{command:?}: {}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counter_is_read_as_nft_prints_it() {
        let text = "table netdev sink {\n\tcounter arrived {\n\t\tpackets 77 bytes 4620\n\t}\n}\n";
        assert_eq!(packets(text), Some(77));
        assert_eq!(packets("table netdev sink {}"), None);
    }
}
