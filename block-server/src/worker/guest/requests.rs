//! A request's way: understood, past its volume's limits, into the core, answered.

use std::rc::Rc;

use super::{GUEST, PIECES_MAX};
use crate::engine::Engine;
use crate::nbd;
use crate::throttle::Arrival;
use crate::vhost::block::{Deed as Work, Request as Asked, Status};
use crate::vhost::memory::{GuestMemory, Memory};
use crate::vhost::queue::Chain;
use crate::volume::{Kind, Reply, Request, Ticket};
use crate::worker::Worker;
use crate::worker::border::error_of;
use crate::worker::device::{GuestRequest, Payload};
use crate::worker::quality::{Past, class_of};

impl<E: Engine> Worker<E> {
    /// Hands a request to its volume, or answers it.
    pub(super) fn begin(&mut self, id: u32, ring: u16, chain: &mut Chain) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let memory = Rc::clone(&device.memory);
        let asked = match device.protocol.disk().understand(&*memory, chain) {
            Ok(asked) => asked,
            Err(malformed) => return self.break_ring(id, ring, &malformed.to_string()),
        };
        match asked.deed {
            Work::Refuse(status) => self.finish(id, ring, &memory, asked, status, 0),
            Work::Identify => {
                let name = device.protocol.disk().id;
                let written = put(&memory, chain, &name[..asked.length as usize]);
                self.finish(id, ring, &memory, asked, Status::Ok, written);
            }
            Work::Volume(kind) => self.begin_volume(id, ring, memory, chain, asked, kind),
        }
    }

    fn begin_volume(
        &mut self,
        id: u32,
        ring: u16,
        memory: Rc<GuestMemory>,
        chain: &Chain,
        asked: Asked,
        kind: Kind,
    ) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let (index, generation) = (device.chosen.volume, device.chosen.generation);
        let Some(volume) = self.volumes.get(index) else {
            // Control removes a volume only when no export of it is left.
            return self.finish(id, ring, &memory, asked, Status::IoError, 0);
        };
        let segments = match kind {
            Kind::Read => &chain.writable[..],
            Kind::Write => &chain.readable[..],
            _ => &[],
        };
        let mut pieces = Vec::with_capacity(segments.len());
        for segment in segments {
            if memory.pieces(segment.at, u64::from(segment.length), &mut pieces).is_err() {
                return self.finish(id, ring, &memory, asked, Status::IoError, 0);
            }
        }
        let alignment = volume.core.geometry().alignment as usize;
        let layout = volume.core.layout(kind, asked.offset, asked.length);
        let payload = if layout.capacity == 0 {
            Payload::None
        } else if !pieces.is_empty()
            && layout.capacity as u64 == asked.length
            && suits(&pieces, alignment)
        {
            Payload::Direct
        } else {
            Payload::Bounced { buffer: self.pool.take(layout.capacity), at: layout.payload_at }
        };
        device.bounced += payload.bounced();
        let mut request = GuestRequest {
            device: id,
            ring,
            epoch: device.rings[usize::from(ring)].epoch,
            head: asked.head,
            volume: index,
            kind,
            offset: asked.offset,
            length: asked.length,
            fua: kind.changes() && device.protocol.is_write_through(),
            generation,
            status_at: asked.status_at,
            payload,
            pieces,
            cut: Vec::new(),
            memory,
            arrived: self.now,
            admitted: self.now,
            begun: self.now,
        };
        if kind == Kind::Write {
            request.gather();
        }
        device.rings[usize::from(ring)].running += 1;
        let ticket = GUEST | self.guest_requests.insert(request);
        volume.counters.arrived();
        let class = class_of(counted_as(kind));
        let arrival = Arrival { ticket, class, offset: asked.offset, length: asked.length };
        if self.admission.arrive(self.clock_ns, index, &arrival) {
            self.submit_guest(ticket);
        } else {
            device.rings[usize::from(ring)].held = Some(ticket);
        }
    }

    /// A request that waited for its volume's limits goes on.
    pub(in crate::worker) fn admit_guest(&mut self, ticket: Ticket) {
        let Some(request) = self.guest_requests.get_mut(ticket & !GUEST) else {
            unreachable!("request {ticket} waits, so it is in flight")
        };
        let waited = self.now.saturating_duration_since(request.arrived);
        (request.admitted, request.begun) = (self.now, self.now);
        let (id, ring, volume) = (request.device, request.ring, request.volume);
        if let Some(volume) = self.volumes.get(volume) {
            volume.counters.throttled(waited);
        }
        if let Some(device) = self.devices.get_mut(id) {
            device.rings[usize::from(ring)].held = None;
        }
        self.submit_guest(ticket);
        self.touch_device(id);
    }

    fn submit_guest(&mut self, ticket: Ticket) {
        let Some(request) = self.guest_requests.get(ticket & !GUEST) else {
            unreachable!("request {ticket} is in flight")
        };
        let (kind, offset, length) = (request.kind, request.offset, request.length);
        let (index, fua, generation) = (request.volume, request.fua, request.generation);
        if let Some(volume) = self.volumes.get_mut(index) {
            volume.core.submit(Request { ticket, kind, offset, length, fua, generation });
        }
        self.touch_volume(index);
    }

    /// A request that waits for its volume's limits does not go. It stays marked
    /// as in flight, for the ring's next beginning.
    pub(super) fn forget_held_of(&mut self, id: u32, ring: u16) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let state = &mut device.rings[usize::from(ring)];
        let Some(ticket) = state.held.take() else { return };
        let Some(request) = self.guest_requests.remove(ticket & !GUEST) else { return };
        state.running -= 1;
        device.bounced -= request.payload.bounced();
        self.admission.forget(request.volume, ticket);
        if let Some(volume) = self.volumes.get(request.volume) {
            let waited = self.now.saturating_duration_since(request.arrived);
            let error = Some(nbd::Error::Shutdown);
            volume.counters.answered(counted_as(request.kind), 0, waited, error);
        }
    }

    /// The volume has answered.
    pub(in crate::worker) fn answer_guest(&mut self, reply: &Reply) {
        let Some(request) = self.guest_requests.remove(reply.ticket & !GUEST) else {
            unreachable!("request {} is answered once", reply.ticket)
        };
        let past = Past {
            volume: request.volume,
            command: counted_as(request.kind),
            offset: request.offset,
            length: request.length,
            arrived: request.arrived,
            admitted: request.admitted,
            begun: request.begun,
        };
        self.account(&past, reply.result.as_ref().err().map(|errno| error_of(*errno)));
        let (id, ring) = (request.device, request.ring);
        let Some(device) = self.devices.get_mut(id) else {
            unreachable!("a device stays while its requests are in flight")
        };
        device.rings[usize::from(ring)].running -= 1;
        device.bounced -= request.payload.bounced();
        let (status, written) = match (&reply.result, request.kind) {
            (Ok(_), Kind::Read) => {
                request.scatter();
                (Status::Ok, request.length as u32)
            }
            (Ok(_), _) => (Status::Ok, 0),
            (Err(errno), _) => (Status::of(*errno), 0),
        };
        let asked = Asked {
            head: request.head,
            deed: Work::Volume(request.kind),
            offset: 0,
            length: request.length,
            status_at: request.status_at,
        };
        if device.rings[usize::from(ring)].epoch == request.epoch {
            self.finish(id, ring, &request.memory, asked, status, written);
        }
        self.touch_device(id);
    }
}

/// Whether file operations can go there as they are.
fn suits(pieces: &[libc::iovec], alignment: usize) -> bool {
    let fits = |p: &libc::iovec| {
        (p.iov_base as usize).is_multiple_of(alignment) && p.iov_len.is_multiple_of(alignment)
    };
    pieces.len() <= PIECES_MAX && pieces.iter().all(fits)
}

/// Writes bytes to the front of the chain's room, however it is cut.
fn put(memory: &GuestMemory, chain: &Chain, mut bytes: &[u8]) -> u32 {
    let mut written = 0;
    for segment in &chain.writable {
        let (here, rest) = bytes.split_at(bytes.len().min(segment.length as usize));
        if memory.write(segment.at, here).is_err() {
            break;
        }
        written += here.len() as u32;
        bytes = rest;
    }
    written
}

/// Metrics know requests by their NBD names.
fn counted_as(kind: Kind) -> nbd::Command {
    match kind {
        Kind::Read => nbd::Command::Read,
        Kind::Write => nbd::Command::Write,
        Kind::Flush => nbd::Command::Flush,
        Kind::Zero { hole, fast } => nbd::Command::WriteZeroes { hole, fast },
        Kind::Trim | Kind::Prefetch | Kind::Extents => nbd::Command::Trim,
    }
}
