//! Network ACLs: what may cross the border of an interface's subnet.
//!
//! An ACL's direction is a policy like that of security groups, its entries in the order of
//! their numbers; the lowest that matches decides, by a bit of [`crate::layout::Policy::allow`]. It knows
//! no flows: each packet is asked, before the groups are. An interface without one, or whose
//! ACL lets everything pass, has no policy here and pays a comparison.

use crate::ip::Ip;
use crate::layout::Interface;
use crate::packet::{Kind, Packet};
use crate::reason::Reason;
use crate::tables::{Question, Tables};

/// Passes.
const PERMITTED: u32 = 0;
/// Above the number of the entry that denies, counted from 1; 0: none matched.
const DENIED: u32 = 1 << 16;

/// Whether the packet may leave the subnet of `interface`; else by which entry not.
#[inline(always)]
pub fn leaves<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    packet: &Packet<A>,
    remote: A,
    entry: &mut u16,
) -> Result<(), Reason> {
    if interface.acl_egress == 0 {
        return Ok(());
    }
    *entry = match ask(tables, interface.acl_egress, packet, &remote) {
        PERMITTED => return Ok(()),
        denied => denied as u16,
    };
    Err(Reason::AclEgressDenied)
}

/// Whether the packet may enter the subnet of `interface`.
#[inline(always)]
pub fn enters<A: Ip, T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    packet: &Packet<A>,
    remote: A,
    entry: &mut u16,
) -> Result<(), Reason> {
    if interface.acl_ingress == 0 {
        return Ok(());
    }
    *entry = match ask(tables, interface.acl_ingress, packet, &remote) {
        PERMITTED => return Ok(()),
        denied => denied as u16,
    };
    Err(Reason::AclIngressDenied)
}

/// A function of its own in the kernel too: a packet between two subnets asks both.
#[inline(never)]
fn ask<A: Ip, T: Tables + ?Sized>(tables: &T, place: u16, packet: &Packet<A>, remote: &A) -> u32 {
    // It has no ports: its first one was asked.
    if packet.kind == Kind::Later {
        return PERMITTED;
    }
    let slot = u32::from(place) - 1;
    let question =
        Question { remote: *remote, identity: 0, protocol: packet.protocol, detail: packet.detail };
    let entry = A::classify(tables, slot, &question);
    let allow = match tables.policy(slot) {
        Some(policy) => policy.allow,
        None => 0,
    };
    if entry != 0 && allow >> (entry.wrapping_sub(1) & 63) & 1 != 0 {
        return PERMITTED;
    }
    DENIED | entry & 0xffff
}
