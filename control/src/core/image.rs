//! Machine images: names for what the hosts hold.

use std::borrow::Cow;

use model::ImageId;

use super::lookup::{find, find_all, with_tags};
use super::{Answer, Context, Draft, done, page_secret, tag};
use crate::api::{ApiError, Node, Params, Struct, timestamp};
use crate::filter::{Filters, Page};
use crate::record::{Image, Name, OWNER_ID};

/// Where a registration names none.
const ROOT_DEVICE: &str = "/dev/xvda";

pub fn register_image(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let name = params.need("Name")?;
    let length = name.chars().count();
    let lawful = |c: char| c.is_ascii_alphanumeric() || "()[]. /-'@_".contains(c);
    if !(3..=128).contains(&length) || !name.chars().all(lawful) {
        return Err(ApiError::new(
            "InvalidAMIName.Malformed",
            "AMI names must be between 3 and 128 characters long, and may contain letters, numbers, '(', ')', '.', '-', '/' and '_'",
        ));
    }
    if params.text("Architecture").is_some_and(|a| a != "x86_64") {
        return Err(ApiError::new(
            "Unsupported",
            "The hosts run images of the architecture x86_64.",
        ));
    }
    let location = params.need("ImageLocation")?;
    let found = state.hosts.iter().flat_map(|h| &h.images).find(|i| i.name == location);
    let source = found.ok_or_else(|| {
        ApiError::new(
            "InvalidManifest",
            format!("No host holds an image named {location}; `netctl image list` shows those there are."),
        )
    })?;
    let row = Name { name: format!("image/{name}"), owner: String::new() };
    if let Some(taken) = state.names.get(&row.name) {
        return Err(ApiError::new(
            "InvalidAMIName.Duplicate",
            format!("AMI name {name} is already in use by AMI {}", taken.owner),
        ));
    }
    let image = Image {
        id: ImageId::from_random(draft.bits()),
        name: name.to_owned(),
        description: params.text("Description").unwrap_or_default().to_owned(),
        location: location.to_owned(),
        size_bytes: source.size_bytes,
        architecture: "x86_64".to_owned(),
        root_device: params.text("RootDeviceName").unwrap_or(ROOT_DEVICE).to_owned(),
        created_ms: context.now_ms,
        tags: tag::specified_one(params, "image")?,
    };
    draft.plan.put(state, &Name { owner: image.id.to_string(), ..row });
    draft.plan.put(state, &image);
    Ok(Box::new(move |_| Struct::new().with("imageId", image.id)))
}

/// Instances that run from it keep their root volumes.
pub fn deregister_image(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let image = find::<Image>(context.state, params.need("ImageId")?)?;
    draft.plan.delete::<Image>(context.state, image.id);
    draft.plan.delete::<Name>(context.state, format!("image/{}", image.name));
    Ok(done())
}

const FILTERS: &[&str] = &[
    "architecture",
    "creation-date",
    "description",
    "hypervisor",
    "image-id",
    "image-type",
    "is-public",
    "manifest-location",
    "name",
    "owner-id",
    "root-device-name",
    "root-device-type",
    "state",
    "tag-key",
    "virtualization-type",
];

pub fn describe_images(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    const ACTION: &str = "DescribeImages";
    let ids = params.texts("ImageId");
    let filters = Filters::read(params)?.known(FILTERS)?;
    let secret = page_secret(context.state);
    let page = Page::read(params, ACTION, !ids.is_empty(), &secret)?;
    let owners = params.texts("Owner");
    let owned = owners.is_empty() || owners.iter().any(|o| matches!(*o, "self" | OWNER_ID));
    let mut images: Vec<&Image> = if ids.is_empty() {
        context.state.images.iter().collect()
    } else {
        find_all(context.state, &ids)?
    };
    images.sort_by_key(|i| i.id);
    let admitted = images.into_iter().filter(|image| {
        owned
            && filters.admit(&image.tags, |name| {
                vec![Cow::Owned(match name {
                    "architecture" => image.architecture.clone(),
                    "creation-date" => timestamp(image.created_ms),
                    "description" => image.description.clone(),
                    "hypervisor" => "kvm".to_owned(),
                    "image-id" => image.id.to_string(),
                    "image-type" => "machine".to_owned(),
                    "is-public" => "false".to_owned(),
                    "manifest-location" => image.location.clone(),
                    "name" => image.name.clone(),
                    "owner-id" => OWNER_ID.to_owned(),
                    "root-device-name" => image.root_device.clone(),
                    "root-device-type" => "ebs".to_owned(),
                    "state" => "available".to_owned(),
                    "virtualization-type" => "hvm".to_owned(),
                    _ => return Vec::new(),
                })]
            })
    });
    let (images, next) = page.cut(admitted, |i| i.id.to_string(), ACTION, &secret);
    let nodes = images.into_iter().map(node);
    Ok(Struct::new().list("imagesSet", nodes).with_some("nextToken", next))
}

fn node(image: &Image) -> Struct {
    let size_gib = image.size_bytes.div_ceil(super::launch::GIB).max(1);
    let root = Struct::new().with("deviceName", &image.root_device).with(
        "ebs",
        Struct::new()
            .with("volumeSize", size_gib)
            .with("volumeType", "gp3")
            .with("deleteOnTermination", true)
            .with("encrypted", false),
    );
    let answer = Struct::new()
        .with("imageId", image.id)
        .with("name", &image.name)
        .with("description", &image.description)
        .with("imageLocation", &image.location)
        .with("imageState", "available")
        .with("imageOwnerId", OWNER_ID)
        .with("isPublic", false)
        .with("architecture", &image.architecture)
        .with("imageType", "machine")
        .with("rootDeviceName", &image.root_device)
        .with("rootDeviceType", "ebs")
        .with("virtualizationType", "hvm")
        .with("hypervisor", "kvm")
        .with("creationDate", timestamp(image.created_ms))
        .with("blockDeviceMapping", Node::List(vec![root.into()]));
    with_tags(answer, &image.tags)
}
