//! The program on the uplink before the kernel spends anything on a frame: the early
//! drop, and the fast path for established flows.

use aya_ebpf::bindings::{xdp_action, xdp_md};
use aya_ebpf::helpers::{bpf_redirect, bpf_xdp_get_buff_len, bpf_xdp_load_bytes};
use aya_ebpf::macros::xdp;
use aya_ebpf::programs::XdpContext;
use ebpf::decide::from_world;
use ebpf::early::{early, early6, source_of};
use ebpf::flow::{TCP, UDP};
use ebpf::packet::{Frame, HEAD_LEN, IPV6, mac_number};
use ebpf::rewrite::{corrected, may_be_partial, sum32};
use ebpf::{Arrival, Head, Reason, Tables, Work};

use super::carry::{account, count, refuse_unpaid};
use super::six::work6;
use super::skb::now_s;
use super::span::{Span, load_u16, store_head, store_u16};
use super::tables::Maps;
use super::work;
use crate::maps::HEAD6;
use crate::{spend, watch};

/// `frags`: or no device with an MTU above a page would take it.
#[xdp(frags)]
pub fn uplink_early(ctx: XdpContext) -> u32 {
    let frame = Xdp(&ctx);
    let Some(head) = frame.span().head() else { return xdp_action::XDP_PASS };
    let Some(work) = work() else { return xdp_action::XDP_PASS };
    if head.ether_type == IPV6 {
        let reason = match early_six(ctx.ctx) {
            BLOCKED => Reason::Blocked,
            MARTIAN => Reason::Martian,
            MALFORMED => Reason::Malformed,
            SOURCE_RATE => Reason::SourceRate,
            UNKNOWN => Reason::UnknownElastic,
            _ => return xdp_action::XDP_PASS,
        };
        // What another packet left there is not told of this one.
        work.begin();
        return drop_early(&ctx, work, reason);
    }
    let maps = &Maps::now();
    let reason = match early(maps, &frame, &head, work) {
        Ok(()) if exceeds(maps, &head, work) => Reason::SourceRate,
        Ok(()) => match fast(maps, &frame, &head, work) {
            Reason::Undecided => return xdp_action::XDP_PASS,
            Reason::Established => return deliver_frame(work),
            exceeded => exceeded,
        },
        Err(reason) => reason,
    };
    drop_early(&ctx, work, reason)
}

const BLOCKED: u32 = Reason::Blocked as u32;
const MARTIAN: u32 = Reason::Martian as u32;
const MALFORMED: u32 = Reason::Malformed as u32;
const SOURCE_RATE: u32 = Reason::SourceRate as u32;
const UNKNOWN: u32 = Reason::UnknownElastic as u32;

/// The same of an IPv6 frame, for whose head the other's stack has no room: the reason to
/// drop it, or 0. A global function, walked by the verifier once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn early_six(ctx: *mut xdp_md) -> u32 {
    let ctx = XdpContext::new(ctx);
    let frame = Xdp(&ctx);
    let (Some(place), Some(head)) = (HEAD6.get_ptr_mut(0), frame.span().head6()) else { return 0 };
    // SAFETY: the pointer was checked, and the entry is this CPU's own.
    let head = unsafe {
        place.write(head);
        &*place
    };
    let Some(work) = work6() else { return 0 };
    let maps = &Maps::now();
    if let Err(reason) = early6(maps, &frame, head, work) {
        return reason as u32;
    }
    let config = maps.config();
    let opens = config.sources != 0 && work.verdict.slots[0] != 0 && work.packet.opens_flow();
    if opens && !spend::source_may(source_of(&head.source, config.seed), config.seed) {
        return SOURCE_RATE;
    }
    0
}

#[inline(always)]
fn drop_early(ctx: &XdpContext, work: &mut Work, reason: Reason) -> u32 {
    count(0, reason);
    work.verdict.slots = [0, 0];
    work.verdict.refuse(reason);
    if watch::wanted(&work.verdict) {
        watch::tell_early(ctx.ctx);
    }
    xdp_action::XDP_DROP
}

/// A packet of an established flow is judged, paid, accounted and rewritten here, as tc's
/// program would: then `Established`. `Undecided`: tc's may see to it, and nothing was
/// changed. Else the reason why it has to be dropped.
#[inline(always)]
fn fast(maps: &Maps, frame: &Xdp<'_>, head: &Head, work: &mut Work) -> Reason {
    let config = maps.config();
    if config.fast == 0 || work.verdict.slots[0] == 0 || !work.verdict.fast {
        return Reason::Undecided;
    }
    // Tallies are tc's, and so are frames in pieces and checksums left to the hardware.
    if watch::tallied() || !frame.whole() || !complete(frame, head, work.packet.transport) {
        return Reason::Undecided;
    }
    let arrival = Arrival {
        // SAFETY: the context is valid for the program's run.
        ifindex: unsafe { (*frame.0.ctx).ingress_ifindex },
        vlan: false,
        to_host: head.destination_mac() == mac_number(config.uplink_mac),
        now_s: now_s(),
    };
    from_world(maps, frame, head, &arrival, work);
    if work.verdict.reason != Reason::Established {
        return Reason::Undecided;
    }
    if work.verdict.pays != 0 {
        refuse_unpaid(work, spend::spend(frame.size(), 1));
        if work.verdict.reason != Reason::Established {
            return work.verdict.reason;
        }
    }
    if !frame.rewrite(head, work) {
        return Reason::Malformed;
    }
    work.verdict.reason = Reason::EstablishedEarly;
    account(&work.verdict);
    Reason::Established
}

#[inline(always)]
fn deliver_frame(work: &Work) -> u32 {
    // SAFETY: the helper has no precondition.
    (unsafe { bpf_redirect(work.verdict.ifindex, 0) }) as u32
}

/// Where a transport's checksum stands.
#[inline(always)]
fn checksum_at(protocol: u8, transport: u32) -> Option<u32> {
    match protocol {
        TCP => Some(transport + 16),
        UDP => Some(transport + 6),
        _ => None,
    }
}

/// Whether the transport's checksum is surely not left to the hardware.
#[inline(always)]
fn complete(frame: &Xdp<'_>, head: &Head, transport: u32) -> bool {
    let Some(offset) = checksum_at(head.protocol(), transport) else { return true };
    let Some(bytes) = frame.load::<2>(offset) else { return false };
    let checksum = u16::from_be_bytes(bytes);
    if head.protocol() == UDP && checksum == 0 {
        return true;
    }
    let len = (head.first & 0xffff).wrapping_sub(head.header_len());
    let sum = sum32(head.source) + sum32(head.destination) + u32::from(head.protocol()) + len;
    !may_be_partial(checksum, sum)
}

/// Whether the packet for an elastic address would open a flow, and its source has
/// opened as many as it may.
#[inline(always)]
fn exceeds(maps: &Maps, head: &Head, work: &Work) -> bool {
    let config = maps.config();
    config.sources != 0
        && work.verdict.slots[0] != 0
        && work.packet.opens_flow()
        && !spend::source_may(head.source, config.seed)
}

struct Xdp<'a>(&'a XdpContext);

impl Xdp<'_> {
    #[inline(always)]
    fn span(&self) -> Span {
        // SAFETY: the context is valid for the program's run.
        let (start, end) = unsafe { ((*self.0.ctx).data, (*self.0.ctx).data_end) };
        Span { start: start as usize, end: end as usize }
    }
}

impl Xdp<'_> {
    /// Whether all of it lies in one piece.
    #[inline(always)]
    fn whole(&self) -> bool {
        let span = self.span();
        span.end - span.start == self.size() as usize
    }

    /// Puts the verdict's addresses in, with whole checksums.
    #[inline(always)]
    fn rewrite(&self, head: &Head, work: &Work) -> bool {
        let rewrite = &work.verdict.rewrite;
        if let Some((old, new)) = rewrite.transport_delta(head)
            && let Some(offset) = checksum_at(head.protocol(), work.packet.transport)
            && !self.correct(offset, old, new, head.protocol() == UDP)
        {
            return false;
        }
        let head = rewrite.apply(head);
        let Some(at) = self.span().at::<HEAD_LEN>(0) else { return false };
        // SAFETY: all 34 bytes are there.
        unsafe { store_head(at, &head) };
        true
    }

    #[inline(always)]
    fn correct(&self, offset: u32, old: u32, new: u32, udp: bool) -> bool {
        // A bound for the verifier.
        if offset > 127 {
            return false;
        }
        let Some(at) = self.span().at::<2>(offset) else { return false };
        // SAFETY: both bytes are there.
        let checksum = unsafe { load_u16::<0>(at) };
        if udp && checksum == 0 {
            return true;
        }
        let next = match corrected(checksum, old, new) {
            // Of UDP, zero says that there is none.
            0 if udp => 0xffff,
            next => next,
        };
        // SAFETY: both bytes are there.
        unsafe { store_u16::<0>(at, next) };
        true
    }
}

impl Frame for Xdp<'_> {
    #[inline(always)]
    fn size(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        (unsafe { bpf_xdp_get_buff_len(self.0.ctx) }) as u32
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if let Some(bytes) = self.span().load(offset) {
            return Some(bytes);
        }
        let mut bytes = [0; N];
        // SAFETY: the helper writes N bytes or none, and checks the frame's end itself.
        let result =
            unsafe { bpf_xdp_load_bytes(self.0.ctx, offset, bytes.as_mut_ptr().cast(), N as u32) };
        if result == 0 { Some(bytes) } else { None }
    }
}
