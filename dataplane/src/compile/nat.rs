//! NAT gateways: a record under their public address, where elastic ones stand.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr};

use bytemuck::Zeroable as _;
use ebpf::layout::{Elastic, Interface, Local, LocalKey, POLICY_NONE};
use ebpf::port::PORTS_MAX;
use ebpf::route::NAT;
use model::{NatGatewayId, VpcId};
use rpc::dataplane::{Desired, NatGateway, Translated};

use super::{Error, Slots, Tables, id_number};

/// No interface has such a number: theirs have as many digits, and this is said beside.
const NOT_AN_INTERFACE: u64 = 0x6e61_7400_0000_0000;

/// The public address of each, with its network.
pub type ById = BTreeMap<NatGatewayId, (Ipv4Addr, VpcId)>;

pub fn by_id(desired: &Desired) -> Result<ById, Error> {
    let mut by_id = ById::new();
    for gateway in &desired.nat_gateways {
        let wrong = |cause: String| Error::NatGateway { gateway: gateway.id, cause };
        if by_id.insert(gateway.id, (gateway.elastic, gateway.vpc)).is_some() {
            return Err(wrong("it appears twice".into()));
        }
        let ports = u32::from(gateway.ports_max.unwrap_or(PORTS_MAX as u16));
        if !(1..=PORTS_MAX).contains(&ports) {
            return Err(wrong(format!("{ports} ports; give it 1 to {PORTS_MAX}, or nothing")));
        }
    }
    Ok(by_id)
}

/// What no interface may have too.
pub fn told(gateway: &NatGateway) -> [String; 2] {
    let private = format!("address {} in {}", gateway.address, gateway.vpc);
    [private, format!("elastic address {}", gateway.elastic)]
}

/// Its number, as an interface has one.
pub fn number(id: NatGatewayId) -> u64 {
    id_number(&id.digits()) ^ NOT_AN_INTERFACE
}

pub fn add(desired: &Desired, slots: &mut Slots, tables: &mut Tables) -> Result<(), Error> {
    for gateway in &desired.nat_gateways {
        let (address, public) = (u32::from(gateway.address), u32::from(gateway.elastic));
        let (id, vpc) = (number(gateway.id), id_number(&gateway.vpc.digits()));
        let slot = slots.slot(id)?;
        let none = Interface::zeroed();
        let (ingress, egress) = (POLICY_NONE, POLICY_NONE);
        let interface =
            Interface { id, vpc, slot, address, elastic: public, ingress, egress, ..none };
        let nat = gateway.ports_max.map_or(PORTS_MAX, Into::into);
        tables.elastics.insert(public, Elastic { interface, address, nat });
        // Nothing answers there, and no interface has it.
        let local = Local { identity: 0, ifindex: 0, service: 0, elastic: 0, zero: 0 };
        tables.locals.insert(LocalKey { vpc, address, zero: 0 }, local);
        tables.names.nat_gateways.insert(public, gateway.id);
    }
    Ok(())
}

impl Tables {
    /// The records of NAT gateways, by their public addresses.
    pub fn nat_gateways(&self) -> impl Iterator<Item = (u32, &Interface)> {
        let gateways = self.elastics.iter().filter(|(_, elastic)| elastic.nat != 0);
        gateways.map(|(public, elastic)| (*public, &elastic.interface))
    }

    /// What the sender's packet to a destination becomes behind a NAT gateway. `port`: the one
    /// that was found for it; 0: none is told.
    pub fn translated(&self, ifindex: u32, to: IpAddr, port: u16) -> Option<Translated> {
        self.routed(ifindex, to)?;
        let sender = self.interfaces.get(&ifindex)?;
        let (_, hop) = self.hop(sender.routes, to)?;
        let gateway = if hop.kind == NAT { self.names.nat_gateways.get(&hop.to) } else { None };
        let port = (port != 0).then_some(port);
        Some(Translated { gateway: *gateway?, address: hop.to.into(), port })
    }
}
