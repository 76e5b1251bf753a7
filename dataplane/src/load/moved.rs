//! An interface's flows on their way to another host.
//!
//! Half-open ones stay behind: whoever opens a connection tries again. Times are
//! told as silence, for clocks differ between hosts.

use std::net::Ipv4Addr;

use ebpf::flow;
use ebpf::layout::{Flow, FlowKey, Interface, Quota};
use rpc::dataplane::{MOVED_FLOWS_VERSION, MovedFlow, MovedFlows};

use super::maps::Maps;
use super::sweep::now_s;
use super::{Error, Refused, rate};

/// Entries asked of the kernel at once.
const BATCH: usize = 1024;

pub fn export(maps: &Maps, interface: &Interface) -> Result<Vec<MovedFlow>, Error> {
    let failed = |e| Error::new("export", "FLOWS", e);
    let now_s = now_s().map_err(failed)?;
    let mut moved = Vec::new();
    let mut cursor = None;
    loop {
        let slice = maps.flows.slice(cursor, BATCH).map_err(failed)?;
        for (key, flow) in &slice.entries {
            if key.interface == interface.id && flow::alive(flow, key.protocol, interface, now_s) {
                moved.push(told(key, flow, now_s));
            }
        }
        cursor = slice.cursor;
        if cursor.is_none() {
            return Ok(moved);
        }
    }
}

fn told(key: &FlowKey, flow: &Flow, now_s: u32) -> MovedFlow {
    MovedFlow {
        protocol: key.protocol,
        local: Ipv4Addr::from(key.local),
        remote: Ipv4Addr::from(key.remote),
        local_port: key.local_port,
        remote_port: key.remote_port,
        phase: flow.phase,
        flags: flow.flags,
        silent_s: now_s.saturating_sub(flow.seen_s),
    }
}

/// Puts flows in, all or none. What is there already stays as it is, so that it may
/// be done twice.
pub fn import(maps: &Maps, interface: &Interface, moved: &MovedFlows) -> Result<u64, Error> {
    check(interface, moved)?;
    let failed = |e| Error::new("import", "FLOWS", e);
    let now_s = now_s().map_err(failed)?;
    let mut added = 0;
    for flow in &moved.flows {
        let key = FlowKey {
            interface: interface.id,
            local: flow.local.into(),
            remote: flow.remote.into(),
            local_port: flow.local_port,
            remote_port: flow.remote_port,
            protocol: flow.protocol,
            zero: [0; 3],
        };
        let seen_s = now_s.saturating_sub(flow.silent_s);
        // The rule's place is another one here, and nothing reads it of an old flow.
        let value = Flow { seen_s, rule: 0, phase: flow.phase, flags: flow.flags };
        if maps.flows.get(&key).map_err(failed)?.is_none() {
            maps.flows.put(&key, &value).map_err(failed)?;
            added += 1;
        }
    }
    let failed = |e| Error::new("count", "QUOTAS", e);
    let quota = maps.quotas.get(&interface.slot).map_err(failed)?;
    let quota = quota.unwrap_or(Quota { opened: 0, closed: 0 });
    // Its guest does not run here yet, so no program counts at this moment.
    let quota = Quota { opened: quota.opened + added, ..quota };
    maps.quotas.put(&interface.slot, &quota).map_err(failed)?;
    let failed = |e| Error::new("import", "LEVELS", e);
    let here = rate::missing(maps, interface.slot).map_err(failed)?;
    // An older host tells of none. What is missing here already stays so.
    let missing = std::array::from_fn(|i| here[i].max(moved.missing.get(i).copied().unwrap_or(0)));
    rate::put_missing(maps, interface.slot, &missing).map_err(failed)?;
    Ok(added)
}

fn check(interface: &Interface, moved: &MovedFlows) -> Result<(), Error> {
    let refused = |cause: String| {
        Error::Refused(Refused(format!("interface {}: import flows: {cause}", moved.interface)))
    };
    if moved.version != MOVED_FLOWS_VERSION {
        let cause = format!("version {}, but {MOVED_FLOWS_VERSION} is known", moved.version);
        return Err(refused(cause));
    }
    if moved.flows.len() > interface.flows_max as usize {
        let most = interface.flows_max;
        return Err(refused(format!("{} flows, but {most} are the most", moved.flows.len())));
    }
    if moved.missing.len() > rate::BUCKETS {
        return Err(refused(format!(
            "{} buckets, but there are {}",
            moved.missing.len(),
            rate::BUCKETS
        )));
    }
    let known = flow::BY_INSTANCE | flow::INSTANCE_CLOSED | flow::REMOTE_CLOSED;
    for flow in &moved.flows {
        if !matches!(flow.phase, flow::ESTABLISHED | flow::CLOSING) || flow.flags & !known != 0 {
            return Err(refused(format!("phase {}, flags {:#x}", flow.phase, flow.flags)));
        }
    }
    Ok(())
}
