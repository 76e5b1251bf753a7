//! What a worker does to keep limits and turns, and what control may do to the
//! volumes and connections that it serves.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use super::connection::Closing;
use super::control::ConnectionInfo;
use super::guest::GUEST;
use super::{DRAIN_MAX, InFlight, Waiter, Worker};
use crate::engine::Engine;
use crate::nbd;
use crate::throttle::{Arrival, Class};
use crate::volume::{Kind, Reply, Request, Ticket};

/// The request of our own that makes a held volume durable; no connection's
/// request gets so far.
pub(super) const BARRIER: Ticket = u32::MAX;

/// Lines of the slow-operation log that one worker writes in a second.
const SLOW_LINES_MAX: u32 = 10;

/// Requests that take as long are logged; `u64::MAX`: none.
static SLOW_US: AtomicU64 = AtomicU64::new(u64::MAX);

/// Sets the threshold of the slow-operation log for the process; `None`: no log.
pub fn set_slow_log(threshold: Option<Duration>) {
    let us = threshold.map_or(u64::MAX, |t| u64::try_from(t.as_micros()).unwrap_or(u64::MAX));
    SLOW_US.store(us, Ordering::Relaxed);
}

/// How many lines the log had in this second, and how many it should have had.
#[derive(Debug, Default)]
pub(super) struct SlowLog {
    second: u64,
    lines: u32,
}

/// What is said of a request when it is answered, whichever front it came by.
pub(super) struct Past {
    pub volume: u32,
    /// Its kind, by the name that NBD has for it.
    pub command: nbd::Command,
    pub offset: u64,
    pub length: u64,
    pub arrived: Instant,
    pub admitted: Instant,
    pub begun: Instant,
}

impl InFlight {
    pub(super) const fn past(&self) -> Past {
        Past {
            volume: self.volume,
            command: self.request.command,
            offset: self.request.offset,
            length: self.request.length,
            arrived: self.arrived,
            admitted: self.admitted,
            begun: self.begun,
        }
    }
}

pub(super) const fn class_of(command: nbd::Command) -> Class {
    match command {
        nbd::Command::Read => Class::Read,
        nbd::Command::Write => Class::Write,
        nbd::Command::Trim | nbd::Command::WriteZeroes { .. } => Class::Change,
        nbd::Command::Flush => Class::Flush,
        nbd::Command::Cache | nbd::Command::BlockStatus { .. } => Class::Ask,
    }
}

impl<E: Engine> Worker<E> {
    /// A request is there, with its payload: it goes on, or waits.
    pub(super) fn arrive(&mut self, ticket: Ticket) {
        let Some(in_flight) = self.requests.get(ticket) else {
            unreachable!("request {ticket} is not in flight")
        };
        let nbd::Request { command, offset, length, .. } = in_flight.request;
        let arrival = Arrival { ticket, class: class_of(command), offset, length };
        let (volume, connection) = (in_flight.volume, in_flight.connection);
        if let Some(volume) = self.volumes.get(volume) {
            volume.counters.arrived();
        }
        if self.admission.arrive(self.clock_ns, volume, &arrival) {
            self.submit(ticket);
        } else if let Some(connection) = self.connections.get_mut(connection) {
            connection.held = Some(ticket);
        }
    }

    /// Lets go on what may; `false` when nothing may.
    pub(super) fn admit_waiting(&mut self) -> bool {
        let mut any = false;
        while let Some((_, ticket)) = self.admission.next(self.clock_ns) {
            any = true;
            if ticket >= GUEST {
                self.admit_guest(ticket);
                continue;
            }
            let Some(in_flight) = self.requests.get_mut(ticket) else {
                unreachable!("request {ticket} waits, so it is in flight")
            };
            let waited = self.now.saturating_duration_since(in_flight.arrived);
            (in_flight.admitted, in_flight.begun) = (self.now, self.now);
            let (connection, volume) = (in_flight.connection, in_flight.volume);
            if let Some(volume) = self.volumes.get(volume) {
                volume.counters.throttled(waited);
            }
            if let Some(connection) = self.connections.get_mut(connection) {
                connection.held = None;
            }
            self.submit(ticket);
            self.touch_connection(connection);
        }
        any
    }

    /// The connection is dead: its request that waits never goes.
    pub(super) fn forget_held(&mut self, id: u32) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        let Some(ticket) = connection.held.take() else { return };
        let Some(in_flight) = self.requests.remove(ticket) else { return };
        self.admission.forget(in_flight.volume, ticket);
        let error = nbd::Error::Shutdown;
        if let Some(volume) = self.volumes.get(in_flight.volume) {
            let waited = self.now.saturating_duration_since(in_flight.arrived);
            volume.counters.answered(in_flight.request.command, 0, waited, Some(error));
        }
        connection.session.answer(&in_flight.request, nbd::session::Answer::Failed(error));
    }

    /// Counts a request that is being answered; says so where it was slow.
    pub(super) fn account(&mut self, past: &Past, error: Option<nbd::Error>) {
        let Past { command, offset, length, .. } = *past;
        self.admission.ended(past.volume, class_of(command), length);
        let Some(volume) = self.volumes.get(past.volume) else { return };
        let took = self.now.saturating_duration_since(past.arrived);
        volume.counters.answered(command, length, took, error);
        // Off, it costs a load and a comparison (docs/adr/0039).
        tracing::trace!(
            volume = volume.name,
            ?command,
            offset,
            length,
            us = took.as_micros() as u64,
            ?error,
            "answered"
        );
        if took.as_micros() < u128::from(SLOW_US.load(Ordering::Relaxed)) {
            return;
        }
        volume.counters.was_slow();
        let second = self.clock_ns / 1_000_000_000;
        if self.slow_log.second != second {
            let unsaid = self.slow_log.lines.saturating_sub(SLOW_LINES_MAX);
            if unsaid > 0 {
                tracing::warn!("{unsaid} further slow operations were not logged");
            }
            self.slow_log = SlowLog { second, lines: 0 };
        }
        self.slow_log.lines += 1;
        if self.slow_log.lines <= SLOW_LINES_MAX {
            let ms = |d: Duration| d.as_micros() as f64 / 1000.0;
            tracing::warn!(
                "volume {}: slow {:?} of {length} bytes at {offset}: {:.1} ms \
                 ({:.1} throttled, {:.1} queued, {:.1} disk)",
                volume.name,
                command,
                ms(took),
                ms(past.admitted - past.arrived),
                ms(past.begun - past.admitted),
                ms(self.now - past.begun),
            );
        }
    }

    /// Makes changes wait, and all that was acknowledged durable.
    pub(super) fn hold(&mut self, index: u32, until: Instant, done: super::control::Barrier) {
        if self.volumes.get(index).is_none() {
            return;
        }
        self.hold_on(index, until);
        self.waiters.push(Waiter::Quiesced { volume: index, asked: false, done });
    }

    /// Makes changes wait; what was acknowledged is durable already, or will be asked for.
    pub(super) fn hold_on(&mut self, index: u32, until: Instant) {
        let Some(volume) = self.volumes.get_mut(index) else { return };
        volume.held_until = Some(until);
        self.admission.hold(index);
    }

    pub(super) fn release(&mut self, index: u32) {
        if let Some(volume) = self.volumes.get_mut(index) {
            volume.held_until = None;
            self.admission.release(index);
        }
    }

    /// `None` while changes run or the barrier does; then whether all is durable.
    pub(super) fn is_quiesced(
        &mut self,
        index: u32,
        asked: &mut bool,
    ) -> Option<Result<(), String>> {
        let Some(volume) = self.volumes.get_mut(index) else {
            return Some(Err("the volume is gone".to_owned()));
        };
        if volume.held_until.is_none() {
            return Some(Err("its changes go on again: the deadline has passed".to_owned()));
        }
        if !*asked {
            if volume.core.has_changes() {
                return None;
            }
            (*asked, volume.barrier) = (true, None);
            volume.core.submit(Request {
                ticket: BARRIER,
                kind: Kind::Flush,
                offset: 0,
                length: 0,
                fua: false,
                generation: None,
            });
            self.serve_volume(index);
        }
        let volume = self.volumes.get(index)?;
        let result = volume.barrier?;
        Some(result.map_err(|errno| {
            format!("it cannot be made durable: {}", std::io::Error::from_raw_os_error(errno))
        }))
    }

    pub(super) fn barrier_ended(&mut self, index: u32, reply: &Reply) {
        if let Some(volume) = self.volumes.get_mut(index) {
            volume.barrier = Some(reply.result.as_ref().map(drop).map_err(|errno| *errno));
        }
    }

    pub(super) fn release_overdue(&mut self, now: Instant) {
        let overdue: Vec<u32> = self
            .volumes
            .iter()
            .filter(|(_, v)| v.held_until.is_some_and(|until| until <= now))
            .map(|(index, _)| index)
            .collect();
        for index in overdue {
            if let Some(volume) = self.volumes.get(index) {
                tracing::warn!("volume {}: the quiesce's deadline has passed", volume.name);
            }
            self.release(index);
        }
    }

    /// Ends those connections when what they have in flight is answered.
    pub(super) fn drain_connections(
        &mut self,
        now: Instant,
        which: impl Fn(&super::Connection) -> bool,
    ) {
        let mut touched = Vec::new();
        for (id, connection) in self.connections.slots.iter_mut().enumerate() {
            let Some(connection) = connection.as_mut().filter(|c| which(c)) else { continue };
            // What is not read yet, the client sends again when it has reconnected.
            connection.session.stop_reading();
            connection.closing = connection.closing.max(Closing::Drain);
            connection.deadline = Some(now + DRAIN_MAX);
            touched.push(id as u32);
        }
        for id in touched {
            self.touch_connection(id);
        }
    }

    pub(super) fn drain_listener(&mut self, index: u32, draining: bool, now: Instant) {
        let Some(listener) = self.listeners.get_mut(index) else { return };
        listener.draining = draining;
        if draining {
            self.drain_connections(now, |c| c.listener == index);
            self.close_devices(index, now);
        }
    }

    pub(super) fn list_connections(&self, now: Instant) -> Vec<ConnectionInfo> {
        self.connections
            .iter()
            .map(|(_, connection)| {
                let served = connection
                    .session
                    .export_key()
                    .and_then(|key| connection.exports.get(key as usize));
                ConnectionInfo {
                    id: connection.serial,
                    export: served.map(|s| s.name.clone()),
                    peer: peer_of(&connection.socket),
                    read_only: served.is_some_and(|s| s.read_only),
                    in_flight: connection.session.in_flight() as u64,
                    waits: connection.held.is_some(),
                    age: now.saturating_duration_since(connection.since),
                }
            })
            .collect()
    }
}

fn peer_of(socket: &OwnedFd) -> String {
    match rustix::net::getpeername(socket).map(|peer| peer.map(std::net::SocketAddr::try_from)) {
        Ok(Some(Ok(address))) => address.to_string(),
        _ => match rustix::net::sockopt::socket_peercred(socket) {
            Ok(peer) => format!("uid {} pid {}", peer.uid.as_raw(), peer.pid.as_raw_nonzero()),
            Err(_) => "unknown".to_owned(),
        },
    }
}
