//! What programs have built up in the maps of another layout, on its way to ours: flows,
//! half-open ones, ports of NAT gateways, counters. Policies and addresses are made anew from the desired state.
//!
//! ```text
//!   new maps written ─▶ copy, until little is new ─▶ links exchanged ─▶ copy ─▶ old maps removed
//!      old programs write the old maps ──────────────────┘└── new programs write ours
//! ```
//! Nothing is lost between: a flow that an old program changed after its copy is copied
//! once more after the exchange, and what ours know better by then stays. A death in the
//! midst is mended by doing all of it again: nothing is put over what is newer, nor added twice.

mod half;
mod ports;

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::PathBuf;

use aya::maps::MapData;
use bytemuck::Pod;
use ebpf::V6;
use ebpf::flow;
use ebpf::layout::{Flow, FlowKey, Interface, Quota};
use ebpf::rate::Levels;

use super::Error;
use super::maps::Maps;
use super::pins::Pins;
use super::shape::{Layout, Shape};
use super::sweep::now_s;
use super::syscall::{Bytes, Map, pin_text};
use super::watch::Watch;
use crate::compile::Tables;

/// The layout of the maps by the words of [`Layout`].
pub const SHAPES: &str = "SHAPES";
/// Entries asked of the kernel at once.
const BATCH: usize = 1024;
/// Copies before the exchange, while each still finds this many new flows.
const ROUNDS_MAX: usize = 4;
const NEWS: u64 = 64;
/// Stands in what was opened and in what was swept, so that flows found after the
/// exchange are counted in the second, which no program writes.
const QUOTA_BASE: u64 = 1 << 32;

/// The layout of those that did not say: as it was when this was first written down.
const UNSAID: &str = "\
INTERFACES v1 key 4 ifindex@0+4 value 96 id@0+8 slot@28+4
FLOWS v1 key 24 interface@0+8 local@8+4 remote@12+4 local_port@16+2 remote_port@18+2 protocol@20+1 \
value 8 seen_s@0+4 rule@4+2 phase@6+1 flags@7+1
HALF_FLOWS v1 key 4 bucket@0+4 value 128 places@0+128
HITS v1 key 8 slot@0+4 rule@4+2 direction@6+2 value 8 flows@0+8";

/// Writes down what our maps look like.
pub fn describe(pins: &Pins) -> Result<(), Error> {
    let path = pins.map(SHAPES);
    super::pins::absent_is_fine(fs::remove_file(&path), &path)?;
    pin_text(&path, &Layout::own().to_string()).map_err(|e| Error::new("pin", path.display(), e))
}

/// What was carried over, for the log.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Carried {
    pub flows: u64,
    pub half_flows: u64,
}

pub struct Carry<'a> {
    own: Layout,
    sources: Vec<Source>,
    interfaces: BTreeMap<u64, &'a Interface>,
    seed: u64,
    cpus: usize,
    carried: Carried,
}

/// The maps of one other layout.
struct Source {
    folder: PathBuf,
    layout: Layout,
    /// Its counter slots, and ours of the same interface.
    slots: BTreeMap<u32, u32>,
    /// Counters as they were when last looked at, by our index.
    counted: BTreeMap<u32, Vec<u64>>,
}

impl<'a> Carry<'a> {
    pub fn open(pins: &Pins, tables: &'a Tables) -> Result<Self, Error> {
        let interfaces: BTreeMap<u64, &Interface> =
            tables.interfaces.values().map(|i| (i.id, i)).collect();
        let cpus = aya::util::nr_cpus().map_err(|(path, e)| Error::new("read", path, e))?;
        let mut sources = Vec::new();
        for folder in pins.other_maps()? {
            sources.extend(Source::open(folder, &interfaces)?);
        }
        let (own, seed) = (Layout::own(), tables.config.seed);
        Ok(Self { own, sources, interfaces, seed, cpus, carried: Carried::default() })
    }

    /// Before any program of ours reads what is copied.
    pub fn before(&mut self, maps: &Maps, watch: &Watch) -> Result<(), Error> {
        let mut added = BTreeMap::new();
        for _ in 0..ROUNDS_MAX {
            self.half_flows(maps)?;
            let found = self.flows(maps, &mut added)?;
            if found < NEWS {
                break;
            }
        }
        let mut ports = BTreeMap::new();
        self.ports(maps, &mut ports)?;
        self.open_ports(maps, &ports)?;
        self.hits(watch)?;
        self.levels(maps)?;
        self.counters(maps)?;
        self.open_quotas(maps, &added)
    }

    /// After our programs have taken over: what came meanwhile.
    pub fn after(mut self, maps: &Maps) -> Result<Carried, Error> {
        let mut added = BTreeMap::new();
        self.half_flows(maps)?;
        self.flows(maps, &mut added)?;
        self.raise_quotas(maps, &added)?;
        let mut ports = BTreeMap::new();
        self.ports(maps, &mut ports)?;
        self.raise_ports(maps, &ports)?;
        self.levels(maps)?;
        self.counters(maps)?;
        Ok(self.carried)
    }

    fn flows(&mut self, maps: &Maps, added: &mut BTreeMap<u64, u64>) -> Result<u64, Error> {
        let mut found = 0;
        for source in &self.sources {
            found += self.flows_of(
                source,
                "FLOWS",
                &maps.flows,
                |k: &FlowKey| (k.interface, k.protocol),
                added,
            )?;
        }
        for source in &self.sources {
            found += self.flows_of(
                source,
                "FLOWS6",
                &maps.flows6,
                |k: &FlowKey<V6>| (k.interface, k.protocol),
                added,
            )?;
        }
        self.carried.flows += found;
        Ok(found)
    }

    /// Flows of one map, whatever its key is made of; how many were not there yet.
    fn flows_of<K: Pod>(
        &self,
        source: &Source,
        name: &str,
        to: &Map<K, Flow>,
        whose: impl Fn(&K) -> (u64, u8),
        added: &mut BTreeMap<u64, u64>,
    ) -> Result<u64, Error> {
        let failed = |e| Error::new("carry over", name, e);
        let Some((from, old)) = source.map(name, &self.own, 1)? else { return Ok(0) };
        let own = self.own.find(name).expect("it is described");
        let (now_s, mut found) = (now_s().map_err(failed)?, 0);
        for slice in from.slices(BATCH) {
            for (key, flow) in &slice.map_err(failed)? {
                let key = own.key.converted(&old.key, key);
                let flow = own.value.converted(&old.value, flow);
                let (Some(key), Some(flow)) = (key, flow) else { continue };
                let key: K = bytemuck::pod_read_unaligned(&key);
                let flow: Flow = bytemuck::pod_read_unaligned(&flow);
                let (id, protocol) = whose(&key);
                let interface = self.interfaces.get(&id);
                if !interface.is_some_and(|i| flow::alive(&flow, protocol, i, now_s)) {
                    continue;
                }
                if bring(to, &key, flow).map_err(failed)? {
                    *added.entry(id).or_default() += 1;
                    found += 1;
                }
            }
        }
        Ok(found)
    }

    /// Counters of rules. Those of the moments between are not worth a lock.
    fn hits(&self, watch: &Watch) -> Result<(), Error> {
        const NAME: &str = "HITS";
        let failed = |e| Error::new("carry over", NAME, e);
        for source in &self.sources {
            let Some((from, old)) = source.map(NAME, &self.own, 1)? else { continue };
            let own = self.own.find(NAME).expect("it is described");
            for slice in from.slices(BATCH) {
                for (key, value) in &slice.map_err(failed)? {
                    let key = own.key.converted(&old.key, key);
                    let count = own.value.converted(&old.value, value);
                    let (Some(key), Some(count)) = (key, count) else { continue };
                    let mut key: ebpf::event::HitKey = bytemuck::pod_read_unaligned(&key);
                    let Some(slot) = source.slots.get(&key.slot) else { continue };
                    key.slot = *slot;
                    let count = bytemuck::pod_read_unaligned(&count);
                    watch.hits.insert(&key, &count).map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    /// Packets by reason. An addition of ours and one of a program at the same moment
    /// may lose a packet's count; no verdict hangs on it.
    fn counters(&mut self, maps: &Maps) -> Result<(), Error> {
        let failed = |e| Error::new("carry over", "COUNTERS", e);
        for source in &mut self.sources {
            let Some((from, _)) = source.map("COUNTERS", &self.own, self.cpus)? else { continue };
            let (old, own) = (&source.layout.reasons, &self.own.reasons);
            for (slot, own_slot) in &source.slots {
                for (_, number) in &old.numbers {
                    let Some(own_number) = old.in_other(*number, own) else { continue };
                    let key = (slot * old.block + number).to_ne_bytes();
                    let Some(now) = from.get(&key).map_err(failed)? else { continue };
                    let now: Vec<u64> =
                        now.chunks_exact(8).map(bytemuck::pod_read_unaligned).collect();
                    let index = own_slot * own.block + own_number;
                    let before = match source.counted.get(&index) {
                        Some(before) => before.clone(),
                        // Nothing, but for one that died in the midst of this.
                        None => maps.counters.every_cpu(index, self.cpus).map_err(failed)?,
                    };
                    let more: Vec<u64> =
                        now.iter().zip(&before).map(|(n, b)| n.saturating_sub(*b)).collect();
                    if more.iter().any(|n| *n > 0) {
                        maps.counters.add(index, &more).map_err(failed)?;
                    }
                    source.counted.insert(index, now);
                }
            }
        }
        Ok(())
    }

    /// What was spent on either side stays spent.
    fn levels(&self, maps: &Maps) -> Result<(), Error> {
        const NAME: &str = "LEVELS";
        let failed = |e| Error::new("carry over", NAME, e);
        let own = self.own.find(NAME).expect("it is described");
        for source in &self.sources {
            let Some((from, old)) = source.map(NAME, &self.own, 1)? else { continue };
            for (slot, own_slot) in &source.slots {
                let record = from.get(&slot.to_ne_bytes()).map_err(failed)?;
                let record = record.and_then(|r| own.value.converted(&old.value, &r));
                let Some(record) = record else { continue };
                let theirs: Levels = bytemuck::pod_read_unaligned(&record);
                let ours = maps.levels.get(own_slot).map_err(failed)?.unwrap_or_default();
                let later = |i| u64::max(ours.full_at[i], theirs.full_at[i]);
                let both = Levels { full_at: std::array::from_fn(later) };
                if both != ours {
                    maps.levels.put(own_slot, &both).map_err(failed)?;
                }
            }
        }
        Ok(())
    }

    fn open_quotas(&self, maps: &Maps, added: &BTreeMap<u64, u64>) -> Result<(), Error> {
        let failed = |e| Error::new("carry over", "QUOTAS", e);
        for (id, interface) in &self.interfaces {
            let slot = &interface.slot;
            let quota = maps.quotas.get(slot).map_err(failed)?;
            let quota = quota.unwrap_or(Quota { opened: 0, closed: 0 });
            let swept = maps.swept.get(slot).map_err(failed)?.unwrap_or(0);
            let opened = quota.opened + QUOTA_BASE + added.get(id).copied().unwrap_or(0);
            maps.quotas.put(slot, &Quota { opened, ..quota }).map_err(failed)?;
            maps.swept.put(slot, &(swept + QUOTA_BASE)).map_err(failed)?;
        }
        Ok(())
    }

    fn raise_quotas(&self, maps: &Maps, added: &BTreeMap<u64, u64>) -> Result<(), Error> {
        let failed = |e| Error::new("carry over", "SWEPT", e);
        for (id, count) in added {
            let Some(interface) = self.interfaces.get(id) else { continue };
            let swept = maps.swept.get(&interface.slot).map_err(failed)?.unwrap_or(0);
            maps.swept.put(&interface.slot, &swept.saturating_sub(*count)).map_err(failed)?;
        }
        Ok(())
    }
}

impl Source {
    /// `None`: it says of itself what nobody understands.
    fn open(
        folder: PathBuf,
        interfaces: &BTreeMap<u64, &Interface>,
    ) -> Result<Option<Self>, Error> {
        let path = folder.join(SHAPES);
        let text = if path.exists() { read_text(&path)? } else { UNSAID.to_owned() };
        let Some(layout) = Layout::parse(&text) else {
            let folder = folder.display();
            tracing::warn!(%folder, "its layout cannot be read: its flows begin anew");
            return Ok(None);
        };
        let mut source = Self { folder, layout, slots: BTreeMap::new(), counted: BTreeMap::new() };
        source.slots = source.own_slots(interfaces)?;
        Ok(Some(source))
    }

    fn own_slots(
        &self,
        interfaces: &BTreeMap<u64, &Interface>,
    ) -> Result<BTreeMap<u32, u32>, Error> {
        const NAME: &str = "INTERFACES";
        let mut slots = BTreeMap::from([(0, 0)]);
        let Some((map, shape)) = self.map(NAME, &Layout::own(), 1)? else { return Ok(slots) };
        for slice in map.slices(BATCH) {
            for (_, record) in &slice.map_err(|e| Error::new("read", NAME, e))? {
                let id = shape.value.number("id", record);
                let slot = shape.value.number("slot", record).and_then(|s| u32::try_from(s).ok());
                if let (Some(own), Some(slot)) = (id.and_then(|id| interfaces.get(&id)), slot) {
                    slots.insert(slot, own.slot);
                }
            }
        }
        Ok(slots)
    }

    /// A map and its shape; `None` where it has none, or one that means something else.
    fn map(&self, name: &str, own: &Layout, cpus: usize) -> Result<Option<(Bytes, &Shape)>, Error> {
        let path = self.folder.join(name);
        let (Some(shape), true) = (self.layout.find(name), path.exists()) else { return Ok(None) };
        let failed = |e: io::Error| Error::new("open", path.display(), e);
        let map = MapData::from_pin(&path).map_err(|e| Error::new("open", path.display(), e))?;
        let map = Bytes::open(map.fd(), cpus).map_err(failed)?;
        let version = own.find(name).map(|s| s.version);
        let sizes = (map.key_len, map.value_len) == (shape.key.len, shape.value.len);
        if Some(shape.version) == version && sizes {
            return Ok(Some((map, shape)));
        }
        tracing::warn!(map = %path.display(), "it means something else: what is in it stays behind");
        Ok(None)
    }
}

fn read_text(path: &std::path::Path) -> Result<String, Error> {
    let map = MapData::from_pin(path).map_err(|e| Error::new("open", path.display(), e))?;
    let failed = |e: io::Error| Error::new("read", path.display(), e);
    let map = Bytes::open(map.fd(), 1).map_err(failed)?;
    let bytes = map.get(&0_u32.to_ne_bytes()).map_err(failed)?.unwrap_or_default();
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Whether it was not there yet. What both know is joined.
fn bring<K: Pod>(to: &Map<K, Flow>, key: &K, flow: Flow) -> io::Result<bool> {
    match to.get(key)? {
        None => match to.insert(key, &flow) {
            // The table is smaller than the old one, and full: who is left begins anew.
            Err(error) if error.raw_os_error() == Some(libc::E2BIG) => Ok(false),
            inserted => inserted,
        },
        Some(ours) => {
            let both = joined(ours, flow);
            if both != ours {
                to.put(key, &both)?;
            }
            Ok(false)
        }
    }
}

/// One flow as two programs have seen parts of it: a life goes one way only.
fn joined(ours: Flow, theirs: Flow) -> Flow {
    Flow {
        seen_s: ours.seen_s.max(theirs.seen_s),
        phase: ours.phase.max(theirs.phase),
        flags: ours.flags | theirs.flags,
        ..ours
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_two_have_seen_of_a_flow_is_joined_and_never_goes_back() {
        let ours =
            Flow { seen_s: 9, rule: 4, phase: flow::ESTABLISHED, flags: flow::REMOTE_CLOSED };
        let theirs =
            Flow { seen_s: 7, rule: 5, phase: flow::CLOSING, flags: flow::INSTANCE_CLOSED };
        let both = joined(ours, theirs);
        assert_eq!((both.seen_s, both.rule, both.phase), (9, 4, flow::CLOSING));
        assert_eq!(both.flags, flow::REMOTE_CLOSED | flow::INSTANCE_CLOSED);
        assert_eq!(joined(both, theirs), both);
    }

    #[test]
    fn the_layout_that_said_nothing_is_the_one_that_was() {
        let unsaid = Layout::parse(UNSAID).unwrap();
        assert_eq!(unsaid.find("FLOWS").unwrap().key.len, 24);
        assert_eq!(unsaid.find("INTERFACES").unwrap().value.fields.len(), 2);
    }
}
