//! The semantics as plainly as they can be said, in memory. What the other
//! implementations do is checked against this one; it also serves tests of
//! those who use a store.

use std::collections::BTreeMap;

use crate::txn::{Op, Txn, TxnAnswer, validate};
use crate::{Batch, Error, Event, KeyValue, LeaseId, Revision};

#[derive(Debug, Clone)]
pub struct Reference {
    revision: Revision,
    entries: BTreeMap<String, KeyValue>,
    history: Vec<Batch>,
    leases: BTreeMap<LeaseId, (u64, u64)>,
    lease_last: u64,
}

impl Default for Reference {
    /// etcd's first revision is 1: nothing has been written then.
    fn default() -> Self {
        Self {
            revision: 1,
            entries: BTreeMap::new(),
            history: Vec::new(),
            leases: BTreeMap::new(),
            lease_last: 0,
        }
    }
}

impl Reference {
    pub fn revision(&self) -> Revision {
        self.revision
    }

    pub fn get(&self, key: &str) -> Option<&KeyValue> {
        self.entries.get(key)
    }

    pub fn range(&self, prefix: &str) -> Vec<KeyValue> {
        self.entries.values().filter(|e| e.key.starts_with(prefix)).cloned().collect()
    }

    /// The changes since `from`, that revision included.
    pub fn history(&self, prefix: &str, from: Revision) -> Vec<Batch> {
        let watched = |batch: &Batch| {
            let events: Vec<Event> =
                batch.events.iter().filter(|e| e.key().starts_with(prefix)).cloned().collect();
            (!events.is_empty()).then_some(Batch { revision: batch.revision, events })
        };
        self.history.iter().filter(|b| b.revision >= from).filter_map(watched).collect()
    }

    pub fn txn(&mut self, txn: &Txn) -> Result<TxnAnswer, Error> {
        validate(txn)?;
        let succeeded = txn.compare.iter().all(|c| c.holds(self.entries.get(&c.key)));
        let branch = if succeeded { &txn.then } else { &txn.otherwise };
        for op in branch {
            if let Op::Put { lease: Some(lease), .. } = op
                && !self.leases.contains_key(lease)
            {
                return Err(Error::LeaseNotFound(*lease));
            }
        }
        self.change(branch);
        Ok(TxnAnswer { succeeded, revision: self.revision })
    }

    fn change(&mut self, ops: &[Op]) {
        let revision = self.revision + 1;
        let mut events = Vec::new();
        for op in ops {
            match op {
                Op::Put { key, value, lease } => {
                    let before = self.entries.get(key);
                    let entry = KeyValue {
                        key: key.clone(),
                        value: value.clone(),
                        created: before.map_or(revision, |b| b.created),
                        modified: revision,
                        version: before.map_or(0, |b| b.version) + 1,
                        lease: *lease,
                    };
                    self.entries.insert(key.clone(), entry.clone());
                    events.push(Event::Put(entry));
                }
                Op::Delete { key } => {
                    if self.entries.remove(key).is_some() {
                        events.push(Event::Deleted { key: key.clone() });
                    }
                }
            }
        }
        if !events.is_empty() {
            events.sort_by(|a, b| a.key().cmp(b.key()));
            self.revision = revision;
            self.history.push(Batch { revision, events });
        }
    }

    pub fn grant(&mut self, ttl_ms: u64, now_ms: u64) -> LeaseId {
        self.lease_last += 1;
        let id = LeaseId(self.lease_last);
        self.leases.insert(id, (ttl_ms, now_ms + ttl_ms));
        id
    }

    pub fn keep_alive(&mut self, lease: LeaseId, now_ms: u64) -> Result<(), Error> {
        let (ttl, ends) = self.leases.get_mut(&lease).ok_or(Error::LeaseNotFound(lease))?;
        *ends = now_ms + *ttl;
        Ok(())
    }

    pub fn revoke(&mut self, lease: LeaseId) -> Result<(), Error> {
        self.leases.remove(&lease).ok_or(Error::LeaseNotFound(lease))?;
        let held = self.entries.values().filter(|e| e.lease == Some(lease));
        let ops: Vec<Op> = held.map(|e| Op::delete(e.key.clone())).collect();
        self.change(&ops);
        Ok(())
    }

    /// Ends the leases whose time is over.
    pub fn expire(&mut self, now_ms: u64) {
        let over = self.leases.iter().filter(|(_, (_, ends))| *ends <= now_ms).map(|(id, _)| *id);
        for lease in over.collect::<Vec<_>>() {
            let _ended = self.revoke(lease);
        }
    }
}
