//! A connection whose export another worker of this process serves, sent there once
//! the handshake is over.
//!
//! ```text
//!  handshake ──GO──▶ leaving ── nothing runs on its socket ──▶ Moved ──TakeIn──▶ its home
//! ```
//!
//! It goes as it would go to another process (`park`): the session put down as plain
//! data, a request that came behind GO put back into its input. TLS goes with it as it
//! stands, since its keys stay in this process. What may never be true: a request
//! begun by the worker that shook hands.

use super::connection::Closing;
use super::{Command, Parked, Worker};
use crate::engine::Engine;
use crate::{nbd, tls};

/// A connection's last moments here.
#[derive(Debug)]
pub(super) struct Leaving {
    /// Among the exports of its listener.
    pub export: usize,
    /// What came behind the handshake, and no volume has seen.
    pub request: Option<nbd::Request>,
}

/// A connection on its way.
#[derive(Debug)]
pub(crate) struct Moved {
    pub(super) parked: Parked,
    pub(super) sealed: Option<Sealed>,
}

impl From<Parked> for Moved {
    fn from(parked: Parked) -> Self {
        Self { parked, sealed: None }
    }
}

/// TLS in place, and who the peer is.
pub(super) struct Sealed {
    pub layer: Box<tls::Layer>,
    pub names: Option<tls::Names>,
}

impl std::fmt::Debug for Sealed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Keys are nobody's to read.
        f.debug_struct("Sealed").field("names", &self.names).finish_non_exhaustive()
    }
}

impl<E: Engine> Worker<E> {
    pub(super) fn send_home(&mut self, id: u32) {
        let may_go = self.is_accepting();
        let Some(connection) = self.connections.get_mut(id) else { return };
        if connection.closing != Closing::No {
            connection.closing = Closing::Dead;
            return self.bury(id);
        }
        if !may_go {
            // All are being put down: whoever takes it up knows its export's home.
            return;
        }
        let listener = connection.listener;
        let home = connection
            .leaving
            .as_ref()
            .and_then(|leaving| connection.exports.get(leaving.export))
            .and_then(|served| served.home.clone());
        if self.call_back(id) {
            return;
        }
        if let (Some(home), Some(mut moved)) = (home, self.put_down(id)) {
            moved.parked.listener = home.listener;
            // Where that worker has ended, the process is about to.
            let _ = home.door.tell(Command::TakeIn(Box::new(moved)));
        }
        self.forget_listener(listener);
    }
}
