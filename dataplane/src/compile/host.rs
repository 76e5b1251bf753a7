//! The tables as `ebpf::decide` asks them, without a kernel: for the model test
//! and for benches.

use std::collections::{BTreeMap, HashMap};

use bytemuck::Zeroable as _;
use ebpf::fragment::{Key, Place, kept};
use ebpf::half::{Address, Bucket, WORDS6};
use ebpf::layout::{
    Config, Elastic, Flow, FlowKey, HALF_BUCKETS, Holder, Hop, Interface, Local, LocalKey, Policy,
    Prefix, Prefix6, Six, Step, Step6,
};
use ebpf::port::{PortHolder, PortKey, Translation};
use ebpf::route::NO_HOP;
use ebpf::verdict::{FlowChange, FlowWrite, NatWrite, Verdict};
use ebpf::{V6, Work};

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
    steps6: HashMap<u32, Step6>,
    flows6: HashMap<FlowKey<V6>, Flow>,
    half_flows6: Vec<Bucket<WORDS6>>,
    /// Below 0 where an interface that went and came back has flows of before.
    open: HashMap<u32, i64>,
    fragments: HashMap<u32, Place>,
    translations: HashMap<FlowKey, Translation>,
    ports: HashMap<PortKey, PortHolder>,
    pieces: HashMap<PortKey, PortHolder>,
    translated: HashMap<u32, u64>,
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
            steps6: HashMap::new(),
            flows6: HashMap::new(),
            half_flows6: vec![Bucket::zeroed(); HALF_BUCKETS as usize],
            open: HashMap::new(),
            fragments: HashMap::new(),
            translations: HashMap::new(),
            ports: HashMap::new(),
            pieces: HashMap::new(),
            translated: HashMap::new(),
        }
    }
}

impl Host {
    pub fn new(tables: Tables) -> Self {
        let mut host = Self::default();
        for (slot, placed) in &tables.policies {
            host.policies.insert(*slot, placed.record());
            host.steps.extend((placed.first_step..).zip(placed.steps()));
            host.steps6.extend((placed.first_step6..).zip(placed.steps6()));
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
        std::mem::swap(&mut next.flows6, &mut self.flows6);
        std::mem::swap(&mut next.half_flows6, &mut self.half_flows6);
        std::mem::swap(&mut next.open, &mut self.open);
        std::mem::swap(&mut next.fragments, &mut self.fragments);
        std::mem::swap(&mut next.translations, &mut self.translations);
        std::mem::swap(&mut next.ports, &mut self.ports);
        std::mem::swap(&mut next.pieces, &mut self.pieces);
        std::mem::swap(&mut next.translated, &mut self.translated);
        *self = next;
    }

    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    pub fn flows(&self) -> &HashMap<FlowKey, Flow> {
        &self.flows
    }

    pub fn flows6(&self) -> &HashMap<FlowKey<V6>, Flow> {
        &self.flows6
    }

    pub fn half_flows_count(&self) -> usize {
        let places = self.half_flows.iter().flat_map(|bucket| &bucket.places);
        places.filter(|place| place.flow.phase != 0).count()
    }

    /// What the programs do with a first fragment that went on.
    pub fn keep<A: ebpf::Ip>(&mut self, work: &Work<A>, now_s: u32) {
        if work.verdict.keeps != 0 {
            let seed = self.tables.config.seed;
            let (index, place) = kept(&work.packet, &work.verdict, seed, now_s);
            self.fragments.insert(index, place);
        }
    }

    pub fn ports(&self) -> &HashMap<PortKey, PortHolder> {
        &self.ports
    }

    /// What the sweep does with ports that nobody uses any more.
    pub fn sweep_ports(&mut self, now_s: u32) {
        self.ports.retain(|_, holder| holder.alive(now_s));
    }

    /// What the programs write down of a packet through a NAT gateway; nothing of any other.
    pub fn translate(&mut self, work: &Work) {
        let nat = &work.nat;
        match nat.write {
            NatWrite::Nothing => {}
            NatWrite::Open => {
                self.ports.insert(nat.port_key, nat.holder);
                self.translations.insert(nat.key, nat.translation);
                *self.translated.entry(work.verdict.slots[0]).or_default() += 1;
            }
            NatWrite::Out => {
                self.translations.insert(nat.key, nat.translation);
                self.ports.insert(nat.port_key, nat.holder);
            }
            NatWrite::In => {
                self.ports.insert(nat.port_key, nat.holder);
            }
        }
        if nat.piece != 0 {
            let key = PortKey { port: nat.piece as u16, peer_port: 0, ..nat.port_key };
            self.pieces.insert(key, nat.holder);
        }
    }

    /// What the programs do with a verdict's flows.
    pub fn account<A: Stored>(&mut self, verdict: &Verdict<A>) {
        self.write(&verdict.sender);
        self.write(&verdict.receiver);
    }

    fn write<A: Stored>(&mut self, change: &FlowChange<A>) {
        let FlowChange { key, flow, slot, write } = *change;
        match write {
            FlowWrite::Nothing => {}
            FlowWrite::Half => A::half(self, &key, Some(flow)),
            FlowWrite::Reopen => {
                if A::flows(self).remove(&key).is_some() {
                    *self.open.entry(slot).or_default() -= 1;
                }
                A::half(self, &key, Some(flow));
            }
            FlowWrite::Tracked => {
                A::flows(self).insert(key, flow);
            }
            FlowWrite::Confirm => {
                if A::flows(self).insert(key, flow).is_none() {
                    *self.open.entry(slot).or_default() += 1;
                }
                A::half(self, &key, None);
            }
        }
    }
}

/// Where a family's flows stand.
pub trait Stored: ebpf::Ip + Sized {
    fn flows(host: &mut Host) -> &mut HashMap<FlowKey<Self>, Flow>;
    /// Puts it into the half-open table, or takes it out.
    fn half(host: &mut Host, key: &FlowKey<Self>, flow: Option<Flow>);
}

impl Stored for u32 {
    fn flows(host: &mut Host) -> &mut HashMap<FlowKey, Flow> {
        &mut host.flows
    }

    fn half(host: &mut Host, key: &FlowKey, flow: Option<Flow>) {
        let Address { bucket, words } = Address::of(key, host.tables.config.seed);
        let bucket = &mut host.half_flows[bucket as usize];
        match flow {
            Some(flow) => bucket.put(&words, flow),
            None => bucket.remove(&words),
        }
    }
}

impl Stored for V6 {
    fn flows(host: &mut Host) -> &mut HashMap<FlowKey<V6>, Flow> {
        &mut host.flows6
    }

    fn half(host: &mut Host, key: &FlowKey<V6>, flow: Option<Flow>) {
        let Address { bucket, words } = Address::of6(key, host.tables.config.seed);
        let bucket = &mut host.half_flows6[bucket as usize];
        match flow {
            Some(flow) => bucket.put(&words, flow),
            None => bucket.remove(&words),
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
        self.open.get(&slot).map_or(0, |open| u64::try_from(*open).unwrap_or(0))
    }

    fn blocked(&self, address: u32) -> bool {
        longest(address, |prefix| self.tables.blocked.contains(&prefix).then_some(1)).is_some()
    }

    fn in_elastic_range(&self, address: u32) -> bool {
        longest(address, |prefix| self.tables.ranges.get(&prefix).copied()) == Some(1)
    }

    fn first_fragment(&self, index: u32, key: &Key, now_s: u32) -> u32 {
        self.fragments.get(&index).map_or(0, |place| place.end(key, now_s))
    }

    fn six(&self, ifindex: u32) -> Option<&Six> {
        self.tables.sixes.get(&ifindex)
    }

    fn holder(&self, address: &V6) -> Option<Holder> {
        self.tables.holders.get(address).copied()
    }

    fn step6(&self, index: u32) -> Option<Step6> {
        self.steps6.get(&index).copied()
    }

    fn flow6(&self, key: &FlowKey<V6>) -> Option<Flow> {
        self.flows6.get(key).copied()
    }

    fn half_flow6(&self, key: &FlowKey<V6>) -> Option<Flow> {
        let address = Address::of6(key, self.tables.config.seed);
        self.half_flows6[address.bucket as usize].find(&address.words)
    }

    fn translation(&self, key: &FlowKey) -> Option<Translation> {
        self.translations.get(key).copied()
    }

    fn port_holder(&self, key: &PortKey) -> Option<PortHolder> {
        self.ports.get(key).copied()
    }

    fn piece_holder(&self, key: &PortKey) -> Option<PortHolder> {
        self.pieces.get(key).copied()
    }

    fn translations_open(&self, slot: u32) -> u64 {
        self.translated.get(&slot).copied().unwrap_or(0)
    }

    fn hop(&self, table: u32, address: u32) -> Hop {
        let address = std::net::Ipv4Addr::from(address).into();
        self.tables.hop(table, address).map_or(NO_HOP, |(_, hop)| hop)
    }

    fn hop6(&self, table: u32, address: V6) -> Hop {
        let address = std::net::Ipv6Addr::from(address.bits()).into();
        self.tables.hop(table, address).map_or(NO_HOP, |(_, hop)| hop)
    }

    fn blocked6(&self, address: &V6) -> bool {
        longest6(address, |prefix| self.tables.blocked6.contains(&prefix).then_some(1)).is_some()
    }

    fn in_range6(&self, address: &V6) -> bool {
        longest6(address, |prefix| self.tables.ranges6.get(&prefix).copied()) == Some(1)
    }
}

fn longest(address: u32, find: impl Fn(Prefix) -> Option<u32>) -> Option<u32> {
    (0..=32_u32).rev().find_map(|length| {
        let mask = u32::MAX.checked_shl(32 - length).unwrap_or(0);
        find(Prefix { length, address: (address & mask).to_be_bytes() })
    })
}

fn longest6(address: &V6, find: impl Fn(Prefix6) -> Option<u32>) -> Option<u32> {
    (0..=128_u32).rev().find_map(|length| {
        let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
        find(Prefix6 { length, address: (address.bits() & mask).to_be_bytes() })
    })
}
