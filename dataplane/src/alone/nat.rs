//! NAT gateways as a file writes them, and as people read them.

use ebpf::port::PORTS_MAX;
use model::NatGatewayId;
use rpc::dataplane::NatGateway;
use serde::Deserialize;
use toml::Spanned;

use super::file::{Text, Wrong, network_id, number};

#[derive(Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Entry {
    pub network: Option<String>,
    /// Its private address.
    address: Spanned<String>,
    elastic: Spanned<String>,
    ports_max: Option<Spanned<u16>>,
}

pub fn gateway_id(name: &str) -> NatGatewayId {
    NatGatewayId::from_random(number("nat-gateway", name))
}

pub fn gateway(text: &Text<'_>, name: &str, entry: &Entry) -> Result<NatGateway, Wrong> {
    let address = |key, word, example| text.parse(key, word, "an IPv4 address", example);
    let ports_max = entry.ports_max.as_ref().map(|ports| *ports.get_ref());
    if let Some(given) = &entry.ports_max
        && !(1..=PORTS_MAX).contains(&u32::from(*given.get_ref()))
    {
        let what = format!("ports-max: {} is no number of ports", given.get_ref());
        return Err(text.wrong(given.span(), what, &format!("ports-max = {PORTS_MAX}, or less")));
    }
    Ok(NatGateway {
        id: gateway_id(name),
        vpc: network_id(entry.network.as_deref()),
        address: address("address", &entry.address, "10.0.0.9")?,
        elastic: address("elastic", &entry.elastic, "198.51.100.9")?,
        ports_max,
    })
}

/// A gateway's properties as people read them.
pub fn told(gateway: &NatGateway) -> Vec<(&'static str, String)> {
    let ports = gateway.ports_max.map_or_else(|| "all".into(), |ports| ports.to_string());
    vec![
        ("elastic", gateway.elastic.to_string()),
        ("address", gateway.address.to_string()),
        ("ports", ports),
    ]
}
