//! A connection's bytes and the requests in them.

use std::os::fd::AsRawFd;

use super::border::{View, kind_of};
use super::connection::{Chosen, Closing, Receiving};
use super::moving::Leaving;
use super::{DRAIN_MAX, InFlight, Purpose, Worker};
use crate::engine::{Engine, Io};
use crate::nbd;
use crate::nbd::session::Answer;
use crate::volume::Request;

/// Payload of at least this size that has not come yet is received straight to
/// its place; smaller ones come with the next requests in one receive.
const STRAIGHT_MIN: usize = 32 << 10;

impl<E: Engine> Worker<E> {
    pub(super) fn received(&mut self, id: u32, result: i32) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        let what = std::mem::replace(&mut connection.receiving, Receiving::Nothing);
        if result > 0 {
            let count = result as usize;
            match (what, &mut connection.incoming) {
                (Receiving::Payload, Some((_, filled))) => {
                    *filled += count;
                    connection.session.payload_received(count as u64);
                }
                (Receiving::Sealed, _) => {
                    connection.unseal(count);
                    if connection.closing == Closing::Drain {
                        connection.deadline.get_or_insert(self.now + DRAIN_MAX);
                    }
                }
                _ => connection.session.received(count),
            }
        } else if !matches!(-result, libc::EAGAIN | libc::EINTR | libc::ECANCELED) {
            connection.closing = Closing::Dead;
        }
        self.touch_connection(id);
    }

    pub(super) fn sent(&mut self, id: u32, result: i32) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        if result >= 0 {
            connection.was_sent(result as usize);
        } else {
            connection.was_sent(0);
            if !matches!(-result, libc::EAGAIN | libc::EINTR | libc::ECANCELED) {
                connection.closing = Closing::Dead;
            }
        }
        self.touch_connection(id);
    }

    pub(super) fn serve_connection(&mut self, id: u32) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        connection.is_busy = false;
        if connection.closing == Closing::Dead {
            return self.bury(id);
        }
        while self.take_request(id) || self.open_sealed(id) {}
        let Some(connection) = self.connections.get_mut(id) else { return };
        if connection.leaving.is_some() {
            return self.send_home(id);
        }
        if connection.chosen.is_some() && connection.closing == Closing::No {
            // One that has said goodbye gets its last replies, if it fetches them.
            let leaves = connection.session.is_closed();
            let deadline = connection.deadline.filter(|_| leaves);
            connection.deadline = leaves.then(|| deadline.unwrap_or(self.now + DRAIN_MAX));
        }
        let may_begin = self.may_begin(id);
        let send_max = self.admission.send_max(self.clock_ns);
        let Some(connection) = self.connections.get_mut(id) else { return };
        if connection.has_output() && !connection.sending && may_begin {
            let io = Io::Send {
                socket: connection.socket.as_raw_fd(),
                message: connection.message(send_max),
            };
            // SAFETY: the connection is boxed and keeps the message, its vectors
            // and their bytes in place until `sent`.
            unsafe { self.engine.start(Purpose::Send(id).token(), io) }
        }
        let leaving = connection.session.is_closed() || connection.closing == Closing::Drain;
        if leaving && connection.say_goodbye() {
            return self.touch_connection(id);
        }
        let finished =
            connection.session.in_flight() == 0 && !connection.has_output() && !connection.sending;
        if leaving && finished {
            connection.closing = Closing::Dead;
            return self.bury(id);
        }
        self.receive(id);
    }

    /// Moves one request on from its session to its volume; `false` when there
    /// is none that could.
    fn take_request(&mut self, id: u32) -> bool {
        let Some(connection) = self.connections.get_mut(id) else { return false };
        if connection.held.is_some() || connection.leaving.is_some() {
            return false;
        }
        if let Some((ticket, filled)) = connection.incoming {
            // The kernel is writing to that buffer.
            if connection.receiving == Receiving::Payload {
                return false;
            }
            let Some(in_flight) = self.requests.get_mut(ticket) else {
                unreachable!("a write stays while its payload arrives")
            };
            let length = in_flight.request.length as usize;
            let at = in_flight.payload_at;
            let Some(buffer) = &mut in_flight.buffer else { unreachable!("a write has a buffer") };
            let target = &mut buffer.bytes_mut()[at + filled..at + length];
            let filled = filled + connection.session.take_payload(target);
            if filled < length {
                connection.incoming = Some((ticket, filled));
                return false;
            }
            connection.incoming = None;
            self.arrive(ticket);
            return true;
        }
        let view = View {
            exports: &connection.exports,
            volumes: &self.volumes,
            names: connection.names.as_ref(),
        };
        let request = connection.session.next_request(&view);
        if connection.chosen.is_none()
            && let Some(key) = connection.session.export_key()
            && let Some(served) = connection.exports.get(key as usize)
        {
            if served.home.is_some() {
                connection.leaving = Some(Leaving { export: key as usize, request });
                return false;
            }
            connection.chosen = Some(Chosen::new(served));
            if self.is_crowded(id) {
                return false;
            }
        }
        let Some(request) = request else { return false };
        let Some(connection) = self.connections.get_mut(id) else { return false };
        let Some(chosen) = &connection.chosen else {
            unreachable!("a request comes after an export was chosen")
        };
        let Some(volume) = self.volumes.get(chosen.volume) else {
            // Control removes a volume only when no export of it is left.
            connection.session.answer(&request, Answer::Failed(nbd::Error::Shutdown));
            return true;
        };
        let layout = volume.core.layout(kind_of(request.command), request.offset, request.length);
        let carries = matches!(request.command, nbd::Command::Read | nbd::Command::Write);
        let in_flight = InFlight {
            connection: id,
            volume: chosen.volume,
            request,
            buffer: (carries || layout.capacity > 0).then(|| self.pool.take(layout.capacity)),
            payload_at: layout.payload_at,
            arrived: self.now,
            admitted: self.now,
            begun: self.now,
        };
        let ticket = self.requests.insert(in_flight);
        if request.command == nbd::Command::Write && request.length > 0 {
            connection.incoming = Some((ticket, 0));
        } else {
            self.arrive(ticket);
        }
        true
    }

    /// Moves opened bytes on to the session; `false` when there are none, or no
    /// room for them. Also puts TLS in place once the peer was told to begin it.
    fn open_sealed(&mut self, id: u32) -> bool {
        self.connections.get_mut(id).is_some_and(|connection| connection.open_sealed())
    }

    pub(super) fn submit(&mut self, ticket: u32) {
        let Some(in_flight) = self.requests.get(ticket) else {
            unreachable!("request {ticket} is not in flight")
        };
        let index = in_flight.volume;
        let generation = self
            .connections
            .get(in_flight.connection)
            .and_then(|c| c.chosen.as_ref())
            .and_then(|chosen| chosen.generation);
        let request = Request {
            ticket,
            kind: kind_of(in_flight.request.command),
            offset: in_flight.request.offset,
            length: in_flight.request.length,
            fua: in_flight.request.fua,
            generation,
        };
        let Some(volume) = self.volumes.get_mut(index) else {
            unreachable!("volume {index} was there when the request came")
        };
        volume.core.submit(request);
        self.touch_volume(index);
    }

    fn receive(&mut self, id: u32) {
        if !self.may_begin(id) {
            return;
        }
        let Some(connection) = self.connections.get_mut(id) else { return };
        if connection.receives()
            || connection.held.is_some()
            || connection.session.is_closed()
            || connection.session.wants_tls()
            || (connection.closing == Closing::Drain && connection.session.in_flight() == 0)
        {
            return;
        }
        let socket = connection.socket.as_raw_fd();
        let straight = connection.session.payload_left() as usize >= STRAIGHT_MIN;
        if let Some(tls) = &mut connection.tls {
            let space = tls.space();
            if space.is_empty() {
                return;
            }
            let (into, length) = (space.as_mut_ptr(), space.len());
            connection.receiving = Receiving::Sealed;
            let io = Io::Receive { socket, into, length };
            // SAFETY: the layer's input is boxed with it and stays until `received`.
            return unsafe { self.engine.start(Purpose::Receive(id).token(), io) };
        }
        let (into, length) = match connection.incoming {
            Some((ticket, filled)) if straight => {
                let Some(in_flight) = self.requests.get_mut(ticket) else {
                    unreachable!("a write stays while its payload arrives")
                };
                let Some(buffer) = &mut in_flight.buffer else {
                    unreachable!("a write has a buffer")
                };
                connection.receiving = Receiving::Payload;
                let start = in_flight.payload_at + filled;
                let end = in_flight.payload_at + in_flight.request.length as usize;
                let place = &mut buffer.bytes_mut()[start..end];
                (place.as_mut_ptr(), place.len())
            }
            _ => {
                let space = connection.session.space();
                if space.is_empty() {
                    // It waits until requests are answered and replies sent.
                    return;
                }
                let place = (space.as_mut_ptr(), space.len());
                connection.receiving = Receiving::Space;
                place
            }
        };
        // SAFETY: the place is in the request's buffer, which is kept until the
        // payload is there, or in the session's input, which the session moves
        // only in `space`: not called while `receiving` says that the kernel
        // writes there.
        unsafe {
            self.engine.start(Purpose::Receive(id).token(), Io::Receive { socket, into, length })
        }
    }

    /// Ends a connection whose peer is gone or done, once nothing of it runs.
    pub(super) fn bury(&mut self, id: u32) {
        self.forget_held(id);
        let Some(connection) = self.connections.get_mut(id) else { return };
        connection.shut_down();
        if let Some(request) = connection.leaving.take().and_then(|leaving| leaving.request) {
            connection.session.answer(&request, Answer::Failed(nbd::Error::Shutdown));
        }
        if !connection.receives()
            && let Some((ticket, _)) = connection.incoming.take()
            && let Some(in_flight) = self.requests.remove(ticket)
        {
            // Its payload never came: the volume never saw it.
            let answer = Answer::Failed(nbd::Error::Shutdown);
            connection.session.answer(&in_flight.request, answer);
        }
        if connection.sending || connection.receives() {
            return;
        }
        connection.drop_output();
        if connection.session.in_flight() > 0 {
            return;
        }
        let listener = connection.listener;
        self.connections.remove(id);
        self.forget_listener(listener);
    }
}
