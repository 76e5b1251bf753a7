//! A frame as tc programs have it.

use aya_ebpf::bindings::__sk_buff;
use aya_ebpf::helpers::{
    bpf_ktime_get_coarse_ns, bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
};
use ebpf::flow::{TCP, seconds};
use ebpf::packet::{Frame, HEAD_LEN, HEAD6_LEN, IPV6};
use ebpf::{Arrival, Head, Head6};

use super::span::{Span, store_head, store_u32, store_u64};

/// linux/if_packet.h: addressed to the device itself.
const PACKET_HOST: u32 = 0;

pub struct Skb(pub *mut __sk_buff);

impl Frame for Skb {
    #[inline(always)]
    fn size(&self) -> u32 {
        // SAFETY: the context is valid for the program's run.
        unsafe { (*self.0).len }
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.0).gso_size }
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
    pub fn set_head(&self, head: &Head) -> bool {
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
    pub fn headers(&self, head: &Head) -> u32 {
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

#[inline(always)]
pub fn now_s() -> u32 {
    // SAFETY: the helper has no precondition.
    seconds(unsafe { bpf_ktime_get_coarse_ns() })
}
