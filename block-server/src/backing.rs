//! The files and devices that volumes lie in.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, StatxFlags};

use crate::volume::Geometry;

/// Where the kernel does not say what direct I/O must be aligned to: a page
/// suits every disk.
const ALIGNMENT_DEFAULT: u32 = 4096;

/// A smaller unit than a sector cannot be.
const ALIGNMENT_MIN: u32 = 512;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: open: {cause}", path.display())]
    Open { path: PathBuf, cause: io::Error },
    #[error("{}: it is neither a regular file nor a block device", path.display())]
    Kind { path: PathBuf },
    #[error(
        "{}: it is in use: mounted, part of another device, or served already; \
         free it, or serve it --read-only", path.display()
    )]
    InUse { path: PathBuf },
    #[error("{}: it holds {size} bytes, less than one block of {alignment}", path.display())]
    Small { path: PathBuf, size: u64, alignment: u32 },
    #[error("{}: it holds {found} bytes, and the volume has {wanted}", path.display())]
    Size { path: PathBuf, found: u64, wanted: u64 },
}

/// Whether file operations go through the kernel's page cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Past it (`O_DIRECT`), where the file system lets us.
    #[default]
    None,
    /// Through it: reads come from memory where they can, and a write is in
    /// memory only until a flush or FUA.
    Writeback,
}

/// An open file and what its volume may be.
#[derive(Debug)]
pub struct Backing {
    pub fd: OwnedFd,
    pub geometry: Geometry,
}

impl Backing {
    /// Past the page cache, as volumes are served: cached random writes cost ten
    /// times the CPU (docs/adr/0031), and what a guest flushed must not hang on
    /// our memory.
    pub fn open(path: &Path, read_only: bool) -> Result<Self, Error> {
        Self::open_cached(path, read_only, Cache::None)
    }

    pub fn open_cached(path: &Path, read_only: bool, cache: Cache) -> Result<Self, Error> {
        let open =
            |flags| OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path);
        let failed = |cause| Error::Open { path: path.to_owned(), cause };
        let past_cache = if cache == Cache::None { libc::O_DIRECT } else { 0 };
        let (mut file, direct) = match open(past_cache) {
            Ok(file) => (file, cache == Cache::None),
            Err(cause) if cache == Cache::None && cause.raw_os_error() == Some(libc::EINVAL) => {
                tracing::warn!(
                    "{}: the file system has no direct I/O; going through the page cache",
                    path.display()
                );
                (open(0).map_err(failed)?, false)
            }
            Err(cause) => return Err(failed(cause)),
        };
        let kind = file.metadata().map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(Error::Kind { path: path.to_owned() });
        }
        let alignment = if direct { alignment(&file) } else { ALIGNMENT_MIN };
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let size = length - length % u64::from(alignment);
        if size == 0 {
            return Err(Error::Small { path: path.to_owned(), size: length, alignment });
        }
        if size < length {
            tracing::warn!(
                "{}: serving {size} of {length} bytes: the last block of {alignment} is not whole",
                path.display()
            );
        }
        Ok(Self { fd: file.into(), geometry: Geometry { size, alignment } })
    }

    /// Opens a volume's file, which must have the volume's size, or more: a crash
    /// in a resize leaves what is beyond it.
    pub fn open_sized(path: &Path, size: u64) -> Result<Self, Error> {
        let backing = Self::open(path, false)?;
        let found = backing.geometry.size;
        if found >= size {
            let geometry = Geometry { size, ..backing.geometry };
            return Ok(Self { geometry, ..backing });
        }
        Err(Error::Size { path: path.to_owned(), found, wanted: size })
    }
}

/// Keeps a block device to ourselves while we write to it: as long as this is
/// open, nobody can mount it, make it part of another device or claim it too
/// (open(2), `O_EXCL` without `O_CREAT`). `None` for a regular file.
pub fn claim(path: &Path) -> Result<Option<OwnedFd>, Error> {
    let failed = |cause| Error::Open { path: path.to_owned(), cause };
    if !std::fs::metadata(path).map_err(failed)?.file_type().is_block_device() {
        return Ok(None);
    }
    match OpenOptions::new().read(true).custom_flags(libc::O_EXCL).open(path) {
        Ok(file) => Ok(Some(file.into())),
        Err(cause) if cause.raw_os_error() == Some(libc::EBUSY) => {
            Err(Error::InUse { path: path.to_owned() })
        }
        Err(cause) => Err(failed(cause)),
    }
}

fn alignment(file: &File) -> u32 {
    let told = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN)
        .ok()
        .filter(|s| s.stx_mask & StatxFlags::DIOALIGN.bits() != 0)
        .map(|s| s.stx_dio_offset_align)
        .filter(|a| a.is_power_of_two());
    told.unwrap_or(ALIGNMENT_DEFAULT).max(ALIGNMENT_MIN)
}
