//! The disks of RunInstances: the image's, and what the block device mappings add.

use std::collections::BTreeMap;

use model::InstanceType;

use super::GIB;
use crate::api::{ApiError, Params};
use crate::core::volume;
use crate::record::Image;

#[derive(Clone)]
pub struct NewVolume {
    pub device: String,
    pub size_gib: u64,
    pub kind: String,
    pub iops: Option<u64>,
    pub throughput: Option<u64>,
    pub delete_on_termination: bool,
    pub boot: bool,
}

pub fn volumes(
    params: &Params,
    image: &Image,
    kind: &InstanceType,
) -> Result<Vec<NewVolume>, ApiError> {
    let image_gib = image.size_bytes.div_ceil(GIB).max(1);
    let mut volumes = BTreeMap::new();
    let root = NewVolume {
        device: image.root_device.clone(),
        size_gib: image_gib,
        kind: "gp3".to_owned(),
        iops: Some(3000),
        throughput: Some(125),
        delete_on_termination: true,
        boot: true,
    };
    volumes.insert(image.root_device.clone(), root);
    for mapping in params.structs("BlockDeviceMapping") {
        let device = mapping.need("DeviceName")?.to_owned();
        let invalid = |what: String| ApiError::new("InvalidBlockDeviceMapping", what);
        if mapping.has("NoDevice") || mapping.has("VirtualName") {
            return Err(invalid(format!("{device}: only Ebs is supported")));
        }
        let boot = device == image.root_device;
        let ebs = mapping.inner("Ebs");
        let size = match (ebs.and_then(|e| e.number("VolumeSize")), boot) {
            (Some(size), _) => u64::try_from(size).unwrap_or(0),
            (None, true) => image_gib,
            (None, false) => return Err(invalid(format!("{device}: Ebs.VolumeSize is missing"))),
        };
        if boot && size < image_gib {
            return Err(invalid(format!(
                "Volume of size {size}GB is smaller than the image's root disk, expect size>= {image_gib}GB"
            )));
        }
        if let Some(name) = ebs.and_then(|e| {
            e.names().find(|n| {
                matches!(*n, "SnapshotId" | "KmsKeyId" | "OutpostArn")
                    || *n == "Encrypted" && e.flag(n) == Some(true)
            })
        }) {
            return Err(ApiError::new("Unsupported", format!("Ebs.{name} is not supported.")));
        }
        let volume = volume::read_kind(ebs, size)?;
        let delete = ebs.and_then(|e| e.flag("DeleteOnTermination")).unwrap_or(true);
        let new = NewVolume {
            device: device.clone(),
            size_gib: size,
            kind: volume.0,
            iops: volume.1,
            throughput: volume.2,
            delete_on_termination: delete,
            boot,
        };
        if !boot {
            volume::check_device(&device)?;
        }
        if volumes.insert(device.clone(), new).is_some_and(|before| !before.boot) {
            return Err(invalid(format!("{device} stands twice")));
        }
    }
    if volumes.len() > kind.volumes_max as usize {
        return Err(ApiError::new(
            "AttachmentLimitExceeded",
            format!("{} takes at most {} volumes.", kind.name, kind.volumes_max),
        ));
    }
    let mut volumes: Vec<NewVolume> = volumes.into_values().collect();
    volumes.sort_by_key(|v| !v.boot);
    Ok(volumes)
}
