//! The volumes of one deployment and their exports: what `serve` is asked for.
//!
//! A volume's way, as the catalogue has it:
//!
//! ```text
//!   put ──▶ filling ──▶ ready ──▶ deleting ──▶ (gone)
//!              │          │           ▲
//!              └──▶ failed ◀┘ ────────┘
//! ```
//!
//! Every change is durable in the catalogue before it is acknowledged, and in
//! the order that lets a restart go on: an export's generation is raised on disk,
//! then in the worker, and only then does the new writer get its socket.
//!
//! What may never be true: two writers of one volume that both succeed; a
//! volume's file removed while it is exported; an answer that a crash takes back.

mod check;
mod live;
mod succession;
mod volumes;

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::time::Duration;

use model::VolumeId;
use rpc::block::{NewExport, Status, VolumeHealth};
use rpc::{Deployment, Error};
use tokio::sync::{Mutex, oneshot};
use tokio::task::block_in_place;

use crate::backing::{self, Backing};
use crate::catalogue::{self, Catalogue, Stage};
use crate::metrics::{self, Counters};
use crate::worker::{self, Access, Front, Handle, Served};
use crate::{fill, socket};

pub use succession::{CONTROL, Inheritance, KIND, TAKE_OVER};

/// What our folders are called under the state and run directories.
pub const DAEMON: &str = "block-server";

/// A volume that a worker serves.
#[derive(Debug)]
struct OpenVolume {
    worker: usize,
    index: u32,
    counters: Arc<Counters>,
    /// The same open file as the worker's, with its lock, to be handed on.
    file: OwnedFd,
}

/// An export that listens.
#[derive(Debug)]
struct OpenExport {
    worker: usize,
    listener: u32,
    /// The same export for guests, on vhost-user.
    guests: u32,
    /// What they listen at, to be handed on.
    sockets: [OwnedFd; 2],
    served: Served,
}

/// A copy that runs.
#[derive(Debug)]
struct Filling {
    cancelled: Arc<AtomicBool>,
    ended: oneshot::Receiver<()>,
}

impl OpenExport {
    fn listeners(&self) -> [u32; 2] {
        [self.listener, self.guests]
    }

    /// Has both fronts serve it on the terms of now.
    fn tell(&self, worker: &Handle, access: &Access) -> Result<(), Error> {
        self.listeners().into_iter().try_for_each(|listener| {
            worker
                .set_exports(listener, access.clone(), vec![self.served.clone()])
                .map_err(of_worker)
        })
    }
}

#[derive(Debug)]
struct State {
    catalogue: Catalogue,
    open_volumes: BTreeMap<VolumeId, OpenVolume>,
    open_exports: BTreeMap<String, OpenExport>,
    filling: BTreeMap<VolumeId, Filling>,
}

#[derive(Debug)]
pub struct Depot {
    volumes_dir: PathBuf,
    sockets_dir: PathBuf,
    guests_dir: PathBuf,
    workers: Vec<Handle>,
    state: Mutex<State>,
    /// Held for as long as we live, against a second daemon on the same volumes.
    lock: File,
}

impl Depot {
    /// Reads what there is; nothing is changed or served before [`Self::recover`].
    pub fn open(
        deployment: &Deployment,
        workers: Vec<Handle>,
        from: &mut Inheritance,
    ) -> Result<Arc<Self>, Error> {
        let home = deployment.state_of(DAEMON);
        let volumes_dir = home.join("volumes");
        let sockets_dir = deployment.run_dir().join("nbd");
        let guests_dir = deployment.run_dir().join("vhost");
        make_folder(&volumes_dir, 0o700)?;
        // Passable for the users that own exports; each socket has its own guard.
        make_folder(&sockets_dir, 0o711)?;
        make_folder(&guests_dir, 0o711)?;
        let lock = match from.socket(succession::LOCK) {
            Some(held) => held.into(),
            None => lock(&home.join("lock"))?,
        };
        let catalogue = Catalogue::open(home.join("catalogue.json")).map_err(of_catalogue)?;
        Ok(Arc::new(Self {
            volumes_dir,
            sockets_dir,
            guests_dir,
            workers,
            state: Mutex::new(State {
                catalogue,
                open_volumes: BTreeMap::new(),
                open_exports: BTreeMap::new(),
                filling: BTreeMap::new(),
            }),
            lock,
        }))
    }

    /// Takes up what an earlier daemon left: finishes deletions, begins fillings
    /// anew, listens for every export again, and goes on with its connections.
    pub async fn recover(self: &Arc<Self>, mut from: Inheritance) -> Result<(), Error> {
        for (name, carried) in &from.load.volumes {
            if let Some(reason) = &carried.failed {
                self.volume_failed(name, reason.clone()).await;
            }
        }
        let mut state = self.state.lock().await;
        self.name_strangers(&state);
        for (id, volume) in state.catalogue.volumes().clone() {
            match volume.stage {
                Stage::Filling => self.start_filling(&mut state, id, &volume),
                Stage::Deleting => self.finish_deletion(&mut state, id)?,
                Stage::Ready | Stage::Failed(_) => {}
            }
        }
        for (name, export) in state.catalogue.exports().clone() {
            if let Err(error) = self.listen(&mut state, &name, &export, &mut from).await {
                // The others must not wait for this one.
                tracing::error!("export {name}: {error}");
            }
        }
        self.take_up(&state, from.load)
    }

    /// Files that are none of ours are left alone, and named.
    fn name_strangers(&self, state: &State) {
        let Ok(entries) = std::fs::read_dir(&self.volumes_dir) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            let known = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse::<VolumeId>().ok())
                .is_some_and(|id| state.catalogue.volumes().contains_key(&id));
            if !known {
                tracing::warn!("{}: no volume of ours; left alone", path.display());
            }
        }
    }

    fn file_of(&self, id: VolumeId) -> PathBuf {
        self.volumes_dir.join(format!("{id}.img"))
    }

    fn socket_of(&self, name: &str) -> PathBuf {
        self.sockets_dir.join(format!("{name}.sock"))
    }

    /// Of the same export's second front.
    fn guest_socket_of(&self, name: &str) -> PathBuf {
        self.guests_dir.join(format!("{name}.sock"))
    }

    pub async fn status(&self) -> Status {
        let state = self.state.lock().await;
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            engine: self.workers.first().map_or("none", Handle::engine).to_owned(),
            volumes: state.catalogue.volumes().len() as u64,
            exports: state.catalogue.exports().len() as u64,
            connections: state
                .open_exports
                .values()
                .map(|e| u64::from(e.served.connections()))
                .sum(),
        }
    }

    /// Of the volumes that are exported, for Prometheus.
    pub async fn metrics(&self) -> String {
        let state = self.state.lock().await;
        let volumes = state.open_volumes.iter().map(|(id, open)| (id.to_string(), &*open.counters));
        let exports =
            state.open_exports.iter().map(|(name, e)| (name.as_str(), e.served.connections()));
        metrics::text(volumes) + &metrics::connections(exports)
    }

    pub async fn volumes(&self) -> Vec<rpc::block::Volume> {
        let state = self.state.lock().await;
        state.catalogue.volumes().iter().map(|(id, volume)| self.describe(*id, volume)).collect()
    }

    fn describe(&self, id: VolumeId, volume: &catalogue::Volume) -> rpc::block::Volume {
        let file = self.file_of(id);
        let seen = std::fs::metadata(&file).or_else(|_| std::fs::metadata(fill::pending(&file)));
        let health = match (&volume.stage, &seen) {
            (Stage::Filling | Stage::Deleting, _) => VolumeHealth::Filling,
            (Stage::Failed(reason), _) => VolumeHealth::Failed(reason.clone()),
            (Stage::Ready, Ok(_)) => VolumeHealth::Ready,
            (Stage::Ready, Err(error)) => {
                VolumeHealth::Failed(format!("{}: {error}", file.display()))
            }
        };
        rpc::block::Volume {
            id,
            size_bytes: volume.size_bytes,
            allocated_bytes: seen.map_or(0, |m| m.blocks() * 512),
            state: health,
            quality: volume.quality.clone(),
            limits: volume.limits(),
        }
    }

    pub async fn exports(&self) -> Vec<rpc::block::Export> {
        let state = self.state.lock().await;
        let names: Vec<String> = state.catalogue.exports().keys().cloned().collect();
        names.iter().filter_map(|name| self.describe_export(&state, name)).collect()
    }

    fn describe_export(&self, state: &State, name: &str) -> Option<rpc::block::Export> {
        let export = state.catalogue.exports().get(name)?;
        Some(rpc::block::Export {
            name: name.to_owned(),
            volume: export.volume,
            read_only: export.read_only,
            generation: export.generation,
            owner_uid: export.owner_uid,
            socket: self.socket_of(name),
            vhost_user: Some(self.guest_socket_of(name)),
            connections: state.open_exports.get(name).map_or(0, |e| e.served.connections()),
        })
    }

    /// Exports a volume; a greater generation takes it over from its writer.
    pub async fn put_export(
        &self,
        name: &str,
        new: NewExport,
    ) -> Result<rpc::block::Export, Error> {
        let mut state = self.state.lock().await;
        check::check_export(&state.catalogue, name, &self.guest_socket_of(name), &new)?;
        let export = catalogue::Export {
            volume: new.volume,
            read_only: new.read_only,
            generation: new.generation,
            owner_uid: new.owner_uid,
            drained: state.catalogue.exports().get(name).is_some_and(|e| e.drained),
        };
        block_in_place(|| state.catalogue.put_export(name, export.clone()))
            .map_err(of_catalogue)?;
        let nobody = &mut Inheritance::default();
        if let Err(error) = self.listen(&mut state, name, &export, nobody).await {
            if !state.open_exports.contains_key(name) {
                block_in_place(|| state.catalogue.remove_export(name)).map_err(of_catalogue)?;
            }
            return Err(error);
        }
        self.describe_export(&state, name)
            .ok_or_else(|| Error::damaged(format!("export {name}: it vanished while it was made")))
    }

    /// Brings a catalogued export to life, or to its new terms.
    async fn listen(
        &self,
        state: &mut State,
        name: &str,
        export: &catalogue::Export,
        from: &mut Inheritance,
    ) -> Result<(), Error> {
        let id = export.volume;
        let Some(volume) = state.catalogue.volumes().get(&id).cloned() else {
            return Err(Error::not_found(format!("there is no volume {id}")));
        };
        if !state.open_volumes.contains_key(&id) {
            let open = self.open_volume(id, &volume, state, from).await?;
            state.open_volumes.insert(id, open);
        }
        let Some(open) = state.open_volumes.get(&id) else {
            return Err(Error::not_found(format!("there is no volume {id}")));
        };
        let at = open.worker;
        let worker = &self.workers[at];
        if !export.read_only {
            worker.raise(open.index, export.generation).await.map_err(of_worker)?;
        }
        let access = Access::owner(export.owner_uid);
        let mut served = Served {
            name: name.to_owned(),
            volume: open.index,
            size: volume.size_bytes,
            read_only: export.read_only,
            generation: export.generation,
            description: format!("volume {id}"),
            clients: None,
            connections: Arc::new(AtomicU32::new(0)),
            home: None,
        };
        let paths = [self.socket_of(name), self.guest_socket_of(name)];
        let unfit = |e: socket::Error| Error::unavailable(format!("export {name}: {e}"));
        if let Some(present) = state.open_exports.get_mut(name) {
            served.connections = Arc::clone(&present.served.connections);
            present.served = served.clone();
            for path in &paths {
                socket::set_users(path, export.owner_uid.as_slice()).map_err(unfit)?;
            }
            return present.tell(worker, &access);
        }
        let [nbd_name, guests_name] = succession::names_of(name);
        let [nbd_path, guests_path] = &paths;
        let owner = export.owner_uid;
        let nbd = socket_at(nbd_path, owner, from.socket(&nbd_name)).map_err(unfit)?;
        let guests = socket_at(guests_path, owner, from.socket(&guests_name)).map_err(unfit)?;
        let copied = |e| Error::unavailable(format!("export {name}: its socket: {e}"));
        let sockets = [nbd.try_clone().map_err(copied)?, guests.try_clone().map_err(copied)?];
        let listener = worker
            .add_listener(Some(nbd), Front::Nbd, access.clone(), vec![served.clone()])
            .await
            .map_err(of_worker)?;
        let guests = worker
            .add_listener(Some(guests), Front::VhostUser, access, vec![served.clone()])
            .await
            .map_err(of_worker)?;
        if export.drained {
            tracing::warn!("export {name}: it is drained, as before; undo that to let clients in");
            for listener in [listener, guests] {
                worker.drain(listener, true).await.map_err(of_worker)?;
            }
        }
        state
            .open_exports
            .insert(name.to_owned(), OpenExport { worker: at, listener, guests, sockets, served });
        Ok(())
    }

    async fn open_volume(
        &self,
        id: VolumeId,
        volume: &catalogue::Volume,
        state: &State,
        from: &mut Inheritance,
    ) -> Result<OpenVolume, Error> {
        let (path, size) = (self.file_of(id), volume.size_bytes);
        let backing = match from.socket(&succession::volume_name(id)) {
            Some(file) => Backing::adopt(file, &path, size),
            None => block_in_place(|| Backing::open_alone(&path, size)),
        };
        let backing = backing.map_err(|error| match error {
            backing::Error::Held { .. } => Error::unavailable(format!("volume {id}: {error}")),
            _ => Error::damaged(format!("volume {id}: {error}")),
        })?;
        let file = backing
            .fd
            .try_clone()
            .map_err(|e| Error::unavailable(format!("volume {id}: its file: {e}")))?;
        let mut carried = from.load.carried(&id.to_string());
        if let Stage::Failed(reason) = &volume.stage {
            carried.failed = Some(reason.clone());
        }
        carried.held_ms = carried.held_ms.or_else(|| live::still_held_ms(volume));
        let worker = self.least_used(state);
        let counters = Arc::<Counters>::default();
        let new = worker::NewVolume {
            name: id.to_string(),
            fd: backing.fd,
            geometry: backing.geometry,
            generation: volume.generation,
            carried,
            counters: Arc::clone(&counters),
            limits: volume.limits(),
        };
        let index = self.workers[worker].add_volume(new).await.map_err(of_worker)?;
        Ok(OpenVolume { worker, index, counters, file })
    }

    fn least_used(&self, state: &State) -> usize {
        let load = |worker: &usize| {
            state.open_volumes.values().filter(|open| open.worker == *worker).count()
        };
        (0..self.workers.len()).min_by_key(load).unwrap_or(0)
    }

    /// Answers when the last connection is closed. A missing export is no error.
    pub async fn delete_export(&self, name: &str) -> Result<(), Error> {
        let mut state = self.state.lock().await;
        let Some(export) = state.catalogue.exports().get(name).cloned() else { return Ok(()) };
        block_in_place(|| state.catalogue.remove_export(name)).map_err(of_catalogue)?;
        for path in [self.socket_of(name), self.guest_socket_of(name)] {
            let _ = std::fs::remove_file(path);
        }
        let Some(open) = state.open_exports.remove(name) else { return Ok(()) };
        let id = export.volume;
        let Some(worker) = state.open_volumes.get(&id).map(|open| open.worker) else {
            return Ok(());
        };
        // Nobody else waits while slow clients fetch their last replies.
        drop(state);
        for listener in open.listeners() {
            self.workers[worker].remove_listener(listener).await.map_err(of_worker)?;
        }
        let mut state = self.state.lock().await;
        if state.catalogue.exports().values().any(|e| e.volume == id) {
            return Ok(());
        }
        // Another deletion may have closed the volume in the meantime.
        let Some(volume) = state.open_volumes.remove(&id) else { return Ok(()) };
        self.workers[volume.worker].remove_volume(volume.index).await.map_err(of_worker)
    }

    /// A volume's core gave up: so it stays, also after a restart.
    pub async fn volume_failed(&self, name: &str, reason: String) {
        let mut state = self.state.lock().await;
        let Ok(id) = name.parse::<VolumeId>() else { return };
        let Some(volume) = state.catalogue.volumes().get(&id).cloned() else { return };
        let failed = catalogue::Volume { stage: Stage::Failed(reason), ..volume };
        if let Err(error) = block_in_place(|| state.catalogue.put_volume(id, failed)) {
            tracing::error!("volume {id}: {error}");
        }
    }

    /// Lets what is in flight finish and closes every connection.
    pub fn stop(self: Arc<Self>) {
        for worker in &self.workers {
            worker.begin_stop();
        }
        for worker in &self.workers {
            worker.await_stop();
        }
    }
}

/// Where an export listens: as a predecessor did, or anew.
fn socket_at(
    path: &Path,
    owner: Option<u32>,
    inherited: Option<OwnedFd>,
) -> Result<OwnedFd, socket::Error> {
    match inherited {
        Some(socket) => socket::set_users(path, owner.as_slice()).map(|()| socket),
        None => socket::listen(path, owner.as_slice()),
    }
}

fn make_folder(path: &Path, mode: u32) -> Result<(), Error> {
    let failed = |e| Error::unavailable(format!("{}: create: {e}", path.display()));
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).map_err(failed)
}

/// A second's.
const LOCK_TRIES: usize = 50;

fn lock(path: &Path) -> Result<File, Error> {
    let failed = |e: String| Error::unavailable(format!("{}: lock: {e}", path.display()));
    let file = File::create(path).map_err(|e| failed(e.to_string()))?;
    // A process that was killed takes a moment to let go.
    for _ in 0..LOCK_TRIES {
        if file.try_lock().is_ok() {
            return Ok(file);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(failed("another block-server holds it".to_owned()))
}

fn of_catalogue(error: catalogue::Error) -> Error {
    match error {
        catalogue::Error::Unavailable { .. } => Error::unavailable(error.to_string()),
        catalogue::Error::Damaged { .. } => Error::damaged(error.to_string()),
    }
}

fn of_worker(error: worker::Gone) -> Error {
    Error::unavailable(error.to_string())
}
