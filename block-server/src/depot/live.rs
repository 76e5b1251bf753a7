//! What may be changed while a volume is served: how fast and how large it is,
//! whether its changes wait, who is connected.

use std::fs::OpenOptions;
use std::time::Duration;

use model::VolumeId;
use rpc::Error;
use rpc::block::{Connection, NewSize, Quality, Quiesce, VolumeStatistics};
use tokio::task::block_in_place;

use super::{Depot, State, check, of_catalogue, of_worker};
use crate::catalogue::{self, Stage};
use crate::worker::Access;

/// The longest time that changes may be made to wait: clients give up after some minutes.
const QUIESCE_MS_MAX: u64 = 60_000;

impl Depot {
    /// Durable, and in force at once, for what waits too.
    pub async fn set_quality(
        &self,
        id: VolumeId,
        quality: Quality,
    ) -> Result<rpc::block::Volume, Error> {
        let mut state = self.state.lock().await;
        let volume = living(&state, id, "set its quality")?;
        let limits = check::limits(id, &quality, volume.size_bytes)?;
        let volume = catalogue::Volume { quality, ..volume };
        block_in_place(|| state.catalogue.put_volume(id, volume.clone())).map_err(of_catalogue)?;
        if let Some(open) = state.open_volumes.get(&id) {
            self.workers[open.worker].set_limits(open.index, limits).map_err(of_worker)?;
        }
        Ok(self.describe(id, &volume))
    }

    /// The file grows first, then the record, then what clients are told: a crash
    /// in between leaves a file that is larger than its volume, which is no harm.
    pub async fn resize(&self, id: VolumeId, new: NewSize) -> Result<rpc::block::Volume, Error> {
        let mut state = self.state.lock().await;
        let volume = living(&state, id, "resize")?;
        if volume.stage == Stage::Filling {
            return Err(Error::unavailable(format!(
                "volume {id}: resize: it is being filled; ask again"
            )));
        }
        let size = new.size_bytes;
        check::check_size(id, "resize", size)?;
        if size < volume.size_bytes {
            return Err(Error::refused(format!(
                "volume {id}: resize: {size} bytes are below its {}: a volume only grows",
                volume.size_bytes
            )));
        }
        let limits = check::limits(id, &volume.quality, size)?;
        let path = self.file_of(id);
        let grown = block_in_place(|| {
            let file = OpenOptions::new().write(true).open(&path)?;
            if file.metadata()?.len() < size {
                file.set_len(size)?;
                file.sync_all()?;
            }
            Ok::<_, std::io::Error>(())
        });
        grown.map_err(|e| {
            let advice = catalogue::advice(&e);
            Error::unavailable(format!("volume {id}: resize: {}: {e}{advice}", path.display()))
        })?;
        let volume = catalogue::Volume { size_bytes: size, ..volume };
        block_in_place(|| state.catalogue.put_volume(id, volume.clone())).map_err(of_catalogue)?;
        self.tell_size(&mut state, id, size).await?;
        if let Some(open) = state.open_volumes.get(&id) {
            let worker = &self.workers[open.worker];
            worker.set_limits(open.index, limits).map_err(of_worker)?;
            if new.reconnect {
                worker.reconnect(open.index).map_err(of_worker)?;
            }
        }
        Ok(self.describe(id, &volume))
    }

    /// Whoever connects from now on, or asks, is told that size.
    async fn tell_size(&self, state: &mut State, id: VolumeId, size: u64) -> Result<(), Error> {
        let Some(open) = state.open_volumes.get(&id) else { return Ok(()) };
        let worker = &self.workers[open.worker];
        worker.grow(open.index, size).await.map_err(of_worker)?;
        let exports = state.catalogue.exports();
        for (name, present) in &mut state.open_exports {
            let Some(export) = exports.get(name).filter(|e| e.volume == id) else { continue };
            present.served.size = size;
            present.tell(worker, &Access::owner(export.owner_uid))?;
        }
        Ok(())
    }

    /// Answers when all that was acknowledged is durable; changes wait from then
    /// on, until [`Self::resume`] or the deadline. A volume that nobody has
    /// exported is quiet already.
    pub async fn quiesce(&self, id: VolumeId, quiesce: Quiesce) -> Result<(), Error> {
        let deadline = quiesce.deadline_ms;
        if !(1..=QUIESCE_MS_MAX).contains(&deadline) {
            return Err(Error::refused(format!(
                "volume {id}: quiesce: {deadline} ms: the deadline is between 1 and \
                 {QUIESCE_MS_MAX} ms"
            )));
        }
        let until = Some(now_ms().saturating_add(deadline));
        let Some((worker, index)) = self.remember_hold(id, "quiesce", until).await? else {
            return Ok(());
        };
        let held = self.workers[worker].hold(index, Duration::from_millis(deadline)).await;
        match held.map_err(of_worker)? {
            Ok(()) => Ok(()),
            Err(reason) => {
                self.remember_hold(id, "quiesce", None).await?;
                self.workers[worker].release(index).map_err(of_worker)?;
                Err(Error::damaged(format!("volume {id}: quiesce: {reason}")))
            }
        }
    }

    pub async fn resume(&self, id: VolumeId) -> Result<(), Error> {
        match self.remember_hold(id, "resume", None).await? {
            Some((worker, index)) => self.workers[worker].release(index).map_err(of_worker),
            None => Ok(()),
        }
    }

    /// Durable before it is in force, and until it is undone or over: a crash lets
    /// no change through. Says where the volume is served.
    async fn remember_hold(
        &self,
        id: VolumeId,
        deed: &str,
        held_until_ms: Option<u64>,
    ) -> Result<Option<(usize, u32)>, Error> {
        let mut state = self.state.lock().await;
        let volume = catalogue::Volume { held_until_ms, ..living(&state, id, deed)? };
        block_in_place(|| state.catalogue.put_volume(id, volume)).map_err(of_catalogue)?;
        Ok(state.open_volumes.get(&id).map(|open| (open.worker, open.index)))
    }

    /// `draining`: answers when no connection is left. It is durable before that, and
    /// stays until it is undone or the export is deleted.
    pub async fn drain(&self, name: &str, draining: bool) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        let missing = || Error::not_found(format!("export {name}: drain: there is no such export"));
        let export = state.catalogue.exports().get(name).cloned().ok_or_else(missing)?;
        if export.drained != draining {
            let export = catalogue::Export { drained: draining, ..export.clone() };
            block_in_place(|| state.catalogue.put_export(name, export)).map_err(of_catalogue)?;
        }
        let open = state.open_exports.get(name).ok_or_else(missing)?;
        let volume = state.open_volumes.get(&export.volume).ok_or_else(missing)?;
        let (worker, listeners) = (volume.worker, open.listeners());
        drop(state);
        for listener in listeners {
            self.workers[worker].drain(listener, draining).await.map_err(of_worker)?;
        }
        Ok(())
    }

    pub async fn connections(&self) -> Result<Vec<Connection>, Error> {
        let mut all = Vec::new();
        for worker in &self.workers {
            let found = worker.connections().await.map_err(of_worker)?;
            all.extend(found.into_iter().map(|c| Connection {
                id: c.id,
                export: c.export,
                peer: c.peer,
                read_only: c.read_only,
                in_flight: c.in_flight,
                waits: c.waits,
                age_ms: u64::try_from(c.age.as_millis()).unwrap_or(u64::MAX),
            }));
        }
        all.sort_by_key(|c| c.id);
        Ok(all)
    }

    pub fn disconnect(&self, id: u64) -> Result<(), Error> {
        self.workers.iter().try_for_each(|worker| worker.disconnect(id).map_err(of_worker))
    }

    /// Of the volumes that are exported.
    pub async fn statistics(&self) -> Vec<VolumeStatistics> {
        let state = self.state.lock().await;
        state.open_volumes.iter().map(|(id, open)| open.counters.look(id.to_string())).collect()
    }
}

#[expect(clippy::disallowed_methods, reason = "a deadline that outlives the process")]
fn now_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// For how long it is quiesced still; a clock that was set back adds nothing.
pub(super) fn still_held_ms(volume: &catalogue::Volume) -> Option<u64> {
    let left = volume.held_until_ms?.saturating_sub(now_ms()).min(QUIESCE_MS_MAX);
    (left > 0).then_some(left)
}

fn living(state: &State, id: VolumeId, deed: &str) -> Result<catalogue::Volume, Error> {
    let volume = state.catalogue.volumes().get(&id).cloned();
    let volume = volume
        .ok_or_else(|| Error::not_found(format!("volume {id}: {deed}: there is no such volume")))?;
    match &volume.stage {
        Stage::Deleting => {
            Err(Error::not_found(format!("volume {id}: {deed}: it is being deleted")))
        }
        Stage::Failed(reason) => {
            Err(Error::damaged(format!("volume {id}: {deed}: it is failed: {reason}")))
        }
        Stage::Filling | Stage::Ready => Ok(volume),
    }
}
