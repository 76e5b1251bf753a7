//! What a worker does for vhost-user connections: messages, rings, requests.
//!
//! The requests enter the volume's core where those of NBD do, under tickets of
//! their own ([`GUEST`]), so fencing and ordering know no front.
//!
//! Here: who may connect, whose turn it is, and the end of a connection.
//! [`messages`]: what the hypervisor says of memory and rings. [`rings`]: taking
//! from a ring and giving back. [`requests`]: their way through the volume.

mod messages;
mod requests;
mod rings;

use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Instant;

use super::border::{guest_disk, lawful_writer};
use super::connection::{Chosen, Closing};
use super::device::Device;
use super::{DRAIN_MAX, Purpose, Served, Worker};
use crate::engine::{Engine, Io};
use crate::vhost::protocol::Protocol;
use crate::volume::Ticket;

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
