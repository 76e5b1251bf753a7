//! One writer a deployment: whoever changes its tables holds this lock.

use std::fs::{self, File};

use anyhow::Context as _;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use rpc::Deployment;

/// Held as long as the process lives; the kernel lets go of it on kill -9 too.
pub type Lock = Flock<File>;

/// Makes the folders that a deployment keeps its things in.
pub fn folders(deployment: &Deployment) -> anyhow::Result<()> {
    for folder in [deployment.run_dir(), &deployment.state_of("dataplane")] {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    }
    Ok(())
}

/// `None`: another process holds it.
pub fn take(deployment: &Deployment) -> anyhow::Result<Option<Lock>> {
    let path = deployment.run_dir().join("dataplane.lock");
    let file = File::create(&path).with_context(|| format!("open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, Errno::EWOULDBLOCK)) => Ok(None),
        Err((_, error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}
