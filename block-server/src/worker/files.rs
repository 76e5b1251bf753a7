//! A volume's operations on its file, and its replies.

use super::border::{error_of, report};
use super::guest::GUEST;
use super::quality::BARRIER;
use super::{Event, InFlight, Purpose, Slots, Worker};
use crate::engine::{Engine, Io, Window, extents};
use crate::nbd::session::Answer;
use crate::nbd::transmission::EXTENTS_MAX;
use crate::nbd::{self, wire};
use crate::volume::{Op, Outcome, Reply, Token, Trouble};

impl<E: Engine> Worker<E> {
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
        let piece_max = self.admission.piece_max(self.clock_ns);
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
                let length = length.min(piece_max);
                let into = buffer_of(&mut self.requests, ticket, at, length);
                Io::Read { file, into, length, offset }
            }
            Op::Write { ticket, at, offset, length, durable } => {
                // Each piece of a durable one would be a sync of its own.
                let length = if durable { length } else { length.min(piece_max) };
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

    pub(super) fn answer(&mut self, reply: Reply) {
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
}
