//! The daemon as a black box: the real binary, the real kernel, namespaces that
//! play the host, the internet and the guests, and clients that are not ours.
//!
//! Needs root. Every world has names of its own, so tests run side by side.

mod acls;
mod address;
mod alone;
mod confined;
mod corners;
mod elastic;
mod fast;
mod hops;
mod moved;
mod names;
mod nat;
mod observe;
mod pieces;
mod rates;
mod rewrite;
mod router;
mod routes;
mod secondary;
mod services;
mod six;
mod strangers;
mod survive;
mod teardown;
mod traffic;
mod untracked;
mod upgrade;
mod world;
