//! The system calls that serving needs. Every other is answered EPERM: a fault in
//! a library that asks for something new is an error, and no dead server.

use std::collections::BTreeMap;

use seccompiler::{
    BpfProgram, Error, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::Needs;

/// Threads, memory, time, sockets that are open, files that are open, the ring.
#[rustfmt::skip]
const SERVING: &[libc::c_long] = &[
    libc::SYS_read, libc::SYS_write, libc::SYS_readv, libc::SYS_writev,
    libc::SYS_pread64, libc::SYS_pwrite64, libc::SYS_preadv2, libc::SYS_pwritev2,
    libc::SYS_preadv, libc::SYS_pwritev,
    // The record of what is in flight, for a guest to keep.
    libc::SYS_memfd_create, libc::SYS_ftruncate,
    // Which kind a descriptor is that a hypervisor sent.
    libc::SYS_readlinkat,
    // Locks that a predecessor gives up.
    libc::SYS_flock,
    libc::SYS_lseek, libc::SYS_fdatasync, libc::SYS_fsync, libc::SYS_fallocate,
    libc::SYS_close, libc::SYS_fstat, libc::SYS_statx, libc::SYS_newfstatat,
    libc::SYS_fcntl, libc::SYS_dup, libc::SYS_dup3, libc::SYS_ioctl,
    libc::SYS_unlinkat, libc::SYS_eventfd2, libc::SYS_pipe2,
    libc::SYS_ppoll, libc::SYS_epoll_create1, libc::SYS_epoll_ctl, libc::SYS_epoll_pwait,
    libc::SYS_accept, libc::SYS_accept4, libc::SYS_recvfrom, libc::SYS_recvmsg,
    libc::SYS_sendto, libc::SYS_sendmsg, libc::SYS_shutdown, libc::SYS_socketpair,
    libc::SYS_getsockopt, libc::SYS_setsockopt, libc::SYS_getsockname, libc::SYS_getpeername,
    libc::SYS_io_uring_setup, libc::SYS_io_uring_enter, libc::SYS_io_uring_register,
    libc::SYS_mmap, libc::SYS_munmap, libc::SYS_mremap, libc::SYS_mprotect,
    libc::SYS_madvise, libc::SYS_brk, libc::SYS_futex, libc::SYS_membarrier,
    libc::SYS_clone, libc::SYS_clone3, libc::SYS_set_robust_list, libc::SYS_set_tid_address,
    libc::SYS_rseq, libc::SYS_exit, libc::SYS_exit_group, libc::SYS_gettid, libc::SYS_getpid,
    libc::SYS_tgkill, libc::SYS_prctl, libc::SYS_sched_yield, libc::SYS_sched_getaffinity,
    libc::SYS_rt_sigaction, libc::SYS_rt_sigprocmask, libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack, libc::SYS_restart_syscall, libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep, libc::SYS_clock_gettime, libc::SYS_getrandom,
    libc::SYS_getuid, libc::SYS_geteuid, libc::SYS_getgid, libc::SYS_getegid,
    libc::SYS_prlimit64, libc::SYS_pidfd_open, libc::SYS_capget, libc::SYS_uname,
];

/// The older names of some of them.
#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const SERVING_OLD: &[libc::c_long] = &[
    libc::SYS_poll, libc::SYS_epoll_wait, libc::SYS_readlink, libc::SYS_unlink, libc::SYS_pipe, libc::SYS_dup2,
    libc::SYS_arch_prctl, libc::SYS_stat, libc::SYS_lstat,
];
#[cfg(not(target_arch = "x86_64"))]
const SERVING_OLD: &[libc::c_long] = &[];

/// Files and folders by their names, and sockets at them.
#[rustfmt::skip]
const KEEPING: &[libc::c_long] = &[
    libc::SYS_openat, libc::SYS_openat2, libc::SYS_getdents64, libc::SYS_mkdirat,
    libc::SYS_renameat, libc::SYS_renameat2, libc::SYS_faccessat,
    libc::SYS_faccessat2, libc::SYS_fchmod, libc::SYS_fchmodat, libc::SYS_fchown,
    libc::SYS_fchownat, libc::SYS_getcwd,
    libc::SYS_copy_file_range, libc::SYS_sendfile, libc::SYS_linkat, libc::SYS_statfs,
    libc::SYS_fstatfs, libc::SYS_fadvise64, libc::SYS_sync_file_range, libc::SYS_utimensat,
    libc::SYS_bind, libc::SYS_listen,
];

#[cfg(target_arch = "x86_64")]
#[rustfmt::skip]
const KEEPING_OLD: &[libc::c_long] = &[
    libc::SYS_open, libc::SYS_mkdir, libc::SYS_rmdir, libc::SYS_rename,
    libc::SYS_access, libc::SYS_chmod, libc::SYS_chown, libc::SYS_lchown, libc::SYS_link,
];
#[cfg(not(target_arch = "x86_64"))]
const KEEPING_OLD: &[libc::c_long] = &[];

/// Of this thread and of those that it starts.
pub(super) fn filter(needs: &Needs<'_>) -> Result<(), Error> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut calls: Vec<libc::c_long> = [SERVING, SERVING_OLD].concat();
    if let Needs::Keeping { .. } = needs {
        calls.extend([KEEPING, KEEPING_OLD].concat());
        let domain = libc::AF_UNIX as u64;
        let unix = SeccompCondition::new(0, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, domain)?;
        rules.insert(libc::SYS_socket, vec![SeccompRule::new(vec![unix])?]);
    }
    rules.extend(calls.into_iter().map(|call| (call, Vec::new())));
    let refusal = SeccompAction::Errno(libc::EPERM as u32);
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    let program: BpfProgram =
        SeccompFilter::new(rules, refusal, SeccompAction::Allow, arch)?.try_into()?;
    seccompiler::apply_filter(&program)
}
