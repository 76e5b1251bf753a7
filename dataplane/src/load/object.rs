//! The eBPF object that this binary carries (`build.rs` says which).

use rpc::dataplane::ObjectOrigin;

/// Aligned as the ELF reader wants it.
#[repr(align(8))]
struct Aligned<T: ?Sized>(T);

static OBJECT: &Aligned<[u8]> = &Aligned(*include_bytes!(env!("HOSTPLANE_EBPF_EMBEDDED")));

pub fn bytes() -> &'static [u8] {
    &OBJECT.0
}

/// Where the embedded object came from, and its digest.
pub fn origin() -> ObjectOrigin {
    ObjectOrigin {
        origin: env!("HOSTPLANE_EBPF_ORIGIN").to_owned(),
        sha256: env!("HOSTPLANE_EBPF_SHA256").to_owned(),
    }
}
