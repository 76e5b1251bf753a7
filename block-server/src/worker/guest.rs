//! What a worker does for vhost-user connections: messages, rings, requests.
//!
//! The requests enter the volume's core where those of NBD do, under tickets of
//! their own ([`GUEST`]), so fencing and ordering know no front.

use std::os::fd::{AsRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use super::border::{error_of, guest_disk, lawful_writer};
use super::connection::{Chosen, Closing};
use super::device::{Device, Ended, GuestRequest, Payload, RingState};
use super::quality::{Past, class_of};
use super::{DRAIN_MAX, Purpose, Served, Worker};
use crate::engine::{Engine, Io};
use crate::nbd;
use crate::throttle::Arrival;
use crate::vhost::block::{Deed as Work, Request as Asked, Status};
use crate::vhost::inflight::Part;
use crate::vhost::memory::{GuestMemory, Mapping, Memory, Region, Span, is_eventfd, sealed_file};
use crate::vhost::protocol::{Deed, Marks, Outcome, Protocol};
use crate::vhost::queue::{Broken, Chain, Places, Queue};
use crate::volume::{Kind, Reply, Request, Ticket};

/// Tickets from here on are guests'.
pub(super) const GUEST: Ticket = 1 << 31;

/// Connections of one socket, of which one is served: the others wait until it
/// is gone, as one does when QEMU comes again before we saw it go.
const DEVICES_MAX: usize = 4;

/// Requests that a ring gives in one turn, before another gets its own.
const TURN_MAX: u32 = 128;

/// Bytes of buffers that one device may hold where its guest's memory is not
/// laid out as the file wants it; it waits beyond.
const BOUNCED_BYTES_MAX: u64 = 64 << 20;

/// Pieces of one vectored operation (`UIO_MAXIOV`).
const PIECES_MAX: usize = 1024;

/// What is added to a call's counter.
static ONE: [u8; 8] = 1_u64.to_ne_bytes();

impl<E: Engine> Worker<E> {
    pub(super) fn device_came(
        &mut self,
        socket: OwnedFd,
        listener: u32,
        served: &Served,
        now: Instant,
    ) {
        let count = self.devices.iter().filter(|(_, d)| d.listener == listener).count();
        let Some(volume) = self.volumes.get(served.volume) else { return };
        if !self.is_accepting() {
            // It comes again, to whoever serves then.
            return;
        }
        if count >= DEVICES_MAX {
            tracing::warn!(limit = DEVICES_MAX, "refused a guest's connection: too many wait");
            return;
        }
        // Only TLS knows certificates' names.
        if !lawful_writer(served, &volume.core) || served.clients.is_some() {
            tracing::warn!("volume {}: refused a guest: it is fenced, or not meant", volume.name);
            return;
        }
        let disk = guest_disk(served, &volume.core, &volume.name);
        self.devices_born += 1;
        let mut device = Device::new(
            socket,
            listener,
            self.devices_born,
            Chosen::new(served),
            Protocol::new(disk),
        );
        device.is_readable = true;
        device.deadline = None;
        let id = self.devices.insert(Box::new(device));
        tracing::debug!(id, ?now, "a guest's hypervisor connected");
        self.touch_device(id);
    }

    pub(super) fn touch_device(&mut self, id: u32) {
        if let Some(device) = self.devices.get_mut(id)
            && !std::mem::replace(&mut device.is_busy, true)
        {
            self.busy_devices.push_back(id);
        }
    }

    /// What is in flight is finished; nothing more is taken.
    pub(super) fn close_devices(&mut self, listener: u32, now: Instant) {
        let of_listener: Vec<u32> =
            self.devices.iter().filter(|(_, d)| d.listener == listener).map(|(id, _)| id).collect();
        for id in of_listener {
            if let Some(device) = self.devices.get_mut(id) {
                device.closing = device.closing.max(Closing::Drain);
                device.deadline = Some(now + DRAIN_MAX);
            }
            self.touch_device(id);
        }
    }

    /// The exports of a socket have new terms.
    pub(super) fn devices_heard(&mut self, listener: u32, served: &Served) {
        for slot in self.devices.slots.iter_mut().flatten().filter(|d| d.listener == listener) {
            let disk = slot.protocol.disk_mut();
            if disk.geometry.size != served.size {
                disk.geometry.size = served.size;
                slot.tell_config_changed();
            }
        }
    }

    pub(super) fn device_readable(&mut self, id: u32) {
        if let Some(device) = self.devices.get_mut(id) {
            device.is_polled = false;
            device.is_readable = true;
        }
        self.touch_device(id);
    }

    pub(super) fn device_kicked(&mut self, id: u32, ring: u16, result: i32) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let state = &mut device.rings[usize::from(ring)];
        state.listening = None;
        if result < 0 && !matches!(-result, libc::EAGAIN | libc::EINTR | libc::ECANCELED) {
            state.kick = None;
            let cause = std::io::Error::from_raw_os_error(-result);
            tracing::warn!(ring, "a guest's ring has lost its bell: {cause}");
        }
        self.touch_device(id);
    }

    pub(super) fn device_called(&mut self, id: u32, ring: u16) {
        if let Some(device) = self.devices.get_mut(id) {
            device.rings[usize::from(ring)].calling = None;
        }
        self.touch_device(id);
    }

    pub(super) fn serve_device(&mut self, id: u32) {
        let Some(device) = self.devices.get_mut(id) else { return };
        device.is_busy = false;
        if device.closing == Closing::Dead {
            return self.bury_device(id);
        }
        if self.must_wait(id) {
            return;
        }
        self.hear_messages(id);
        let Some(device) = self.devices.get(id) else { return };
        for ring in 0..device.protocol.rings() {
            self.serve_ring(id, ring);
        }
        self.finish_stop(id);
        let Some(device) = self.devices.get_mut(id) else { return };
        if device.closing == Closing::Drain && device.running() == device.held() {
            device.closing = Closing::Dead;
        }
        if device.closing == Closing::Dead {
            return self.bury_device(id);
        }
        if !device.is_polled && !device.is_readable {
            device.is_polled = true;
            let socket = device.socket.as_raw_fd();
            // SAFETY: this operation names no memory.
            unsafe { self.engine.start(Purpose::Message(id).token(), Io::Poll { socket }) }
        }
    }

    /// Whether an earlier connection of the same socket is still there: its last
    /// operations may write to the guest's memory, which must not be told of
    /// anything until they have ended.
    fn must_wait(&self, id: u32) -> bool {
        let Some(device) = self.devices.get(id) else { return false };
        self.devices
            .iter()
            .any(|(_, other)| other.listener == device.listener && other.born < device.born)
    }

    fn hear_messages(&mut self, id: u32) {
        loop {
            let Some(device) = self.devices.get_mut(id) else { return };
            if device.protocol.is_pending() || !device.is_readable {
                return;
            }
            let (header, payload, fds) = match device.next_message() {
                Ok(Some(message)) => message,
                Ok(None) => {
                    device.is_readable = false;
                    return;
                }
                Err(ended) => {
                    match ended {
                        Ended::Unlawful => tracing::warn!(
                            "a vhost-user connection is cut: no message of version 1"
                        ),
                        Ended::HungUp => tracing::debug!("a guest's hypervisor hung up"),
                    }
                    device.closing = Closing::Dead;
                    return;
                }
            };
            match device.protocol.receive(header, &payload, fds) {
                Ok(deed) => self.perform(id, deed),
                Err(violation) => {
                    tracing::warn!("a vhost-user connection is cut: {violation}");
                    device.closing = Closing::Dead;
                    return;
                }
            }
        }
    }

    fn perform(&mut self, id: u32, deed: Deed<OwnedFd>) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let done = |done: bool| if done { Outcome::Done } else { Outcome::Failed };
        let outcome = match deed {
            Deed::Nothing => Outcome::Done,
            Deed::Map(table) => done(device.map(table)),
            Deed::Add(span, file) => {
                let added = told(Region::new(span, &file)).and_then(|r| device.memory.with(r));
                done(device.remember(added))
            }
            Deed::Remove(span) => {
                let rest = device.memory.without(span);
                done(device.remember(rest))
            }
            Deed::Start(ring, kick) => done(device.start_ring(ring, kick)),
            Deed::Stop(ring) => {
                device.stopping = Some(ring);
                return;
            }
            Deed::Call(ring, fd) => done(device.set_call(ring, fd)),
            Deed::Error(ring, fd) => {
                let fd = fd.filter(is_eventfd);
                device.rings[usize::from(ring)].error = fd;
                Outcome::Done
            }
            Deed::Enable(_) => Outcome::Done,
            Deed::Reset => {
                device.rings.iter_mut().for_each(|ring| ring.queue = None);
                Outcome::Done
            }
            Deed::MakeMarks(marks) => return self.make_marks(id, marks),
            Deed::TakeMarks(marks, file) => done(device.take_marks(marks, &file)),
            Deed::Channel(fd) => {
                device.channel = Some(fd);
                Outcome::Done
            }
        };
        device.answer(outcome, None);
    }

    fn make_marks(&mut self, id: u32, marks: Marks) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let made = sealed_file("in-flight", marks.length).map_err(|error| {
            tracing::warn!(%error, "a guest gets no memory for what is in flight");
        });
        let taken = made.as_ref().is_ok_and(|file| device.take_marks(marks, file));
        let outcome = if taken { Outcome::Done } else { Outcome::Failed };
        device.answer(outcome, made.ok().as_ref().filter(|_| taken));
    }

    /// Answers the front that waits for a ring to be quiet.
    fn finish_stop(&mut self, id: u32) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let Some(ring) = device.stopping else { return };
        let state = &mut device.rings[usize::from(ring)];
        if state.running > u32::from(state.held.is_some()) {
            return;
        }
        // The front stands still meanwhile: one that waits for its volume's
        // limits is taken again when the ring goes on, from its mark or, where
        // there are none, from the ring.
        let taken_back = u16::from(state.held.is_some() && state.part.is_none());
        self.forget_held_of(id, ring);
        let Some(device) = self.devices.get_mut(id) else { return };
        let state = &mut device.rings[usize::from(ring)];
        device.stopping = None;
        let base = device.protocol.ring(ring).base;
        let next = state.queue.take().map(|queue| queue.next_available());
        let base = next.map_or(base, |next| next.wrapping_sub(taken_back));
        state.part = None;
        state.kick = None;
        if state.listening.is_some() {
            self.engine.cancel(Purpose::Kick(id, ring).token());
        }
        device.answer(Outcome::Base(base), None);
        self.touch_device(id);
    }

    fn serve_ring(&mut self, id: u32, ring: u16) {
        if let Err(broken) = self.take_requests(id, ring) {
            self.break_ring(id, ring, &broken.to_string());
        }
        self.call(id, ring);
        let Some(device) = self.devices.get_mut(id) else { return };
        let state = &mut device.rings[usize::from(ring)];
        if state.listening.is_none()
            && state.queue.is_some()
            && device.closing == Closing::No
            && let Some(kick) = &state.kick
        {
            state.listening = Some(Rc::clone(kick));
            let io = Io::Wake { eventfd: kick.as_raw_fd(), into: state.kick_count.as_mut_ptr() };
            // SAFETY: the box stays while `listening` says that the kernel
            // writes there; a device is dropped only after that.
            unsafe { self.engine.start(Purpose::Kick(id, ring).token(), io) }
        }
    }

    fn take_requests(&mut self, id: u32, ring: u16) -> Result<(), Broken> {
        for _ in 0..TURN_MAX {
            let mut chain = std::mem::take(&mut self.chain);
            let taken = self.take_request_of(id, ring, &mut chain);
            if let Ok(true) = taken {
                self.begin(id, ring, &mut chain);
            }
            self.chain = chain;
            if !taken? {
                return Ok(());
            }
        }
        self.touch_device(id);
        Ok(())
    }

    fn take_request_of(&mut self, id: u32, ring: u16, chain: &mut Chain) -> Result<bool, Broken> {
        let Some(device) = self.devices.get_mut(id) else { return Ok(false) };
        let is_open = device.protocol.ring(ring).is_enabled && device.stopping != Some(ring);
        if !is_open || device.closing != Closing::No || device.bounced > BOUNCED_BYTES_MAX {
            return Ok(false);
        }
        let state = &mut device.rings[usize::from(ring)];
        // One that waits for the volume's limits stands for those behind it.
        let Some(queue) = state.queue.as_mut().filter(|_| state.held.is_none()) else {
            return Ok(false);
        };
        let memory = &*device.memory;
        if let Some(head) = state.left.pop() {
            queue.take(memory, head, chain)?;
            return Ok(true);
        }
        let came = queue.pop(memory, chain)?
            || (queue.ask_for_kicks(memory)? && queue.pop(memory, chain)?);
        if came && let (Some(part), Some((_, marks))) = (&mut state.part, &device.marks) {
            part.mark(marks, chain.head)?;
        }
        Ok(came)
    }

    fn break_ring(&mut self, id: u32, ring: u16, why: &str) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let state = &mut device.rings[usize::from(ring)];
        tracing::warn!(ring, "a guest broke its disk's ring; it is served no more: {why}");
        state.queue = None;
        if let Some(error) = &state.error {
            // Its counter may be full: then it says so already.
            let _ = rustix::io::write(error, &ONE);
        }
    }

    /// Hands a request to its volume, or answers it.
    fn begin(&mut self, id: u32, ring: u16, chain: &mut Chain) {
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
    pub(super) fn admit_guest(&mut self, ticket: Ticket) {
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
    fn forget_held_of(&mut self, id: u32, ring: u16) {
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
    pub(super) fn answer_guest(&mut self, reply: &Reply) {
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

    /// Gives a request back to the guest. The memory is that of its beginning;
    /// the ring's is that of now.
    fn finish(
        &mut self,
        id: u32,
        ring: u16,
        memory: &GuestMemory,
        asked: Asked,
        status: Status,
        written: u32,
    ) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let state = &mut device.rings[usize::from(ring)];
        let marks = device.marks.as_ref().map(|(_, mapping)| mapping);
        let result = memory
            .write(asked.status_at, &[status as u8])
            .map_err(Broken::from)
            .and_then(|()| state.push(&device.memory, marks, asked.head, written + 1));
        if let Err(broken) = result {
            self.break_ring(id, ring, &broken.to_string());
        }
    }

    /// Lets the guest know of answers, if it wants to.
    fn call(&mut self, id: u32, ring: u16) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let state = &mut device.rings[usize::from(ring)];
        if state.calling.is_some() || state.call.is_none() {
            return;
        }
        let mut must = std::mem::take(&mut state.must_call);
        if std::mem::take(&mut state.has_answers)
            && let Some(queue) = &mut state.queue
        {
            must |= queue.must_call(&*device.memory).unwrap_or(true);
        }
        if !must {
            return;
        }
        state.calling = state.call.clone();
        if let Some(call) = &state.calling {
            let io = Io::Ring { eventfd: call.as_raw_fd(), from: ONE.as_ptr() };
            // SAFETY: the number is static; `calling` keeps the descriptor.
            unsafe { self.engine.start(Purpose::Call(id, ring).token(), io) }
        }
    }

    /// Ends a connection once nothing of it runs, and lets the next one in.
    fn bury_device(&mut self, id: u32) {
        let rings = self.devices.get(id).map_or(0, |device| device.protocol.rings());
        for ring in 0..rings {
            self.forget_held_of(id, ring);
        }
        let Some(device) = self.devices.get_mut(id) else { return };
        if device.is_polled {
            self.engine.cancel(Purpose::Message(id).token());
        }
        for (ring, state) in device.rings.iter().enumerate() {
            if state.listening.is_some() {
                self.engine.cancel(Purpose::Kick(id, ring as u16).token());
            }
            if state.calling.is_some() {
                self.engine.cancel(Purpose::Call(id, ring as u16).token());
            }
        }
        if device.has_operations() || device.running() > 0 {
            return;
        }
        let listener = device.listener;
        self.devices.remove(id);
        let next: Vec<u32> =
            self.devices.iter().filter(|(_, d)| d.listener == listener).map(|(id, _)| id).collect();
        for waiting in next {
            self.touch_device(waiting);
        }
        self.forget_listener(listener);
    }
}

impl Device {
    fn answer(&mut self, outcome: Outcome, fd: Option<&OwnedFd>) {
        if let Some(reply) = self.protocol.answer(outcome)
            && !self.send(&reply, fd)
        {
            tracing::warn!("a vhost-user connection is cut: it takes no reply");
            self.closing = Closing::Dead;
        }
    }

    fn map(&mut self, table: Vec<(Span, OwnedFd)>) -> bool {
        let regions: Option<Vec<_>> = table
            .into_iter()
            .map(|(span, file)| told(Region::new(span, &file)).map(Rc::new))
            .collect();
        self.remember(regions.and_then(GuestMemory::new))
    }

    /// Takes up a new layout; rings that run move with it.
    fn remember(&mut self, memory: Option<GuestMemory>) -> bool {
        let Some(memory) = memory else {
            tracing::warn!("a guest's memory cannot be used; its disk stays away");
            return false;
        };
        self.memory = Rc::new(memory);
        for ring in 0..self.protocol.rings() {
            let places = self.places(ring);
            let state = &mut self.rings[usize::from(ring)];
            let Some(queue) = &mut state.queue else { continue };
            let moved = places.is_some_and(|p| queue.move_to(&*self.memory, p).is_ok());
            if !moved {
                tracing::warn!(ring, "a guest's ring lies in memory that is gone");
                state.queue = None;
            }
        }
        true
    }

    fn places(&self, ring: u16) -> Option<Places> {
        let user = self.protocol.ring(ring).places?;
        Some(Places {
            descriptors: self.memory.guest_address(user.descriptors)?,
            available: self.memory.guest_address(user.available)?,
            used: self.memory.guest_address(user.used)?,
        })
    }

    fn set_call(&mut self, ring: u16, fd: Option<OwnedFd>) -> bool {
        let state = &mut self.rings[usize::from(ring)];
        if fd.as_ref().is_some_and(|fd| !is_lawful_bell(fd)) {
            return false;
        }
        state.call = fd.map(Rc::new);
        state.must_call = state.queue.is_some();
        true
    }

    fn start_ring(&mut self, ring: u16, kick: OwnedFd) -> bool {
        if !is_lawful_bell(&kick) {
            return false;
        }
        match self.open_ring(ring) {
            Ok((queue, part, left)) => {
                if !left.is_empty() {
                    tracing::info!(ring, count = left.len(), "a guest's requests are done again");
                }
                let state = &mut self.rings[usize::from(ring)];
                state.epoch = state.epoch.wrapping_add(1);
                (state.queue, state.part, state.left) = (Some(queue), part, left);
                state.kick = Some(Rc::new(kick));
                state.must_call = true;
                true
            }
            Err(broken) => {
                tracing::warn!(ring, "a guest's ring cannot be served: {broken}");
                false
            }
        }
    }

    fn open_ring(&self, ring: u16) -> Result<(Queue, Option<Part>, Vec<u16>), Broken> {
        let asked = self.protocol.ring(ring);
        let nowhere = crate::vhost::memory::Fault { at: 0, length: 0 };
        let places = self.places(ring).ok_or(nowhere)?;
        let agreed = self.protocol.agreed();
        let queue = Queue::new(&*self.memory, asked.size, places, agreed, asked.base)?;
        let Some((marks, mapping)) = &self.marks else { return Ok((queue, None, Vec::new())) };
        if marks.size < asked.size || marks.queues <= ring {
            return Err(Broken::Index { index: asked.size, count: marks.size });
        }
        let start = marks.part_at(ring);
        let (part, mut left) = Part::open(mapping, start, marks.size, queue.next_used())?;
        // They are taken from the end.
        left.reverse();
        // What was taken is answered or among those left.
        let next = queue.next_used().wrapping_add(left.len() as u16);
        let queue = Queue::new(&*self.memory, asked.size, places, agreed, next)?;
        Ok((queue, Some(part), left))
    }

    fn take_marks(&mut self, marks: Marks, file: &OwnedFd) -> bool {
        match Mapping::new(file, marks.offset, marks.length) {
            Ok(mapping) => {
                self.marks = Some((marks, mapping));
                true
            }
            Err(error) => {
                tracing::warn!("a guest's record of what is in flight cannot be used: {error}");
                false
            }
        }
    }
}

impl RingState {
    /// A request's answer, in the order that lets a successor go on.
    fn push(
        &mut self,
        memory: &GuestMemory,
        marks: Option<&Mapping>,
        head: u16,
        written: u32,
    ) -> Result<(), Broken> {
        let Some(queue) = &mut self.queue else { return Ok(()) };
        let part = self.part.as_ref().zip(marks);
        if let Some((part, marks)) = part {
            part.answering(marks, head)?;
        }
        queue.push(memory, head, written)?;
        if let Some((part, marks)) = part {
            part.answered(marks, head, queue.next_used())?;
        }
        self.has_answers = true;
        Ok(())
    }
}

/// Says why a region cannot be used.
fn told(region: Result<Region, crate::vhost::memory::Unusable>) -> Option<Region> {
    region.map_err(|error| tracing::warn!("a guest's memory: {error}")).ok()
}

fn is_lawful_bell(fd: &OwnedFd) -> bool {
    let lawful = is_eventfd(fd);
    if !lawful {
        tracing::warn!("a guest's ring was given a bell that is no eventfd");
    }
    lawful
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
