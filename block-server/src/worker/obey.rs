//! What control asks of a worker, and what it is told when that has come about.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use super::connection::Closing;
use super::{Command, DRAIN_MAX, Listener, Purpose, Volume, Waiter, Worker};
use crate::engine::Engine;
use crate::volume::Core;

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
            Command::TakeIn(moved) => self.take_up(*moved, now),
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
    pub(super) fn close_listener(&mut self, index: u32, refuse: bool, now: Instant) {
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
