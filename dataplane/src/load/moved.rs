//! An interface's flows on their way to another host.
//!
//! Half-open ones stay behind: whoever opens a connection tries again. Times are
//! told as silence, for clocks differ between hosts.

mod ports;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use bytemuck::Pod;
use ebpf::layout::{Flow, FlowKey, Interface, Quota};
use ebpf::{V6, flow};
use rpc::dataplane::{Imported, MOVED_FLOWS_VERSION, MovedFlow, MovedFlows};

use super::maps::Maps;
use super::sweep::now_s;
use super::syscall::Map;
use super::{Error, Refused, rate};
use crate::compile::Tables;

pub use ports::export as export_ports;

/// Entries asked of the kernel at once.
const BATCH: usize = 1024;

pub fn export(maps: &Maps, interface: &Interface) -> Result<Vec<MovedFlow>, Error> {
    let mut moved = Vec::new();
    let v4 = |a: u32| IpAddr::V4(Ipv4Addr::from(a));
    let v6 = |a: V6| IpAddr::V6(Ipv6Addr::from_bits(a.bits()));
    export_family(&maps.flows, interface, v4, &mut moved)?;
    export_family(&maps.flows6, interface, v6, &mut moved)?;
    Ok(moved)
}

fn export_family<A: ebpf::Ip>(
    flows: &Map<FlowKey<A>, Flow>,
    interface: &Interface,
    address: impl Fn(A) -> IpAddr,
    moved: &mut Vec<MovedFlow>,
) -> Result<(), Error>
where
    FlowKey<A>: Pod,
{
    let failed = |e| Error::new("export", "FLOWS", e);
    let now_s = now_s().map_err(failed)?;
    for slice in flows.slices(BATCH) {
        for (key, flow) in &slice.map_err(failed)? {
            if key.interface == interface.id && flow::alive(flow, key.protocol, interface, now_s) {
                moved.push(MovedFlow {
                    protocol: key.protocol,
                    local: address(key.local),
                    remote: address(key.remote),
                    local_port: key.local_port,
                    remote_port: key.remote_port,
                    phase: flow.phase,
                    flags: flow.flags,
                    silent_s: now_s.saturating_sub(flow.seen_s),
                });
            }
        }
    }
    Ok(())
}

/// Puts flows in, all or none. What is there already stays as it is, so that it may
/// be done twice.
pub fn import(
    maps: &Maps,
    tables: &Tables,
    interface: &Interface,
    moved: &MovedFlows,
) -> Result<Imported, Error> {
    check(interface, moved)?;
    // A flow that finds no port of its own takes any.
    let (ports, left_out) = ports::import(maps, tables, interface, &moved.ports)?;
    let failed = |e| Error::new("import", "FLOWS", e);
    let now_s = now_s().map_err(failed)?;
    let mut added = 0;
    for flow in &moved.flows {
        let seen_s = now_s.saturating_sub(flow.silent_s);
        // The rule's place is another one here, and nothing reads it of an old flow.
        let value = Flow { seen_s, rule: 0, phase: flow.phase, flags: flow.flags };
        added += match (flow.local, flow.remote) {
            (IpAddr::V4(local), IpAddr::V4(remote)) => {
                let key = key(interface, flow, u32::from(local), u32::from(remote));
                import_one(&maps.flows, &key, &value)?
            }
            (IpAddr::V6(local), IpAddr::V6(remote)) => {
                let v6 = |a: Ipv6Addr| V6::from_bits(a.to_bits());
                import_one(&maps.flows6, &key(interface, flow, v6(local), v6(remote)), &value)?
            }
            // `check` lets none pass.
            _ => 0,
        };
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
    Ok(Imported { flows: added, ports, left_out })
}

fn key<A>(interface: &Interface, flow: &MovedFlow, local: A, remote: A) -> FlowKey<A> {
    FlowKey {
        interface: interface.id,
        local,
        remote,
        local_port: flow.local_port,
        remote_port: flow.remote_port,
        protocol: flow.protocol,
        zero: [0; 3],
    }
}

/// 1 where it was not there yet.
fn import_one<K: Pod>(flows: &Map<K, Flow>, key: &K, flow: &Flow) -> Result<u64, Error> {
    let failed = |e| Error::new("import", "FLOWS", e);
    if flows.get(key).map_err(failed)?.is_some() {
        return Ok(0);
    }
    flows.put(key, flow).map_err(failed)?;
    Ok(1)
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
    if let Some(wrong) = ports::wrong(&moved.ports) {
        return Err(refused(wrong));
    }
    let known =
        flow::BY_INSTANCE | flow::INSTANCE_CLOSED | flow::REMOTE_CLOSED | flow::REMOTE_RESET;
    for flow in &moved.flows {
        if !matches!(flow.phase, flow::ESTABLISHED | flow::CLOSING) || flow.flags & !known != 0 {
            return Err(refused(format!("phase {}, flags {:#x}", flow.phase, flow.flags)));
        }
        if flow.local.is_ipv4() != flow.remote.is_ipv4() {
            return Err(refused(format!("{} and {} are of two families", flow.local, flow.remote)));
        }
    }
    Ok(())
}
