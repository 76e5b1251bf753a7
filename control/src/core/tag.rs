//! Tags, and the tag specifications of whatever is created.

use std::borrow::Cow;

use model::{
    AllocationId, GroupId, ImageId, InstanceId, InterfaceId, KeyPairId, SubnetId, VolumeId, VpcId,
};

use super::{Answer, Context, Draft, done};
use crate::api::{ApiError, Params, Struct};
use crate::filter::{Filters, Page};
use crate::record::{Address, Group, Image, Instance, KeyPair, Subnet, Tags, Volume, Vpc};
use crate::state::{Kept, State};

/// EC2 quota "tags per resource".
const TAGS_MAX: usize = 50;
const KEY_CHARS_MAX: usize = 128;
const VALUE_CHARS_MAX: usize = 256;

fn check(key: &str, value: &str) -> Result<(), ApiError> {
    if key.is_empty() || key.chars().count() > KEY_CHARS_MAX {
        return Err(ApiError::invalid(format!(
            "Tag key exceeds the maximum length of {KEY_CHARS_MAX} characters, or is empty"
        )));
    }
    if value.chars().count() > VALUE_CHARS_MAX {
        return Err(ApiError::invalid(format!(
            "Tag value exceeds the maximum length of {VALUE_CHARS_MAX} characters"
        )));
    }
    if key.to_ascii_lowercase().starts_with("aws:") {
        return Err(ApiError::invalid(
            "Tag keys starting with 'aws:' are reserved for internal use",
        ));
    }
    Ok(())
}

fn check_count(tags: &Tags) -> Result<(), ApiError> {
    if tags.len() > TAGS_MAX {
        return Err(ApiError::new(
            "TagLimitExceeded",
            format!("The maximum number of Tags for a resource has been reached: {TAGS_MAX}."),
        ));
    }
    Ok(())
}

/// The tags that a creating call gives to what it makes. A specification for
/// something that the call does not make is refused.
pub fn specified(params: &Params, kinds: &[&str]) -> Result<Vec<Tags>, ApiError> {
    let mut found = vec![Tags::new(); kinds.len()];
    for specification in params.structs("TagSpecification") {
        let kind = specification.need("ResourceType")?;
        let at = kinds.iter().position(|k| *k == kind).ok_or_else(|| {
            ApiError::invalid(format!(
                "'{kind}' is not a valid taggable resource type for this operation."
            ))
        })?;
        for tag in specification.structs("Tag") {
            let key = tag.need("Key")?;
            let value = tag.text("Value").unwrap_or_default();
            check(key, value)?;
            if found[at].insert(key.to_owned(), value.to_owned()).is_some() {
                return Err(ApiError::invalid(format!("Duplicate tag key '{key}' specified.")));
            }
        }
        check_count(&found[at])?;
    }
    Ok(found)
}

/// The tags of a call that makes one kind of thing.
pub fn specified_one(params: &Params, kind: &str) -> Result<Tags, ApiError> {
    Ok(specified(params, &[kind])?.pop().unwrap_or_default())
}

type Change<'a> = &'a dyn Fn(&mut Tags) -> Result<(), ApiError>;

fn change<T: Kept>(
    state: &State,
    draft: &mut Draft,
    key: &str,
    tags: impl Fn(&mut T) -> &mut Tags,
    change: Change<'_>,
) -> Result<bool, ApiError> {
    let Some(mut record) = draft.plan.current::<T>(state, key) else { return Ok(false) };
    change(tags(&mut record))?;
    draft.plan.put(state, &record);
    Ok(true)
}

fn change_resource(
    state: &State,
    draft: &mut Draft,
    id: &str,
    how: Change<'_>,
) -> Result<(), ApiError> {
    let prefix = id.split_inclusive('-').next().unwrap_or_default();
    let found = match prefix {
        InstanceId::PREFIX => change::<Instance>(state, draft, id, |r| &mut r.tags, how)?,
        VolumeId::PREFIX => change::<Volume>(state, draft, id, |r| &mut r.tags, how)?,
        ImageId::PREFIX => change::<Image>(state, draft, id, |r| &mut r.tags, how)?,
        KeyPairId::PREFIX => change::<KeyPair>(state, draft, id, |r| &mut r.tags, how)?,
        GroupId::PREFIX => change::<Group>(state, draft, id, |r| &mut r.tags, how)?,
        AllocationId::PREFIX => change::<Address>(state, draft, id, |r| &mut r.tags, how)?,
        VpcId::PREFIX => change::<Vpc>(state, draft, id, |r| &mut r.tags, how)?,
        SubnetId::PREFIX => change::<Subnet>(state, draft, id, |r| &mut r.tags, how)?,
        InterfaceId::PREFIX => change_interface(state, draft, id, how)?,
        model::RuleId::PREFIX => change_rule(state, draft, id, how)?,
        _ => false,
    };
    if found {
        Ok(())
    } else {
        Err(ApiError::new("InvalidID", format!("The ID '{id}' is not valid")))
    }
}

fn change_interface(
    state: &State,
    draft: &mut Draft,
    id: &str,
    how: Change<'_>,
) -> Result<bool, ApiError> {
    let held = |i: &&Instance| i.interfaces.iter().any(|n| n.id.to_string() == id);
    let key = state.instances.iter().find(held).map(|i| i.id.to_string());
    let instance = key.and_then(|key| draft.plan.current::<Instance>(state, &key));
    let Some(mut instance) = instance else { return Ok(false) };
    if let Some(interface) = instance.interfaces.iter_mut().find(|n| n.id.to_string() == id) {
        how(&mut interface.tags)?;
    }
    draft.plan.put(state, &instance);
    Ok(true)
}

fn change_rule(
    state: &State,
    draft: &mut Draft,
    id: &str,
    how: Change<'_>,
) -> Result<bool, ApiError> {
    for group in state.groups.iter() {
        let Some(mut group) = draft.plan.current::<Group>(state, &group.id.to_string()) else {
            continue;
        };
        let mut rules = group.ingress.iter_mut().chain(&mut group.egress);
        if let Some(rule) = rules.find(|r| r.rule.id.to_string() == id) {
            how(&mut rule.tags)?;
            draft.plan.put(state, &group);
            return Ok(true);
        }
    }
    Ok(false)
}

pub fn create_tags(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let mut given = Tags::new();
    for tag in params.structs("Tag") {
        let (key, value) = (tag.need("Key")?, tag.text("Value").unwrap_or_default());
        check(key, value)?;
        given.insert(key.to_owned(), value.to_owned());
    }
    for id in super::lookup::need_ids(params, "ResourceId")? {
        change_resource(context.state, draft, id, &|tags| {
            tags.extend(given.clone());
            check_count(tags)
        })?;
    }
    Ok(done())
}

/// A tag without a value goes whatever its value is.
pub fn delete_tags(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let mut given = Vec::new();
    for tag in params.structs("Tag") {
        given.push((tag.need("Key")?.to_owned(), tag.text("Value").map(str::to_owned)));
    }
    for id in super::lookup::need_ids(params, "ResourceId")? {
        change_resource(context.state, draft, id, &|tags| {
            if given.is_empty() {
                tags.clear();
            }
            for (key, value) in &given {
                if value.as_ref().is_none_or(|v| tags.get(key) == Some(v)) {
                    tags.remove(key);
                }
            }
            Ok(())
        })?;
    }
    Ok(done())
}

pub fn describe_tags(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    const ACTION: &str = "DescribeTags";
    let filters = Filters::read(params)?.known(&[
        "key",
        "resource-id",
        "resource-type",
        "value",
        "tag-key",
    ])?;
    let secret = super::page_secret(context.state);
    let page = Page::read(params, ACTION, false, &secret)?;
    let rows = every_tag(context.state);
    let admitted = rows.into_iter().filter(|row| {
        filters.admit(&row.tags, |name| match name {
            "key" => vec![Cow::Borrowed(row.key)],
            "value" => vec![Cow::Borrowed(row.value)],
            "resource-id" => vec![Cow::Borrowed(row.id.as_str())],
            "resource-type" => vec![Cow::Borrowed(row.kind)],
            _ => Vec::new(),
        })
    });
    let (rows, next) = page.cut(admitted, |r| format!("{} {}", r.id, r.key), ACTION, &secret);
    let items = rows.iter().map(|row| {
        Struct::new()
            .with("resourceId", &row.id)
            .with("resourceType", row.kind)
            .with("key", row.key)
            .with("value", row.value)
    });
    Ok(Struct::new().list("tagSet", items).with_some("nextToken", next))
}

struct Row<'a> {
    id: String,
    kind: &'static str,
    key: &'a str,
    value: &'a str,
    tags: Tags,
}

/// In the order of resources, then of keys.
fn every_tag(state: &State) -> Vec<Row<'_>> {
    let mut all: Vec<(String, &'static str, &Tags)> = Vec::new();
    all.extend(state.instances.iter().map(|r| (r.id.to_string(), "instance", &r.tags)));
    for interface in state.instances.iter().flat_map(|i| &i.interfaces) {
        all.push((interface.id.to_string(), "network-interface", &interface.tags));
    }
    all.extend(state.volumes.iter().map(|r| (r.id.to_string(), "volume", &r.tags)));
    all.extend(state.images.iter().map(|r| (r.id.to_string(), "image", &r.tags)));
    all.extend(state.key_pairs.iter().map(|r| (r.id.to_string(), "key-pair", &r.tags)));
    for group in state.groups.iter() {
        all.push((group.id.to_string(), "security-group", &group.tags));
        for rule in group.ingress.iter().chain(&group.egress) {
            all.push((rule.rule.id.to_string(), "security-group-rule", &rule.tags));
        }
    }
    all.extend(state.addresses.iter().map(|r| (r.allocation.to_string(), "elastic-ip", &r.tags)));
    all.extend(state.vpcs.iter().map(|r| (r.id.to_string(), "vpc", &r.tags)));
    all.extend(state.subnets.iter().map(|r| (r.id.to_string(), "subnet", &r.tags)));
    all.sort_by(|a, b| a.0.cmp(&b.0));
    all.into_iter()
        .flat_map(|(id, kind, tags)| {
            tags.iter().map(move |(key, value)| Row {
                id: id.clone(),
                kind,
                key,
                value,
                tags: Tags::from([(key.clone(), value.clone())]),
            })
        })
        .collect()
}
