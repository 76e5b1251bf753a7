//! What guests are served at the tap, as a file says it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use rpc::dataplane::{Dns, Interface, Services, Tokens};
use serde::Deserialize;
use toml::Spanned;

use super::file::{Text, Wrong};
use crate::respond::dns;

/// `[interface.NAME.services]`
#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Entry {
    ntp: Vec<Ipv4Addr>,
    netbios: Vec<Ipv4Addr>,
    netbios_node: Option<u8>,
    metadata_hop_limit: Option<u8>,
    metadata_tokens: Tokens,
    metadata_ipv6: bool,
    resolve: Option<Resolve>,
    /// Document by path, such as `meta-data/instance-id`.
    metadata: Option<BTreeMap<String, String>>,
}

/// `resolve = { address = "10.0.0.2", names = ["db.lan"] }`
#[derive(Debug, Default, Clone, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Resolve {
    address: Option<Ipv4Addr>,
    names: Vec<String>,
}

impl Entry {
    /// Completes an interface that has nothing of this yet.
    pub fn complete(&self, interface: Interface) -> Interface {
        let plain = Services::default();
        let dns = self.resolve.clone().map(|Resolve { address, names }| Dns { address, names });
        let services = Services {
            ntp: self.ntp.clone(),
            netbios: self.netbios.clone(),
            netbios_node: self.netbios_node,
            metadata_hop_limit: self.metadata_hop_limit.unwrap_or(plain.metadata_hop_limit),
            metadata_tokens: self.metadata_tokens,
            metadata_ipv6: self.metadata_ipv6,
            dns,
        };
        Interface { services, metadata: self.metadata.clone(), ..interface }
    }
}

/// Name servers, as addresses with a port or without.
pub fn name_servers(text: &Text<'_>, words: &[Spanned<String>]) -> Result<Vec<SocketAddr>, Wrong> {
    let (key, kind, example) = ("name-servers", "an address", "192.0.2.53");
    if let Some(one_more) = words.get(dns::UPSTREAMS_MAX) {
        let what = format!("{key}: more than {}", dns::UPSTREAMS_MAX);
        return Err(text.wrong(one_more.span(), what, "those that are to be asked first"));
    }
    let server = |word| match text.parse::<SocketAddr>(key, word, kind, example) {
        Ok(server) => Ok(server),
        Err(_) => {
            let address = text.parse::<IpAddr>(key, word, kind, example)?;
            Ok((address, dns::PORT).into())
        }
    };
    words.iter().map(server).collect()
}

/// What differs from the plain, in one line.
pub fn told(interface: &Interface) -> Option<String> {
    let (services, plain) = (&interface.services, Services::default());
    let mut told = String::new();
    let mut tell = |differs: bool, words: String| {
        if differs {
            // Writing into a text cannot fail.
            _ = write!(told, "{}{words}", if told.is_empty() { "" } else { ", " });
        }
    };
    tell(!services.ntp.is_empty(), format!("ntp {:?}", services.ntp));
    tell(!services.netbios.is_empty(), format!("netbios {:?}", services.netbios));
    tell(services.netbios_node.is_some(), format!("netbios-node {:?}", services.netbios_node));
    let hops = services.metadata_hop_limit;
    tell(hops != plain.metadata_hop_limit, format!("metadata-hop-limit {hops}"));
    let optional = services.metadata_tokens == Tokens::Optional;
    tell(optional, "metadata-tokens optional".to_owned());
    tell(services.metadata_ipv6, "metadata-ipv6 true".to_owned());
    if let Some(dns) = &services.dns {
        let address = dns.address.unwrap_or(dns::ADDRESS);
        tell(true, format!("resolve at {address} {:?}", dns.names));
    }
    if let Some(documents) = &interface.metadata {
        // A document's whole text has no place in a line; that it changed has.
        let bytes: usize = documents.iter().map(|(path, text)| path.len() + text.len()).sum();
        let (count, mark) =
            (documents.len(), super::file::number("metadata", &format!("{documents:?}")));
        tell(true, format!("metadata of {count} documents, {bytes} bytes, {:08x}", mark as u32));
    }
    Some(told).filter(|told| !told.is_empty())
}
