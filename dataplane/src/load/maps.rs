//! The pinned maps: changed by [`Change`]s, and read back into [`Tables`].

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::Ebpf;
use aya::maps::MapData;
use ebpf::half::Bucket;
use ebpf::layout::{
    Config, Elastic, Flow, FlowKey, Holder, Hop, Interface, Local, LocalKey, Policy, Prefix,
    Prefix6, Quota, ROW_NONE, RouteKey, Six, Span, Step, Step6,
};
use ebpf::{REASONS_MAX, V6};

use ebpf::rate::{Levels, Rates};

use super::Error;
use super::pins::Pins;
use super::syscall::{self, Map};
use crate::compile::{Class, Content, Placed, Tables};
use crate::diff::Change;

/// Every map that is pinned.
pub const NAMES: [&str; 25] = [
    "CONFIG",
    "INTERFACES",
    "LOCALS",
    "ELASTICS",
    "POLICIES",
    "STEPS",
    "WORDS",
    "FLOWS",
    "HALF_FLOWS",
    "SIXES",
    "HOLDERS",
    "STEPS6",
    "FLOWS6",
    "HALF_FLOWS6",
    "BLOCKED6",
    "PROGRAMS",
    "ROUTES",
    "QUOTAS",
    "SWEPT",
    "BLOCKED",
    "RANGES",
    "COUNTERS",
    "HITS",
    "RATES",
    "LEVELS",
];

#[derive(Debug)]
pub struct Maps {
    config: Map<u32, Config>,
    interfaces: Map<u32, Interface>,
    locals: Map<LocalKey, Local>,
    elastics: Map<u32, Elastic>,
    policies: Map<u32, Policy>,
    steps: Map<u32, Step>,
    words: Map<u32, u64>,
    pub flows: Map<FlowKey, Flow>,
    pub half: Map<u32, Bucket>,
    sixes: Map<u32, Six>,
    holders: Map<V6, Holder>,
    steps6: Map<u32, Step6>,
    pub flows6: Map<FlowKey<V6>, Flow>,
    blocked6: Map<Prefix6, u32>,
    routes: Map<RouteKey, Hop>,
    pub quotas: Map<u32, Quota>,
    pub swept: Map<u32, u64>,
    blocked: Map<Prefix, u32>,
    ranges: Map<Prefix, u32>,
    pub counters: Map<u32, u64>,
    pub rates: Map<u32, Rates>,
    pub levels: Map<u32, Levels>,
    cpus: usize,
}

impl Maps {
    pub fn open(bpf: &Ebpf) -> Result<Self, Error> {
        Self::with(&|name| of_object(bpf, name))
    }

    /// Those that are pinned, without any object: to look at what is in force.
    pub fn open_pinned(pins: &Pins) -> Result<Self, Error> {
        Self::with(&|name| {
            let map = MapData::from_pin(pins.map(name));
            let map = map.map_err(|e| Error::new("open", pins.map(name).display(), e))?;
            map.fd().as_fd().try_clone_to_owned().map_err(|e| Error::new("open", name, e))
        })
    }

    fn with(bpf: Opener<'_>) -> Result<Self, Error> {
        Ok(Self {
            config: map(bpf, "CONFIG")?,
            interfaces: map(bpf, "INTERFACES")?,
            locals: map(bpf, "LOCALS")?,
            elastics: map(bpf, "ELASTICS")?,
            policies: map(bpf, "POLICIES")?,
            steps: map(bpf, "STEPS")?,
            words: map(bpf, "WORDS")?,
            flows: map(bpf, "FLOWS")?,
            half: map(bpf, "HALF_FLOWS")?,
            sixes: map(bpf, "SIXES")?,
            holders: map(bpf, "HOLDERS")?,
            steps6: map(bpf, "STEPS6")?,
            flows6: map(bpf, "FLOWS6")?,
            blocked6: map(bpf, "BLOCKED6")?,
            routes: map(bpf, "ROUTES")?,
            quotas: map(bpf, "QUOTAS")?,
            swept: map(bpf, "SWEPT")?,
            blocked: map(bpf, "BLOCKED")?,
            ranges: map(bpf, "RANGES")?,
            counters: map(bpf, "COUNTERS")?,
            rates: map(bpf, "RATES")?,
            levels: map(bpf, "LEVELS")?,
            cpus: aya::util::nr_cpus().map_err(|(path, e)| Error::new("read", path, e))?,
        })
    }

    /// Attachments are none of its business: they are `Loaded`'s.
    pub fn apply(&self, change: &Change) -> Result<(), Error> {
        let failed = |cause| Error::new("change", format!("{change:?}"), cause);
        match change {
            Change::PutPolicy { slot, policy } => self.put_policy(*slot, policy),
            Change::PutLocal(key, local) => self.locals.put(key, local),
            Change::PutHolder(address, holder) => self.holders.put(address, holder),
            Change::PutRoute(key, hop) => self.routes.put(key, hop),
            Change::RemoveRoute(key) => self.routes.remove(key).map(drop),
            Change::PutSix(ifindex, six) => self.sixes.put(ifindex, six),
            Change::Block6(prefix) => self.blocked6.put(prefix, &1),
            Change::ResetSlot(slot) => self.reset(*slot),
            Change::PutRates { slot, rates } => self.put_rates(*slot, rates),
            Change::PutInterface(interface) => self.interfaces.put(&interface.ifindex, interface),
            Change::PutElastic { address, elastic } => self.elastics.put(address, elastic),
            Change::Block(prefix) => self.blocked.put(prefix, &1),
            Change::PutRange { prefix, kind } => self.ranges.put(prefix, kind),
            Change::PutConfig(config) => self.config.put(&0, config),
            Change::RemoveElastic(address) => self.elastics.remove(address).map(drop),
            Change::RemoveInterface(ifindex) => self.interfaces.remove(ifindex).map(drop),
            Change::RemoveLocal(key) => self.locals.remove(key).map(drop),
            Change::RemoveHolder(address) => self.holders.remove(address).map(drop),
            Change::RemoveSix(ifindex) => self.sixes.remove(ifindex).map(drop),
            Change::Unblock6(prefix) => self.blocked6.remove(prefix).map(drop),
            Change::Unblock(prefix) => self.blocked.remove(prefix).map(drop),
            Change::RemoveRange(prefix) => self.ranges.remove(prefix).map(drop),
            Change::AwaitReaders => syscall::await_readers(),
            Change::Attach { .. } | Change::Detach { .. } => Ok(()),
        }
        .map_err(failed)
    }

    fn put_policy(&self, slot: u32, policy: &Placed) -> io::Result<()> {
        // Nothing points there yet: the record that does is put last, by a call.
        self.words.write(policy.first_word, &policy.content.rows)?;
        self.steps.write(policy.first_step, &policy.steps().collect::<Vec<Step>>())?;
        self.steps6.write(policy.first_step6, &policy.steps6().collect::<Vec<Step6>>())?;
        self.policies.put(&slot, &policy.record())
    }

    fn reset(&self, slot: u32) -> io::Result<()> {
        self.quotas.put(&slot, &Quota { opened: 0, closed: 0 })?;
        self.swept.put(&slot, &0)?;
        self.levels.put(&slot, &Levels::default())?;
        let first = slot * REASONS_MAX;
        (first..first + REASONS_MAX).try_for_each(|index| self.counters.clear(index, self.cpus))
    }

    /// What was spent under the old limits is owed under the new ones.
    fn put_rates(&self, slot: u32, rates: &Rates) -> io::Result<()> {
        let missing = super::rate::missing(self, slot)?;
        self.rates.put(&slot, rates)?;
        super::rate::put_missing(self, slot, &missing)
    }

    /// By reason number.
    pub fn counters(&self, slot: u32) -> Result<Vec<u64>, Error> {
        let first = slot * REASONS_MAX;
        (first..first + REASONS_MAX)
            .map(|index| self.counters.sum(index, self.cpus))
            .collect::<io::Result<_>>()
            .map_err(|e| Error::new("read", "COUNTERS", e))
    }

    pub fn flows_open(&self, slot: u32) -> Result<u64, Error> {
        let quota = self.quotas.get(&slot).map_err(|e| Error::new("read", "QUOTAS", e))?;
        let swept = self.swept.get(&slot).map_err(|e| Error::new("read", "SWEPT", e))?;
        let Some(Quota { opened, closed }) = quota else { return Ok(0) };
        Ok(opened.saturating_sub(closed).saturating_sub(swept.unwrap_or(0)))
    }

    /// What the kernel decides by. Attachments and names are not in the maps.
    pub fn read_back(&self) -> Result<Tables, Error> {
        let failed = |cause| Error::new("read back", "maps", cause);
        let interfaces: BTreeMap<u32, Interface> =
            self.interfaces.entries().map_err(failed)?.into_iter().collect();
        let mut rates = BTreeMap::new();
        for slot in interfaces.values().map(|i| i.slot).chain([0]) {
            let found = self.rates.get(&slot).map_err(failed)?.unwrap_or_default();
            if found.limited() {
                rates.insert(slot, found);
            }
        }
        let mut policies = BTreeMap::new();
        for slot in interfaces.values().flat_map(policies_of) {
            if let Some(policy) = self.policies.get(&slot).map_err(failed)? {
                policies.insert(slot, self.read_policy(&policy).map_err(failed)?);
            }
        }
        Ok(Tables {
            config: self.config.get(&0).map_err(failed)?.unwrap_or_default(),
            interfaces,
            locals: self.locals.entries().map_err(failed)?.into_iter().collect(),
            elastics: self.elastics.entries().map_err(failed)?.into_iter().collect(),
            sixes: self.sixes.entries().map_err(failed)?.into_iter().collect(),
            holders: self.holders.entries().map_err(failed)?.into_iter().collect(),
            routes: self.routes.entries().map_err(failed)?.into_iter().collect(),
            blocked6: self
                .blocked6
                .entries()
                .map_err(failed)?
                .into_iter()
                .map(|(p, _)| p)
                .collect(),
            policies,
            rates,
            blocked: self.blocked.entries().map_err(failed)?.into_iter().map(|(p, _)| p).collect(),
            ranges: self.ranges.entries().map_err(failed)?.into_iter().collect(),
            ..Tables::default()
        })
    }

    fn read_policy(&self, policy: &Policy) -> io::Result<Placed> {
        let spans = [
            policy.remotes,
            policy.identities,
            policy.tcp,
            policy.udp,
            policy.icmp,
            policy.others,
            policy.icmp6,
        ];
        let mut tables = Vec::new();
        for Span { first, len } in spans {
            let steps: io::Result<Vec<Step>> =
                (first..first + len).map(|i| Ok(self.steps.get(&i)?.unwrap_or(NO_STEP))).collect();
            tables.push(steps?);
        }
        let Span { first: first_step6, len: len6 } = policy.remotes6;
        let steps6: io::Result<Vec<Step6>> = (first_step6..first_step6 + len6)
            .map(|i| Ok(self.steps6.get(&i)?.unwrap_or(NO_STEP6)))
            .collect();
        let steps6 = steps6?;
        let all = || tables.iter().flatten().map(|s| s.row).chain(steps6.iter().map(|s| s.row));
        let rows = || all().filter(|row| *row != ROW_NONE);
        // Every row has a step that points to it, so the first row is the lowest.
        let first_word = rows().min().unwrap_or(0);
        let end = rows().max().map_or(first_word, |last| last + policy.words);
        let words: io::Result<Vec<u64>> =
            (first_word..end).map(|i| Ok(self.words.get(&i)?.unwrap_or(0))).collect();
        let row_of = |row: u32| (row != ROW_NONE).then(|| (row - first_word) / policy.words.max(1));
        let class = |step: &Step| Class { key: step.key, row: row_of(step.row) };
        let remotes6 =
            steps6.iter().map(|step| Class { key: step.key, row: row_of(step.row) }).collect();
        let mut classes = tables.iter().map(|steps| steps.iter().map(class).collect());
        let classes = std::array::from_fn(|_| classes.next().unwrap_or_default());
        let content =
            Content { words: policy.words, classes, remotes6, rows: words?, allow: policy.allow };
        Ok(Placed { content, first_step: policy.remotes.first, first_step6, first_word })
    }
}

/// The slots of an interface's groups and of its network ACL.
fn policies_of(i: &Interface) -> impl Iterator<Item = u32> + use<> {
    let acls = [i.acl_ingress, i.acl_egress].map(|place| u32::from(place).checked_sub(1));
    [i.ingress, i.egress].into_iter().chain(acls.into_iter().flatten())
}

const NO_STEP: Step = Step { key: 0, row: ROW_NONE, zero: 0 };
const NO_STEP6: Step6 = Step6 { key: V6::UNSPECIFIED, row: ROW_NONE, zero: 0 };

/// A map's descriptor, by its name.
type Opener<'a> = &'a dyn Fn(&str) -> Result<OwnedFd, Error>;

fn map<K: bytemuck::Pod, V: bytemuck::Pod>(
    open: Opener<'_>,
    name: &str,
) -> Result<Map<K, V>, Error> {
    Map::open(open(name)?).map_err(|e| Error::new("open", name, e))
}

/// A map that is the object's own, or pinned under another's care.
pub fn map_of_object<K: bytemuck::Pod, V: bytemuck::Pod>(
    bpf: &Ebpf,
    name: &str,
) -> Result<Map<K, V>, Error> {
    map(&|name| of_object(bpf, name), name)
}

fn of_object(bpf: &Ebpf, name: &str) -> Result<OwnedFd, Error> {
    use aya::maps::Map as M;
    let data = match bpf.map(name) {
        Some(
            M::Array(data)
            | M::HashMap(data)
            | M::LruHashMap(data)
            | M::LpmTrie(data)
            | M::PerCpuArray(data),
        ) => data,
        _ => {
            let cause = io::Error::new(io::ErrorKind::NotFound, "the object has no such map");
            return Err(Error::new("open", name, cause));
        }
    };
    data.fd().as_fd().try_clone_to_owned().map_err(|e| Error::new("open", name, e))
}
