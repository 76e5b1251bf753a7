//! What a hypervisor says: where its guest's memory and rings are, and when they run.

use std::os::fd::OwnedFd;
use std::rc::Rc;

use crate::engine::Engine;
use crate::vhost::inflight::Part;
use crate::vhost::memory::{GuestMemory, Mapping, Region, Span, is_eventfd, sealed_file};
use crate::vhost::protocol::{Deed, Marks, Outcome};
use crate::vhost::queue::{Broken, Places, Queue};
use crate::worker::connection::Closing;
use crate::worker::device::{Device, Ended};
use crate::worker::{Purpose, Worker};

impl<E: Engine> Worker<E> {
    pub(super) fn hear_messages(&mut self, id: u32) {
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
    pub(super) fn finish_stop(&mut self, id: u32) {
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
