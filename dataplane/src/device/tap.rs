//! Tap devices through `/dev/net/tun` (Documentation/networking/tuntap.rst).
//!
//! The only `unsafe` of this crate's device code: three ioctls and their struct.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use super::Error;

const TUN_PATH: &str = "/dev/net/tun";

/// `struct ifreq`'s name, with its final zero (linux/if.h).
const IFNAMSIZ: usize = 16;

/// `struct ifreq` as `TUNSETIFF` reads it: the name, the flags, and the rest of the union.
#[repr(C)]
struct Request {
    name: [u8; IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<Request>() == size_of::<libc::ifreq>());

mod ioctl {
    // The kernel defines all three by `_IOW('T', n, int)`, whatever they point to.
    nix::ioctl_write_ptr_bad!(
        set_interface,
        nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
        super::Request
    );
    nix::ioctl_write_int_bad!(
        set_persistent,
        nix::request_code_write!(b'T', 203, size_of::<libc::c_int>())
    );
    nix::ioctl_write_int_bad!(
        set_owner,
        nix::request_code_write!(b'T', 204, size_of::<libc::c_int>())
    );
}

/// Makes a tap that stays, as QEMU opens one: single queue, no packet
/// information, with the virtio-net header; `owner_uid` may open it by name.
pub fn create(name: &str, owner_uid: u32) -> Result<(), Error> {
    let failed = |cause| Error::Tap { device: name.to_owned(), deed: "make", cause };
    let file = open(libc::O_RDWR).map_err(failed)?;
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    set_interface(&file, name, flags).map_err(failed)?;
    // SAFETY: the descriptor is open for the call, and the argument is an
    // integer that the kernel takes by value.
    unsafe { ioctl::set_owner(file.as_raw_fd(), owner_uid.cast_signed()) }
        .map_err(|e| failed(e.into()))?;
    set_persistent(&file).map_err(failed)
}

/// Opens the punt device for reading and writing frames, non-blocking; made
/// when it is not there, and kept when this process ends.
///
/// It has no virtio-net header, so the kernel completes checksums and cuts
/// superframes before it hands a frame over. Only one process may hold it.
pub fn open_punt(name: &str) -> Result<File, Error> {
    let failed = |cause| Error::Tap { device: name.to_owned(), deed: "open", cause };
    let file = open(libc::O_RDWR | libc::O_NONBLOCK).map_err(failed)?;
    set_interface(&file, name, libc::IFF_TAP | libc::IFF_NO_PI).map_err(failed)?;
    set_persistent(&file).map_err(failed)?;
    Ok(file)
}

fn open(flags: i32) -> io::Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags & libc::O_NONBLOCK)
        .open(TUN_PATH)
        .map_err(|e| io::Error::new(e.kind(), format!("{TUN_PATH}: {e}")))
}

fn set_interface(file: &File, name: &str, flags: i32) -> io::Result<()> {
    let mut request = Request { name: [0; IFNAMSIZ], flags: 0, rest: [0; 22] };
    if name.is_empty() || name.len() >= IFNAMSIZ || name.contains(['/', '%', '\0']) {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            format!("a device's name has 1 to {} bytes, none of them / or %", IFNAMSIZ - 1),
        ));
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    request.flags = u16::try_from(flags).map_err(io::Error::other)?;
    // SAFETY: the descriptor is open for the call, and `request` has the size
    // and layout of `struct ifreq` (asserted above) and outlives the call.
    unsafe { ioctl::set_interface(file.as_raw_fd(), &raw const request) }?;
    Ok(())
}

fn set_persistent(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for the call; the argument is taken by value.
    unsafe { ioctl::set_persistent(file.as_raw_fd(), 1) }?;
    Ok(())
}
