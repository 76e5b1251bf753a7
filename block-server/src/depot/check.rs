//! What may be asked of a depot, and what is said where it may not.

use std::path::Path;

use model::{Limits, VolumeId};
use rpc::Error;
use rpc::block::{NewExport, NewVolume, Quality};

use crate::catalogue::{Catalogue, Stage};

/// Volumes are cut in blocks of a page: that is what every disk writes whole.
const VOLUME_GRAIN: u64 = 4096;

/// The greatest EBS volume (io2 Block Express), 64 TiB.
const VOLUME_BYTES_MAX: u64 = 64 << 40;

/// A socket's path must fit `sun_path` with its zero (unix(7)).
const SOCKET_PATH_MAX: usize = 107;

const EXPORT_NAME_MAX: usize = 64;

pub(super) fn limits(id: VolumeId, quality: &Quality, size: u64) -> Result<Limits, Error> {
    quality.limits(size).map_err(|reason| Error::refused(format!("volume {id}: {reason}")))
}

pub(super) fn check_size(id: VolumeId, deed: &str, size: u64) -> Result<(), Error> {
    if size == 0 || !size.is_multiple_of(VOLUME_GRAIN) || size > VOLUME_BYTES_MAX {
        return Err(Error::refused(format!(
            "volume {id}: {deed}: {size} bytes: a volume has a multiple of {VOLUME_GRAIN} bytes, \
             at most {VOLUME_BYTES_MAX}"
        )));
    }
    Ok(())
}

pub(super) fn check_new(id: VolumeId, new: &NewVolume) -> Result<(), Error> {
    let size = new.size_bytes;
    check_size(id, "create", size)?;
    let Some(source) = &new.source else { return Ok(()) };
    match std::fs::metadata(source) {
        Ok(found) if !found.is_file() => Err(Error::refused(format!(
            "volume {id}: create: {}: it is not a regular file",
            source.display()
        ))),
        Ok(found) if found.len() > size => Err(Error::refused(format!(
            "volume {id}: create: {} holds {} bytes, more than the volume's {size}",
            source.display(),
            found.len()
        ))),
        Ok(_) => Ok(()),
        Err(error) => {
            Err(Error::refused(format!("volume {id}: create: {}: {error}", source.display())))
        }
    }
}

/// `path` is where the export's socket would be.
pub(super) fn check_export(
    catalogue: &Catalogue,
    name: &str,
    path: &Path,
    new: &NewExport,
) -> Result<(), Error> {
    let lawful = !name.is_empty()
        && name.len() <= EXPORT_NAME_MAX
        && !name.starts_with('.')
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if !lawful {
        return Err(Error::refused(format!(
            "export `{}`: a name has 1 to {EXPORT_NAME_MAX} of a-z, A-Z, 0-9, `-`, `_`, `.`",
            name.chars().take(EXPORT_NAME_MAX).collect::<String>()
        )));
    }
    if path.as_os_str().len() + ".new".len() > SOCKET_PATH_MAX {
        return Err(Error::refused(format!(
            "export {name}: {} is longer than the {SOCKET_PATH_MAX} bytes that a socket's \
             path may have: use a shorter run directory",
            path.display()
        )));
    }
    let NewExport { volume: id, read_only, generation, .. } = *new;
    let Some(volume) = catalogue.volumes().get(&id) else {
        return Err(Error::not_found(format!("export {name}: there is no volume {id}")));
    };
    match &volume.stage {
        Stage::Ready => {}
        Stage::Filling | Stage::Deleting => {
            return Err(Error::unavailable(format!(
                "export {name}: volume {id} is not ready; ask again"
            )));
        }
        Stage::Failed(reason) => {
            return Err(Error::damaged(format!("export {name}: volume {id}: {reason}")));
        }
    }
    if let Some(present) = catalogue.exports().get(name) {
        if present.volume != id {
            return Err(Error::conflict(format!(
                "export {name}: it is of volume {}",
                present.volume
            )));
        }
        if generation < present.generation {
            return Err(Error::conflict(format!(
                "export {name}: generation {generation} is below its {}",
                present.generation
            )));
        }
    }
    if read_only {
        return Ok(());
    }
    if generation < volume.generation {
        return Err(Error::conflict(format!(
            "export {name}: generation {generation} is fenced: volume {id} has a writer of \
             generation {}",
            volume.generation
        )));
    }
    let rival = catalogue.exports().iter().find(|(other, e)| {
        *other != name && e.volume == id && !e.read_only && e.generation == generation
    });
    if let Some((other, _)) = rival {
        return Err(Error::conflict(format!(
            "export {name}: export {other} writes to volume {id} with the same generation \
             {generation}: raise it to take over"
        )));
    }
    Ok(())
}
