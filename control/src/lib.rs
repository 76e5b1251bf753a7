//! The control daemon's library: an EC2-compatible API over a store.
//!
//! `main` reads arguments, `daemon` starts the parts, `front` speaks HTTP to
//! tenants, `serve` to agents and administrators, `core` decides, `region` makes
//! decisions durable. It never touches a device: agents do, on what they are
//! told to be (`rpc::host`). What may never be true: an answer to a change that
//! is not on disk; a Describe that asks the store.

#![forbid(unsafe_code)]

pub mod api;
pub mod auth;
pub mod core;
pub mod credentials;
pub mod daemon;
pub mod filter;
pub mod front;
pub mod packets;
pub mod plan;
pub mod query;
pub mod record;
pub mod region;
pub mod serve;
pub mod settings;
pub mod state;
