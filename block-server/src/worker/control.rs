//! How the rest of the process speaks to a worker: commands in, events out.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crossbeam_channel::{Sender, unbounded};
use model::Limits;
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::oneshot;

use super::moving::Moved;
use super::{Carried, Parked, Still, Worker};
use crate::engine::threads::{Threads, eventfd, ring};
use crate::engine::uring::Uring;
use crate::engine::{Engine, Pool};
use crate::metrics::Counters;
use crate::throttle::Lane;
use crate::tls;
use crate::volume::Geometry;

/// A volume for a worker to serve.
#[derive(Debug)]
pub struct NewVolume {
    pub name: String,
    pub fd: OwnedFd,
    pub geometry: Geometry,
    pub generation: u64,
    pub counters: Arc<Counters>,
    pub limits: Limits,
    pub carried: Carried,
}

/// Who may connect to a socket.
#[derive(Debug, Clone)]
pub enum Access {
    Anyone,
    /// Root, the user that we run as, and these.
    Users(Arc<[u32]>),
    /// Whoever shows a certificate that this accepts, by TLS.
    Certificate(Arc<tls::Server>),
}

impl Access {
    /// Beside root and ourselves at most one.
    pub fn owner(uid: Option<u32>) -> Self {
        Self::Users(uid.into_iter().collect())
    }
}

/// What is spoken on a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Front {
    Nbd,
    /// The first export, to one guest at a time.
    VhostUser,
}

/// One export on a socket.
#[derive(Debug, Clone)]
pub struct Served {
    pub name: String,
    pub volume: u32,
    pub size: u64,
    pub read_only: bool,
    pub generation: u64,
    pub description: String,
    /// Names of certificates that may use it, where not all may that the
    /// listener lets in; without TLS then nobody sees it.
    pub clients: Option<Arc<[String]>>,
    /// Connections that use it now.
    pub connections: Arc<AtomicU32>,
    /// `None`: the worker that has this serves it.
    pub home: Option<Home>,
}

/// Where an export is served that somebody else shakes hands for.
#[derive(Debug, Clone)]
pub struct Home {
    pub door: Door,
    /// What the home calls the listener.
    pub listener: u32,
}

impl Served {
    pub fn connections(&self) -> u32 {
        self.connections.load(Ordering::Relaxed)
    }

    /// The generation that its clients write by; `None` for readers.
    pub(super) fn writer(&self) -> Option<u64> {
        (!self.read_only).then_some(self.generation)
    }
}

/// What a worker tells of its own accord.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The volume is failed and stays so.
    VolumeFailed { name: String, reason: String },
}

#[derive(Debug)]
pub(crate) enum Command {
    AddVolume(NewVolume, oneshot::Sender<u32>),
    /// Nothing may export it any more.
    RemoveVolume(u32, oneshot::Sender<()>),
    AddListener {
        socket: Option<OwnedFd>,
        front: Front,
        access: Access,
        exports: Vec<Served>,
        done: oneshot::Sender<u32>,
    },
    SetExports {
        listener: u32,
        access: Access,
        exports: Vec<Served>,
    },
    /// Closes the socket; its connections finish what is in flight.
    RemoveListener(u32, oneshot::Sender<()>),
    /// Fences older writers; done when none of their changes runs.
    Raise {
        volume: u32,
        generation: u64,
        done: oneshot::Sender<()>,
    },
    SetLimits {
        volume: u32,
        limits: Limits,
    },
    /// The file has that size already.
    Grow {
        volume: u32,
        size: u64,
        done: oneshot::Sender<()>,
    },
    /// Makes changes wait; done when all that was acknowledged is durable.
    Hold {
        volume: u32,
        deadline: Duration,
        done: Barrier,
    },
    Release(u32),
    /// Ends the connections of a volume once they are answered.
    Reconnect(u32),
    /// Ends a listener's connections, and hangs up on new ones.
    Drain {
        listener: u32,
        draining: bool,
        done: oneshot::Sender<()>,
    },
    List(oneshot::Sender<Vec<ConnectionInfo>>),
    Disconnect(u64),
    /// Puts every connection down, and hands them out when nothing runs any more.
    Park(oneshot::Sender<Still>),
    /// Takes up connections that were put down, and accepts again.
    AddConnections(Vec<Parked>),
    /// From the worker that shook hands with it.
    TakeIn(Box<Moved>),
    Stop,
}

/// Told whether a held volume is durable, or why not.
pub(super) type Barrier = oneshot::Sender<Result<(), String>>;

/// What control may know of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectionInfo {
    pub id: u64,
    pub export: Option<String>,
    pub peer: String,
    pub read_only: bool,
    pub in_flight: u64,
    pub waits: bool,
    pub age: Duration,
}

/// Who is told when something has come to pass.
#[derive(Debug)]
pub(super) enum Waiter {
    Fenced { volume: u32, done: oneshot::Sender<()> },
    ListenerGone { listener: u32, done: oneshot::Sender<()> },
    VolumeIdle { volume: u32, done: oneshot::Sender<()> },
    ListenerEmpty { listener: u32, done: oneshot::Sender<()> },
    Quiesced { volume: u32, asked: bool, done: Barrier },
}

/// Which engine to use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum EngineChoice {
    /// io_uring where the kernel lets us, threads otherwise.
    Auto,
    #[value(name = "io_uring")]
    Uring,
    Threads,
}

/// The worker has ended; the process is about to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the worker thread has ended")]
pub struct Gone;

/// Where a worker hears.
#[derive(Debug, Clone)]
pub struct Door {
    commands: Sender<Command>,
    bell: Arc<OwnedFd>,
}

impl Door {
    pub(super) fn tell(&self, command: Command) -> Result<(), Gone> {
        self.commands.send(command).map_err(|_| Gone)?;
        ring(&self.bell);
        Ok(())
    }
}

/// A running worker.
#[derive(Debug)]
pub struct Handle {
    door: Door,
    engine: &'static str,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl Handle {
    /// Starts so many worker threads, which take turns at the disk.
    pub fn start(
        threads: usize,
        choice: EngineChoice,
        events: &UnboundedSender<Event>,
    ) -> io::Result<Vec<Self>> {
        let lanes = Lane::for_threads(threads).into_iter().enumerate();
        lanes.map(|(index, lane)| Self::start_one(index, lane, choice, events.clone())).collect()
    }

    fn start_one(
        index: usize,
        lane: Lane,
        choice: EngineChoice,
        events: UnboundedSender<Event>,
    ) -> io::Result<Self> {
        let (commands, queue) = unbounded();
        let bell = Arc::new(eventfd()?);
        let own_bell = Arc::clone(&bell);
        let (started, start) = std::sync::mpsc::channel();
        let thread =
            std::thread::Builder::new().name(format!("block-{index}")).spawn(move || {
                // The ring belongs to the thread that makes it.
                let pool = Pool::new();
                let engine = match make_engine(choice, &pool) {
                    Ok(engine) => engine,
                    Err(error) => {
                        let _ = started.send(Err(error));
                        return;
                    }
                };
                let _ = started.send(Ok(engine.name()));
                let worker = Worker::new(engine, pool, lane, queue, events, own_bell);
                if let Err(error) = worker.run() {
                    // Without its ring a worker can keep no promise; the supervisor
                    // starts the daemon anew and clients reconnect.
                    tracing::error!(%error, "the I/O engine failed; ending the process");
                    std::process::abort();
                }
            })?;
        let engine = start
            .recv()
            .map_err(|_| io::Error::other("the worker thread ended while it started"))??;
        let door = Door { commands, bell };
        Ok(Self { door, engine, thread: Mutex::new(Some(thread)) })
    }

    pub fn engine(&self) -> &'static str {
        self.engine
    }

    pub fn door(&self) -> Door {
        self.door.clone()
    }

    fn tell(&self, command: Command) -> Result<(), Gone> {
        self.door.tell(command)
    }

    async fn ask<T>(&self, make: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, Gone> {
        let (done, answer) = oneshot::channel();
        self.tell(make(done))?;
        answer.await.map_err(|_| Gone)
    }

    pub async fn add_volume(&self, volume: NewVolume) -> Result<u32, Gone> {
        self.ask(|done| Command::AddVolume(volume, done)).await
    }

    pub async fn remove_volume(&self, volume: u32) -> Result<(), Gone> {
        self.ask(|done| Command::RemoveVolume(volume, done)).await
    }

    /// Without a socket it only gets those whom another worker lets in.
    pub async fn add_listener(
        &self,
        socket: Option<OwnedFd>,
        front: Front,
        access: Access,
        exports: Vec<Served>,
    ) -> Result<u32, Gone> {
        self.ask(|done| Command::AddListener { socket, front, access, exports, done }).await
    }

    pub fn set_exports(
        &self,
        listener: u32,
        access: Access,
        exports: Vec<Served>,
    ) -> Result<(), Gone> {
        self.tell(Command::SetExports { listener, access, exports })
    }

    pub async fn remove_listener(&self, listener: u32) -> Result<(), Gone> {
        self.ask(|done| Command::RemoveListener(listener, done)).await
    }

    pub async fn raise(&self, volume: u32, generation: u64) -> Result<(), Gone> {
        self.ask(|done| Command::Raise { volume, generation, done }).await
    }

    pub fn set_limits(&self, volume: u32, limits: Limits) -> Result<(), Gone> {
        self.tell(Command::SetLimits { volume, limits })
    }

    pub async fn grow(&self, volume: u32, size: u64) -> Result<(), Gone> {
        self.ask(|done| Command::Grow { volume, size, done }).await
    }

    pub async fn hold(&self, volume: u32, deadline: Duration) -> Result<Result<(), String>, Gone> {
        self.ask(|done| Command::Hold { volume, deadline, done }).await
    }

    pub fn release(&self, volume: u32) -> Result<(), Gone> {
        self.tell(Command::Release(volume))
    }

    pub fn reconnect(&self, volume: u32) -> Result<(), Gone> {
        self.tell(Command::Reconnect(volume))
    }

    pub async fn drain(&self, listener: u32, draining: bool) -> Result<(), Gone> {
        self.ask(|done| Command::Drain { listener, draining, done }).await
    }

    pub async fn connections(&self) -> Result<Vec<ConnectionInfo>, Gone> {
        self.ask(Command::List).await
    }

    pub fn disconnect(&self, id: u64) -> Result<(), Gone> {
        self.tell(Command::Disconnect(id))
    }

    /// Puts every connection down between two requests. From then on nothing is
    /// read, written or accepted until [`Self::add_connections`].
    pub async fn park(&self) -> Result<Still, Gone> {
        self.begin_park()?.await.map_err(|_| Gone)
    }

    /// As [`Self::park`], for who has several workers: the answer comes when all
    /// is still. Whoever drops it has the worker go on.
    pub fn begin_park(&self) -> Result<oneshot::Receiver<Still>, Gone> {
        let (done, answer) = oneshot::channel();
        self.tell(Command::Park(done))?;
        Ok(answer)
    }

    pub fn add_connections(&self, connections: Vec<Parked>) -> Result<(), Gone> {
        self.tell(Command::AddConnections(connections))
    }

    /// Begins to finish what is in flight and to close every connection.
    pub fn begin_stop(&self) {
        // A worker that is gone has nothing left to finish.
        let _ = self.tell(Command::Stop);
    }

    /// Waits for the thread's end.
    pub fn await_stop(&self) {
        let thread = self.thread.lock().map_or(None, |mut thread| thread.take());
        if let Some(thread) = thread {
            let _ = thread.join();
        }
    }
}

fn make_engine(choice: EngineChoice, pool: &Pool) -> io::Result<Box<dyn Engine>> {
    if choice == EngineChoice::Threads {
        return Ok(Box::new(Threads::new()?));
    }
    match Uring::new(pool) {
        Ok(engine) => Ok(Box::new(engine)),
        Err(error) if choice == EngineChoice::Auto => {
            tracing::warn!(
                %error,
                "io_uring is not to be had (kernel.io_uring_disabled, seccomp, or a kernel \
                 before 6.1): serving with blocking threads, at several times the CPU"
            );
            Ok(Box::new(Threads::new()?))
        }
        Err(error) => Err(error),
    }
}
