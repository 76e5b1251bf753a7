//! Programs: where a verdict is asked for and carried out.

use core::arch::asm;
use core::mem::size_of;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh,
    bpf_redir_neigh__bindgen_ty_1, xdp_action,
};
use aya_ebpf::helpers::{
    bpf_ktime_get_coarse_ns, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh,
    bpf_skb_load_bytes, bpf_skb_store_bytes, bpf_xdp_get_buff_len, bpf_xdp_load_bytes,
};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::{TcContext, XdpContext};
use ebpf::decide::{early, from_instance, from_punt, from_world};
use ebpf::flow::{TCP, UDP};
use ebpf::layout::{Config, Flow, FlowKey, Interface, Local, LocalKey, Policy, Step};
use ebpf::packet::Frame;
use ebpf::tables::{Question, classify};
use ebpf::verdict::{FlowChange, FlowWrite};
use ebpf::{
    ASK_MARK, Action, Arrival, Head, REASONS_MAX, Reason, TRACE_MARK, Tables, VERDICT_MARK,
    Verdict, Work,
};

use crate::maps::{
    BLOCKED, CONFIG, COUNTERS, ELASTICS, FLOWS, HALF_FLOWS, INTERFACES, LOCALS, POLICIES, QUOTAS,
    RANGES, STEPS, SWEPT, WORDS, WORK,
};

const NS_A_SECOND: u64 = 1_000_000_000;
/// linux/if_packet.h: addressed to the device itself.
const PACKET_HOST: u32 = 0;
const AF_INET: u32 = 2;
/// linux/bpf.h: insert, but never replace.
const BPF_NOEXIST: u64 = 1;

struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn config(&self) -> Config {
        match CONFIG.get(0) {
            Some(config) => *config,
            None => Config { uplink: 0, blocked: 0, ranges: 0, uplink_mac: [0; 6], zero: 0 },
        }
    }

    #[inline(always)]
    fn interface(&self, ifindex: u32) -> Option<&Interface> {
        // SAFETY: the map is not preallocated: an entry that was looked up stays as it is,
        // replaced or not, until this program ends (RCU).
        unsafe { INTERFACES.get(ifindex) }
    }

    #[inline(always)]
    fn local(&self, key: &LocalKey) -> Option<Local> {
        // SAFETY: as for `interface`.
        unsafe { LOCALS.get(key) }.copied()
    }

    #[inline(always)]
    fn elastic(&self, address: u32) -> Option<u32> {
        // SAFETY: as for `interface`.
        unsafe { ELASTICS.get(address) }.copied()
    }

    #[inline(always)]
    fn policy(&self, slot: u32) -> Option<&Policy> {
        POLICIES.get(slot)
    }

    #[inline(always)]
    fn step(&self, index: u32) -> Option<Step> {
        STEPS.get(index).copied()
    }

    #[inline(always)]
    fn word(&self, index: u32) -> u64 {
        WORDS.get(index).copied().unwrap_or(0)
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<Flow> {
        // SAFETY: the value is one aligned word, read at once.
        unsafe { FLOWS.get(key) }.copied()
    }

    #[inline(always)]
    fn half_flow(&self, key: &FlowKey) -> Option<Flow> {
        // SAFETY: the value is one aligned word, read at once. An entry that is evicted
        // and used again at this very moment may give another half-open flow's word.
        unsafe { HALF_FLOWS.get(key) }.copied()
    }

    #[inline(always)]
    fn flows_open(&self, slot: u32) -> u64 {
        match (QUOTAS.get(slot), SWEPT.get(slot)) {
            (Some(quota), Some(swept)) => {
                quota.opened.saturating_sub(quota.closed).saturating_sub(*swept)
            }
            _ => u64::MAX,
        }
    }

    #[inline(always)]
    fn blocked(&self, address: u32) -> bool {
        BLOCKED.get(Key::new(32, address.to_be_bytes())).is_some()
    }

    #[inline(always)]
    fn in_elastic_range(&self, address: u32) -> bool {
        matches!(RANGES.get(Key::new(32, address.to_be_bytes())), Some(1))
    }

    #[inline(always)]
    fn classify(&self, slot: u32, q: &Question) -> u32 {
        let kind = u32::from(q.protocol) << 16 | u32::from(q.detail);
        classify_flow(slot, q.remote, q.identity, kind)
    }
}

/// A global function of plain numbers: verified by itself.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn classify_flow(slot: u32, remote: u32, identity: u64, kind: u32) -> u32 {
    let (protocol, detail) = ((kind >> 16) as u8, kind as u16);
    classify(&Maps, slot, &Question { remote, identity, protocol, detail })
}

struct Skb(*mut __sk_buff);

impl Frame for Skb {
    #[inline(always)]
    fn size(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.0).len }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        // SAFETY: the helper writes N bytes or none, and checks the frame's end itself.
        let result = unsafe {
            bpf_skb_load_bytes(self.0.cast(), offset, bytes.as_mut_ptr().cast(), N as u32)
        };
        if result == 0 { Some(bytes) } else { None }
    }
}

impl Skb {
    #[inline(always)]
    fn store<const N: usize>(&self, offset: u32, bytes: &[u8; N]) -> bool {
        // SAFETY: the helper reads N bytes, and checks the frame's end itself.
        let result = unsafe {
            bpf_skb_store_bytes(self.0.cast(), offset, bytes.as_ptr().cast(), N as u32, 0)
        };
        result == 0
    }

    #[inline(always)]
    fn arrival(&self) -> Arrival {
        // SAFETY: the context is valid for the program's run.
        let skb = unsafe { &*self.0 };
        Arrival {
            ifindex: skb.ifindex,
            vlan: skb.vlan_present != 0,
            to_host: skb.pkt_type == PACKET_HOST,
            now_s: now_s(),
        }
    }

    #[inline(always)]
    fn mark(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.0).mark }
    }

    #[inline(always)]
    fn set_mark(&self, mark: u32) {
        // SAFETY: the context is valid for the program's run, and `mark` may be written.
        unsafe { (*self.0).mark = mark }
    }
}

struct Xdp<'a>(&'a XdpContext);

impl Frame for Xdp<'_> {
    #[inline(always)]
    fn size(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        (unsafe { bpf_xdp_get_buff_len(self.0.ctx) }) as u32
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        // SAFETY: the helper writes N bytes or none, and checks the frame's end itself.
        let result =
            unsafe { bpf_xdp_load_bytes(self.0.ctx, offset, bytes.as_mut_ptr().cast(), N as u32) };
        if result == 0 { Some(bytes) } else { None }
    }
}

#[inline(always)]
fn now_s() -> u32 {
    // SAFETY: the helper has no precondition.
    (unsafe { bpf_ktime_get_coarse_ns() } / NS_A_SECOND) as u32
}

/// This CPU's work space: the stack has not enough room.
#[inline(always)]
fn work() -> Option<&'static mut Work> {
    let work = WORK.get_ptr_mut(0)?;
    // SAFETY: the pointer was checked; whatever stands there is zeros or a `Work` that
    // another packet left; and no other program runs on this CPU before this one ends.
    Some(unsafe { &mut *work })
}

/// From a guest.
#[classifier]
pub fn tap_ingress(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let (Some(head), Some(work)) = (skb.load(0).map(Head), work()) else {
        return refuse(&skb, Reason::Malformed);
    };
    from_instance(&Maps, &skb, &head, &skb.arrival(), work);
    carry_out(skb.0)
}

/// From the world.
#[classifier]
pub fn uplink_ingress(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    // Shorter than any frame of ours.
    let (Some(head), Some(work)) = (skb.load(0).map(Head), work()) else {
        return TC_ACT_UNSPEC;
    };
    from_world(&Maps, &skb, &head, &skb.arrival(), work);
    carry_out(skb.0)
}

/// From our own responder.
#[classifier]
pub fn punt_ingress(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let (Some(head), Some(work)) = (skb.load(0).map(Head), work()) else {
        return refuse(&skb, Reason::PuntStray);
    };
    from_punt(&Maps, &head, work);
    carry_out(skb.0)
}

/// Towards a guest or the responder: only with our verdict.
#[classifier]
pub fn tap_guard(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    if skb.mark() == VERDICT_MARK {
        skb.set_mark(0);
        return TC_ACT_UNSPEC;
    }
    refuse(&skb, Reason::Unmarked)
}

/// `frags`: or no device with an MTU above a page would take it.
#[xdp(frags)]
pub fn uplink_early(ctx: XdpContext) -> u32 {
    let frame = Xdp(&ctx);
    let (Some(head), Some(work)) = (frame.load(0).map(Head), work()) else {
        return xdp_action::XDP_PASS;
    };
    match early(&Maps, &frame, &head, work) {
        Ok(()) => xdp_action::XDP_PASS,
        Err(reason) => {
            count(0, reason);
            xdp_action::XDP_DROP
        }
    }
}

#[inline(always)]
fn refuse(skb: &Skb, reason: Reason) -> i32 {
    // SAFETY: the context is valid for the program's run.
    let ifindex = unsafe { (*skb.0).ifindex };
    let slot = Maps.interface(ifindex).map_or(0, |i| i.slot);
    count(slot, reason);
    TC_ACT_SHOT
}

#[inline(always)]
fn count(slot: u32, reason: Reason) {
    if let Some(counter) = COUNTERS.get_ptr_mut(slot * REASONS_MAX + reason as u32) {
        // SAFETY: the counter is this CPU's own, and the pointer was checked.
        unsafe { *counter += 1 }
    }
}

/// Does what the verdict in this CPU's work space says. A global function, which the
/// verifier walks by itself and not once for each way to a verdict.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn carry_out(ctx: *mut __sk_buff) -> i32 {
    let skb = &Skb(ctx);
    let (Some(head), Some(work)) = (skb.load(0).map(Head), work()) else {
        return TC_ACT_SHOT;
    };
    let (head, verdict) = (&head, &work.verdict);
    let mark = skb.mark();
    let asked = mark == ASK_MARK;
    if asked || mark == TRACE_MARK {
        report(skb, verdict);
    }
    if !asked {
        account(verdict);
    }
    match verdict.action {
        Action::Drop => TC_ACT_SHOT,
        Action::Pass => TC_ACT_UNSPEC,
        Action::AnswerArp => answer_arp(skb, verdict.rewrite.source_mac),
        Action::Deliver | Action::Leave => {
            if !rewrite(skb, head, verdict) {
                return TC_ACT_SHOT;
            }
            if verdict.action == Action::Deliver {
                deliver(skb, verdict.ifindex)
            } else {
                leave(skb, verdict.ifindex, verdict.next_hop)
            }
        }
    }
}

#[inline(always)]
fn rewrite(skb: &Skb, head: &Head, verdict: &Verdict) -> bool {
    if let Some((old, new)) = verdict.rewrite.transport_delta(head)
        && !correct_transport(skb, head, old, new)
    {
        return false;
    }
    let inner = &verdict.inner;
    if inner.offset != 0 && !skb.store(inner.offset, &inner.bytes) {
        return false;
    }
    skb.store(0, &verdict.rewrite.apply(head).0)
}

/// Flows and counters.
#[inline(always)]
fn account(verdict: &Verdict) {
    write_flow(&verdict.sender);
    write_flow(&verdict.receiver);
    // What passes by the uplink is none of our business, and not worth a counter.
    if verdict.action == Action::Pass {
        return;
    }
    count(verdict.slots[0], verdict.reason);
    if verdict.slots[1] != 0 {
        count(verdict.slots[1], verdict.reason);
    }
}

/// Into the control block, where BPF_PROG_TEST_RUN finds it.
#[inline(always)]
fn report(skb: &Skb, verdict: &Verdict) {
    let [reason, egress, ingress] = verdict.report();
    // SAFETY: the context is valid for the program's run, and `cb` may be written.
    unsafe {
        (*skb.0).cb[0] = reason;
        (*skb.0).cb[1] = egress;
        (*skb.0).cb[2] = ingress;
    }
}

/// A full table is no error: the flow then goes on as half-open, or is judged anew.
#[inline(always)]
fn write_flow(change: &FlowChange) {
    let FlowChange { write, slot, key, flow } = change;
    match write {
        FlowWrite::Nothing => {}
        FlowWrite::Tracked => {
            let _ = FLOWS.insert(key, flow, 0);
        }
        FlowWrite::Half => {
            let _ = HALF_FLOWS.insert(key, flow, 0);
        }
        FlowWrite::Reopen => {
            if FLOWS.remove(key).is_ok() {
                add(*slot, false);
            }
            let _ = HALF_FLOWS.insert(key, flow, 0);
        }
        FlowWrite::Confirm => {
            // Only one of two CPUs that confirm it at once counts it.
            if FLOWS.insert(key, flow, BPF_NOEXIST).is_ok() {
                add(*slot, true);
                let _ = HALF_FLOWS.remove(key);
            }
        }
    }
}

#[inline(always)]
fn add(slot: u32, opened: bool) {
    if let Some(quota) = QUOTAS.get_ptr_mut(slot) {
        // SAFETY: the pointer was checked, the fields are aligned, and no program
        // writes them but by this atomic addition. (`AtomicU64` has none on this
        // target, for it lacks compare-and-swap before version 3.)
        unsafe {
            let field = if opened { &raw mut (*quota).opened } else { &raw mut (*quota).closed };
            asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) field, in(reg) 1_u64);
        }
    }
}

/// The transport's checksum covers the addresses. The helper does the right thing
/// for complete, partial and absent checksums alike.
#[inline(always)]
fn correct_transport(skb: &Skb, head: &Head, old: u32, new: u32) -> bool {
    let transport = 14 + u32::from(head.0[14] & 0x0f) * 4;
    let (offset, flags) = match head.protocol() {
        TCP => (transport + 16, 0),
        UDP => (transport + 6, u64::from(BPF_F_MARK_MANGLED_0)),
        _ => return true,
    };
    let flags = flags | u64::from(BPF_F_PSEUDO_HDR) | 4;
    // SAFETY: the helper checks the frame's end itself.
    let result = unsafe {
        bpf_l4_csum_replace(
            skb.0.cast(),
            offset,
            u64::from(old.to_be()),
            u64::from(new.to_be()),
            flags,
        )
    };
    result == 0
}

#[inline(always)]
fn deliver(skb: &Skb, ifindex: u32) -> i32 {
    skb.set_mark(VERDICT_MARK);
    // SAFETY: the helper has no precondition.
    (unsafe { bpf_redirect(ifindex, 0) }) as i32
}

#[inline(always)]
fn leave(skb: &Skb, ifindex: u32, next_hop: u32) -> i32 {
    skb.set_mark(0);
    let mut hop = bpf_redir_neigh {
        nh_family: AF_INET,
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: [next_hop.to_be(), 0, 0, 0] },
    };
    // SAFETY: the helper reads the structure during the call.
    let result = unsafe {
        bpf_redirect_neigh(ifindex, &raw mut hop, size_of::<bpf_redir_neigh>() as i32, 0)
    };
    result as i32
}

/// The request becomes the answer: sender and target change places, `mac` is ours.
#[inline(always)]
fn answer_arp(skb: &Skb, mac: [u8; 6]) -> i32 {
    let Some(asked) = skb.load::<28>(14) else { return TC_ACT_SHOT };
    let [m0, m1, m2, m3, m4, m5] = mac;
    let a = &asked;
    let answer: [u8; 42] = [
        a[8], a[9], a[10], a[11], a[12], a[13], m0, m1, m2, m3, m4, m5, 0x08, 0x06, //
        0, 1, 8, 0, 6, 4, 0, 2, //
        m0, m1, m2, m3, m4, m5, a[24], a[25], a[26], a[27], //
        a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16], a[17],
    ];
    if !skb.store(0, &answer) {
        return TC_ACT_SHOT;
    }
    skb.set_mark(VERDICT_MARK);
    // SAFETY: the context is valid for the program's run; the helper has no precondition.
    (unsafe { bpf_redirect((*skb.0).ifindex, 0) }) as i32
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// SAFETY: a plain string in the section that the kernel reads the licence from.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
