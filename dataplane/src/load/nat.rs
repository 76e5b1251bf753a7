//! Ports of NAT gateways are given back when their connections have been silent too long, when
//! their interface is gone, or their gateway.
//!
//! What a packet writes between our look and our removal is lost: some microseconds at the end
//! of minutes, as with flows.

use std::collections::BTreeMap;

use ebpf::port::{PortHolder, PortKey, Translation};

use super::Error;
use super::maps::Maps;
use super::sweep::now_s;
use crate::compile::Tables;

/// Entries looked at in one call, and asked of the kernel at once.
const SLICE: usize = 8192;
const BATCH: usize = 1024;
/// The programs put the port first and then what leads to it: so young, that may be missing.
const OPENING_S: u32 = 2;

#[derive(Debug, Default)]
pub struct Sweep {
    cursor: Option<u32>,
    /// Connections of each gateway seen alive in this pass, by its address.
    seen: BTreeMap<u32, u64>,
    /// And in the one before.
    counted: BTreeMap<u32, u64>,
}

impl Sweep {
    /// A bounded part; answers how many ports were given back, and whether a pass has ended.
    pub fn slice(&mut self, maps: &Maps, tables: &Tables) -> Result<(u64, bool), Error> {
        let failed = |e| Error::new("sweep", "NAT_PORTS", e);
        let now_s = now_s().map_err(|e| Error::new("read", "clock", e))?;
        let slots: BTreeMap<u64, u32> =
            tables.interfaces.values().map(|i| (i.id, i.slot)).collect();
        let mut removed = 0;
        for _ in 0..SLICE / BATCH {
            let slice = maps.nat_ports.slice(self.cursor, BATCH).map_err(failed)?;
            for (key, holder) in &slice.entries {
                let slot = slots.get(&holder.interface);
                let gateway = tables.elastics.get(&key.public).is_some_and(|e| e.nat != 0);
                if gateway && slot.is_some() && held(maps, key, holder, now_s)? {
                    *self.seen.entry(key.public).or_default() += 1;
                } else {
                    removed += u64::from(give_back(maps, key, holder, slot)?);
                }
            }
            self.cursor = slice.cursor;
            if self.cursor.is_none() {
                self.counted = std::mem::take(&mut self.seen);
                return Ok((removed, true));
            }
        }
        Ok((removed, false))
    }

    /// Connections through a gateway, as the last whole pass counted them.
    pub fn connections(&self, public: u32) -> u64 {
        self.counted.get(&public).copied().unwrap_or(0)
    }
}

fn held(maps: &Maps, key: &PortKey, holder: &PortHolder, now_s: u32) -> Result<bool, Error> {
    if !holder.alive(now_s) {
        return Ok(false);
    }
    let young = now_s.saturating_sub(holder.seen_s) <= OPENING_S;
    Ok(young || leads_to(maps, key, holder)?)
}

/// Whether the connection's own packets find this port.
pub fn leads_to(maps: &Maps, key: &PortKey, holder: &PortHolder) -> Result<bool, Error> {
    let found = maps.nat_flows.get(&holder.flow(key));
    let found = found.map_err(|e| Error::new("sweep", "NAT_FLOWS", e))?;
    Ok(found.is_some_and(|t: Translation| t.public == key.public && t.port == key.port))
}

/// `slot`: of the interface that has it, where that one is here.
pub fn give_back(
    maps: &Maps,
    key: &PortKey,
    holder: &PortHolder,
    slot: Option<&u32>,
) -> Result<bool, Error> {
    let failed = |e| Error::new("sweep", "NAT_PORTS", e);
    if leads_to(maps, key, holder)? {
        maps.nat_flows.remove(&holder.flow(key)).map_err(failed)?;
    }
    let removed = maps.nat_ports.remove(key).map_err(failed)?;
    if let (true, Some(slot)) = (removed, slot) {
        // Nobody else writes there.
        let before = maps.nat_swept.get(slot).map_err(failed)?.unwrap_or(0);
        maps.nat_swept.put(slot, &(before + 1)).map_err(failed)?;
    }
    Ok(removed)
}
