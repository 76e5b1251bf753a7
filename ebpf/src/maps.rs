//! The maps. Pinned by the loader under their names; `layout` says what is in them.

use aya_ebpf::macros::map;
use aya_ebpf::maps::lpm_trie::LpmTrie;
use aya_ebpf::maps::{Array, HashMap, LruHashMap, PerCpuArray, ProgramArray};
use ebpf::fragment::{PLACES, Place};
use ebpf::half::{Bucket, WORDS6};
use ebpf::icmp::Room;
use ebpf::layout::{
    Config, ELASTICS_MAX, Elastic, ElasticKey, FLOWS_MAX, FLOWS6_MAX, Flow, FlowKey, HALF_BUCKETS,
    HOLDERS_MAX, Holder, HolderKey, Hop, INTERFACES_MAX, Interface, LOCALS_MAX, Local, LocalKey,
    POLICIES_MAX, PREFIXES_MAX, PROGRAMS_MAX, Policy, Quota, ROUTES_MAX, SLOTS_MAX, STEPS_MAX,
    STEPS6_MAX, Six, Step, Step6, WORDS_MAX,
};
use ebpf::port::{CONNECTIONS_MAX, PIECES_MAX, PortHolder, PortKey, Translation};
use ebpf::rate::{Levels, Rates, SOURCES_A_ROW};
use ebpf::{Head6, REASONS_MAX, V6, Work};

/// Memory only for what is there, and an update that replaces an entry at once.
const NO_PREALLOC: u32 = 1;
/// Begins on a page, so that no entry lies across more lines of the cache than it must, and the
/// daemon may write thousands of entries without a call for each.
const MMAPABLE: u32 = 1 << 10;

/// Which half of those that have two is looked into.
#[map]
pub static HALF: Array<u32> = Array::with_max_entries(1, 0);
#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(2, 0);
#[map]
pub static INTERFACES: HashMap<u32, Interface> =
    HashMap::with_max_entries(2 * INTERFACES_MAX, NO_PREALLOC);
#[map]
pub static LOCALS: HashMap<LocalKey, Local> =
    HashMap::with_max_entries(2 * LOCALS_MAX, NO_PREALLOC);
#[map]
pub static ELASTICS: HashMap<ElasticKey, Elastic> =
    HashMap::with_max_entries(2 * ELASTICS_MAX, NO_PREALLOC);
#[map]
pub static POLICIES: Array<Policy> = Array::with_max_entries(POLICIES_MAX, 0);
#[map]
pub static STEPS: Array<Step> = Array::with_max_entries(STEPS_MAX, MMAPABLE);
#[map]
pub static WORDS: Array<u64> = Array::with_max_entries(WORDS_MAX, MMAPABLE);
#[map]
pub static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(FLOWS_MAX, NO_PREALLOC);
/// Connections through NAT gateways, and their ports: `ebpf::port` draws both.
#[map]
pub static NAT_FLOWS: HashMap<FlowKey, Translation> =
    HashMap::with_max_entries(CONNECTIONS_MAX, NO_PREALLOC);
#[map]
pub static NAT_PORTS: HashMap<PortKey, PortHolder> =
    HashMap::with_max_entries(CONNECTIONS_MAX, NO_PREALLOC);
/// Whose datagrams in pieces are, by their numbers. Not pinned.
#[map]
pub static NAT_PIECES: LruHashMap<PortKey, PortHolder> =
    LruHashMap::with_max_entries(PIECES_MAX, 0);
/// By the slot of an interface: connections that it opened through gateways, as the programs
/// count them, and those that the sweep took, as the daemon does.
#[map]
pub static NAT_OPENED: Array<u64> = Array::with_max_entries(SLOTS_MAX, 0);
#[map]
pub static NAT_SWEPT: Array<u64> = Array::with_max_entries(SLOTS_MAX, 0);
#[map]
pub static HALF_FLOWS: Array<Bucket> = Array::with_max_entries(HALF_BUCKETS, MMAPABLE);
/// IPv6 has tables of its own, so that an IPv4 key stays as short as it is.
#[map]
pub static SIXES: HashMap<u32, Six> = HashMap::with_max_entries(2 * INTERFACES_MAX, NO_PREALLOC);
/// The programs that others go on to, by [`ebpf::layout::SIX_GUEST`] and the like.
#[map]
pub static PROGRAMS: ProgramArray = ProgramArray::with_max_entries(PROGRAMS_MAX, 0);
#[map]
pub static HOLDERS: HashMap<HolderKey, Holder> =
    HashMap::with_max_entries(2 * HOLDERS_MAX, NO_PREALLOC);
#[map]
pub static STEPS6: Array<Step6> = Array::with_max_entries(STEPS6_MAX, MMAPABLE);
#[map]
pub static FLOWS6: HashMap<FlowKey<V6>, Flow> = HashMap::with_max_entries(FLOWS6_MAX, NO_PREALLOC);
#[map]
pub static HALF_FLOWS6: Array<Bucket<WORDS6>> = Array::with_max_entries(HALF_BUCKETS, MMAPABLE);
#[map]
pub static BLOCKED6: LpmTrie<[u8; 16], u32> = LpmTrie::with_max_entries(PREFIXES_MAX, NO_PREALLOC);
/// The table's number and the address, one after the other.
#[map]
pub static ROUTES: LpmTrie<[u8; 20], Hop> = LpmTrie::with_max_entries(ROUTES_MAX, NO_PREALLOC);
/// Written by the programs alone.
#[map]
pub static QUOTAS: Array<Quota> = Array::with_max_entries(SLOTS_MAX, 0);
/// Flows that the sweep took out of `FLOWS`, by slot. Written by the daemon alone,
/// so that neither loses the other's count.
#[map]
pub static SWEPT: Array<u64> = Array::with_max_entries(SLOTS_MAX, 0);
#[map]
pub static BLOCKED: LpmTrie<[u8; 4], u32> = LpmTrie::with_max_entries(PREFIXES_MAX, NO_PREALLOC);
/// The half and the address: 1: an elastic range; 0: an exception in it.
#[map]
pub static RANGES: LpmTrie<[u8; 8], u32> = LpmTrie::with_max_entries(2 * PREFIXES_MAX, NO_PREALLOC);
/// As `RANGES`.
#[map]
pub static RANGES6: LpmTrie<[u8; 20], u32> =
    LpmTrie::with_max_entries(2 * PREFIXES_MAX, NO_PREALLOC);
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
/// First fragments that went on: `ebpf::fragment` says where each is. Not pinned.
#[map]
pub static FRAGMENTS: Array<Place> = Array::with_max_entries(SLOTS_MAX * PLACES, 0);
/// When the buckets of ICMP errors will be full: two a slot, for those to the guest and
/// those to the world. Not pinned.
#[map]
pub static ERRORS: Array<u64> = Array::with_max_entries(2 * SLOTS_MAX, 0);
/// Where an ICMP error is put together.
#[map]
pub static ANSWER: PerCpuArray<Room> = PerCpuArray::with_max_entries(1, 0);
/// Where a verdict is made.
#[map]
pub static WORK: PerCpuArray<Work> = PerCpuArray::with_max_entries(1, 0);
/// The head of the frame that `WORK6` is about.
#[map]
pub static HEAD6: PerCpuArray<Head6> = PerCpuArray::with_max_entries(1, 0);
#[map]
pub static WORK6: PerCpuArray<Work<V6>> = PerCpuArray::with_max_entries(1, 0);
