//! Takes a disk that someone else made: raw or qcow2, booted by its own loader.
//!
//! The file may be hostile. Its format is read from its header here and told to
//! `qemu-img`, which never guesses; a header that points at another file
//! (backing or external data) is refused before anything opens it.
//!
//! ```text
//!   qcow2 header, big-endian (docs/interop/qcow2.txt):
//!   0 "QFI\xfb" | 4 version u32 | 8 backing file offset u64 | … | 24 size u64 | 32 crypt u32 | … | 72 incompatible u64
//! ```

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::Command;

use super::{Doing, Error, Manifest, Store, run};

/// A larger disk is more likely a mistake or an attack than an image.
const SIZE_BYTES_MAX: u64 = 256 << 30;
const HEADER_BYTES: usize = 104;
/// Incompatible feature bits: 0 dirty, 1 corrupt, 2 external data file, 3 compression type, 4 extended L2.
const INCOMPATIBLE_CORRUPT: u64 = 1 << 1;
const INCOMPATIBLE_DATA_FILE: u64 = 1 << 2;

/// Formats that are recognised in order to be refused by name.
const FOREIGN: [(&[u8], &str); 6] = [
    (b"KDMV", "VMDK"),
    (b"# Disk DescriptorFile", "VMDK"),
    (b"vhdxfile", "VHDX"),
    (b"conectix", "VHD"),
    (b"QED\0", "QED"),
    (b"LUKS", "LUKS"),
];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

impl Format {
    const fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

pub fn import(store: &Store, file: &Path, name: &str) -> Result<Manifest, Error> {
    let refused = |cause: String| Error::Refused { name: name.to_owned(), cause };
    let metadata = std::fs::metadata(file).doing("look at", file)?;
    if !metadata.is_file() {
        return Err(refused(format!("{} is not a file", file.display())));
    }
    let mut header = Vec::new();
    File::open(file)
        .and_then(|f| f.take(HEADER_BYTES as u64).read_to_end(&mut header))
        .doing("read", file)?;
    let (format, size) = inspect(&header, metadata.len()).map_err(refused)?;
    if size == 0 || size > SIZE_BYTES_MAX {
        return Err(refused(format!(
            "its disk has {size} bytes; at most {SIZE_BYTES_MAX} are taken"
        )));
    }
    store.put(name, |folder| {
        let root = folder.join("root.raw");
        let mut command = Command::new("qemu-img");
        command.args(["convert", "-f", format.name(), "-O", "raw", "-S", "4k", "--"]);
        run(command.arg(std::path::absolute(file).doing("find", file)?).arg(&root))?;
        let disk = File::options().write(true).open(&root).doing("open", &root)?;
        disk.set_len(size.next_multiple_of(4096)).doing("size", &root)?;
        Ok(None)
    })
}

/// What the header says: the format and the size of the disk within.
fn inspect(header: &[u8], file_bytes: u64) -> Result<(Format, u64), String> {
    if let Some((_, format)) = FOREIGN.iter().find(|(magic, _)| header.starts_with(magic)) {
        return Err(format!("{format} is not taken; convert it to qcow2 or raw first"));
    }
    if !header.starts_with(b"QFI\xfb") {
        return Ok((Format::Raw, file_bytes));
    }
    let word = |at: usize, bytes: usize| -> Result<u64, String> {
        let field = header.get(at..at + bytes).ok_or("its qcow2 header is torn")?;
        Ok(field.iter().fold(0, |value, b| value << 8 | u64::from(*b)))
    };
    let version = word(4, 4)?;
    if version != 2 && version != 3 {
        return Err(format!("qcow2 version {version} is not known"));
    }
    if word(8, 8)? != 0 {
        return Err("it stands on a backing file; flatten it first (`qemu-img convert`)".into());
    }
    if word(32, 4)? != 0 {
        return Err("it is encrypted".into());
    }
    if version == 3 {
        let incompatible = word(72, 8)?;
        if incompatible & INCOMPATIBLE_DATA_FILE != 0 {
            return Err("it keeps its data in another file; flatten it first".into());
        }
        if incompatible & INCOMPATIBLE_CORRUPT != 0 {
            return Err("it is marked as corrupt".into());
        }
    }
    Ok((Format::Qcow2, word(24, 8)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn qcow2(change: impl Fn(&mut Vec<u8>)) -> Vec<u8> {
        let mut header = vec![0; HEADER_BYTES];
        header[..4].copy_from_slice(b"QFI\xfb");
        header[7] = 3;
        header[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        change(&mut header);
        header
    }

    #[test]
    fn a_plain_qcow2_and_a_raw_disk_are_taken() {
        assert_eq!(inspect(&qcow2(|_| {}), 9), Ok((Format::Qcow2, 1 << 30)));
        assert_eq!(inspect(&[0xeb, 0x63, 0x90], 512), Ok((Format::Raw, 512)));
    }

    #[test]
    fn a_disk_that_points_at_another_file_is_refused() {
        assert!(inspect(&qcow2(|h| h[15] = 104), 9).unwrap_err().contains("backing"));
        assert!(inspect(&qcow2(|h| h[79] = 4), 9).unwrap_err().contains("another file"));
        assert!(inspect(&qcow2(|h| h[35] = 2), 9).unwrap_err().contains("encrypted"));
        assert!(inspect(&qcow2(|h| h[7] = 9), 9).is_err());
        assert!(inspect(b"QFI\xfb\0\0", 9).unwrap_err().contains("torn"));
        assert!(inspect(b"KDMV....", 9).unwrap_err().contains("VMDK"));
    }

    #[test]
    fn a_qcow2_file_becomes_the_same_bytes() {
        if Command::new("qemu-img").arg("--version").output().is_err() {
            sim::skip("a_qcow2_file_becomes_the_same_bytes", "qemu-img is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("images")).unwrap();
        let raw = dir.path().join("in.raw");
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i / 100) as u8).collect();
        std::fs::write(&raw, &bytes).unwrap();
        let qcow2 = dir.path().join("in.qcow2");
        run(Command::new("qemu-img")
            .args(["convert", "-f", "raw", "-O", "qcow2"])
            .args([&raw, &qcow2]))
        .unwrap();
        for (file, name) in [(&raw, "a"), (&qcow2, "b")] {
            import(&store, file, name).unwrap();
            let back = std::fs::read(store.root_of(name).unwrap()).unwrap();
            assert_eq!(back[..bytes.len()], bytes);
            assert_eq!(back.len() % 4096, 0);
        }
        let child = dir.path().join("child.qcow2");
        run(Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"])
            .args([&qcow2, &child]))
        .unwrap();
        assert!(matches!(import(&store, &child, "c"), Err(Error::Refused { .. })));
    }
}
