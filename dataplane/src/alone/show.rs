//! What is in force, as it stands in the kernel.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use ebpf::Reason;
use rpc::Deployment;
use rpc::dataplane::PrivateAddress;
use serde::Serialize;

use super::{Names, accepted, named};
use crate::load::{Look, Reasons};
use crate::record;

#[derive(Debug, Serialize)]
pub struct Shown {
    pub deployment: String,
    pub generation: u64,
    /// Whether anything is pinned in the kernel.
    pub in_force: bool,
    pub interfaces: Vec<ShownInterface>,
    pub nat_gateways: Vec<ShownGateway>,
    /// What arrived on the uplink and met no interface.
    pub uplink: Reasons,
}

#[derive(Debug, Serialize)]
pub struct ShownGateway {
    pub name: String,
    pub id: String,
    pub elastic: String,
    pub packets: Reasons,
}

#[derive(Debug, Serialize)]
pub struct ShownInterface {
    pub name: String,
    pub id: String,
    pub device: String,
    pub address: String,
    pub elastic: Option<String>,
    pub secondary: Vec<PrivateAddress>,
    pub groups: Vec<String>,
    /// Whether its device carries the programs now.
    pub attached: bool,
    pub flows: u64,
    pub packets: Reasons,
}

/// Looks at a deployment, whether its daemon lives or not.
pub fn look(deployment: &Deployment) -> anyhow::Result<Shown> {
    let desired = accepted(deployment)?;
    let place = deployment.state_of("dataplane").join("names.json");
    let names = record::read::<Names>(&place)?.unwrap_or_default().names;
    let look = Look::open(deployment)?;
    let mut interfaces = Vec::new();
    for interface in &desired.interfaces {
        let device = interface.device.name();
        let found = look.as_ref().and_then(|look| {
            let attached = look.tables.attachments.iter().find(|(_, a)| a.device == device);
            Some((look, look.tables.interfaces.get(attached?.0)?))
        });
        let (flows, packets) = match found {
            Some((look, record)) => (look.flows(record.slot)?, look.reasons(record.slot)?),
            None => (0, Reasons::new()),
        };
        interfaces.push(ShownInterface {
            name: named(&interface.id.to_string(), &names),
            id: interface.id.to_string(),
            device: device.to_owned(),
            address: interface.address.to_string(),
            elastic: interface.elastic.map(|e| e.to_string()),
            secondary: interface.secondary.clone(),
            groups: interface.groups.iter().map(|g| named(&g.to_string(), &names)).collect(),
            attached: found.is_some(),
            flows,
            packets,
        });
    }
    let mut nat_gateways = Vec::new();
    for gateway in &desired.nat_gateways {
        let found = look.as_ref().and_then(|look| {
            let public = u32::from(gateway.elastic);
            let mut all = look.tables.nat_gateways();
            Some((look, all.find(|(address, _)| *address == public)?.1.slot))
        });
        nat_gateways.push(ShownGateway {
            name: named(&gateway.id.to_string(), &names),
            id: gateway.id.to_string(),
            elastic: gateway.elastic.to_string(),
            packets: found.map_or(Ok(Reasons::new()), |(look, slot)| look.reasons(slot))?,
        });
    }
    Ok(Shown {
        deployment: deployment.name().to_owned(),
        generation: desired.generation,
        in_force: look.is_some(),
        interfaces,
        nat_gateways,
        uplink: look.map_or(Ok(Reasons::new()), |look| look.reasons(0))?,
    })
}

impl Shown {
    pub fn told(&self) -> String {
        let mut text = String::new();
        if !self.in_force {
            _ = writeln!(text, "{}: nothing is in force; `dataplane apply FILE`", self.deployment);
        }
        for i in &self.interfaces {
            let elastic = i.elastic.as_ref().map(|e| format!(", elastic {e}")).unwrap_or_default();
            let state = if i.attached { "" } else { ": NOT IN FORCE: its device is gone or bare" };
            let (name, device, address) = (&i.name, &i.device, &i.address);
            _ = writeln!(text, "{name}: {device}, {address}{elastic}{state}");
            for s in &i.secondary {
                let elastic = s.elastic.map(|e| format!(", elastic {e}")).unwrap_or_default();
                _ = writeln!(text, "  secondary: {}{elastic}", s.address);
            }
            _ = writeln!(text, "  groups: {}", i.groups.join(" "));
            _ = writeln!(text, "  flows: {}", i.flows);
            _ = writeln!(text, "  passed: {}", told(&i.packets, true));
            _ = writeln!(text, "  dropped: {}", told(&i.packets, false));
        }
        for g in &self.nat_gateways {
            _ = writeln!(text, "{}: NAT gateway, elastic {}", g.name, g.elastic);
            _ = writeln!(text, "  passed: {}", told(&g.packets, true));
            _ = writeln!(text, "  dropped: {}", told(&g.packets, false));
        }
        if !self.uplink.is_empty() {
            _ = writeln!(text, "uplink, for nobody: {}", told(&self.uplink, false));
        }
        text
    }
}

fn told(packets: &BTreeMap<String, u64>, accepts: bool) -> String {
    let of_kind =
        |name: &str| Reason::ALL.iter().any(|r| r.name() == name && r.accepts() == accepts);
    let words: Vec<String> = packets
        .iter()
        .filter(|(name, _)| of_kind(name))
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    if words.is_empty() { "none".into() } else { words.join(", ") }
}
