//! The tables as `ebpf::decide` asks them, without a kernel: for the model test
//! and for benches.

use std::collections::{BTreeMap, HashMap};

use bytemuck::Zeroable as _;
use ebpf::half::{Address, Bucket};
use ebpf::layout::{
    Config, Elastic, Flow, FlowKey, HALF_BUCKETS, Interface, Local, LocalKey, Policy, Prefix, Step,
};
use ebpf::verdict::{FlowChange, FlowWrite, Verdict};

use super::Tables;

/// Tables and flows. The table of tracked flows has no end here.
#[derive(Debug, Clone)]
pub struct Host {
    tables: Tables,
    policies: BTreeMap<u32, Policy>,
    steps: HashMap<u32, Step>,
    words: HashMap<u32, u64>,
    flows: HashMap<FlowKey, Flow>,
    half_flows: Vec<Bucket>,
    open: HashMap<u32, u64>,
}

impl Default for Host {
    fn default() -> Self {
        Self {
            tables: Tables::default(),
            policies: BTreeMap::new(),
            steps: HashMap::new(),
            words: HashMap::new(),
            flows: HashMap::new(),
            half_flows: vec![Bucket::zeroed(); HALF_BUCKETS as usize],
            open: HashMap::new(),
        }
    }
}

impl Host {
    pub fn new(tables: Tables) -> Self {
        let mut host = Self::default();
        for (slot, placed) in &tables.policies {
            host.policies.insert(*slot, placed.record());
            host.steps.extend((placed.first_step..).zip(placed.steps()));
            host.words.extend((placed.first_word..).zip(placed.content.rows.iter().copied()));
        }
        host.tables = tables;
        host
    }

    /// Exchanges the tables and keeps the flows.
    pub fn load(&mut self, tables: Tables) {
        let mut next = Self::new(tables);
        std::mem::swap(&mut next.flows, &mut self.flows);
        std::mem::swap(&mut next.half_flows, &mut self.half_flows);
        std::mem::swap(&mut next.open, &mut self.open);
        *self = next;
    }

    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    pub fn flows(&self) -> &HashMap<FlowKey, Flow> {
        &self.flows
    }

    pub fn half_flows_count(&self) -> usize {
        let places = self.half_flows.iter().flat_map(|bucket| &bucket.places);
        places.filter(|place| place.flow.phase != 0).count()
    }

    fn half_open(&mut self, key: &FlowKey) -> (&mut Bucket, [u64; 3]) {
        let address = Address::of(key, self.tables.config.seed);
        (&mut self.half_flows[address.bucket as usize], address.words)
    }

    fn put_half(&mut self, key: &FlowKey, flow: Flow) {
        let (bucket, words) = self.half_open(key);
        bucket.put(&words, flow);
    }

    /// What the programs do with a verdict's flows.
    pub fn account(&mut self, verdict: &Verdict) {
        self.write(&verdict.sender);
        self.write(&verdict.receiver);
    }

    fn write(&mut self, change: &FlowChange) {
        let FlowChange { key, flow, slot, write } = *change;
        match write {
            FlowWrite::Nothing => {}
            FlowWrite::Half => self.put_half(&key, flow),
            FlowWrite::Reopen => {
                if self.flows.remove(&key).is_some() {
                    *self.open.entry(slot).or_default() -= 1;
                }
                self.put_half(&key, flow);
            }
            FlowWrite::Tracked => {
                self.flows.insert(key, flow);
            }
            FlowWrite::Confirm => {
                if self.flows.insert(key, flow).is_none() {
                    *self.open.entry(slot).or_default() += 1;
                }
                let (bucket, words) = self.half_open(&key);
                bucket.remove(&words);
            }
        }
    }
}

impl ebpf::Tables for Host {
    fn config(&self) -> Config {
        self.tables.config
    }

    fn interface(&self, ifindex: u32) -> Option<&Interface> {
        self.tables.interfaces.get(&ifindex)
    }

    fn local(&self, key: &LocalKey) -> Option<Local> {
        self.tables.locals.get(key).copied()
    }

    fn elastic(&self, address: u32) -> Option<&Elastic> {
        self.tables.elastics.get(&address)
    }

    fn policy(&self, slot: u32) -> Option<&Policy> {
        self.policies.get(&slot)
    }

    fn step(&self, index: u32) -> Option<Step> {
        self.steps.get(&index).copied()
    }

    fn word(&self, index: u32) -> u64 {
        self.words.get(&index).copied().unwrap_or(0)
    }

    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        self.flows.get(key).copied()
    }

    fn half_flow(&self, key: &FlowKey) -> Option<Flow> {
        let address = Address::of(key, self.tables.config.seed);
        self.half_flows[address.bucket as usize].find(&address.words)
    }

    fn flows_open(&self, slot: u32) -> u64 {
        self.open.get(&slot).copied().unwrap_or(0)
    }

    fn blocked(&self, address: u32) -> bool {
        longest(address, |prefix| self.tables.blocked.contains(&prefix).then_some(1)).is_some()
    }

    fn in_elastic_range(&self, address: u32) -> bool {
        longest(address, |prefix| self.tables.ranges.get(&prefix).copied()) == Some(1)
    }
}

fn longest(address: u32, find: impl Fn(Prefix) -> Option<u32>) -> Option<u32> {
    (0..=32_u32).rev().find_map(|length| {
        let mask = u32::MAX.checked_shl(32 - length).unwrap_or(0);
        find(Prefix { length, address: (address & mask).to_be_bytes() })
    })
}
