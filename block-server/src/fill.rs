//! Makes a volume's file, with the bytes of another where one is named.
//!
//! The file is made under another name, synced, and moved into place: a crash
//! leaves either nothing or the whole. Where the file system shares blocks
//! (XFS, btrfs) nothing is copied; elsewhere only what is not a hole.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::catalogue::{advice, sync_parent};

/// Bytes between two looks at whether the copy is still wanted.
const STRETCH_BYTES: usize = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: {deed}: {cause}{}", path.display(), advice(cause))]
    Failed { path: PathBuf, deed: &'static str, cause: io::Error },
    #[error("{}: it holds {found} bytes, more than the volume's {size}", path.display())]
    TooLarge { path: PathBuf, found: u64, size: u64 },
    #[error("the volume is no longer wanted")]
    Cancelled,
}

/// The name that a file has until it is whole.
pub fn pending(path: &Path) -> PathBuf {
    path.with_extension("filling")
}

/// Makes `path` with `size` bytes that begin as `source`. Blocks until done.
pub fn fill(
    path: &Path,
    size: u64,
    source: Option<&Path>,
    cancelled: &AtomicBool,
) -> Result<(), Error> {
    let pending = pending(path);
    let result = make(&pending, size, source, cancelled).and_then(|()| {
        let failed = |deed| move |cause| Error::Failed { path: path.to_owned(), deed, cause };
        std::fs::rename(&pending, path).map_err(failed("move into place"))?;
        sync_parent(path).map_err(failed("sync its folder"))
    });
    if result.is_err() {
        let _ = std::fs::remove_file(&pending);
    }
    result
}

fn make(
    pending: &Path,
    size: u64,
    source: Option<&Path>,
    cancelled: &AtomicBool,
) -> Result<(), Error> {
    let failed = |deed| move |cause| Error::Failed { path: pending.to_owned(), deed, cause };
    let target = OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(pending)
        .map_err(failed("create"))?;
    if let Some(path) = source {
        let of_source = |deed| move |cause| Error::Failed { path: path.to_owned(), deed, cause };
        let source = File::open(path).map_err(of_source("open"))?;
        let found = source.metadata().map_err(of_source("look at"))?.len();
        if found > size {
            return Err(Error::TooLarge { path: path.to_owned(), found, size });
        }
        if rustix::fs::ioctl_ficlone(&target, &source).is_err() {
            copy(&source, &target, found, cancelled).map_err(|cause| match cause {
                None => Error::Cancelled,
                Some(cause) if is_full(&cause) => failed("write")(cause),
                Some(cause) => of_source("copy")(cause),
            })?;
        }
    }
    target.set_len(size).map_err(failed("grow"))?;
    target.sync_all().map_err(failed("sync"))
}

/// Then it is the target that has no room, not the source.
fn is_full(cause: &io::Error) -> bool {
    matches!(cause.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

/// Copies what is not a hole. `None` as error: cancelled.
fn copy(
    source: &File,
    target: &File,
    length: u64,
    cancelled: &AtomicBool,
) -> Result<(), Option<io::Error>> {
    let whole = crate::engine::extents_of_fd(source.as_raw_fd(), 0, length, usize::MAX)?;
    let mut at = 0;
    for (extent, hole) in whole {
        if !hole {
            copy_stretch(source, target, at, at + extent, cancelled)?;
        }
        at += extent;
    }
    Ok(())
}

fn copy_stretch(
    source: &File,
    target: &File,
    start: u64,
    end: u64,
    cancelled: &AtomicBool,
) -> Result<(), Option<io::Error>> {
    let (mut from, mut to) = (start, start);
    while from < end {
        if cancelled.load(Ordering::Relaxed) {
            return Err(None);
        }
        let count = ((end - from) as usize).min(STRETCH_BYTES);
        match rustix::fs::copy_file_range(source, Some(&mut from), target, Some(&mut to), count) {
            Ok(0) => {
                let short = io::Error::new(io::ErrorKind::UnexpectedEof, "it became shorter");
                return Err(Some(short));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            // Two file systems that cannot do it between them.
            Err(
                rustix::io::Errno::XDEV | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::INVAL,
            ) => {
                let count = plain_copy(source, target, from, count)?;
                (from, to) = (from + count, to + count);
            }
            Err(error) => return Err(Some(error.into())),
        }
    }
    Ok(())
}

fn plain_copy(source: &File, target: &File, at: u64, count: usize) -> io::Result<u64> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; count.min(1 << 20)];
    source.read_exact_at(&mut buffer, at)?;
    target.write_all_at(&buffer, at)?;
    Ok(buffer.len() as u64)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{FileExt, MetadataExt};

    use super::*;

    #[test]
    fn a_volume_begins_as_its_source_grown_and_stays_sparse() {
        let folder = tempfile::tempdir().unwrap();
        let (source, path) = (folder.path().join("s"), folder.path().join("v.img"));
        let file = File::create(&source).unwrap();
        file.write_all_at(b"head", 0).unwrap();
        file.write_all_at(b"tail", (8 << 20) - 4).unwrap();
        fill(&path, 32 << 20, Some(&source), &AtomicBool::new(false)).unwrap();
        let made = std::fs::read(&path).unwrap();
        assert_eq!(made.len(), 32 << 20);
        assert_eq!((&made[..4], &made[(8 << 20) - 4..8 << 20]), (&b"head"[..], &b"tail"[..]));
        assert!(made[4..(8 << 20) - 4].iter().chain(&made[8 << 20..]).all(|b| *b == 0));
        assert!(std::fs::metadata(&path).unwrap().blocks() * 512 < 1 << 20, "it is sparse");
        assert!(!pending(&path).exists());
    }

    #[test]
    fn a_source_that_is_missing_or_too_large_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let (source, path) = (folder.path().join("s"), folder.path().join("v.img"));
        let never = AtomicBool::new(false);
        assert!(fill(&path, 4096, Some(&source), &never).is_err());
        std::fs::write(&source, vec![1; 8192]).unwrap();
        assert!(matches!(fill(&path, 4096, Some(&source), &never), Err(Error::TooLarge { .. })));
        assert!(matches!(
            fill(&path, 8192, Some(&source), &AtomicBool::new(true)),
            Err(Error::Cancelled) | Ok(())
        ));
        assert!(!pending(&path).exists());
    }
}
