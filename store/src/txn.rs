//! Transactions: what they may say, and the limits that every implementation keeps.

use std::collections::BTreeSet;

use crate::{Error, KeyValue, LeaseId, Revision};

/// Comparisons, and operations of either branch; etcd's `--max-txn-ops`.
const OPS_MAX: usize = 128;

/// Below etcd's `--max-request-bytes` (1.5 MiB), with room for its framing.
const TXN_BYTES_MAX: usize = 1024 * 1024;

/// A value that fills more than this belongs in a file.
pub const VALUE_BYTES_MAX: usize = 256 * 1024;

/// A key is a path of ids and names, none of them long.
const KEY_BYTES_MAX: usize = 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// 0 where the key is missing.
    Version(u64),
    /// 0 where the key is missing.
    Created(Revision),
    /// 0 where the key is missing.
    Modified(Revision),
    /// Never holds where the key is missing.
    Value(Vec<u8>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Relation {
    Equal,
    NotEqual,
    Greater,
    Less,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Compare {
    pub key: String,
    pub target: Target,
    pub relation: Relation,
}

impl Compare {
    /// The key is as it was at that revision; 0: it is missing.
    pub fn unchanged(key: impl Into<String>, modified: Revision) -> Self {
        Self { key: key.into(), target: Target::Modified(modified), relation: Relation::Equal }
    }

    pub(crate) fn holds(&self, current: Option<&KeyValue>) -> bool {
        let ordering = match &self.target {
            Target::Version(wanted) => current.map_or(0, |c| c.version).cmp(wanted),
            Target::Created(wanted) => current.map_or(0, |c| c.created).cmp(wanted),
            Target::Modified(wanted) => current.map_or(0, |c| c.modified).cmp(wanted),
            Target::Value(wanted) => match current {
                Some(current) => current.value.as_slice().cmp(wanted.as_slice()),
                None => return false,
            },
        };
        match self.relation {
            Relation::Equal => ordering.is_eq(),
            Relation::NotEqual => ordering.is_ne(),
            Relation::Greater => ordering.is_gt(),
            Relation::Less => ordering.is_lt(),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Op {
    Put {
        key: String,
        value: Vec<u8>,
        lease: Option<LeaseId>,
    },
    /// Of a missing key: nothing happens, and no revision is used.
    Delete {
        key: String,
    },
}

impl Op {
    pub fn put(key: impl Into<String>, value: impl Into<Vec<u8>>) -> Self {
        Self::Put { key: key.into(), value: value.into(), lease: None }
    }

    pub fn delete(key: impl Into<String>) -> Self {
        Self::Delete { key: key.into() }
    }

    pub fn key(&self) -> &str {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }

    fn size(&self) -> usize {
        match self {
            Self::Put { key, value, .. } => key.len() + value.len(),
            Self::Delete { key } => key.len(),
        }
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Txn {
    pub compare: Vec<Compare>,
    pub then: Vec<Op>,
    pub otherwise: Vec<Op>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TxnAnswer {
    /// Whether every comparison held.
    pub succeeded: bool,
    /// The store's revision after the transaction.
    pub revision: Revision,
}

/// The limits are etcd's, kept by every implementation, so that what serves one
/// host serves many.
pub fn validate(txn: &Txn) -> Result<(), Error> {
    let refuse = |what: String| Err(Error::Refused(what));
    for (name, length) in [
        ("comparisons", txn.compare.len()),
        ("operations", txn.then.len()),
        ("operations otherwise", txn.otherwise.len()),
    ] {
        if length > OPS_MAX {
            return refuse(format!("{length} {name}, at most {OPS_MAX} are possible"));
        }
    }
    let keys = txn.compare.iter().map(|c| c.key.as_str());
    for key in keys.chain(txn.then.iter().chain(&txn.otherwise).map(Op::key)) {
        if key.is_empty() || key.len() > KEY_BYTES_MAX {
            return refuse(format!(
                "a key of {} bytes, 1 to {KEY_BYTES_MAX} are possible",
                key.len()
            ));
        }
    }
    for branch in [&txn.then, &txn.otherwise] {
        let mut seen = BTreeSet::new();
        for op in branch {
            if !seen.insert(op.key()) {
                return refuse(format!("key {} stands twice in one branch", op.key()));
            }
            if let Op::Put { key, value, .. } = op
                && value.len() > VALUE_BYTES_MAX
            {
                let length = value.len();
                return refuse(format!(
                    "key {key}: a value of {length} bytes, {VALUE_BYTES_MAX} fit"
                ));
            }
        }
    }
    let size: usize = txn.then.iter().chain(&txn.otherwise).map(Op::size).sum();
    if size > TXN_BYTES_MAX {
        return refuse(format!("{size} bytes, at most {TXN_BYTES_MAX} are possible"));
    }
    Ok(())
}

/// The first key after all that begin with `prefix`; `None`: there is none.
pub fn prefix_end(prefix: &str) -> Option<Vec<u8>> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}
