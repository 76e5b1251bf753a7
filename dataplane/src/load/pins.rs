//! Where programs, maps and links stand in the BPF file system.
//!
//! ```text
//! /sys/fs/bpf/hostplane-NAME/
//!   maps-HASH/INTERFACES …     one folder a layout (`ebpf::layout::HASH`)
//!   maps-HASH/SHAPES           what the records there look like (`shape`)
//!   links/tap_ingress-17 …     program and ifindex (bpffs allows no dot)
//! ```
//! A pinned link keeps its program, and that its maps, alive without us.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use rpc::Deployment;

use super::Error;

const BPF_FS: &str = "/sys/fs/bpf";
/// linux/magic.h.
const BPF_FS_MAGIC: i64 = 0xcafe_4a11;

#[derive(Debug, Clone)]
pub struct Pins {
    root: PathBuf,
}

impl Pins {
    pub fn of(deployment: &Deployment) -> Self {
        Self { root: deployment.bpf_dir() }
    }

    /// Mounts the file system where it is missing, and makes the folders.
    pub fn prepare(&self) -> Result<(), Error> {
        let failed = |cause: io::Error| Error::new("mount", BPF_FS, cause);
        let kind = nix::sys::statfs::statfs(BPF_FS).map_err(|e| failed(e.into()))?;
        if kind.filesystem_type().0 as i64 != BPF_FS_MAGIC {
            let none = None::<&str>;
            mount(Some("bpf"), BPF_FS, Some("bpf"), MsFlags::empty(), none)
                .map_err(|e| failed(e.into()))?;
        }
        for folder in [self.maps(), self.links()] {
            fs::create_dir_all(&folder).map_err(|e| Error::new("make", folder.display(), e))?;
        }
        Ok(())
    }

    pub fn maps(&self) -> PathBuf {
        self.root.join(format!("maps-{:016x}", ebpf::layout::HASH))
    }

    pub fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    pub fn has_maps(&self) -> bool {
        self.map("INTERFACES").exists()
    }

    fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    pub fn link(&self, program: &str, ifindex: u32) -> PathBuf {
        self.links().join(format!("{program}-{ifindex}"))
    }

    /// Program and ifindex of every pinned link.
    pub fn pinned_links(&self) -> Result<Vec<(String, u32)>, Error> {
        let names = names(&self.links())?;
        Ok(names
            .into_iter()
            .filter_map(|name| {
                let (program, ifindex) = name.rsplit_once('-')?;
                Some((program.to_owned(), ifindex.parse().ok()?))
            })
            .collect())
    }

    /// The folders of maps of other layouts.
    pub fn other_maps(&self) -> Result<Vec<PathBuf>, Error> {
        let own = self.maps();
        let maps = names(&self.root)?.into_iter().filter(|name| name.starts_with("maps-"));
        Ok(maps.map(|name| self.root.join(name)).filter(|path| *path != own).collect())
    }

    /// Removes the maps of other layouts.
    pub fn remove_other_maps(&self) -> Result<(), Error> {
        self.other_maps()?.iter().try_for_each(|folder| remove_folder(folder))
    }

    /// Removes everything: links, and with them the programs, and maps.
    pub fn remove(&self) -> Result<(), Error> {
        for name in names(&self.root)? {
            remove_folder(&self.root.join(name))?;
        }
        absent_is_fine(fs::remove_dir(&self.root), &self.root)
    }
}

fn remove_folder(folder: &Path) -> Result<(), Error> {
    for name in names(folder)? {
        let path = folder.join(name);
        absent_is_fine(fs::remove_file(&path), &path)?;
    }
    absent_is_fine(fs::remove_dir(folder), folder)
}

/// Names in a folder; none where there is no folder.
fn names(folder: &Path) -> Result<Vec<String>, Error> {
    let read = |cause| Error::new("list", folder.display(), cause);
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(read(error)),
    };
    entries.map(|e| Ok(e.map_err(read)?.file_name().to_string_lossy().into_owned())).collect()
}

pub fn absent_is_fine(result: io::Result<()>, path: &Path) -> Result<(), Error> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(Error::new("remove", path.display(), error))
        }
        _ => Ok(()),
    }
}
