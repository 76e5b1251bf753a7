//! The files of a flow log: `flow.log`, and its predecessors `flow.log.1` and on.
//! They never hold more than was allowed, whatever is written.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use rpc::dataplane::FlowLog;

pub struct Files {
    directory: PathBuf,
    bytes_max: u64,
    kept: u32,
}

impl Files {
    pub fn new(log: &FlowLog) -> Self {
        Self {
            directory: log.directory.clone(),
            bytes_max: log.file_bytes_max,
            kept: log.files_kept,
        }
    }

    /// Appends lines, each whole in one file.
    pub fn append(&self, lines: &[String]) -> io::Result<()> {
        fs::create_dir_all(&self.directory)?;
        let mut text = String::new();
        let mut length = fs::metadata(self.path(0)).map_or(0, |m| m.len());
        for line in lines {
            let next = line.len() as u64 + 1;
            if length + text.len() as u64 + next > self.bytes_max {
                self.write(&text)?;
                text.clear();
                self.rotate()?;
                length = 0;
            }
            // Longer than a whole file may be: it has no place anywhere.
            if next <= self.bytes_max {
                text.push_str(line);
                text.push('\n');
            }
        }
        self.write(&text)
    }

    fn write(&self, text: &str) -> io::Result<()> {
        let mut file = File::options().create(true).append(true).open(self.path(0))?;
        file.write_all(text.as_bytes())
    }

    fn path(&self, n: u32) -> PathBuf {
        match n {
            0 => self.directory.join("flow.log"),
            n => self.directory.join(format!("flow.log.{n}")),
        }
    }

    /// Each file takes its predecessor's place; the last one goes.
    fn rotate(&self) -> io::Result<()> {
        for n in (0..self.kept).rev() {
            absent_is_fine(fs::rename(self.path(n), self.path(n + 1)))?;
        }
        if self.kept == 0 { absent_is_fine(fs::remove_file(self.path(0))) } else { Ok(()) }
    }
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Bytes of all files of a log.
pub fn size(directory: &Path) -> io::Result<u64> {
    fs::read_dir(directory)?.try_fold(0, |sum, entry| Ok(sum + entry?.metadata()?.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_files_never_hold_more_than_was_allowed_and_keep_the_newest() {
        let dir = tempfile::tempdir().unwrap();
        let files = Files { directory: dir.path().join("log"), bytes_max: 100, kept: 2 };
        for n in 0..50 {
            let lines: Vec<String> = (0..3).map(|i| format!("line {n:03} {i}")).collect();
            files.append(&lines).unwrap();
            assert!(size(&files.directory).unwrap() <= 300, "at {n}");
        }
        let all: String =
            [2, 1, 0].map(|n| fs::read_to_string(files.path(n)).unwrap_or_default()).concat();
        assert!(all.ends_with("line 049 2\n"), "{all}");
        assert!(all.lines().all(|l| l.len() == 10), "every line is whole: {all}");
        files.append(&["x".repeat(200)]).unwrap();
        assert!(size(&files.directory).unwrap() <= 300);
        assert!(!files.path(3).exists());
    }
}
