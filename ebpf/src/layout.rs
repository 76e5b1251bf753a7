//! Keys and values of the maps, shared by the programs and the daemon.
//!
//! Pinned maps outlive the daemon and its upgrades: any change here changes
//! [`HASH`], and then the loader makes a new set of maps. Addresses and ports
//! are in host byte order, except in the keys of the prefix tries.
//! `docs/formats/dataplane-maps.md` draws them.

use bytemuck::{Pod, Zeroable};

use crate::ip::V6;

/// Interfaces a host may have. Each has a block of per-CPU counters
/// ([`crate::REASONS_MAX`] of 8 bytes), slot 0 being the uplink's.
pub const INTERFACES_MAX: u32 = 1023;
/// Counter blocks: one an interface, and the uplink's.
pub const SLOTS_MAX: u32 = INTERFACES_MAX + 1;
/// Private addresses known on a host: its own and other hosts' of the same networks.
pub const LOCALS_MAX: u32 = 65_536;
/// Elastic addresses on a host.
pub const ELASTICS_MAX: u32 = 8192;
/// Two policies (ingress, egress) an interface and two a network ACL, and as many again while
/// they are exchanged.
pub const POLICIES_MAX: u32 = 8192;
const _: () = assert!(POLICIES_MAX < u16::MAX as u32);
/// Boundaries of all classes of all policies, 16 bytes each.
pub const STEPS_MAX: u32 = 1_572_864;
/// Words of all rows of all policies, 8 bytes each.
pub const WORDS_MAX: u32 = 4_194_304;
/// Tracked flows that were answered and confirmed, 32 bytes each and only when used.
pub const FLOWS_MAX: u32 = 262_144;
/// Half-open flows; a flood evicts only among these.
pub const HALF_FLOWS_MAX: u32 = 65_536;
/// Buckets that they stand in ([`crate::half`]), a power of two.
pub const HALF_BUCKETS: u32 = HALF_FLOWS_MAX / 4;
/// IPv6 addresses that interfaces hold.
pub const HOLDERS_MAX: u32 = 65_536;
/// Boundaries of all IPv6 classes of all policies, 24 bytes each.
pub const STEPS6_MAX: u32 = 393_216;
/// Tracked IPv6 flows, 56 bytes each and only when used; the quota is one for both.
pub const FLOWS6_MAX: u32 = 262_144;
/// Blocked prefixes, and elastic ranges with their exceptions.
pub const PREFIXES_MAX: u32 = 65_536;

/// Routes of all tables of the host, those to `local` among them.
pub const ROUTES_MAX: u32 = 262_144;

/// Rules that one policy can hold: bits of the longest row.
pub const RULES_MAX: u32 = 1024;
/// Words of the longest row, its summary aside.
pub const ROW_WORDS_MAX: u32 = RULES_MAX / 64;
/// Of a row's first word: which of its words are not 0.
pub const SUMMARY_BITS: u32 = 16;
pub const SUMMARY: u64 = (1 << SUMMARY_BITS) - 1;
const _: () = assert!(ROW_WORDS_MAX <= SUMMARY_BITS);
/// Steps of one class table: 1000 prefixes have at most 2001 boundaries, and the
/// search takes one round for each power of two.
pub const STEPS_A_TABLE_MAX: u32 = 4095;
/// Rounds of the binary search.
pub const SEARCH_ROUNDS: u32 = 12;
const _: () = assert!(STEPS_A_TABLE_MAX < 1 << SEARCH_ROUNDS);

/// No route table.
pub const ROUTES_NONE: u32 = 0;
/// No policy at all: nothing is permitted.
pub const POLICY_NONE: u32 = u32::MAX;
/// A row without any bit, which takes no place.
pub const ROW_NONE: u32 = u32::MAX;

/// `INTERFACES`: ifindex → what the programs know of an interface.
///
/// The map is not preallocated, so that an update replaces the whole record at
/// once: a packet is judged by the old record or the new one, never by a mixture.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Interface {
    /// From the interface's id; never used again, so that flows need no purge.
    pub id: u64,
    /// From the network's id.
    pub vpc: u64,
    /// Stands for the set of its groups; 0: none.
    pub identity: u64,
    pub ifindex: u32,
    /// Block of counters, from 1.
    pub slot: u32,
    pub address: u32,
    /// 0: none.
    pub elastic: u32,
    pub subnet: u32,
    pub mask: u32,
    /// ifindex of the uplink; 0: none.
    pub uplink: u32,
    pub next_hop: u32,
    /// ifindex of the punt device; 0: none.
    pub punt: u32,
    /// Slots in `POLICIES`.
    pub ingress: u32,
    pub egress: u32,
    /// Tracked flows that it may have.
    pub flows_max: u32,
    pub tcp_idle_s: u32,
    pub udp_idle_s: u32,
    pub udp_stream_idle_s: u32,
    pub other_idle_s: u32,
    pub mac: [u8; 6],
    pub flags: u16,
    /// Its route table in `ROUTES`; [`ROUTES_NONE`]: local and internet gateway.
    pub routes: u32,
    /// The longest IP packet that it takes, and that the uplink takes.
    pub mtu: u16,
    pub uplink_mtu: u16,
    /// Slots in `POLICIES` of its network ACL, counted from 1; 0: everything may cross.
    pub acl_ingress: u16,
    pub acl_egress: u16,
    /// Slots in `POLICIES` of the rules whose flows are not tracked, counted from 1: by the
    /// instance's port, and by the remote one. 0: all are tracked.
    pub open_ingress: u16,
    pub open_egress: u16,
    /// Another one whenever those are others.
    pub epoch: u16,
    pub zero: [u16; 3],
}
const _: () = assert!(size_of::<Interface>() == 120);

impl Interface {
    /// Its hardware address as a number, read as one word.
    #[inline(always)]
    pub fn mac_number(&self) -> u64 {
        let [a, b, c, d, e, f] = self.mac;
        let [g, h] = self.flags.to_ne_bytes();
        u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 16
    }
}

/// [`Interface::flags`]: packets must carry the interface's own source address.
pub const SOURCE_CHECK: u16 = 1;
/// [`Interface::flags`]: there is a metadata service.
pub const METADATA: u16 = 2;
/// [`Interface::flags`]: its device is one end of a veth pair, and the guest has the
/// other in a namespace of its own: packets are put there at once.
pub const TO_NAMESPACE: u16 = 4;
/// [`Interface::flags`]: `RATES` has limits for it.
pub const LIMITED: u16 = 0x100;
/// [`Interface::flags`]: its device takes frames from XDP, and whoever is behind it
/// reckons their checksums.
pub const TAKES_FRAMES: u16 = 0x200;
/// [`Interface::flags`]: `LOCALS` has more private addresses of it than the one in its record.
pub const SECONDARIES: u16 = 0x800;

/// [`Interface::flags`]: TCP connections that are not known are picked up in their midst.
pub const LOOSE_TCP: u16 = 0x1000;

/// [`Interface::flags`]: names are resolved for it.
pub const DNS: u16 = 0x400;

/// [`Interface::flags`]: the metadata service is reached over IPv6 too.
pub const METADATA6: u16 = 0x2000;

/// `HALF`, one entry: the half of the tables that packets are judged by.
///
/// `CONFIG`, `INTERFACES`, `LOCALS`, `ELASTICS`, `RANGES`, `SIXES` and `HOLDERS` have each
/// entry twice. A program reads this word once and looks into its half alone; the daemon
/// changes the other half, and then this word: all of a new state is seen at once.
pub const HALVES: [u32; 2] = [0, 1 << 31];

/// The place of a half's entry in `CONFIG`.
#[inline(always)]
pub const fn config_of(half: u32) -> u32 {
    half >> 31
}

/// Key of an interface's records in `INTERFACES` and `SIXES`: ifindexes are positive.
#[inline(always)]
pub const fn interface_of(half: u32, ifindex: u32) -> u32 {
    half | ifindex
}

/// `LOCALS`: whose is this private address?
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct LocalKey {
    pub vpc: u64,
    pub address: u32,
    /// In the map: the half.
    pub zero: u32,
}
const _: () = assert!(size_of::<LocalKey>() == 16);

#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Local {
    pub identity: u64,
    /// 0: of no interface of this host.
    pub ifindex: u32,
    /// 0, or [`RESOLVER`].
    pub service: u32,
    /// What stands for it in the world; 0: nothing does.
    pub elastic: u32,
    pub zero: u32,
}
const _: () = assert!(size_of::<Local>() == 24);

/// [`Local::service`]: names are resolved there.
pub const RESOLVER: u32 = 1;

/// Key of `ELASTICS`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct ElasticKey {
    pub address: u32,
    pub half: u32,
}
const _: () = assert!(size_of::<ElasticKey>() == 8);

/// `ELASTICS`: who answers for an elastic address.
///
/// The interface's record stands here once more, so that a packet from the world
/// finds all by one look.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Elastic {
    pub interface: Interface,
    /// The private address that it stands for.
    pub address: u32,
    /// Of a NAT gateway: how many ports it has, and `interface` is a record of its own,
    /// without a device. 0: an interface holds the address.
    pub nat: u32,
}
const _: () = assert!(size_of::<Elastic>() == 128);

/// Part of `STEPS`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Span {
    pub first: u32,
    pub len: u32,
}

/// `POLICIES`: the rules of one direction, as class tables.
///
/// ```text
///   remote address ─▶ remote ─┐
///                             ├ or ─┐
///   remote identity ▶ ident. ─┘     ├ and ─▶ lowest bit: the rule
///   protocol, port ─▶ tcp … others ─┘
/// ```
/// Each table is sorted by key; a step holds from its key up to the next one
/// (`identities`: for exactly its key). Its row is a summary, then words of a bit a rule: bit w
/// of the summary says that rules 64w to 64w + 63 are in word w and that this is not 0, and its
/// bits from [`SUMMARY_BITS`] on, which word comes first. All from there to the last one follow.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Policy {
    pub remotes: Span,
    pub identities: Span,
    pub tcp: Span,
    pub udp: Span,
    pub icmp: Span,
    pub others: Span,
    pub icmp6: Span,
    /// In `STEPS6`.
    pub remotes6: Span,
    /// Of a network ACL: the entries that permit, a bit each. Rules of groups always do.
    pub allow: u64,
}
const _: () = assert!(size_of::<Policy>() == 72);

/// `STEPS`: a boundary, and the first word of its row in `WORDS`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Step {
    pub key: u64,
    pub row: u32,
    pub zero: u32,
}
const _: () = assert!(size_of::<Step>() == 16);

/// `STEPS6`: a boundary among IPv6 addresses, and the first word of its row in `WORDS`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Step6 {
    pub key: V6,
    pub row: u32,
    pub zero: u32,
}
const _: () = assert!(size_of::<Step6>() == 24);

/// `SIXES`: ifindex → what an interface has of IPv6, beside its record.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Six {
    pub subnet: V6,
    pub mask: V6,
    /// Of the uplink; all zeros: IPv6 does not leave the host.
    pub next_hop: V6,
}
const _: () = assert!(size_of::<Six>() == 48);

impl Six {
    #[inline(always)]
    pub fn holds(&self, address: V6) -> bool {
        let differ = (address.high & self.mask.high ^ self.subnet.high)
            | (address.low & self.mask.low ^ self.subnet.low);
        differ == 0
    }
}

/// `PROGRAMS`: where IPv6 frames of guests, of the uplink and of the responder go on.
pub const SIX_GUEST: u32 = 0;
pub const SIX_UPLINK: u32 = 1;
pub const SIX_RESPONDER: u32 = 2;
/// `PROGRAMS`: what makes the ICMP error that a verdict tells, of IPv4 and of IPv6.
pub const TELL_FOUR: u32 = 3;
pub const TELL_SIX: u32 = 4;
/// `PROGRAMS`: what goes through a NAT gateway, from a guest and from the uplink.
pub const NAT_GUEST: u32 = 5;
pub const NAT_UPLINK: u32 = 6;
pub const PROGRAMS_MAX: u32 = 7;

/// Key of `HOLDERS`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct HolderKey {
    pub address: V6,
    pub half: u32,
    pub zero: u32,
}
const _: () = assert!(size_of::<HolderKey>() == 24);

/// `HOLDERS`: which interface has an IPv6 address. They are global: no two
/// networks have the same.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Holder {
    pub vpc: u64,
    pub identity: u64,
    pub ifindex: u32,
    pub zero: u32,
}
const _: () = assert!(size_of::<Holder>() == 24);

/// `FLOWS`, `HALF_FLOWS`, `FLOWS6`, `HALF_FLOWS6`: a flow as its instance sees it, so that one lookup
/// serves both directions.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FlowKey<A = u32> {
    /// [`Interface::id`].
    pub interface: u64,
    pub local: A,
    pub remote: A,
    pub local_port: u16,
    pub remote_port: u16,
    pub protocol: u8,
    pub zero: [u8; 3],
}
const _: () = assert!(size_of::<FlowKey>() == 24);
const _: () = assert!(size_of::<FlowKey<V6>>() == 48);

// SAFETY: plain integers without a gap between them, as the sizes above say.
unsafe impl Zeroable for FlowKey<u32> {}
// SAFETY: as above.
unsafe impl Pod for FlowKey<u32> {}
// SAFETY: as above.
unsafe impl Zeroable for FlowKey<V6> {}
// SAFETY: as above.
unsafe impl Pod for FlowKey<V6> {}

/// One aligned word, so that it is never read half old and half new.
#[repr(C, align(8))]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Flow {
    /// When its last packet came, in seconds of the coarse monotonic clock.
    pub seen_s: u32,
    /// The rule that let it in, by its place in the policy, from 1.
    pub rule: u16,
    /// [`crate::flow`] draws them.
    pub phase: u8,
    pub flags: u8,
}
const _: () = assert!(size_of::<Flow>() == 8);

/// `QUOTAS`: flows that the programs moved into and out of `FLOWS`, by slot.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
pub struct Quota {
    pub opened: u64,
    pub closed: u64,
}
const _: () = assert!(size_of::<Quota>() == 16);

/// `CONFIG`, an entry a half: what is not an interface's own. The seed is one for both.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Pod, Zeroable)]
pub struct Config {
    pub uplink: u32,
    /// Not zero: `BLOCKED` has entries.
    pub blocked: u32,
    /// 0: `RANGES` is empty; else who looks there: [`RANGES_EARLY`] or [`RANGES_LATE`].
    pub ranges: u32,
    pub uplink_mac: [u8; 6],
    /// Not zero: the XDP program on the uplink delivers what it can.
    pub fast: u16,
    /// Not zero: the early program limits each source by slot 0's rates.
    pub sources: u32,
    /// Not zero: `BLOCKED6` has entries.
    pub blocked6: u32,
    /// The host's own address on the uplink; 0: none.
    pub uplink_address: u32,
    /// Spreads keys over the half-open table: a number that no stranger knows.
    pub seed: u64,
    /// Its global IPv6 address there; unspecified: none.
    pub uplink_address6: V6,
    /// As `ranges`, of `RANGES6`.
    pub ranges6: u32,
    pub zero: u32,
}
const _: () = assert!(size_of::<Config>() == 64);

/// [`Config::ranges`]: the XDP program on the uplink drops what is for nobody.
pub const RANGES_EARLY: u32 = 1;
/// [`Config::ranges`]: the uplink's tc program does.
pub const RANGES_LATE: u32 = 2;

/// Key of the prefix trie `RANGES`: the half's 32 bits are part of the length.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct RangeKey {
    pub length: u32,
    /// Network byte order, as the address.
    pub half: [u8; 4],
    pub address: [u8; 4],
}
const _: () = assert!(size_of::<RangeKey>() == 12);

/// Key of the prefix trie `RANGES6`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Range6Key {
    pub length: u32,
    /// Network byte order, as the address.
    pub half: [u8; 4],
    pub address: [u8; 16],
}
const _: () = assert!(size_of::<Range6Key>() == 24);

/// Key of the prefix trie `BLOCKED`; laid out as linux/bpf.h's `bpf_lpm_trie_key`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Prefix {
    pub length: u32,
    /// Network byte order.
    pub address: [u8; 4],
}
const _: () = assert!(size_of::<Prefix>() == 8);

/// Key of the prefix trie `BLOCKED6`.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Prefix6 {
    pub length: u32,
    /// Network byte order.
    pub address: [u8; 16],
}
const _: () = assert!(size_of::<Prefix6>() == 20);

/// Key of the prefix trie `ROUTES`: the table stands before the address, and its 32 bits
/// are part of the length.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct RouteKey {
    pub length: u32,
    /// Network byte order, as all of it: the table, and in its lowest bit the family.
    pub table: [u8; 4],
    /// An IPv4 address is the first four bytes.
    pub address: [u8; 16],
}
const _: () = assert!(size_of::<RouteKey>() == 24);

/// `ROUTES`: where a table sends a prefix.
#[repr(C)]
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Pod, Zeroable)]
pub struct Hop {
    /// One of [`crate::route`]'s kinds.
    pub kind: u32,
    /// The appliance's ifindex, or a NAT gateway's public address; else 0.
    pub to: u32,
}
const _: () = assert!(size_of::<Hop>() == 8);

/// Changes whenever a map of one version cannot serve another: FNV-1a over the
/// text of this file, of the half-open table, of the buckets, of NAT ports and of the map
/// definitions.
pub const HASH: u64 = {
    let texts = [
        include_bytes!("layout.rs").as_slice(),
        include_bytes!("maps.rs").as_slice(),
        include_bytes!("half.rs").as_slice(),
        include_bytes!("rate.rs").as_slice(),
        include_bytes!("port.rs").as_slice(),
    ];
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut t = 0;
    while t < texts.len() {
        let mut i = 0;
        while i < texts[t].len() {
            hash = (hash ^ texts[t][i] as u64).wrapping_mul(0x0100_0000_01b3);
            i += 1;
        }
        t += 1;
    }
    hash
};
