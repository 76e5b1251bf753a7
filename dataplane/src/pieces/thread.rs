//! The shell around [`super::Pieces`]: one thread that reads the ring of held fragments, asks
//! the loaded programs about them, and lets them in again. It sleeps while none is held.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use ebpf::held::HeldHead;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};

use super::{Due, Held, Pieces};
use crate::load::Holder;

/// The thread's handle. The thread lives as long as the process.
pub struct PiecesThread {
    uplink: Arc<AtomicU32>,
}

impl PiecesThread {
    pub fn start(holder: Holder) -> io::Result<Self> {
        let uplink = Arc::new(AtomicU32::new(0));
        let shell = Shell { holder, uplink: uplink.clone(), pieces: Pieces::default() };
        std::thread::Builder::new().name("pieces".into()).spawn(move || shell.run())?;
        Ok(Self { uplink })
    }

    /// Which device is the uplink from now on; 0: none.
    pub fn know(&self, uplink: u32) {
        self.uplink.store(uplink, Ordering::Relaxed);
    }
}

struct Shell {
    holder: Holder,
    uplink: Arc<AtomicU32>,
    pieces: Pieces,
}

impl Shell {
    fn run(mut self) {
        loop {
            if let Err(error) = self.wait() {
                tracing::error!(%error, "fragments: wait: those that overtake their first are lost");
                return;
            }
            let now = now();
            while let Some(held) = self.holder.ring.next().map(|bytes| read(&bytes)) {
                if let Some(Err(late)) = held.map(|held| self.pieces.keep(held, now)) {
                    self.let_in(&late);
                }
            }
            while let Some(due) = self.pieces.due(now) {
                match due {
                    Due::Late(held) => self.let_in(&held),
                    Due::Ask(ask) if self.is_lost(&ask.held) => {
                        if let Err(late) = self.pieces.put(ask, now) {
                            self.let_in(&late);
                        }
                    }
                    Due::Ask(ask) => self.let_in(&ask.held),
                }
            }
        }
    }

    /// Until a fragment comes, or one that waits is to be looked at.
    fn wait(&self) -> io::Result<()> {
        let timeout = match self.pieces.next() {
            None => PollTimeout::NONE,
            Some(at) => {
                let left = at.saturating_sub(now()).as_micros().div_ceil(1000);
                PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
            }
        };
        let mut fds = [PollFd::new(self.holder.ring.as_fd(), PollFlags::POLLIN)];
        match poll(&mut fds, timeout) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// What cannot be asked about is let in: the program drops it if it has to.
    fn is_lost(&self, held: &Held) -> bool {
        let from_uplink = held.ifindex == self.uplink.load(Ordering::Relaxed);
        self.holder.is_lost(held, from_uplink).unwrap_or(false)
    }

    /// A device that is gone has nobody who waits.
    fn let_in(&self, held: &Held) {
        if let Err(error) = self.holder.reenter(held) {
            tracing::debug!(%error, ifindex = held.ifindex, "a held fragment was not let in");
        }
    }
}

fn read(bytes: &[u8]) -> Option<Held> {
    let (head, frame) = bytes.split_at_checked(size_of::<HeldHead>())?;
    let HeldHead { ifindex, slot } = bytemuck::try_pod_read_unaligned(head).ok()?;
    Some(Held { ifindex, slot, frame: frame.to_vec() })
}

fn now() -> Duration {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(Duration::ZERO, Duration::from)
}
