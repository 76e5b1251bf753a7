//! Two questions to little-endian ELF64 files from distribution packages: does
//! a kernel offer the PVH entry, and which modules does a module need. Both
//! files come from signed packages; even so nothing here panics on a bad one.

/// Note type of the PVH entry point (xen/include/public/elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY).
const PHYS32_ENTRY: u32 = 18;
const PROGRAM_NOTE: u32 = 4;

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<usize> {
    let value = u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?);
    usize::try_from(value).ok()
}

pub fn is_elf(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF\x02\x01")
}

/// Whether QEMU can start this kernel without its decompressor.
pub fn has_pvh_entry(bytes: &[u8]) -> bool {
    is_elf(bytes) && notes(bytes).is_some_and(|mut n| n.any(holds_pvh))
}

fn notes(bytes: &[u8]) -> Option<impl Iterator<Item = &[u8]>> {
    let table = u64_at(bytes, 32)?;
    let entry_size = usize::from(u16_at(bytes, 54)?);
    let entries = usize::from(u16_at(bytes, 56)?);
    Some((0..entries).filter_map(move |i| {
        let at = table.checked_add(i * entry_size)?;
        if u32_at(bytes, at)? != PROGRAM_NOTE {
            return None;
        }
        let (offset, size) = (u64_at(bytes, at + 8)?, u64_at(bytes, at + 32)?);
        bytes.get(offset..offset.checked_add(size)?)
    }))
}

fn holds_pvh(mut note: &[u8]) -> bool {
    loop {
        let (Some(name), Some(content), Some(kind)) =
            (u32_at(note, 0), u32_at(note, 4), u32_at(note, 8))
        else {
            return false;
        };
        if kind == PHYS32_ENTRY && note.get(12..16) == Some(b"Xen\0") {
            return true;
        }
        let size =
            12 + (name as usize).next_multiple_of(4) + (content as usize).next_multiple_of(4);
        match note.get(size..) {
            Some(rest) => note = rest,
            None => return false,
        }
    }
}

/// The names that a kernel module's `.modinfo` lists as `depends=a,b`.
pub fn module_depends(bytes: &[u8]) -> Vec<String> {
    let key = b"depends=";
    let starts = bytes.windows(key.len() + 1).position(|w| w[0] == 0 && &w[1..] == key);
    let Some(start) = starts.map(|s| s + 1 + key.len()) else { return Vec::new() };
    let value = bytes[start..].split(|b| *b == 0).next().unwrap_or_default();
    let text = String::from_utf8_lossy(value);
    text.split(',').filter(|n| !n.is_empty()).map(|n| n.replace('-', "_")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_names_what_it_needs() {
        assert_eq!(
            module_depends(b"x\0license=GPL\0depends=virtio,net-failover\0name=y\0"),
            ["virtio", "net_failover"]
        );
        assert_eq!(module_depends(b"\0depends=\0"), Vec::<String>::new());
        assert_eq!(module_depends(b"nothing"), Vec::<String>::new());
    }

    #[test]
    fn a_torn_file_has_no_pvh_entry() {
        let mut bytes = vec![0xff; 64];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        assert!(!has_pvh_entry(&bytes));
        assert!(!has_pvh_entry(b"\x7fELF\x02\x01"));
    }
}
