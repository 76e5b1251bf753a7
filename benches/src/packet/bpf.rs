//! The calls of bpf(2) that the harness needs: maps, a program, and
//! `BPF_PROG_TEST_RUN`, alone or with live frames, which sends what the program
//! passes up the kernel's real receive path; both tell their own time.
//!
//! aya loads objects in ELF; this program is made at run time, so it does not
//! come by that way. Layouts are those of `union bpf_attr` (linux/bpf.h), whose
//! tail may be left out.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use anyhow::Context;

use crate::packet::frame::{FRAME_BYTES, Template};
use crate::packet::program::{Hook, Instruction, instructions};

const MAP_CREATE: i32 = 0;
const MAP_UPDATE: i32 = 2;
const PROG_LOAD: i32 = 5;
const PROG_TEST_RUN: i32 = 10;
const PROG_OF_ID: i32 = 13;

const MAP_TYPE_ARRAY: u32 = 2;
const MAP_TYPE_PROG_ARRAY: u32 = 3;
const PROG_TYPE_TC: u32 = 3;
const PROG_TYPE_XDP: u32 = 6;
/// `BPF_XDP`: a program may only hand over to one that is attached in the same way.
const ATTACH_XDP: u32 = 37;
/// `BPF_F_XDP_HAS_FRAGS`: it knows frames in several pieces.
const KNOWS_FRAGMENTS: u32 = 1 << 5;
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
struct MapUpdate {
    map_fd: u32,
    _pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

#[repr(C)]
#[derive(Default)]
struct ProgOfId {
    prog_id: u32,
    next_id: u32,
    open_flags: u32,
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
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
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

/// The beginning of `struct __sk_buff`: what may be given of it.
#[repr(C)]
#[derive(Default)]
struct TcContext {
    before: [u32; 9],
    ingress_ifindex: u32,
    ifindex: u32,
}

const _: () = assert!(size_of::<TcContext>() == 44);
const _: () = assert!(size_of::<MapCreate>() == 20);
const _: () = assert!(size_of::<MapUpdate>() == 32);
const _: () = assert!(size_of::<ProgOfId>() == 12);
const _: () = assert!(size_of::<ProgLoad>() == 72);
const _: () = assert!(size_of::<TestRun>() == 80);
const _: () = assert!(size_of::<XdpContext>() == 24);

/// Sends frames of one template; flows are counted on from call to call.
#[derive(Debug)]
pub struct Sender {
    program: OwnedFd,
    template: [u8; FRAME_BYTES],
    /// A program array is emptied when nobody holds it open any more, even while
    /// a program uses it.
    _next: Option<OwnedFd>,
}

impl Sender {
    /// Frames of `flows` flows (a power of two) in turn. With `next`, each goes
    /// through the XDP program of that number before it is received.
    pub fn new(template: &Template, flows: u32, next: Option<u32>) -> anyhow::Result<Self> {
        let counter = create_map(MAP_TYPE_ARRAY, 8).context("eBPF map: create the counter")?;
        let next = match next {
            None => None,
            Some(id) => Some(next_program(id).with_context(|| format!("eBPF program {id}: call"))?),
        };
        let next_fd = next.as_ref().map(OwnedFd::as_raw_fd);
        let code = instructions(Hook::Xdp, template, flows, counter.as_raw_fd(), next_fd);
        // A program may only hand over to one that says the same of fragments, and
        // what a loaded program said of them cannot be asked: so both are tried.
        let load = |flags| load(&code, PROG_TYPE_XDP, flags);
        let program = load(KNOWS_FRAGMENTS).or_else(|_| load(0))?;
        Ok(Self { program, template: template.bytes, _next: next })
    }

    /// Frames of one flow for [`Sender::alone`], through the program of that number.
    pub fn for_alone(hook: Hook, template: &Template, next: Option<u32>) -> anyhow::Result<Self> {
        if hook == Hook::Xdp {
            return Self::new(template, 1, next);
        }
        let counter = create_map(MAP_TYPE_ARRAY, 8).context("eBPF map: create the counter")?;
        let next = next.map(next_program).transpose().context("eBPF program: call")?;
        let next_fd = next.as_ref().map(OwnedFd::as_raw_fd);
        let code = instructions(hook, template, 1, counter.as_raw_fd(), next_fd);
        let program = load(&code, PROG_TYPE_TC, 0)?;
        Ok(Self { program, template: template.bytes, _next: next })
    }

    /// Runs the programs `times` times over the frame and does nothing with their
    /// answer; nanoseconds a run, and the last answer.
    pub fn alone(&self, hook: Hook, ifindex: u32, times: u32) -> anyhow::Result<(u32, u32)> {
        let xdp = XdpContext {
            data_end: FRAME_BYTES as u32,
            ingress_ifindex: ifindex,
            ..XdpContext::default()
        };
        let tc = TcContext { ingress_ifindex: ifindex, ifindex, ..TcContext::default() };
        let (ctx_in, ctx_size_in) = match hook {
            Hook::Xdp => (&raw const xdp as u64, size_of::<XdpContext>()),
            Hook::Tc => (&raw const tc as u64, size_of::<TcContext>()),
        };
        let mut run = TestRun {
            prog_fd: self.program.as_raw_fd() as u32,
            data_size_in: FRAME_BYTES as u32,
            data_in: self.template.as_ptr() as u64,
            repeat: times,
            ctx_size_in: ctx_size_in as u32,
            ctx_in,
            ..TestRun::default()
        };
        // SAFETY: both pointers in `run` are to values that live until the call
        // returns, with the sizes that stand beside them.
        unsafe { bpf(PROG_TEST_RUN, &mut run) }.context("eBPF program: run alone")?;
        Ok((run.duration, run.retval))
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

/// A map with one entry.
fn create_map(map_type: u32, value_size: u32) -> io::Result<OwnedFd> {
    let mut map =
        MapCreate { map_type, key_size: 4, value_size, max_entries: 1, ..MapCreate::default() };
    // SAFETY: `MapCreate` holds no pointers; a new descriptor is nobody else's.
    unsafe { bpf(MAP_CREATE, &mut map).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

/// A program array that holds the loaded program of that number.
fn next_program(id: u32) -> io::Result<OwnedFd> {
    let mut by_id = ProgOfId { prog_id: id, ..ProgOfId::default() };
    // SAFETY: `ProgOfId` holds no pointers; a new descriptor is nobody else's.
    let program = unsafe { bpf(PROG_OF_ID, &mut by_id).map(|fd| OwnedFd::from_raw_fd(fd)) }?;
    let array = create_map(MAP_TYPE_PROG_ARRAY, 4)?;
    let key = 0_u32;
    let value = program.as_raw_fd();
    let mut update = MapUpdate {
        map_fd: array.as_raw_fd() as u32,
        key: &raw const key as u64,
        value: &raw const value as u64,
        ..MapUpdate::default()
    };
    // SAFETY: key and value are four bytes each, as the map was made, and live on.
    unsafe { bpf(MAP_UPDATE, &mut update) }?;
    Ok(array)
}

fn load(code: &[Instruction], prog_type: u32, prog_flags: u32) -> anyhow::Result<OwnedFd> {
    let mut log = vec![0_u8; LOG_BYTES];
    let mut program = ProgLoad {
        prog_type,
        insn_cnt: code.len() as u32,
        insns: code.as_ptr() as u64,
        license: c"Dual MIT/GPL".as_ptr() as u64,
        log_level: 1,
        log_size: LOG_BYTES as u32,
        log_buf: log.as_mut_ptr() as u64,
        prog_flags,
        expected_attach_type: if prog_type == PROG_TYPE_XDP { ATTACH_XDP } else { 0 },
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
