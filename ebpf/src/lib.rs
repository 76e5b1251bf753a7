//! What the packet path decides, and the layouts of the maps that it decides by.
#![cfg_attr(not(test), no_std)]
#![forbid(unsafe_code)]

pub mod punt;

pub use punt::{PUNT_MAC_PREFIX, ifindex_of, punt_mac};

/// The gateway's hardware address, the same for every guest: ARP for the gateway
/// and for every other address of the subnet is answered with it.
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x68, 0x70, 0x00, 0x00, 0x01];

/// Where the metadata service is found, host byte order.
pub const METADATA_ADDRESS: u32 = 0xa9fe_a9fe;

/// A verdict's mark on an skb handed to a guest's device; the guard on that
/// device drops whatever does not carry it.
pub const VERDICT_MARK: u32 = 0x4850_0001;
