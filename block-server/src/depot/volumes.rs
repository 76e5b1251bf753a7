//! How volumes come to be and go.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use model::VolumeId;
use rpc::Error;
use rpc::block::NewVolume;
use tokio::sync::oneshot;
use tokio::task::block_in_place;

use super::{Depot, Filling, State, check, of_catalogue};
use crate::catalogue::{self, Stage};
use crate::fill;

impl Depot {
    /// Makes a volume; one with a source fills in the background.
    pub async fn put_volume(
        self: &Arc<Self>,
        id: VolumeId,
        new: NewVolume,
    ) -> Result<rpc::block::Volume, Error> {
        let mut state = self.state.lock().await;
        if let Some(volume) = state.catalogue.volumes().get(&id) {
            if volume.stage == Stage::Deleting {
                return Err(Error::unavailable(format!("volume {id}: it is being deleted")));
            }
            if (volume.size_bytes, &volume.source) != (new.size_bytes, &new.source) {
                return Err(Error::conflict(format!(
                    "volume {id}: create: it exists with {} bytes and another beginning",
                    volume.size_bytes
                )));
            }
            let volume = volume.clone();
            if volume.stage == Stage::Filling && !state.filling.contains_key(&id) {
                // Its making ended in a record that could not be written.
                self.start_filling(&mut state, id, &volume);
            }
            return Ok(self.describe(id, &volume));
        }
        check::check_new(id, &new)?;
        let file = self.file_of(id);
        if file.exists() {
            return Err(Error::conflict(format!(
                "volume {id}: create: {} exists and is none of ours",
                file.display()
            )));
        }
        let volume = catalogue::Volume {
            size_bytes: new.size_bytes,
            source: new.source,
            stage: Stage::Filling,
            generation: 0,
            quality: rpc::block::Quality::default(),
            held_until_ms: None,
        };
        block_in_place(|| state.catalogue.put_volume(id, volume.clone())).map_err(of_catalogue)?;
        if volume.source.is_some() {
            self.start_filling(&mut state, id, &volume);
            return Ok(self.describe(id, &volume));
        }
        let made =
            block_in_place(|| fill::fill(&file, volume.size_bytes, None, &AtomicBool::new(false)));
        if let Err(error) = made {
            block_in_place(|| state.catalogue.remove_volume(id)).map_err(of_catalogue)?;
            return Err(Error::unavailable(format!("volume {id}: create: {error}")));
        }
        let ready = catalogue::Volume { stage: Stage::Ready, ..volume };
        block_in_place(|| state.catalogue.put_volume(id, ready.clone())).map_err(of_catalogue)?;
        Ok(self.describe(id, &ready))
    }

    pub(super) fn start_filling(
        self: &Arc<Self>,
        state: &mut State,
        id: VolumeId,
        volume: &catalogue::Volume,
    ) {
        let cancelled = Arc::new(AtomicBool::new(false));
        let (tell, ended) = oneshot::channel();
        state.filling.insert(id, Filling { cancelled: Arc::clone(&cancelled), ended });
        let depot = Arc::clone(self);
        let volume = volume.clone();
        tokio::spawn(async move {
            let file = depot.file_of(id);
            let (size, source) = (volume.size_bytes, volume.source.clone());
            let copied = tokio::task::spawn_blocking(move || {
                fill::fill(&file, size, source.as_deref(), &cancelled)
            })
            .await;
            let _ = tell.send(());
            let stage = match copied {
                Ok(Ok(())) => Stage::Ready,
                Ok(Err(fill::Error::Cancelled)) => return depot.filling_ended(id, None).await,
                Ok(Err(error)) => Stage::Failed(error.to_string()),
                Err(panic) => Stage::Failed(format!("the copy broke off: {panic}")),
            };
            depot.filling_ended(id, Some(catalogue::Volume { stage, ..volume })).await;
        });
    }

    async fn filling_ended(self: &Arc<Self>, id: VolumeId, volume: Option<catalogue::Volume>) {
        let mut state = self.state.lock().await;
        state.filling.remove(&id);
        let stage = state.catalogue.volumes().get(&id).map(|v| v.stage.clone());
        let result = match (stage, volume) {
            (Some(Stage::Deleting), _) => self.finish_deletion(&mut state, id),
            (Some(Stage::Filling), Some(volume)) => {
                if let Stage::Failed(reason) = &volume.stage {
                    tracing::error!("volume {id}: fill: {reason}");
                }
                block_in_place(|| state.catalogue.put_volume(id, volume)).map_err(of_catalogue)
            }
            (Some(Stage::Filling), None) => {
                // Broken off for a successor that came to nothing.
                if let Some(volume) = state.catalogue.volumes().get(&id).cloned() {
                    self.start_filling(&mut state, id, &volume);
                }
                Ok(())
            }
            _ => Ok(()),
        };
        if let Err(error) = result {
            tracing::error!("volume {id}: {error}");
        }
    }

    /// Refused while exported. A missing volume is no error.
    pub async fn delete_volume(&self, id: VolumeId) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        let Some(volume) = state.catalogue.volumes().get(&id).cloned() else { return Ok(()) };
        if let Some((name, _)) = state.catalogue.exports().iter().find(|(_, e)| e.volume == id) {
            return Err(Error::conflict(format!("volume {id}: delete: it is exported as {name}")));
        }
        let deleting = catalogue::Volume { stage: Stage::Deleting, ..volume };
        block_in_place(|| state.catalogue.put_volume(id, deleting)).map_err(of_catalogue)?;
        if let Some(filling) = state.filling.get(&id) {
            // The copy removes what it made, and then the record.
            filling.cancelled.store(true, Ordering::Relaxed);
            return Ok(());
        }
        self.finish_deletion(&mut state, id)
    }

    pub(super) fn finish_deletion(&self, state: &mut State, id: VolumeId) -> Result<(), Error> {
        block_in_place(|| {
            let file = self.file_of(id);
            for path in [fill::pending(&file), file] {
                match std::fs::remove_file(&path) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Error::unavailable(format!(
                            "volume {id}: remove {}: {e}",
                            path.display()
                        )));
                    }
                    _ => {}
                }
            }
            state.catalogue.remove_volume(id).map_err(of_catalogue)
        })
    }
}
