//! Names, resolved for guests: those of their own network from the desired state, all
//! others by the host's name servers. No recursion of ours.
//!
//! ```text
//!                   ┌ names    of this network: answered at once
//! query ─ message ──┼ cache    of this interface: heard before, not yet too old
//!   (UDP, stream)   └ forward  in flight ─Ask─▶ upstream: a socket a question
//!                                  ◀─ answer, silence, refusal: the next server
//! ```
//! `upstream` is the shell, which owns the sockets; the rest are cores. Parsing and
//! composing is the `domain` crate's: what goes to a guest was taken apart and put
//! together again, and never is a server's own bytes. What may never be true: an
//! answer to one interface's question is told, or remembered, for another.

mod cache;
mod forward;
mod message;
mod names;
mod stream;
pub mod upstream;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::Ipv4Net;
use model::VpcId;

pub use forward::{Action, Client, Counters, Forwarder, Origin, UPSTREAMS_MAX};
pub use names::{Owned, Zone};
pub use stream::Streams;

pub const PORT: u16 = 53;

/// The address that every network has.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::from_bits(ebpf::DNS_ADDRESS);
pub const ADDRESS6: Ipv6Addr = Ipv6Addr::from_bits(ebpf::DNS_ADDRESS6.bits());

/// Names that an interface may have.
pub const NAMES_MAX: usize = 16;

/// An interface for which names are resolved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Resolved {
    pub vpc: VpcId,
    pub server: Option<Ipv4Addr>,
    pub names: Vec<Owned>,
    pub addresses: Vec<IpAddr>,
    pub subnet: Ipv4Net,
}

impl Resolved {
    pub fn new(interface: &rpc::dataplane::Interface) -> Result<Option<Self>, String> {
        let Some(dns) = &interface.services.dns else { return Ok(None) };
        if dns.names.len() > NAMES_MAX {
            return Err(format!("it has more than {NAMES_MAX} names"));
        }
        let names = dns.names.iter().map(|name| {
            let parsed = name.parse::<Owned>().map_err(|e| e.to_string());
            let some = parsed.and_then(|n| match n.is_root() {
                true => Err("it is the root's".to_owned()),
                false => Ok(n),
            });
            some.map_err(|e| format!("its name `{name}` is no host's: {e}"))
        });
        let v6 = interface.ipv6.iter().copied().map(IpAddr::from);
        Ok(Some(Self {
            vpc: interface.vpc,
            server: dns.address,
            names: names.collect::<Result<_, _>>()?,
            addresses: std::iter::once(interface.address.into()).chain(v6).collect(),
            subnet: interface.subnet,
        }))
    }

    /// The first where its guest asks over IPv4.
    pub fn first(&self) -> Ipv4Addr {
        self.server.unwrap_or(ADDRESS)
    }

    /// Where its guest asks.
    pub fn servers(&self) -> impl Iterator<Item = IpAddr> {
        let own = self.server.map(IpAddr::from);
        own.into_iter().chain([ADDRESS.into(), ADDRESS6.into()])
    }
}

#[cfg(test)]
#[path = "dns_tests.rs"]
mod tests;
