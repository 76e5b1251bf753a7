//! The changes that lead from one set of tables to another, make-before-break.
//!
//! Called by `load` with what the kernel has and what it should have. The order:
//!
//! ```text
//!  1 policies written where nothing points yet       ┐ make
//!  2 routes, private addresses and rates added       ┘
//!  3 interface records exchanged: each at once names its new policies
//!  4 elastic addresses, prefixes, configuration
//!  5 guests' devices, the punt device, the uplink attached
//!  6 devices detached; entries removed               ┐ break
//!  7 (policies need no removal: nothing points there)┘
//!  8 a wait until every packet has left the old policies
//! ```
//! A device is attached only after its record is there, and its record is removed
//! only after it is detached: a packet never meets a device without an interface.

use std::collections::{BTreeMap, BTreeSet};

use ebpf::V6;
use ebpf::layout::{
    Config, Elastic, Holder, Hop, Interface, Local, LocalKey, Prefix, Prefix6, RouteKey, Six,
};
use ebpf::rate::Rates;

use crate::compile::{Attachment, Placed, Role, Tables};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    PutPolicy {
        slot: u32,
        policy: Placed,
    },
    PutLocal(LocalKey, Local),
    PutHolder(V6, Holder),
    PutSix(u32, Six),
    PutRoute(RouteKey, Hop),
    Block6(Prefix6),
    /// Counters and quota of the slot begin anew.
    ResetSlot(u32),
    /// Limits of a slot; what is missing from its buckets stays missing.
    PutRates {
        slot: u32,
        rates: Rates,
    },
    PutInterface(Interface),
    PutElastic {
        address: u32,
        elastic: Elastic,
    },
    Block(Prefix),
    PutRange {
        prefix: Prefix,
        kind: u32,
    },
    PutConfig(Config),
    Attach {
        ifindex: u32,
        attachment: Attachment,
    },
    Detach {
        ifindex: u32,
        attachment: Attachment,
    },
    RemoveElastic(u32),
    RemoveInterface(u32),
    RemoveLocal(LocalKey),
    RemoveHolder(V6),
    RemoveSix(u32),
    RemoveRoute(RouteKey),
    Unblock6(Prefix6),
    Unblock(Prefix),
    RemoveRange(Prefix),
    /// Policies and route tables that nothing points to any more are free once this is done.
    AwaitReaders,
}

pub fn diff(from: &Tables, to: &Tables) -> Vec<Change> {
    let mut changes = Vec::new();
    for (slot, policy) in added(&from.policies, &to.policies) {
        changes.push(Change::PutPolicy { slot: *slot, policy: policy.clone() });
    }
    changes.extend(added(&from.routes, &to.routes).map(|(k, hop)| Change::PutRoute(*k, *hop)));
    for (key, local) in added(&from.locals, &to.locals) {
        changes.push(Change::PutLocal(*key, *local));
    }
    for (slot, rates) in added(&from.rates, &to.rates) {
        changes.push(Change::PutRates { slot: *slot, rates: *rates });
    }
    changes.extend(added(&from.sixes, &to.sixes).map(|(i, six)| Change::PutSix(*i, *six)));
    let slots: BTreeMap<u32, u64> = from.interfaces.values().map(|i| (i.slot, i.id)).collect();
    for (_, interface) in added(&from.interfaces, &to.interfaces) {
        if slots.get(&interface.slot) != Some(&interface.id) {
            changes.push(Change::ResetSlot(interface.slot));
        }
        changes.push(Change::PutInterface(*interface));
    }
    for (address, elastic) in added(&from.elastics, &to.elastics) {
        changes.push(Change::PutElastic { address: *address, elastic: *elastic });
    }
    changes.extend(to.blocked.difference(&from.blocked).map(|p| Change::Block(*p)));
    for (prefix, kind) in added(&from.ranges, &to.ranges) {
        changes.push(Change::PutRange { prefix: *prefix, kind: *kind });
    }
    changes.extend(added(&from.holders, &to.holders).map(|(a, h)| Change::PutHolder(*a, *h)));
    changes.extend(to.blocked6.difference(&from.blocked6).map(|p| Change::Block6(*p)));
    if from.config != to.config {
        changes.push(Change::PutConfig(to.config));
    }
    exchange_attachments(from, to, &mut changes);
    remove(from, to, &mut changes);
    let freed = gone(&from.policies, &to.policies).next().is_some()
        || gone(&from.routes, &to.routes).next().is_some();
    if freed {
        changes.push(Change::AwaitReaders);
    }
    changes
}

/// Whether a device may change from one role to the other without a gap.
fn together(a: Role, b: Role) -> bool {
    let uplink = |role| matches!(role, Role::Uplink | Role::UplinkEarly);
    a == b || uplink(a) && uplink(b)
}

/// A device that changes its role is detached before it is attached anew, but for
/// the uplink's two roles.
fn exchange_attachments(from: &Tables, to: &Tables, changes: &mut Vec<Change>) {
    let role = |tables: &Tables, i: &u32| tables.attachments.get(i).map(|a| a.role);
    let detach = |ifindex: u32, attachment: &Attachment| Change::Detach {
        ifindex,
        attachment: attachment.clone(),
    };
    for (ifindex, old) in &from.attachments {
        if role(to, ifindex).is_some_and(|new| !together(new, old.role)) {
            changes.push(detach(*ifindex, old));
        }
    }
    for (ifindex, new) in &to.attachments {
        if role(from, ifindex) != Some(new.role) {
            changes.push(Change::Attach { ifindex: *ifindex, attachment: new.clone() });
        }
    }
    for (ifindex, old) in &from.attachments {
        if !to.attachments.contains_key(ifindex) {
            changes.push(detach(*ifindex, old));
        }
    }
}

fn remove(from: &Tables, to: &Tables, changes: &mut Vec<Change>) {
    changes.extend(gone(&from.elastics, &to.elastics).map(|k| Change::RemoveElastic(*k)));
    changes.extend(gone(&from.holders, &to.holders).map(|k| Change::RemoveHolder(*k)));
    changes.extend(gone(&from.sixes, &to.sixes).map(|k| Change::RemoveSix(*k)));
    changes.extend(from.blocked6.difference(&to.blocked6).map(|p| Change::Unblock6(*p)));
    changes.extend(gone(&from.interfaces, &to.interfaces).map(|k| Change::RemoveInterface(*k)));
    changes.extend(gone(&from.routes, &to.routes).map(|k| Change::RemoveRoute(*k)));
    changes.extend(gone(&from.locals, &to.locals).map(|k| Change::RemoveLocal(*k)));
    let unblocked: BTreeSet<_> = from.blocked.difference(&to.blocked).collect();
    changes.extend(unblocked.into_iter().map(|p| Change::Unblock(*p)));
    changes.extend(gone(&from.ranges, &to.ranges).map(|k| Change::RemoveRange(*k)));
    let unlimited = gone(&from.rates, &to.rates);
    changes.extend(unlimited.map(|k| Change::PutRates { slot: *k, rates: Rates::default() }));
}

/// New and changed entries.
fn added<'a, K: Ord, V: PartialEq>(
    from: &'a BTreeMap<K, V>,
    to: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = (&'a K, &'a V)> {
    to.iter().filter(|(key, value)| from.get(key) != Some(value))
}

fn gone<'a, K: Ord, V>(
    from: &'a BTreeMap<K, V>,
    to: &'a BTreeMap<K, V>,
) -> impl Iterator<Item = &'a K> {
    from.keys().filter(|key| !to.contains_key(key))
}
