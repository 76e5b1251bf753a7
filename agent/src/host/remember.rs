//! What must outlive the agent, on disk.
//!
//! ```text
//!   <state>/agent/desired.json                    control's last word
//!                 volumes.json                    volumes that were made here
//!                 instances/<instance>/record.json
//! ```
//! Each file is written beside its place, synced and moved there: it is the old
//! or the new one, never a torn one. One that cannot be read stops the agent at
//! its start, before it could act on half a memory.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use model::{InstanceId, VolumeId};
use rpc::Deployment;
use rpc::agent::Image;
use rpc::host::Desired;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::image::Store;
use crate::lifecycle::Record;
use crate::qemu;

#[derive(Debug)]
pub struct Memory {
    folder: PathBuf,
    instances: PathBuf,
    images: Mutex<Option<Vec<Image>>>,
}

impl Memory {
    pub fn open(deployment: &Deployment) -> io::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let instances = qemu::instances(deployment);
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&instances)?;
        Ok(Self { folder: deployment.state_of("agent"), instances, images: Mutex::new(None) })
    }

    pub fn desired(&self) -> io::Result<Option<Desired>> {
        read(&self.folder.join("desired.json"))
    }

    pub fn keep_desired(&self, desired: &Desired) -> io::Result<()> {
        write(&self.folder.join("desired.json"), desired)
    }

    pub fn volumes_made(&self) -> io::Result<BTreeSet<VolumeId>> {
        Ok(read(&self.folder.join("volumes.json"))?.unwrap_or_default())
    }

    pub fn keep_volumes_made(&self, made: &BTreeSet<VolumeId>) -> io::Result<()> {
        write(&self.folder.join("volumes.json"), made)
    }

    pub fn records(&self) -> io::Result<Vec<(InstanceId, Record)>> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.instances)? {
            let path = entry?.path();
            let id = path.file_name().and_then(|n| n.to_string_lossy().parse::<InstanceId>().ok());
            if let (Some(id), Some(record)) = (id, read(&path.join("record.json"))?) {
                all.push((id, record));
            }
        }
        Ok(all)
    }

    pub fn keep(&self, id: InstanceId, record: &Record) -> io::Result<()> {
        let folder = self.instances.join(id.to_string());
        fs::create_dir_all(&folder)?;
        write(&folder.join("record.json"), record)
    }

    /// Drops all that is left of an instance, its console's output too.
    pub fn forget(&self, id: InstanceId) -> io::Result<()> {
        match fs::remove_dir_all(self.instances.join(id.to_string())) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    /// The images, read anew only after [`Self::images_changed`].
    pub fn images(&self, store: &Store) -> Vec<Image> {
        let Ok(mut kept) = self.images.lock() else { return Vec::new() };
        if let Some(images) = &*kept {
            return images.clone();
        }
        match store.list() {
            Ok(list) => {
                let images: Vec<Image> = list.into_iter().map(Into::into).collect();
                *kept = Some(images.clone());
                images
            }
            Err(error) => {
                tracing::error!(%error, "cannot list images");
                Vec::new()
            }
        }
    }

    pub fn images_changed(&self) {
        if let Ok(mut kept) = self.images.lock() {
            *kept = None;
        }
    }
}

fn read<T: DeserializeOwned>(path: &Path) -> io::Result<Option<T>> {
    match fs::read(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(e),
        Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(|e| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{}: {e}", path.display()))
        }),
    }
}

fn write<T: Serialize>(path: &Path, value: &T) -> io::Result<()> {
    let pending = path.with_extension("new");
    // User data is in it, which is its instance's own affair.
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&pending)?;
    file.write_all(&serde_json::to_vec(value)?)?;
    file.sync_all()?;
    fs::rename(&pending, path)?;
    if let Some(folder) = path.parent() {
        File::open(folder)?.sync_all()?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_back_and_a_torn_file_is_said() {
        let dir = tempfile::tempdir().unwrap();
        let deployment =
            Deployment::new("x", dir.path().join("state"), dir.path().join("run")).unwrap();
        let memory = Memory::open(&deployment).unwrap();
        assert_eq!(memory.desired().unwrap(), None);
        let desired = Desired { revision: 7, ..Desired::default() };
        memory.keep_desired(&desired).unwrap();
        assert_eq!(memory.desired().unwrap(), Some(desired));
        let id = InstanceId::from_random(1);
        memory.keep(id, &Record::default()).unwrap();
        assert_eq!(memory.records().unwrap(), [(id, Record::default())]);
        memory.forget(id).unwrap();
        memory.forget(id).unwrap();
        assert_eq!(memory.records().unwrap(), []);
        fs::write(dir.path().join("state/agent/desired.json"), b"{").unwrap();
        assert!(memory.desired().unwrap_err().to_string().contains("desired.json"));
    }
}
