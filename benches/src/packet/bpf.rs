//! The three calls of bpf(2) that the harness needs: an array map, a program, and
//! `BPF_PROG_TEST_RUN` with live frames, which sends what the program passes up
//! the kernel's real receive path and tells its own time.
//!
//! aya loads objects in ELF; this program is made at run time, so it does not
//! come by that way. Layouts are those of `union bpf_attr` (linux/bpf.h), whose
//! tail may be left out.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::Context;

use crate::packet::frame::{FRAME_BYTES, Template};
use crate::packet::program::{Instruction, instructions};

const MAP_CREATE: i32 = 0;
const PROG_LOAD: i32 = 5;
const PROG_TEST_RUN: i32 = 10;

const MAP_TYPE_ARRAY: u32 = 2;
const PROG_TYPE_XDP: u32 = 6;
const TEST_XDP_LIVE_FRAMES: u32 = 1 << 1;

/// The verifier's complaint is cut here; the program has some sixty instructions.
const LOG_BYTES: usize = 64 * 1024;

#[repr(C)]
#[derive(Default)]
struct MapCreate {
    map_type: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
}

#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    _pad: u32,
}

/// `struct xdp_md`: which device the frames seem to come in by.
#[repr(C)]
#[derive(Default)]
struct XdpContext {
    data: u32,
    data_end: u32,
    data_meta: u32,
    ingress_ifindex: u32,
    rx_queue_index: u32,
    egress_ifindex: u32,
}

const _: () = assert!(size_of::<MapCreate>() == 20);
const _: () = assert!(size_of::<ProgLoad>() == 48);
const _: () = assert!(size_of::<TestRun>() == 80);
const _: () = assert!(size_of::<XdpContext>() == 24);

/// Sends frames of one template; flows are counted on from call to call.
#[derive(Debug)]
pub struct Sender {
    program: OwnedFd,
    template: [u8; FRAME_BYTES],
    /// The program holds it too; kept for the file descriptor in its name.
    _counter: OwnedFd,
}

impl Sender {
    /// Frames of `flows` flows (a power of two) in turn.
    pub fn new(template: &Template, flows: u32) -> anyhow::Result<Self> {
        let counter = create_counter().context("eBPF map: create")?;
        let program = load(&instructions(template, counter.as_raw_fd(), flows))?;
        Ok(Self { program, template: template.bytes, _counter: counter })
    }

    /// Lets `frames` frames arrive by the device `ifindex` of the namespace that
    /// the calling thread is in; nanoseconds a frame, by the kernel's timer. What
    /// the softirqs of the way did is in it, for they run before the timer stops.
    pub fn send(&self, ifindex: u32, frames: u32) -> anyhow::Result<u32> {
        let context = XdpContext {
            data_end: FRAME_BYTES as u32,
            ingress_ifindex: ifindex,
            ..XdpContext::default()
        };
        let mut run = TestRun {
            prog_fd: self.program.as_raw_fd() as u32,
            data_size_in: FRAME_BYTES as u32,
            data_in: self.template.as_ptr() as u64,
            repeat: frames,
            ctx_size_in: size_of::<XdpContext>() as u32,
            ctx_in: &raw const context as u64,
            flags: TEST_XDP_LIVE_FRAMES,
            ..TestRun::default()
        };
        // SAFETY: both pointers in `run` are to values that live until the call
        // returns, with the sizes that stand beside them.
        unsafe { bpf(PROG_TEST_RUN, &mut run) }.context("eBPF program: send live frames")?;
        Ok(run.duration)
    }
}

fn create_counter() -> io::Result<OwnedFd> {
    let mut map = MapCreate {
        map_type: MAP_TYPE_ARRAY,
        key_size: 4,
        value_size: 8,
        max_entries: 1,
        ..MapCreate::default()
    };
    // SAFETY: `MapCreate` holds no pointers; a new descriptor is nobody else's.
    unsafe { bpf(MAP_CREATE, &mut map).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

fn load(code: &[Instruction]) -> anyhow::Result<OwnedFd> {
    let mut log = vec![0_u8; LOG_BYTES];
    let mut program = ProgLoad {
        prog_type: PROG_TYPE_XDP,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 1,
        log_size: LOG_BYTES as u32,
        log_buf: log.as_mut_ptr() as u64,
        ..ProgLoad::default()
    };
    // SAFETY: the pointers in `program` are to `code`, to a constant and to `log`,
    // all alive until the call returns, with the sizes that stand beside them; a
    // new descriptor is nobody else's.
    unsafe { bpf(PROG_LOAD, &mut program).map(|fd| OwnedFd::from_raw_fd(fd)) }.with_context(|| {
        let said = log.split(|&byte| byte == 0).next().unwrap_or_default();
        format!("eBPF program: load: {}", String::from_utf8_lossy(said).trim())
    })
}

/// # Safety
/// Every pointer in `attributes` must be valid for what `command` does with it.
unsafe fn bpf<T>(command: i32, attributes: &mut T) -> io::Result<i32> {
    // SAFETY: `attributes` is valid for reads and writes of its own size; what it
    // points to is the caller's promise.
    let answer = unsafe {
        libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size_of::<T>())
    };
    if answer < 0 { Err(io::Error::last_os_error()) } else { Ok(answer as i32) }
}
