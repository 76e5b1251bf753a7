//! bpf(2), as much of it as a frame generator needs (linux/bpf.h).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use std::path::Path;

const BPF_MAP_CREATE: libc::c_int = 0;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_PROG_TEST_RUN: libc::c_int = 10;
const BPF_LINK_CREATE: libc::c_int = 28;

const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_XDP: u32 = 37;
const BPF_F_TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;

/// Native mode: the device then has the receive queue that live frames need.
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

#[derive(Debug, Clone, Copy)]
#[repr(u32)]
pub enum MapKind {
    Array = 2,
    ProgArray = 3,
}

/// `union bpf_attr`, of the size that this kernel's commands read at most here.
#[repr(C, align(8))]
struct Attributes([u8; 128]);

impl Attributes {
    fn new() -> Self {
        Self([0; 128])
    }

    fn set32(mut self, at: usize, value: u32) -> Self {
        self.0[at..at + 4].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn set64(mut self, at: usize, value: u64) -> Self {
        self.0[at..at + 8].copy_from_slice(&value.to_ne_bytes());
        self
    }

    fn get32(&self, at: usize) -> u32 {
        let mut bytes = [0; 4];
        bytes.copy_from_slice(&self.0[at..at + 4]);
        u32::from_ne_bytes(bytes)
    }
}

/// # Safety
/// Every address in `attributes` must be good for what the command does with it,
/// for as long as the call lasts.
unsafe fn bpf(command: libc::c_int, attributes: &mut Attributes) -> io::Result<i64> {
    // SAFETY: the attributes are 128 bytes that live through the call; the rest
    // is the caller's promise.
    let result = unsafe {
        libc::syscall(libc::SYS_bpf, command, attributes.0.as_mut_ptr(), attributes.0.len())
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(fd: i64) -> io::Result<OwnedFd> {
    let fd = i32::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: bpf(2) has just given this descriptor to nobody else.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn number(fd: &OwnedFd) -> u32 {
    fd.as_raw_fd().unsigned_abs()
}

/// A map of one entry, with four-byte keys.
pub fn make_map(kind: MapKind, value_bytes: u32) -> io::Result<OwnedFd> {
    let mut attributes =
        Attributes::new().set32(0, kind as u32).set32(4, 4).set32(8, value_bytes).set32(12, 1);
    // SAFETY: the command reads plain numbers only.
    owned(unsafe { bpf(BPF_MAP_CREATE, &mut attributes) }?)
}

/// Writes the only entry of a map.
pub fn set_entry(map: &OwnedFd, value: &[u8]) -> io::Result<()> {
    let key = 0u32;
    let mut attributes = Attributes::new()
        .set32(0, number(map))
        .set64(8, (&raw const key) as u64)
        .set64(16, value.as_ptr() as u64);
    // SAFETY: key and value live through the call and have the map's sizes: keys
    // have four bytes, and each caller passes what it made the map for.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attributes) }?;
    Ok(())
}

pub fn load_xdp(instructions: &[u64]) -> io::Result<OwnedFd> {
    let license = c"Dual MIT/GPL";
    let mut log = vec![0u8; 64 * 1024];
    let count = u32::try_from(instructions.len()).map_err(io::Error::other)?;
    let mut attributes = Attributes::new()
        .set32(0, BPF_PROG_TYPE_XDP)
        .set32(4, count)
        .set64(8, instructions.as_ptr() as u64)
        .set64(16, license.as_ptr() as u64)
        .set32(24, 1)
        .set32(28, u32::try_from(log.len()).map_err(io::Error::other)?)
        .set64(32, log.as_mut_ptr() as u64)
        .set32(68, BPF_XDP);
    // SAFETY: instructions, licence and log live through the call, and their
    // lengths are those given.
    let loaded = unsafe { bpf(BPF_PROG_LOAD, &mut attributes) };
    loaded.and_then(owned).map_err(|error| {
        let said = String::from_utf8_lossy(&log);
        io::Error::new(error.kind(), format!("{error}: {}", said.trim_end_matches('\0')))
    })
}

/// Attaches an XDP program to a device of this thread's namespace, until the
/// answer is dropped.
pub fn attach_xdp(program: &OwnedFd, ifindex: u32) -> io::Result<OwnedFd> {
    let mut attributes = Attributes::new()
        .set32(0, number(program))
        .set32(4, ifindex)
        .set32(8, BPF_XDP)
        .set32(12, XDP_FLAGS_DRV_MODE);
    // SAFETY: the command reads plain numbers only.
    owned(unsafe { bpf(BPF_LINK_CREATE, &mut attributes) }?)
}

/// Opens what is pinned at a path.
pub fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_encoded_bytes())?;
    let mut attributes = Attributes::new().set64(0, path.as_ptr() as u64);
    // SAFETY: the path lives through the call and ends with a zero.
    owned(unsafe { bpf(BPF_OBJ_GET, &mut attributes) }?)
}

/// Lets `count` copies of a frame run through the program and on into the stack
/// as if the device had received them; the kernel's nanoseconds for each.
pub fn run_live(program: &OwnedFd, frame: &[u8], ifindex: u32, count: u32) -> io::Result<u32> {
    let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
    // `struct xdp_md`: data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex.
    let context = [0, length, 0, ifindex, 0, 0u32];
    let mut attributes = Attributes::new()
        .set32(0, number(program))
        .set32(8, length)
        .set64(16, frame.as_ptr() as u64)
        .set32(32, count)
        .set32(40, size_of_val(&context) as u32)
        .set64(48, context.as_ptr() as u64)
        .set32(64, BPF_F_TEST_XDP_LIVE_FRAMES);
    // SAFETY: frame and context live through the call with the lengths given; no
    // output buffer is named.
    unsafe { bpf(BPF_PROG_TEST_RUN, &mut attributes) }?;
    Ok(attributes.get32(36))
}
