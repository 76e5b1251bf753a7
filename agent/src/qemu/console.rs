//! Logs that a guest can write without end, kept short.
//!
//! QEMU appends what the guest's serial port says to `console.log`. When that has
//! grown past [`BYTES_MAX`] its tail is kept as `console.old` and it begins anew.
//! While no agent runs, the file-size limit that QEMU was born with stops it at
//! [`super::confine::FILE_BYTES_MAX`]: what the guest says then is lost, and
//! nothing else happens to it.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// When a log is cut.
pub const BYTES_MAX: u64 = 1 << 20;

/// What `GetConsoleOutput` gives: EC2's own bound.
pub const TAIL_BYTES: u64 = 64 << 10;

pub fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(0o600).open(path)
}

/// QEMU appends, so it goes on at the new beginning. What it writes between the
/// copy and the cut is lost: some bytes of a log that was flooded.
pub fn trim(path: &Path) -> io::Result<()> {
    match fs::metadata(path) {
        Ok(m) if m.len() <= BYTES_MAX => return Ok(()),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    }
    let pending = path.with_extension("new");
    fs::write(&pending, tail(path, TAIL_BYTES)?)?;
    fs::rename(&pending, path.with_extension("old"))?;
    OpenOptions::new().write(true).open(path)?.set_len(0)
}

/// The last [`TAIL_BYTES`] that the guest said, across a cut.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut all = tail(&path.with_extension("old"), TAIL_BYTES)?;
    all.extend(tail(path, TAIL_BYTES)?);
    let surplus = all.len().saturating_sub(TAIL_BYTES as usize);
    all.drain(..surplus);
    Ok(all)
}

fn tail(path: &Path, bytes: u64) -> io::Result<Vec<u8>> {
    let mut file = match File::open(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
    let mut content = Vec::new();
    file.take(bytes).read_to_end(&mut content)?;
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn a_flooded_log_is_cut_and_its_tail_stays_readable() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut log = append(&path).unwrap();
        log.write_all(&vec![b'x'; BYTES_MAX as usize]).unwrap();
        log.write_all(b"before the cut\n").unwrap();
        trim(&path).unwrap();
        log.write_all(b"after the cut\n").unwrap();
        assert!(fs::metadata(&path).unwrap().len() < 100);
        let all = read(&path).unwrap();
        assert_eq!(all.len(), TAIL_BYTES as usize);
        assert!(all.ends_with(b"before the cut\nafter the cut\n"));
    }
}
