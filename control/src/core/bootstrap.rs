//! What is in the store from its first day: the default VPC, a subnet for the
//! zone, the default group, and the secret that seals page tokens.

use ipnet::Ipv4Net;
use model::{GroupId, Peer, Protocol, Rule, RuleId, SubnetId, VpcId};

use super::{Context, Draft};
use crate::auth::hex;
use crate::record::{Group, GroupRule, Meta, Name, Subnet, Tags, Vpc};
use crate::state::State;

/// As EC2's default VPC and its first subnet.
const VPC_CIDR: ([u8; 4], u8) = ([172, 31, 0, 0], 16);
const SUBNET_PREFIX: u8 = 20;

const PAGE_SECRET: &str = "page-secret";
const SETTINGS: &str = "settings";
/// When this store began: hosts know by it that its revisions count anew.
const EPOCH: &str = "epoch";

/// 0 where nobody wrote it down yet.
pub fn epoch(state: &State) -> u64 {
    state.meta.get(EPOCH).and_then(|meta| meta.value.parse().ok()).unwrap_or(0)
}

fn net((octets, length): ([u8; 4], u8)) -> Ipv4Net {
    Ipv4Net::new_assert(octets.into(), length)
}

/// Adds whatever is missing, and takes note when the daemon's settings changed.
pub fn bootstrap(context: &Context<'_>, draft: &mut Draft) {
    let state = context.state;
    if state.meta.get(PAGE_SECRET).is_none() {
        let value = hex(&[draft.bits().to_be_bytes(), draft.bits().to_be_bytes()].concat());
        draft.plan.put(state, &Meta { name: PAGE_SECRET.to_owned(), value });
    }
    if state.meta.get(EPOCH).is_none() {
        let value = context.now_ms.to_string();
        draft.plan.put(state, &Meta { name: EPOCH.to_owned(), value });
    }
    let settings = context.settings.fingerprint();
    draft.plan.put(state, &Meta { name: SETTINGS.to_owned(), value: settings });
    let vpc = match state.vpcs.iter().find(|v| v.default) {
        Some(vpc) => vpc.clone(),
        None => {
            let vpc = Vpc {
                id: VpcId::from_random(draft.bits()),
                cidr: net(VPC_CIDR),
                default: true,
                tags: Tags::new(),
            };
            draft.plan.put(state, &vpc);
            default_group(context, draft, vpc.id);
            vpc
        }
    };
    if state.subnets.iter().any(|s| s.zone == context.settings.zone) {
        return;
    }
    let taken: Vec<Ipv4Net> = state.subnets.iter().map(|s| s.cidr).collect();
    let free =
        vpc.cidr.subnets(SUBNET_PREFIX).ok().and_then(|mut s| s.find(|c| !taken.contains(c)));
    if let Some(cidr) = free {
        let subnet = Subnet {
            id: SubnetId::from_random(draft.bits()),
            vpc: vpc.id,
            cidr,
            zone: context.settings.zone.clone(),
            default: true,
            tags: Tags::new(),
        };
        draft.plan.put(state, &subnet);
    }
}

fn default_group(context: &Context<'_>, draft: &mut Draft, vpc: VpcId) {
    let id = GroupId::from_random(draft.bits());
    let from_members = Rule {
        id: RuleId::from_random(draft.bits()),
        protocol: Protocol::Any,
        peer: Peer::Group(id),
    };
    let group = Group {
        id,
        vpc,
        name: "default".to_owned(),
        description: "default VPC security group".to_owned(),
        ingress: vec![GroupRule { rule: from_members, description: None, tags: Tags::new() }],
        egress: vec![allow_all(draft)],
        tags: Tags::new(),
    };
    let name = Name { name: group_name(vpc, "default"), owner: id.to_string() };
    draft.plan.put(context.state, &name);
    draft.plan.put(context.state, &group);
}

/// What every new group lets out.
pub fn allow_all(draft: &mut Draft) -> GroupRule {
    let anywhere = Peer::Cidr(net(([0, 0, 0, 0], 0)).into());
    let rule =
        Rule { id: RuleId::from_random(draft.bits()), protocol: Protocol::Any, peer: anywhere };
    GroupRule { rule, description: None, tags: Tags::new() }
}

pub fn group_name(vpc: VpcId, name: &str) -> String {
    format!("group/{vpc}/{name}")
}

/// What page tokens are sealed with.
pub fn page_secret(state: &crate::state::State) -> Vec<u8> {
    state.meta.get(PAGE_SECRET).map_or_else(Vec::new, |m| m.value.clone().into_bytes())
}
