//! The system calls of the launcher that have no safe wrapper: attaching to a
//! tap, ignoring a signal, and closing what it was born with.

#![expect(unsafe_code, reason = "three system calls, each behind one safe function")]

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

nix::ioctl_write_int!(tun_set_interface, b'T', 202);

/// Opens the tap `name` that the dataplane made, with the header that carries
/// checksum and segmentation offloads (linux/if_tun.h).
///
/// TUNSETIFF would make a missing one; a guest on a tap without rules must not
/// be, so that is an error instead.
pub fn open_tap(name: &str) -> io::Result<OwnedFd> {
    nix::net::if_::if_nametoindex(name)
        .map_err(|e| io::Error::other(format!("no such device ({e})")))?;
    let tun = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: ifreq is plain data, for which all zeros is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let bytes = name.as_bytes();
    if bytes.len() >= request.ifr_name.len() {
        return Err(io::Error::other("the name is too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags =
        (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: TUNSETIFF takes the address of an ifreq; `request` lives beyond the
    // call and its name ends with NUL, because it began as zeros and is shorter.
    unsafe {
        tun_set_interface(tun.as_raw_fd(), &raw const request as nix::sys::ioctl::ioctl_param_type)
    }?;
    Ok(tun.into())
}

/// A write beyond the file-size limit shall be an error for QEMU, not its death.
/// An ignored signal stays ignored across exec.
pub fn ignore_file_size_signal() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: ignoring a signal installs no handler, so no code can run in one.
    unsafe { signal(Signal::SIGXFSZ, SigHandler::SigIgn) }?;
    Ok(())
}

/// Lets no descriptor that this process was born with live beyond the next exec:
/// QEMU must hold no pipe or socket of the agent's, nor of its parents.
pub fn close_inherited_on_exec() -> io::Result<()> {
    const FIRST: libc::c_uint = 3;
    // SAFETY: close_range(2) with CLOSE_RANGE_CLOEXEC sets a flag and closes
    // nothing now, so no descriptor that Rust owns becomes invalid.
    let result = unsafe {
        libc::syscall(libc::SYS_close_range, FIRST, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
