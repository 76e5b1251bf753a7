//! What the thread of held fragments has of the loaded object: their ring, and programs to run.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};

use aya::Ebpf;
use aya::maps::{MapData, RingBuf};
use ebpf::{ASK_MARK, Reason};

use super::announce::carried;
use super::links::{REENTER, TAP_INGRESS, UPLINK_INGRESS};
use super::syscall::test_run;
use super::{Error, watch, why};
use crate::pieces::Held;

pub struct Holder {
    pub ring: RingBuf<MapData>,
    tap: OwnedFd,
    uplink: OwnedFd,
    reenter: OwnedFd,
}

impl Holder {
    pub fn open(bpf: &mut Ebpf) -> Result<Self, Error> {
        let ring = watch::ring(bpf, "HELD_RING")?;
        let program = |name| {
            let fd =
                why::classifier(bpf, name)?.fd().map_err(|e| Error::new("look at", name, e))?;
            fd.as_fd().try_clone_to_owned().map_err(|e| Error::new("keep", name, e))
        };
        Ok(Self {
            tap: program(TAP_INGRESS)?,
            uplink: program(UPLINK_INGRESS)?,
            reenter: program(REENTER)?,
            ring,
        })
    }

    /// Whether the fragment would be dropped for want of its first one, were it to come now.
    pub fn is_lost(&self, held: &Held, from_uplink: bool) -> io::Result<bool> {
        let program = if from_uplink { &self.uplink } else { &self.tap };
        let mut context = why::context(held.ifindex, ASK_MARK);
        test_run(program.as_fd(), &held.frame, &mut context)?;
        Ok(why::reason(&context) == Some(Reason::FragmentLost))
    }

    /// Lets it in by its device.
    pub fn reenter(&self, held: &Held) -> io::Result<()> {
        let mut context = why::context(held.ifindex, 0);
        carried(test_run(self.reenter.as_fd(), &held.frame, &mut context)?)
    }
}
