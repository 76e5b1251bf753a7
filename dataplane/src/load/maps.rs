//! The pinned maps: changed by [`Change`]s, and read back into [`Tables`].

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::Ebpf;
use aya::maps::MapData;
use ebpf::half::{Bucket, WORDS6};
use ebpf::layout::{
    Config, Elastic, ElasticKey, Flow, FlowKey, HALVES, Holder, HolderKey, Hop, Interface, Local,
    LocalKey, Policy, Prefix, Prefix6, Quota, ROW_NONE, Range6Key, RangeKey, RouteKey, Six, Span,
    Step, Step6, config_of, interface_of,
};
use ebpf::{REASONS_MAX, V6};

use ebpf::port::{PortHolder, PortKey, Translation};
use ebpf::rate::{Levels, Rates};

use super::Error;
use super::mapped::Mapped;
use super::pins::Pins;
use super::syscall::{self, Map};
use crate::compile::{Class, Content, Placed, Tables, row_len};
use crate::diff::Change;

/// Every map that is pinned.
pub const NAMES: [&str; 31] = [
    "HALF",
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
    "NAT_FLOWS",
    "NAT_PORTS",
    "NAT_OPENED",
    "NAT_SWEPT",
    "BLOCKED6",
    "PROGRAMS",
    "ROUTES",
    "QUOTAS",
    "SWEPT",
    "BLOCKED",
    "RANGES",
    "RANGES6",
    "COUNTERS",
    "HITS",
    "RATES",
    "LEVELS",
];

#[derive(Debug)]
pub struct Maps {
    in_force: Map<u32, u32>,
    config: Map<u32, Config>,
    interfaces: Map<u32, Interface>,
    locals: Map<LocalKey, Local>,
    elastics: Map<ElasticKey, Elastic>,
    policies: Map<u32, Policy>,
    steps: Mapped<Step>,
    words: Mapped<u64>,
    pub flows: Map<FlowKey, Flow>,
    pub half: Map<u32, Bucket>,
    pub half6: Map<u32, Bucket<WORDS6>>,
    sixes: Map<u32, Six>,
    holders: Map<HolderKey, Holder>,
    steps6: Mapped<Step6>,
    pub flows6: Map<FlowKey<V6>, Flow>,
    pub nat_flows: Map<FlowKey, Translation>,
    pub nat_ports: Map<PortKey, PortHolder>,
    pub nat_opened: Map<u32, u64>,
    pub nat_swept: Map<u32, u64>,
    blocked6: Map<Prefix6, u32>,
    routes: Map<RouteKey, Hop>,
    pub quotas: Map<u32, Quota>,
    pub swept: Map<u32, u64>,
    blocked: Map<Prefix, u32>,
    ranges: Map<RangeKey, u32>,
    ranges6: Map<Range6Key, u32>,
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
            in_force: map(bpf, "HALF")?,
            config: map(bpf, "CONFIG")?,
            interfaces: map(bpf, "INTERFACES")?,
            locals: map(bpf, "LOCALS")?,
            elastics: map(bpf, "ELASTICS")?,
            policies: map(bpf, "POLICIES")?,
            steps: mapped(bpf, "STEPS")?,
            words: mapped(bpf, "WORDS")?,
            flows: map(bpf, "FLOWS")?,
            half: map(bpf, "HALF_FLOWS")?,
            half6: map(bpf, "HALF_FLOWS6")?,
            sixes: map(bpf, "SIXES")?,
            holders: map(bpf, "HOLDERS")?,
            steps6: mapped(bpf, "STEPS6")?,
            flows6: map(bpf, "FLOWS6")?,
            nat_flows: map(bpf, "NAT_FLOWS")?,
            nat_ports: map(bpf, "NAT_PORTS")?,
            nat_opened: map(bpf, "NAT_OPENED")?,
            nat_swept: map(bpf, "NAT_SWEPT")?,
            blocked6: map(bpf, "BLOCKED6")?,
            routes: map(bpf, "ROUTES")?,
            quotas: map(bpf, "QUOTAS")?,
            swept: map(bpf, "SWEPT")?,
            blocked: map(bpf, "BLOCKED")?,
            ranges: map(bpf, "RANGES")?,
            ranges6: map(bpf, "RANGES6")?,
            counters: map(bpf, "COUNTERS")?,
            rates: map(bpf, "RATES")?,
            levels: map(bpf, "LEVELS")?,
            cpus: aya::util::nr_cpus().map_err(|(path, e)| Error::new("read", path, e))?,
        })
    }

    /// The half that packets are judged by.
    pub fn in_force(&self) -> Result<u32, Error> {
        let half = self.in_force.get(&0).map_err(|e| Error::new("read", "HALF", e))?;
        Ok(half.unwrap_or(HALVES[0]))
    }

    pub fn hidden(&self) -> Result<u32, Error> {
        Ok(self.in_force()? ^ HALVES[1])
    }

    /// From here on packets are judged by this half.
    pub fn publish(&self, half: u32) -> Result<(), Error> {
        self.in_force.put(&0, &half).map_err(|e| Error::new("publish", "HALF", e))
    }

    /// Attachments and what is published are none of its business: they are `Loaded`'s.
    /// `half`: where records go.
    pub fn apply(&self, change: &Change, half: u32) -> Result<(), Error> {
        let failed = |cause| Error::new("change", format!("{change:?}"), cause);
        let local = |key: &LocalKey| LocalKey { zero: half, ..*key };
        let elastic_key = |address: &u32| ElasticKey { address: *address, half };
        let holder_key = |address: &V6| HolderKey { address: *address, half, zero: 0 };
        match change {
            Change::PutPolicy { slot, policy } => self.put_policy(*slot, policy),
            Change::PutLocal(key, value) => self.locals.put(&local(key), value),
            Change::PutHolder(address, holder) => self.holders.put(&holder_key(address), holder),
            Change::PutSix(ifindex, six) => self.sixes.put(&interface_of(half, *ifindex), six),
            Change::PutRoute(key, hop) => self.routes.put(key, hop),
            Change::RemoveRoute(key) => self.routes.remove(key).map(drop),
            Change::Block6(prefix) => self.blocked6.put(prefix, &1),
            Change::ResetSlot(slot) => self.reset(*slot),
            Change::PutRates { slot, rates } => self.put_rates(*slot, rates),
            Change::PutInterface(interface) => {
                self.interfaces.put(&interface_of(half, interface.ifindex), interface)
            }
            Change::PutElastic { address, elastic } => {
                self.elastics.put(&elastic_key(address), elastic)
            }
            Change::Block(prefix) => self.blocked.put(prefix, &1),
            Change::PutRange { prefix, kind } => self.ranges.put(&range_key(half, prefix), kind),
            Change::PutRange6 { prefix, kind } => self.ranges6.put(&range6_key(half, prefix), kind),
            Change::PutConfig(config) => self.put_config(half, config),
            Change::RemoveElastic(address) => self.elastics.remove(&elastic_key(address)).map(drop),
            Change::RemoveInterface(ifindex) => {
                self.interfaces.remove(&interface_of(half, *ifindex)).map(drop)
            }
            Change::RemoveLocal(key) => self.locals.remove(&local(key)).map(drop),
            Change::RemoveHolder(address) => self.holders.remove(&holder_key(address)).map(drop),
            Change::RemoveSix(ifindex) => {
                self.sixes.remove(&interface_of(half, *ifindex)).map(drop)
            }
            Change::Unblock6(prefix) => self.blocked6.remove(prefix).map(drop),
            Change::Unblock(prefix) => self.blocked.remove(prefix).map(drop),
            Change::RemoveRange(prefix) => self.ranges.remove(&range_key(half, prefix)).map(drop),
            Change::RemoveRange6(prefix) => {
                self.ranges6.remove(&range6_key(half, prefix)).map(drop)
            }
            Change::Attach { .. } | Change::Detach { .. } | Change::Publish => Ok(()),
            Change::AwaitReaders => syscall::await_readers(),
        }
        .map_err(failed)
    }

    /// The seed is both halves': half-open flows are found by it.
    fn put_config(&self, half: u32, config: &Config) -> io::Result<()> {
        let other = config_of(half ^ HALVES[1]);
        let mut others = self.config.get(&other)?.unwrap_or_default();
        if others.seed != config.seed {
            others.seed = config.seed;
            self.config.put(&other, &others)?;
        }
        self.config.put(&config_of(half), config)
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
        self.nat_opened.put(&slot, &0)?;
        self.nat_swept.put(&slot, &0)?;
        self.levels.put(&slot, &Levels::default())?;
        let first = slot * REASONS_MAX;
        (first..first + REASONS_MAX).try_for_each(|index| self.counters.clear(index, self.cpus))
    }

    /// What was spent under the old limits is owed under the new ones, unless other buckets
    /// pay for the interface from now on: theirs are as they are.
    fn put_rates(&self, slot: u32, rates: &Rates) -> io::Result<()> {
        let before = self.rates.get(&slot)?.unwrap_or_default();
        if before.payer != 0 || rates.payer != 0 {
            return self.rates.put(&slot, rates);
        }
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
    pub fn read_back(&self, half: u32) -> Result<Tables, Error> {
        let failed = |cause| Error::new("read back", "maps", cause);
        let interfaces: BTreeMap<u32, Interface> =
            by_ifindex(half, self.interfaces.entries().map_err(failed)?);
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
            config: self.config.get(&config_of(half)).map_err(failed)?.unwrap_or_default(),
            interfaces,
            locals: of_half(self.locals.entries().map_err(failed)?, |key| {
                (key.zero == half).then_some(LocalKey { zero: 0, ..*key })
            }),
            elastics: of_half(self.elastics.entries().map_err(failed)?, |key| {
                (key.half == half).then_some(key.address)
            }),
            sixes: by_ifindex(half, self.sixes.entries().map_err(failed)?),
            holders: of_half(self.holders.entries().map_err(failed)?, |key| {
                (key.half == half).then_some(key.address)
            }),
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
            ranges: of_half(self.ranges.entries().map_err(failed)?, |key| {
                let (length, address) = (key.length.wrapping_sub(32), key.address);
                (key.half == half.to_be_bytes()).then_some(Prefix { length, address })
            }),
            ranges6: of_half(self.ranges6.entries().map_err(failed)?, |key| {
                let (length, address) = (key.length.wrapping_sub(32), key.address);
                (key.half == half.to_be_bytes()).then_some(Prefix6 { length, address })
            }),
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
        let tables = spans.map(|span| self.steps.read(span.first, span.len as usize));
        let tables = tables.into_iter().collect::<io::Result<Vec<_>>>()?;
        let Span { first: first_step6, len: len6 } = policy.remotes6;
        let steps6 = self.steps6.read(first_step6, len6 as usize)?;
        let all = || tables.iter().flatten().map(|s| s.row).chain(steps6.iter().map(|s| s.row));
        let rows = || all().filter(|row| *row != ROW_NONE);
        // Every row has a step that points to it, so the first row is the lowest.
        let first_word = rows().min().unwrap_or(0);
        let end = match rows().max() {
            // Its summary, and the words from the first to the last that it names.
            Some(last) => last + row_len(self.words.read(last, 1)?[0]),
            None => first_word,
        };
        let words = self.words.read(first_word, (end - first_word) as usize);
        let row_of = |row: u32| (row != ROW_NONE).then(|| row - first_word);
        let class = |step: &Step| Class { key: step.key, row: row_of(step.row) };
        let remotes6 =
            steps6.iter().map(|step| Class { key: step.key, row: row_of(step.row) }).collect();
        let mut classes = tables.iter().map(|steps| steps.iter().map(class).collect());
        let classes = std::array::from_fn(|_| classes.next().unwrap_or_default());
        let content = Content { classes, remotes6, rows: words?, allow: policy.allow };
        let content = content.into();
        Ok(Placed { content, first_step: policy.remotes.first, first_step6, first_word })
    }
}

/// The slots of an interface's groups, of its network ACL, and of its open rules.
fn policies_of(i: &Interface) -> impl Iterator<Item = u32> + use<> {
    let others = [i.acl_ingress, i.acl_egress, i.open_ingress, i.open_egress];
    let others = others.map(|place| u32::from(place).checked_sub(1));
    [i.ingress, i.egress].into_iter().chain(others.into_iter().flatten())
}

fn range_key(half: u32, prefix: &Prefix) -> RangeKey {
    let Prefix { length, address } = *prefix;
    RangeKey { length: length + 32, half: half.to_be_bytes(), address }
}

fn range6_key(half: u32, prefix: &Prefix6) -> Range6Key {
    let Prefix6 { length, address } = *prefix;
    Range6Key { length: length + 32, half: half.to_be_bytes(), address }
}

/// A half's entries, by the keys that are the same in both.
fn of_half<K, V, P: Ord>(entries: Vec<(K, V)>, key: impl Fn(&K) -> Option<P>) -> BTreeMap<P, V> {
    entries.into_iter().filter_map(|(k, value)| Some((key(&k)?, value))).collect()
}

fn by_ifindex<V>(half: u32, entries: Vec<(u32, V)>) -> BTreeMap<u32, V> {
    of_half(entries, |key| (key & HALVES[1] == half).then_some(key & !HALVES[1]))
}

/// A map's descriptor, by its name.
type Opener<'a> = &'a dyn Fn(&str) -> Result<OwnedFd, Error>;

fn map<K: bytemuck::Pod, V: bytemuck::Pod>(
    open: Opener<'_>,
    name: &str,
) -> Result<Map<K, V>, Error> {
    Map::open(open(name)?).map_err(|e| Error::new("open", name, e))
}

fn mapped<V: bytemuck::Pod>(open: Opener<'_>, name: &str) -> Result<Mapped<V>, Error> {
    Mapped::open(open(name)?).map_err(|e| Error::new("map", name, e))
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
