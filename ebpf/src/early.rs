//! On the uplink before the kernel spends anything on a frame: blocklist, addresses of our
//! ranges that nobody has, sources that cannot be there, malformed frames. All else passes.

use crate::ip::{Ip, V6};
use crate::layout::TAKES_FRAMES;
use crate::packet::{Frame, Head, Head6, IPV4, Part};
use crate::reason::Reason;
use crate::six::read;
use crate::tables::Tables;
use crate::verdict::{Action, Work};

/// Stateless; drops
/// or passes, and touches nothing that is not for an elastic address, the
/// blocklist's sources aside.
#[inline(always)]
pub fn early<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head,
    work: &mut Work,
) -> Result<(), Reason> {
    work.begin();
    work.verdict.accept(Action::Pass, Reason::NotOurs);
    let multicast = head.macs >> 56 & 1 != 0;
    if head.ether_type != IPV4 || multicast {
        return Ok(());
    }
    let config = tables.config();
    if config.blocked != 0 && tables.blocked(head.source) {
        return Err(Reason::Blocked);
    }
    let to = head.destination;
    if let Some(elastic) = tables.elastic(to) {
        if head.source.is_unroutable() {
            return Err(Reason::Martian);
        }
        match work.packet.parse(frame, head) {
            Err(Reason::Malformed) => return Err(Reason::Malformed),
            Err(_) => {}
            // From here on it is this interface's, and `work.packet` is worth looking at.
            Ok(()) => {
                work.verdict.slots[0] = elastic.interface.slot;
                let takes = elastic.interface.flags & TAKES_FRAMES != 0;
                work.verdict.fast = takes && work.packet.part == Part::Whole;
            }
        }
        return Ok(());
    }
    match config.ranges != 0 && tables.in_elastic_range(to) {
        true => Err(Reason::UnknownElastic),
        false => Ok(()),
    }
}

/// As [`early`]: touches nothing that is not for an interface's
/// address, the blocklist's sources aside. Where it passes for one, `work` says whose.
#[inline(always)]
pub fn early6<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head6,
    work: &mut Work<V6>,
) -> Result<(), Reason> {
    work.begin();
    work.verdict.accept(Action::Pass, Reason::NotOurs);
    // Neighbour discovery, and whoever else speaks to all of the link.
    if head.destination_mac() >> 40 & 1 != 0 {
        return Ok(());
    }
    let config = tables.config();
    if config.blocked6 != 0 && tables.blocked6(&head.source) {
        return Err(Reason::Blocked);
    }
    let Some(holder) = tables.holder(&head.destination) else {
        return match config.ranges6 != 0 && tables.in_range6(&head.destination) {
            true => Err(Reason::UnknownElastic),
            false => Ok(()),
        };
    };
    // The uplink's neighbours ask us by their addresses of the link.
    if head.source.is_unroutable() && !head.source.is_link_local() {
        return Err(Reason::Martian);
    }
    match read(&mut work.packet, frame, head) {
        Err(Reason::Malformed) => Err(Reason::Malformed),
        Err(_) => Ok(()),
        Ok(()) => {
            if let Some(interface) = tables.interface(holder.ifindex) {
                work.verdict.slots[0] = interface.slot;
            }
            Ok(())
        }
    }
}

/// What stands for a source where sources are limited: one that has a network of 64 bits
/// has all of its addresses.
#[inline(always)]
pub fn source_of(address: &V6, seed: u64) -> u32 {
    ((address.high ^ seed).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32) as u32
}
