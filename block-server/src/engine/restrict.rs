//! What the ring may be asked for, and nothing else ever after: no opening of
//! files, no connecting, no commands to devices. A filter of system calls does
//! not see what goes through a ring, so the ring itself must know.

use std::io;

use io_uring::IoUring;
use io_uring::opcode;
use io_uring::register::Restriction;

/// `IORING_REGISTER_FILES_UPDATE` and its newer form with tags, of linux/io_uring.h.
const REGISTER_FILES_UPDATE: u8 = 6;
const REGISTER_FILES_UPDATE2: u8 = 14;

/// `IOSQE_FIXED_FILE`, `IOSQE_IO_LINK` and `IOSQE_BUFFER_SELECT`, of the same.
const FLAGS: u8 = 1 | 1 << 2 | 1 << 5;

/// The operations that `uring` asks for; a new one is to be named here too.
const OPERATIONS: [u8; 16] = [
    opcode::Nop::CODE,
    opcode::PollAdd::CODE,
    opcode::Readv::CODE,
    opcode::Writev::CODE,
    opcode::Accept::CODE,
    opcode::Recv::CODE,
    opcode::Send::CODE,
    opcode::SendMsg::CODE,
    opcode::SendZc::CODE,
    opcode::Read::CODE,
    opcode::ReadFixed::CODE,
    opcode::Write::CODE,
    opcode::WriteFixed::CODE,
    opcode::Fsync::CODE,
    opcode::Fallocate::CODE,
    opcode::AsyncCancel::CODE,
];

/// Restricts a ring that was made disabled, and enables it.
pub(super) fn enable(ring: &IoUring) -> io::Result<()> {
    let mut restrictions: Vec<Restriction> =
        OPERATIONS.iter().map(|operation| Restriction::sqe_op(*operation)).collect();
    restrictions.push(Restriction::sqe_flags_allowed(FLAGS));
    restrictions.push(Restriction::register_op(REGISTER_FILES_UPDATE));
    restrictions.push(Restriction::register_op(REGISTER_FILES_UPDATE2));
    ring.submitter().register_restrictions(&mut restrictions)?;
    ring.submitter().register_enable_rings()
}

#[cfg(test)]
mod tests {
    use io_uring::types::Fd;

    use super::*;

    #[test]
    fn a_restricted_ring_opens_nothing_and_connects_nowhere() {
        let Ok(mut ring) = IoUring::builder().setup_r_disabled().build(8) else {
            println!("SKIPPED a_restricted_ring_opens_nothing_and_connects_nowhere: no io_uring");
            return;
        };
        enable(&ring).unwrap();
        let path = c"/etc/hostname";
        let address = [0_u8; 16];
        for (entry, result) in [
            (opcode::OpenAt::new(Fd(libc::AT_FDCWD), path.as_ptr()).build(), -libc::EACCES),
            (opcode::Connect::new(Fd(1), address.as_ptr().cast(), 16).build(), -libc::EACCES),
            (opcode::Nop::new().build(), 0),
        ] {
            // SAFETY: the path and the address outlive the ring's use of them.
            unsafe { ring.submission().push(&entry) }.unwrap();
            ring.submit_and_wait(1).unwrap();
            assert_eq!(ring.completion().next().map(|c| c.result()), Some(result));
        }
        assert!(ring.submitter().register_eventfd(1).is_err());
    }
}
