//! Writes a cpio archive of the kind that Linux takes as an initial RAM disk
//! ("newc": Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! ```text
//!   entry = "070701" 13 × 8 hexadecimal digits (inode, mode, uid, gid, links, mtime,
//!           size, dev major, minor, rdev major, minor, name length with its NUL, check)
//!           name NUL, zeros up to a multiple of 4, content, zeros up to a multiple of 4
//!   archive = entries, then one named "TRAILER!!!"
//! ```

const MODE_FOLDER: u32 = 0o040_755;
const MODE_FILE: u32 = 0o100_755;

#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

impl Archive {
    pub fn folder(&mut self, name: &str) {
        self.entry(name, MODE_FOLDER, &[]);
    }

    pub fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, MODE_FILE, content);
    }

    pub fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entries += 1;
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        assert_eq!(size as usize, content.len(), "{name} does not fit a cpio entry");
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_has_the_published_layout() {
        let mut archive = Archive::default();
        archive.file("init", b"hello");
        let bytes = archive.finish();
        assert_eq!(bytes.len() % 4, 0);
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[54..62], b"00000005");
        assert_eq!(&bytes[110..115], b"init\0");
        assert_eq!(&bytes[116..121], b"hello");
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }
}
