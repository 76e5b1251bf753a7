//! The changes that lead from one set of tables to another, make-before-break.
//!
//! Called by `load` with what the kernel has and what it should have. Records stand in two
//! halves, of which packets meet one (`ebpf::layout::HALVES`). The order:
//!
//! ```text
//!  1 policies and routes written where nothing points yet; rates, blocks  ┐ make
//!  2 devices detached that no state wants                                 │
//!  3 the hidden half: records put and removed                             ┘
//!  4 published: packets are judged by all of it from here on
//!  5 devices attached; blocked prefixes and rates removed                 ┐
//!  6 a wait until every packet has left the old records                   │ break
//!  7 routes removed (policies need no removal: nothing points there)      ┘
//! ```
//! Every packet meets the old records or the new ones, whole: one between two interfaces too.
//! A blocked prefix comes before anything else that a packet is asked, so what is blocked
//! early or unblocked late is dropped as one of both states says. A device is attached only
//! after its record is there, and its record is removed only after it is detached: a packet
//! never meets a device without an interface.

use std::collections::BTreeMap;

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
    PutRange6 {
        prefix: Prefix6,
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
    RemoveRange6(Prefix6),
    /// The hidden half is what packets are judged by from now on.
    Publish,
    /// Policies and route tables that nothing points to any more are free once this is done,
    /// and nobody reads the half that was left.
    AwaitReaders,
}

impl Change {
    /// Whether it is of a record that stands in both halves.
    pub fn is_halved(&self) -> bool {
        match self {
            Self::PutLocal(..)
            | Self::PutHolder(..)
            | Self::PutSix(..)
            | Self::PutInterface(_)
            | Self::PutElastic { .. }
            | Self::PutRange { .. }
            | Self::PutRange6 { .. }
            | Self::PutConfig(_)
            | Self::RemoveElastic(_)
            | Self::RemoveInterface(_)
            | Self::RemoveLocal(_)
            | Self::RemoveHolder(_)
            | Self::RemoveSix(_)
            | Self::RemoveRange(_)
            | Self::RemoveRange6(_) => true,
            Self::PutPolicy { .. }
            | Self::PutRoute(..)
            | Self::RemoveRoute(_)
            | Self::AwaitReaders
            | Self::Block(_)
            | Self::Block6(_)
            | Self::Unblock(_)
            | Self::Unblock6(_)
            | Self::ResetSlot(_)
            | Self::PutRates { .. }
            | Self::Attach { .. }
            | Self::Detach { .. }
            | Self::Publish => false,
        }
    }
}

pub fn diff(from: &Tables, to: &Tables) -> Vec<Change> {
    let mut changes = Vec::new();
    for (slot, policy) in added(&from.policies, &to.policies) {
        changes.push(Change::PutPolicy { slot: *slot, policy: policy.clone() });
    }
    changes.extend(added(&from.routes, &to.routes).map(|(k, hop)| Change::PutRoute(*k, *hop)));
    for (slot, rates) in added(&from.rates, &to.rates) {
        changes.push(Change::PutRates { slot: *slot, rates: *rates });
    }
    changes.extend(to.blocked.difference(&from.blocked).map(|p| Change::Block(*p)));
    changes.extend(to.blocked6.difference(&from.blocked6).map(|p| Change::Block6(*p)));
    let slots = |tables: &Tables| -> BTreeMap<u32, u64> {
        let gateways = tables.nat_gateways().map(|(_, gateway)| gateway);
        tables.interfaces.values().chain(gateways).map(|i| (i.slot, i.id)).collect()
    };
    let begins = added(&slots(from), &slots(to))
        .map(|(slot, _)| Change::ResetSlot(*slot))
        .collect::<Vec<_>>();
    changes.extend(begins);
    detach(from, to, &mut changes);
    let records = records(from, to);
    let published = !records.is_empty();
    changes.extend(records);
    if published {
        changes.push(Change::Publish);
    }
    attach(from, to, &mut changes);
    changes.extend(from.blocked.difference(&to.blocked).map(|p| Change::Unblock(*p)));
    changes.extend(from.blocked6.difference(&to.blocked6).map(|p| Change::Unblock6(*p)));
    let unlimited = gone(&from.rates, &to.rates);
    changes.extend(unlimited.map(|k| Change::PutRates { slot: *k, rates: Rates::default() }));
    if published {
        changes.push(Change::AwaitReaders);
    }
    changes.extend(gone(&from.routes, &to.routes).map(|k| Change::RemoveRoute(*k)));
    changes
}

/// The changes of what stands in both halves.
pub fn records(from: &Tables, to: &Tables) -> Vec<Change> {
    let mut changes = Vec::new();
    changes.extend(added(&from.locals, &to.locals).map(|(k, l)| Change::PutLocal(*k, *l)));
    changes.extend(added(&from.sixes, &to.sixes).map(|(i, six)| Change::PutSix(*i, *six)));
    changes.extend(added(&from.interfaces, &to.interfaces).map(|(_, i)| Change::PutInterface(*i)));
    for (address, elastic) in added(&from.elastics, &to.elastics) {
        changes.push(Change::PutElastic { address: *address, elastic: *elastic });
    }
    for (prefix, kind) in added(&from.ranges, &to.ranges) {
        changes.push(Change::PutRange { prefix: *prefix, kind: *kind });
    }
    for (prefix, kind) in added(&from.ranges6, &to.ranges6) {
        changes.push(Change::PutRange6 { prefix: *prefix, kind: *kind });
    }
    changes.extend(added(&from.holders, &to.holders).map(|(a, h)| Change::PutHolder(*a, *h)));
    if from.config != to.config {
        changes.push(Change::PutConfig(to.config));
    }
    changes.extend(gone(&from.elastics, &to.elastics).map(|k| Change::RemoveElastic(*k)));
    changes.extend(gone(&from.holders, &to.holders).map(|k| Change::RemoveHolder(*k)));
    changes.extend(gone(&from.sixes, &to.sixes).map(|k| Change::RemoveSix(*k)));
    changes.extend(gone(&from.interfaces, &to.interfaces).map(|k| Change::RemoveInterface(*k)));
    changes.extend(gone(&from.locals, &to.locals).map(|k| Change::RemoveLocal(*k)));
    changes.extend(gone(&from.ranges, &to.ranges).map(|k| Change::RemoveRange(*k)));
    changes.extend(gone(&from.ranges6, &to.ranges6).map(|k| Change::RemoveRange6(*k)));
    changes
}

/// Whether a device may change from one role to the other without a gap.
fn together(a: Role, b: Role) -> bool {
    let uplink = |role| matches!(role, Role::Uplink | Role::UplinkEarly);
    a == b || uplink(a) && uplink(b)
}

fn role(tables: &Tables, ifindex: u32) -> Option<Role> {
    tables.attachments.get(&ifindex).map(|a| a.role)
}

/// A device that changes its role is detached before it is attached anew, but for
/// the uplink's two roles.
fn detach(from: &Tables, to: &Tables, changes: &mut Vec<Change>) {
    for (ifindex, old) in &from.attachments {
        if role(to, *ifindex).is_none_or(|new| !together(new, old.role)) {
            changes.push(Change::Detach { ifindex: *ifindex, attachment: old.clone() });
        }
    }
}

fn attach(from: &Tables, to: &Tables, changes: &mut Vec<Change>) {
    for (ifindex, new) in &to.attachments {
        if role(from, *ifindex) != Some(new.role) {
            changes.push(Change::Attach { ifindex: *ifindex, attachment: new.clone() });
        }
    }
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
