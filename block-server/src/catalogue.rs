//! What a daemon must know again after kill -9: its volumes and exports.
//! The format is docs/formats/block-catalogue.md.
//!
//! One small file, replaced as a whole: written beside, synced, exchanged, and the
//! folder synced. A reader finds the old or the new, never a mixture. A change is
//! durable before anyone is told of it.
//!
//! The replaced file stays as the next one's room: on a file system that is full a
//! change still finds where to be written, and above all the one that makes room
//! (docs/adr/0079).

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use model::{Limits, VolumeId};
use rpc::block::Quality;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

/// Of the format. A daemon refuses a newer one rather than lose what it says.
const VERSION: u32 = 2;

/// The one before, without a digest; it is read, and written as the present one.
const VERSION_PLAIN: u32 = 1;

/// Both files are so many bytes long, or a multiple: the text, then blank lines.
const ROOM: u64 = 16 << 10;

/// Of these are left at least; a deletion's records take a few.
const ROOM_MIN: u64 = 4 << 10;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("catalogue {}: {deed}: {cause}{}", path.display(), advice(cause))]
    Unavailable { path: PathBuf, deed: &'static str, cause: io::Error },
    #[error("catalogue {}: it cannot be read: {cause}; it is left as it is", path.display())]
    Damaged { path: PathBuf, cause: String },
}

/// How far a volume has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Stage {
    /// Its file is being made; begins anew after a crash.
    Filling,
    Ready,
    Failed(String),
    /// Its file is being removed; goes on after a crash.
    Deleting,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    pub size_bytes: u64,
    pub source: Option<PathBuf>,
    pub stage: Stage,
    /// The greatest generation of any writer.
    pub generation: u64,
    /// How fast it may be; nothing is said in records from before there were limits.
    #[serde(default)]
    pub quality: Quality,
    /// Until when it is quiesced, in milliseconds since the epoch; a time that is
    /// over says nothing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub held_until_ms: Option<u64>,
}

impl Volume {
    /// What was recorded was checked; a figure that is lawful no more limits nothing.
    pub fn limits(&self) -> Limits {
        self.quality.limits(self.size_bytes).unwrap_or(Limits::none())
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    pub volume: VolumeId,
    pub read_only: bool,
    pub generation: u64,
    pub owner_uid: Option<u32>,
    /// Connections are refused until somebody undoes it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drained: bool,
}

/// The file: what it says, and the digest of those very bytes. A flipped bit in a
/// generation would let a fenced writer in; it must be seen.
#[derive(Serialize, Deserialize)]
struct Sealed<'a> {
    version: u32,
    sha256: String,
    #[serde(borrow)]
    catalogue: &'a RawValue,
}

/// What every version begins with.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Content {
    volumes: BTreeMap<VolumeId, Volume>,
    exports: BTreeMap<String, Export>,
}

#[derive(Debug)]
pub struct Catalogue {
    path: PathBuf,
    content: Content,
}

impl Catalogue {
    /// Reads the catalogue; a missing one is empty.
    pub fn open(path: PathBuf) -> Result<Self, Error> {
        let damaged = |cause: String| Error::Damaged { path: path.clone(), cause };
        let content = match std::fs::read(&path) {
            Ok(bytes) => unseal(&bytes).map_err(damaged)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => Content::default(),
            Err(cause) => return Err(Error::Unavailable { path, deed: "read", cause }),
        };
        Ok(Self { path, content })
    }

    pub fn volumes(&self) -> &BTreeMap<VolumeId, Volume> {
        &self.content.volumes
    }

    pub fn exports(&self) -> &BTreeMap<String, Export> {
        &self.content.exports
    }

    /// Writes a volume's record; durable when this returns. On failure all is as before.
    pub fn put_volume(&mut self, id: VolumeId, volume: Volume) -> Result<(), Error> {
        self.change(|content| {
            content.volumes.insert(id, volume);
        })
    }

    pub fn remove_volume(&mut self, id: VolumeId) -> Result<(), Error> {
        self.change(|content| {
            content.volumes.remove(&id);
        })
    }

    /// Writes an export's record, and its generation as its volume's where it writes.
    pub fn put_export(&mut self, name: &str, export: Export) -> Result<(), Error> {
        self.change(|content| {
            if let Some(volume) = content.volumes.get_mut(&export.volume)
                && !export.read_only
            {
                volume.generation = volume.generation.max(export.generation);
            }
            content.exports.insert(name.to_owned(), export);
        })
    }

    pub fn remove_export(&mut self, name: &str) -> Result<(), Error> {
        self.change(|content| {
            content.exports.remove(name);
        })
    }

    fn change(&mut self, edit: impl FnOnce(&mut Content)) -> Result<(), Error> {
        let mut next = self.content.clone();
        edit(&mut next);
        if next != self.content {
            self.write(&next)?;
            self.content = next;
        }
        Ok(())
    }

    fn write(&self, content: &Content) -> Result<(), Error> {
        let failed =
            |deed| move |cause| Error::Unavailable { path: self.path.clone(), deed, cause };
        let bytes = seal(content).map_err(|e| failed("write")(io::Error::other(e)))?;
        let pending = self.path.with_extension("new");
        let file = open_room(&pending).map_err(failed("create"))?;
        fill_room(&file, &bytes).map_err(failed("write"))?;
        file.sync_all().map_err(failed("sync"))?;
        exchange(&pending, &self.path).map_err(failed("replace"))?;
        sync_parent(&self.path).map_err(failed("sync its folder"))?;
        // The first time nothing was replaced. Without room of its own the next
        // change takes what there is.
        if let Err(error) = reserve(&pending, bytes.len() as u64) {
            tracing::warn!("{}: no room set aside for a full disk: {error}", pending.display());
        }
        Ok(())
    }
}

/// What an operator can do about an error of a file.
pub fn advice(cause: &io::Error) -> &'static str {
    match cause.kind() {
        io::ErrorKind::StorageFull => "; make room on its file system and ask again",
        io::ErrorKind::QuotaExceeded => "; raise its quota or make room, and ask again",
        _ => "",
    }
}

/// What it holds is kept: that is the room.
fn open_room(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create(true).truncate(false).open(path)
}

fn length_for(text: u64) -> u64 {
    (text + ROOM_MIN).next_multiple_of(ROOM)
}

/// Over what the file holds already, this needs none of the file system's room.
fn fill_room(file: &File, text: &[u8]) -> io::Result<()> {
    let (end, length) = (text.len() as u64, length_for(text.len() as u64));
    let held = file.metadata()?.len().clamp(end, length);
    let blanks = vec![b'\n'; (length - end) as usize];
    let (old, new) = blanks.split_at((held - end) as usize);
    file.write_all_at(text, 0)?;
    file.write_all_at(old, end)?;
    file.set_len(held)?;
    if let Err(error) = file.write_all_at(new, held) {
        tracing::debug!("catalogue: no room set aside for its growth: {error}");
    }
    Ok(())
}

/// The file of the next change, where there is none.
fn reserve(pending: &Path, text: u64) -> io::Result<()> {
    if pending.exists() {
        return Ok(());
    }
    let file = open_room(pending)?;
    file.write_all_at(&vec![b'\n'; length_for(text) as usize], 0)?;
    // What is only promised by the page cache may be refused when it is needed.
    file.sync_all()
}

/// Each file gets the other's name, where the file system can and both are there.
fn exchange(pending: &Path, path: &Path) -> io::Result<()> {
    use rustix::fs::{CWD, RenameFlags, renameat_with};
    use rustix::io::Errno;
    match renameat_with(CWD, pending, CWD, path, RenameFlags::EXCHANGE) {
        Err(Errno::NOENT | Errno::INVAL | Errno::NOSYS) => std::fs::rename(pending, path),
        done => Ok(done?),
    }
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn seal(content: &Content) -> serde_json::Result<Vec<u8>> {
    let text = serde_json::to_string_pretty(content)?;
    let sha256 = digest(text.as_bytes());
    let catalogue = &*RawValue::from_string(text)?;
    serde_json::to_vec_pretty(&Sealed { version: VERSION, sha256, catalogue })
}

fn unseal(bytes: &[u8]) -> Result<Content, String> {
    let told = |e: serde_json::Error| e.to_string();
    let Versioned { version } = serde_json::from_slice(bytes).map_err(told)?;
    match version {
        VERSION => {
            let sealed: Sealed<'_> = serde_json::from_slice(bytes).map_err(told)?;
            let found = digest(sealed.catalogue.get().as_bytes());
            if found != sealed.sha256 {
                return Err(format!("its digest is {found}, and it says {}", sealed.sha256));
            }
            serde_json::from_str(sealed.catalogue.get()).map_err(told)
        }
        VERSION_PLAIN => serde_json::from_slice(bytes).map_err(told),
        _ => Err(format!("its version is {version}")),
    }
}

/// Makes a rename or a removal in this file's folder durable.
pub fn sync_parent(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn volume() -> Volume {
        Volume {
            size_bytes: 4096,
            source: None,
            stage: Stage::Ready,
            generation: 1,
            quality: Quality::default(),
            held_until_ms: None,
        }
    }

    #[test]
    fn what_was_written_is_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalogue.json");
        let id = VolumeId::from_random(7);
        let (generation, owner_uid) = (9, Some(3));
        let export = Export { volume: id, read_only: false, generation, owner_uid, drained: true };
        let mut catalogue = Catalogue::open(path.clone()).unwrap();
        catalogue.put_volume(id, volume()).unwrap();
        catalogue.put_export("a", export.clone()).unwrap();
        let again = Catalogue::open(path).unwrap();
        assert_eq!(again.exports()["a"], export);
        assert_eq!(again.volumes()[&id].generation, 9, "the writer raised it");
    }

    #[test]
    fn a_damaged_or_newer_catalogue_is_refused_and_kept() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalogue.json");
        for bytes in [&b"{"[..], br#"{"version":3,"volumes":{},"exports":{}}"#] {
            std::fs::write(&path, bytes).unwrap();
            assert!(matches!(Catalogue::open(path.clone()), Err(Error::Damaged { .. })));
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
    }

    #[test]
    fn one_of_the_former_version_is_read_and_becomes_one_of_this() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalogue.json");
        let export = r#"{"volume":"vol-00000000000000007","read_only":true,"generation":2,"owner_uid":null}"#;
        std::fs::write(
            &path,
            format!(r#"{{"version":1,"volumes":{{}},"exports":{{"a":{export}}}}}"#),
        )
        .unwrap();
        let mut catalogue = Catalogue::open(path.clone()).unwrap();
        assert_eq!(catalogue.exports()["a"].generation, 2);
        catalogue.remove_export("a").unwrap();
        assert!(std::fs::read_to_string(&path).unwrap().contains("\"version\": 2"));
        assert!(Catalogue::open(path).unwrap().exports().is_empty());
    }

    /// Every flip is seen, but where it changes nothing that is said (one blank for another).
    #[test]
    fn no_flipped_bit_in_a_catalogue_is_believed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalogue.json");
        let mut catalogue = Catalogue::open(path.clone()).unwrap();
        for number in 1..6 {
            let id = VolumeId::from_random(number);
            let source = (number % 2 == 0).then(|| PathBuf::from("/images/tiny.raw"));
            catalogue.put_volume(id, Volume { source, ..volume() }).unwrap();
            let export = Export {
                volume: id,
                read_only: number == 3,
                generation: number as u64 * 77,
                owner_uid: Some(964),
                drained: number == 4,
            };
            catalogue.put_export(&format!("att-{number}"), export).unwrap();
        }
        let whole = std::fs::read(&path).unwrap();
        let (mut refused, mut flips) = (0, 0);
        for at in 0..whole.len() {
            for bit in 0..8 {
                let mut bytes = whole.clone();
                bytes[at] ^= 1 << bit;
                flips += 1;
                match unseal(&bytes) {
                    Ok(content) => assert_eq!(content, catalogue.content, "bit {bit} of byte {at}"),
                    Err(_) => refused += 1,
                }
            }
        }
        eprintln!("{flips} flips, {refused} refused");
        assert!(flips >= 10_000 && refused > flips * 99 / 100, "{flips} flips, {refused} refused");
    }

    #[test]
    fn the_next_change_has_its_room_from_the_first_on() {
        use std::os::unix::fs::MetadataExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("catalogue.json");
        let mut catalogue = Catalogue::open(path.clone()).unwrap();
        for number in 1..200 {
            catalogue.put_volume(VolumeId::from_random(number), volume()).unwrap();
            let text = std::fs::read(&path).unwrap().trim_ascii_end().len() as u64;
            for file in [&path, &path.with_extension("new")] {
                let found = std::fs::metadata(file).unwrap();
                assert!(found.len() >= text + ROOM_MIN / 2, "{number}: {found:?}");
                assert!(found.blocks() * 512 >= found.len(), "{number}: it has holes");
            }
        }
        for number in 2..200 {
            catalogue.remove_volume(VolumeId::from_random(number)).unwrap();
        }
        assert_eq!(std::fs::metadata(&path).unwrap().len(), ROOM, "it shrinks again");
        assert_eq!(Catalogue::open(path).unwrap().volumes().len(), 1);
    }

    #[test]
    fn a_change_that_cannot_be_written_did_not_happen() {
        let folder = tempfile::tempdir().unwrap();
        let mut catalogue = Catalogue::open(folder.path().join("gone/catalogue.json")).unwrap();
        let id = VolumeId::from_random(7);
        assert!(catalogue.put_volume(id, volume()).is_err());
        assert!(catalogue.volumes().is_empty());
    }
}
