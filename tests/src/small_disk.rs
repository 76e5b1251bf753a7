//! A file system so small that it can be filled: ext4 in a file, on a loop device.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tempfile::TempDir;

use crate::program;

const BOUND: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub struct SmallDisk {
    mount: TempDir,
    _file: TempDir,
}

impl SmallDisk {
    pub fn new(size_mib: u32) -> anyhow::Result<Self> {
        let file = tempfile::tempdir()?;
        let mount = tempfile::tempdir()?;
        let image = file.path().join("disk");
        std::fs::File::create(&image)?.set_len(u64::from(size_mib) << 20)?;
        program::output(
            Command::new("mke2fs").args(["-q", "-t", "ext4", "-m", "0"]).arg(&image),
            BOUND,
        )?;
        // `mount` frees the loop device itself when the file system goes.
        program::output(
            Command::new("mount").args(["-o", "loop"]).arg(&image).arg(mount.path()),
            BOUND,
        )?;
        std::fs::set_permissions(
            mount.path(),
            std::os::unix::fs::PermissionsExt::from_mode(0o755),
        )?;
        Ok(Self { mount, _file: file })
    }

    pub fn path(&self) -> &Path {
        self.mount.path()
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = program::output(Command::new("umount").arg(self.mount.path()), BOUND) {
            eprintln!("{error:#}");
        }
    }
}
