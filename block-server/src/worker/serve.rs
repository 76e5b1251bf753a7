//! What a worker does: commands, connections, requests and file operations.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use super::border::{View, admits, error_of, kind_of, report, set_no_delay};
use super::connection::{Chosen, Closing, Connection, Receiving};
use super::guest::GUEST;
use super::places::Origin;
use super::quality::BARRIER;
use super::{
    Command, DRAIN_MAX, Event, Front, HANDSHAKE_MAX, InFlight, Listener, Purpose, Slots, Volume,
    Waiter, Worker,
};
use crate::engine::{Engine, Io, Window, extents};
use crate::nbd::session::Answer;
use crate::nbd::transmission::EXTENTS_MAX;
use crate::nbd::{self, wire};
use crate::volume::{Core, Op, Outcome, Reply, Request, Token, Trouble};

/// Payload of at least this size that has not come yet is received straight to
/// its place; smaller ones come with the next requests in one receive.
const STRAIGHT_MIN: usize = 32 << 10;

impl<E: Engine> Worker<E> {
    pub(super) fn obey(&mut self, command: Command, now: Instant) {
        match command {
            Command::AddVolume(new, done) => {
                let file = self.engine.add_file(new.fd.as_fd());
                let core = Core::new(new.geometry, new.generation, new.carried.failed);
                let volume = Volume {
                    name: new.name,
                    core,
                    file,
                    _fd: new.fd,
                    counters: new.counters,
                    ops: 0,
                    is_busy: false,
                    held_until: None,
                    barrier: None,
                };
                let index = self.volumes.insert(volume);
                self.admission.add(index, new.limits);
                self.admission.owe(self.clock_ns, index, new.carried.lack);
                if let Some(ms) = new.carried.held_ms {
                    self.hold_on(index, now + Duration::from_millis(ms));
                }
                let _ = done.send(index);
            }
            Command::RemoveVolume(volume, done) => {
                self.waiters.push(Waiter::VolumeIdle { volume, done });
            }
            Command::AddListener { socket, front, access, exports, done } => {
                let listener = Listener {
                    socket,
                    access,
                    exports: exports.into(),
                    front,
                    closing: false,
                    draining: false,
                    accepting: false,
                    told_full: false,
                    told_crowd: false,
                };
                let index = self.listeners.insert(listener);
                self.accept(index);
                let _ = done.send(index);
            }
            Command::SetExports { listener, access, exports } => {
                if let Some(served) = exports.first() {
                    self.devices_heard(listener, served);
                }
                if let Some(listener) = self.listeners.get_mut(listener) {
                    listener.exports = exports.into();
                    listener.access = access;
                }
            }
            Command::RemoveListener(index, done) => {
                self.close_listener(index, true, now);
                self.waiters.push(Waiter::ListenerGone { listener: index, done });
            }
            Command::Raise { volume, generation, done } => {
                if let Some(volume) = self.volumes.get_mut(volume) {
                    if volume.core.generation() < generation {
                        volume.counters.fenced();
                    }
                    volume.core.raise(generation);
                }
                self.touch_volume(volume);
                self.waiters.push(Waiter::Fenced { volume, done });
            }
            Command::SetLimits { volume, limits } => {
                self.admission.set_limits(self.clock_ns, volume, limits);
            }
            Command::Grow { volume, size, done } => {
                if let Some(volume) = self.volumes.get_mut(volume) {
                    volume.core.grow(size);
                }
                let _ = done.send(());
            }
            Command::Hold { volume, deadline, done } => self.hold(volume, now + deadline, done),
            Command::Release(volume) => self.release(volume),
            Command::Reconnect(volume) => {
                self.drain_connections(now, |c| {
                    c.chosen.as_ref().is_some_and(|chosen| chosen.volume == volume)
                });
            }
            Command::Drain { listener, draining, done } => {
                self.drain_listener(listener, draining, now);
                if draining {
                    self.waiters.push(Waiter::ListenerEmpty { listener, done });
                } else {
                    let _ = done.send(());
                }
            }
            Command::List(done) => {
                let _ = done.send(self.list_connections(now));
            }
            Command::Disconnect(serial) => self.drain_connections(now, |c| c.serial == serial),
            Command::Park(done) => self.park(done, now),
            Command::AddConnections(connections) => self.add_connections(connections, now),
            Command::Stop => {
                self.stopping = true;
                let all: Vec<u32> = self.listeners.iter().map(|(index, _)| index).collect();
                for index in all {
                    self.close_listener(index, false, now);
                }
            }
        }
    }

    /// `refuse`: further requests are answered ESHUTDOWN, since the export goes
    /// for good. Otherwise they are left unread, for the client to send again
    /// when it has reconnected.
    fn close_listener(&mut self, index: u32, refuse: bool, now: Instant) {
        let Some(listener) = self.listeners.get_mut(index) else { return };
        listener.closing = true;
        if listener.accepting {
            self.engine.cancel(Purpose::Accept(index).token());
        }
        let mut touched = Vec::new();
        for (id, connection) in self.connections.slots.iter_mut().enumerate() {
            let Some(connection) = connection.as_mut().filter(|c| c.listener == index) else {
                continue;
            };
            if refuse {
                connection.session.refuse_further();
            } else {
                connection.session.stop_reading();
            }
            connection.closing = connection.closing.max(Closing::Drain);
            connection.deadline = Some(now + DRAIN_MAX);
            touched.push(id as u32);
        }
        for id in touched {
            self.touch_connection(id);
        }
        self.close_devices(index, now);
        self.forget_listener(index);
    }

    pub(super) fn forget_listener(&mut self, index: u32) {
        let has_connections = self.connections.iter().any(|(_, c)| c.listener == index)
            || self.devices.iter().any(|(_, d)| d.listener == index);
        if self.listeners.get(index).is_some_and(|l| l.closing && !l.accepting) && !has_connections
        {
            self.listeners.remove(index);
        }
    }

    pub(super) fn accept(&mut self, index: u32) {
        if !self.is_accepting() {
            return;
        }
        let Some(listener) = self.listeners.get_mut(index).filter(|l| !l.closing) else { return };
        listener.accepting = true;
        let io = Io::Accept { listener: listener.socket.as_raw_fd() };
        // SAFETY: this operation names no memory.
        unsafe { self.engine.start(Purpose::Accept(index).token(), io) }
    }

    pub(super) fn accepted(&mut self, index: u32, result: i32, now: Instant) {
        let Some(listener) = self.listeners.get_mut(index) else { return };
        listener.accepting = false;
        if result >= 0 {
            // SAFETY: the kernel just gave this descriptor to us.
            let socket = unsafe { OwnedFd::from_raw_fd(result) };
            let (access, exports) = (listener.access.clone(), Rc::clone(&listener.exports));
            let (front, is_draining) = (listener.front, listener.draining);
            if is_draining {
                drop(socket);
            } else if front == Front::VhostUser {
                if let Some(served) = exports.first().filter(|_| admits(&access, &socket)) {
                    self.device_came(socket, index, served, now);
                }
            } else if admits(&access, &socket) {
                set_no_delay(&socket);
                let from = Origin::of(&socket);
                if self.make_room(index, from) {
                    let deadline = now + HANDSHAKE_MAX;
                    let connection =
                        Connection::new(socket, index, exports, access, now, deadline).from(from);
                    let id = self.connections.insert(Box::new(connection));
                    self.touch_connection(id);
                }
            }
        } else if matches!(-result, libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS) {
            // Until the next tick: it would only fail again at once.
            if !std::mem::replace(&mut listener.told_full, true) {
                let cause = std::io::Error::from_raw_os_error(-result);
                tracing::error!("cannot accept connections: {cause}");
            }
            return self.forget_listener(index);
        }
        self.accept(index);
        self.forget_listener(index);
    }

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
        if connection.chosen.is_some() && connection.closing == Closing::No {
            // One that has said goodbye gets its last replies, if it fetches them.
            let leaves = connection.session.is_closed();
            let deadline = connection.deadline.filter(|_| leaves);
            connection.deadline = leaves.then(|| deadline.unwrap_or(self.now + DRAIN_MAX));
        }
        let may_begin = self.may_begin(id);
        let Some(connection) = self.connections.get_mut(id) else { return };
        if connection.has_output() && !connection.sending && may_begin {
            let io =
                Io::Send { socket: connection.socket.as_raw_fd(), message: connection.message() };
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
        if connection.held.is_some() {
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
            && let Some(served) =
                connection.session.export_key().and_then(|key| connection.exports.get(key as usize))
        {
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
        if connection.receiving != Receiving::Nothing
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
    fn bury(&mut self, id: u32) {
        self.forget_held(id);
        let Some(connection) = self.connections.get_mut(id) else { return };
        connection.shut_down();
        if connection.receiving == Receiving::Nothing
            && let Some((ticket, _)) = connection.incoming.take()
            && let Some(in_flight) = self.requests.remove(ticket)
        {
            // Its payload never came: the volume never saw it.
            let answer = Answer::Failed(nbd::Error::Shutdown);
            connection.session.answer(&in_flight.request, answer);
        }
        if connection.sending || connection.receiving != Receiving::Nothing {
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

    /// Also takes up accepting where the system was out of something.
    pub(super) fn enforce_deadlines(&mut self, now: Instant) {
        let deaf: Vec<u32> =
            self.listeners.iter().filter(|(_, l)| !l.accepting).map(|(index, _)| index).collect();
        for index in deaf {
            self.accept(index);
        }
        let late: Vec<u32> = self
            .connections
            .iter()
            .filter(|(_, c)| c.deadline.is_some_and(|d| d <= now))
            .map(|(id, _)| id)
            .collect();
        for id in late {
            if let Some(connection) = self.connections.get_mut(id) {
                connection.closing = Closing::Dead;
            }
            self.touch_connection(id);
        }
    }

    pub(super) fn file_op_ended(&mut self, index: u32, op: u32, result: i32) {
        self.file_ops -= 1;
        let Some(volume) = self.volumes.get_mut(index) else {
            unreachable!("a volume stays while its operations run")
        };
        volume.ops -= 1;
        let outcome =
            if result < 0 { Outcome::Failed(-result) } else { Outcome::Done(result as usize) };
        volume.core.complete(Token(op), outcome);
        self.touch_volume(index);
    }

    pub(super) fn serve_volume(&mut self, index: u32) {
        if let Some(volume) = self.volumes.get_mut(index) {
            volume.is_busy = false;
        }
        loop {
            let Some(volume) = self.volumes.get_mut(index) else { return };
            if let Some((token, op)) = volume.core.next_op() {
                self.start_op(index, token, op);
            } else if let Some(reply) = volume.core.next_reply() {
                if reply.ticket == BARRIER {
                    self.barrier_ended(index, &reply);
                } else if reply.ticket >= GUEST {
                    self.answer_guest(&reply);
                } else {
                    self.answer(reply);
                }
            } else if let Some(trouble) = volume.core.next_trouble() {
                report(&volume.name, &trouble);
                if let Trouble::Failed { reason } = trouble {
                    let event = Event::VolumeFailed { name: volume.name.clone(), reason };
                    let _ = self.events.send(event);
                }
            } else {
                return;
            }
        }
    }

    fn start_op(&mut self, index: u32, token: Token, op: Op) {
        let Some(volume) = self.volumes.get_mut(index) else { return };
        let file = volume.file;
        let now = self.now;
        let buffer_of = |requests: &mut Slots<InFlight>, ticket, at: usize, length: usize| {
            let Some(in_flight) = requests.get_mut(ticket) else {
                unreachable!("an operation's request is in flight")
            };
            if in_flight.begun == in_flight.admitted {
                in_flight.begun = now;
            }
            let Some(buffer) = &mut in_flight.buffer else {
                unreachable!("a request that moves bytes has a buffer")
            };
            buffer.bytes_mut()[at..at + length].as_mut_ptr()
        };
        let io = match op {
            Op::Read { ticket, at, offset, length } if ticket >= GUEST => {
                self.guest_requests.read((ticket & !GUEST, now), file, at, offset, length)
            }
            Op::Write { ticket, at, offset, length, durable } if ticket >= GUEST => {
                self.guest_requests.write((ticket & !GUEST, now), file, at, offset, length, durable)
            }
            Op::Copy { ticket, from, to, length } if ticket >= GUEST => {
                return self.guest_requests.copy((ticket & !GUEST, now), from, to, length);
            }
            Op::Fill { ticket, at, length } if ticket >= GUEST => {
                return self.guest_requests.fill((ticket & !GUEST, now), at, length);
            }
            Op::Fill { ticket, at, length } => {
                if let Some(buffer) = self.requests.get_mut(ticket).and_then(|r| r.buffer.as_mut())
                {
                    buffer.bytes_mut()[at..at + length].fill(0);
                }
                return;
            }
            Op::Read { ticket, at, offset, length } => {
                let into = buffer_of(&mut self.requests, ticket, at, length);
                Io::Read { file, into, length, offset }
            }
            Op::Write { ticket, at, offset, length, durable } => {
                let from = buffer_of(&mut self.requests, ticket, at, length);
                Io::Write { file, from, length, offset, durable }
            }
            Op::Copy { ticket, from, to, length } => {
                if let Some(buffer) = self.requests.get_mut(ticket).and_then(|r| r.buffer.as_mut())
                {
                    buffer.bytes_mut().copy_within(from..from + length, to);
                }
                return;
            }
            Op::Punch { offset, length } => {
                let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
                Io::Allocate { file, mode, offset, length }
            }
            Op::Zero { offset, length } => {
                let mode = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
                Io::Allocate { file, mode, offset, length }
            }
            Op::WriteZeros { offset, length } => {
                let from = self.zeros.address();
                Io::Write { file, from, length: length as usize, offset, durable: false }
            }
            Op::Sync => {
                volume.counters.synced();
                Io::Sync { file }
            }
            Op::Prefetch { .. } => {
                // O_DIRECT has no cache to fill; the advice is heard, and that is all.
                return volume.core.complete(token, Outcome::Done(1));
            }
            Op::Extents { offset, length } => {
                let outcome = match extents(file, offset, length, EXTENTS_MAX) {
                    Ok(found) => Outcome::Extents(
                        found
                            .into_iter()
                            .map(|(length, hole)| {
                                let state =
                                    if hole { wire::state::HOLE | wire::state::ZERO } else { 0 };
                                (length, state)
                            })
                            .collect(),
                    ),
                    Err(error) => Outcome::Failed(error.raw_os_error().unwrap_or(libc::EIO)),
                };
                return volume.core.complete(token, outcome);
            }
        };
        volume.ops += 1;
        self.file_ops += 1;
        // SAFETY: the memory is the request's buffer, which goes only with the
        // reply, after the core saw this operation's completion; or the zeros,
        // which nobody writes to and which live as long as the worker.
        unsafe { self.engine.start(Purpose::Volume(index, token.0).token(), io) }
    }

    fn answer(&mut self, reply: Reply) {
        let Some(in_flight) = self.requests.remove(reply.ticket) else {
            unreachable!("request {} is answered once", reply.ticket)
        };
        let request = in_flight.request;
        self.account(&in_flight.past(), reply.result.as_ref().err().map(|errno| error_of(*errno)));
        let Some(connection) = self.connections.get_mut(in_flight.connection) else {
            unreachable!("a connection stays while its requests are in flight")
        };
        let answer = match (reply.result, request.command, in_flight.buffer) {
            (Err(errno), ..) => Answer::Failed(error_of(errno)),
            (Ok(_), nbd::Command::Read, Some(buffer)) => Answer::Data(Window {
                buffer,
                at: in_flight.payload_at,
                length: request.length as usize,
            }),
            (Ok(extents), nbd::Command::BlockStatus { .. }, _) => Answer::Extents(extents),
            (Ok(_), ..) => Answer::Done,
        };
        connection.session.answer(&request, answer);
        self.touch_connection(in_flight.connection);
    }

    pub(super) fn tell_waiters(&mut self) {
        for waiter in std::mem::take(&mut self.waiters) {
            match waiter {
                Waiter::Fenced { volume, done } => {
                    if self.volumes.get(volume).is_some_and(|v| v.core.has_older()) {
                        self.waiters.push(Waiter::Fenced { volume, done });
                    } else {
                        let _ = done.send(());
                    }
                }
                Waiter::ListenerGone { listener, done } => {
                    if self.listeners.get(listener).is_some() {
                        self.waiters.push(Waiter::ListenerGone { listener, done });
                    } else {
                        let _ = done.send(());
                    }
                }
                Waiter::VolumeIdle { volume, done } => {
                    let busy = |v: &Volume| v.ops > 0 || v.core.in_flight() > 0;
                    if self.volumes.get(volume).is_some_and(busy) {
                        self.waiters.push(Waiter::VolumeIdle { volume, done });
                    } else {
                        if let Some(gone) = self.volumes.remove(volume) {
                            self.admission.remove(volume);
                            self.engine.remove_file(gone.file);
                        }
                        let _ = done.send(());
                    }
                }
                Waiter::ListenerEmpty { listener, done } => {
                    let busy = self.listeners.get(listener).is_some_and(|l| l.draining)
                        && self.connections.iter().any(|(_, c)| c.listener == listener);
                    if busy {
                        self.waiters.push(Waiter::ListenerEmpty { listener, done });
                    } else {
                        let _ = done.send(());
                    }
                }
                Waiter::Quiesced { volume, mut asked, done } => {
                    match self.is_quiesced(volume, &mut asked) {
                        None => self.waiters.push(Waiter::Quiesced { volume, asked, done }),
                        Some(result) => {
                            let _ = done.send(result);
                        }
                    }
                }
            }
        }
    }
}
