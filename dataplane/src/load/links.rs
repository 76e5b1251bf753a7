//! Programs on devices, held by pinned links.
//!
//! | role | ingress | egress | XDP |
//! |---|---|---|---|
//! | guest | `tap_ingress` | `tap_guard` | |
//! | punt | `punt_ingress` | `tap_guard` | |
//! | uplink | `uplink_ingress` | | |
//! | uplink with early drop | `uplink_ingress` | | `uplink_early` |

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::thread::available_parallelism;

use aya::Ebpf;
use aya::maps::Map;
use aya::programs::links::{FdLink, LinkError, PinnedLink};
use aya::programs::tc::{SchedClassifierLink, TcAttachOptions};
use aya::programs::xdp::XdpLink;
use aya::programs::{
    LinkOrder, Program, ProgramError, SchedClassifier, TcAttachType, Xdp, XdpMode,
};
use ebpf::layout::{
    NAT_GUEST, NAT_UPLINK, PROGRAMS_MAX, SIX_GUEST, SIX_RESPONDER, SIX_UPLINK, TELL_FOUR, TELL_SIX,
};
use nix::net::if_::if_indextoname;

use super::pins::{Pins, absent_is_fine};
use super::{Error, syscall};
use crate::compile::{Attachment, Role};

pub const TAP_INGRESS: &str = "tap_ingress";
pub const UPLINK_INGRESS: &str = "uplink_ingress";
pub const UPLINK_EARLY: &str = "uplink_early";
const PUNT_INGRESS: &str = "punt_ingress";
const TAP_GUARD: &str = "tap_guard";

/// On no device: it is run to send a frame.
pub const ANNOUNCE: &str = "announce";
/// As above, to let a frame in again.
pub const REENTER: &str = "reenter";

/// Those that the verifier walks longest, the longest first.
const LONGEST: [&str; 3] = ["nat_guest", TAP_INGRESS, "tap_ingress_six"];

/// Where those go on, by their place in `PROGRAMS`.
const OTHERS: [(u32, &str); PROGRAMS_MAX as usize] = [
    (SIX_GUEST, "tap_ingress_six"),
    (SIX_UPLINK, "uplink_ingress_six"),
    (SIX_RESPONDER, "punt_ingress_six"),
    (TELL_FOUR, "tell_four"),
    (TELL_SIX, "tell_six"),
    (NAT_GUEST, "nat_guest"),
    (NAT_UPLINK, "nat_uplink"),
];

/// The guard comes first, so that nothing slips by while the device is being dressed.
fn programs(role: Role) -> &'static [&'static str] {
    match role {
        Role::Guest => &[TAP_GUARD, TAP_INGRESS],
        Role::Punt => &[TAP_GUARD, PUNT_INGRESS],
        Role::Uplink => &[UPLINK_INGRESS],
        Role::UplinkEarly => &[UPLINK_EARLY, UPLINK_INGRESS],
    }
}

fn side(program: &str) -> TcAttachType {
    if program == TAP_GUARD { TcAttachType::Egress } else { TcAttachType::Ingress }
}

/// Has the verifier look at the programs, one on each core at a time: it takes a second or
/// more for all of them, and meanwhile nobody answers for us.
fn load_all(bpf: &mut Ebpf) -> Result<(), Error> {
    let mut waiting: Vec<(String, &mut Program)> =
        bpf.programs_mut().map(|(name, program)| (name.to_owned(), program)).collect();
    // Taken from the end: the longest walks first.
    waiting.sort_by_key(|(name, _)| LONGEST.iter().rev().position(|long| long == name));
    let cores = available_parallelism().map_or(1, usize::from).min(waiting.len());
    let waiting = Mutex::new(waiting);
    let load_next = || -> Option<Result<(), Error>> {
        let (name, program) = waiting.lock().unwrap_or_else(PoisonError::into_inner).pop()?;
        let loaded = match program {
            Program::SchedClassifier(classifier) => classifier.load(),
            Program::Xdp(xdp) => xdp.load(),
            _ => Err(ProgramError::UnexpectedProgramType),
        };
        Some(loaded.map_err(|e| Error::new("load", name, e)))
    };
    std::thread::scope(|scope| {
        let load_rest = || std::iter::from_fn(load_next).collect::<Result<(), Error>>();
        let threads: Vec<_> = (0..cores).map(|_| scope.spawn(load_rest)).collect();
        let joined = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        joined.collect()
    })
}

pub fn load_programs(bpf: &mut Ebpf) -> Result<(), Error> {
    load_all(bpf)?;
    // The map is pinned, and with it what stands in it: also programs of before this
    // one, of the same layout, go on to these.
    let places = bpf.map("PROGRAMS").ok_or_else(|| missing("PROGRAMS"))?;
    let fd = match places {
        Map::ProgramArray(data) => data.fd().as_fd().try_clone_to_owned(),
        _ => return Err(missing("PROGRAMS")),
    }
    .map_err(|e| Error::new("open", "PROGRAMS", e))?;
    let programs =
        syscall::Map::<u32, u32>::open(fd).map_err(|e| Error::new("open", "PROGRAMS", e))?;
    for (place, name) in OTHERS {
        let fd = classifier(bpf, name)?.fd().map_err(|e| Error::new("look at", name, e))?;
        let number = fd.as_fd().as_raw_fd() as u32;
        programs.put(&place, &number).map_err(|e| Error::new("set", name, e))?;
    }
    Ok(())
}

pub fn classifier<'a>(bpf: &'a mut Ebpf, name: &str) -> Result<&'a mut SchedClassifier, Error> {
    bpf.program_mut(name)
        .ok_or_else(|| missing(name))?
        .try_into()
        .map_err(|e: ProgramError| Error::new("find", name, e))
}

fn xdp(bpf: &mut Ebpf) -> Result<&mut Xdp, Error> {
    bpf.program_mut(UPLINK_EARLY)
        .ok_or_else(|| missing(UPLINK_EARLY))?
        .try_into()
        .map_err(|e: ProgramError| Error::new("find", UPLINK_EARLY, e))
}

pub fn missing(name: &str) -> Error {
    let cause = io::Error::new(io::ErrorKind::NotFound, "the object has no such program");
    Error::new("find", name, cause)
}

/// Puts our programs into every pinned link, atomically each. A link whose device
/// is gone is removed.
pub fn exchange(bpf: &mut Ebpf, pins: &Pins) -> Result<(), Error> {
    for (program, ifindex) in pins.pinned_links()? {
        let path = pins.link(&program, ifindex);
        // Another version's, whose work others of ours do by now.
        if bpf.program(&program).is_none() {
            remove(&path)?;
            continue;
        }
        let link =
            PinnedLink::from_pin(&path).map_err(|e| Error::new("open", path.display(), e))?;
        let result = if program == UPLINK_EARLY {
            exchange_xdp(xdp(bpf)?, link)
        } else {
            exchange_classifier(classifier(bpf, &program)?, link)
        };
        if let Err(cause) = result {
            if !is_defunct(&cause) {
                return Err(Error::new("exchange", path.display(), cause));
            }
            remove(&path)?;
        }
    }
    Ok(())
}

/// The kernel says of a link whose device has gone that it is severed.
fn is_defunct(cause: &ProgramError) -> bool {
    matches!(cause, ProgramError::SyscallError(call) if call.io_error.raw_os_error() == Some(libc::ENOLINK))
}

fn exchange_classifier(
    program: &mut SchedClassifier,
    link: PinnedLink,
) -> Result<(), ProgramError> {
    let link: SchedClassifierLink = FdLink::from(link).try_into().map_err(unusable)?;
    let id = program.attach_to_link(link)?;
    // Only the file in bpffs holds the link.
    program.take_link(id).map(drop)
}

fn exchange_xdp(program: &mut Xdp, link: PinnedLink) -> Result<(), ProgramError> {
    let link: XdpLink = FdLink::from(link).try_into().map_err(unusable)?;
    let id = program.attach_to_link(link)?;
    program.take_link(id).map(drop)
}

pub fn attach(
    bpf: &mut Ebpf,
    pins: &Pins,
    ifindex: u32,
    attachment: &Attachment,
) -> Result<(), Error> {
    // A device that changes its role keeps what both roles have.
    for (program, index) in pins.pinned_links()? {
        if index == ifindex && !programs(attachment.role).contains(&program.as_str()) {
            let path = pins.link(&program, ifindex);
            remove(&path)?;
        }
    }
    for &program in programs(attachment.role) {
        let path = pins.link(program, ifindex);
        if path.exists() {
            continue;
        }
        let device = &attachment.device;
        let link = if program == UPLINK_EARLY {
            match attach_xdp(xdp(bpf)?, ifindex) {
                Ok(link) => Ok(link),
                // It only spares work: the program after it decides without it too.
                Err(cause) => {
                    tracing::warn!(device, %cause, "no early drop on the uplink");
                    continue;
                }
            }
        } else {
            attach_classifier(classifier(bpf, program)?, device, side(program))
        };
        let failed = |cause: &dyn std::error::Error| Error::Kernel {
            deed: "attach",
            object: format!("{program} on {device}"),
            cause: cause.to_string(),
        };
        let link = link.map_err(|e| failed(&Error::new("attach", program, e)))?;
        link.pin(&path).map_err(|e| failed(&Error::new("pin", path.display(), e)))?;
    }
    Ok(())
}

fn attach_classifier(
    program: &mut SchedClassifier,
    device: &str,
    side: TcAttachType,
) -> Result<FdLink, ProgramError> {
    let options = TcAttachOptions::TcxOrder(LinkOrder::default());
    let id = program.attach_with_options(device, side, options)?;
    program.take_link(id)?.try_into().map_err(unusable)
}

fn attach_xdp(program: &mut Xdp, ifindex: u32) -> Result<FdLink, ProgramError> {
    // In the driver or not at all: with XDP in the stack (`xdpgeneric`) on a veth the
    // uplink's ingress program answered no ARP any more (Linux 6.18, November 2026).
    let id = program.attach_to_if_index(ifindex, XdpMode::Driver)?;
    program.take_link(id)?.try_into().map_err(unusable)
}

fn unusable(cause: LinkError) -> ProgramError {
    ProgramError::IOError(io::Error::other(cause))
}

/// Detaches at once: the same program may be attached again as soon as this returns,
/// and no packet meets it meanwhile.
fn remove(path: &Path) -> Result<(), Error> {
    match syscall::detach_link(path) {
        // The device is gone, or the link: then nothing is attached.
        Err(cause) if !matches!(cause.raw_os_error(), Some(libc::ENOLINK | libc::ENOENT)) => {
            return Err(Error::new("detach", path.display(), cause));
        }
        _ => {}
    }
    absent_is_fine(fs::remove_file(path), path)
}

pub fn detach(pins: &Pins, ifindex: u32, role: Role) -> Result<(), Error> {
    // The guard goes last.
    for program in programs(role).iter().rev() {
        let path = pins.link(program, ifindex);
        remove(&path)?;
    }
    Ok(())
}

/// Detaches whatever is pinned for devices that are not in `wanted`.
pub fn detach_others(pins: &Pins, wanted: &BTreeMap<u32, Attachment>) -> Result<(), Error> {
    for (program, ifindex) in pins.pinned_links()? {
        if !wanted.contains_key(&ifindex) {
            let path = pins.link(&program, ifindex);
            remove(&path)?;
        }
    }
    Ok(())
}

/// Devices that carry the programs of their role. One that was attached half is
/// attached again; one that is gone is forgotten.
pub fn attachments(pins: &Pins) -> Result<BTreeMap<u32, Attachment>, Error> {
    let attachments = pinned_attachments(pins)?;
    for (ifindex, role) in complete(pins)? {
        if !attachments.contains_key(&ifindex) {
            detach(pins, ifindex, role)?;
        }
    }
    Ok(attachments)
}

/// The same, without touching anything.
pub fn pinned_attachments(pins: &Pins) -> Result<BTreeMap<u32, Attachment>, Error> {
    let named = |(ifindex, role)| {
        let device = if_indextoname(ifindex).ok()?.to_string_lossy().into_owned();
        Some((ifindex, Attachment { device, role }))
    };
    Ok(complete(pins)?.into_iter().filter_map(named).collect())
}

/// Whatever carries the programs of a role, by what is pinned.
fn complete(pins: &Pins) -> Result<Vec<(u32, Role)>, Error> {
    let pinned = pins.pinned_links()?;
    let has = |program: &str, ifindex| pinned.iter().any(|(p, i)| p == program && *i == ifindex);
    let roles = [Role::Guest, Role::Punt, Role::UplinkEarly, Role::Uplink];
    // The ingress program is attached last.
    let role = |ifindex: u32| {
        roles.into_iter().find(|role| programs(*role).iter().all(|p| has(p, ifindex)))
    };
    let devices: BTreeSet<u32> = pinned.iter().map(|(_, ifindex)| *ifindex).collect();
    Ok(devices.into_iter().filter_map(|ifindex| Some((ifindex, role(ifindex)?))).collect())
}
