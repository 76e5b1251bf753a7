//! Security groups themselves; their rules are in `group_rule`.

use std::borrow::Cow;

use model::{GroupId, Peer, VpcId};

use super::bootstrap::{allow_all, group_name};
use super::group_rule::permissions;
use super::lookup::{find, find_all, with_tags};
use super::{Answer, Context, Draft, page_secret, tag};
use crate::api::{ApiError, Params, Struct};
use crate::filter::{Filters, Page};
use crate::record::{Group, GroupRule, Name, OWNER_ID, Vpc};
use crate::state::State;

/// EC2's bound for names and descriptions.
const TEXT_CHARS_MAX: usize = 255;

pub fn by_name<'a>(state: &'a State, vpc: VpcId, name: &str) -> Result<&'a Group, ApiError> {
    let id = state.names.get(group_name(vpc, name)).map(|n| &n.owner);
    id.and_then(|id| state.groups.get(id)).ok_or_else(|| {
        ApiError::new(
            "InvalidGroup.NotFound",
            format!("The security group '{name}' does not exist in VPC '{vpc}'"),
        )
    })
}

/// The default VPC, where a call names none.
fn vpc<'a>(state: &'a State, id: Option<&str>) -> Result<&'a Vpc, ApiError> {
    match id.filter(|t| !t.is_empty()) {
        Some(id) => find(state, id),
        None => state
            .vpcs
            .iter()
            .find(|v| v.default)
            .ok_or_else(|| ApiError::new("VPCIdNotSpecified", "No default VPC for this user")),
    }
}

/// By `GroupId`, or by `GroupName` in the default VPC.
pub fn named<'a>(state: &'a State, params: &Params, by_names: bool) -> Result<&'a Group, ApiError> {
    if let Some(id) = params.text("GroupId") {
        return find(state, id);
    }
    match params.text("GroupName").filter(|_| by_names) {
        Some(name) => by_name(state, vpc(state, None)?.id, name),
        None => Err(ApiError::missing("GroupId")),
    }
}

fn check_text(what: &str, text: &str) -> Result<(), ApiError> {
    let lawful = |c: char| c.is_ascii_alphanumeric() || " ._-:/()#,@[]+=&;{}!$*".contains(c);
    if text.is_empty() || text.chars().count() > TEXT_CHARS_MAX || !text.chars().all(lawful) {
        return Err(ApiError::invalid(format!(
            "Invalid security group {what}. Valid {what}s are character strings with at most {TEXT_CHARS_MAX} characters from the following set: a-zA-Z0-9. _-:/()#,@[]+=&;{{}}!$*"
        )));
    }
    Ok(())
}

pub fn create_group(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let (name, description) = (params.need("GroupName")?, params.need("GroupDescription")?);
    check_text("name", name)?;
    check_text("description", description)?;
    if name.starts_with("sg-") {
        return Err(ApiError::invalid("Group names may not be in the format sg-*"));
    }
    let tags = tag::specified_one(params, "security-group")?;
    let vpc = vpc(state, params.text("VpcId"))?.id;
    let row = Name { name: group_name(vpc, name), owner: String::new() };
    if name == "default" || state.names.get(&row.name).is_some() {
        return Err(ApiError::new(
            "InvalidGroup.Duplicate",
            format!("The security group '{name}' already exists for VPC '{vpc}'"),
        ));
    }
    let group = Group {
        id: GroupId::from_random(draft.bits()),
        vpc,
        name: name.to_owned(),
        description: description.to_owned(),
        ingress: Vec::new(),
        egress: vec![allow_all(draft)],
        tags,
    };
    draft.plan.put(state, &Name { owner: group.id.to_string(), ..row });
    draft.plan.put(state, &group);
    Ok(Box::new(move |_| with_tags(Struct::new().with("groupId", group.id), &group.tags)))
}

pub fn delete_group(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let group = named(state, params, true)?;
    if group.name == "default" {
        return Err(ApiError::new(
            "CannotDelete",
            format!(
                "the specified group: \"{}\" name: \"default\" cannot be deleted by a user",
                group.id
            ),
        ));
    }
    let used = state.instances.iter().flat_map(|i| &i.interfaces);
    let attached = used.into_iter().any(|n| n.groups.contains(&group.id));
    let refers = |r: &GroupRule| r.rule.peer == Peer::Group(group.id);
    let referenced = state
        .groups
        .iter()
        .filter(|g| g.id != group.id)
        .any(|g| g.ingress.iter().chain(&g.egress).any(refers));
    if attached || referenced {
        return Err(ApiError::new(
            "DependencyViolation",
            format!("resource {} has a dependent object", group.id),
        ));
    }
    draft.plan.delete::<Group>(state, group.id);
    draft.plan.delete::<Name>(state, group_name(group.vpc, &group.name));
    let id = group.id;
    Ok(Box::new(move |_| Struct::new().with("return", true).with("groupId", id)))
}

const FILTERS: &[&str] = &[
    "description",
    "egress.ip-permission.cidr",
    "egress.ip-permission.from-port",
    "egress.ip-permission.group-id",
    "egress.ip-permission.protocol",
    "egress.ip-permission.to-port",
    "group-id",
    "group-name",
    "ip-permission.cidr",
    "ip-permission.from-port",
    "ip-permission.group-id",
    "ip-permission.protocol",
    "ip-permission.to-port",
    "owner-id",
    "tag-key",
    "vpc-id",
];

fn field<'a>(group: &'a Group, name: &str) -> Vec<Cow<'a, str>> {
    if let Some((rules, what)) = name
        .strip_prefix("egress.ip-permission.")
        .map(|what| (&group.egress, what))
        .or_else(|| name.strip_prefix("ip-permission.").map(|what| (&group.ingress, what)))
    {
        let tell = |r: &GroupRule| super::group_rule::rule_field(r, what);
        return rules.iter().filter_map(tell).map(Cow::Owned).collect();
    }
    vec![Cow::Owned(match name {
        "description" => group.description.clone(),
        "group-id" => group.id.to_string(),
        "group-name" => group.name.clone(),
        "owner-id" => OWNER_ID.to_owned(),
        "vpc-id" => group.vpc.to_string(),
        _ => return Vec::new(),
    })]
}

pub fn describe_groups(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    const ACTION: &str = "DescribeSecurityGroups";
    let state = context.state;
    let ids = params.texts("GroupId");
    let names = params.texts("GroupName");
    let filters = Filters::read(params)?.known(FILTERS)?;
    let secret = page_secret(state);
    let named = !ids.is_empty() || !names.is_empty();
    let page = Page::read(params, ACTION, named, &secret)?;
    let mut groups: Vec<&Group> = find_all(state, &ids)?;
    for name in names {
        let group = by_name(state, vpc(state, None)?.id, name)?;
        if !groups.contains(&group) {
            groups.push(group);
        }
    }
    if !named {
        groups = state.groups.iter().collect();
    }
    groups.sort_by_key(|g| g.id);
    let admitted = groups.into_iter().filter(|g| filters.admit(&g.tags, |name| field(g, name)));
    let (groups, next) = page.cut(admitted, |g| g.id.to_string(), ACTION, &secret);
    let nodes = groups.into_iter().map(|group| {
        let answer = Struct::new()
            .with("groupId", group.id)
            .with("groupName", &group.name)
            .with("groupDescription", &group.description)
            .with("ownerId", OWNER_ID)
            .with("vpcId", group.vpc)
            .list("ipPermissions", permissions(&group.ingress))
            .list("ipPermissionsEgress", permissions(&group.egress));
        with_tags(answer, &group.tags)
    });
    Ok(Struct::new().list("securityGroupInfo", nodes).with_some("nextToken", next))
}
