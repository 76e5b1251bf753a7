//! The whole machine, run as its users run it: a deployment brought up by
//! `netctl up`, guests that boot from a real image, a namespace that plays the
//! internet, and stock clients.
//!
//! - [`deployment`] brings a Hostplane of its own up, finds its daemons, takes it down;
//! - [`internet`] acts inside the namespace behind the uplink;
//! - [`guest`] speaks to a guest over SSH;
//! - [`operator`] is whoever gives the orders: `netctl`, or the stock `aws` client;
//! - [`story`] is the tale that both `./x demo` and the end-to-end tests tell, step by step.
//!
//! This is a shell through and through: it may sleep and ask the clock.

#![forbid(unsafe_code)]
#![allow(clippy::disallowed_methods, reason = "tests of running programs live in real time")]

pub mod deployment;
pub mod guest;
pub mod internet;
pub mod operator;
pub mod program;
pub mod small_disk;
pub mod story;
