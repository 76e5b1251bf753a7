//! Who comes to a listener, and when their time is up.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::rc::Rc;
use std::time::Instant;

use super::border::{admits, set_no_delay};
use super::connection::{Closing, Connection};
use super::places::Origin;
use super::{Front, HANDSHAKE_MAX, Purpose, Worker};
use crate::engine::{Engine, Io};

impl<E: Engine> Worker<E> {
    pub(super) fn accept(&mut self, index: u32) {
        if !self.is_accepting() {
            return;
        }
        let Some(listener) = self.listeners.get_mut(index).filter(|l| !l.closing) else { return };
        let Some(socket) = &listener.socket else { return };
        listener.accepting = true;
        let io = Io::Accept { listener: socket.as_raw_fd() };
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
                self.make_room(index, from);
                let deadline = now + HANDSHAKE_MAX;
                let connection =
                    Connection::new(socket, index, exports, access, now, deadline).from(from);
                let id = self.connections.insert(Box::new(connection));
                self.touch_connection(id);
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

    pub(super) fn forget_listener(&mut self, index: u32) {
        let has_connections = self.connections.iter().any(|(_, c)| c.listener == index)
            || self.devices.iter().any(|(_, d)| d.listener == index);
        if self.listeners.get(index).is_some_and(|l| l.closing && !l.accepting) && !has_connections
        {
            self.listeners.remove(index);
        }
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
}
