//! `netctl`, the command line of Hostplane.
//!
//! Two halves. [`deployment`] starts, watches and stops the four daemons of one
//! Hostplane on this host (`netctl up`, `down`, `status`, …). The nouns
//! ([`instance`], [`volume`], …) speak the EC2 Query API of `control` over its
//! unix socket, as any EC2 client would over TCP; the kernel vouches for the
//! caller, so no key is needed.
//!
//! What may never be true: that a noun reaches round the API into a daemon's
//! files, or that a process is ended because of its name.

#![forbid(unsafe_code)]

pub mod address;
pub mod api;
pub mod captured;
pub mod cli;
pub mod deployment;
pub mod failure;
pub mod flow;
pub mod group;
pub mod image;
pub mod instance;
pub mod instance_type;
pub mod interface;
pub mod key;
pub mod listing;
pub mod naming;
pub mod output;
pub mod reference;
pub mod subnet;
pub mod tag;
pub mod top;
pub mod volume;
pub mod volume_live;
pub mod vpc;
pub mod waiting;
pub mod why;
pub mod zone;

/// Waits for a daemon's answer. A command asks one thing after another, so each
/// question gets a small runtime of its own on this thread.
pub fn wait_for<T>(call: impl Future<Output = Result<T, rpc::Error>>) -> Result<T, rpc::Error> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| rpc::Error::unavailable(format!("start a runtime: {e}")))?
        .block_on(call)
}
