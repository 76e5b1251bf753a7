//! An interface's ports at NAT gateways on their way to another host. A connection goes on there
//! where the gateway stands with the same address and the port is free; a port that another
//! holds is never taken from him.
//!
//! A connection that is left out keeps its flow: of TCP the gateway answers its next packet by a
//! RST, so that the instance learns of it at once; others take another port.

use std::collections::BTreeMap;
use std::io;
use std::net::Ipv4Addr;

use ebpf::flow::{ICMP, TCP, UDP};
use ebpf::layout::{Interface, LocalKey};
use ebpf::port::{
    CLOSED_IN, CLOSED_OUT, CONNECTIONS_AN_INTERFACE_MAX, FIRST, PortHolder, PortKey, RESET,
    Translation,
};
use rpc::dataplane::{LeftOut, MovedPort};

use super::super::maps::Maps;
use super::super::sweep::now_s;
use super::super::{Error, nat};
use super::BATCH;
use crate::compile::Tables;

pub fn export(
    maps: &Maps,
    tables: &Tables,
    interface: &Interface,
) -> Result<Vec<MovedPort>, Error> {
    let failed = |e| Error::new("export", "NAT_PORTS", e);
    let now_s = now_s().map_err(failed)?;
    let mut moved = Vec::new();
    for slice in maps.nat_ports.slices(BATCH) {
        for (key, holder) in &slice.map_err(failed)? {
            // The sweep takes those whose gateway is gone.
            let gateway = tables.names.nat_gateways.get(&key.public);
            let (true, Some(gateway)) = (holder.interface == interface.id, gateway) else {
                continue;
            };
            if holder.alive(now_s) && nat::leads_to(maps, key, holder)? {
                moved.push(MovedPort {
                    gateway: *gateway,
                    address: key.public.into(),
                    port: key.port,
                    protocol: key.protocol,
                    local: holder.local.into(),
                    remote: key.peer.into(),
                    local_port: holder.local_port,
                    remote_port: key.peer_port,
                    flags: holder.flags,
                    silent_s: now_s.saturating_sub(holder.seen_s),
                });
            }
        }
    }
    Ok(moved)
}

/// What no host wrote, in words.
pub fn wrong(moved: &[MovedPort]) -> Option<String> {
    if moved.len() > CONNECTIONS_AN_INTERFACE_MAX as usize {
        let most = CONNECTIONS_AN_INTERFACE_MAX;
        return Some(format!("{} ports of NAT gateways, but {most} are the most", moved.len()));
    }
    moved.iter().find_map(|m| {
        let MovedPort { gateway, port, protocol, flags, .. } = *m;
        let known = matches!(protocol, TCP | UDP | ICMP)
            && u32::from(port) >= FIRST
            && flags & !(CLOSED_OUT | CLOSED_IN | RESET) == 0;
        (!known).then(|| format!("{gateway}: protocol {protocol}, port {port}, flags {flags:#x}"))
    })
}

/// How many ports were taken, and why others were not. What is there already is neither.
pub fn import(
    maps: &Maps,
    tables: &Tables,
    interface: &Interface,
    moved: &[MovedPort],
) -> Result<(u64, BTreeMap<LeftOut, u64>), Error> {
    let failed = |e| Error::new("count", "NAT_OPENED", e);
    let now_s = now_s().map_err(|e| Error::new("read", "clock", e))?;
    let slots = tables.interfaces.values().map(|i| (i.id, i.slot)).collect();
    let here = Here { maps, tables, interface, slots, now_s };
    let (mut added, mut left_out) = (0, BTreeMap::new());
    let mut room = here.room()?;
    let done = moved.iter().try_for_each(|moved| {
        match here.take(moved, room > 0)? {
            Taken::Now => {
                added += 1;
                room -= 1;
            }
            Taken::Already => {}
            Taken::Not(why) => *left_out.entry(why).or_default() += 1,
        }
        Ok(())
    });
    let opened = maps.nat_opened.get(&interface.slot).map_err(failed)?.unwrap_or(0);
    // Its guest does not run here yet, so no program counts at this moment.
    maps.nat_opened.put(&interface.slot, &(opened + added)).map_err(failed)?;
    done.map(|()| (added, left_out))
}

enum Taken {
    Now,
    Already,
    Not(LeftOut),
}

/// The host that an interface has come to.
struct Here<'a> {
    maps: &'a Maps,
    tables: &'a Tables,
    interface: &'a Interface,
    /// By an interface's number.
    slots: BTreeMap<u64, u32>,
    now_s: u32,
}

impl Here<'_> {
    /// How many more connections the interface may have.
    fn room(&self) -> Result<u64, Error> {
        let failed = |e| Error::new("count", "NAT_OPENED", e);
        let slot = &self.interface.slot;
        let opened = self.maps.nat_opened.get(slot).map_err(failed)?.unwrap_or(0);
        let swept = self.maps.nat_swept.get(slot).map_err(failed)?.unwrap_or(0);
        let open = opened.saturating_sub(swept);
        Ok(u64::from(CONNECTIONS_AN_INTERFACE_MAX).saturating_sub(open))
    }

    fn take(&self, moved: &MovedPort, room: bool) -> Result<Taken, Error> {
        let public = u32::from(moved.address);
        let key = PortKey {
            public,
            peer: moved.remote.into(),
            port: moved.port,
            peer_port: moved.remote_port,
            protocol: moved.protocol,
            zero: [0; 3],
        };
        let seen_s = self.now_s.saturating_sub(moved.silent_s);
        let holder = holder(self.interface, moved, seen_s);
        if !self.has_gateway(moved) {
            return Ok(Taken::Not(LeftOut::NoGateway));
        }
        if !self.has_address(moved.local) {
            return Ok(Taken::Not(LeftOut::NoAddress));
        }
        // By its own measure: this host's clock may have begun since.
        if !(PortHolder { seen_s: 0, ..holder }).alive(moved.silent_s) {
            return Ok(Taken::Not(LeftOut::Silent));
        }
        let flow = holder.flow(&key);
        let failed = |e| Error::new("import", "NAT_FLOWS", e);
        if let Some(own) = self.maps.nat_flows.get(&flow).map_err(failed)? {
            let own = PortKey::of(&flow, own.public, own.port);
            if self.is_held(&own, |holder| holder.is_of(&flow))? {
                let same = own == key;
                return Ok(if same { Taken::Already } else { Taken::Not(LeftOut::OtherPort) });
            }
        }
        if self.is_held(&key, |_| true)? {
            return Ok(Taken::Not(LeftOut::PortTaken));
        }
        let leads = Translation { public, seen_s, port: moved.port, zero: [0; 6] };
        match room && self.put(&key, &holder, &leads)? {
            true => Ok(Taken::Now),
            false => Ok(Taken::Not(LeftOut::NoRoom)),
        }
    }

    /// The same one, of the interface's network.
    fn has_gateway(&self, moved: &MovedPort) -> bool {
        let public = u32::from(moved.address);
        let stands = self.tables.elastics.get(&public).filter(|elastic| elastic.nat != 0);
        self.tables.names.nat_gateways.get(&public) == Some(&moved.gateway)
            && stands.is_some_and(|elastic| elastic.interface.vpc == self.interface.vpc)
    }

    fn has_address(&self, address: Ipv4Addr) -> bool {
        let key = LocalKey { vpc: self.interface.vpc, address: address.into(), zero: 0 };
        let local = self.tables.locals.get(&key);
        local.is_some_and(|local| local.ifindex == self.interface.ifindex)
    }

    /// Whether somebody such has the port. Whose time is over gives it back.
    fn is_held(&self, key: &PortKey, who: impl Fn(&PortHolder) -> bool) -> Result<bool, Error> {
        let failed = |e| Error::new("import", "NAT_PORTS", e);
        let Some(holder) = self.maps.nat_ports.get(key).map_err(failed)? else { return Ok(false) };
        if holder.alive(self.now_s) {
            return Ok(who(&holder));
        }
        nat::give_back(self.maps, key, &holder, self.slots.get(&holder.interface))?;
        Ok(false)
    }

    /// The port first, as the programs do. Whether there was room.
    fn put(&self, key: &PortKey, holder: &PortHolder, leads: &Translation) -> Result<bool, Error> {
        let ports_failed = |e| Error::new("import", "NAT_PORTS", e);
        if !unless_full(self.maps.nat_ports.insert(key, holder)).map_err(ports_failed)? {
            return Ok(false);
        }
        let flow = holder.flow(key);
        let put = unless_full(self.maps.nat_flows.put(&flow, leads).map(|()| true));
        let put = put.map_err(|e| Error::new("import", "NAT_FLOWS", e));
        if !matches!(put, Ok(true)) {
            self.maps.nat_ports.remove(key).map_err(ports_failed)?;
        }
        put
    }
}

fn holder(interface: &Interface, moved: &MovedPort, seen_s: u32) -> PortHolder {
    let MovedPort { local_port, flags, .. } = *moved;
    PortHolder {
        interface: interface.id,
        local: moved.local.into(),
        seen_s,
        local_port,
        flags,
        zero: 0,
    }
}

fn unless_full(put: io::Result<bool>) -> io::Result<bool> {
    match put {
        Err(error) if error.raw_os_error() == Some(libc::E2BIG) => Ok(false),
        put => put,
    }
}
