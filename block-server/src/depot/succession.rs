//! The depot's part in a hand-over: what one daemon gives to the next.
//!
//! From the moment a successor asks until it is decided who serves, the state is
//! locked: calls that would change something wait, so that the catalogue which
//! the successor reads is the one that it serves. Data goes on until the parking.
//! After `Begun` the lock is never given back: nothing of ours may write to the
//! catalogue any more, and calls that waited end with the process.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use model::VolumeId;
use rpc::Error;
use tokio::sync::MutexGuard;
use tokio::task::block_in_place;

use super::{Depot, State, of_worker};
use crate::handover::{self, Load, Sockets};
use crate::worker::Parked;

/// What a hand-over calls us.
pub const KIND: &str = "block-server daemon";

/// Names of what is handed on once; exports have theirs from [`names_of`].
pub(super) const LOCK: &str = "lock";
pub const CONTROL: &str = "control";
pub const TAKE_OVER: &str = "take-over";

/// How long a successor may take to read its settings and to start its threads; calls
/// wait meanwhile.
const PREPARE_MAX: Duration = Duration::from_secs(10);

/// What a predecessor left for us to go on with; empty where there was none.
#[derive(Debug, Default)]
pub struct Inheritance {
    pub sockets: Sockets,
    pub load: Load,
}

impl Inheritance {
    /// The predecessor died before it parked: its connections are gone, and each
    /// volume's file is locked anew, so that its last operations are waited for.
    pub fn after_a_crash(&mut self) {
        self.sockets.listening.retain(|name, _| !name.starts_with(VOLUME));
        self.load = Load::default();
    }

    pub(super) fn socket(&mut self, name: &str) -> Option<OwnedFd> {
        self.sockets.listening.remove(name)
    }
}

/// The names that an export's two sockets have in a hand-over.
pub(super) fn names_of(export: &str) -> [String; 2] {
    [format!("nbd {export}"), format!("vhost {export}")]
}

/// A volume's open file, by which it is locked.
pub(super) fn volume_name(id: VolumeId) -> String {
    format!("{VOLUME}{id}")
}

const VOLUME: &str = "volume ";

impl Depot {
    /// `true`: a successor serves, and we must not. `own`: sockets that are not the
    /// depot's, handed on with it.
    pub async fn give_to(&self, stream: UnixStream, own: &Sockets) -> Result<bool, Error> {
        let mut state = self.state.lock().await;
        let sockets = self
            .sockets(&state, own)
            .map_err(|e| Error::unavailable(format!("hand-over: cannot copy a descriptor: {e}")))?;
        let runtime = tokio::runtime::Handle::current();
        let given = block_in_place(|| {
            handover::give(stream, KIND, &sockets, PREPARE_MAX, || {
                runtime.block_on(self.park(&mut state))
            })
        });
        match given {
            Ok(()) => {
                std::mem::forget(state);
                Ok(true)
            }
            Err((error, load)) => {
                tracing::warn!("a successor came and failed; serving on: {error}");
                self.take_up(&state, load.unwrap_or_default())?;
                Ok(false)
            }
        }
    }

    fn sockets(&self, state: &MutexGuard<'_, State>, own: &Sockets) -> io::Result<Sockets> {
        let mut sockets = Sockets::default();
        for (name, socket) in &own.listening {
            sockets.listening.insert(name.clone(), socket.try_clone()?);
        }
        sockets.listening.insert(LOCK.to_owned(), self.lock.as_fd().try_clone_to_owned()?);
        for (name, export) in &state.open_exports {
            for (name, socket) in names_of(name).into_iter().zip(&export.sockets) {
                sockets.listening.insert(name, socket.try_clone()?);
            }
        }
        for (id, open) in &state.open_volumes {
            sockets.listening.insert(volume_name(*id), open.file.try_clone()?);
        }
        Ok(sockets)
    }

    /// Copies that run are broken off, for the successor to begin anew; then all
    /// threads fall still together.
    async fn park(&self, state: &mut State) -> io::Result<Load> {
        for filling in state.filling.values_mut() {
            filling.cancelled.store(true, Ordering::Relaxed);
        }
        for filling in state.filling.values_mut() {
            // An error says that the copy is gone, which is what was asked for.
            let _ = (&mut filling.ended).await;
        }
        let name = |worker, parked| name_of(state, worker, parked);
        let gathered = handover::gather(&[&self.workers], name).await;
        gathered.or_else(|(error, load)| {
            self.take_up(state, load).map_err(io::Error::other)?;
            Err(error)
        })
    }

    /// Has each connection go on at its export, and every worker accept again.
    pub(super) fn take_up(&self, state: &State, load: Load) -> Result<(), Error> {
        let mut of_workers: Vec<Vec<Parked>> = self.workers.iter().map(|_| Vec::new()).collect();
        for (name, mut parked) in load.connections {
            let Some((worker, listener)) = place_of(state, &name) else {
                tracing::info!("{name}: it is gone; its client has to connect anew");
                continue;
            };
            parked.listener = listener;
            of_workers[worker].push(parked);
        }
        for (worker, connections) in self.workers.iter().zip(of_workers) {
            worker.add_connections(connections).map_err(of_worker)?;
        }
        Ok(())
    }
}

fn name_of(state: &State, worker: usize, parked: Parked) -> Option<(String, Parked)> {
    state
        .open_exports
        .iter()
        .find_map(|(name, export)| {
            let at = export.listeners().into_iter().position(|l| l == parked.listener)?;
            let [nbd, guests] = names_of(name);
            (export.worker == worker).then_some(if at == 0 { nbd } else { guests })
        })
        .map(|name| (name, parked))
}

fn place_of(state: &State, socket: &str) -> Option<(usize, u32)> {
    let (front, name) = socket.split_once(' ')?;
    let export = state.open_exports.get(name)?;
    let [nbd, guests] = export.listeners();
    Some((export.worker, if front == "nbd" { nbd } else { guests }))
}
