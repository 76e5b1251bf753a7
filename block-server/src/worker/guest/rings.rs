//! Taking requests from a guest's rings, and giving them back.

use std::os::fd::AsRawFd;
use std::rc::Rc;

use super::{BOUNCED_BYTES_MAX, ONE, TURN_MAX};
use crate::engine::{Engine, Io};
use crate::vhost::block::{Request as Asked, Status};
use crate::vhost::memory::{GuestMemory, Mapping, Memory};
use crate::vhost::queue::{Broken, Chain};
use crate::worker::connection::Closing;
use crate::worker::device::RingState;
use crate::worker::{Purpose, Worker};

impl<E: Engine> Worker<E> {
    pub(super) fn serve_ring(&mut self, id: u32, ring: u16) {
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

    pub(super) fn break_ring(&mut self, id: u32, ring: u16, why: &str) {
        let Some(device) = self.devices.get_mut(id) else { return };
        let state = &mut device.rings[usize::from(ring)];
        tracing::warn!(ring, "a guest broke its disk's ring; it is served no more: {why}");
        state.queue = None;
        if let Some(error) = &state.error {
            // Its counter may be full: then it says so already.
            let _ = rustix::io::write(error, &ONE);
        }
    }

    /// Gives a request back to the guest. The memory is that of its beginning;
    /// the ring's is that of now.
    pub(super) fn finish(
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
