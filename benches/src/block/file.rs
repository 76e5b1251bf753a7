//! The file that every contender serves: fully written, once, and brought into
//! the same state before each measurement. And another like it, for who stands beside.

use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};
use nix::sys::statfs::{TMPFS_MAGIC, statfs};
use tempfile::TempDir;

/// Written and read in pieces of this size: large enough that the calls cost
/// nothing beside the disk.
const PIECE_BYTES: usize = 1 << 20;

#[derive(Debug)]
pub struct DataFile {
    file: File,
    path: PathBuf,
    beside: File,
    /// Holds the sockets too. Removed when dropped.
    directory: TempDir,
}

impl DataFile {
    /// Writes `size_mib` of bytes that no disk can compress, and syncs them.
    pub fn create(parent: &Path, size_mib: u64) -> anyhow::Result<Self> {
        let kind = statfs(parent).with_context(|| format!("{}: statfs", parent.display()))?;
        anyhow::ensure!(
            kind.filesystem_type() != TMPFS_MAGIC,
            "{}: this is memory (tmpfs): name a folder on a disk with --directory",
            parent.display()
        );
        let directory = tempfile::Builder::new().prefix("hostplane-bench-").tempdir_in(parent)?;
        let path = directory.path().join("data");
        let file = File::options().read(true).write(true).create_new(true).open(&path)?;
        fill(&file, size_mib).with_context(|| format!("{}: write", path.display()))?;
        let path_beside = beside(&path);
        let beside = File::options().write(true).create_new(true).open(&path_beside)?;
        fill(&beside, size_mib).with_context(|| format!("{}: write", path_beside.display()))?;
        Ok(Self { file, path, beside, directory })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Synced, and none of it in the page cache: for those who use O_DIRECT.
    pub fn cool(&self) -> anyhow::Result<()> {
        for file in [&self.file, &self.beside] {
            file.sync_all().context("data file: sync")?;
            posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED)
                .context("data file: drop from the page cache")?;
        }
        Ok(())
    }

    /// Synced, and all of it in the page cache: for those who serve from there.
    pub fn warm(&self) -> anyhow::Result<()> {
        self.cool()?;
        let mut file = File::open(&self.path)?;
        let mut piece = vec![0; PIECE_BYTES];
        while file.read(&mut piece).context("data file: read")? > 0 {}
        Ok(())
    }
}

/// Where the other file lies.
pub fn beside(path: &Path) -> PathBuf {
    path.with_extension("beside")
}

fn fill(mut file: &File, size_mib: u64) -> std::io::Result<()> {
    let mut piece = vec![0; PIECE_BYTES];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for _ in 0..size_mib {
        for word in piece.chunks_exact_mut(8) {
            state = xorshift(state);
            word.copy_from_slice(&state.to_le_bytes());
        }
        file.write_all(&piece)?;
    }
    file.sync_all()
}

/// Marsaglia's xorshift64, shifts 13, 7, 17.
pub fn xorshift(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ (state << 17)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_is_written_to_its_last_byte_and_goes_with_its_owner() {
        let parent = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let data = DataFile::create(parent.path(), 2).unwrap();
        for path in [data.path(), &beside(data.path())] {
            let bytes = std::fs::read(path).unwrap();
            assert_eq!(bytes.len(), 2 << 20);
            assert_ne!(bytes[bytes.len() - 8..], [0; 8]);
        }
        data.cool().unwrap();
        data.warm().unwrap();
        let path = data.path().to_owned();
        drop(data);
        assert!(!path.exists());
    }
}
