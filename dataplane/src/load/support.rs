//! Whether this kernel has what the programs hang on: asked of it, not read off its
//! version, for distributions carry features back and leave others out.

use super::syscall;

/// What `BPF_PROG_QUERY` says when asked which programs are attached by tcx.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Known,
    /// The error's number.
    Refused(i32),
}

/// Why the programs cannot run here, and what to do; `None` where they can.
///
/// A kernel without tcx says EINVAL of an attachment that it has never heard of, one
/// without eBPF ENOSYS. What else goes wrong (EPERM for whoever may not ask) says
/// nothing of tcx, and what comes next will fail with a reason of its own.
pub fn refusal(answer: Answer, release: &str) -> Option<String> {
    const DO: &str = "boot Linux 6.6 or newer (Debian 12: the package linux-image-amd64 of \
                      bookworm-backports; Ubuntu 22.04: linux-generic-hwe-22.04)";
    match answer {
        Answer::Refused(libc::EINVAL) => Some(format!(
            "kernel {release}: it does not know tcx, which came with Linux 6.6 and is part of it \
             where CONFIG_NET_XGRESS and CONFIG_BPF_SYSCALL are set; nothing was changed. Now: {DO}"
        )),
        Answer::Refused(libc::ENOSYS) => Some(format!(
            "kernel {release}: it has no bpf system call (CONFIG_BPF_SYSCALL), or a sandbox hides \
             it; nothing was changed. Now: leave the sandbox, or {DO}"
        )),
        Answer::Known | Answer::Refused(_) => None,
    }
}

/// Refuses a kernel that lacks what is needed, before anything is made.
pub fn check() -> Result<(), super::Error> {
    let answer = match syscall::query_tcx(LOOPBACK) {
        Ok(()) => Answer::Known,
        Err(error) => Answer::Refused(error.raw_os_error().unwrap_or(0)),
    };
    let release = nix::sys::utsname::uname()
        .map_or_else(|_| "?".to_owned(), |u| u.release().to_string_lossy().into_owned());
    refusal(answer, &release).map_or(Ok(()), |why| Err(super::Error::Unsupported(why)))
}

/// The first device of every network namespace.
const LOOPBACK: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_old_kernel_is_told_by_what_it_says_and_named_with_what_to_do() {
        let said = refusal(Answer::Refused(libc::EINVAL), "6.1.0-25-amd64").unwrap();
        for part in ["6.1.0-25-amd64", "tcx", "Linux 6.6", "backports"] {
            assert!(said.contains(part), "{said}");
        }
        let said = refusal(Answer::Refused(libc::ENOSYS), "6.8.0").unwrap();
        assert!(said.contains("no bpf system call"), "{said}");
    }

    #[test]
    fn a_kernel_that_knows_tcx_serves_whatever_its_number_is() {
        assert_eq!(refusal(Answer::Known, "5.14.0-carried-back"), None);
        // No right to ask, or no such device: not a word about tcx.
        assert_eq!(refusal(Answer::Refused(libc::EPERM), "6.6"), None);
        assert_eq!(refusal(Answer::Refused(libc::ENODEV), "6.6"), None);
    }
}
