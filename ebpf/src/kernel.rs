//! Programs: where a verdict is asked for and carried out.

use core::arch::asm;
use core::mem::size_of;

use aya_ebpf::bindings::{
    __sk_buff, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh,
    bpf_redir_neigh__bindgen_ty_1, xdp_action,
};
use aya_ebpf::helpers::{
    bpf_ktime_get_coarse_ns, bpf_l4_csum_replace, bpf_redirect, bpf_redirect_neigh,
    bpf_redirect_peer, bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
    bpf_xdp_get_buff_len, bpf_xdp_load_bytes,
};
use aya_ebpf::macros::{classifier, xdp};
use aya_ebpf::maps::lpm_trie::Key;
use aya_ebpf::programs::{TcContext, XdpContext};
use ebpf::decide::{early, from_instance, from_punt, from_world};
use ebpf::flow::{TCP, UDP, seconds};
use ebpf::half::{Address, Bucket, WORDS6};
use ebpf::layout::{
    Config, Elastic, Flow, FlowKey, Holder, Interface, Local, LocalKey, Policy, SIX_GUEST,
    SIX_RESPONDER, SIX_UPLINK, Six, Step, Step6,
};
use ebpf::packet::{Frame, HEAD_LEN, HEAD6_LEN, IPV6, mac_bytes, mac_number};
use ebpf::rate::on_the_wire;
use ebpf::rewrite::{corrected, may_be_partial, sum32};
use ebpf::tables::{Question, classify};
use ebpf::verdict::{FlowChange, FlowWrite};
use ebpf::{
    ASK_MARK, Action, Arrival, Head, Head6, Ip, REASONS_MAX, Reason, TRACE_MARK, Tables, V6,
    VERDICT_MARK, Verdict, Work,
};

use crate::maps::{
    BLOCKED, BLOCKED6, CONFIG, COUNTERS, ELASTICS, FLOWS, FLOWS6, HALF_FLOWS, HALF_FLOWS6, HOLDERS,
    INTERFACES, LOCALS, POLICIES, QUOTAS, RANGES, SIX_PROGRAMS, SIXES, STEPS, STEPS6, SWEPT, WORDS,
    WORK,
};
use crate::{spend, watch};

/// linux/if_packet.h: addressed to the device itself.
const PACKET_HOST: u32 = 0;
const AF_INET: u32 = 2;
/// linux/bpf.h: insert, but never replace.
const BPF_NOEXIST: u64 = 1;

pub struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn config(&self) -> Config {
        match CONFIG.get(0) {
            Some(config) => *config,
            None => bytemuck::Zeroable::zeroed(),
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
    fn elastic(&self, address: u32) -> Option<&Elastic> {
        // SAFETY: as for `interface`.
        unsafe { ELASTICS.get(address) }
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
        let (bucket, words) = half_open(key)?;
        bucket.find(&words)
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

    #[inline(always)]
    fn six(&self, ifindex: u32) -> Option<&Six> {
        // SAFETY: as for `interface`.
        unsafe { SIXES.get(ifindex) }
    }

    #[inline(always)]
    fn holder(&self, address: &V6) -> Option<Holder> {
        // SAFETY: as for `interface`.
        unsafe { HOLDERS.get(address) }.copied()
    }

    #[inline(always)]
    fn step6(&self, index: u32) -> Option<Step6> {
        STEPS6.get(index).copied()
    }

    #[inline(always)]
    fn flow6(&self, key: &FlowKey<V6>) -> Option<Flow> {
        // SAFETY: the value is one aligned word, read at once.
        unsafe { FLOWS6.get(key) }.copied()
    }

    #[inline(always)]
    fn half_flow6(&self, key: &FlowKey<V6>) -> Option<Flow> {
        match find_half6(key) {
            0 => None,
            flow => Some(bytemuck::cast(flow)),
        }
    }

    #[inline(always)]
    fn blocked6(&self, address: &V6) -> bool {
        BLOCKED6.get(Key::new(128, address.bytes())).is_some()
    }

    #[inline(always)]
    fn classify6(&self, slot: u32, q: &Question<V6>) -> u32 {
        let kind = u64::from(q.protocol) << 16 | u64::from(q.detail);
        let slot_and_kind = u64::from(slot) << 32 | kind;
        classify_flow6(slot_and_kind, q.remote.high, q.remote.low, q.identity)
    }
}

/// The key's bucket in the half-open table.
#[inline(always)]
fn half_open(key: &FlowKey) -> Option<(&'static mut Bucket, [u64; 3])> {
    let address = Address::of(key, CONFIG.get(0)?.seed);
    let bucket = HALF_FLOWS.get_ptr_mut(address.bucket)?;
    // SAFETY: the pointer was checked; whatever stands there are plain words, which
    // another CPU may change meanwhile (`ebpf::half` says what then).
    Some((unsafe { &mut *bucket }, address.words))
}

/// [`half_open`] of the other family.
#[inline(always)]
fn half_open6(key: &FlowKey<V6>) -> Option<(&'static mut Bucket<WORDS6>, [u64; WORDS6])> {
    let address = Address::of6(key, CONFIG.get(0)?.seed);
    let bucket = HALF_FLOWS6.get_ptr_mut(address.bucket)?;
    // SAFETY: as for `half_open`.
    Some((unsafe { &mut *bucket }, address.words))
}

/// The half-open flow as a word, 0 where there is none. A function of its own: its
/// place on the stack is the classification's too.
#[inline(never)]
fn find_half6(key: &FlowKey<V6>) -> u64 {
    match half_open6(key).and_then(|(bucket, words)| bucket.find(&words)) {
        Some(flow) => bytemuck::cast(flow),
        None => 0,
    }
}

/// [`classify_flow`] of the other family; the slot stands above protocol and detail.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn classify_flow6(slot_and_kind: u64, high: u64, low: u64, identity: u64) -> u32 {
    let (slot, kind) = ((slot_and_kind >> 32) as u32, slot_and_kind as u32);
    let (protocol, detail) = ((kind >> 16) as u8, kind as u16);
    let remote = V6 { high, low };
    classify(&Maps, slot, &Question { remote, identity, protocol, detail })
}

/// A global function of plain numbers: verified by itself.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn classify_flow(slot: u32, remote: u32, identity: u64, kind: u32) -> u32 {
    let (protocol, detail) = ((kind >> 16) as u8, kind as u16);
    classify(&Maps, slot, &Question { remote, identity, protocol, detail })
}

/// A load or store of a whole word wherever it lies. The compiler would take bytes,
/// for the target is said to want words aligned; packets the verifier lets be read
/// and written anywhere.
macro_rules! word_access {
    ($load:ident, $store:ident, $type:ty, $name:literal) => {
        /// # Safety
        /// The bytes must lie inside the packet.
        #[inline(always)]
        unsafe fn $load<const OFFSET: usize>(at: *const u8) -> $type {
            let word: u64;
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    concat!("{word} = *(", $name, " *)({at} + {offset})"),
                    word = out(reg) word,
                    at = in(reg) at,
                    offset = const OFFSET,
                    options(pure, readonly, nostack, preserves_flags),
                );
            }
            <$type>::from_be(word as $type)
        }

        /// # Safety
        /// The bytes must lie inside the packet.
        #[inline(always)]
        unsafe fn $store<const OFFSET: usize>(at: *mut u8, word: $type) {
            // SAFETY: the caller's promise.
            unsafe {
                asm!(
                    concat!("*(", $name, " *)({at} + {offset}) = {word}"),
                    word = in(reg) u64::from(word.to_be()),
                    at = in(reg) at,
                    offset = const OFFSET,
                    options(nostack, preserves_flags),
                );
            }
        }
    };
}

word_access!(load_u16, store_u16, u16, "u16");
word_access!(load_u32, store_u32, u32, "u32");
word_access!(load_u64, store_u64, u64, "u64");

/// Writes a head's changed words.
///
/// # Safety
/// All 34 bytes must lie inside the packet.
#[inline(always)]
unsafe fn store_head(at: *mut u8, head: &Head) {
    // SAFETY: the caller's promise.
    unsafe {
        store_u64::<0>(at, head.macs);
        store_u32::<8>(at, head.macs_rest);
        store_u32::<22>(at, head.third);
        store_u32::<26>(at, head.source);
        store_u32::<30>(at, head.destination);
    }
}

/// What of a packet lies in one piece.
#[derive(Clone, Copy)]
struct Span {
    start: usize,
    end: usize,
}

impl Span {
    /// Where `N` bytes from `offset` are, if they are here.
    #[inline(always)]
    fn at<const N: usize>(self, offset: u32) -> Option<*mut u8> {
        let at = self.start + offset as usize;
        if at + N > self.end { None } else { Some(at as *mut u8) }
    }

    #[inline(always)]
    fn head(self) -> Option<Head> {
        let at = self.at::<HEAD_LEN>(0)?;
        // SAFETY: all 34 bytes are there.
        unsafe {
            Some(Head {
                macs: load_u64::<0>(at),
                macs_rest: load_u32::<8>(at),
                ether_type: load_u16::<12>(at),
                first: load_u32::<14>(at),
                second: load_u32::<18>(at),
                third: load_u32::<22>(at),
                source: load_u32::<26>(at),
                destination: load_u32::<30>(at),
            })
        }
    }

    #[inline(always)]
    fn head6(self) -> Option<Head6> {
        let at = self.at::<HEAD6_LEN>(0)?;
        // SAFETY: all 54 bytes are there.
        unsafe {
            Some(Head6 {
                macs: load_u64::<0>(at),
                macs_rest: load_u32::<8>(at),
                ether_type: load_u16::<12>(at),
                first: load_u32::<14>(at),
                second: load_u32::<18>(at),
                source: V6 { high: load_u64::<22>(at), low: load_u64::<30>(at) },
                destination: V6 { high: load_u64::<38>(at), low: load_u64::<46>(at) },
            })
        }
    }

    /// The few short pieces that every packet has; the rest goes by the helper.
    #[inline(always)]
    fn load<const N: usize>(self, offset: u32) -> Option<[u8; N]> {
        // A bound for the verifier; transport headers begin at 74 at the latest.
        if offset > 127 {
            return None;
        }
        let at = self.at::<N>(offset)?;
        let mut bytes = [0; N];
        // SAFETY: all N bytes are there.
        unsafe {
            match N {
                2 => bytes.copy_from_slice(&load_u16::<0>(at).to_be_bytes()),
                8 => bytes.copy_from_slice(&load_u64::<0>(at).to_be_bytes()),
                _ => return None,
            }
        }
        Some(bytes)
    }
}

pub struct Skb(pub *mut __sk_buff);

impl Frame for Skb {
    #[inline(always)]
    fn size(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.0).len }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        if let Some(bytes) = self.span().load(offset) {
            return Some(bytes);
        }
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
    fn span(&self) -> Span {
        // SAFETY: the context is valid for the program's run.
        let (start, end) = unsafe { ((*self.0).data as usize, (*self.0).data_end as usize) };
        Span { start, end }
    }

    /// Headers that lie in pieces are brought together first.
    #[inline(always)]
    pub fn head(&self) -> Option<Head> {
        if self.span().at::<HEAD_LEN>(0).is_none() {
            // SAFETY: the helper fails where the frame is shorter.
            unsafe { bpf_skb_pull_data(self.0, HEAD_LEN as u32) };
        }
        self.span().head()
    }

    /// [`Self::head`] of the other family.
    #[inline(always)]
    pub fn head6(&self) -> Option<Head6> {
        if self.span().at::<HEAD6_LEN>(0).is_none() {
            // SAFETY: the helper fails where the frame is shorter.
            unsafe { bpf_skb_pull_data(self.0, HEAD6_LEN as u32) };
        }
        self.span().head6()
    }

    /// Writes a head's changed words: hardware addresses and the hop limit.
    #[inline(always)]
    pub fn set_head6(&self, head: &Head6) -> bool {
        let Some(at) = self.span().at::<HEAD6_LEN>(0) else {
            return false;
        };
        // SAFETY: all 54 bytes are there.
        unsafe {
            store_u64::<0>(at, head.macs);
            store_u32::<8>(at, head.macs_rest);
            store_u32::<18>(at, head.second);
        }
        true
    }

    /// Writes a head's changed words.
    #[inline(always)]
    fn set_head(&self, head: &Head) -> bool {
        let Some(at) = self.span().at::<HEAD_LEN>(0) else {
            return false;
        };
        // SAFETY: all 34 bytes are there.
        unsafe { store_head(at, head) };
        true
    }

    #[inline(always)]
    pub fn store<const N: usize>(&self, offset: u32, bytes: &[u8; N]) -> bool {
        // SAFETY: the helper reads N bytes, and checks the frame's end itself.
        let result = unsafe {
            bpf_skb_store_bytes(self.0.cast(), offset, bytes.as_ptr().cast(), N as u32, 0)
        };
        result == 0
    }

    /// Bytes before the payload of a superframe.
    #[inline(always)]
    fn headers(&self, head: &Head) -> u32 {
        let (next, protocol) = match head.ether_type {
            IPV6 => (14 + 40, (head.second >> 8) as u8),
            _ => (14 + head.header_len(), head.protocol()),
        };
        if protocol != TCP {
            return next + 8;
        }
        let data: [u8; 2] = self.load(next + 12).unwrap_or([0x50, 0]);
        next + u32::from(data[0] >> 4) * 4
    }

    #[inline(always)]
    pub fn arrival(&self) -> Arrival {
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
    pub fn mark(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.0).mark }
    }

    #[inline(always)]
    pub fn set_mark(&self, mark: u32) {
        // SAFETY: the context is valid for the program's run, and `mark` may be written.
        unsafe { (*self.0).mark = mark }
    }
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

#[inline(always)]
fn now_s() -> u32 {
    // SAFETY: the helper has no precondition.
    seconds(unsafe { bpf_ktime_get_coarse_ns() })
}

/// This CPU's work space: the stack has not enough room.
#[inline(always)]
fn work() -> Option<&'static mut Work> {
    let work = WORK.get_ptr_mut(0)?;
    // SAFETY: the pointer was checked; whatever stands there is zeros or a `Work` that
    // another packet left; and no other program runs on this CPU before this one ends.
    Some(unsafe { &mut *work })
}

/// IPv6 has programs of its own, with a stack of their own. Only a missing one lets
/// this return.
#[inline(always)]
fn go_on_as_six(ctx: &TcContext, program: u32) -> i32 {
    // SAFETY: the programs there are classifiers as this one is.
    let _ = unsafe { SIX_PROGRAMS.tail_call(ctx, program) };
    TC_ACT_SHOT
}

/// From a guest.
#[classifier]
pub fn tap_ingress(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let Some(head) = skb.head() else { return refuse(&skb, Reason::Malformed) };
    if head.ether_type == IPV6 {
        return go_on_as_six(&ctx, SIX_GUEST);
    }
    let Some(work) = work() else { return TC_ACT_SHOT };
    from_instance(&Maps, &skb, &head, &skb.arrival(), work);
    carry_out(skb.0)
}

/// From the world.
#[classifier]
pub fn uplink_ingress(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    // Shorter than any frame of ours.
    let Some(head) = skb.head() else { return TC_ACT_UNSPEC };
    if head.ether_type == IPV6 {
        return go_on_as_six(&ctx, SIX_UPLINK);
    }
    let Some(work) = work() else { return TC_ACT_SHOT };
    from_world(&Maps, &skb, &head, &skb.arrival(), work);
    carry_out(skb.0)
}

/// From our own responder.
#[classifier]
pub fn punt_ingress(ctx: TcContext) -> i32 {
    let skb = Skb(ctx.skb.skb);
    let Some(head) = skb.head() else { return refuse(&skb, Reason::PuntStray) };
    if head.ether_type == IPV6 {
        return go_on_as_six(&ctx, SIX_RESPONDER);
    }
    let Some(work) = work() else { return TC_ACT_SHOT };
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
    let Some(head) = frame.span().head() else { return xdp_action::XDP_PASS };
    let Some(work) = work() else { return xdp_action::XDP_PASS };
    let reason = match early(&Maps, &frame, &head, work) {
        Ok(()) if exceeds(&head, work) => Reason::SourceRate,
        Ok(()) => match fast(&frame, &head, work) {
            Reason::Undecided => return xdp_action::XDP_PASS,
            Reason::Established => return deliver_frame(work),
            exceeded => exceeded,
        },
        Err(reason) => reason,
    };
    drop_early(&ctx, work, reason)
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
fn fast(frame: &Xdp<'_>, head: &Head, work: &mut Work) -> Reason {
    let config = Maps.config();
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
    from_world(&Maps, frame, head, &arrival, work);
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
fn exceeds(head: &Head, work: &Work) -> bool {
    let config = Maps.config();
    config.sources != 0
        && work.verdict.slots[0] != 0
        && work.packet.opens_flow()
        && !spend::source_may(head.source, config.seed)
}

#[inline(always)]
pub fn refuse(skb: &Skb, reason: Reason) -> i32 {
    // SAFETY: the context is valid for the program's run.
    let ifindex = unsafe { (*skb.0).ifindex };
    let slot = Maps.interface(ifindex).map_or(0, |i| i.slot);
    count(slot, reason);
    if let Some(work) = work() {
        work.begin();
        work.verdict.slots[0] = slot;
        work.verdict.refuse(reason);
        if watch::wanted(&work.verdict) {
            watch::tell_refused(skb.0);
        }
    }
    TC_ACT_SHOT
}

#[inline(always)]
pub fn count(slot: u32, reason: Reason) {
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
    let Some(head) = skb.head() else { return TC_ACT_SHOT };
    let Some(work) = work() else { return TC_ACT_SHOT };
    let mark = skb.mark();
    let asked = mark == ASK_MARK;
    if work.verdict.pays != 0 && !asked && work.verdict.action != Action::Drop {
        pay(skb, &head, work);
    }
    let (head, verdict) = (&head, &work.verdict);
    if asked || mark == TRACE_MARK {
        report(skb, verdict);
    }
    if !asked {
        account(verdict);
        if watch::wanted(verdict) {
            watch::watch(ctx);
        }
    }
    match verdict.action {
        Action::Drop | Action::AnswerNeighbour => TC_ACT_SHOT,
        Action::Pass => TC_ACT_UNSPEC,
        Action::AnswerArp => answer_arp(skb, mac_bytes(verdict.rewrite.source_mac)),
        Action::Deliver | Action::Leave | Action::Enter => {
            if !rewrite(skb, head, verdict) {
                return TC_ACT_SHOT;
            }
            match verdict.action {
                Action::Deliver => deliver(skb, verdict.ifindex),
                Action::Enter => enter(skb, verdict.ifindex),
                _ => leave(skb, verdict.ifindex, verdict.next_hop),
            }
        }
    }
}

/// Has the buckets pay for what passes, or refuses it.
#[inline(always)]
fn pay(skb: &Skb, head: &Head, work: &mut Work) {
    refuse_unpaid(work, spend_for(skb, head));
}

/// What the buckets say of this frame.
#[inline(always)]
pub fn spend_for(skb: &Skb, head: &Head) -> u32 {
    // SAFETY: the context is valid for the program's run.
    let (len, gso_size) = unsafe { ((*skb.0).len, (*skb.0).gso_size) };
    let headers = match gso_size {
        0 => 0,
        _ => skb.headers(head),
    };
    let (packets, bytes) = on_the_wire(len, headers, gso_size);
    spend::spend(bytes, packets)
}

/// `answer` is [`spend::spend`]'s.
#[inline(always)]
pub fn refuse_unpaid<A: Ip>(work: &mut Work<A>, answer: u32) {
    let reason = match answer & 0xff {
        0 => return,
        1 => Reason::BandwidthOut,
        2 => Reason::BandwidthIn,
        3 => Reason::PacketRate,
        _ => Reason::ServiceRate,
    };
    work.verdict.exceed(reason, (answer >> 8) as u8);
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
    skb.set_head(&verdict.rewrite.apply(head))
}

/// Flows and counters.
#[inline(always)]
pub fn account<A: Stored>(verdict: &Verdict<A>) {
    write_flow(&verdict.sender);
    write_flow(&verdict.receiver);
    // What passes by the uplink is none of our business, and not worth a counter.
    if verdict.action == Action::Pass {
        return;
    }
    if verdict.counted & 1 != 0 {
        count(verdict.slots[0], verdict.reason);
    }
    if verdict.slots[1] != 0 && verdict.counted & 2 != 0 {
        count(verdict.slots[1], verdict.reason);
    }
}

/// Into the control block, where BPF_PROG_TEST_RUN finds it.
#[inline(always)]
pub fn report<A: Ip>(skb: &Skb, verdict: &Verdict<A>) {
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
fn write_flow<A: Stored>(change: &FlowChange<A>) {
    let FlowChange { write, slot, key, flow } = change;
    match write {
        FlowWrite::Nothing => {}
        FlowWrite::Tracked => {
            A::put(key, flow, 0);
        }
        FlowWrite::Half => A::put_half(key, flow),
        FlowWrite::Reopen => {
            if A::remove(key) {
                add(*slot, false);
            }
            A::put_half(key, flow);
        }
        FlowWrite::Confirm => {
            // Only one of two CPUs that confirm it at once counts it.
            if A::put(key, flow, BPF_NOEXIST) {
                add(*slot, true);
                A::remove_half(key);
            }
        }
    }
}

/// Where a family's flows stand.
pub trait Stored: Ip {
    fn put(key: &FlowKey<Self>, flow: &Flow, flags: u64) -> bool;
    fn remove(key: &FlowKey<Self>) -> bool;
    fn put_half(key: &FlowKey<Self>, flow: &Flow);
    fn remove_half(key: &FlowKey<Self>);
}

macro_rules! stored {
    ($family:ty, $flows:ident, $half_open:ident) => {
        impl Stored for $family {
            #[inline(always)]
            fn put(key: &FlowKey<Self>, flow: &Flow, flags: u64) -> bool {
                $flows.insert(key, flow, flags).is_ok()
            }

            #[inline(always)]
            fn remove(key: &FlowKey<Self>) -> bool {
                $flows.remove(key).is_ok()
            }

            #[inline(always)]
            fn put_half(key: &FlowKey<Self>, flow: &Flow) {
                if let Some((bucket, words)) = $half_open(key) {
                    bucket.put(&words, *flow);
                }
            }

            #[inline(always)]
            fn remove_half(key: &FlowKey<Self>) {
                if let Some((bucket, words)) = $half_open(key) {
                    bucket.remove(&words);
                }
            }
        }
    };
}

stored!(u32, FLOWS, half_open);
stored!(V6, FLOWS6, half_open6);

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
    let transport = 14 + head.header_len();
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
pub fn deliver(skb: &Skb, ifindex: u32) -> i32 {
    skb.set_mark(VERDICT_MARK);
    // SAFETY: the helper has no precondition.
    (unsafe { bpf_redirect(ifindex, 0) }) as i32
}

/// Past the device, its guard and the queue between the namespaces.
#[inline(always)]
pub fn enter(skb: &Skb, ifindex: u32) -> i32 {
    skb.set_mark(0);
    // SAFETY: the helper has no precondition.
    (unsafe { bpf_redirect_peer(ifindex, 0) }) as i32
}

#[inline(always)]
fn leave(skb: &Skb, ifindex: u32, next_hop: u32) -> i32 {
    leave_by(skb, ifindex, AF_INET, [next_hop.to_be(), 0, 0, 0])
}

/// The kernel finds the hardware address of `next_hop`, a word of it for IPv4.
#[inline(always)]
pub fn leave_by(skb: &Skb, ifindex: u32, family: u32, next_hop: [u32; 4]) -> i32 {
    skb.set_mark(0);
    let mut hop = bpf_redir_neigh {
        nh_family: family,
        __bindgen_anon_1: bpf_redir_neigh__bindgen_ty_1 { ipv6_nh: next_hop },
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
