//! Changes lead from any tables to any others, and no packet on the way meets a mixture:
//! neither half a policy nor one interface's old record and another's new one.

use std::collections::BTreeMap;

use dataplane::compile::{Host, Placed, Role, Tables, compile};
use dataplane::diff::{Change, diff};
use dataplane::load::Loaded;
use ebpf::ASK_MARK;
use ebpf::layout::{Hop, Interface, Policy, RouteKey};
use nix::net::if_::if_nametoindex;

use crate::agree::{Bench, Decided, decided_unwritten};
use crate::frames::frame;
use crate::frames6;
use crate::random::Random;
use crate::world::{desired, devices, imagined_devices};

/// The kernel's arrays and maps, as far as changes touch them.
#[derive(Default)]
struct Kernel {
    /// What packets meet.
    tables: Tables,
    /// What stands in the hidden half.
    hidden: Tables,
    policies: BTreeMap<u32, Policy>,
    steps: BTreeMap<u32, ebpf::layout::Step>,
    steps6: BTreeMap<u32, ebpf::layout::Step6>,
    words: BTreeMap<u32, u64>,
}

impl Kernel {
    fn apply(&mut self, change: &Change) {
        if change.is_halved() {
            return put_record(&mut self.hidden, change);
        }
        let t = &mut self.tables;
        match change {
            Change::PutPolicy { slot, policy } => {
                self.steps.extend((policy.first_step..).zip(policy.steps()));
                self.steps6.extend((policy.first_step6..).zip(policy.steps6()));
                self.words.extend((policy.first_word..).zip(policy.content.rows.iter().copied()));
                self.policies.insert(*slot, policy.record());
            }
            Change::PutRates { slot, rates } if rates.limited() => {
                t.rates.insert(*slot, *rates);
            }
            Change::PutRates { slot, .. } => drop(t.rates.remove(slot)),
            Change::ResetSlot(_) | Change::AwaitReaders => {}
            Change::PutRoute(key, hop) => drop(t.routes.insert(*key, *hop)),
            Change::RemoveRoute(key) => drop(t.routes.remove(key)),
            Change::Block6(prefix) => drop(t.blocked6.insert(*prefix)),
            Change::Unblock6(prefix) => drop(t.blocked6.remove(prefix)),
            Change::Block(prefix) => drop(t.blocked.insert(*prefix)),
            Change::Unblock(prefix) => drop(t.blocked.remove(prefix)),
            Change::Attach { ifindex, attachment } => {
                let before = t.attachments.insert(*ifindex, attachment.clone());
                let uplink = |role| matches!(role, Role::Uplink | Role::UplinkEarly);
                assert!(before.is_none_or(|b| uplink(b.role) && uplink(attachment.role)));
            }
            Change::Detach { ifindex, .. } => assert!(t.attachments.remove(ifindex).is_some()),
            Change::Publish => {
                let hidden = self.hidden.clone();
                self.hidden = std::mem::replace(t, with_records(t, hidden));
            }
            _ => unreachable!("{change:?} is of a record in both halves"),
        }
    }

    /// What was published is repeated in the half that was left.
    fn repeat(&mut self, changes: &[Change]) {
        for change in changes.iter().filter(|c| c.is_halved()) {
            put_record(&mut self.hidden, change);
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

fn put_record(t: &mut Tables, change: &Change) {
    match change {
        Change::PutLocal(key, local) => drop(t.locals.insert(*key, *local)),
        Change::PutHolder(address, holder) => drop(t.holders.insert(*address, *holder)),
        Change::PutSix(ifindex, six) => drop(t.sixes.insert(*ifindex, *six)),
        Change::PutInterface(i) => drop(t.interfaces.insert(i.ifindex, *i)),
        Change::PutElastic { address, elastic } => drop(t.elastics.insert(*address, *elastic)),
        Change::PutRange { prefix, kind } => drop(t.ranges.insert(*prefix, *kind)),
        Change::PutRange6 { prefix, kind } => drop(t.ranges6.insert(*prefix, *kind)),
        Change::PutConfig(config) => t.config = *config,
        Change::RemoveElastic(address) => drop(t.elastics.remove(address)),
        Change::RemoveHolder(address) => drop(t.holders.remove(address)),
        Change::RemoveSix(ifindex) => drop(t.sixes.remove(ifindex)),
        Change::RemoveInterface(ifindex) => drop(t.interfaces.remove(ifindex)),
        Change::RemoveLocal(key) => drop(t.locals.remove(key)),
        Change::RemoveRange(prefix) => drop(t.ranges.remove(prefix)),
        Change::RemoveRange6(prefix) => drop(t.ranges6.remove(prefix)),
        _ => unreachable!("{change:?} is of no record"),
    }
}

/// `tables` with the records of `half`.
fn with_records(tables: &Tables, half: Tables) -> Tables {
    Tables {
        config: half.config,
        interfaces: half.interfaces,
        locals: half.locals,
        sixes: half.sixes,
        holders: half.holders,
        elastics: half.elastics,
        ranges: half.ranges,
        ranges6: half.ranges6,
        ..tables.clone()
    }
}

/// What stands under a route table's number, whichever family.
fn table(tables: &Tables, number: u32) -> Vec<(RouteKey, Hop)> {
    let of = |key: &RouteKey| u32::from_be_bytes(key.table) >> 1 == number && number != 0;
    tables.routes.iter().filter(|(key, _)| of(key)).map(|(key, hop)| (*key, *hop)).collect()
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
            let met = &kernel.tables;
            let of = if met.interfaces == to.interfaces { &to } else { &from };
            let records = |tables: &Tables| with_records(&Tables::default(), tables.clone());
            let published = with_records(&Tables::default(), met.clone());
            assert!([&from, &to].map(records).contains(&published), "a mixture after {change:?}");
            for interface in met.interfaces.values() {
                let acls = [interface.acl_ingress, interface.acl_egress];
                let acls = acls.into_iter().filter_map(|place| u32::from(place).checked_sub(1));
                for slot in [interface.ingress, interface.egress].into_iter().chain(acls) {
                    assert!(kernel.holds(slot, &of.policies[&slot]), "after {change:?}");
                }
                let whole = table(&kernel.tables, interface.routes);
                assert_eq!(whole, table(of, interface.routes), "after {change:?}");
            }
            for ifindex in kernel.tables.attachments.keys() {
                let dressed = kernel.tables.interfaces.contains_key(ifindex);
                let guest =
                    to.interfaces.contains_key(ifindex) || from.interfaces.contains_key(ifindex);
                assert!(dressed || !guest, "a guest's device without its interface");
            }
        }
        kernel.repeat(&changes);
        assert_eq!(
            with_records(&Tables::default(), kernel.hidden.clone()),
            with_records(&Tables::default(), to.clone()),
            "both halves are the same in the end"
        );
        let Tables { policies, names, .. } = to.clone();
        assert_eq!(Tables { policies, names, ..kernel.tables.clone() }, to);
        assert_eq!(diff(&to, &to), Vec::new());
        from = to;
    }
}

/// Frames that are asked about after every change.
const ASKED: usize = 60;
const EXCHANGES: usize = 40;

/// A frame between guests more often than not: those ask two interfaces.
fn asked(random: &mut Random, states: [&Tables; 2]) -> Vec<(u32, Vec<u8>)> {
    let mut guests: Vec<Interface> = states[0].interfaces.values().copied().collect();
    guests.retain(|guest| states[1].attachments.contains_key(&guest.ifindex));
    let others: Vec<Interface> = states[1].interfaces.values().copied().collect();
    let uplinks = states.map(|tables| tables.config.uplink);
    let mut frames = Vec::new();
    for _ in 0..ASKED {
        let (ifindex, from) = match random.chance(70) && !guests.is_empty() {
            true => {
                let guest = random.pick(&guests);
                (guest.ifindex, Some(guest))
            }
            false => (uplinks[0], None),
        };
        if from.is_none() && (uplinks[0] == 0 || uplinks[0] != uplinks[1]) {
            continue;
        }
        let six = random.chance(45);
        let made = match six {
            true => frames6::frame(random, from.as_ref(), states[1]),
            false => frame(random, from.as_ref(), &others),
        };
        frames.push((ifindex, made));
    }
    frames
}

/// What the loaded programs make of the frame, if it is as one of the states has it.
fn as_one_of(
    loaded: &Loaded,
    hosts: [&Host; 2],
    ifindex: u32,
    frame: &[u8],
) -> Result<[bool; 2], String> {
    let run = loaded.run(ifindex, frame, ASK_MARK).unwrap();
    let decided: [Decided; 2] =
        hosts.map(|host| decided_unwritten(host, ifindex, frame, host.tables()));
    let as_in = [decided[0].is(&run), decided[1].is(&run)];
    match as_in {
        [false, false] => Err(format!("{run:?} is neither {decided:?} for {frame:02x?}")),
        as_in => Ok(as_in),
    }
}

/// The loaded programs, after every single change of many exchanges.
#[test]
fn after_every_change_a_packet_is_judged_by_the_old_state_or_the_new_one() {
    let name = "after_every_change_a_packet_is_judged_by_the_old_state_or_the_new_one";
    let Some(bench) = Bench::new(name) else {
        return;
    };
    let mut random = Random::seeded("judged", 32);
    let devices = devices(|name| if_nametoindex(name).unwrap());
    let mut loaded = Loaded::open(&bench.deployment).unwrap();
    let (mut asked_about, mut changed, mut told_apart) = (0, 0, 0);
    for _ in 0..EXCHANGES {
        let rules_max = random.pick(&[3, 20]);
        let from = loaded.tables().clone();
        let to = compile(&desired(&mut random, rules_max), &devices, &from).unwrap();
        let hosts = [Host::new(from.clone()), Host::new(to.clone())];
        let frames = asked(&mut random, [&from, &to]);
        let mut wrong = Vec::new();
        let watched = &mut |loaded: &Loaded, _: &[Change], _: usize| {
            changed += 1;
            for (ifindex, frame) in &frames {
                asked_about += 1;
                match as_one_of(loaded, [&hosts[0], &hosts[1]], *ifindex, frame) {
                    Ok([old, new]) => told_apart += usize::from(old != new),
                    Err(text) => wrong.push(text),
                }
            }
        };
        loaded.update_watched(to, watched).unwrap();
        assert!(wrong.is_empty(), "{} packets, the first: {}", wrong.len(), wrong[0]);
    }
    eprintln!(
        "{asked_about} packets after {changed} changes; {told_apart} are judged otherwise now"
    );
    assert!(told_apart > asked_about / 20, "the states are too much alike to prove anything");
}

/// The planted fault: records changed one by one where packets meet them, as it was before
/// there were two halves.
#[test]
fn a_mixture_of_two_states_is_noticed() {
    let mut random = Random::seeded("judged, sabotaged", 33);
    let devices = imagined_devices();
    let mut from = Tables::default();
    let mut noticed = 0;
    for _ in 0..EXCHANGES {
        let to = compile(&desired(&mut random, 20), &devices, &from).unwrap();
        let hosts = [Host::new(from.clone()), Host::new(to.clone())];
        let frames = asked(&mut random, [&from, &to]);
        let mut met = from.clone();
        met.policies.extend(to.policies.clone());
        for change in diff(&from, &to).iter().filter(|change| change.is_halved()) {
            put_record(&mut met, change);
            let mixed = Host::new(met.clone());
            noticed += frames
                .iter()
                .filter(|(ifindex, frame)| {
                    let of = |host: &Host| decided_unwritten(host, *ifindex, frame, host.tables());
                    let judged = of(&mixed);
                    hosts.iter().all(|host| of(host) != judged)
                })
                .count();
        }
        from = to;
    }
    assert!(noticed > 0, "nothing tells a mixture from either state");
    eprintln!("{noticed} packets met a mixture");
}
