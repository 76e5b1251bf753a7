//! The namespace behind a deployment's uplink, which plays the internet.
//! Nothing sent here leaves the machine.

use std::fs::File;
use std::net::Ipv4Addr;
use std::process::Command;
use std::thread;

use anyhow::{Context, anyhow};
use nix::sched::{CloneFlags, setns};

/// A client address from which the story's security group allows SSH.
pub const FRIEND: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 10);
/// One from which it does not.
pub const STRANGER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The network of the first, for rules.
pub const FRIENDS: &str = "203.0.113.0/24";

#[derive(Debug, Clone)]
pub struct Internet {
    namespace: String,
}

impl Internet {
    pub fn new(namespace: impl Into<String>) -> Self {
        Self { namespace: namespace.into() }
    }

    /// A command that will run inside.
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace, program]);
        command
    }

    /// Runs `act` on a thread whose sockets are the namespace's.
    pub fn inside<T: Send + 'static>(
        &self,
        act: impl FnOnce() -> anyhow::Result<T> + Send + 'static,
    ) -> thread::JoinHandle<anyhow::Result<T>> {
        let path = format!("/run/netns/{}", self.namespace);
        thread::spawn(move || {
            let namespace = File::open(&path).with_context(|| format!("open {path}"))?;
            setns(namespace, CloneFlags::CLONE_NEWNET).with_context(|| format!("enter {path}"))?;
            act()
        })
    }
}

/// The result of a thread; a panic becomes an error.
pub fn join<T>(handle: thread::JoinHandle<anyhow::Result<T>>) -> anyhow::Result<T> {
    handle.join().map_err(|_| anyhow!("a thread of the test panicked"))?
}
