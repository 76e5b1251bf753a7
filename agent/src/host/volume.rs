//! The volumes in this host's care: made once, deleted only when told.
//!
//! ```text
//!   wanted:  (unknown) ──▶ creating ──▶ available          not made yet, or filling
//!                 └──▶ error: it was made here and is gone, or the block server stopped it
//!   deleted: deleting ──▶ (gone)                            once no instance holds it
//! ```
//! What may never be true: that a volume which was made once, and is missing now,
//! is quietly made anew. An empty disk in place of data is worse than an error.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use model::{VolumeId, VolumeState};
use rpc::block::{self, NewSize, NewVolume, VolumeHealth};
use rpc::host::{ObservedVolume, Volume};
use rpc::{Client, Kind};

use crate::image::Store;
use crate::lifecycle::backoff;

/// How often a volume that is being filled is asked about.
const FILLING_PAUSE: Duration = Duration::from_millis(200);

/// How often one that is there is looked at again.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// Making a volume may copy an image.
const CALL_TIMEOUT: Duration = Duration::from_secs(120);

#[derive(Debug, Clone)]
pub enum Task {
    Ensure { volume: Volume, made: bool },
    Delete(VolumeId),
}

impl Task {
    pub const fn id(&self) -> VolumeId {
        match self {
            Self::Ensure { volume, .. } => volume.id,
            Self::Delete(id) => *id,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It is there, with this size.
    Ready(u64),
    Filling,
    /// It will not get better by itself.
    Failed(String),
    Deleted,
    /// Not now.
    Unavailable(String),
}

#[derive(Debug)]
struct Care {
    wish: Volume,
    state: VolumeState,
    gone: bool,
    size_bytes: u64,
    reason: Option<String>,
    busy: bool,
    tries: u32,
    retry_at: Duration,
}

#[derive(Debug)]
pub struct Volumes {
    all: BTreeMap<VolumeId, Care>,
    made: BTreeSet<VolumeId>,
}

impl Volumes {
    pub fn new(made: BTreeSet<VolumeId>) -> Self {
        Self { all: BTreeMap::new(), made }
    }

    /// Those that were made here, ever; to be remembered.
    pub const fn made(&self) -> &BTreeSet<VolumeId> {
        &self.made
    }

    pub fn wish(&mut self, wanted: &[Volume]) {
        for wish in wanted {
            let care = self.all.entry(wish.id).or_insert_with(|| Care {
                wish: wish.clone(),
                state: VolumeState::Creating,
                gone: false,
                size_bytes: 0,
                reason: None,
                busy: false,
                tries: 0,
                retry_at: Duration::ZERO,
            });
            if care.wish != *wish {
                care.wish = wish.clone();
                care.retry_at = Duration::ZERO;
            }
        }
        // One that is missing in the wish is left alone, and not spoken of.
        self.all.retain(|id, _| wanted.iter().any(|w| w.id == *id));
    }

    /// An image has come: what failed for want of one is tried at once.
    pub fn hurry(&mut self) {
        for care in self.all.values_mut().filter(|c| c.state == VolumeState::Error) {
            care.retry_at = Duration::ZERO;
        }
    }

    /// What to do now. `held` are those that an instance still has.
    pub fn next(&mut self, held: &BTreeSet<VolumeId>, now: Duration) -> Vec<Task> {
        let mut tasks = Vec::new();
        for (id, care) in &mut self.all {
            if care.busy || care.gone || now < care.retry_at {
                continue;
            }
            let task = if !care.wish.deleted {
                Task::Ensure { volume: care.wish.clone(), made: self.made.contains(id) }
            } else {
                care.state = VolumeState::Deleting;
                if held.contains(id) {
                    continue;
                }
                Task::Delete(*id)
            };
            care.busy = true;
            tasks.push(task);
        }
        tasks
    }

    /// Takes what came of a task; true when `made` has changed.
    pub fn end(&mut self, id: VolumeId, outcome: Outcome, now: Duration) -> bool {
        let Some(care) = self.all.get_mut(&id) else { return false };
        care.busy = false;
        match outcome {
            Outcome::Ready(_) | Outcome::Filling => {
                let ready = matches!(outcome, Outcome::Ready(_));
                if let Outcome::Ready(size) = outcome {
                    care.size_bytes = size;
                }
                care.state = if ready { VolumeState::Available } else { VolumeState::Creating };
                care.retry_at = now + if ready { LOOK_AGAIN } else { FILLING_PAUSE };
                care.reason = None;
                care.tries = 0;
                let is_behind = ready && care.size_bytes < care.wish.size_bytes;
                if care.wish.deleted || is_behind {
                    care.retry_at = now;
                }
                ready && self.made.insert(id)
            }
            Outcome::Failed(reason) => {
                if care.reason.as_ref() != Some(&reason) {
                    tracing::error!(volume = %id, %reason, "volume failed");
                }
                care.state = VolumeState::Error;
                care.reason = Some(reason);
                care.retry_at = now + if care.wish.deleted { Duration::ZERO } else { LOOK_AGAIN };
                false
            }
            Outcome::Deleted => {
                care.gone = true;
                self.made.remove(&id)
            }
            Outcome::Unavailable(reason) => {
                care.tries += 1;
                care.retry_at = now + backoff(care.tries);
                care.reason = Some(reason);
                false
            }
        }
    }

    pub fn observed(&self) -> Vec<ObservedVolume> {
        let present = self.all.iter().filter(|(_, care)| !care.gone);
        present
            .map(|(id, care)| ObservedVolume {
                id: *id,
                state: care.state,
                reason: care.reason.clone(),
                size_bytes: care.size_bytes,
            })
            .collect()
    }
}

pub async fn perform(task: Task, block: &Client, images: &Store) -> Outcome {
    let block = block.with_timeout(CALL_TIMEOUT);
    match task {
        Task::Delete(id) => {
            // Nobody holds it: an export left by an earlier life goes with it.
            let unexported = block.delete_export(&id.to_string()).await;
            match unexported.and(block.delete_volume(id).await) {
                Ok(()) => Outcome::Deleted,
                Err(e) => Outcome::Unavailable(e.message),
            }
        }
        Task::Ensure { volume, made } => ensure(&volume, made, &block, images).await,
    }
}

async fn ensure(volume: &Volume, made: bool, block: &Client, images: &Store) -> Outcome {
    if made {
        let all = match block.volumes().await {
            Ok(all) => all,
            Err(e) => return Outcome::Unavailable(e.message),
        };
        return match all.into_iter().find(|v| v.id == volume.id) {
            Some(found) => adjust(volume, found, block).await,
            None => Outcome::Failed("the block server does not have it any more; it is not made anew, because its data would be gone".into()),
        };
    }
    let source = match &volume.image {
        None => None,
        Some(name) => match images.manifest(name).and_then(|_| images.root_of(name)) {
            Ok(path) => Some(path),
            Err(e) => return Outcome::Failed(e.to_string()),
        },
    };
    match block.put_volume(volume.id, &NewVolume { size_bytes: volume.size_bytes, source }).await {
        Ok(found) => adjust(volume, found, block).await,
        Err(e) if e.kind == Kind::Unavailable => Outcome::Unavailable(e.message),
        Err(e) => Outcome::Failed(e.message),
    }
}

/// Makes a volume that is there as fast and as large as it should be. It never shrinks.
async fn adjust(wish: &Volume, found: block::Volume, block: &Client) -> Outcome {
    if found.state == VolumeHealth::Ready && found.size_bytes < wish.size_bytes {
        let size = NewSize { size_bytes: wish.size_bytes, reconnect: true };
        if let Err(e) = block.resize_volume(wish.id, size).await {
            return Outcome::Unavailable(e.message);
        }
        tracing::info!(volume = %wish.id, from = found.size_bytes, to = wish.size_bytes, "resized");
    }
    if found.quality != wish.quality
        && let Err(e) = block.set_quality(wish.id, &wish.quality).await
    {
        if e.kind == Kind::Unavailable {
            return Outcome::Unavailable(e.message);
        }
        // Slower or faster than it should be is better than not at all.
        tracing::warn!(volume = %wish.id, error = %e, "its limits cannot be set");
    }
    health(found.state, found.size_bytes.max(wish.size_bytes))
}

fn health(state: VolumeHealth, size: u64) -> Outcome {
    match state {
        VolumeHealth::Ready => Outcome::Ready(size),
        VolumeHealth::Filling => Outcome::Filling,
        VolumeHealth::Failed(reason) => Outcome::Failed(reason),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume(deleted: bool) -> Volume {
        Volume {
            id: VolumeId::from_random(1),
            size_bytes: 4096,
            image: None,
            quality: block::Quality::default(),
            deleted,
        }
    }

    #[test]
    fn a_volume_is_deleted_only_when_told_and_no_instance_holds_it() {
        let id = volume(true).id;
        let mut volumes = Volumes::new(BTreeSet::from([id]));
        volumes.wish(&[volume(true)]);
        assert!(volumes.next(&BTreeSet::from([id]), Duration::ZERO).is_empty());
        assert_eq!(volumes.observed()[0].state, VolumeState::Deleting);
        assert!(matches!(volumes.next(&BTreeSet::new(), Duration::ZERO)[..], [Task::Delete(_)]));
        assert!(volumes.end(id, Outcome::Deleted, Duration::ZERO));
        assert_eq!(volumes.observed(), []);
        assert!(volumes.next(&BTreeSet::new(), Duration::MAX).is_empty());
        // Missing from the wish is not deleted.
        let mut volumes = Volumes::new(BTreeSet::from([id]));
        volumes.wish(&[]);
        assert!(volumes.next(&BTreeSet::new(), Duration::MAX).is_empty());
    }

    #[tokio::test]
    async fn a_volume_that_was_made_and_is_gone_is_an_error_not_an_empty_disk() {
        let dir = tempfile::tempdir().unwrap();
        let router = axum::Router::new().route(
            "/v1/volumes",
            axum::routing::get(|| async { axum::Json(Vec::<rpc::block::Volume>::new()) }),
        );
        let path = dir.path().join("b.sock");
        let listener = rpc::server::ControlListener::bind(&path).unwrap();
        let make = router.into_make_service_with_connect_info::<rpc::server::Peer>();
        let server = tokio::spawn(async move { axum::serve(listener, make).await });
        let images = Store::open(dir.path().join("images")).unwrap();
        let task = Task::Ensure { volume: volume(false), made: true };
        let outcome = perform(task, &Client::new(&path), &images).await;
        assert!(matches!(outcome, Outcome::Failed(_)), "{outcome:?}");
        server.abort();
    }
}
