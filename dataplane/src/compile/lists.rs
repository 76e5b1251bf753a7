//! Prefix lists that rules name, and how many rules a group and an interface may have.

use std::collections::BTreeSet;
use std::net::IpAddr;

use model::security_group::RULES_AN_INTERFACE_MAX;
use model::{Direction, Peer, PrefixList, RuleId, RuleLimits, SecurityGroup};
use rpc::dataplane::{self, Desired, Listed};

use super::{Error, Names};

const BOTH: [Direction; 2] = [Direction::Ingress, Direction::Egress];

/// What contradicts itself, or is more than the state itself allows.
pub fn refuse(desired: &Desired) -> Result<(), Error> {
    let mut seen = BTreeSet::new();
    for list in &desired.prefix_lists {
        let wrong = |cause| Error::PrefixList { list: list.id, cause };
        if !seen.insert(list.id) {
            return Err(wrong("it appears twice".to_owned()));
        }
        if let Some(cause) = list.refused() {
            return Err(wrong(cause));
        }
    }
    for group in &desired.groups {
        let rules = BOTH.iter().flat_map(|d| group.rules(*d));
        for peer in rules.map(|r| r.peer) {
            if let Peer::PrefixList(list) = peer
                && !seen.contains(&list)
            {
                return Err(Error::UnknownList { group: group.id, list });
            }
        }
    }
    match desired.rule_limits {
        Some(limits) => within(desired, limits),
        None => Ok(()),
    }
}

fn within(desired: &Desired, limits: RuleLimits) -> Result<(), Error> {
    if let Some(cause) = limits.refused() {
        return Err(Error::RuleLimits { cause });
    }
    let most = limits.rules_a_group;
    for group in &desired.groups {
        for direction in BOTH {
            for (family, count) in
                ["IPv4", "IPv6"].into_iter().zip(weights(group, direction, desired))
            {
                if count > most {
                    let group = group.id;
                    return Err(Error::GroupTooLarge { group, direction, family, count, most });
                }
            }
        }
    }
    let most = limits.groups_an_interface as usize;
    match desired.interfaces.iter().find(|i| i.groups.len() > most) {
        Some(i) => Err(Error::GroupsBeyondLimit { interface: i.id, count: i.groups.len(), most }),
        None => Ok(()),
    }
}

fn weights(group: &SecurityGroup, direction: Direction, desired: &Desired) -> [u32; 2] {
    let rules = group.rules(direction).iter();
    rules
        .map(|r| r.weight(&desired.prefix_lists))
        .fold([0; 2], |[a, b], [c, d]| [a.saturating_add(c), b.saturating_add(d)])
}

/// What the rules of an interface's groups come to: those of lists as often as the
/// lists have room, any other one once.
pub fn rules_within(
    interface: &dataplane::Interface,
    groups: &[&SecurityGroup],
    direction: Direction,
    lists: &[PrefixList],
) -> Result<(), Error> {
    let weight = |r: &model::Rule| r.weight(lists).into_iter().max().unwrap_or(0) as usize;
    let count: usize = groups.iter().flat_map(|g| g.rules(direction)).map(weight).sum();
    match count > RULES_AN_INTERFACE_MAX {
        true => Err(Error::TooManyRules { interface: interface.id, direction, count }),
        false => Ok(()),
    }
}

impl Names {
    /// The list of each rule that names one.
    pub(super) fn list(&mut self, desired: &Desired) {
        let rules = desired.groups.iter().flat_map(|g| g.ingress.iter().chain(&g.egress));
        for rule in rules {
            if let Peer::PrefixList(id) = rule.peer
                && let Some(list) = desired.prefix_lists.iter().find(|l| l.id == id)
            {
                self.lists.insert(rule.id, list.clone());
            }
        }
    }

    /// By which entry of a list the rule lets the remote address pass.
    pub fn listed(&self, rule: Option<RuleId>, remote: Option<IpAddr>) -> Option<Listed> {
        let list = self.lists.get(&rule?)?;
        let entry = list.entry(remote?)?;
        let description = entry.description.clone();
        Some(Listed { list: list.id, version: list.version, net: entry.net, description })
    }

    /// The entries by which a packet's rules let it out and in.
    pub fn both_listed(
        &self,
        (egress, ingress): (Option<RuleId>, Option<RuleId>),
        (source, destination): (Option<IpAddr>, Option<IpAddr>),
    ) -> Vec<Listed> {
        let both = [self.listed(egress, destination), self.listed(ingress, source)];
        both.into_iter().flatten().collect()
    }
}
