//! The load over NBD: a client of our own that costs little, the same for every
//! server. fio's engine spends some ten microseconds of CPU an operation, on the
//! cores that the server needs, and so measures itself.
//!
//! One thread and `epoll`: what has come is parsed in bulk, and the requests
//! that take the place of those answered go out in one system call. Payload is
//! read into one buffer that stays in the cache and is looked at no further;
//! that replies name requests, and errors, are checked. Called by `block::run`.

mod connection;
mod handshake;

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};

use super::address::Address;
use super::load::{Deed, Done, Load};
use connection::Connection;
pub use connection::{Header, REPLY_BYTES, header};
pub use handshake::begin;

/// A server that answers nothing for this long has failed.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Latencies above this count as this.
const LATENCY_NS_MAX: u64 = 60_000_000_000;

/// Connections that are open, and have asked for nothing yet.
pub struct Client {
    connections: Vec<Connection>,
    epoll: Epoll,
}

impl Client {
    /// Connects to an export of the server at `address`, as often as `load` says.
    pub fn open(address: &Address, export: &str, load: Load) -> anyhow::Result<Self> {
        let connections = (0..load.connections)
            .map(|index| Connection::open(address, export, load, u64::from(index)))
            .collect::<anyhow::Result<Vec<_>>>()?;
        let epoll = Epoll::new(EpollCreateFlags::empty())?;
        for (index, connection) in connections.iter().enumerate() {
            epoll.add(connection, interest(index, false))?;
        }
        Ok(Self { connections, epoll })
    }

    /// Puts the load on the server for `duration`, and waits for the last answer.
    pub fn run(mut self, duration: Duration) -> anyhow::Result<Done> {
        let mut latencies = Histogram::new_with_bounds(1, LATENCY_NS_MAX, 3)?;
        let begin = Instant::now();
        let end = begin + duration;
        let elapsed = drive(&self.epoll, &mut self.connections, begin, end, &mut latencies)?;
        for connection in self.connections {
            connection.close().context("disconnect")?;
        }
        ensure!(!latencies.is_empty(), "not one operation");
        let us = |quantile| latencies.value_at_quantile(quantile) as f64 / 1000.0;
        Ok(Done {
            operations: latencies.len(),
            iops: latencies.len() as f64 / elapsed.as_secs_f64(),
            p50_us: us(0.50),
            p99_us: us(0.99),
        })
    }
}

/// Puts `load` on the default export for `duration`, and waits for the last answer.
pub fn run(address: &Address, load: Load, duration: Duration) -> anyhow::Result<Done> {
    Client::open(address, "", load)?.run(duration)
}

/// Room to send is asked for only where something waits for it: else each request
/// that the server takes would wake this thread for nothing, at the server's cost.
fn interest(index: usize, is_blocked: bool) -> EpollEvent {
    let room = if is_blocked { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
    EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET | room, index as u64)
}

/// Until `end`, and on until nothing is in flight; how long that took.
fn drive(
    epoll: &Epoll,
    connections: &mut [Connection],
    begin: Instant,
    end: Instant,
    latencies: &mut Histogram<u64>,
) -> anyhow::Result<Duration> {
    let mut events = vec![EpollEvent::empty(); connections.len()];
    let mut was_blocked = vec![false; connections.len()];
    let timeout = EpollTimeout::try_from(SILENCE_MAX)?;
    let mut now = begin;
    for connection in &mut *connections {
        connection.ask(now)?;
    }
    while connections.iter().any(|c| c.in_flight() > 0) {
        for (index, connection) in connections.iter().enumerate() {
            let is_blocked = connection.is_blocked();
            if std::mem::replace(&mut was_blocked[index], is_blocked) != is_blocked {
                epoll.modify(connection, &mut interest(index, is_blocked))?;
            }
        }
        let count = epoll.wait(&mut events, timeout)?;
        ensure!(count > 0, "the server has been silent for {SILENCE_MAX:?}");
        for event in &events[..count] {
            let connection = &mut connections[event.data() as usize];
            connection.send()?;
            let mut is_more = true;
            while is_more {
                // A read that does not fill the buffer has emptied the socket (epoll(7)).
                is_more = connection.receive()?;
                now = Instant::now();
                connection.parse(now, latencies)?;
                if now < end {
                    connection.ask(now)?;
                }
            }
        }
    }
    Ok(now - begin)
}

impl Deed {
    const fn command(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
        }
    }
}

#[cfg(test)]
mod tests;
