//! What our daemons say to each other: the types, a client and a server.
//!
//! Every control socket is a unix socket under the run directory that speaks
//! HTTP/1.1 with JSON bodies, so `curl --unix-socket` serves for looking in.
//! The server asks the kernel who calls (`SO_PEERCRED`) and refuses strangers.
//! One module a daemon; each holds that daemon's nouns and its [`Client`] calls.
//!
//! | socket (under the run directory) | served by | called by |
//! |---|---|---|
//! | `dataplane.sock` | `dataplane` | `agent`, `netctl` |
//! | `block-server.sock` | `block-server` | `agent`, `netctl` |
//! | `agent.sock` | `agent` | `control`, `netctl` |
//! | `control.sock` | `control` | `agent` ([`host`]), `netctl` (the EC2 API) |

#![forbid(unsafe_code)]

pub mod agent;
pub mod block;
pub mod client;
pub mod control;
pub mod dataplane;
pub mod deployment;
pub mod error;
pub mod host;
pub mod server;

pub use client::Client;
pub use deployment::Deployment;
pub use error::{Error, Kind};
