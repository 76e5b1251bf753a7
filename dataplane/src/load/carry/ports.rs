//! Ports of NAT gateways out of another layout. What leads to a port is made anew from it.

use std::collections::BTreeMap;

use ebpf::port::{PortHolder, PortKey, Translation};

use super::super::Error;
use super::super::maps::Maps;
use super::super::sweep::now_s;
use super::{BATCH, Carry, QUOTA_BASE};

const NAME: &str = "NAT_PORTS";

impl Carry<'_> {
    /// Adds to `added` what was not there yet, by the interface's number.
    pub(super) fn ports(&self, maps: &Maps, added: &mut BTreeMap<u64, u64>) -> Result<(), Error> {
        let failed = |e| Error::new("carry over", NAME, e);
        let own = self.own.find(NAME).expect("it is described");
        let now_s = now_s().map_err(failed)?;
        for source in &self.sources {
            let Some((from, old)) = source.map(NAME, &self.own, 1)? else { continue };
            for slice in from.slices(BATCH) {
                for (key, holder) in &slice.map_err(failed)? {
                    let key = own.key.converted(&old.key, key);
                    let holder = own.value.converted(&old.value, holder);
                    let (Some(key), Some(holder)) = (key, holder) else { continue };
                    let key: PortKey = bytemuck::pod_read_unaligned(&key);
                    let holder: PortHolder = bytemuck::pod_read_unaligned(&holder);
                    let known = self.interfaces.contains_key(&holder.interface);
                    if known && holder.alive(now_s) && bring(maps, &key, &holder)? {
                        *added.entry(holder.interface).or_default() += 1;
                    }
                }
            }
        }
        Ok(())
    }

    /// Before any program of ours counts.
    pub(super) fn open_ports(&self, maps: &Maps, added: &BTreeMap<u64, u64>) -> Result<(), Error> {
        let failed = |e| Error::new("carry over", "NAT_OPENED", e);
        for (id, interface) in &self.interfaces {
            let slot = &interface.slot;
            let opened = maps.nat_opened.get(slot).map_err(failed)?.unwrap_or(0);
            let swept = maps.nat_swept.get(slot).map_err(failed)?.unwrap_or(0);
            let opened = opened + QUOTA_BASE + added.get(id).copied().unwrap_or(0);
            maps.nat_opened.put(slot, &opened).map_err(failed)?;
            maps.nat_swept.put(slot, &(swept + QUOTA_BASE)).map_err(failed)?;
        }
        Ok(())
    }

    /// After the exchange only what was swept is ours to write.
    pub(super) fn raise_ports(&self, maps: &Maps, added: &BTreeMap<u64, u64>) -> Result<(), Error> {
        let failed = |e| Error::new("carry over", "NAT_SWEPT", e);
        for (id, count) in added {
            let Some(interface) = self.interfaces.get(id) else { continue };
            let swept = maps.nat_swept.get(&interface.slot).map_err(failed)?.unwrap_or(0);
            maps.nat_swept.put(&interface.slot, &swept.saturating_sub(*count)).map_err(failed)?;
        }
        Ok(())
    }
}

/// Whether it was not there yet. What both know is joined; whose port it is here stays.
fn bring(maps: &Maps, key: &PortKey, holder: &PortHolder) -> Result<bool, Error> {
    let failed = |e| Error::new("carry over", NAME, e);
    let flow = holder.flow(key);
    let Some(ours) = maps.nat_ports.get(key).map_err(failed)? else {
        // The table is smaller than the old one, and full: who is left begins anew.
        let inserted = match maps.nat_ports.insert(key, holder) {
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => false,
            inserted => inserted.map_err(failed)?,
        };
        if inserted {
            let PortKey { public, port, .. } = *key;
            let leads = Translation { public, seen_s: holder.seen_s, port, zero: [0; 6] };
            maps.nat_flows.insert(&flow, &leads).map_err(failed)?;
        }
        return Ok(inserted);
    };
    if ours.is_of(&flow) && holder.seen_s > ours.seen_s {
        let both = PortHolder { flags: ours.flags | holder.flags, ..*holder };
        maps.nat_ports.put(key, &both).map_err(failed)?;
    }
    Ok(false)
}
