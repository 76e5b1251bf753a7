//! The threads of `serve`: which export is on which, and how all of it goes to a
//! successor.
//!
//! ```text
//!              ┌ accepts, shakes hands ┐        a connection, as it stands
//!  sockets ──▶ │ thread 0, its exports │ ───────────────────────────────────▶ thread n,
//!              └───────────────────────┘  whose export it chose               its exports
//! ```
//!
//! A file is served by one thread, under however many names. The first thread is at
//! the door for all: so there is one count of those who wait there, and once it stands
//! still no connection is on its way between two others.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::Duration;

use rustix::fs::{FileType, fstat};
use tokio::sync::mpsc::unbounded_channel;

use super::KIND;
use super::open::{Listener, METRICS, Opened, UPGRADES};
use crate::backing::Backing;
use crate::handover::{self, Load};
use crate::holding;
use crate::metrics::Counters;
use crate::plan::{Export, Plan};
use crate::worker::{Handle, Home, NewVolume, Parked, Served};

/// How long a successor may take to open its files; clients are served meanwhile.
const PREPARE_MAX: Duration = Duration::from_secs(60);

/// What two exports of one file, or one device, have in common.
type File = (bool, u64, u64);

fn file_of(backing: &Backing) -> io::Result<File> {
    let found = fstat(&backing.fd)?;
    // A device has one number, and may have several nodes.
    let is_device = FileType::from_raw_mode(found.st_mode) == FileType::BlockDevice;
    Ok(if is_device { (true, found.st_rdev, 0) } else { (false, found.st_dev, found.st_ino) })
}

/// Which thread serves each file: in turn, in the order in which they are first named.
fn homes<T: Ord>(files: impl IntoIterator<Item = T>, threads: usize) -> Vec<usize> {
    let mut known = BTreeMap::new();
    let home = |file| {
        let next = known.len() % threads;
        *known.entry(file).or_insert(next)
    };
    files.into_iter().map(home).collect()
}

/// Threads that have nothing to serve yet.
pub struct Threads {
    workers: Vec<Handle>,
    /// Of each export.
    homes: Vec<usize>,
}

impl Threads {
    /// As many as asked for, and no more than there are files.
    pub fn start(plan: &Plan, opened: &Opened) -> io::Result<Self> {
        let files: Vec<File> =
            opened.exports.iter().map(|(_, backing)| file_of(backing)).collect::<Result<_, _>>()?;
        let homes = homes(files, crate::worker::threads(plan.threads));
        let count = homes.iter().max().map_or(1, |last| last + 1);
        let (events, _) = unbounded_channel();
        Ok(Self { workers: Handle::start(count, plan.engine, &events)?, homes })
    }
}

/// What serves, and what a successor is given.
pub struct Serving {
    workers: Vec<Handle>,
    /// Which listener of each has which name.
    names: Vec<BTreeMap<u32, String>>,
    sockets: handover::Sockets,
    pub metrics: Vec<(String, Arc<Counters>)>,
}

impl Serving {
    pub async fn start(
        threads: Threads,
        opened: Opened,
        load: Load,
    ) -> anyhow::Result<(Self, Option<OwnedFd>)> {
        let Threads { workers, homes } = threads;
        let names = workers.iter().map(|_| BTreeMap::new()).collect();
        let mut serving =
            Self { workers, names, sockets: handover::Sockets::default(), metrics: Vec::new() };
        let mut exports = Vec::new();
        for ((export, backing), home) in opened.exports.into_iter().zip(homes) {
            let counters = Arc::<Counters>::default();
            serving.metrics.push((export.path.display().to_string(), Arc::clone(&counters)));
            let served = add(&serving.workers[home], export, backing, &load, counters).await?;
            exports.push((home, served));
        }
        for listener in opened.listeners {
            let socket = listener.socket.try_clone()?;
            serving.sockets.listening.insert(listener.name.clone(), socket);
            serving.listen(listener, &exports).await?;
        }
        serving.sockets.listening.extend(opened.claims);
        serving.sockets.listening.extend(opened.held.hand_on());
        if let Some(socket) = &opened.upgrades {
            serving.sockets.listening.insert(UPGRADES.to_owned(), socket.try_clone()?);
        }
        if let Some(socket) = opened.metrics {
            serving.sockets.listening.insert(METRICS.to_owned(), socket);
        }
        serving.take_up(load)?;
        Ok((serving, opened.upgrades))
    }

    /// Has the first thread accept, and each other know what is sent on to it.
    async fn listen(
        &mut self,
        listener: Listener,
        exports: &[(usize, Served)],
    ) -> anyhow::Result<()> {
        let Listener { name, front, access, socket } = listener;
        let mut seen: Vec<Served> = exports.iter().map(|(_, served)| served.clone()).collect();
        for (at, worker) in self.workers.iter().enumerate().skip(1) {
            let own = exports.iter().filter(|(home, _)| *home == at);
            let own = own.map(|(_, served)| served.clone()).collect();
            let listener = worker.add_listener(None, front, access.clone(), own).await?;
            self.names[at].insert(listener, name.clone());
            for (served, (home, _)) in seen.iter_mut().zip(exports) {
                if *home == at {
                    served.home = Some(Home { door: worker.door(), listener });
                }
            }
        }
        let listener = self.workers[0].add_listener(Some(socket), front, access, seen).await?;
        self.names[0].insert(listener, name);
        Ok(())
    }

    pub fn engine(&self) -> &'static str {
        self.workers[0].engine()
    }

    pub fn threads(&self) -> usize {
        self.workers.len()
    }

    /// Has every thread go on, and each connection: the first thread sends it where its
    /// export is served now.
    fn take_up(&self, load: Load) -> anyhow::Result<()> {
        let place = |(name, mut parked): (String, Parked)| {
            parked.listener = *self.names[0].iter().find(|(_, own)| **own == name)?.0;
            Some(parked)
        };
        let mut connections: Vec<Parked> = load.connections.into_iter().filter_map(place).collect();
        for worker in &self.workers {
            worker.add_connections(std::mem::take(&mut connections))?;
        }
        Ok(())
    }

    async fn park(&self) -> io::Result<Load> {
        let (door, others) = self.workers.split_at(1);
        let name = |worker: usize, parked: Parked| {
            Some((self.names[worker].get(&parked.listener)?.clone(), parked))
        };
        let gathered = handover::gather(&[door, others], name).await;
        gathered.or_else(|(error, load)| {
            self.take_up(load).map_err(io::Error::other)?;
            Err(error)
        })
    }

    /// `None`: a successor serves, and we must not. Else why we serve on.
    pub fn give_to(&self, stream: UnixStream) -> anyhow::Result<Option<String>> {
        let runtime = tokio::runtime::Handle::current();
        let given = handover::give(stream, KIND, &self.sockets, PREPARE_MAX, || {
            runtime.block_on(self.park())
        });
        match given {
            Ok(()) => Ok(None),
            Err((error, load)) => {
                tracing::warn!("a successor came and failed; serving on: {error}");
                holding::keep(&self.sockets)?;
                self.take_up(load.unwrap_or_default())?;
                Ok(Some(error.to_string()))
            }
        }
    }

    /// Returns when all that was in flight is answered.
    pub fn stop(&self) {
        self.workers.iter().for_each(Handle::begin_stop);
        self.workers.iter().for_each(Handle::await_stop);
    }
}

async fn add(
    worker: &Handle,
    export: Export,
    backing: Backing,
    load: &Load,
    counters: Arc<Counters>,
) -> anyhow::Result<Served> {
    let size = backing.geometry.size;
    let name = export.path.display().to_string();
    let volume = NewVolume {
        carried: load.carried(&name),
        name,
        fd: backing.fd,
        geometry: backing.geometry,
        generation: 0,
        counters,
        limits: export.limits,
    };
    Ok(Served {
        name: export.name,
        volume: worker.add_volume(volume).await?,
        size,
        read_only: export.read_only,
        generation: 0,
        description: export.description,
        clients: export.clients.map(Into::into),
        connections: Arc::new(AtomicU32::new(0)),
        home: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_one_thread_under_all_its_names() {
        assert_eq!(homes(["a", "b", "a", "c", "b", "d"], 2), [0, 1, 0, 0, 1, 1]);
        assert_eq!(homes(["a", "b", "c"], 8), [0, 1, 2], "no thread without a file");
        assert_eq!(homes(["a", "b", "c"], 1), [0, 0, 0]);
    }
}
