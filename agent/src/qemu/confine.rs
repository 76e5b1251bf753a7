//! From a plan to a running QEMU, in a process of its own: `agent confine PLAN`.
//!
//! The agent starts this program instead of QEMU. Still root, it opens what QEMU
//! may not reach by path, then gives up every privilege for good and becomes
//! QEMU by exec. So nothing unsafe runs between fork and exec, and QEMU keeps
//! the whole of `-sandbox` (dropping privileges by `-run-with user=` would not).
//!
//! ```text
//!   session of its own → lock (held until QEMU ends) → pid file → cgroup → files, sockets, taps
//!     → limits → no new privileges → user and group of the instance → exec QEMU
//! ```
//! What may never be true: two QEMUs for one instance. The lock is an open file
//! that QEMU inherits, so the kernel itself refuses the second, whatever the
//! agent believes.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::process::{Resource, Rlimit};
use serde::{Deserialize, Serialize};

use super::kernel_call;
use super::process::Identity;

/// The exit status that says "another QEMU holds this instance".
pub const EXIT_LOCKED: u8 = 75;

/// The most that QEMU may write to any file: its console log and its own log
/// are the only ones. The agent trims both long before; this bound holds while
/// the agent is away, so that a guest cannot fill the disk.
pub const FILE_BYTES_MAX: u64 = 8 << 20;

/// What to open, what to give up, what to run. In `arguments`, `@NAME@` stands
/// for the number of the file descriptor opened for NAME.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    pub uuid: String,
    pub lock: PathBuf,
    pub pid_file: PathBuf,
    pub uid: u32,
    /// Further groups, such as that of /dev/kvm.
    pub groups: Vec<u32>,
    /// `cgroup.procs` files to enter.
    pub cgroups: Vec<PathBuf>,
    pub files: Vec<OpenFile>,
    pub program: PathBuf,
    pub arguments: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFile {
    pub name: String,
    pub kind: FileKind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileKind {
    Read(PathBuf),
    Append(PathBuf),
    /// A unix socket that listens.
    Listen(PathBuf),
    /// An existing tap.
    Tap(String),
    /// A guest's memory, of so many bytes, for a QEMU that shares it with the block
    /// server. Made here, because QEMU may write no file of that size, and sealed,
    /// because whoever could shrink it could kill who reads it.
    Memory(u64),
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("another QEMU runs for this instance (it holds {})", .0.display())]
    Locked(PathBuf),
    #[error("{deed} {object}: {cause}")]
    Failed { deed: &'static str, object: String, cause: io::Error },
}

trait Doing<T> {
    fn doing(self, deed: &'static str, object: impl std::fmt::Display) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, deed: &'static str, object: impl std::fmt::Display) -> Result<T, Error> {
        self.map_err(|e| Error::Failed { deed, object: object.to_string(), cause: e.into() })
    }
}

/// Becomes QEMU; comes back only to say why not.
pub fn confine(plan: &Plan) -> Error {
    match prepare(plan) {
        Ok((mut command, _held)) => Error::Failed {
            deed: "run",
            object: plan.program.display().to_string(),
            cause: command.exec(),
        },
        Err(error) => error,
    }
}

/// Everything up to the exec. The descriptors must stay open until then.
fn prepare(plan: &Plan) -> Result<(Command, Vec<OwnedFd>), Error> {
    // A new session: no signal meant for the agent's terminal or group reaches QEMU.
    match rustix::process::setsid() {
        Ok(_) | Err(rustix::io::Errno::PERM) => {}
        Err(e) => return Err(e).doing("start a session for", &plan.uuid),
    }
    kernel_call::close_inherited_on_exec().doing("close", "inherited files")?;
    let mut held = vec![lock(&plan.lock)?];
    let identity = Identity::of_self(&plan.uuid).doing("read", "/proc/self/stat")?;
    identity.write(&plan.pid_file).doing("write", plan.pid_file.display())?;
    for procs in &plan.cgroups {
        // A controller that went away costs the limit, not the guest.
        if let Err(error) = fs::write(procs, identity.pid.to_string()) {
            eprintln!("agent confine: enter {}: {error}", procs.display());
        }
    }
    let mut arguments = plan.arguments.clone();
    for file in &plan.files {
        let fd = open(&file.kind)?;
        let (mark, number) = (format!("@{}@", file.name), fd.as_raw_fd().to_string());
        for argument in &mut arguments {
            *argument = argument.replace(&mark, &number);
        }
        held.push(fd);
    }
    for fd in &held {
        rustix::io::fcntl_setfd(fd.as_fd(), rustix::io::FdFlags::empty())
            .doing("pass on", "a file")?;
    }
    limit()?;
    drop_privileges(plan)?;
    let mut command = Command::new(&plan.program);
    command.args(arguments).env_clear().env("PATH", "/usr/bin:/bin").current_dir("/");
    Ok((command, held))
}

fn lock(path: &Path) -> Result<OwnedFd, Error> {
    let mut options = OpenOptions::new();
    options.create(true).truncate(false).write(true).mode(0o600);
    let file = options.open(path).doing("open", path.display())?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file.into()),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Error::Locked(path.to_owned())),
        Err(e) => Err(e).doing("lock", path.display()),
    }
}

fn open(kind: &FileKind) -> Result<OwnedFd, Error> {
    match kind {
        FileKind::Read(path) => File::open(path).map(Into::into).doing("open", path.display()),
        FileKind::Append(path) => {
            let mut options = OpenOptions::new();
            options.create(true).append(true).mode(0o600);
            options.open(path).map(Into::into).doing("open", path.display())
        }
        FileKind::Listen(path) => {
            match fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => {
                    return Err(e).doing("remove", path.display());
                }
                _ => {}
            }
            let listener = UnixListener::bind(path).doing("listen at", path.display())?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))
                .doing("set the mode of", path.display())?;
            Ok(listener.into())
        }
        FileKind::Tap(name) => kernel_call::open_tap(name).doing("open tap", name),
        FileKind::Memory(bytes) => memory(*bytes).doing("make", "the guest's memory"),
    }
}

fn memory(bytes: u64) -> rustix::io::Result<OwnedFd> {
    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
    let file = memfd_create("guest-memory", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&file, bytes)?;
    fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

fn limit() -> Result<(), Error> {
    kernel_call::ignore_file_size_signal().doing("ignore", "SIGXFSZ")?;
    let bound = |n: u64| Rlimit { current: Some(n), maximum: Some(n) };
    rustix::process::setrlimit(Resource::Fsize, bound(FILE_BYTES_MAX))
        .doing("limit", "file size")?;
    rustix::process::setrlimit(Resource::Core, bound(0)).doing("limit", "core size")?;
    Ok(())
}

fn drop_privileges(plan: &Plan) -> Result<(), Error> {
    use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o077));
    let (uid, gid) = (Uid::from_raw(plan.uid), Gid::from_raw(plan.uid));
    let groups: Vec<Gid> = plan.groups.iter().copied().map(Gid::from_raw).collect();
    setgroups(&groups).doing("set the groups of", plan.uid)?;
    setresgid(gid, gid, gid).doing("become group", gid)?;
    setresuid(uid, uid, uid).doing("become user", uid)?;
    rustix::thread::set_no_new_privs(true).doing("renounce privileges of", plan.uid)?;
    // Only we could have got this wrong, and nothing may run if we did.
    assert!(setresuid(Uid::from_raw(0), Uid::from_raw(0), Uid::from_raw(0)).is_err());
    Ok(())
}
