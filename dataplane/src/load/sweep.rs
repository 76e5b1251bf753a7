//! Ages flows. A flow that was silent too long is as good as absent to the
//! programs; the sweep gives its place back.
//!
//! A packet that comes between our look and our removal makes the flow young
//! again and is forgotten with it; its next packet is judged by the rules anew.
//! That window is some microseconds at the end of an idle time of minutes or days.

use std::collections::BTreeMap;
use std::io;

use bytemuck::Pod;
use ebpf::flow::{alive, may_yield, seconds};
use ebpf::layout::{FLOWS_MAX, Flow, FlowKey, Interface};

use super::Error;
use super::maps::Maps;
use super::syscall::Map;
use crate::compile::Tables;

/// Entries looked at in one call: about a millisecond, and a full table in a minute.
const SLICE: usize = 4096;
/// Entries asked of the kernel at once; a hash bucket must fit.
const BATCH: usize = 1024;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    pub looked_at: u64,
    pub removed: u64,
    /// Tracked flows after the last full pass.
    pub flows: u64,
}

/// One pass goes through both families' tables, one after the other.
#[derive(Debug, Default)]
pub struct Sweep {
    cursor: Option<u32>,
    /// Whether the pass has come to the IPv6 flows.
    second: bool,
    /// Seen alive in this pass.
    seen: u64,
    flows: u64,
}

impl Sweep {
    pub fn slice(&mut self, maps: &Maps, tables: &Tables) -> Result<Swept, Error> {
        let now_s = now_s().map_err(|e| Error::new("read", "clock", e))?;
        let interfaces: BTreeMap<u64, &Interface> =
            tables.interfaces.values().map(|i| (i.id, i)).collect();
        let mut swept = Swept { flows: self.flows, ..Swept::default() };
        for _ in 0..SLICE / BATCH {
            match self.second {
                false => self.batch(maps, &maps.flows, &interfaces, now_s, &mut swept)?,
                true => self.batch(maps, &maps.flows6, &interfaces, now_s, &mut swept)?,
            }
            if self.cursor.is_none() {
                self.second = !self.second;
                if !self.second {
                    self.flows = std::mem::take(&mut self.seen);
                    swept.flows = self.flows;
                    break;
                }
            }
        }
        Ok(swept)
    }

    fn batch<A: ebpf::Ip>(
        &mut self,
        maps: &Maps,
        flows: &Map<FlowKey<A>, Flow>,
        interfaces: &BTreeMap<u64, &Interface>,
        now_s: u32,
        swept: &mut Swept,
    ) -> Result<(), Error>
    where
        FlowKey<A>: Pod,
    {
        let failed = |e| Error::new("sweep", "FLOWS", e);
        let slice = flows.slice(self.cursor, BATCH).map_err(failed)?;
        let mut crowded = BTreeMap::new();
        let all_crowded = self.flows > u64::from(FLOWS_MAX) / 2;
        for (key, flow) in &slice.entries {
            swept.looked_at += 1;
            let interface = interfaces.get(&key.interface);
            let stays = match interface {
                Some(interface) if alive(flow, key.protocol, interface, now_s) => {
                    !may_yield(flow, now_s)
                        || !(all_crowded || is_crowded(maps, interface, &mut crowded)?)
                }
                _ => false,
            };
            if stays {
                self.seen += 1;
            } else if flows.remove(key).map_err(failed)? {
                swept.removed += 1;
                if let Some(interface) = interface {
                    self.give_back(maps, interface.slot)?;
                }
            }
        }
        self.cursor = slice.cursor;
        Ok(())
    }

    /// A slice, and whether it was the last of a pass.
    pub fn whole_slice(&mut self, maps: &Maps, tables: &Tables) -> Result<(Swept, bool), Error> {
        let swept = self.slice(maps, tables)?;
        Ok((swept, self.cursor.is_none() && !self.second))
    }

    /// Nobody else writes `SWEPT`.
    fn give_back(&mut self, maps: &Maps, slot: u32) -> Result<(), Error> {
        let failed = |e| Error::new("count", "SWEPT", e);
        let before = maps.swept.get(&slot).map_err(failed)?.unwrap_or(0);
        maps.swept.put(&slot, &(before + 1)).map_err(failed)
    }
}

/// Whether half of the flows that the interface may have are open, asked once a batch.
fn is_crowded(
    maps: &Maps,
    interface: &Interface,
    known: &mut BTreeMap<u32, bool>,
) -> Result<bool, Error> {
    if let Some(crowded) = known.get(&interface.slot) {
        return Ok(*crowded);
    }
    let crowded = maps.flows_open(interface.slot)? > u64::from(interface.flows_max) / 2;
    known.insert(interface.slot, crowded);
    Ok(crowded)
}

/// The programs' clock.
pub fn now_s() -> io::Result<u32> {
    use nix::time::{ClockId, clock_gettime};
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC_COARSE)?;
    Ok(seconds(std::time::Duration::from(now).as_nanos() as u64))
}
