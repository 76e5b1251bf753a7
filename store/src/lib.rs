//! Desired and observed state: one trait with etcd's semantics, so that one
//! host needs no extra daemon and many hosts can share an etcd.
//!
//! Called by `control`; a store knows keys and bytes, nothing of EC2. What may
//! never be true: an answered transaction that a crash undoes; two transactions
//! with one revision; a watcher that skips a revision without being told.
//!
//! | implementation | for |
//! |---|---|
//! | [`Embedded`] | one host: redb in this process, durable before the answer |
//! | [`Etcd`] | many hosts |
//! | [`Reference`] | tests: the plainest statement of the semantics |
//!
//! One random history runs on all three (`tests/history.rs`).

#![forbid(unsafe_code)]

mod embedded;
mod etcd;
mod reference;
mod reopened;
mod txn;

use std::time::Duration;

use async_trait::async_trait;

pub use embedded::{Clock, Embedded, HISTORY_REVISIONS_MAX};
pub use etcd::Etcd;
pub use reference::Reference;
pub use txn::{
    Compare, Op, Relation, Target, Txn, TxnAnswer, VALUE_BYTES_MAX, prefix_end, validate,
};

/// Grows by one with each transaction that changes something.
pub type Revision = u64;

/// A lease: when it ends, so do the keys that were put under it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub u64);

/// One key as it stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyValue {
    pub key: String,
    pub value: Vec<u8>,
    /// When the key came to be; a deletion starts it anew.
    pub created: Revision,
    /// When it last changed.
    pub modified: Revision,
    /// How often it was put since it came to be.
    pub version: u64,
    pub lease: Option<LeaseId>,
}

/// A part of the keys, all read at one revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Range {
    pub revision: Revision,
    /// In the order of their bytes.
    pub entries: Vec<KeyValue>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Put(KeyValue),
    Deleted { key: String },
}

impl Event {
    pub fn key(&self) -> &str {
        match self {
            Self::Put(entry) => &entry.key,
            Self::Deleted { key } => key,
        }
    }
}

/// All that one revision changed, in the order of the keys' bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Batch {
    pub revision: Revision,
    pub events: Vec<Event>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The transaction is wrong as it stands.
    #[error("store: transaction refused: {0}")]
    Refused(String),
    /// The history that a watcher asked for is gone: read the range anew, and
    /// watch from its revision.
    #[error("store: watch from revision {from}: history before {oldest} is compacted")]
    Compacted { from: Revision, oldest: Revision },
    #[error("store: lease {0:?} is not there, or has ended")]
    LeaseNotFound(LeaseId),
    /// Not now; whether the transaction took effect is not known.
    #[error("store: unavailable: {0}")]
    Unavailable(String),
    /// A write failed (a full disk, most likely), and nothing was changed. It may be
    /// asked again, with room.
    #[error("store: not written, nothing was changed: {0}")]
    NotWritten(String),
    /// Stop: what is stored cannot be read.
    #[error("store: damaged: {0}")]
    Damaged(String),
}

/// A stream of changes without a gap.
#[async_trait]
pub trait Watch: Send {
    /// Waits for the next revision that changed a watched key.
    async fn next(&mut self) -> Result<Batch, Error>;
}

#[async_trait]
pub trait Store: Send + Sync {
    async fn get(&self, key: &str) -> Result<Option<KeyValue>, Error>;

    /// Every key that begins with `prefix`.
    async fn range(&self, prefix: &str) -> Result<Range, Error>;

    /// Applies `then` when every comparison holds, else `otherwise`; all or
    /// nothing, and durable when this returns.
    async fn txn(&self, txn: Txn) -> Result<TxnAnswer, Error>;

    /// Changes of keys that begin with `prefix`, from revision `from` on, that
    /// one included.
    async fn watch(&self, prefix: &str, from: Revision) -> Result<Box<dyn Watch>, Error>;

    async fn grant(&self, ttl: Duration) -> Result<LeaseId, Error>;

    /// Starts the lease's time anew.
    async fn keep_alive(&self, lease: LeaseId) -> Result<(), Error>;

    /// Ends the lease and deletes its keys.
    async fn revoke(&self, lease: LeaseId) -> Result<(), Error>;

    /// Ends the leases whose time is over, where the store does not do so itself.
    async fn sweep(&self) -> Result<(), Error>;

    /// What an operator reads: `redb /var/lib/…`, `etcd http://…`.
    fn describe(&self) -> String;
}
