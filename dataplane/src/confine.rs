//! What the daemon gives up once its programs are loaded: every capability but two,
//! the way to new ones, and the system calls that a daemon of packets never makes.
//! Whoever finds a fault in what answers guests finds little more than packets.
//!
//! | kept | for |
//! |---|---|
//! | `CAP_NET_ADMIN` | taps, links of devices, tcx and XDP attachments |
//! | `CAP_BPF` | the maps that stand in bpffs |
//!
//! Loading with less than all (`CAP_PERFMON`) makes the verifier guard every access
//! against speculation, in code that runs for each packet; so it is done before.
//!
//! The filter names what is refused, and not what is allowed as the block server's
//! does: what answers guests grows, and a call that is forgotten would show only on
//! the day it is needed. Paths are not confined: a flow log's folder is told later.

use std::collections::BTreeMap;

use anyhow::Context as _;
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};

/// The capabilities that stay.
const KEPT: CapabilitySet = CapabilitySet::NET_ADMIN.union(CapabilitySet::BPF);

/// Starting programs, other processes' memory, mounts and namespaces, the kernel's own
/// code, clocks and keys, users, and the ring, which filters do not see through.
#[rustfmt::skip]
const REFUSED: &[libc::c_long] = &[
    libc::SYS_execve, libc::SYS_execveat,
    libc::SYS_ptrace, libc::SYS_process_vm_readv, libc::SYS_process_vm_writev,
    libc::SYS_pidfd_getfd, libc::SYS_kcmp,
    libc::SYS_mount, libc::SYS_umount2, libc::SYS_pivot_root, libc::SYS_chroot,
    libc::SYS_move_mount, libc::SYS_open_tree, libc::SYS_mount_setattr,
    libc::SYS_fsopen, libc::SYS_fsmount, libc::SYS_fsconfig, libc::SYS_fspick,
    libc::SYS_unshare, libc::SYS_setns, libc::SYS_open_by_handle_at,
    libc::SYS_init_module, libc::SYS_finit_module, libc::SYS_delete_module,
    libc::SYS_kexec_load, libc::SYS_reboot, libc::SYS_swapon, libc::SYS_swapoff,
    libc::SYS_acct, libc::SYS_quotactl, libc::SYS_perf_event_open, libc::SYS_userfaultfd,
    libc::SYS_settimeofday, libc::SYS_clock_settime, libc::SYS_adjtimex, libc::SYS_clock_adjtime,
    libc::SYS_sethostname, libc::SYS_setdomainname,
    libc::SYS_add_key, libc::SYS_request_key, libc::SYS_keyctl,
    libc::SYS_setuid, libc::SYS_setgid, libc::SYS_setreuid, libc::SYS_setregid,
    libc::SYS_setresuid, libc::SYS_setresgid, libc::SYS_setfsuid, libc::SYS_setfsgid,
    libc::SYS_setgroups, libc::SYS_mknodat, libc::SYS_personality, libc::SYS_syslog,
    libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register,
];

/// The older names of some of them.
#[cfg(target_arch = "x86_64")]
const REFUSED_OLD: &[libc::c_long] = &[
    libc::SYS_fork,
    libc::SYS_vfork,
    libc::SYS_mknod,
    libc::SYS_iopl,
    libc::SYS_ioperm,
    libc::SYS_modify_ldt,
    libc::SYS_kexec_file_load,
];
#[cfg(not(target_arch = "x86_64"))]
const REFUSED_OLD: &[libc::c_long] = &[];

/// Confines this thread and all that it starts; so it must be called before any is.
pub fn confine() -> anyhow::Result<()> {
    drop_capabilities().context("drop capabilities")?;
    refuse_calls().context("refuse system calls")?;
    tracing::info!("kept CAP_BPF and CAP_NET_ADMIN, and gave up all else");
    Ok(())
}

fn drop_capabilities() -> rustix::io::Result<()> {
    let kept = KEPT & rustix::thread::capabilities(None)?.permitted;
    set_no_new_privs(true)?;
    for capability in CapabilitySet::all().iter() {
        // Only the privileged may and need; an older kernel knows fewer of them. What is
        // kept goes from here too: nothing is started that could get it.
        let _ = remove_capability_from_bounding_set(capability);
    }
    let _ = clear_ambient_capability_set();
    set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )
}

fn refuse_calls() -> anyhow::Result<()> {
    let calls = REFUSED.iter().chain(REFUSED_OLD);
    let rules: BTreeMap<i64, _> = calls.map(|call| (*call, Vec::new())).collect();
    let refusal = SeccompAction::Errno(libc::EPERM as u32);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let program: BpfProgram =
        SeccompFilter::new(rules, SeccompAction::Allow, refusal, arch)?.try_into()?;
    Ok(seccompiler::apply_filter(&program)?)
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    fn refused<T>(result: std::io::Result<T>) -> bool {
        result.is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
    }

    #[test]
    fn who_is_confined_starts_mounts_enters_and_becomes_nothing() {
        let namespace = std::fs::File::open("/proc/self/ns/net").unwrap();
        // On a thread of its own, which is confined and nobody else.
        let tried = move || {
            confine().unwrap();
            let none = None::<&str>;
            let flags = nix::mount::MsFlags::empty();
            let kind = nix::sched::CloneFlags::CLONE_NEWNET;
            [
                refused(std::process::Command::new("/bin/true").spawn()),
                nix::mount::mount(Some("bpf"), "/mnt", Some("bpf"), flags, none)
                    == Err(nix::errno::Errno::EPERM),
                nix::sched::setns(namespace.as_fd(), kind) == Err(nix::errno::Errno::EPERM),
                nix::sched::unshare(kind) == Err(nix::errno::Errno::EPERM),
                nix::unistd::chroot("/") == Err(nix::errno::Errno::EPERM),
                (rustix::thread::capabilities(None).unwrap().permitted & !KEPT).is_empty(),
                // And it still does what it is there for.
                std::fs::read("/proc/self/status").is_ok(),
                std::net::UdpSocket::bind("127.0.0.1:0").is_ok(),
            ]
        };
        assert_eq!(std::thread::spawn(tried).join().unwrap(), [true; 8]);
    }
}
