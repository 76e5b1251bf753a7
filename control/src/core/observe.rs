//! What a host tells: which of it is believed, and what follows.
//!
//! Level-triggered: a host says the whole each time, and the same report twice
//! changes nothing. A report is taken only along lawful moves
//! (`model::InstanceState::may_become`): an agent that starts anew and says
//! `pending` of a running instance is not believed until it says more. Nor does
//! the end of an older start say anything of a newer one, save for `terminated`:
//! that is final, whether or not the instance ever came as far as a start.

use std::collections::{BTreeMap, HashSet};

use model::InstanceState;
use rpc::host::{Observed, ObservedInstance as Report, Run};

use super::{Context, Draft, launch};
use crate::record::{
    Address, Host, Instance, Modification, Name, ObservedInstance, ObservedVolume, Reason, Token,
    Volume,
};
use crate::state::State;

/// How long a terminated instance is shown: EC2 says "a short interval, usually
/// less than an hour".
pub const TERMINATED_SHOWN_MS: u64 = 60 * 60 * 1000;

/// How long a client token is remembered; EC2 says at least 24 hours.
pub const TOKEN_KEPT_MS: u64 = 24 * 60 * 60 * 1000;

/// Records that one sweep removes; the next sweep takes the rest.
const SWEPT_MAX: usize = 60;

/// Records that one report changes at most: more wait for the next one, as a
/// transaction has at most 128 operations.
const CHANGES_MAX: usize = 100;

/// Returns whether all of the report was taken; `false`: call again.
pub fn observe(context: &Context<'_>, host: &str, observed: &Observed, draft: &mut Draft) -> bool {
    let state = context.state;
    draft.plan.put(
        state,
        &Host {
            name: host.to_owned(),
            accelerator: observed.accelerator.clone(),
            vcpus: observed.vcpus,
            memory_mib: observed.memory_mib,
            images: observed.images.clone(),
        },
    );
    for report in &observed.instances {
        if draft.plan.len() > CHANGES_MAX {
            return false;
        }
        if let Some(instance) = state.instances.get(report.id).filter(|i| i.host == host) {
            observe_instance(context, instance, report, observed.revision, draft);
        }
    }
    observe_volumes(context, host, observed, draft)
}

fn believed(before: Option<&ObservedInstance>, report: &Report) -> InstanceState {
    let Some(before) = before.filter(|b| b.starts >= report.starts) else { return report.state };
    let next = report.state;
    use InstanceState::{Pending, Running, Stopped, Terminated};
    let lawful = before.state == next
        || before.state.may_become(next)
        // Between two reports it may have gone a step further.
        || next == Terminated
        || (before.state == Stopped && next == Running)
        || (before.state == Pending && next == Stopped);
    if lawful { next } else { before.state }
}

fn observe_instance(
    context: &Context<'_>,
    instance: &Instance,
    report: &Report,
    revision: u64,
    draft: &mut Draft,
) {
    let state = context.state;
    let before = state.observed_instances.get(instance.id);
    let over = report.state == InstanceState::Terminated;
    let older = before.is_some_and(|b| b.starts > report.starts);
    if instance.terminated_ms.is_some() || (older && !over) {
        return;
    }
    let now = believed(before, report);
    let attachments: BTreeMap<_, _> =
        report.attachments.iter().map(|a| (a.volume, a.state)).collect();
    let same_state = before.is_some_and(|b| b.state == now && b.starts == report.starts);
    let seen = ObservedInstance {
        id: instance.id,
        state: now,
        starts: report.starts,
        reboots: report.reboots,
        reason: report.reason.clone(),
        since_ms: before.filter(|_| same_state).map_or(context.now_ms, |b| b.since_ms),
        attachments,
    };
    let mut changed = instance.clone();
    // Only a report that answers the newest wish ends a detachment.
    let looked = revision >= state.instances.revision_of(instance);
    changed
        .attachments
        .retain(|a| !(a.detaching && looked && !seen.attachments.contains_key(&a.volume)));
    draft.plan.put(state, &seen);
    if over || report.starts >= instance.starts {
        settle(context, &mut changed, now, report.reason.as_deref(), draft);
    }
    draft.plan.put(state, &changed);
}

/// What follows from the host's word for the wish itself.
fn settle(
    context: &Context<'_>,
    instance: &mut Instance,
    now: InstanceState,
    reason: Option<&str>,
    draft: &mut Draft,
) {
    let off_by_itself = instance.run == Run::Running && now == InstanceState::Stopped;
    if off_by_itself {
        let (code, message) = match reason {
            Some(reason) => ("Server.InternalError", reason.to_owned()),
            None => (
                "Client.InstanceInitiatedShutdown",
                "Client.InstanceInitiatedShutdown: Instance initiated shutdown".to_owned(),
            ),
        };
        instance.reason = Some(Reason { code: code.to_owned(), message });
        instance.transition = String::new();
        instance.run = Run::Stopped;
        if instance.terminate_on_shutdown {
            instance.run = Run::Terminated;
            instance.deleted_ms = Some(context.now_ms);
        }
    }
    if matches!(now, InstanceState::ShuttingDown | InstanceState::Terminated)
        && instance.run != Run::Terminated
    {
        instance.run = Run::Terminated;
        instance.deleted_ms = Some(context.now_ms);
        let message = reason.unwrap_or("Server.InternalError: the host ended the instance");
        instance.reason =
            Some(Reason { code: "Server.InternalError".to_owned(), message: message.to_owned() });
    }
    if now == InstanceState::Terminated {
        terminate(context, instance, draft);
    }
}

/// The host has let go: so does the instance, of all that it held.
fn terminate(context: &Context<'_>, instance: &mut Instance, draft: &mut Draft) {
    let state = context.state;
    instance.terminated_ms = Some(context.now_ms);
    instance.finalizers.clear();
    for attachment in instance.attachments.drain(..) {
        if !attachment.delete_on_termination {
            continue;
        }
        if let Some(mut volume) = state.volumes.get(attachment.volume).cloned() {
            volume.deleted_ms = Some(context.now_ms);
            draft.plan.put(state, &volume);
        }
    }
    for interface in std::mem::take(&mut instance.interfaces) {
        for address in interface.addresses() {
            draft.plan.delete::<Name>(state, launch::private_name(interface.subnet, address));
        }
        let held =
            |a: &&Address| a.association.as_ref().is_some_and(|s| s.interface == interface.id);
        for mut address in state.addresses.iter().filter(held).cloned() {
            address.association = None;
            draft.plan.put(state, &address);
        }
    }
}

fn observe_volumes(
    context: &Context<'_>,
    host: &str,
    observed: &Observed,
    draft: &mut Draft,
) -> bool {
    let state = context.state;
    let mut reported = HashSet::new();
    for report in &observed.volumes {
        reported.insert(report.id);
        if draft.plan.len() > CHANGES_MAX {
            return false;
        }
        if let Some(volume) = state.volumes.get(report.id).filter(|v| v.host == host) {
            let seen = ObservedVolume {
                id: report.id,
                state: report.state,
                reason: report.reason.clone(),
            };
            draft.plan.put(state, &seen);
            let looked = observed.revision >= state.volumes.revision_of(volume);
            let is_large = report.size_bytes >= volume.size_gib * super::launch::GIB;
            if let Some(modification) = &volume.modification
                && modification.ended_ms.is_none()
                && looked
                && is_large
            {
                let ended = Modification { ended_ms: Some(context.now_ms), ..modification.clone() };
                let modified = Volume { modification: Some(ended), ..volume.clone() };
                draft.plan.put(state, &modified);
            }
        }
    }
    for volume in state.volumes.iter().filter(|v| v.host == host && v.deleted_ms.is_some()) {
        if draft.plan.len() > CHANGES_MAX {
            return false;
        }
        let looked = observed.revision >= state.volumes.revision_of(volume);
        if looked && !reported.contains(&volume.id) {
            draft.plan.delete::<Volume>(state, volume.id);
            draft.plan.delete::<ObservedVolume>(state, volume.id);
        }
    }
    true
}

/// What time alone brings about.
pub fn sweep(context: &Context<'_>, draft: &mut Draft) {
    let state: &State = context.state;
    let over = |since: u64, span: u64| since.saturating_add(span) <= context.now_ms;
    let gone = state.instances.iter().filter(|i| {
        i.finalizers.is_empty() && i.terminated_ms.is_some_and(|at| over(at, TERMINATED_SHOWN_MS))
    });
    for instance in gone.take(SWEPT_MAX / 2) {
        draft.plan.delete::<Instance>(state, instance.id);
        draft.plan.delete::<ObservedInstance>(state, instance.id);
    }
    let old = state.tokens.iter().filter(|t| over(t.created_ms, TOKEN_KEPT_MS));
    for token in old.take(SWEPT_MAX) {
        draft.plan.delete::<Token>(state, &token.token);
    }
}
