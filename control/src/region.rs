//! The shell around the core: one store, the state that its watch feeds, and one
//! writer at a time. It decides nothing; it makes plans durable.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::SeedableRng;
use store::{Batch, Event, Revision, Store};
use tokio::sync::watch;

use crate::api::ApiError;
use crate::core::{Context, Draft};
use crate::settings::Settings;
use crate::state::{State, UnreadableRecord};

/// How long a writer waits for the state to show what it wrote. The watch is in
/// this process or a network's round trip away: longer means that it is ill.
const APPLY_TIMEOUT: Duration = Duration::from_secs(10);

/// How often a plan is made anew when another process wrote in between.
const TRIES_MAX: usize = 8;

/// To whoever asked; the log names the file and the cause.
const NOT_WRITTEN: &str = "The request could not be recorded, and nothing was changed: the disk \
    of the region's state is full or fails. Try again when the operator has made room.";

#[derive(Debug, thiserror::Error)]
pub enum RegionError {
    #[error(transparent)]
    Store(#[from] store::Error),
    #[error(transparent)]
    Record(#[from] UnreadableRecord),
    #[error("no randomness from the kernel: {0}")]
    Entropy(getrandom::Error),
}

/// When a host last reported, and on which desired revision.
#[derive(Debug, Clone, Copy)]
pub struct LastReport {
    pub revision: Revision,
    pub at_ms: u64,
}

pub struct Region {
    pub settings: Settings,
    store: Arc<dyn Store>,
    prefix: String,
    state: RwLock<State>,
    applied: watch::Sender<Revision>,
    writer: tokio::sync::Mutex<()>,
    reports: Mutex<HashMap<String, LastReport>>,
    broken: watch::Sender<Option<store::Error>>,
    clock: fn() -> u64,
}

impl Region {
    /// Reads the whole state. [`Region::follow`] must run from then on.
    pub async fn open(
        store: Arc<dyn Store>,
        settings: Settings,
        clock: fn() -> u64,
    ) -> Result<Self, RegionError> {
        let prefix = settings.prefix();
        let state = load(store.as_ref(), &prefix).await?;
        let (applied, _) = watch::channel(state.revision);
        Ok(Self {
            settings,
            store,
            prefix,
            state: RwLock::new(state),
            applied,
            writer: tokio::sync::Mutex::new(()),
            reports: Mutex::new(HashMap::new()),
            broken: watch::channel(None).0,
            clock,
        })
    }

    /// Applies the store's changes for as long as the daemon lives; returns only
    /// with the reason why it cannot go on.
    pub async fn follow(&self) -> RegionError {
        loop {
            match self.follow_once().await {
                RegionError::Store(store::Error::Compacted { from, oldest }) => {
                    tracing::warn!(from, oldest, "the watch fell behind: reading the state anew");
                }
                RegionError::Store(store::Error::Unavailable(cause)) => {
                    tracing::warn!(cause, "the watch broke: reading the state anew");
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                error => return error,
            }
            match load(self.store.as_ref(), &self.prefix).await {
                Ok(state) => {
                    let revision = state.revision;
                    *self.state.write().unwrap_or_else(PoisonError::into_inner) = state;
                    self.applied.send_replace(revision);
                }
                Err(RegionError::Store(store::Error::Unavailable(_))) => {}
                Err(error) => return error,
            }
        }
    }

    async fn follow_once(&self) -> RegionError {
        let from = self.read(|c| c.state.revision) + 1;
        let mut watch = match self.store.watch(&self.prefix, from).await {
            Ok(watch) => watch,
            Err(error) => return error.into(),
        };
        loop {
            let batch = match watch.next().await {
                Ok(batch) => batch,
                Err(error) => return error.into(),
            };
            let applied = {
                let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
                // After a reload a watch may tell again what is there already.
                if batch.revision <= state.revision {
                    continue;
                }
                state.apply(&self.prefix, &batch)
            };
            if let Err(error) = applied {
                return error.into();
            }
            self.applied.send_replace(batch.revision);
        }
    }

    pub fn now_ms(&self) -> u64 {
        (self.clock)()
    }

    pub fn store_name(&self) -> String {
        self.store.describe()
    }

    /// Returns when the store takes no more: the daemon must end then, and be
    /// started anew by its supervisor.
    pub async fn broken(&self) -> store::Error {
        let mut broken = self.broken.subscribe();
        loop {
            let reason = broken.borrow_and_update().clone();
            if let Some(reason) = reason {
                return reason;
            }
            // The sender is ours: it is there as long as we are.
            if broken.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }

    /// Looks at the state. Writers wait meanwhile: nothing slow may be done here.
    pub fn read<T>(&self, look: impl FnOnce(&Context<'_>) -> T) -> T {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        look(&Context { state: &state, settings: &self.settings, now_ms: self.now_ms() })
    }

    /// Decides on the state as it is, makes the decision durable, and returns
    /// when the state shows it. Decides anew where another process was faster.
    pub async fn write<T>(
        &self,
        mut decide: impl FnMut(&Context<'_>, &mut Draft) -> Result<T, ApiError>,
    ) -> Result<T, ApiError> {
        let _turn = self.writer.lock().await;
        for _ in 0..TRIES_MAX {
            let mut draft = Draft::new(entropy().map_err(|e| ApiError::internal(e.to_string()))?);
            let decided = self.read(|context| decide(context, &mut draft))?;
            if draft.plan.is_empty() {
                return Ok(decided);
            }
            let txn = draft.plan.into_txn(&self.prefix);
            let answer = self.store.txn(txn).await.map_err(|error| {
                tracing::error!(%error, "a transaction failed");
                match error {
                    store::Error::NotWritten(_) => ApiError::internal(NOT_WRITTEN),
                    error => {
                        if matches!(error, store::Error::Damaged(_)) {
                            self.broken.send_replace(Some(error));
                        }
                        ApiError::unavailable("The store does not answer; try again.")
                    }
                }
            })?;
            self.reached(answer.revision, answer.succeeded).await?;
            if answer.succeeded {
                return Ok(decided);
            }
        }
        Err(ApiError::unavailable("The state changes too fast; try again."))
    }

    /// Waits until the state shows that revision. A revision that changed only
    /// keys of others never shows: where nothing of ours was written, being late
    /// is no error, the next try finds out.
    async fn reached(&self, revision: Revision, ours: bool) -> Result<(), ApiError> {
        let mut applied = self.applied.subscribe();
        let wait = tokio::time::timeout(APPLY_TIMEOUT, applied.wait_for(|r| *r >= revision));
        let wait = if ours {
            wait.await.is_ok_and(|r| r.is_ok())
        } else {
            let _ = tokio::time::timeout(Duration::from_millis(50), wait).await;
            true
        };
        if wait { Ok(()) } else { Err(ApiError::unavailable("The state is behind; ask again.")) }
    }

    /// Waits until a host's desired state may have changed since `after`, or
    /// until the time is over.
    pub async fn await_desired(&self, after: Revision, patience: Duration) {
        let mut applied = self.applied.subscribe();
        let newer = applied.wait_for(|_| self.read(|c| c.state.desired_revision) > after);
        let _late = tokio::time::timeout(patience, newer).await;
    }

    pub fn note_report(&self, host: &str, revision: Revision) {
        let report = LastReport { revision, at_ms: self.now_ms() };
        let mut reports = self.reports.lock().unwrap_or_else(PoisonError::into_inner);
        reports.insert(host.to_owned(), report);
    }

    pub fn last_report(&self, host: &str) -> Option<LastReport> {
        self.reports.lock().unwrap_or_else(PoisonError::into_inner).get(host).copied()
    }

    pub async fn sweep_store(&self) {
        if let Err(error) = self.store.sweep().await {
            tracing::warn!(%error, "cannot end leases");
        }
    }
}

async fn load(store: &dyn Store, prefix: &str) -> Result<State, RegionError> {
    let range = store.range(prefix).await?;
    let mut state = State::default();
    let events = range.entries.into_iter().map(Event::Put).collect();
    state.apply(prefix, &Batch { revision: range.revision, events })?;
    Ok(state)
}

pub fn entropy() -> Result<ChaCha20Rng, RegionError> {
    let mut seed = [0; 32];
    getrandom::fill(&mut seed).map_err(RegionError::Entropy)?;
    Ok(ChaCha20Rng::from_seed(seed))
}
