//! Network namespaces without a name: they are file descriptors of this process,
//! so nothing of them outlives it, in whatever way it ends.

use std::fs::File;
use std::os::fd::AsRawFd;

use anyhow::Context;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};

#[derive(Debug)]
pub struct Namespace(File);

impl Namespace {
    /// The one that the calling thread is in.
    pub fn current() -> anyhow::Result<Self> {
        File::open("/proc/thread-self/ns/net").map(Self).context("network namespace: open")
    }

    /// A new one; the calling thread stays where it is.
    pub fn create() -> anyhow::Result<Self> {
        let here = Self::current()?;
        unshare(CloneFlags::CLONE_NEWNET).context("network namespace: create")?;
        let new = Self::current()?;
        here.enter()?;
        Ok(new)
    }

    /// Moves the calling thread; programs that it starts are there too.
    pub fn enter(&self) -> anyhow::Result<()> {
        setns(&self.0, CloneFlags::CLONE_NEWNET).context("network namespace: enter")
    }

    /// Does `deed` in there, and comes back.
    pub fn within<T>(&self, deed: impl FnOnce() -> anyhow::Result<T>) -> anyhow::Result<T> {
        let here = Self::current()?;
        self.enter()?;
        let done = deed();
        here.enter()?;
        done
    }

    /// How `ip` finds it while this process lives.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.0.as_raw_fd())
    }
}

/// Gives this process mounts of its own, with a new bpffs for pins. They end with it.
pub fn own_mounts() -> anyhow::Result<()> {
    const NO: Option<&str> = None;
    unshare(CloneFlags::CLONE_NEWNS).context("mount namespace: create")?;
    mount(NO, "/", NO, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NO).context("mounts: keep apart")?;
    mount(Some("bpf"), "/sys/fs/bpf", Some("bpf"), MsFlags::empty(), NO).context("bpffs: mount")
}
