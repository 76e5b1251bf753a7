//! What the packet path decides, and the layouts of the maps that it decides by.
//!
//! Built twice: for the host (model test, `netctl why`, the loader's layouts) and,
//! with `main.rs`, for the kernel. Called by the five programs and by `dataplane`.
//! Nothing here allocates, loops without a bound, asks a clock or can panic.
//!
//! | module | duty |
//! |---|---|
//! | [`layout`] | keys and values of the maps |
//! | [`packet`] | the one gate for hostile bytes |
//! | [`tables`] | what is looked up; classification by bit-vectors |
//! | [`flow`] | the life of a flow; [`half`]: where half-open ones wait |
//! | [`ip`] | the two families of addresses, over which the decision is written once |
//! | [`decide`] | the decision itself; [`judge`]: one interface's part in it |
//! | [`early`] | what is dropped before anything is spent on it |
//! | [`arp`] | ARP, answered where it is asked |
//! | [`acl`] | what may cross the border of a subnet |
//! | [`route`] | what a route table says of a destination |
//! | [`nat`] | what goes through a NAT gateway; [`port`]: whose port is which |
//! | [`six`] | where IPv6 enters the decision; [`neighbour`]: what is said on the link |
//! | [`verdict`], [`rewrite`] | what follows from it |
//! | [`fragment`] | datagrams in pieces: what the first was allowed holds for the others |
//! | [`icmp`] | the ICMP errors that a router owes; [`reset`]: a NAT gateway's RST; [`made`]: headers of both |
//! | [`event`] | what is told of single packets |
//! | [`punt`] | how the punt device names an interface |
//! | [`rate`] | token buckets |
#![cfg_attr(not(test), no_std)]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod acl;
pub mod arp;
pub mod decide;
pub mod early;
pub mod event;
pub mod flow;
pub mod fragment;
pub mod half;
pub mod held;
pub mod icmp;
pub mod ip;
pub mod judge;
pub mod layout;
pub mod made;
pub mod nat;
pub mod neighbour;
pub mod packet;
pub mod port;
pub mod punt;
pub mod rate;
pub mod reason;
pub mod reset;
pub mod rewrite;
pub mod route;
pub mod six;
pub mod tables;
pub mod verdict;

pub use decide::Arrival;
pub use ip::{Ip, V6};
pub use packet::{Frame, Head, Head6, Packet};
pub use punt::{PUNT_MAC_PREFIX, ifindex_of, punt_mac};
pub use reason::{REASONS_MAX, Reason};
pub use tables::{Tables, classify};
pub use verdict::{Action, Verdict, Work};

/// The gateway's hardware address, the same for every guest: ARP for the gateway
/// and for every other address of the subnet is answered with it.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x68, 0x70, 0x00, 0x00, 0x01];
/// The same as a number.
pub const GATEWAY: u64 = packet::mac_number(GATEWAY_MAC);

/// The subnet router's link-local address: [`GATEWAY_MAC`]'s, the same for every guest.
pub const ROUTER_ADDRESS6: V6 = V6 { high: 0xfe80 << 48, low: 0x0068_70ff_fe00_0001 };

/// Where the metadata service is found, host byte order.
pub const METADATA_ADDRESS: u32 = 0xa9fe_a9fe;
/// Where the time is, 169.254.169.123.
pub const TIME_ADDRESS: u32 = 0xa9fe_a97b;
/// Where names are resolved for every network, 169.254.169.253; each network has one
/// more such address among its own.
pub const DNS_ADDRESS: u32 = 0xa9fe_a9fd;

/// The same three over IPv6, as EC2 has them: `fd00:ec2::254`, `::123` and `::253`.
pub const METADATA_ADDRESS6: V6 = V6 { high: 0xfd00_0ec2 << 32, low: 0x254 };
pub const TIME_ADDRESS6: V6 = V6 { high: 0xfd00_0ec2 << 32, low: 0x123 };
pub const DNS_ADDRESS6: V6 = V6 { high: 0xfd00_0ec2 << 32, low: 0x253 };

/// A verdict's mark on an skb handed to a guest's device or the punt device; the
/// guard there drops whatever does not carry it.
pub const VERDICT_MARK: u32 = 0x4850_0001;

/// The mark of a packet that is only asked about: the verdict is written into its
/// control block (`cb`) and nothing else is: no flow, no counter.
pub const ASK_MARK: u32 = 0x4850_0002;

/// The mark of a packet whose verdict is also written into its control block.
pub const TRACE_MARK: u32 = 0x4850_0003;

/// The mark of a fragment that was held ([`held`]) and comes again.
pub const HELD_MARK: u32 = 0x4850_0004;
