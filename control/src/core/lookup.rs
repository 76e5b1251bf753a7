//! From the text of an id to the record that it names: first whether it is an
//! id at all, then whether it is there.

use std::collections::BTreeSet;
use std::fmt::Display;
use std::str::FromStr;

use crate::api::{ApiError, Node, Params, Struct};
use crate::record::{Address, Group, Image, Instance, KeyPair, Subnet, Tags, Volume, Vpc};
use crate::state::{Kept, State};

/// A resource that is named by an id.
pub trait Named: Kept + Sized + 'static {
    type Id: FromStr + Display + Copy;
    const MALFORMED: &'static str;
    const NOT_FOUND: &'static str;
    /// As the messages name it: `instance ID`.
    const NOUN: &'static str;
}

macro_rules! named {
    ($($kind:ident $id:ident $malformed:literal $missing:literal $noun:literal;)*) => {$(
        impl Named for $kind {
            type Id = model::$id;
            const MALFORMED: &'static str = $malformed;
            const NOT_FOUND: &'static str = $missing;
            const NOUN: &'static str = $noun;
        }
    )*};
}

named! {
    Instance InstanceId "InvalidInstanceID.Malformed" "InvalidInstanceID.NotFound" "instance ID";
    Volume VolumeId "InvalidParameterValue" "InvalidVolume.NotFound" "volume";
    Image ImageId "InvalidAMIID.Malformed" "InvalidAMIID.NotFound" "image id";
    Group GroupId "InvalidGroupId.Malformed" "InvalidGroup.NotFound" "security group";
    KeyPair KeyPairId "InvalidParameterValue" "InvalidKeyPair.NotFound" "key pair ID";
    Address AllocationId "InvalidParameterValue" "InvalidAllocationID.NotFound" "allocation ID";
    Vpc VpcId "InvalidVpcID.Malformed" "InvalidVpcID.NotFound" "vpc ID";
    Subnet SubnetId "InvalidSubnetID.Malformed" "InvalidSubnetID.NotFound" "subnet ID";
}

pub fn parse<T: Named>(text: &str) -> Result<T::Id, ApiError> {
    text.parse().map_err(|_| ApiError::new(T::MALFORMED, format!("Invalid id: \"{text}\"")))
}

pub fn missing<T: Named>(ids: &[&str]) -> ApiError {
    let plural = if ids.len() > 1 { "s" } else { "" };
    ApiError::new(
        T::NOT_FOUND,
        format!("The {}{plural} '{}' does not exist", T::NOUN, ids.join(", ")),
    )
}

pub fn find<'a, T: Named>(state: &'a State, text: &str) -> Result<&'a T, ApiError> {
    let id = parse::<T>(text)?;
    T::table(state).get(id).ok_or_else(|| missing::<T>(&[text]))
}

/// Every record that is named; all ids are read before any is looked for.
pub fn find_all<'a, T: Named>(state: &'a State, texts: &[&str]) -> Result<Vec<&'a T>, ApiError> {
    let mut seen = BTreeSet::new();
    let mut ids = Vec::new();
    for text in texts {
        let id = parse::<T>(text)?;
        if seen.insert(*text) {
            ids.push((*text, id));
        }
    }
    let table = T::table(state);
    let absent: Vec<&str> =
        ids.iter().filter(|(_, id)| table.get(id).is_none()).map(|(text, _)| *text).collect();
    if !absent.is_empty() {
        return Err(missing::<T>(&absent));
    }
    Ok(ids.iter().filter_map(|(_, id)| table.get(id)).collect())
}

/// The ids that a call names, of which there must be at least one.
pub fn need_ids<'a>(params: &'a Params, name: &str) -> Result<Vec<&'a str>, ApiError> {
    let ids = params.texts(name);
    if ids.is_empty() { Err(ApiError::missing(name)) } else { Ok(ids) }
}

pub fn tag_set(tags: &Tags) -> Vec<Struct> {
    tags.iter().map(|(key, value)| Struct::new().with("key", key).with("value", value)).collect()
}

/// Adds the tags where there are any, as EC2 does.
pub fn with_tags(answer: Struct, tags: &Tags) -> Struct {
    if tags.is_empty() {
        answer
    } else {
        answer.with("tagSet", Node::List(tag_set(tags).into_iter().map(Node::from).collect()))
    }
}
