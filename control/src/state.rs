//! Everything in the store, in memory, indexed: what Describe answers from.
//!
//! Fed by the store's watch, batch by batch in the order of revisions, by one
//! task. Nobody else may change it: an answer never shows what is not durable.

use std::collections::{BTreeMap, HashMap};

use model::{InstanceId, VolumeId};
use store::{Batch, Event, Revision};

use crate::record::{
    AccessKey, Address, Group, Host, Image, Instance, KeyPair, Meta, Name, ObservedInstance,
    ObservedVolume, Record, Subnet, Token, Volume, Vpc,
};

#[derive(Debug, thiserror::Error)]
#[error("record {key}: cannot be read: {cause}")]
pub struct UnreadableRecord {
    pub key: String,
    pub cause: serde_json::Error,
}

#[derive(Debug, Clone)]
pub struct Table<T> {
    rows: BTreeMap<String, (Revision, T)>,
}

impl<T> Default for Table<T> {
    fn default() -> Self {
        Self { rows: BTreeMap::new() }
    }
}

impl<T> Table<T> {
    pub fn get(&self, key: impl ToString) -> Option<&T> {
        self.rows.get(&key.to_string()).map(|(_, row)| row)
    }

    /// In the order of their keys.
    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.rows.values().map(|(_, row)| row)
    }

    /// When the row last changed; 0: it is missing.
    pub fn revision(&self, key: &str) -> Revision {
        self.rows.get(key).map_or(0, |(revision, _)| *revision)
    }

    pub fn revision_of(&self, row: &T) -> Revision
    where
        T: Record,
    {
        self.revision(&row.key())
    }

    pub fn len(&self) -> usize {
        self.rows.len()
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }
}

/// Which table holds a record.
pub trait Kept: Record {
    fn table(state: &State) -> &Table<Self>;
}

macro_rules! state {
    ($($field:ident: $kind:ident,)*) => {
        #[derive(Debug, Clone, Default)]
        pub struct State {
            /// The last revision that was applied.
            pub revision: Revision,
            /// The last that may have changed a host's desired state.
            pub desired_revision: Revision,
            $(pub $field: Table<$kind>,)*
            attached: HashMap<VolumeId, InstanceId>,
        }

        $(impl Kept for $kind {
            fn table(state: &State) -> &Table<Self> {
                &state.$field
            }
        })*

        impl State {
            fn put(&mut self, kind: &str, key: &str, revision: Revision, value: &[u8]) -> Result<bool, serde_json::Error> {
                match kind {
                    $($kind::KIND => {
                        let row: $kind = serde_json::from_slice(value)?;
                        self.$field.rows.insert(key.to_owned(), (revision, row));
                        Ok($kind::DESIRED)
                    })*
                    _ => Ok(false),
                }
            }

            fn remove(&mut self, kind: &str, key: &str) -> bool {
                match kind {
                    $($kind::KIND => {
                        self.$field.rows.remove(key);
                        $kind::DESIRED
                    })*
                    _ => false,
                }
            }
        }
    };
}

state! {
    instances: Instance,
    observed_instances: ObservedInstance,
    volumes: Volume,
    observed_volumes: ObservedVolume,
    images: Image,
    key_pairs: KeyPair,
    groups: Group,
    addresses: Address,
    vpcs: Vpc,
    subnets: Subnet,
    hosts: Host,
    access_keys: AccessKey,
    tokens: Token,
    names: Name,
    meta: Meta,
}

impl State {
    /// Applies one revision. `prefix` is the region's, with its slash.
    pub fn apply(&mut self, prefix: &str, batch: &Batch) -> Result<(), UnreadableRecord> {
        let mut desired = false;
        for event in &batch.events {
            let Some((kind, key)) =
                event.key().strip_prefix(prefix).and_then(|rest| rest.split_once('/'))
            else {
                continue;
            };
            if kind == Instance::KIND {
                self.forget_attachments(key);
            }
            desired |= match event {
                Event::Put(entry) => self
                    .put(kind, key, entry.modified, &entry.value)
                    .map_err(|cause| UnreadableRecord { key: entry.key.clone(), cause })?,
                Event::Deleted { .. } => self.remove(kind, key),
            };
            if kind == Instance::KIND {
                self.learn_attachments(key);
            }
        }
        self.revision = batch.revision;
        if desired {
            self.desired_revision = batch.revision;
        }
        Ok(())
    }

    fn forget_attachments(&mut self, key: &str) {
        let Some(instance) = self.instances.get(key) else { return };
        let id = instance.id;
        for volume in instance.attachments.iter().map(|a| a.volume).collect::<Vec<_>>() {
            if self.attached.get(&volume) == Some(&id) {
                self.attached.remove(&volume);
            }
        }
    }

    fn learn_attachments(&mut self, key: &str) {
        let Some(instance) = self.instances.get(key) else { return };
        let id = instance.id;
        for volume in instance.attachments.iter().map(|a| a.volume).collect::<Vec<_>>() {
            self.attached.insert(volume, id);
        }
    }

    /// The instance that a volume is attached to.
    pub fn holder(&self, volume: VolumeId) -> Option<&Instance> {
        self.attached.get(&volume).and_then(|id| self.instances.get(id))
    }
}
