//! `netctl group`: security groups, which say who may reach an instance.

use clap::{Args, Subcommand};
use ipnet::IpNet;

use crate::api::session::Filter;
use crate::api::{Element, Parameters, Session};
use crate::failure::{Failure, Outcome};
use crate::listing::{Column, Listing, Shape};
use crate::{output, vpc};

#[derive(Debug, Subcommand)]
pub enum Group {
    /// Create a security group; it lets nothing in and everything out
    #[command(after_help = "EXAMPLES:\n  netctl group create web --description 'the web servers'")]
    Create {
        /// How it is called, besides its id
        name: String,
        /// What it is for [default: its name]
        #[arg(long, short)]
        description: Option<String>,
        /// Its VPC [default: the default one]
        #[arg(long)]
        vpc: Option<String>,
    },
    /// List security groups
    #[command(
        alias = "ls",
        after_help = "EXAMPLES:\n  netctl group list\n  netctl sg list -o json"
    )]
    List {
        /// Only those that fit, such as group-name=web
        #[arg(long = "filter", value_parser = Filter::parse, value_name = "NAME=VALUE")]
        filters: Vec<Filter>,
    },
    /// Show a security group with its rules
    #[command(after_help = "EXAMPLES:\n  netctl group show web")]
    Show {
        /// Its id or name
        group: String,
    },
    /// List rules by their ids, of one group or of all
    #[command(after_help = "EXAMPLES:\n  netctl group rules web\n  netctl group rules -o json")]
    Rules {
        /// Only this group's, by its id or name
        group: Option<String>,
    },
    /// Allow something
    #[command(after_help = "EXAMPLES:
  netctl group authorize web --protocol tcp --port 22 --cidr 203.0.113.0/24
  netctl group authorize web --protocol tcp --port 8000-8080 --source web
  netctl group authorize web --protocol icmp --port 8 --cidr 0.0.0.0/0
  netctl group authorize web --egress --protocol all --cidr 10.0.0.0/8")]
    Authorize(Rule),
    /// Take back what was allowed; flows that are open stay open
    #[command(after_help = "EXAMPLES:
  netctl group revoke web --protocol tcp --port 22 --cidr 203.0.113.0/24
  netctl group revoke web --egress --protocol all --cidr 0.0.0.0/0")]
    Revoke(Rule),
    /// Delete a security group that nothing uses
    #[command(alias = "rm", after_help = "EXAMPLES:\n  netctl group delete web")]
    Delete {
        /// Its id or name
        group: String,
    },
}

#[derive(Debug, Args)]
pub struct Rule {
    /// The security group, by id or name
    pub group: String,
    /// What leaves the instance, rather than what arrives
    #[arg(long)]
    pub egress: bool,
    /// tcp, udp, icmp, all, or a number
    #[arg(long, short, value_parser = parse_protocol)]
    pub protocol: String,
    /// A port, a range FIRST-LAST, or for icmp a type or TYPE-CODE [default: all]
    #[arg(long, value_parser = parse_ports, value_name = "PORT[-PORT]")]
    pub port: Option<Ports>,
    /// Whose packets, or whereto
    #[arg(long, required_unless_present = "source", conflicts_with = "source")]
    pub cidr: Option<IpNet>,
    /// Every interface of this security group, by id or name
    #[arg(long, value_name = "GROUP", alias = "source-group")]
    pub source: Option<String>,
    /// What the rule is for
    #[arg(long, short)]
    pub description: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ports {
    first: i32,
    last: i32,
}

/// EC2 writes `-1` for all protocols.
fn parse_protocol(text: &str) -> Result<String, String> {
    match text {
        "all" | "any" | "-1" => Ok("-1".to_owned()),
        "tcp" | "udp" | "icmp" | "icmpv6" => Ok(text.to_owned()),
        number if number.parse::<u8>().is_ok() => Ok(number.to_owned()),
        _ => Err("write tcp, udp, icmp, all, or a protocol's number".to_owned()),
    }
}

fn parse_ports(text: &str) -> Result<Ports, String> {
    let number = |text: &str| match text.parse::<u16>() {
        Ok(number) => Ok(i32::from(number)),
        Err(_) => Err("write a port from 0 to 65535, or a range such as 8000-8080".to_owned()),
    };
    match text.split_once('-') {
        Some((first, last)) => Ok(Ports { first: number(first)?, last: number(last)? }),
        None => Ok(Ports { first: number(text)?, last: number(text)? }),
    }
}

const PERMISSION: &[Column] = &[
    Column::new("", "protocol", "ipProtocol"),
    Column::new("", "first_port", "fromPort").shape(Shape::Number),
    Column::new("", "last_port", "toPort").shape(Shape::Number),
    Column::new("", "cidrs", "ipRanges/item/cidrIp").shape(Shape::Texts),
    Column::new("", "cidrs_v6", "ipv6Ranges/item/cidrIpv6").shape(Shape::Texts),
    Column::new("", "groups", "groups/item/groupId").shape(Shape::Texts),
];

const LISTING: Listing = Listing {
    id: "id",
    columns: &[
        Column::new("GROUP", "id", "groupId"),
        Column::new("NAME", "name", "groupName"),
        Column::new("DESCRIPTION", "description", "groupDescription"),
        Column::new("VPC", "vpc", "vpcId").wide(),
        Column::new("", "ingress", "ipPermissions/item").shape(Shape::Objects(PERMISSION)).json(),
        Column::new("", "egress", "ipPermissionsEgress/item")
            .shape(Shape::Objects(PERMISSION))
            .json(),
        Column::new("", "tags", "tagSet/item").shape(Shape::Tags).json(),
    ],
};

const RULES: Listing = Listing {
    id: "id",
    columns: &[
        Column::new("RULE", "id", "securityGroupRuleId"),
        Column::new("GROUP", "group", "groupId"),
        Column::new("EGRESS", "egress", "isEgress").shape(Shape::Flag),
        Column::new("PROTOCOL", "protocol", "ipProtocol"),
        Column::new("FIRST", "first_port", "fromPort").shape(Shape::Number),
        Column::new("LAST", "last_port", "toPort").shape(Shape::Number),
        Column::new("PEER", "peer", "cidrIpv4|cidrIpv6|referencedGroupInfo/groupId|prefixListId"),
        Column::new("DESCRIPTION", "description", "description"),
    ],
};

pub fn run(session: &Session, noun: &Group) -> Outcome {
    match noun {
        Group::Create { name, description, vpc } => {
            let vpc = match vpc {
                Some(vpc) => vpc.clone(),
                None => vpc::default(session)?,
            };
            let parameters = Parameters::new()
                .with("GroupName", name)
                .with("GroupDescription", description.as_ref().unwrap_or(name))
                .with("VpcId", vpc);
            let deed = format!("group {name}: create");
            let answer = session.call(&deed, "CreateSecurityGroup", &parameters)?;
            LISTING.show_one(session.format, &find(session, answer.text_at("groupId"))?)
        }
        Group::List { filters } => {
            LISTING.show_all(session.format, &describe(session, "groups: list", filters)?)
        }
        Group::Show { group } => LISTING.show_one(session.format, &find(session, group)?),
        Group::Rules { group } => {
            let id = group.as_ref().map(|group| resolve(session, group)).transpose()?;
            let filters: Vec<Filter> = id.iter().map(|id| Filter::new("group-id", id)).collect();
            let parameters = Parameters::new().filters(&filters);
            let (action, path) = ("DescribeSecurityGroupRules", "securityGroupRuleSet/item");
            let rules = session.describe("group: rules", action, &parameters, path)?;
            RULES.show_all(session.format, &rules)
        }
        Group::Authorize(rule) => change(session, rule, "authorize", "AuthorizeSecurityGroup"),
        Group::Revoke(rule) => change(session, rule, "revoke", "RevokeSecurityGroup"),
        Group::Delete { group } => {
            let id = resolve(session, group)?;
            let parameters = Parameters::new().with("GroupId", &id);
            session.call(&format!("group {group}: delete"), "DeleteSecurityGroup", &parameters)?;
            output::note(&format!("deleted {id}"));
            Ok(())
        }
    }
}

fn change(session: &Session, rule: &Rule, verb: &str, action: &str) -> Outcome {
    let id = resolve(session, &rule.group)?;
    let source = rule.source.as_ref().map(|s| resolve(session, s)).transpose()?;
    let parameters = permission(&id, rule, source.as_deref());
    let direction = if rule.egress { "Egress" } else { "Ingress" };
    let deed = format!("group {}: {verb} {}", rule.group, direction.to_lowercase());
    session.call(&deed, &format!("{action}{direction}"), &parameters)?;
    LISTING.show_one(session.format, &find(session, &id)?)
}

fn permission(group: &str, rule: &Rule, source: Option<&str>) -> Parameters {
    const P: &str = "IpPermissions.1";
    let mut parameters =
        Parameters::new().with("GroupId", group).with(&format!("{P}.IpProtocol"), &rule.protocol);
    if let Some((first, last)) = ports(&rule.protocol, rule.port) {
        parameters =
            parameters.with(&format!("{P}.FromPort"), first).with(&format!("{P}.ToPort"), last);
    }
    let described = match (&rule.cidr, source) {
        (Some(IpNet::V4(net)), _) => {
            parameters = parameters.with(&format!("{P}.IpRanges.1.CidrIp"), net);
            "IpRanges"
        }
        (Some(IpNet::V6(net)), _) => {
            parameters = parameters.with(&format!("{P}.Ipv6Ranges.1.CidrIpv6"), net);
            "Ipv6Ranges"
        }
        (None, Some(source)) => {
            parameters = parameters.with(&format!("{P}.Groups.1.GroupId"), source);
            "Groups"
        }
        (None, None) => return parameters,
    };
    parameters.maybe(&format!("{P}.{described}.1.Description"), rule.description.as_ref())
}

/// What EC2 calls the ports: for ICMP the type and the code, `-1` for all; and
/// nothing where a protocol has none.
fn ports(protocol: &str, ports: Option<Ports>) -> Option<(i32, i32)> {
    match (protocol, ports) {
        ("tcp" | "udp" | "6" | "17", None) => Some((0, 65535)),
        ("icmp" | "icmpv6" | "1" | "58", None) => Some((-1, -1)),
        ("icmp" | "icmpv6" | "1" | "58", Some(Ports { first, last })) if first == last => {
            Some((first, -1))
        }
        (_, Some(Ports { first, last })) => Some((first, last)),
        (_, None) => None,
    }
}

fn describe(session: &Session, deed: &str, filters: &[Filter]) -> Outcome<Vec<Element>> {
    let parameters = Parameters::new().filters(filters);
    session.describe(deed, "DescribeSecurityGroups", &parameters, "securityGroupInfo/item")
}

fn find(session: &Session, group: &str) -> Outcome<Element> {
    let key = if group.starts_with("sg-") { "group-id" } else { "group-name" };
    let found = describe(session, &format!("group {group}: show"), &[Filter::new(key, group)])?;
    found.into_iter().next().ok_or_else(|| {
        Failure::failed(format!("group {group}: none has that id or name"))
            .hint("netctl group list")
    })
}

/// The id of the security group that an id or a name speaks of.
pub fn resolve(session: &Session, group: &str) -> Outcome<String> {
    if group.starts_with("sg-") {
        return Ok(group.to_owned());
    }
    Ok(find(session, group)?.text_at("groupId").to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_are_said_as_ec2_says_them() {
        let range = |text| Some(parse_ports(text).unwrap());
        assert_eq!(ports("tcp", range("22")), Some((22, 22)));
        assert_eq!(ports("udp", range("8000-8080")), Some((8000, 8080)));
        assert_eq!(ports("tcp", None), Some((0, 65535)));
        assert_eq!(ports("icmp", range("8")), Some((8, -1)));
        assert_eq!(ports("icmp", None), Some((-1, -1)));
        assert_eq!(ports("-1", None), None);
        assert!(parse_ports("x").is_err() && parse_ports("70000").is_err());
        assert!(parse_protocol("tpc").is_err());
    }
}
