//! The store of one host: redb in this process. Every transaction is on disk
//! (redb's immediate durability: data, then its root, each synced) before it is
//! answered. Layout in `docs/formats/store.md`.

use std::cell::Cell;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use redb::{
    Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition,
    WriteTransaction,
};
use tokio::sync::watch;

use crate::reopened::{Failed, Reopened};
use crate::txn::{Op, Txn, TxnAnswer, validate};
use crate::{Batch, Error, Event, KeyValue, LeaseId, Range, Revision, Store, Watch};

/// key → entry.
const ENTRIES: TableDefinition<&str, &[u8]> = TableDefinition::new("entries");
/// (revision, key) → 1 and the entry, or 0: deleted.
const HISTORY: TableDefinition<(u64, &str), &[u8]> = TableDefinition::new("history");
/// lease → (time to live, end), milliseconds, the end since the epoch.
const LEASES: TableDefinition<u64, (u64, u64)> = TableDefinition::new("leases");
const META: TableDefinition<&str, u64> = TableDefinition::new("meta");

const REVISION: &str = "revision";
/// The oldest revision whose changes are kept.
const OLDEST: &str = "oldest";
const LEASE_LAST: &str = "lease-last";
const FORMAT: &str = "format";
const FORMAT_NOW: u64 = 1;

/// Revisions kept for watchers. A watcher in this process is behind by a few;
/// one that is behind by more reads the range anew.
pub const HISTORY_REVISIONS_MAX: u64 = 10_000;

/// Bytes before an entry's value: created, modified, version, lease.
const ENTRY_HEADER: usize = 32;

/// Milliseconds since the epoch; tests bring their own.
pub type Clock = Arc<dyn Fn() -> u64 + Send + Sync>;

pub struct Embedded {
    core: Arc<Core>,
}

struct Core {
    database: Reopened,
    clock: Clock,
    history_max: u64,
    revision: watch::Sender<Revision>,
}

impl Embedded {
    /// Opens the store, or makes it. Only one process may hold it.
    pub fn open(path: &Path, clock: Clock) -> Result<Self, Error> {
        Self::open_with_history(path, clock, HISTORY_REVISIONS_MAX)
    }

    pub fn open_with_history(path: &Path, clock: Clock, history_max: u64) -> Result<Self, Error> {
        let database = Database::create(path).map_err(|e| match e {
            redb::DatabaseError::DatabaseAlreadyOpen => Error::Unavailable(format!(
                "{}: another process holds it; is a control daemon running already?",
                path.display()
            )),
            e => damaged(path)(e),
        })?;
        let revision = prepare(&database).map_err(damaged(path))?;
        let database = Reopened::new(path, database, revision_of).map_err(damaged(path))?;
        let (revision, _) = watch::channel(revision);
        let core = Core { database, clock, history_max, revision };
        Ok(Self { core: Arc::new(core) })
    }

    async fn on_core<T: Send + 'static>(
        &self,
        deed: impl FnOnce(&Core) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let core = Arc::clone(&self.core);
        tokio::task::spawn_blocking(move || deed(&core))
            .await
            .map_err(|e| Error::Unavailable(format!("the store's thread ended: {e}")))?
    }
}

fn damaged<E: std::fmt::Display>(path: &Path) -> impl Fn(E) -> Error + '_ {
    move |e| Error::Damaged(format!("{}: {e}", path.display()))
}

/// Makes the tables where they are missing; returns the revision.
fn prepare(database: &Database) -> Result<Revision, redb::Error> {
    let write = database.begin_write()?;
    let revision = {
        write.open_table(ENTRIES)?;
        write.open_table(HISTORY)?;
        write.open_table(LEASES)?;
        let mut meta = write.open_table(META)?;
        if meta.is_empty()? {
            // As etcd: revision 1 is the empty store.
            meta.insert(REVISION, 1)?;
            meta.insert(OLDEST, 2)?;
            meta.insert(LEASE_LAST, 0)?;
            meta.insert(FORMAT, FORMAT_NOW)?;
        }
        let format = meta.get(FORMAT)?.map_or(0, |v| v.value());
        if format != FORMAT_NOW {
            return Err(redb::Error::Corrupted(format!(
                "format {format}, this program reads {FORMAT_NOW}"
            )));
        }
        meta.get(REVISION)?.map_or(0, |v| v.value())
    };
    write.commit()?;
    Ok(revision)
}

fn revision_of(database: &Database) -> Result<Revision, redb::Error> {
    Ok(database.begin_read()?.open_table(META)?.get(REVISION)?.map_or(0, |v| v.value()))
}

fn encode(entry: &KeyValue) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(ENTRY_HEADER + entry.value.len());
    let lease = entry.lease.map_or(0, |l| l.0);
    for number in [entry.created, entry.modified, entry.version, lease] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&entry.value);
    bytes
}

fn decode(key: &str, bytes: &[u8]) -> Result<KeyValue, redb::Error> {
    let short = || redb::Error::Corrupted(format!("entry {key}: {} bytes", bytes.len()));
    let (header, value) = bytes.split_at_checked(ENTRY_HEADER).ok_or_else(short)?;
    let mut numbers = header.as_chunks::<8>().0.iter().map(|n| u64::from_le_bytes(*n));
    let mut next = || numbers.next().ok_or_else(short);
    let (created, modified, version, lease) = (next()?, next()?, next()?, next()?);
    Ok(KeyValue {
        key: key.to_owned(),
        value: value.to_vec(),
        created,
        modified,
        version,
        lease: (lease != 0).then_some(LeaseId(lease)),
    })
}

impl Core {
    fn failed(&self, error: impl Into<redb::Error>) -> Error {
        let path = self.database.path().display();
        match error.into() {
            // A full or failing disk: nothing was answered, nothing is lost.
            redb::Error::Io(e) => Error::NotWritten(format!("{path}: {e}")),
            redb::Error::PreviousIo => {
                Error::NotWritten(format!("{path}: a write beside it failed"))
            }
            e => Error::Damaged(format!("{path}: {e}")),
        }
    }

    /// A look at what is there, once more where another's failed write stood in its way.
    fn look<T>(&self, deed: impl Fn(&Database) -> Result<T, redb::Error>) -> Result<T, Error> {
        let once = || self.database.on(|database| deed(database).map_err(|e| self.failed(e)));
        let again = once().or_else(|failed| match failed.error {
            Error::NotWritten(_) => once(),
            _ => Err(failed),
        });
        again.map_err(|failed| match failed.error {
            Error::NotWritten(cause) => Error::Unavailable(cause),
            error => error,
        })
    }

    /// A change, which says before its commit what it would answer. One that broke off
    /// may be there nevertheless: what stands on the disk tells.
    fn change(
        &self,
        deed: impl FnOnce(&Database, &Cell<Option<TxnAnswer>>) -> Result<TxnAnswer, Error>,
    ) -> Result<TxnAnswer, Error> {
        let due = Cell::new(None);
        let done = self.database.on(|database| deed(database, &due));
        let answer = match done {
            Ok(answer) => answer,
            Err(Failed { error: Error::NotWritten(cause), found }) => {
                match (due.into_inner(), found) {
                    (None, _) => return Err(Error::NotWritten(cause)),
                    (Some(_), None) => return Err(Error::Unavailable(cause)),
                    (Some(due), Some(found)) if found < due.revision => {
                        return Err(Error::NotWritten(cause));
                    }
                    (Some(due), Some(_)) => due,
                }
            }
            Err(failed) => return Err(failed.error),
        };
        self.revision.send_if_modified(|known| {
            let news = answer.revision > *known;
            *known = answer.revision.max(*known);
            news
        });
        Ok(answer)
    }

    /// A change that is no revision.
    fn write<T>(&self, deed: impl FnOnce(&Database) -> Result<T, redb::Error>) -> Result<T, Error> {
        let done = self.database.on(|database| deed(database).map_err(|e| self.failed(e)));
        done.map_err(|failed| failed.error)
    }

    fn get(&self, database: &Database, key: &str) -> Result<Option<KeyValue>, redb::Error> {
        let table = database.begin_read()?.open_table(ENTRIES)?;
        table.get(key)?.map(|bytes| decode(key, bytes.value())).transpose()
    }

    fn range(&self, database: &Database, prefix: &str) -> Result<Range, redb::Error> {
        let read = database.begin_read()?;
        let revision = read.open_table(META)?.get(REVISION)?.map_or(0, |v| v.value());
        let mut entries = Vec::new();
        for row in read.open_table(ENTRIES)?.range(prefix..)? {
            let (key, bytes) = row?;
            if !key.value().starts_with(prefix) {
                break;
            }
            entries.push(decode(key.value(), bytes.value())?);
        }
        Ok(Range { revision, entries })
    }

    fn txn(&self, txn: &Txn) -> Result<TxnAnswer, Error> {
        validate(txn)?;
        self.change(|database, due| {
            let write = database.begin_write().map_err(|e| self.failed(e))?;
            let succeeded = compare_all(&write, txn).map_err(|e| self.failed(e))?;
            let branch = if succeeded { &txn.then } else { &txn.otherwise };
            if let Some(lease) = missing_lease(&write, branch).map_err(|e| self.failed(e))? {
                return Err(Error::LeaseNotFound(lease));
            }
            self.commit(write, branch, succeeded, due)
        })
    }

    /// Makes the changes durable.
    fn commit(
        &self,
        write: WriteTransaction,
        ops: &[Op],
        succeeded: bool,
        due: &Cell<Option<TxnAnswer>>,
    ) -> Result<TxnAnswer, Error> {
        let (revision, changed) =
            change(&write, ops, self.history_max).map_err(|e| self.failed(e))?;
        let answer = TxnAnswer { succeeded, revision };
        due.set(changed.then_some(answer));
        write.commit().map_err(|e| self.failed(e))?;
        Ok(answer)
    }

    fn grant(&self, database: &Database, ttl_ms: u64) -> Result<LeaseId, redb::Error> {
        let write = database.begin_write()?;
        let id = {
            let mut meta = write.open_table(META)?;
            let id = meta.get(LEASE_LAST)?.map_or(0, |v| v.value()) + 1;
            meta.insert(LEASE_LAST, id)?;
            let ends = (self.clock)() + ttl_ms;
            write.open_table(LEASES)?.insert(id, (ttl_ms, ends))?;
            id
        };
        write.commit()?;
        Ok(LeaseId(id))
    }

    fn keep_alive(&self, database: &Database, lease: LeaseId) -> Result<Option<()>, redb::Error> {
        let write = database.begin_write()?;
        {
            let mut leases = write.open_table(LEASES)?;
            let Some(ttl_ms) = leases.get(lease.0)?.map(|v| v.value().0) else { return Ok(None) };
            leases.insert(lease.0, (ttl_ms, (self.clock)() + ttl_ms))?;
        }
        write.commit()?;
        Ok(Some(()))
    }

    fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        let revoked = self.change(|database, due| {
            let write = database.begin_write().map_err(|e| self.failed(e))?;
            let there = remove_lease(&write, lease).map_err(|e| self.failed(e))?;
            let ops = there.ok_or(Error::LeaseNotFound(lease))?;
            self.commit(write, &ops, true, due)
        });
        revoked.map(|_| ())
    }

    fn leases_over(&self, database: &Database) -> Result<Vec<LeaseId>, redb::Error> {
        let now = (self.clock)();
        let table = database.begin_read()?.open_table(LEASES)?;
        let mut over = Vec::new();
        for row in table.iter()? {
            let (id, times) = row?;
            if times.value().1 <= now {
                over.push(LeaseId(id.value()));
            }
        }
        Ok(over)
    }

    /// The first changes from `from` on that touch the prefix, and where to go on.
    fn history(&self, prefix: &str, from: Revision) -> Result<Batch, Error> {
        let gather = |database: &Database| -> Result<(Revision, Batch), redb::Error> {
            let read = database.begin_read()?;
            let meta = read.open_table(META)?;
            let oldest = meta.get(OLDEST)?.map_or(0, |v| v.value());
            let latest = meta.get(REVISION)?.map_or(0, |v| v.value());
            let mut batch = Batch { revision: latest, events: Vec::new() };
            for row in read.open_table(HISTORY)?.range((from, "")..)? {
                let (at, bytes) = row?;
                let (revision, key) = at.value();
                if !key.starts_with(prefix) {
                    continue;
                }
                if batch.events.is_empty() {
                    batch.revision = revision;
                } else if revision != batch.revision {
                    break;
                }
                batch.events.push(match bytes.value().split_first() {
                    Some((1, entry)) => Event::Put(decode(key, entry)?),
                    _ => Event::Deleted { key: key.to_owned() },
                });
            }
            Ok((oldest, batch))
        };
        let (oldest, batch) = self.look(gather)?;
        if from < oldest { Err(Error::Compacted { from, oldest }) } else { Ok(batch) }
    }
}

fn compare_all(write: &WriteTransaction, txn: &Txn) -> Result<bool, redb::Error> {
    let entries = write.open_table(ENTRIES)?;
    for compare in &txn.compare {
        let current = entries.get(compare.key.as_str())?;
        let current = current.map(|bytes| decode(&compare.key, bytes.value())).transpose()?;
        if !compare.holds(current.as_ref()) {
            return Ok(false);
        }
    }
    Ok(true)
}

fn missing_lease(write: &WriteTransaction, ops: &[Op]) -> Result<Option<LeaseId>, redb::Error> {
    let leases = write.open_table(LEASES)?;
    for op in ops {
        if let Op::Put { lease: Some(lease), .. } = op
            && leases.get(lease.0)?.is_none()
        {
            return Ok(Some(*lease));
        }
    }
    Ok(None)
}

/// Takes the lease away and says which keys go with it; `None`: it is not there.
fn remove_lease(write: &WriteTransaction, lease: LeaseId) -> Result<Option<Vec<Op>>, redb::Error> {
    if write.open_table(LEASES)?.remove(lease.0)?.is_none() {
        return Ok(None);
    }
    let mut ops = Vec::new();
    for row in write.open_table(ENTRIES)?.iter()? {
        let (key, bytes) = row?;
        if decode(key.value(), bytes.value())?.lease == Some(lease) {
            ops.push(Op::delete(key.value()));
        }
    }
    Ok(Some(ops))
}

/// Writes the operations under the next revision, and cuts the history's tail.
/// Where nothing changes, the revision stays.
fn change(
    write: &WriteTransaction,
    ops: &[Op],
    history_max: u64,
) -> Result<(Revision, bool), redb::Error> {
    let mut meta = write.open_table(META)?;
    let mut entries = write.open_table(ENTRIES)?;
    let mut history = write.open_table(HISTORY)?;
    let current = meta.get(REVISION)?.map_or(0, |v| v.value());
    let revision = current + 1;
    let mut changed = false;
    for op in ops {
        match op {
            Op::Put { key, value, lease } => {
                let before = entries.get(key.as_str())?;
                let before = before.map(|b| decode(key, b.value())).transpose()?;
                let entry = KeyValue {
                    key: key.clone(),
                    value: value.clone(),
                    created: before.as_ref().map_or(revision, |b| b.created),
                    modified: revision,
                    version: before.map_or(0, |b| b.version) + 1,
                    lease: *lease,
                };
                let bytes = encode(&entry);
                entries.insert(key.as_str(), bytes.as_slice())?;
                let event: Vec<u8> = [&[1], bytes.as_slice()].concat();
                history.insert((revision, key.as_str()), event.as_slice())?;
                changed = true;
            }
            Op::Delete { key } => {
                if entries.remove(key.as_str())?.is_some() {
                    history.insert((revision, key.as_str()), [0].as_slice())?;
                    changed = true;
                }
            }
        }
    }
    if !changed {
        return Ok((current, false));
    }
    meta.insert(REVISION, revision)?;
    let oldest = (revision + 1).saturating_sub(history_max);
    if meta.get(OLDEST)?.map_or(0, |v| v.value()) < oldest {
        history.retain_in(..(oldest, ""), |_, _| false)?;
        meta.insert(OLDEST, oldest)?;
    }
    Ok((revision, true))
}

#[async_trait]
impl Store for Embedded {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error> {
        let key = key.to_owned();
        self.on_core(move |core| core.look(|database| core.get(database, &key))).await
    }

    async fn range(&self, prefix: &str) -> Result<Range, Error> {
        let prefix = prefix.to_owned();
        self.on_core(move |core| core.look(|database| core.range(database, &prefix))).await
    }

    async fn txn(&self, txn: Txn) -> Result<TxnAnswer, Error> {
        self.on_core(move |core| core.txn(&txn)).await
    }

    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, Error> {
        Ok(Box::new(EmbeddedWatch {
            core: Arc::clone(&self.core),
            prefix: prefix.to_owned(),
            // Revision 1 changed nothing: history begins at 2.
            next: from.max(2),
            latest: self.core.revision.subscribe(),
        }))
    }

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, Error> {
        let ttl_ms = u64::try_from(ttl.as_millis()).unwrap_or(u64::MAX / 2);
        self.on_core(move |core| core.write(|database| core.grant(database, ttl_ms))).await
    }

    async fn keep_alive(&self, lease: LeaseId) -> Result<(), Error> {
        self.on_core(move |core| {
            core.write(|database| core.keep_alive(database, lease))?
                .ok_or(Error::LeaseNotFound(lease))
        })
        .await
    }

    async fn revoke(&self, lease: LeaseId) -> Result<(), Error> {
        self.on_core(move |core| core.revoke(lease)).await
    }

    async fn sweep(&self) -> Result<(), Error> {
        self.on_core(|core| {
            for lease in core.look(|database| core.leases_over(database))? {
                core.revoke(lease)?;
            }
            Ok(())
        })
        .await
    }

    fn describe(&self) -> String {
        format!("redb {}", self.core.database.path().display())
    }
}

/// Reads the history that the database keeps, so a slow watcher costs no memory.
struct EmbeddedWatch {
    core: Arc<Core>,
    prefix: String,
    next: Revision,
    latest: watch::Receiver<Revision>,
}

#[async_trait]
impl Watch for EmbeddedWatch {
    async fn next(&mut self) -> Result<Batch, Error> {
        loop {
            if *self.latest.borrow_and_update() >= self.next {
                let (core, prefix, from) = (Arc::clone(&self.core), self.prefix.clone(), self.next);
                let batch = tokio::task::spawn_blocking(move || core.history(&prefix, from))
                    .await
                    .map_err(|e| Error::Unavailable(format!("the store's thread ended: {e}")))??;
                self.next = batch.revision + 1;
                if !batch.events.is_empty() {
                    return Ok(batch);
                }
            }
            let closed = |_| Error::Unavailable("the store was closed".to_owned());
            self.latest.changed().await.map_err(closed)?;
        }
    }
}
