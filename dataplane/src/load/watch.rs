//! What the programs tell of single packets (`ebpf::event`): the daemon's end.

use std::collections::BTreeMap;
use std::io;

use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use ebpf::event::{HitKey, Pace, Tally, TallyKey, Wanted};
use model::{Direction, RuleId};

use super::Error;
use super::maps::map_of_object;
use super::syscall::Map;
use crate::compile::Tables;

/// Flows that each rule let in.
pub type Hits = BTreeMap<RuleId, u64>;

#[derive(Debug)]
pub struct Watch {
    wanted: Map<u32, Wanted>,
    pace: Map<u32, Pace>,
    pub(super) hits: Map<HitKey, u64>,
    tallies: Map<TallyKey, Tally>,
    /// Of rules that have had another place.
    earlier: Hits,
    cpus: usize,
}

impl Watch {
    pub fn open(bpf: &Ebpf) -> Result<Self, Error> {
        Ok(Self {
            wanted: map_of_object(bpf, "WANTED")?,
            pace: map_of_object(bpf, "PACE")?,
            hits: map_of_object(bpf, "HITS")?,
            tallies: map_of_object(bpf, "TALLIES")?,
            earlier: Hits::new(),
            cpus: aya::util::nr_cpus().map_err(|(path, e)| Error::new("read", path, e))?,
        })
    }

    pub fn want(&self, wanted: Wanted) -> Result<(), Error> {
        self.wanted.put(&0, &wanted).map_err(|e| Error::new("change", "WANTED", e))
    }

    /// Of all CPUs: events left out, and packets that found no place for their tally.
    pub fn lost(&self) -> Result<(u64, u64), Error> {
        let paces = self.pace.every_cpu(0, self.cpus);
        let paces = paces.map_err(|e| Error::new("read", "PACE", e))?;
        Ok(paces.iter().fold((0, 0), |(e, t), p| (e + p.left_out, t + p.untallied)))
    }

    /// Takes all tallies out. A flow goes on under a new one.
    pub fn take_tallies(&self) -> Result<Vec<(TallyKey, Tally)>, Error> {
        let failed = |e| Error::new("read", "TALLIES", e);
        let mut taken = Vec::new();
        for (key, _) in self.tallies.entries().map_err(failed)? {
            if let Some(tally) = self.tallies.take(&key).map_err(failed)? {
                taken.push((key, tally));
            }
        }
        Ok(taken)
    }

    /// Called when rules have changed their places, with where they were: counts under their
    /// old ones. A flow let in between the change and the call counts for the rule whose place
    /// its own has now.
    pub fn harvest(&mut self, tables: &Tables) -> Result<(), Error> {
        if tables.names.rules.is_empty() {
            return Ok(());
        }
        let failed = |e: io::Error| Error::new("read", "HITS", e);
        for (key, _) in self.hits.entries().map_err(failed)? {
            let count = self.hits.take(&key).map_err(failed)?.unwrap_or(0);
            if let Some(rule) = rule(tables, &key) {
                *self.earlier.entry(rule).or_default() += count;
            }
        }
        Ok(())
    }

    /// Flows that each rule has let in; a rule that is not named let in none.
    pub fn hits(&self, tables: &Tables) -> Result<Hits, Error> {
        let mut hits = self.earlier.clone();
        let entries = self.hits.entries().map_err(|e| Error::new("read", "HITS", e))?;
        for (key, count) in entries {
            if let Some(rule) = rule(tables, &key) {
                *hits.entry(rule).or_default() += count;
            }
        }
        Ok(hits)
    }

    /// What an earlier daemon had counted.
    pub fn remember(&mut self, earlier: Hits) {
        self.earlier = earlier;
    }

    pub fn earlier(&self) -> &Hits {
        &self.earlier
    }
}

fn rule(tables: &Tables, key: &HitKey) -> Option<RuleId> {
    let direction = if key.direction == 1 { Direction::Egress } else { Direction::Ingress };
    let interface = tables.interfaces.values().find(|i| i.slot == key.slot)?;
    named_rule(tables, interface, direction, key.rule)
}

/// The rule's id, by its place in an interface's policy, from 1.
pub fn named_rule(
    tables: &Tables,
    interface: &ebpf::layout::Interface,
    direction: Direction,
    place: u16,
) -> Option<RuleId> {
    let place = usize::from(place).checked_sub(1)?;
    tables.names.rules.get(&(interface.ifindex, direction))?.get(place).copied()
}

/// A ring of the object's, once.
pub fn ring(bpf: &mut Ebpf, name: &str) -> Result<RingBuf<MapData>, Error> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "the object has no such map");
    let map = bpf.take_map(name).ok_or_else(missing);
    let map = map.map_err(|e| Error::new("open", name, e))?;
    RingBuf::try_from(map).map_err(|e| Error::new("open", name, e))
}
