//! The folder of images: list, open, put into place, delete.

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use rpc::agent::Image;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Doing, Error};

/// Longer names would not fit beside their suffixes in a file name comfortably.
const NAME_LENGTH_MAX: usize = 64;
const MANIFEST_FORMAT: u32 = 1;

/// What `manifest.json` holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    pub name: String,
    /// Of `root.raw`; a multiple of 4096.
    pub size_bytes: u64,
    /// Of `root.raw`.
    pub sha256: String,
    /// The kernel's command line, where the image brings a kernel.
    pub command_line: Option<String>,
}

impl Manifest {
    pub const fn direct_boot(&self) -> bool {
        self.command_line.is_some()
    }
}

impl From<Manifest> for Image {
    fn from(m: Manifest) -> Self {
        Self {
            direct_boot: m.direct_boot(),
            name: m.name,
            size_bytes: m.size_bytes,
            sha256: m.sha256,
        }
    }
}

#[derive(Debug, Clone)]
pub struct Store {
    folder: PathBuf,
}

impl Store {
    pub fn open(folder: impl Into<PathBuf>) -> Result<Self, Error> {
        let folder = folder.into();
        fs::create_dir_all(&folder).doing("create folder", &folder)?;
        let store = Self { folder };
        store.sweep()?;
        Ok(store)
    }

    /// Removes what an interrupted build left behind.
    fn sweep(&self) -> Result<(), Error> {
        for entry in fs::read_dir(&self.folder).doing("list", &self.folder)? {
            let path = entry.doing("list", &self.folder)?.path();
            if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with('.')) {
                fs::remove_dir_all(&path).doing("remove", &path)?;
            }
        }
        Ok(())
    }

    pub fn list(&self) -> Result<Vec<Manifest>, Error> {
        let mut all = Vec::new();
        for entry in fs::read_dir(&self.folder).doing("list", &self.folder)? {
            let name = entry.doing("list", &self.folder)?.file_name();
            let name = name.to_string_lossy();
            if !name.starts_with('.') {
                match self.manifest(&name) {
                    Ok(manifest) => all.push(manifest),
                    Err(error) => tracing::error!(%error, image = %name, "left out of the list"),
                }
            }
        }
        all.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(all)
    }

    pub fn manifest(&self, name: &str) -> Result<Manifest, Error> {
        let path = self.folder_of(name)?.join("manifest.json");
        let bytes = match fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::Missing { name: name.to_owned() });
            }
            other => other.doing("read", &path)?,
        };
        let manifest: Manifest = serde_json::from_slice(&bytes)
            .map_err(|e| Error::Damaged { name: name.to_owned(), cause: e.to_string() })?;
        if manifest.format != MANIFEST_FORMAT {
            let cause =
                format!("its manifest has format {}, not {MANIFEST_FORMAT}", manifest.format);
            return Err(Error::Damaged { name: name.to_owned(), cause });
        }
        Ok(manifest)
    }

    /// The root disk that a volume begins as.
    pub fn root_of(&self, name: &str) -> Result<PathBuf, Error> {
        Ok(self.folder_of(name)?.join("root.raw"))
    }

    pub fn kernel_of(&self, name: &str) -> Result<PathBuf, Error> {
        Ok(self.folder_of(name)?.join("vmlinuz"))
    }

    pub fn initrd_of(&self, name: &str) -> Result<PathBuf, Error> {
        Ok(self.folder_of(name)?.join("initrd"))
    }

    /// A missing image is no error.
    pub fn delete(&self, name: &str) -> Result<(), Error> {
        let folder = self.folder_of(name)?;
        let doomed = self.folder.join(format!(".gone-{name}"));
        match fs::rename(&folder, &doomed) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            other => other.doing("remove", &folder)?,
        }
        fs::remove_dir_all(&doomed).doing("remove", &doomed)
    }

    /// Makes an image: `fill` writes `root.raw` (and a kernel) into an empty
    /// folder and gives the kernel's command line; then all of it moves into
    /// place. A failure leaves nothing.
    pub fn put(
        &self,
        name: &str,
        fill: impl FnOnce(&Path) -> Result<Option<String>, Error>,
    ) -> Result<Manifest, Error> {
        let target = self.folder_of(name)?;
        if target.exists() {
            return Err(Error::Exists { name: name.to_owned() });
        }
        let pending = self.folder.join(format!(".new-{name}"));
        if let Err(e) = fs::create_dir(&pending) {
            if e.kind() == std::io::ErrorKind::AlreadyExists {
                let cause = "it is being made by another call".to_owned();
                return Err(Error::Refused { name: name.to_owned(), cause });
            }
            return Err(e).doing("create folder", &pending);
        }
        let made = fill(&pending).and_then(|command_line| finish(name, &pending, command_line));
        let made = made.and_then(|manifest| {
            fs::rename(&pending, &target).doing("move into place", &target)?;
            sync(&self.folder)?;
            Ok(manifest)
        });
        if made.is_err() {
            let _ = fs::remove_dir_all(&pending);
        }
        made
    }

    fn folder_of(&self, name: &str) -> Result<PathBuf, Error> {
        let lawful = !name.is_empty()
            && name.len() <= NAME_LENGTH_MAX
            && name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b));
        if lawful {
            return Ok(self.folder.join(name));
        }
        Err(Error::Refused {
            name: name.chars().take(NAME_LENGTH_MAX).collect(),
            cause: format!(
                "a name has one to {NAME_LENGTH_MAX} letters, digits, dots, hyphens or underscores, a letter or digit first"
            ),
        })
    }
}

fn finish(name: &str, folder: &Path, command_line: Option<String>) -> Result<Manifest, Error> {
    let root = folder.join("root.raw");
    let size_bytes = fs::metadata(&root).doing("look at", &root)?.len();
    if size_bytes == 0 || size_bytes % 4096 != 0 {
        let cause = format!("its root disk has {size_bytes} bytes, not a multiple of 4096");
        return Err(Error::Refused { name: name.to_owned(), cause });
    }
    let manifest = Manifest {
        format: MANIFEST_FORMAT,
        name: name.to_owned(),
        size_bytes,
        sha256: digest(&root)?,
        command_line,
    };
    let path = folder.join("manifest.json");
    let text = serde_json::to_vec_pretty(&manifest)
        .map_err(|e| Error::Damaged { name: name.to_owned(), cause: e.to_string() })?;
    fs::write(&path, text).doing("write", &path)?;
    for entry in fs::read_dir(folder).doing("list", folder)? {
        sync(&entry.doing("list", folder)?.path())?;
    }
    sync(folder)?;
    Ok(manifest)
}

fn sync(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|f| f.sync_all()).doing("sync", path)
}

fn digest(path: &Path) -> Result<String, Error> {
    let mut file = File::open(path).doing("open", path)?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).doing("read", path)?;
        if n == 0 {
            let bytes: Vec<String> = digest.finalize().iter().map(|b| format!("{b:02x}")).collect();
            return Ok(bytes.concat());
        }
        digest.update(&buffer[..n]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("images")).unwrap();
        (dir, store)
    }

    fn blank(folder: &Path) -> Result<Option<String>, Error> {
        let path = folder.join("root.raw");
        File::create(&path).and_then(|f| f.set_len(8192)).doing("write", &path)?;
        Ok(None)
    }

    #[test]
    fn an_image_is_listed_only_when_whole_and_gone_when_deleted() {
        let (_dir, store) = store();
        let failed =
            store.put("a", |_| Err(Error::Refused { name: "a".into(), cause: "planted".into() }));
        assert!(failed.is_err());
        assert_eq!(store.list().unwrap(), []);
        let made = store.put("a", blank).unwrap();
        assert_eq!(store.list().unwrap(), vec![made.clone()]);
        assert_eq!(made.sha256.len(), 64);
        assert!(matches!(store.put("a", blank), Err(Error::Exists { .. })));
        store.delete("a").unwrap();
        store.delete("a").unwrap();
        assert_eq!(store.list().unwrap(), []);
    }

    #[test]
    fn a_name_that_leaves_the_folder_is_refused() {
        let (_dir, store) = store();
        for name in ["", ".", "..", "a/b", "../x", ".hidden", "-x", &"a".repeat(65)] {
            assert!(matches!(store.manifest(name), Err(Error::Refused { .. })), "{name}");
        }
    }

    #[test]
    fn what_an_interrupted_build_left_is_swept() {
        let (dir, store) = store();
        fs::create_dir(dir.path().join("images/.new-x")).unwrap();
        Store::open(dir.path().join("images")).unwrap();
        assert!(store.put("x", blank).is_ok());
    }
}
