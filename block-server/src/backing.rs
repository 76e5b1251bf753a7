//! The files and devices that volumes lie in.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

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
    #[error(
        "{}: {holder} has it open, or operations of it still run; waited {} s; end that, \
         or let both only read", path.display(), waited.as_secs()
    )]
    Held { path: PathBuf, holder: String, waited: Duration },
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
        Self::open(path, false)?.sized(path, size)
    }

    /// The same, and nobody else has it: also no dead server's operation, which the
    /// kernel may end after its process. A lock (flock) is the open file's and goes
    /// with the last operation on it.
    pub fn open_alone(path: &Path, size: u64) -> Result<Self, Error> {
        let backing = Self::open_sized(path, size)?;
        await_lock(&backing.fd, path, Lock::Alone, FREED_WITHIN)?;
        Ok(backing)
    }

    /// An open file that another process handed on, with its lock.
    pub fn adopt(fd: OwnedFd, path: &Path, size: u64) -> Result<Self, Error> {
        let mut file = File::from(fd);
        let failed = |cause| Error::Open { path: path.to_owned(), cause };
        let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| failed(e.into()))?;
        let is_direct = flags.contains(rustix::fs::OFlags::DIRECT);
        let alignment = if is_direct { alignment(&file) } else { ALIGNMENT_MIN };
        let length = file.seek(SeekFrom::End(0)).map_err(failed)?;
        let geometry = Geometry { size: length - length % u64::from(alignment), alignment };
        Self { fd: file.into(), geometry }.sized(path, size)
    }

    fn sized(self, path: &Path, size: u64) -> Result<Self, Error> {
        let backing = self;
        let found = backing.geometry.size;
        if found >= size {
            let geometry = Geometry { size, ..backing.geometry };
            return Ok(Self { geometry, ..backing });
        }
        Err(Error::Size { path: path.to_owned(), found, wanted: size })
    }
}

/// Who else may have a file open, of those that lock it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lock {
    Alone,
    /// Others may read it, too.
    Shared,
}

/// How long operations of a server that was killed may take to end.
pub const FREED_WITHIN: Duration = Duration::from_secs(30);

#[expect(clippy::disallowed_methods, reason = "a dead process's operations are waited for")]
pub fn await_lock(fd: &OwnedFd, path: &Path, lock: Lock, patience: Duration) -> Result<(), Error> {
    use rustix::fs::{FlockOperation, flock};
    let wanted = match lock {
        Lock::Alone => FlockOperation::NonBlockingLockExclusive,
        Lock::Shared => FlockOperation::NonBlockingLockShared,
    };
    let start = Instant::now();
    let mut told = false;
    loop {
        match flock(fd, wanted) {
            Ok(()) => return Ok(()),
            // A file system that has no locks leaves us as we were without them.
            Err(rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => return Ok(()),
            Err(rustix::io::Errno::WOULDBLOCK) if start.elapsed() < patience => {
                if !std::mem::replace(&mut told, true) {
                    tracing::info!("{}: waiting for {}", path.display(), holder(fd));
                }
                std::thread::sleep(Duration::from_millis(5));
            }
            Err(rustix::io::Errno::WOULDBLOCK) => {
                let (path, holder) = (path.to_owned(), holder(fd));
                return Err(Error::Held { path, holder, waited: patience });
            }
            Err(cause) => {
                return Err(Error::Open { path: path.to_owned(), cause: cause.into() });
            }
        }
    }
}

/// Who took the lock, as /proc/locks (proc_locks(5)) tells:
/// `1: FLOCK  ADVISORY  WRITE 4711 fd:01:131 0 EOF`.
fn holder(fd: &OwnedFd) -> String {
    let find = || {
        let inode = rustix::fs::fstat(fd).ok()?.st_ino.to_string();
        let locks = std::fs::read_to_string("/proc/locks").ok()?;
        locks.lines().find_map(|line| {
            let mut words = line.split_ascii_whitespace().skip(1);
            let is_flock = words.next() == Some("FLOCK");
            let pid: u32 = words.nth(2)?.parse().ok()?;
            let is_same = words.next()?.rsplit(':').next() == Some(inode.as_str());
            (is_flock && is_same).then_some(pid)
        })
    };
    match find() {
        Some(pid) if Path::new(&format!("/proc/{pid}")).exists() => format!("process {pid}"),
        Some(pid) => format!("process {pid}, which has ended, or its successor,"),
        None => "another process".to_owned(),
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
