//! What the host says of itself on the uplink: frames that the daemon has made.
//!
//! Attached nowhere: run by BPF_PROG_TEST_RUN, whose frame it sends. A packet socket would
//! need CAP_NET_RAW, which the daemon does not keep.

use aya_ebpf::helpers::bpf_clone_redirect;
use aya_ebpf::macros::classifier;
use aya_ebpf::programs::TcContext;

/// Sends the frame by the device that the context names; answers the kernel's error.
#[classifier]
pub fn announce(ctx: TcContext) -> i32 {
    // SAFETY: the context is valid for the program's run, and nothing is read of the frame
    // after the call.
    unsafe { bpf_clone_redirect(ctx.skb.skb, (*ctx.skb.skb).ifindex, 0) as i32 }
}
