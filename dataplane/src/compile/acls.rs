//! Network ACLs to policies: one bit an entry, in the order of their numbers.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use ebpf::Reason;
use ipnet::IpNet;
use model::network_acl::{ENTRIES_MAX, Entry, NUMBER_MAX};
use model::{Direction, NetworkAcl, NetworkAclId, Peer, Protocol, Rule, RuleId};
use rpc::dataplane::{self, AclDenied, Desired};

use super::{Compiler, Error, Tables, policy};

const _: () = assert!(ENTRIES_MAX <= 64, "the entries that permit are bits of one word");

pub type ById<'a> = BTreeMap<NetworkAclId, &'a NetworkAcl>;

/// The ACLs of the desired state, none of which contradicts itself.
pub fn by_id(desired: &Desired) -> Result<ById<'_>, Error> {
    let mut all = BTreeMap::new();
    for acl in &desired.network_acls {
        let wrong = |cause| Error::NetworkAcl { acl: acl.id, cause };
        if all.insert(acl.id, acl).is_some() {
            return Err(wrong("it appears twice".to_owned()));
        }
        for direction in [Direction::Ingress, Direction::Egress] {
            let entries = acl.ordered(direction);
            if entries.len() > ENTRIES_MAX {
                let count = entries.len();
                return Err(wrong(format!(
                    "{count} {direction} entries, but {ENTRIES_MAX} are the most"
                )));
            }
            let mut numbers = BTreeSet::new();
            for number in entries.iter().map(|e| e.number) {
                if !(1..=NUMBER_MAX).contains(&number) || !numbers.insert(number) {
                    return Err(wrong(format!(
                        "{direction} entry {number}: numbers are 1 to {NUMBER_MAX}, each once"
                    )));
                }
            }
        }
    }
    Ok(all)
}

/// Whether nothing of one family is ever denied: then nobody need be asked.
fn permits_all(entries: &[&Entry], six: bool) -> bool {
    let of_family = |net: &IpNet| matches!(net, IpNet::V6(_)) == six;
    let first = entries.iter().find(|e| {
        of_family(&e.net) && (!e.allow || e.protocol == Protocol::Any && e.net.prefix_len() == 0)
    });
    first.is_some_and(|e| e.allow)
}

impl Compiler<'_> {
    /// The policy of an interface's ACL, as its record names it.
    pub(super) fn acl(
        &mut self,
        i: &dataplane::Interface,
        ifindex: u32,
        direction: Direction,
    ) -> Result<u16, Error> {
        let Some(id) = i.network_acl else { return Ok(0) };
        let acl = *self.acls.get(&id).ok_or(Error::UnknownAcl { interface: i.id, acl: id })?;
        if acl.vpc != i.vpc {
            return Err(Error::ForeignAcl { interface: i.id, acl: id });
        }
        let entries = acl.ordered(direction);
        let numbers: Arc<[u16]> = entries.iter().map(|e| e.number).collect();
        self.tables.names.acls.insert((ifindex, direction), (id, numbers));
        if permits_all(&entries, false) && (i.subnet6.is_none() || permits_all(&entries, true)) {
            return Ok(0);
        }
        let rules: Vec<Rule> = entries.iter().map(|e| rule(e)).collect();
        let mut content = policy::of_rules(rules.iter().collect(), &BTreeMap::new(), &[]);
        let allowing = entries.iter().enumerate().filter(|(_, e)| e.allow);
        content.allow = allowing.fold(0, |bits, (n, _)| bits | 1 << n);
        Ok(self.places.slot(content)? as u16 + 1)
    }
}

/// What an entry matches, without its number.
fn rule(entry: &Entry) -> Rule {
    Rule { id: RuleId::from_random(0), protocol: entry.protocol, peer: Peer::Cidr(entry.net) }
}

/// Who denied a packet, where an ACL did. `ends`: the ifindexes of its sender and its
/// receiver; `entries`: what the programs told, from 1.
pub fn acl_denied(
    tables: &Tables,
    reason: Reason,
    (sender, receiver): (Option<u32>, Option<u32>),
    (egress, ingress): (u16, u16),
) -> Option<AclDenied> {
    let (ifindex, direction, entry) = match reason {
        Reason::AclEgressDenied => (sender?, Direction::Egress, egress),
        Reason::AclIngressDenied => (receiver?, Direction::Ingress, ingress),
        _ => return None,
    };
    let (acl, numbers) = tables.names.acls.get(&(ifindex, direction))?;
    let entry = usize::from(entry).checked_sub(1).and_then(|n| numbers.get(n)).copied();
    Some(AclDenied { acl: *acl, entry })
}

/// The places of rules of groups: where an ACL denied, its entry stands in one of them.
pub fn group_rules(reason: Reason, (egress, ingress): (u16, u16)) -> (u16, u16) {
    match reason {
        Reason::AclEgressDenied => (0, ingress),
        Reason::AclIngressDenied => (egress, 0),
        _ => (egress, ingress),
    }
}
