//! Answers what guests ask of the host itself: DHCP, IPv6's router, the time, names,
//! instance metadata.
//!
//! ```text
//! guest ─tap─▶ tcx ─redirect─▶ punt device ─▶ thread ─▶ Responders ─▶ one interface's responder
//!                                                           (question)├ DHCP      (dhcp)
//!                                                                     ├ time      (time)
//!                                                                     ├ router, DHCPv6 (six)
//!                                                                     ├ smoltcp ─ metadata
//!                                                                     └ names     (dns) ─▶ name servers
//! guest ◀─tap─ tcx ◀────────── punt device ◀─ thread ◀─────────────────┘
//! ```
//! `thread` is the shell; the rest are cores: frame in and `now` in, frames out.
//! Every interface has a responder of its own, found by the ifindex that the
//! program wrote into the frame, so equal private addresses in two VPCs never
//! meet. What may never be true: a frame of one interface is answered on another.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use model::{InterfaceId, VpcId};
use rpc::dataplane::{Interface, Tokens};

pub mod dhcp;
pub mod dns;
mod interface;
pub mod limit;
pub mod metadata;
mod question;
pub mod six;
mod stack;
mod stream;
pub mod thread;
mod time;
mod wire;

use dns::{Action, Client, Forwarder, Zone};
pub use interface::{Counters, Responder};
use metadata::TokenKey;

/// What an interface is served, parsed: a value of this type can be answered from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    pub interface: model::InterfaceId,
    pub binding: dhcp::Binding,
    /// Its addresses beside the one that DHCP gives it.
    pub secondary: Vec<std::net::Ipv4Addr>,
    pub metadata: Option<metadata::Documents>,
    pub dns: Option<dns::Resolved>,
    /// Nothing where it has no IPv6.
    pub six: Option<six::Binding>,
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
        if interface.subnet6.is_some() && dhcp.mtu < six::MTU_MIN {
            let (mtu, min) = (dhcp.mtu, six::MTU_MIN);
            return Err(refused(format!("its MTU is {mtu}, and IPv6 needs {min}")));
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
        let resolved = dns::Resolved::new(interface).map_err(&refused)?;
        // Whoever names no resolver is told ours.
        let resolver = resolved.as_ref().filter(|_| dhcp.dns.is_empty());
        let resolver = resolver.map(dns::Resolved::first);
        Ok(Self {
            interface: interface.id,
            binding: dhcp::Binding {
                mac: interface.mac,
                address: interface.address,
                subnet: interface.subnet,
                router,
                hostname: dhcp.hostname.clone(),
                domain: dhcp.domain.clone(),
                dns: dhcp.dns.iter().copied().chain(resolver).collect(),
                mtu: dhcp.mtu,
                ntp: services.ntp.clone(),
                netbios: services.netbios.clone(),
                netbios_node: services.netbios_node,
            },
            secondary: interface.secondary.iter().map(|s| s.address).collect(),
            metadata,
            dns: resolved,
            six: six::Binding::of(interface),
            tokens: services.metadata_tokens,
            hop_limit: hops,
        })
    }
}

impl Served {
    /// Whether an address is the interface's own.
    fn owns(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(address) => {
                address == self.binding.address || self.secondary.contains(&address)
            }
            IpAddr::V6(address) => {
                self.six.as_ref().is_some_and(|six| six.dhcp.addresses.contains(&address))
            }
        }
    }

    fn resolves_at(&self, server: IpAddr) -> bool {
        self.dns.as_ref().is_some_and(|dns| dns.servers().any(|s| s == server))
    }
}

/// The responders of all interfaces, by the ifindex of their device.
pub struct Responders {
    by_ifindex: BTreeMap<u32, Responder>,
    key: TokenKey,
    forwarder: Forwarder,
    zones: BTreeMap<VpcId, Zone>,
    /// The boot clock's zero, since 1970: what the shell last read.
    pub booted_at: Duration,
    /// Frames that named no interface.
    pub strays: u64,
}

impl Responders {
    pub fn new(key: TokenKey, random: impl FnMut() -> u128 + Send + 'static) -> Self {
        Self {
            by_ifindex: BTreeMap::new(),
            key,
            forwarder: Forwarder::new(random),
            zones: BTreeMap::new(),
            booted_at: Duration::ZERO,
            strays: 0,
        }
    }

    /// Serves exactly these from now on, and asks `servers` for names of others. A responder whose interface stays on
    /// its device keeps its connections. `random` seeds the new ones.
    pub fn configure(
        &mut self,
        served: Vec<(u32, Served)>,
        servers: Vec<SocketAddr>,
        mut random: impl FnMut() -> u128,
        now: Duration,
    ) {
        let mut old = std::mem::take(&mut self.by_ifindex);
        let before: BTreeMap<u32, InterfaceId> =
            old.iter().map(|(ifindex, r)| (*ifindex, r.interface())).collect();
        self.zones.clear();
        for dns in served.iter().filter_map(|(_, served)| served.dns.as_ref()) {
            self.zones.entry(dns.vpc).or_default().add(dns);
        }
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
        let by_ifindex = &self.by_ifindex;
        self.forwarder.configure(servers, |ifindex| {
            by_ifindex.get(&ifindex).map(Responder::interface) == before.get(&ifindex).copied()
        });
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
                self.resolve(ifindex, now);
            }
            None => self.strays += 1,
        }
    }

    /// Hands on what an interface's guest wants resolved.
    fn resolve(&mut self, ifindex: u32, now: Duration) {
        let Some(responder) = self.by_ifindex.get_mut(&ifindex) else { return };
        let zone = responder.network().and_then(|vpc| self.zones.get(&vpc));
        for (origin, message) in responder.take_asked() {
            let client = Client { ifindex, origin };
            self.forwarder.ask(client, &message, zone, now);
        }
    }

    /// What an attempt's socket received; `None`: it has ended.
    pub fn hear(&mut self, token: u64, message: Option<&[u8]>, now: Duration) {
        match message {
            Some(message) => self.forwarder.hear(token, message, now),
            None => self.forwarder.give_up(token, now),
        }
    }

    /// What is to be done for names; answers to guests are put into `out` meanwhile.
    pub fn next_action(&mut self, now: Duration, out: &mut Vec<Vec<u8>>) -> Option<Action> {
        loop {
            match self.forwarder.next_action()? {
                Action::Answer { client, message } => {
                    let Client { ifindex, origin } = client;
                    let Some(responder) = self.by_ifindex.get_mut(&ifindex) else { continue };
                    responder.tell(origin, &message, now);
                    responder.drain(ebpf::punt_mac(ifindex), out);
                    self.resolve(ifindex, now);
                }
                action => return Some(action),
            }
        }
    }

    /// Does what time has made due: retransmits, gives up, times out.
    pub fn elapse(&mut self, now: Duration, out: &mut Vec<Vec<u8>>) {
        let mut asking = Vec::new();
        for (ifindex, responder) in &mut self.by_ifindex {
            if responder.next_due(now).is_some_and(|due| due <= now) {
                responder.elapse(now);
                responder.drain(ebpf::punt_mac(*ifindex), out);
                asking.push(*ifindex);
            }
        }
        for ifindex in asking {
            self.resolve(ifindex, now);
        }
        self.forwarder.elapse(now);
    }

    /// When [`Self::elapse`] should be called next, if ever.
    pub fn next_due(&mut self, now: Duration) -> Option<Duration> {
        let own = self.by_ifindex.values_mut().filter_map(|r| r.next_due(now)).min();
        own.into_iter().chain(self.forwarder.next_due()).min()
    }

    pub fn counters(&self) -> BTreeMap<model::InterfaceId, Counters> {
        let named = |(ifindex, r): (&u32, &Responder)| {
            let dns = self.forwarder.counters(*ifindex);
            (r.interface(), Counters { dns, ..r.counters() })
        };
        self.by_ifindex.iter().map(named).collect()
    }
}

#[cfg(test)]
#[path = "respond_tests.rs"]
mod tests;
