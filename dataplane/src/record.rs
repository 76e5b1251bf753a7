//! Small JSON records on disk, whole or not at all: the desired state as last
//! accepted, and the devices that were made.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("record {}: {deed}: {cause}", path.display())]
    Unavailable { path: PathBuf, deed: &'static str, cause: io::Error },
    /// The file is there and is not what we write: somebody should look at it.
    #[error("record {}: read: it is damaged: {cause}", path.display())]
    Damaged { path: PathBuf, cause: serde_json::Error },
}

/// Reads a record; `None` where there is none.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, Error> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(cause) => {
            return Err(Error::Unavailable { path: path.to_owned(), deed: "read", cause });
        }
    };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|cause| Error::Damaged { path: path.to_owned(), cause })
}

/// Writes a record beside its place, syncs it, and moves it there; then syncs
/// the folder. After a crash the old one stands or the new one.
pub fn write<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let failed = |deed| move |cause| Error::Unavailable { path: path.to_owned(), deed, cause };
    let bytes =
        serde_json::to_vec_pretty(value).map_err(io::Error::from).map_err(failed("write"))?;
    let pending = path.with_extension("json.new");
    // User data is in it, which is its instance's own affair.
    let mut file = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&pending)
        .map_err(failed("write"))?;
    file.write_all(&bytes).map_err(failed("write"))?;
    file.sync_all().map_err(failed("sync"))?;
    fs::rename(&pending, path).map_err(failed("replace"))?;
    let folder = path.parent().unwrap_or(Path::new("/"));
    File::open(folder).and_then(|f| f.sync_all()).map_err(failed("sync the folder of"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_a_half_written_one_does_not_replace_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), None);
        write(&path, &vec![1, 2]).unwrap();
        fs::write(path.with_extension("json.new"), b"[3").unwrap();
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), Some(vec![1, 2]));
        write(&path, &vec![4]).unwrap();
        assert_eq!(read::<Vec<u32>>(&path).unwrap(), Some(vec![4]));
    }

    #[test]
    fn a_record_is_for_its_owner_only() {
        use std::os::unix::fs::PermissionsExt as _;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        write(&path, &1).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn a_damaged_record_is_told_from_none() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("r.json");
        fs::write(&path, b"{").unwrap();
        assert!(matches!(read::<Vec<u32>>(&path), Err(Error::Damaged { .. })));
    }
}
