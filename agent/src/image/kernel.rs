//! The kernel of the tiny image: its image without the decompressor where that
//! can be had, and the modules that the root disk and the network need.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use super::elf;
use super::{Doing, Error};

/// What a guest of ours needs before its root disk is there, and the power button.
const WANTED: [&str; 10] = [
    "virtio_pci",
    "virtio_blk",
    "crc32c_generic",
    "ext4",
    "virtio_net",
    "af_packet",
    "virtio_balloon",
    "virtio_rng",
    "button",
    "evdev",
];

/// The kernel's own compressors, by the magic of their output
/// (arch/x86/boot/compressed; scripts/Makefile.lib).
const COMPRESSORS: [(&[u8], &[&str]); 4] = [
    (b"\x02\x21\x4c\x18", &["lz4", "-dc"]),
    (b"\x28\xb5\x2f\xfd", &["zstd", "-dc"]),
    (b"\x1f\x8b", &["gzip", "-dc"]),
    (b"\xfd7zXZ", &["xz", "-dc"]),
];

/// Finds `boot/vmlinuz-*` below `tree`.
pub fn find_image(tree: &Path) -> Result<PathBuf, Error> {
    let boot = tree.join("boot");
    for entry in fs::read_dir(&boot).doing("list", &boot)? {
        let path = entry.doing("list", &boot)?.path();
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with("vmlinuz-")) {
            return Ok(path);
        }
    }
    Err(Error::Program {
        program: "dpkg-deb".into(),
        cause: "the kernel package has no vmlinuz".into(),
    })
}

/// The kernel as QEMU starts it fastest: the ELF image with a PVH entry when it
/// can be unpacked, else the image as it is. Unpacking it here once saves a
/// third of each boot under TCG.
pub fn unpacked(image: Vec<u8>) -> Vec<u8> {
    match payload(&image).and_then(decompress) {
        Some(elf) if elf::has_pvh_entry(&elf) => elf,
        _ => image,
    }
}

/// The compressed ELF inside a bzImage (Documentation/arch/x86/boot.rst:
/// setup_sects 0x1f1, payload_offset 0x248, payload_length 0x24c). Its last
/// four bytes are the length of the whole and belong to no compressor.
fn payload(image: &[u8]) -> Option<&[u8]> {
    if image.get(0x202..0x206) != Some(b"HdrS") {
        return None;
    }
    let word = |at: usize| -> Option<usize> {
        Some(u32::from_le_bytes(image.get(at..at + 4)?.try_into().ok()?) as usize)
    };
    let setup = usize::from(*image.get(0x1f1)?).max(1);
    let start = (setup + 1) * 512 + word(0x248)?;
    image.get(start..start.checked_add(word(0x24c)?)?.checked_sub(4)?)
}

fn decompress(bytes: &[u8]) -> Option<Vec<u8>> {
    let (_, command) = COMPRESSORS.iter().find(|(magic, _)| bytes.starts_with(magic))?;
    let mut child = Command::new(command[0])
        .args(&command[1..])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .ok()?;
    let mut stdin = child.stdin.take()?;
    let input = bytes.to_vec();
    let feeder = std::thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output().ok()?;
    let _ = feeder.join();
    output.status.success().then_some(output.stdout)
}

#[derive(Debug)]
pub struct Module {
    pub name: String,
    pub content: Vec<u8>,
}

/// The wanted modules and what they need, in an order that loads. What the
/// kernel has built in is left out.
pub fn modules(tree: &Path) -> Result<Vec<Module>, Error> {
    let files = module_files(tree)?;
    let mut done = Vec::<Module>::new();
    for name in WANTED {
        add(name, &files, &mut done)?;
    }
    Ok(done)
}

fn add(name: &str, files: &BTreeMap<String, PathBuf>, done: &mut Vec<Module>) -> Result<(), Error> {
    let Some(path) = files.get(name) else { return Ok(()) };
    if done.iter().any(|m| m.name == name) {
        return Ok(());
    }
    let content = fs::read(path).doing("read", path)?;
    let content = if elf::is_elf(&content) { Some(content) } else { decompress(&content) };
    let content = content.filter(|c| elf::is_elf(c)).ok_or_else(|| Error::Program {
        program: "kernel module".into(),
        cause: format!("cannot unpack {}; install `zstd` and `xz-utils`", path.display()),
    })?;
    for needed in elf::module_depends(&content) {
        add(&needed, files, done)?;
    }
    done.push(Module { name: name.to_owned(), content });
    Ok(())
}

/// Every module file below `lib/modules`, by its name with underscores.
fn module_files(tree: &Path) -> Result<BTreeMap<String, PathBuf>, Error> {
    let mut found = BTreeMap::new();
    let places = ["lib/modules", "usr/lib/modules"].map(|p| tree.join(p));
    let mut folders: Vec<PathBuf> = places.into_iter().filter(|p| p.is_dir()).collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).doing("list", &folder)? {
            let entry = entry.doing("list", &folder)?;
            let path = entry.path();
            let file_name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type().doing("look at", &path)?.is_dir() {
                folders.push(path);
            } else if let Some((stem, _)) = file_name.split_once(".ko") {
                found.insert(stem.replace('-', "_"), path);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_cannot_be_unpacked_is_taken_as_it_is() {
        for image in [vec![], b"not a kernel".to_vec(), {
            let mut torn = vec![0; 0x300];
            torn[0x202..0x206].copy_from_slice(b"HdrS");
            torn[0x248..0x24c].copy_from_slice(&u32::MAX.to_le_bytes());
            torn
        }] {
            assert_eq!(unpacked(image.clone()), image);
        }
    }
}
