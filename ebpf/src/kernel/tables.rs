//! The maps as the decision sees them.

use aya_ebpf::maps::lpm_trie::Key;
use ebpf::fragment;
use ebpf::half::{Address, Bucket, WORDS6};
use ebpf::layout::{
    Config, Elastic, ElasticKey, Flow, FlowKey, Holder, HolderKey, Hop, Interface, Local, LocalKey,
    Policy, Six, Step, Step6, config_of, interface_of,
};
use ebpf::port::{PortHolder, PortKey, Translation};
use ebpf::tables::{Question, classify};
use ebpf::{Tables, V6};

use super::nat::free_port;
use super::routes::{find_hop, find_hop6};
use crate::maps::{
    BLOCKED, BLOCKED6, CONFIG, ELASTICS, FLOWS, FLOWS6, FRAGMENTS, HALF, HALF_FLOWS, HALF_FLOWS6,
    HOLDERS, INTERFACES, LOCALS, NAT_FLOWS, NAT_OPENED, NAT_PIECES, NAT_PORTS, NAT_SWEPT, POLICIES,
    QUOTAS, RANGES, RANGES6, SIXES, STEPS, STEPS6, SWEPT, WORDS,
};

/// One half of the tables, for one packet.
pub struct Maps {
    half: u32,
}

impl Maps {
    /// The half that is in force: asked once by each program, so that it sees one state.
    #[inline(always)]
    pub fn now() -> Self {
        Self { half: HALF.get(0).copied().unwrap_or(0) }
    }

    /// For a program that goes on with a packet.
    #[inline(always)]
    pub const fn of(half: u32) -> Self {
        Self { half }
    }

    #[inline(always)]
    pub const fn half(&self) -> u32 {
        self.half
    }
}

impl Tables for Maps {
    #[inline(always)]
    fn config(&self) -> Config {
        match CONFIG.get(config_of(self.half)) {
            Some(config) => *config,
            None => bytemuck::Zeroable::zeroed(),
        }
    }

    #[inline(always)]
    fn interface(&self, ifindex: u32) -> Option<&Interface> {
        // SAFETY: the map is not preallocated: an entry that was looked up stays as it is,
        // replaced or not, until this program ends (RCU).
        unsafe { INTERFACES.get(interface_of(self.half, ifindex)) }
    }

    #[inline(always)]
    fn local(&self, key: &LocalKey) -> Option<Local> {
        // SAFETY: as for `interface`.
        unsafe { LOCALS.get(LocalKey { zero: self.half, ..*key }) }.copied()
    }

    #[inline(always)]
    fn elastic(&self, address: u32) -> Option<&Elastic> {
        // SAFETY: as for `interface`.
        unsafe { ELASTICS.get(ElasticKey { address, half: self.half }) }
    }

    #[inline(always)]
    fn policy(&self, slot: u32) -> Option<&Policy> {
        POLICIES.get(slot)
    }

    #[inline(always)]
    fn step(&self, index: u32) -> Option<Step> {
        STEPS.get(index).copied()
    }

    #[inline(always)]
    fn word(&self, index: u32) -> u64 {
        WORDS.get(index).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        // SAFETY: the value is one aligned word, read at once.
        unsafe { FLOWS.get(key) }.copied()
    }

    #[inline(always)]
    fn half_flow(&self, key: &FlowKey) -> Option<Flow> {
        let (bucket, words) = half_open(key)?;
        bucket.find(&words)
    }

    #[inline(always)]
    fn flows_open(&self, slot: u32) -> u64 {
        match (QUOTAS.get(slot), SWEPT.get(slot)) {
            (Some(quota), Some(swept)) => {
                quota.opened.saturating_sub(quota.closed).saturating_sub(*swept)
            }
            _ => u64::MAX,
        }
    }

    #[inline(always)]
    fn blocked(&self, address: u32) -> bool {
        BLOCKED.get(Key::new(32, address.to_be_bytes())).is_some()
    }

    #[inline(always)]
    fn in_elastic_range(&self, address: u32) -> bool {
        let key = (u64::from(self.half) << 32 | u64::from(address)).to_be_bytes();
        matches!(RANGES.get(Key::new(64, key)), Some(1))
    }

    #[inline(always)]
    fn classify(&self, slot: u32, q: &Question) -> u32 {
        let kind = u32::from(q.protocol) << 16 | u32::from(q.detail);
        classify_flow(slot, q.remote, q.identity, kind)
    }

    #[inline(always)]
    fn six(&self, ifindex: u32) -> Option<&Six> {
        // SAFETY: as for `interface`.
        unsafe { SIXES.get(interface_of(self.half, ifindex)) }
    }

    #[inline(always)]
    fn holder(&self, address: &V6) -> Option<Holder> {
        // SAFETY: as for `interface`.
        unsafe { HOLDERS.get(HolderKey { address: *address, half: self.half, zero: 0 }) }.copied()
    }

    #[inline(always)]
    fn step6(&self, index: u32) -> Option<Step6> {
        STEPS6.get(index).copied()
    }

    #[inline(always)]
    fn first_fragment(&self, index: u32, key: &fragment::Key, now_s: u32) -> u32 {
        match FRAGMENTS.get(index) {
            Some(place) => place.end(key, now_s),
            None => 0,
        }
    }

    #[inline(always)]
    fn flow6(&self, key: &FlowKey<V6>) -> Option<Flow> {
        // SAFETY: the value is one aligned word, read at once.
        unsafe { FLOWS6.get(key) }.copied()
    }

    #[inline(always)]
    fn half_flow6(&self, key: &FlowKey<V6>) -> Option<Flow> {
        match find_half6(key) {
            0 => None,
            flow => Some(bytemuck::cast(flow)),
        }
    }

    #[inline(always)]
    fn blocked6(&self, address: &V6) -> bool {
        BLOCKED6.get(Key::new(128, address.bytes())).is_some()
    }

    #[inline(always)]
    fn in_range6(&self, address: &V6) -> bool {
        let mut key = [0; 20];
        key[..4].copy_from_slice(&self.half.to_be_bytes());
        key[4..].copy_from_slice(&address.bytes());
        matches!(RANGES6.get(Key::new(160, key)), Some(1))
    }

    #[inline(always)]
    fn translation(&self, key: &FlowKey) -> Option<Translation> {
        // SAFETY: as for `interface`.
        unsafe { NAT_FLOWS.get(key) }.copied()
    }

    #[inline(always)]
    fn port_holder(&self, key: &PortKey) -> Option<PortHolder> {
        // SAFETY: as for `interface`.
        unsafe { NAT_PORTS.get(key) }.copied()
    }

    #[inline(always)]
    fn piece_holder(&self, key: &PortKey) -> Option<PortHolder> {
        // SAFETY: plain numbers. One that is exchanged while it is read is no interface's, or
        // one that has no place for this datagram.
        unsafe { NAT_PIECES.get(key) }.copied()
    }

    #[inline(always)]
    fn translations_open(&self, slot: u32) -> u64 {
        match (NAT_OPENED.get(slot), NAT_SWEPT.get(slot)) {
            (Some(opened), Some(swept)) => opened.saturating_sub(*swept),
            _ => u64::MAX,
        }
    }

    #[inline(always)]
    fn free_port(&self, key: &PortKey, ports: u32, start: u64) -> u16 {
        let ends = u64::from(key.public) << 32 | u64::from(key.peer);
        let peer = u64::from(key.peer_port) << 8 | u64::from(key.protocol);
        free_port(ends, u64::from(ports) << 32 | peer, start) as u16
    }

    #[inline(always)]
    fn hop(&self, table: u32, address: u32) -> Hop {
        bytemuck::cast(find_hop(table, address))
    }

    #[inline(always)]
    fn hop6(&self, table: u32, address: V6) -> Hop {
        bytemuck::cast(find_hop6(table, address.high, address.low))
    }

    #[inline(always)]
    fn classify6(&self, slot: u32, q: &Question<V6>) -> u32 {
        let kind = u64::from(q.protocol) << 16 | u64::from(q.detail);
        let slot_and_kind = u64::from(slot) << 32 | kind;
        classify_flow6(slot_and_kind, q.remote.high, q.remote.low, q.identity)
    }
}

/// A classification looks at a policy's slot alone, which is the same in both halves.
const SLOTS: Maps = Maps { half: 0 };

/// The key's bucket in the half-open table.
#[inline(always)]
pub fn half_open(key: &FlowKey) -> Option<(&'static mut Bucket, [u64; 3])> {
    let address = Address::of(key, CONFIG.get(0)?.seed);
    let bucket = HALF_FLOWS.get_ptr_mut(address.bucket)?;
    // SAFETY: the pointer was checked; whatever stands there are plain words, which
    // another CPU may change meanwhile (`ebpf::half` says what then).
    Some((unsafe { &mut *bucket }, address.words))
}

/// [`half_open`] of the other family.
#[inline(always)]
pub fn half_open6(key: &FlowKey<V6>) -> Option<(&'static mut Bucket<WORDS6>, [u64; WORDS6])> {
    let address = Address::of6(key, CONFIG.get(0)?.seed);
    let bucket = HALF_FLOWS6.get_ptr_mut(address.bucket)?;
    // SAFETY: as for `half_open`.
    Some((unsafe { &mut *bucket }, address.words))
}

/// The half-open flow as a word, 0 where there is none. A function of its own: its
/// place on the stack is the classification's too.
#[inline(never)]
fn find_half6(key: &FlowKey<V6>) -> u64 {
    match half_open6(key).and_then(|(bucket, words)| bucket.find(&words)) {
        Some(flow) => bytemuck::cast(flow),
        None => 0,
    }
}

/// [`classify_flow`] of the other family; the slot stands above protocol and detail.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn classify_flow6(slot_and_kind: u64, high: u64, low: u64, identity: u64) -> u32 {
    let (slot, kind) = ((slot_and_kind >> 32) as u32, slot_and_kind as u32);
    let (protocol, detail) = ((kind >> 16) as u8, kind as u16);
    let remote = V6 { high, low };
    classify(&SLOTS, slot, &Question { remote, identity, protocol, detail })
}

/// A global function of plain numbers: verified by itself.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn classify_flow(slot: u32, remote: u32, identity: u64, kind: u32) -> u32 {
    let (protocol, detail) = ((kind >> 16) as u8, kind as u16);
    classify(&SLOTS, slot, &Question { remote, identity, protocol, detail })
}
