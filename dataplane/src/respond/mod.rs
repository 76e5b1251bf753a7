//! Answers what guests ask of the host itself: DHCP, the time, instance metadata.
//!
//! ```text
//! guest ─tap─▶ tcx ─redirect─▶ punt device ─▶ thread ─▶ Responders ─▶ one interface's responder
//!                                                                     ├ DHCP      (dhcp)
//!                                                                     ├ time      (time)
//!                                                                     └ smoltcp ─ metadata
//! guest ◀─tap─ tcx ◀────────── punt device ◀─ thread ◀─────────────────┘
//! ```
//! `thread` is the shell; the rest are cores: frame in and `now` in, frames out.
//! Every interface has a responder of its own, found by the ifindex that the
//! program wrote into the frame, so equal private addresses in two VPCs never
//! meet. What may never be true: a frame of one interface is answered on another.

use std::collections::BTreeMap;
use std::time::Duration;

use rpc::dataplane::{Interface, Tokens};

pub mod dhcp;
mod interface;
pub mod limit;
pub mod metadata;
mod stream;
pub mod thread;
mod time;
mod wire;

pub use interface::{Counters, Responder};
use metadata::TokenKey;

/// What an interface is served, parsed: a value of this type can be answered from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    pub interface: model::InterfaceId,
    pub binding: dhcp::Binding,
    pub metadata: Option<metadata::Documents>,
    pub tokens: Tokens,
    pub hop_limit: u8,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("interface {interface}: answer its guest: {cause}")]
pub struct Unanswerable {
    pub interface: model::InterfaceId,
    pub cause: String,
}

/// What Ethernet and IPv4 can do: the least IPv4 datagram that all must take
/// (RFC 791), and the greatest that a tap carries.
const MTU_MIN: u16 = 576;

/// The greatest hop limit that EC2 takes (`HttpPutResponseHopLimit`).
const HOP_LIMIT_MAX: u8 = 64;

impl TryFrom<&Interface> for Served {
    type Error = Unanswerable;

    fn try_from(interface: &Interface) -> Result<Self, Unanswerable> {
        let refused = |cause: String| Unanswerable { interface: interface.id, cause };
        let dhcp = &interface.dhcp;
        if dhcp.hostname.len() > dhcp::HOSTNAME_LENGTH_MAX {
            return Err(refused(format!(
                "its host name has {} bytes, more than {}",
                dhcp.hostname.len(),
                dhcp::HOSTNAME_LENGTH_MAX
            )));
        }
        if dhcp.domain.len() > dhcp::DOMAIN_LENGTH_MAX {
            return Err(refused(format!(
                "its domain has {} bytes, more than {}",
                dhcp.domain.len(),
                dhcp::DOMAIN_LENGTH_MAX
            )));
        }
        if dhcp.mtu < MTU_MIN {
            return Err(refused(format!("its MTU is {}, less than {MTU_MIN}", dhcp.mtu)));
        }
        let services = &interface.services;
        let hops = services.metadata_hop_limit;
        if !(1..=HOP_LIMIT_MAX).contains(&hops) {
            let cause = format!("its metadata's hop limit is {hops}, not 1 to {HOP_LIMIT_MAX}");
            return Err(refused(cause));
        }
        for (servers, named) in [(&services.ntp, "time"), (&services.netbios, "NetBIOS name")] {
            if servers.len() > dhcp::SERVERS_MAX {
                let max = dhcp::SERVERS_MAX;
                return Err(refused(format!("it has more than {max} {named} servers")));
            }
        }
        if let Some(node) = services.netbios_node.filter(|n| ![1, 2, 4, 8].contains(n)) {
            let cause = format!("its NetBIOS node type is {node}, and not 1, 2, 4 or 8");
            return Err(refused(cause));
        }
        let router = interface.subnet.hosts().next().ok_or_else(|| {
            refused(format!("its subnet {} has no room for a router", interface.subnet))
        })?;
        let metadata = interface
            .metadata
            .as_ref()
            .map(metadata::Documents::parse)
            .transpose()
            .map_err(|e| refused(e.to_string()))?;
        Ok(Self {
            interface: interface.id,
            binding: dhcp::Binding {
                mac: interface.mac,
                address: interface.address,
                subnet: interface.subnet,
                router,
                hostname: dhcp.hostname.clone(),
                domain: dhcp.domain.clone(),
                dns: dhcp.dns.clone(),
                mtu: dhcp.mtu,
                ntp: services.ntp.clone(),
                netbios: services.netbios.clone(),
                netbios_node: services.netbios_node,
            },
            metadata,
            tokens: services.metadata_tokens,
            hop_limit: hops,
        })
    }
}

/// The responders of all interfaces, by the ifindex of their device.
pub struct Responders {
    by_ifindex: BTreeMap<u32, Responder>,
    key: TokenKey,
    /// The boot clock's zero, since 1970: what the shell last read.
    pub booted_at: Duration,
    /// Frames that named no interface.
    pub strays: u64,
}

impl Responders {
    pub fn new(key: TokenKey) -> Self {
        Self { by_ifindex: BTreeMap::new(), key, booted_at: Duration::ZERO, strays: 0 }
    }

    /// Serves exactly these from now on. A responder whose interface stays on
    /// its device keeps its connections. `random` seeds the new ones.
    pub fn configure(
        &mut self,
        served: Vec<(u32, Served)>,
        mut random: impl FnMut() -> u128,
        now: Duration,
    ) {
        let mut old = std::mem::take(&mut self.by_ifindex);
        for (ifindex, served) in served {
            let kept = old.remove(&ifindex).filter(|r| r.interface() == served.interface);
            let responder = match kept {
                Some(mut responder) => {
                    responder.replace(served, &self.key, &mut random, now);
                    responder
                }
                None => Responder::new(served, &self.key, &mut random, now),
            };
            self.by_ifindex.insert(ifindex, responder);
        }
    }

    /// Takes a frame from the punt device; what it leads to is put into `out`,
    /// addressed to the device that the frame came from.
    pub fn receive(&mut self, frame: &[u8], now: Duration, out: &mut Vec<Vec<u8>>) {
        let responder = frame
            .first_chunk::<6>()
            .and_then(|destination| ebpf::ifindex_of(*destination))
            .and_then(|ifindex| Some((ifindex, self.by_ifindex.get_mut(&ifindex)?)));
        match responder {
            Some((ifindex, responder)) => {
                responder.receive(&frame[6..], now, self.booted_at);
                responder.drain(ebpf::punt_mac(ifindex), out);
            }
            None => self.strays += 1,
        }
    }

    /// Does what time has made due: retransmits, gives up, times out.
    pub fn elapse(&mut self, now: Duration, out: &mut Vec<Vec<u8>>) {
        for (ifindex, responder) in &mut self.by_ifindex {
            if responder.next_due(now).is_some_and(|due| due <= now) {
                responder.elapse(now);
                responder.drain(ebpf::punt_mac(*ifindex), out);
            }
        }
    }

    /// When [`Self::elapse`] should be called next, if ever.
    pub fn next_due(&mut self, now: Duration) -> Option<Duration> {
        self.by_ifindex.values_mut().filter_map(|r| r.next_due(now)).min()
    }

    pub fn counters(&self) -> BTreeMap<model::InterfaceId, Counters> {
        self.by_ifindex.values().map(|r| (r.interface(), r.counters())).collect()
    }
}

#[cfg(test)]
#[path = "respond_tests.rs"]
mod tests;
