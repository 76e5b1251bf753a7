//! The rules of security groups: read from a request, added, removed, shown.

use std::borrow::Cow;
use std::str::FromStr;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::{Direction, Peer, PortRange, Protocol, Rule, RuleId, VpcId};

use super::lookup::{find, find_all, tag_set};
use super::{Answer, Context, Draft, group, page_secret, tag};
use crate::api::{ApiError, Params, Struct};
use crate::filter::{Filters, Page};
use crate::record::{Group, GroupRule, OWNER_ID, Tags};
use crate::state::State;

const DESCRIPTION_CHARS_MAX: usize = 255;

/// A rule that a request names, whether or not it is there.
struct Asked {
    protocol: Protocol,
    peer: Peer,
    description: Option<String>,
}

fn read_protocol(params: &Params) -> Result<Protocol, ApiError> {
    let text = params.need("IpProtocol")?;
    let (from, to) = (params.number("FromPort"), params.number("ToPort"));
    let number = match text.to_ascii_lowercase().as_str() {
        "-1" | "all" => return Ok(Protocol::Any),
        "tcp" => Protocol::TCP,
        "udp" => Protocol::UDP,
        "icmp" => Protocol::ICMP,
        "icmpv6" => Protocol::ICMPV6,
        other => other.parse().map_err(|_| {
            ApiError::invalid(format!("Invalid value '{text}' for IP protocol. Unknown protocol."))
        })?,
    };
    match number {
        Protocol::TCP | Protocol::UDP => {
            let ports = read_ports(from, to)?;
            Ok(if number == Protocol::TCP { Protocol::Tcp(ports) } else { Protocol::Udp(ports) })
        }
        Protocol::ICMP | Protocol::ICMPV6 => {
            let (kind, code) = (read_icmp("type", from)?, read_icmp("code", to)?);
            if kind.is_none() && code.is_some() {
                return Err(ApiError::invalid("An ICMP code without a type means nothing."));
            }
            Ok(if number == Protocol::ICMP {
                Protocol::Icmp { kind, code }
            } else {
                Protocol::Icmpv6 { kind, code }
            })
        }
        number => Ok(Protocol::Number(number)),
    }
}

fn read_ports(from: Option<i64>, to: Option<i64>) -> Result<PortRange, ApiError> {
    let (Some(from), Some(to)) = (from, to) else {
        return Err(ApiError::new(
            "MissingParameter",
            "Invalid value for portRange. Must specify both from and to ports with TCP/UDP.",
        ));
    };
    if (from, to) == (-1, -1) {
        return Ok(PortRange::ALL);
    }
    let port = |n: i64| u16::try_from(n).ok();
    port(from)
        .zip(port(to))
        .and_then(|(a, b)| PortRange::new(a, b).ok())
        .ok_or_else(|| ApiError::invalid(format!("Invalid TCP/UDP port range ({from}:{to})")))
}

fn read_icmp(what: &str, value: Option<i64>) -> Result<Option<u8>, ApiError> {
    match value {
        None | Some(-1) => Ok(None),
        Some(n) => u8::try_from(n)
            .map(Some)
            .map_err(|_| ApiError::invalid(format!("ICMP {what} ({n}) out of range"))),
    }
}

/// A range of the family that its parameter is for.
fn read_cidr<Net: FromStr + Into<IpNet>>(text: &str) -> Result<Peer, ApiError> {
    let net: Net =
        text.parse().map_err(|_| ApiError::invalid(format!("CIDR block {text} is malformed")))?;
    // EC2 cuts what stands behind the prefix.
    Ok(Peer::Cidr(net.into().trunc()))
}

fn read_description(params: &Params) -> Result<Option<String>, ApiError> {
    let text = params.text("Description").filter(|t| !t.is_empty());
    if text.is_some_and(|t| t.chars().count() > DESCRIPTION_CHARS_MAX) {
        return Err(ApiError::invalid(format!(
            "A rule's description has at most {DESCRIPTION_CHARS_MAX} characters."
        )));
    }
    Ok(text.map(str::to_owned))
}

/// The rules that the request names, in the long form or in the short.
fn read_asked(state: &State, params: &Params, vpc: VpcId) -> Result<Vec<Asked>, ApiError> {
    let mut asked = Vec::new();
    for permission in params.structs("IpPermissions") {
        let protocol = read_protocol(permission)?;
        let before = asked.len();
        for range in permission.structs("IpRanges") {
            let description = read_description(range)?;
            asked.push(Asked {
                protocol,
                peer: read_cidr::<Ipv4Net>(range.need("CidrIp")?)?,
                description,
            });
        }
        for range in permission.structs("Ipv6Ranges") {
            let description = read_description(range)?;
            asked.push(Asked {
                protocol,
                peer: read_cidr::<Ipv6Net>(range.need("CidrIpv6")?)?,
                description,
            });
        }
        for pair in permission.structs("Groups") {
            let found = match (pair.text("GroupId"), pair.text("GroupName")) {
                (Some(id), _) => find::<Group>(state, id)?,
                (None, Some(name)) => group::by_name(state, vpc, name)?,
                (None, None) => return Err(ApiError::missing("GroupId")),
            };
            let description = read_description(pair)?;
            asked.push(Asked { protocol, peer: Peer::Group(found.id), description });
        }
        if !permission.structs("PrefixListIds").is_empty() {
            return Err(ApiError::new("Unsupported", "Prefix lists are not supported."));
        }
        if asked.len() == before {
            return Err(ApiError::missing("IpPermissions.IpRanges"));
        }
    }
    if params.has("IpProtocol") || params.has("CidrIp") {
        let protocol = read_protocol(params)?;
        asked.push(Asked {
            protocol,
            peer: read_cidr::<Ipv4Net>(params.need("CidrIp")?)?,
            description: None,
        });
    } else if let Some(name) = params.text("SourceSecurityGroupName") {
        let peer = Peer::Group(group::by_name(state, vpc, name)?.id);
        asked.push(Asked { protocol: Protocol::Any, peer, description: None });
    }
    Ok(asked)
}

fn rules_of(group: &mut Group, direction: Direction) -> &mut Vec<GroupRule> {
    match direction {
        Direction::Ingress => &mut group.ingress,
        Direction::Egress => &mut group.egress,
    }
}

pub fn authorize_ingress(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    authorize(context, params, draft, Direction::Ingress)
}

pub fn authorize_egress(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    authorize(context, params, draft, Direction::Egress)
}

/// All of the rules are added, or none.
fn authorize(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
    direction: Direction,
) -> Result<Answer, ApiError> {
    let state = context.state;
    // EC2 counts each family by itself; a host's tables hold a thousand of both.
    let most = context.settings.rule_limits.rules_a_group as usize;
    let mut group = group::named(state, params, direction == Direction::Ingress)?.clone();
    let asked = read_asked(state, params, group.vpc)?;
    if asked.is_empty() {
        return Err(ApiError::missing("IpPermissions"));
    }
    let tags = tag::specified_one(params, "security-group-rule")?;
    let mut added = Vec::new();
    for asked in asked {
        if let Peer::Group(peer) = asked.peer {
            draft.plan.depends::<Group>(state, peer);
        }
        let rules = rules_of(&mut group, direction);
        let same = |r: &GroupRule| r.rule.protocol == asked.protocol && r.rule.peer == asked.peer;
        if rules.iter().any(same) {
            return Err(ApiError::new(
                "InvalidPermission.Duplicate",
                format!(
                    "the specified rule \"peer: {}, {}, ALLOW\" already exists",
                    peer_text(asked.peer),
                    protocol_text(asked.protocol)
                ),
            ));
        }
        if rules.len() >= most {
            return Err(ApiError::new(
                "RulesPerSecurityGroupLimitExceeded",
                format!("The maximum number of rules per security group has been reached: {most}."),
            ));
        }
        let id = RuleId::from_random(draft.bits());
        let rule = Rule { id, protocol: asked.protocol, peer: asked.peer };
        let rule = GroupRule { rule, description: asked.description, tags: tags.clone() };
        rules.push(rule.clone());
        added.push(rule);
    }
    draft.plan.put(state, &group);
    let id = group.id;
    Ok(Box::new(move |_| {
        let nodes = added.iter().map(|r| rule_node(id, r, direction));
        Struct::new().with("return", true).list("securityGroupRuleSet", nodes)
    }))
}

pub fn revoke_ingress(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    revoke(context, params, draft, Direction::Ingress)
}

pub fn revoke_egress(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
) -> Result<Answer, ApiError> {
    revoke(context, params, draft, Direction::Egress)
}

fn revoke(
    context: &Context<'_>,
    params: &Params,
    draft: &mut Draft,
    direction: Direction,
) -> Result<Answer, ApiError> {
    let state = context.state;
    let mut group = group::named(state, params, direction == Direction::Ingress)?.clone();
    let ids = params.texts("SecurityGroupRuleId");
    let asked = read_asked(state, params, group.vpc)?;
    if asked.is_empty() && ids.is_empty() {
        return Err(ApiError::missing("IpPermissions"));
    }
    let mut removed = Vec::new();
    for text in ids {
        let id = read_rule_id(text)?;
        let rules = rules_of(&mut group, direction);
        let at = rules.iter().position(|r| r.rule.id == id).ok_or_else(|| missing_rule(text))?;
        removed.push(rules.remove(at));
    }
    for asked in asked {
        let rules = rules_of(&mut group, direction);
        let same = |r: &GroupRule| r.rule.protocol == asked.protocol && r.rule.peer == asked.peer;
        let at = rules.iter().position(same).ok_or_else(|| {
            ApiError::new(
                "InvalidPermission.NotFound",
                "The specified rule does not exist in this security group.",
            )
        })?;
        removed.push(rules.remove(at));
    }
    draft.plan.put(state, &group);
    let id = group.id;
    Ok(Box::new(move |_| {
        let nodes = removed.iter().map(|r| {
            let node = Struct::new()
                .with("securityGroupRuleId", r.rule.id)
                .with("groupId", id)
                .with("isEgress", direction == Direction::Egress)
                .with_some("description", r.description.as_ref());
            let node = with_protocol(node, r.rule.protocol);
            match r.rule.peer {
                Peer::Cidr(IpNet::V4(net)) => node.with("cidrIpv4", net),
                Peer::Cidr(IpNet::V6(net)) => node.with("cidrIpv6", net.to_string()),
                Peer::Group(peer) => node.with("referencedGroupId", peer),
                Peer::PrefixList(list) => node.with("prefixListId", list),
            }
        });
        Struct::new().with("return", true).list("revokedSecurityGroupRuleSet", nodes)
    }))
}

fn read_rule_id(text: &str) -> Result<RuleId, ApiError> {
    text.parse().map_err(|_| {
        ApiError::new("InvalidSecurityGroupRuleId.Malformed", format!("Invalid id: \"{text}\""))
    })
}

fn missing_rule(text: &str) -> ApiError {
    ApiError::new(
        "InvalidSecurityGroupRuleId.NotFound",
        format!("The security group rule ID '{text}' does not exist"),
    )
}

/// `tcp`, `icmp`, `-1`, or a number, as the API names it.
fn protocol_name(protocol: Protocol) -> Cow<'static, str> {
    match protocol {
        Protocol::Any => "-1".into(),
        Protocol::Tcp(_) => "tcp".into(),
        Protocol::Udp(_) => "udp".into(),
        Protocol::Icmp { .. } => "icmp".into(),
        Protocol::Icmpv6 { .. } => "icmpv6".into(),
        Protocol::Number(n) => n.to_string().into(),
    }
}

fn port_numbers(protocol: Protocol) -> Option<(i64, i64)> {
    let number = |n: Option<u8>| n.map_or(-1, i64::from);
    match protocol {
        Protocol::Any | Protocol::Number(_) => None,
        Protocol::Tcp(ports) | Protocol::Udp(ports) => {
            Some((ports.first().into(), ports.last().into()))
        }
        Protocol::Icmp { kind, code } | Protocol::Icmpv6 { kind, code } => {
            Some((number(kind), number(code)))
        }
    }
}

fn with_protocol(node: Struct, protocol: Protocol) -> Struct {
    let node = node.with("ipProtocol", protocol_name(protocol).into_owned());
    match port_numbers(protocol) {
        Some((from, to)) => node.with("fromPort", from).with("toPort", to),
        None => node,
    }
}

fn peer_text(peer: Peer) -> String {
    match peer {
        Peer::Cidr(net) => net.to_string(),
        Peer::Group(id) => id.to_string(),
        Peer::PrefixList(id) => id.to_string(),
    }
}

fn protocol_text(protocol: Protocol) -> String {
    match port_numbers(protocol) {
        Some((from, to)) => {
            format!("{}, from port: {from}, to port: {to}", protocol_name(protocol).to_uppercase())
        }
        None => "ALL".to_owned(),
    }
}

/// What a rule says to a filter of DescribeSecurityGroups.
pub fn rule_field(rule: &GroupRule, what: &str) -> Option<String> {
    match (what, rule.rule.peer) {
        ("cidr", Peer::Cidr(net)) => Some(net.to_string()),
        ("group-id", Peer::Group(id)) => Some(id.to_string()),
        ("protocol", _) => Some(protocol_name(rule.rule.protocol).into_owned()),
        ("from-port", _) => port_numbers(rule.rule.protocol).map(|(from, _)| from.to_string()),
        ("to-port", _) => port_numbers(rule.rule.protocol).map(|(_, to)| to.to_string()),
        _ => None,
    }
}

/// Rules grouped by their protocol, as DescribeSecurityGroups shows them.
pub fn permissions(rules: &[GroupRule]) -> Vec<Struct> {
    let mut protocols: Vec<Protocol> = Vec::new();
    for rule in rules {
        if !protocols.contains(&rule.rule.protocol) {
            protocols.push(rule.rule.protocol);
        }
    }
    protocols
        .into_iter()
        .map(|protocol| {
            let (mut v4, mut v6, mut groups, mut lists) = (vec![], vec![], vec![], vec![]);
            for rule in rules.iter().filter(|r| r.rule.protocol == protocol) {
                let node = match rule.rule.peer {
                    Peer::Cidr(net) => {
                        let name = if matches!(net, IpNet::V4(_)) { "cidrIp" } else { "cidrIpv6" };
                        Struct::new().with(name, net.to_string())
                    }
                    Peer::Group(id) => Struct::new().with("groupId", id).with("userId", OWNER_ID),
                    Peer::PrefixList(id) => Struct::new().with("prefixListId", id),
                };
                let node = node.with_some("description", rule.description.as_ref());
                match rule.rule.peer {
                    Peer::Cidr(IpNet::V4(_)) => v4.push(node),
                    Peer::Cidr(IpNet::V6(_)) => v6.push(node),
                    Peer::Group(_) => groups.push(node),
                    Peer::PrefixList(_) => lists.push(node),
                }
            }
            with_protocol(Struct::new(), protocol)
                .list("ipRanges", v4)
                .list("ipv6Ranges", v6)
                .list("groups", groups)
                .list("prefixListIds", lists)
        })
        .collect()
}

fn rule_node(group: model::GroupId, rule: &GroupRule, direction: Direction) -> Struct {
    let node = Struct::new()
        .with("securityGroupRuleId", rule.rule.id)
        .with("groupId", group)
        .with("groupOwnerId", OWNER_ID)
        .with("isEgress", direction == Direction::Egress)
        .with_some("description", rule.description.as_ref());
    let node = with_protocol(node, rule.rule.protocol);
    // The ports stand in every rule of this form; -1 for all.
    let node = match port_numbers(rule.rule.protocol) {
        Some(_) => node,
        None => node.with("fromPort", -1i64).with("toPort", -1i64),
    };
    let node = match rule.rule.peer {
        Peer::Cidr(IpNet::V4(net)) => node.with("cidrIpv4", net),
        Peer::Cidr(IpNet::V6(net)) => node.with("cidrIpv6", net.to_string()),
        Peer::Group(id) => node.with(
            "referencedGroupInfo",
            Struct::new().with("groupId", id).with("userId", OWNER_ID),
        ),
        Peer::PrefixList(list) => node.with("prefixListId", list),
    };
    node.list("tagSet", tag_set(&rule.tags))
}

pub fn describe_rules(context: &Context<'_>, params: &Params) -> Result<Struct, ApiError> {
    const ACTION: &str = "DescribeSecurityGroupRules";
    let ids = params.texts("SecurityGroupRuleId");
    let filters =
        Filters::read(params)?.known(&["group-id", "security-group-rule-id", "tag-key"])?;
    let secret = page_secret(context.state);
    let page = Page::read(params, ACTION, !ids.is_empty(), &secret)?;
    let mut rows: Vec<(&Group, &GroupRule, Direction)> = Vec::new();
    for group in context.state.groups.iter() {
        rows.extend(group.ingress.iter().map(|r| (group, r, Direction::Ingress)));
        rows.extend(group.egress.iter().map(|r| (group, r, Direction::Egress)));
    }
    rows.sort_by_key(|(_, r, _)| r.rule.id);
    for text in &ids {
        let id = read_rule_id(text)?;
        if !rows.iter().any(|(_, r, _)| r.rule.id == id) {
            return Err(missing_rule(text));
        }
    }
    let admitted = rows.into_iter().filter(|(group, rule, _)| {
        let tags: &Tags = &rule.tags;
        let id = rule.rule.id.to_string();
        (ids.is_empty() || ids.contains(&id.as_str()))
            && filters.admit(tags, |name| match name {
                "group-id" => vec![Cow::Owned(group.id.to_string())],
                _ => vec![Cow::Owned(id.clone())],
            })
    });
    let (rows, next) = page.cut(admitted, |(_, r, _)| r.rule.id.to_string(), ACTION, &secret);
    let nodes = rows.into_iter().map(|(g, r, d)| rule_node(g.id, r, d));
    Ok(Struct::new().list("securityGroupRuleSet", nodes).with_some("nextToken", next))
}

/// Every group that is named must be there.
pub fn groups_named<'a>(state: &'a State, ids: &[&str]) -> Result<Vec<&'a Group>, ApiError> {
    find_all(state, ids)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_is_of_the_family_that_its_parameter_is_for() {
        let four = read_cidr::<Ipv4Net>("10.0.0.9/24").unwrap();
        assert_eq!(four, Peer::Cidr("10.0.0.0/24".parse().unwrap()), "what is behind is cut");
        assert!(read_cidr::<Ipv6Net>("2001:db8::/32").is_ok());
        for wrong in ["::/0", "10.0.0.0", "10.0.0.0/33", ""] {
            let told = read_cidr::<Ipv4Net>(wrong).unwrap_err().to_string();
            assert!(told.contains("malformed"), "{wrong}: {told}");
        }
        assert!(read_cidr::<Ipv6Net>("0.0.0.0/0").is_err());
    }
}
