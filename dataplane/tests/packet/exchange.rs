//! Changes lead from any tables to any others, and no packet on the way meets half
//! a policy.

use std::collections::BTreeMap;

use dataplane::compile::{Placed, Role, Tables, compile};
use dataplane::diff::{Change, diff};
use ebpf::layout::Policy;

use crate::random::Random;
use crate::world::{desired, imagined_devices};

/// The kernel's arrays and maps, as far as changes touch them.
#[derive(Default)]
struct Kernel {
    tables: Tables,
    policies: BTreeMap<u32, Policy>,
    steps: BTreeMap<u32, ebpf::layout::Step>,
    steps6: BTreeMap<u32, ebpf::layout::Step6>,
    words: BTreeMap<u32, u64>,
}

impl Kernel {
    fn apply(&mut self, change: &Change) {
        let t = &mut self.tables;
        match change {
            Change::PutPolicy { slot, policy } => {
                self.steps.extend((policy.first_step..).zip(policy.steps()));
                self.steps6.extend((policy.first_step6..).zip(policy.steps6()));
                self.words.extend((policy.first_word..).zip(policy.content.rows.iter().copied()));
                self.policies.insert(*slot, policy.record());
            }
            Change::PutLocal(key, local) => drop(t.locals.insert(*key, *local)),
            Change::PutRates { slot, rates } if rates.limited() => {
                t.rates.insert(*slot, *rates);
            }
            Change::PutRates { slot, .. } => drop(t.rates.remove(slot)),
            Change::ResetSlot(_) | Change::AwaitReaders => {}
            Change::PutHolder(address, holder) => drop(t.holders.insert(*address, *holder)),
            Change::PutSix(ifindex, six) => drop(t.sixes.insert(*ifindex, *six)),
            Change::PutRoute(key, hop) => drop(t.routes.insert(*key, *hop)),
            Change::RemoveRoute(key) => drop(t.routes.remove(key)),
            Change::Block6(prefix) => drop(t.blocked6.insert(*prefix)),
            Change::RemoveHolder(address) => drop(t.holders.remove(address)),
            Change::RemoveSix(ifindex) => drop(t.sixes.remove(ifindex)),
            Change::Unblock6(prefix) => drop(t.blocked6.remove(prefix)),
            Change::PutInterface(i) => drop(t.interfaces.insert(i.ifindex, *i)),
            Change::PutElastic { address, elastic } => drop(t.elastics.insert(*address, *elastic)),
            Change::Block(prefix) => drop(t.blocked.insert(*prefix)),
            Change::PutRange { prefix, kind } => drop(t.ranges.insert(*prefix, *kind)),
            Change::PutConfig(config) => t.config = *config,
            Change::Attach { ifindex, attachment } => {
                let before = t.attachments.insert(*ifindex, attachment.clone());
                let uplink = |role| matches!(role, Role::Uplink | Role::UplinkEarly);
                assert!(before.is_none_or(|b| uplink(b.role) && uplink(attachment.role)));
            }
            Change::Detach { ifindex, .. } => assert!(t.attachments.remove(ifindex).is_some()),
            Change::RemoveElastic(address) => drop(t.elastics.remove(address)),
            Change::RemoveInterface(ifindex) => {
                assert!(!t.attachments.contains_key(ifindex), "removed under an attached device");
                t.interfaces.remove(ifindex);
            }
            Change::RemoveLocal(key) => drop(t.locals.remove(key)),
            Change::Unblock(prefix) => drop(t.blocked.remove(prefix)),
            Change::RemoveRange(prefix) => drop(t.ranges.remove(prefix)),
        }
    }

    /// Whether a packet would find exactly this policy in this slot.
    fn holds(&self, slot: u32, placed: &Placed) -> bool {
        self.policies.get(&slot) == Some(&placed.record())
            && (placed.first_step..)
                .zip(placed.steps())
                .all(|(i, s)| self.steps.get(&i) == Some(&s))
            && (placed.first_step6..)
                .zip(placed.steps6())
                .all(|(i, s)| self.steps6.get(&i) == Some(&s))
            && (placed.first_word..)
                .zip(&placed.content.rows)
                .all(|(i, w)| self.words.get(&i) == Some(w))
    }
}

#[test]
fn changes_lead_from_any_tables_to_any_others_without_half_a_policy() {
    let mut random = Random::seeded("exchange", 31);
    let devices = imagined_devices();
    let mut kernel = Kernel::default();
    let mut from = Tables::default();
    for _ in 0..300 {
        let rules_max = random.pick(&[0, 3, 20]);
        let to = compile(&desired(&mut random, rules_max), &devices, &from).unwrap();
        let changes = diff(&from, &to);
        for change in &changes {
            kernel.apply(change);
            for interface in kernel.tables.interfaces.values() {
                let record = Some(interface);
                let of = if to.interfaces.get(&interface.ifindex) == record { &to } else { &from };
                assert_eq!(of.interfaces.get(&interface.ifindex), record);
                for slot in [interface.ingress, interface.egress] {
                    assert!(kernel.holds(slot, &of.policies[&slot]), "after {change:?}");
                }
            }
            for ifindex in kernel.tables.attachments.keys() {
                let dressed = kernel.tables.interfaces.contains_key(ifindex);
                let guest =
                    to.interfaces.contains_key(ifindex) || from.interfaces.contains_key(ifindex);
                assert!(dressed || !guest, "a guest's device without its interface");
            }
        }
        let Tables { policies, names, .. } = to.clone();
        assert_eq!(Tables { policies, names, ..kernel.tables.clone() }, to);
        assert_eq!(diff(&to, &to), Vec::new());
        from = to;
    }
}
