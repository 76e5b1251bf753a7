//! Connections put down and taken up again: by another process on an upgrade, or
//! by this one when that came to nothing.
//!
//! ```text
//!            Park                 nothing runs           AddConnections
//!  serving ────────▶ falling still ───────────▶ parked ────────────────▶ serving
//! ```
//!
//! Operations on sockets are called back, so that no peer is waited for; disk
//! operations are awaited. What TLS sealed cannot be handed on: such connections
//! are answered what is in flight, told the end of TLS and closed, and their
//! clients connect anew. What may never be true: a request that is begun
//! between the parking's end and the taking up.

use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use super::connection::{Chosen, Closing, Connection};
use super::moving::{Moved, Sealed};
use super::places::Origin;
use super::{Access, Command, HANDSHAKE_MAX, InFlight, Purpose, Volume, Worker};
use crate::engine::{Engine, Window};
use crate::nbd::{self, Frozen, Session};
use crate::throttle::Lack;

/// How long a TLS peer, or one on its way out, may take to fetch its last replies.
const PARK_MAX: Duration = Duration::from_secs(1);

/// A connection that nobody serves.
#[derive(Debug)]
pub struct Parked {
    pub socket: OwnedFd,
    /// Which listener it came in by, in the worker that parked it.
    pub listener: u32,
    /// The export that it uses, and its writer's generation.
    pub export: Option<(String, Option<u64>)>,
    pub session: Frozen,
}

/// What a volume must know again that its file does not tell.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// It failed for good, and why.
    pub failed: Option<String>,
    /// It is quiesced, for so long still.
    pub held_ms: Option<u64>,
    /// What its limits have already let through.
    pub lack: Lack,
}

/// What a parked worker hands out.
#[derive(Debug, Default)]
pub struct Still {
    pub connections: Vec<Parked>,
    /// By the volume's name.
    pub volumes: Vec<(String, Carried)>,
}

impl<E: Engine> Worker<E> {
    pub(super) fn park(&mut self, done: oneshot::Sender<Still>, now: Instant) {
        self.parking = Some(done);
        let accepting: Vec<u32> =
            self.listeners.iter().filter(|(_, l)| l.accepting).map(|(index, _)| index).collect();
        for index in accepting {
            self.engine.cancel(Purpose::Accept(index).token());
        }
        let all: Vec<u32> = self.connections.iter().map(|(id, _)| id).collect();
        for id in all {
            self.still(id, now);
        }
        // Guests come to the successor by themselves; what was taken is marked.
        let all: Vec<u32> = self.listeners.iter().map(|(index, _)| index).collect();
        for index in all {
            self.close_devices(index, now);
        }
        self.is_parked = false;
    }

    /// Calls back what runs on a connection's socket, or ends it.
    fn still(&mut self, id: u32, now: Instant) {
        let Some(connection) = self.connections.get_mut(id) else { return };
        connection.session.stop_reading();
        if connection.is_sealed() {
            connection.closing = connection.closing.max(Closing::Drain);
        }
        if connection.closing == Closing::No {
            self.call_back(id);
        } else {
            connection.deadline = Some(now + PARK_MAX);
        }
        self.touch_connection(id);
    }

    /// Calls back what runs on a connection's socket; `false` where nothing does.
    pub(super) fn call_back(&mut self, id: u32) -> bool {
        let Some(connection) = self.connections.get(id) else { return false };
        let (receives, sends) = (connection.receives(), connection.sending);
        if receives {
            self.engine.cancel(Purpose::Receive(id).token());
        }
        if sends {
            self.engine.cancel(Purpose::Send(id).token());
        }
        receives || sends
    }

    /// While it is being parked a worker begins nothing on a socket, but for the
    /// last words to those that cannot be handed on.
    pub(super) fn may_begin(&self, id: u32) -> bool {
        (self.parking.is_none() && !self.is_parked)
            || self.connections.get(id).is_some_and(|c| c.closing != Closing::No)
    }

    pub(super) fn is_accepting(&self) -> bool {
        self.parking.is_none() && !self.is_parked
    }

    /// Hands all out once nothing runs any more.
    pub(super) fn try_park(&mut self, now: Instant) {
        if self.parking.is_none() {
            return;
        }
        let strangers: Vec<u32> =
            self.connections.iter().filter(|(_, c)| !c.is_stopped()).map(|(id, _)| id).collect();
        for id in strangers {
            // It came in while the others fell still.
            self.still(id, now);
        }
        let is_still = self.file_ops == 0
            && self.devices.len() == 0
            && !self.listeners.iter().any(|(_, l)| l.accepting)
            && self.connections.iter().all(|(_, c)| c.is_still())
            && self.volumes.iter().all(|(_, v)| v.core.in_flight() == 0);
        if !is_still {
            return;
        }
        let Some(done) = self.parking.take() else { return };
        self.is_parked = true;
        let mut still = Still::default();
        let all: Vec<u32> = self.connections.iter().map(|(id, _)| id).collect();
        for id in all {
            still.connections.extend(self.put_down(id).map(|moved| moved.parked));
        }
        still.volumes = self.volumes.iter().map(|(id, v)| self.carried(id, v, now)).collect();
        if let Err(still) = done.send(still) {
            // Whoever asked is gone: on as before.
            self.add_connections(still.connections, now);
        }
    }

    fn carried(&self, id: u32, volume: &Volume, now: Instant) -> (String, Carried) {
        let left = volume.held_until.map(|until| until.saturating_duration_since(now));
        let carried = Carried {
            failed: volume.core.failed().map(str::to_owned),
            held_ms: left.map(|left| u64::try_from(left.as_millis()).unwrap_or(u64::MAX)),
            lack: self.admission.lacks(self.clock_ns, id),
        };
        (volume.name.clone(), carried)
    }

    pub(super) fn put_down(&mut self, id: u32) -> Option<Moved> {
        let mut connection = self.connections.remove(id)?;
        let leaving = connection.leaving.take();
        let served = leaving.as_ref().and_then(|leaving| connection.exports.get(leaving.export));
        let export = match (&connection.chosen, served) {
            (Some(chosen), _) => Some((chosen.export.clone(), chosen.generation)),
            (None, served) => served.map(|served| (served.name.clone(), served.writer())),
        };
        let begun = match (connection.incoming.take(), connection.held.take()) {
            (Some((ticket, filled)), _) => self.requests.remove(ticket).map(|r| (r, filled)),
            (None, Some(ticket)) => self.unwait(ticket),
            (None, None) => None,
        };
        let unsent = connection.unsent();
        let Connection { socket, listener, session, tls, names, .. } = *connection;
        let begun = match &begun {
            Some((request, filled)) => {
                let at = request.payload_at;
                let payload =
                    request.buffer.as_ref().map_or(&[][..], |b| &b.bytes()[at..at + filled]);
                Some((&request.request, payload))
            }
            None => leaving.as_ref().and_then(|l| l.request.as_ref()).map(|r| (r, &[][..])),
        };
        let mut session = session.freeze(begun)?;
        session.output.splice(..0, unsent);
        let parked = Parked { socket, listener, export, session };
        Some(Moved { parked, sealed: tls.map(|layer| Sealed { layer, names }) })
    }

    /// A request that waits at the gate, and how much payload it has.
    fn unwait(&mut self, ticket: u32) -> Option<(InFlight, usize)> {
        let in_flight = self.requests.remove(ticket)?;
        self.admission.forget(in_flight.volume, ticket);
        let request = in_flight.request;
        if let Some(volume) = self.volumes.get(in_flight.volume) {
            let waited = self.now.saturating_duration_since(in_flight.arrived);
            volume.counters.answered(request.command, 0, waited, None);
        }
        let is_write = request.command == nbd::Command::Write;
        Some((in_flight, if is_write { request.length as usize } else { 0 }))
    }

    /// Takes connections up, and goes on accepting.
    pub(super) fn add_connections(&mut self, connections: Vec<Parked>, now: Instant) {
        self.is_parked = false;
        for parked in connections {
            self.take_up(parked.into(), now);
        }
        // Others may have been sent here while nothing was begun.
        let all: Vec<u32> = self.connections.iter().map(|(id, _)| id).collect();
        for id in all {
            self.touch_connection(id);
        }
        let all: Vec<u32> =
            self.listeners.iter().filter(|(_, l)| !l.accepting).map(|(index, _)| index).collect();
        for index in all {
            self.accept(index);
        }
    }

    /// From a predecessor, from ourselves, or from the worker that shook hands with it.
    pub(super) fn take_up(&mut self, moved: Moved, now: Instant) {
        let Moved { parked, sealed } = moved;
        let Parked { socket, listener: index, export, mut session } = parked;
        let Some(listener) = self.listeners.get(index).filter(|l| !l.closing) else { return };
        let (access, exports) = (listener.access.clone(), Rc::clone(&listener.exports));
        let needs_tls = matches!(access, Access::Certificate(_));
        let mut chosen = None;
        if let (Some((name, generation)), Some(told)) = (&export, session.terms.export()) {
            let found = exports.iter().position(|served| {
                served.name == *name
                    && served.size >= told.size
                    && served.read_only == told.read_only
                    && (sealed.is_some() || served.clients.is_none())
            });
            let Some(at) = found.filter(|_| !needs_tls || sealed.is_some()) else {
                tracing::info!("export {name:?}: it changed; its client has to connect anew");
                return;
            };
            if let Some(home) = exports[at].home.clone() {
                let parked = Parked { socket, listener: home.listener, export, session };
                // Where that worker has ended, the process is about to.
                let _ = home.door.tell(Command::TakeIn(Box::new(Moved { parked, sealed })));
                return;
            }
            session.terms.set_export_key(at as u64);
            let mut used = Chosen::new(&exports[at]);
            used.generation = *generation;
            chosen = Some(used);
        } else if needs_tls != session.terms.awaits_tls() {
            return;
        }
        let deadline = now + HANDSHAKE_MAX;
        let origin = Origin::of(&socket);
        let mut connection =
            Connection::new(socket, index, exports, access, now, deadline).from(origin);
        connection.session = Session::<Window>::thaw(session);
        connection.chosen = chosen;
        if let Some(Sealed { layer, names }) = sealed {
            (connection.tls, connection.names) = (Some(layer), names);
        }
        let id = self.connections.insert(Box::new(connection));
        self.is_crowded(id);
        self.touch_connection(id);
    }
}
