//! Route tables as a file writes them, and as people read them.

use std::collections::BTreeMap;

use ipnet::IpNet;
use model::route_table::Target;
use model::{Route, RouteTable, RouteTableId};
use serde::Deserialize;
use toml::Spanned;

use super::difference::named;
use super::file::{File, InterfaceEntry, Text, Wrong, interface_id, network_id, number};
use super::nat;

const INTERFACE: &str = "interface:";
const NAT: &str = "nat:";

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    pub network: Option<String>,
    /// The network's own prefixes.
    local: Vec<Spanned<String>>,
    #[serde(default)]
    routes: Vec<RouteEntry>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RouteEntry {
    to: Spanned<String>,
    via: Spanned<String>,
}

pub fn table_id(name: &str) -> RouteTableId {
    RouteTableId::from_random(number("route-table", name))
}

pub fn table(text: &Text<'_>, name: &str, entry: &Entry, file: &File) -> Result<RouteTable, Wrong> {
    let prefix = |key, word| text.parse::<IpNet>(key, word, "a prefix", "10.0.0.0/16");
    let mut routes: Vec<Route> = Vec::new();
    let local: Result<Vec<IpNet>, Wrong> =
        entry.local.iter().map(|word| prefix("local", word)).collect();
    let local = local?;
    for route in &entry.routes {
        let destination = prefix("to", &route.to)?.trunc();
        let known = routes.iter().map(|r| r.destination).chain(local.iter().map(IpNet::trunc));
        if known.into_iter().any(|net| net == destination) {
            let what = format!("to: `{destination}` has a route already, or is local");
            return Err(text.wrong(route.to.span(), what, "each destination once"));
        }
        routes.push(Route { destination, target: target(text, entry, &route.via, file)? });
    }
    let vpc = network_id(entry.network.as_deref());
    Ok(RouteTable { id: table_id(name), vpc, local, routes })
}

fn target(
    text: &Text<'_>,
    entry: &Entry,
    via: &Spanned<String>,
    file: &File,
) -> Result<Target, Wrong> {
    let word = via.get_ref().as_str();
    let instead = "via = \"internet\", \"nat:NAME\", \"interface:NAME\" or \"blackhole\"";
    if let Some(name) = word.strip_prefix(NAT) {
        return match file.nat_gateway.get(name) {
            Some(to) if network_id(to.network.as_deref()) == vpc(entry) => {
                Ok(Target::NatGateway(nat::gateway_id(name)))
            }
            Some(_) => {
                let what = format!("via: NAT gateway `{name}` belongs to another network");
                Err(text.wrong(via.span(), what, "a NAT gateway of the same network"))
            }
            None => {
                let what = format!("via: there is no NAT gateway `{name}`");
                Err(text.wrong(via.span(), what, &format!("a table [nat-gateway.{name}]")))
            }
        };
    }
    match (word, word.strip_prefix(INTERFACE)) {
        ("internet", _) => Ok(Target::InternetGateway),
        ("blackhole", _) => Ok(Target::Blackhole),
        (_, Some(name)) => match file.interface.get(name) {
            Some(to) if network_id(to.get_ref().network.as_deref()) == vpc(entry) => {
                Ok(Target::Interface(interface_id(name)))
            }
            Some(_) => {
                let what = format!("via: interface `{name}` belongs to another network");
                Err(text.wrong(via.span(), what, "an interface of the same network"))
            }
            None => {
                let what = format!("via: there is no interface `{name}`");
                Err(text.wrong(via.span(), what, &format!("a table [interface.{name}]")))
            }
        },
        _ => Err(text.wrong(via.span(), format!("via: `{word}` is no target"), instead)),
    }
}

fn vpc(entry: &Entry) -> model::VpcId {
    network_id(entry.network.as_deref())
}

/// The table that an interface names.
pub fn of(
    text: &Text<'_>,
    entry: &InterfaceEntry,
    file: &File,
) -> Result<Option<RouteTableId>, Wrong> {
    let Some(word) = &entry.route_table else { return Ok(None) };
    let name = word.get_ref();
    let Some(known) = file.route_table.get(name) else {
        let what = format!("route-table: there is no route table `{name}`");
        return Err(text.wrong(word.span(), what, &format!("a table [route-table.{name}]")));
    };
    if vpc(known) != network_id(entry.network.as_deref()) {
        let what = format!("route-table: `{name}` belongs to another network");
        return Err(text.wrong(word.span(), what, "a route table of the same network"));
    }
    Ok(Some(table_id(name)))
}

/// A route as people read it.
pub fn told(route: &Route, names: &BTreeMap<String, String>) -> String {
    let via = match route.target {
        Target::Interface(id) => format!("{INTERFACE}{}", named(&id.to_string(), names)),
        Target::NatGateway(id) => format!("{NAT}{}", named(&id.to_string(), names)),
        other => other.to_string(),
    };
    format!("{} via {via}", route.destination)
}
