//! The maps. Pinned by the loader under their names; `layout` says what is in them.

use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::LpmTrie;
use aya_ebpf::maps::{Array, HashMap, PerCpuArray};
use ebpf::half::Bucket;
use ebpf::layout::{
    Config, ELASTICS_MAX, Elastic, FLOWS_MAX, Flow, FlowKey, HALF_BUCKETS, INTERFACES_MAX,
    Interface, LOCALS_MAX, Local, LocalKey, POLICIES_MAX, PREFIXES_MAX, Policy, Quota, SLOTS_MAX,
    STEPS_MAX, Step, WORDS_MAX,
};
use ebpf::rate::{Levels, Rates, SOURCES_A_ROW};
use ebpf::{REASONS_MAX, Work};

/// Memory only for what is there, and an update that replaces an entry at once.
const NO_PREALLOC: u32 = 1;
/// Begins on a page, so that no entry lies across more lines of the cache than it must, and the
/// daemon may write thousands of entries without a call for each.
const MMAPABLE: u32 = 1 << 10;

#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
#[map]
pub static INTERFACES: HashMap<u32, Interface> =
    HashMap::with_max_entries(INTERFACES_MAX, NO_PREALLOC);
#[map]
pub static LOCALS: HashMap<LocalKey, Local> = HashMap::with_max_entries(LOCALS_MAX, NO_PREALLOC);
#[map]
pub static ELASTICS: HashMap<u32, Elastic> = HashMap::with_max_entries(ELASTICS_MAX, NO_PREALLOC);
#[map]
pub static POLICIES: Array<Policy> = Array::with_max_entries(POLICIES_MAX, 0);
#[map]
pub static STEPS: Array<Step> = Array::with_max_entries(STEPS_MAX, MMAPABLE);
#[map]
pub static WORDS: Array<u64> = Array::with_max_entries(WORDS_MAX, MMAPABLE);
#[map]
pub static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(FLOWS_MAX, NO_PREALLOC);
#[map]
pub static HALF_FLOWS: Array<Bucket> = Array::with_max_entries(HALF_BUCKETS, MMAPABLE);
/// Written by the programs alone.
#[map]
pub static QUOTAS: Array<Quota> = Array::with_max_entries(SLOTS_MAX, 0);
/// Flows that the sweep took out of `FLOWS`, by slot. Written by the daemon alone,
/// so that neither loses the other's count.
#[map]
pub static SWEPT: Array<u64> = Array::with_max_entries(SLOTS_MAX, 0);
#[map]
pub static BLOCKED: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(PREFIXES_MAX, NO_PREALLOC);
/// 1: an elastic range; 0: an exception in it.
#[map]
pub static RANGES: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(PREFIXES_MAX, NO_PREALLOC);
/// By slot and reason.
#[map]
pub static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(SLOTS_MAX * REASONS_MAX, 0);
/// By slot; written by the daemon.
#[map]
pub static RATES: Array<Rates> = Array::with_max_entries(SLOTS_MAX, 0);
/// By slot.
#[map]
pub static LEVELS: Array<Levels> = Array::with_max_entries(SLOTS_MAX, 0);
/// When the buckets of sources will be full: two rows, in each a place by a hash of
/// the source. Not pinned.
#[map]
pub static SOURCES: Array<u64> = Array::with_max_entries(2 * SOURCES_A_ROW, 0);
/// Where a verdict is made.
#[map]
pub static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);
