//! The instance metadata service, version 2 only (EC2 user guide, "Use IMDS").
//!
//! `http` cuts requests out of bytes, `service` answers them, `documents` finds
//! what a path means, `token` seals and opens session tokens. All are cores;
//! `super::interface` gives them a TCP stream.

mod documents;
mod http;
mod service;
mod token;

pub use documents::{Documents, MalformedDocument};
pub use http::Session;
pub use service::Service;
pub use token::TokenKey;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The program on the tap lets the second through where it was enabled.
pub const ADDRESSES: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::from_bits(ebpf::METADATA_ADDRESS)),
    IpAddr::V6(Ipv6Addr::from_bits(ebpf::METADATA_ADDRESS6.bits())),
];
pub const PORT: u16 = 80;
