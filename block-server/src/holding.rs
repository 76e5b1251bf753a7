//! The open files of `serve`'s exports, each with its lock (flock): on the very open
//! file that the ring works on, so that the lock outlives a killed server for as
//! long as its last operation runs (docs/adr/0038).
//!
//! A file that is written to is locked alone, one that is only read together with
//! other readers. A predecessor hands its open files on; where the new settings want
//! another kind of open file for the same inode, the lock changes hands in
//! [`Held::settle`], when nobody but us serves.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::{FlockOperation, flock, fstat};
use rustix::io::Errno;

use crate::backing::{self, Backing, Cache, Lock};
use crate::handover::Sockets;
use crate::plan::Export;

/// A file itself, whatever it is called: what a lock is on.
type Inode = (u64, u64);

/// One kind of open file of an inode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    inode: Inode,
    read_only: bool,
    cached: bool,
}

impl Key {
    fn of(fd: &OwnedFd, export: &Export) -> io::Result<Self> {
        let cached = export.cache == Cache::Writeback;
        Ok(Self { inode: inode(fd)?, read_only: export.read_only, cached })
    }

    /// What a hand-over calls it.
    fn name(self) -> String {
        let kind = if self.read_only { READS } else { WRITES };
        let way = if self.cached { "cached" } else { "direct" };
        let (device, number) = self.inode;
        format!("{FILE}{device}:{number} {kind} {way}")
    }
}

/// How the names of open files begin.
const FILE: &str = "file ";
const READS: &str = "reads";
const WRITES: &str = "writes";

fn inode(fd: &OwnedFd) -> io::Result<Inode> {
    let found = fstat(fd)?;
    Ok((found.st_dev, found.st_ino))
}

/// Open files whose exports are to be served.
pub struct Held {
    files: BTreeMap<Key, (Export, OwnedFd)>,
    /// Our own, beside those that were handed on: after a crash they are the ones.
    anew: BTreeMap<Key, OwnedFd>,
    /// A predecessor's that we have no use for but their locks, which it holds as
    /// long as it may still serve.
    left: Vec<Left>,
}

struct Left {
    inode: Inode,
    fd: OwnedFd,
    /// How the predecessor keeps others off by it.
    lock: Lock,
}

/// How often a lock is tried again that a process has which is about to end, and the
/// pause between.
const TRIES_MAX: u32 = 50;
const PAUSE: Duration = Duration::from_millis(20);

/// A server's locks as they were. Somebody may have come between: no more can be done then.
fn restore(left: &[Left]) {
    let mut tries = 0..TRIES_MAX;
    for Left { inode, fd, lock } in left {
        let is_with = |other: &Left| other.inode == *inode && other.lock == Lock::Alone;
        let lock = match lock {
            Lock::Alone => FlockOperation::NonBlockingLockExclusive,
            // The writer's lock keeps all others off: beside it there was none.
            Lock::Shared if left.iter().any(is_with) => continue,
            Lock::Shared => FlockOperation::NonBlockingLockShared,
        };
        let mut locked = flock(fd, lock);
        while locked == Err(Errno::WOULDBLOCK) && tries.next().is_some() {
            std::thread::sleep(PAUSE);
            locked = flock(fd, lock);
        }
        if let Err(error) = locked {
            tracing::warn!("the lock of inode {inode:?} is lost: {error}");
        }
    }
}

/// By the name under which it is handed on.
fn lock_of(name: &str) -> Lock {
    if name.contains(WRITES) { Lock::Alone } else { Lock::Shared }
}

/// A successor that came to nothing may have had our locks on their way to open files
/// of its own.
pub fn keep(sockets: &Sockets) -> io::Result<()> {
    let files = sockets.listening.iter().filter(|(name, _)| name.starts_with(FILE));
    let ours = files
        .map(|(name, fd)| Ok(Left { inode: inode(fd)?, fd: fd.try_clone()?, lock: lock_of(name) }));
    restore(&ours.collect::<io::Result<Vec<_>>>()?);
    Ok(())
}

impl Held {
    /// Opens every export's file and locks it, waiting so long for a dead server's
    /// last operation.
    pub fn open(
        exports: &[Export],
        old: &mut Sockets,
        patience: Duration,
    ) -> anyhow::Result<(Self, Vec<(Export, Backing)>)> {
        let mut held = Self { files: BTreeMap::new(), anew: BTreeMap::new(), left: Vec::new() };
        let mut opened = Vec::new();
        for export in exports {
            let backing =
                held.add(export, old).with_context(|| format!("export {:?}", export.name))?;
            opened.push((export.clone(), backing));
        }
        held.keep_left(old)?;
        for (key, (export, fd)) in &held.files {
            if held.left.iter().all(|left| left.inode != key.inode) {
                held.lock(*key, export, fd, patience)?;
            }
        }
        held.see_that_locks_can_change()?;
        Ok((held, opened))
    }

    fn add(&mut self, export: &Export, old: &mut Sockets) -> anyhow::Result<Backing> {
        let anew = Backing::open_cached(&export.path, export.read_only, export.cache)?;
        let key = Key::of(&anew.fd, export)?;
        let other_way = Key { cached: !key.cached, ..key };
        if let Some((other, _)) = self.files.get(&other_way).filter(|_| !key.read_only) {
            bail!(
                "{}: export {:?} writes to it by another cache; write the same for both",
                export.path.display(),
                other.name
            );
        }
        let fd = match (self.files.get(&key), old.listening.remove(&key.name())) {
            (Some((_, present)), _) => present.try_clone()?,
            (None, Some(handed_on)) => {
                self.anew.insert(key, anew.fd);
                handed_on
            }
            (None, None) => anew.fd,
        };
        self.files.entry(key).or_insert((export.clone(), fd.try_clone()?));
        Ok(Backing { fd, geometry: anew.geometry })
    }

    /// Keeps what of the predecessor's stands in our way.
    fn keep_left(&mut self, old: &mut Sockets) -> io::Result<()> {
        let names: Vec<String> =
            old.listening.keys().filter(|name| name.starts_with(FILE)).cloned().collect();
        for name in names {
            let Some(fd) = old.listening.remove(&name) else { continue };
            let inode = inode(&fd)?;
            let lock = lock_of(&name);
            if self.files.keys().any(|key| key.inode == inode) {
                self.left.push(Left { inode, fd, lock });
            }
        }
        Ok(())
    }

    fn has_writer(&self, inode: Inode) -> bool {
        self.files.keys().any(|key| key.inode == inode && !key.read_only)
    }

    fn lock(&self, key: Key, export: &Export, fd: &OwnedFd, wait: Duration) -> anyhow::Result<()> {
        let locked = match (key.read_only, self.has_writer(key.inode)) {
            (true, true) => Ok(()), // The writer's lock, which is ours, keeps all others off.
            (true, false) => backing::await_lock(fd, &export.path, Lock::Shared, wait),
            (false, _) => backing::await_lock(fd, &export.path, Lock::Alone, wait),
        };
        locked.with_context(|| format!("export {:?}", export.name))
    }

    /// A predecessor that only read, and other readers beside it: we could not write
    /// once it is gone, so it is said before it goes.
    fn see_that_locks_can_change(&self) -> anyhow::Result<()> {
        for (key, (export, _)) in self.files.iter().filter(|(key, _)| !key.read_only) {
            let left: Vec<&Left> = self.left.iter().filter(|l| l.inode == key.inode).collect();
            let is_alone = left.iter().any(|l| l.lock == Lock::Alone);
            let Some((first, others)) = left.split_first().filter(|_| !is_alone) else { continue };
            for Left { fd, .. } in others {
                flock(fd, FlockOperation::Unlock)?;
            }
            let alone = backing::await_lock(&first.fd, &export.path, Lock::Alone, Duration::ZERO);
            if let Err(error) = alone {
                restore(&self.left);
                return Err(error).with_context(|| format!("export {:?}", export.name));
            }
        }
        Ok(())
    }

    /// Nobody but us serves: takes the locks that the predecessor had by other open files.
    pub fn settle(&mut self, patience: Duration) -> anyhow::Result<()> {
        self.anew.clear();
        for Left { fd, .. } in &self.left {
            flock(fd, FlockOperation::Unlock)?;
        }
        for (key, (export, fd)) in &self.files {
            if self.left.iter().any(|left| left.inode == key.inode)
                && let Err(error) = self.lock(*key, export, fd, patience)
            {
                self.give_back();
                return Err(error);
            }
        }
        Ok(())
    }

    /// The predecessor goes on: its locks are again where they were.
    pub fn give_back(&self) {
        let own = |inode| self.left.iter().any(|left| left.inode == inode);
        for (_, (_, fd)) in self.files.iter().filter(|(key, _)| own(key.inode)) {
            // It goes with our end at the latest.
            let _ = flock(fd, FlockOperation::Unlock);
        }
        restore(&self.left);
    }

    /// We serve: nothing of the predecessor's is needed any more.
    pub fn begun(&mut self) {
        self.left.clear();
    }

    /// The predecessor died while it may have had operations on their way, which hold
    /// the locks of its open files: gives those up, and waits for the locks by our own.
    pub fn take_from_the_dead(
        &mut self,
        exports: &mut [(Export, Backing)],
        patience: Duration,
    ) -> anyhow::Result<()> {
        self.left.clear();
        for (export, backing) in exports {
            if let Some(fd) = self.anew.get(&Key::of(&backing.fd, export)?) {
                backing.fd = fd.try_clone()?;
            }
        }
        for (key, fd) in std::mem::take(&mut self.anew) {
            self.files.entry(key).and_modify(|(_, present)| *present = fd);
        }
        for (key, (export, fd)) in &self.files {
            self.lock(*key, export, fd, patience)?;
        }
        Ok(())
    }

    /// For a successor.
    pub fn hand_on(self) -> impl Iterator<Item = (String, OwnedFd)> {
        self.files.into_iter().map(|(key, (_, fd))| (key.name(), fd))
    }
}
