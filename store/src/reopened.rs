//! A database that is opened anew when an operation of it has failed. redb takes
//! nothing more after one (`PreviousIo`), since it knows no more what is on disk;
//! whoever opens it anew does.
//!
//! What may never be true: a transaction of which it is said that it changed
//! nothing, and which stands there afterwards.

use std::path::{Path, PathBuf};
use std::sync::{PoisonError, RwLock};

use redb::Database;

use crate::{Error, Revision};

pub(crate) struct Reopened {
    path: PathBuf,
    slot: RwLock<Slot>,
    /// Reads a database's revision.
    revision: fn(&Database) -> Result<Revision, redb::Error>,
}

struct Slot {
    /// Missing where it could not be opened: then each that comes tries again.
    database: Option<Database>,
    /// How often it was opened.
    opened: u64,
    /// Where it stood then.
    found: Revision,
}

/// Why something was not done, and what is known of it.
pub(crate) struct Failed {
    pub error: Error,
    /// What the database that was opened in place of the failed one holds.
    pub found: Option<Revision>,
}

impl Reopened {
    pub fn new(
        path: &Path,
        database: Database,
        revision: fn(&Database) -> Result<Revision, redb::Error>,
    ) -> Result<Self, redb::Error> {
        let found = revision(&database)?;
        let slot = RwLock::new(Slot { database: Some(database), opened: 1, found });
        Ok(Self { path: path.to_owned(), slot, revision })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs it on the database, and opens that anew where it has failed.
    pub fn on<T>(&self, deed: impl FnOnce(&Database) -> Result<T, Error>) -> Result<T, Failed> {
        let known = |error| Failed { error, found: None };
        self.open().map_err(known)?;
        let slot = self.slot.read().unwrap_or_else(PoisonError::into_inner);
        let Some(database) = &slot.database else {
            // Another's failure, between the two lines above.
            return Err(known(Error::Unavailable(self.gone())));
        };
        let (done, opened) = (deed(database), slot.opened);
        drop(slot);
        done.map_err(|error| match error {
            Error::NotWritten(_) => Failed { found: self.renew(opened), error },
            error => known(error),
        })
    }

    fn gone(&self) -> String {
        format!("{}: it is being opened anew", self.path.display())
    }

    fn open(&self) -> Result<(), Error> {
        if self.slot.read().unwrap_or_else(PoisonError::into_inner).database.is_some() {
            return Ok(());
        }
        let mut slot = self.slot.write().unwrap_or_else(PoisonError::into_inner);
        if slot.database.is_none() {
            let opened = Database::create(&self.path).map_err(redb::Error::from);
            let opened = opened.and_then(|database| Ok(((self.revision)(&database)?, database)));
            let (found, database) = opened.map_err(|error| {
                let path = self.path.display();
                Error::Unavailable(format!("{path}: cannot be opened anew: {error}"))
            })?;
            *slot = Slot { database: Some(database), opened: slot.opened + 1, found };
        }
        Ok(())
    }

    /// Opens it in place of the one that failed; what that had brought to the disk,
    /// where nobody can have written since.
    fn renew(&self, failed: u64) -> Option<Revision> {
        {
            let mut slot = self.slot.write().unwrap_or_else(PoisonError::into_inner);
            if slot.opened == failed {
                // Only one may hold the file.
                slot.database = None;
            }
        }
        if let Err(error) = self.open() {
            tracing::error!(%error, "the store is not there for now");
            return None;
        }
        let slot = self.slot.read().unwrap_or_else(PoisonError::into_inner);
        (slot.opened == failed + 1).then_some(slot.found)
    }
}
