//! The shell around the ring of events: one thread that reads it and tells
//! everyone who listens. It sleeps while the programs tell nothing.

use std::io;
use std::os::fd::AsFd as _;
use std::sync::{Arc, RwLock};

use aya::maps::{MapData, RingBuf};
use ebpf::event::Event;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::time::{ClockId, clock_gettime};
use rpc::dataplane::Observed;
use tokio::sync::broadcast;

use super::Directory;

/// Lines that wait for a listener that is slow; then it is told how many it missed.
const LINES_MAX: usize = 8192;

/// Events a second that each CPU tells.
pub const EVENTS_A_SECOND_MAX: u32 = 2000;

/// The thread's handle. The thread lives as long as the process.
#[derive(Clone)]
pub struct ObserveThread {
    lines: broadcast::Sender<Observed>,
    directory: Arc<RwLock<Directory>>,
}

impl ObserveThread {
    pub fn start(ring: RingBuf<MapData>) -> io::Result<Self> {
        let lines = broadcast::Sender::new(LINES_MAX);
        let directory = Arc::new(RwLock::new(Directory::default()));
        let this = Self { lines, directory };
        let shell = this.clone();
        std::thread::Builder::new().name("observe".into()).spawn(move || shell.run(ring))?;
        Ok(this)
    }

    /// Who is who from now on.
    pub fn know(&self, directory: Directory) {
        *self.directory.write().unwrap_or_else(|poisoned| poisoned.into_inner()) = directory;
    }

    pub fn listen(&self) -> broadcast::Receiver<Observed> {
        self.lines.subscribe()
    }

    /// Whether anybody listens.
    pub fn heard(&self) -> bool {
        self.lines.receiver_count() > 0
    }

    pub fn left_out(&self, count: u64) {
        // Without a listener there is nobody to tell.
        _ = self.lines.send(Observed::LeftOut(count));
    }

    fn run(&self, mut ring: RingBuf<MapData>) {
        loop {
            let mut fds = [PollFd::new(ring.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, PollTimeout::NONE) {
                Ok(_) | Err(nix::errno::Errno::EINTR) => {}
                Err(error) => {
                    tracing::error!(%error, "events: wait: nothing is observed any more");
                    return;
                }
            }
            let directory = self.directory.read().unwrap_or_else(|p| p.into_inner()).clone();
            let boot_ms = boot_ms();
            while let Some(bytes) = ring.next() {
                if let Ok(event) = bytemuck::try_pod_read_unaligned::<Event>(&bytes) {
                    _ = self.lines.send(Observed::Seen(directory.describe(&event, boot_ms)));
                }
            }
        }
    }
}

/// When the monotonic clock began, since 1970.
pub fn boot_ms() -> u64 {
    let ms = |clock| clock_gettime(clock).map_or(0, |t| std::time::Duration::from(t).as_millis());
    let now = ms(ClockId::CLOCK_REALTIME).saturating_sub(ms(ClockId::CLOCK_MONOTONIC));
    u64::try_from(now).unwrap_or(0)
}
