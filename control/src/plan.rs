//! One transaction of desired state, as a core decided it: records to put and to
//! delete, each only where it is still as the core saw it.

use std::collections::BTreeMap;

use store::{Compare, Op, Revision, Txn};

use crate::state::{Kept, State};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    changes: BTreeMap<String, Change>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Change {
    seen: Revision,
    /// `None`: only looked at.
    op: Option<Vec<u8>>,
    delete: bool,
}

impl Plan {
    pub fn is_empty(&self) -> bool {
        self.changes.values().all(|c| c.op.is_none() && !c.delete)
    }

    /// How many records it touches.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// The record as this plan leaves it, or as it is.
    pub fn current<T: Kept>(&self, state: &State, key: &str) -> Option<T> {
        let planned = self.changes.get(&format!("{}/{key}", T::KIND));
        match planned.and_then(|c| c.op.as_ref()) {
            Some(value) => serde_json::from_slice(value).ok(),
            None => T::table(state).get(key).cloned(),
        }
    }

    /// A later put of the same record takes the place of the earlier.
    pub fn put<T: Kept>(&mut self, state: &State, record: &T) {
        let key = record.key();
        let path = format!("{}/{key}", T::KIND);
        if !self.changes.contains_key(&path) && T::table(state).get(&key) == Some(record) {
            return;
        }
        let seen = T::table(state).revision(&key);
        // A record is plain data with text keys: it always has a JSON form.
        let value = serde_json::to_vec(record)
            .unwrap_or_else(|e| panic!("record {path} has no JSON form: {e}"));
        self.changes.insert(path, Change { seen, op: Some(value), delete: false });
    }

    pub fn delete<T: Kept>(&mut self, state: &State, key: impl ToString) {
        let key = key.to_string();
        let seen = T::table(state).revision(&key);
        let path = format!("{}/{key}", T::KIND);
        if seen == 0 {
            self.changes.remove(&path);
        } else {
            self.changes.insert(path, Change { seen, op: None, delete: true });
        }
    }

    /// The plan holds only while that record stays as it is.
    pub fn depends<T: Kept>(&mut self, state: &State, key: impl ToString) {
        let key = key.to_string();
        let seen = T::table(state).revision(&key);
        self.changes.entry(format!("{}/{key}", T::KIND)).or_insert(Change {
            seen,
            op: None,
            delete: false,
        });
    }

    pub fn into_txn(self, prefix: &str) -> Txn {
        let mut txn = Txn::default();
        for (path, change) in self.changes {
            let key = format!("{prefix}{path}");
            txn.compare.push(Compare::unchanged(key.clone(), change.seen));
            match (change.op, change.delete) {
                (Some(value), _) => txn.then.push(Op::put(key, value)),
                (None, true) => txn.then.push(Op::delete(key)),
                (None, false) => {}
            }
        }
        txn
    }
}
