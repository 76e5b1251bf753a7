//! What the process gives up once it knows what it is to serve: capabilities, the
//! file system but for its folders, TCP, and every system call that serving does
//! not need. A peer that finds a fault in us finds little.
//!
//! What the ring may do is beside this (`engine::restrict`): a filter of system
//! calls does not see what is asked of io_uring.
//!
//! A kernel that lacks one of them leaves the others, and the log says so.

mod calls;

use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, path_beneath_rules,
};
use rustix::process::{Resource, getrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs,
};

/// What is asked for; an older kernel gives the part that it knows.
const WANTED: ABI = ABI::V5;

/// What a process still needs.
pub enum Needs<'a> {
    /// Everything is open: only the unix sockets in these folders are removed.
    Serving { folders: Vec<&'a Path> },
    /// Files are made, removed and given to users in these folders, and a
    /// volume's source may be read from anywhere.
    Keeping { folders: Vec<&'a Path> },
}

/// Confines this thread and all that it starts; so it must be called before any
/// is. Says what holds, for the log.
pub fn confine(needs: &Needs<'_>) -> String {
    let parts = [
        ("few capabilities", drop_capabilities(needs).err().map(|e| e.to_string())),
        ("landlock", landlock(needs).err()),
        ("seccomp", calls::filter(needs).err().map(|e| e.to_string())),
    ];
    for (what, failure) in &parts {
        if let Some(failure) = failure {
            tracing::warn!("not confined by {what}: {failure}");
        }
    }
    let held: Vec<&str> = parts.iter().filter(|(_, f)| f.is_none()).map(|(w, _)| *w).collect();
    if held.is_empty() { "nothing".to_owned() } else { held.join(", ") }
}

fn drop_capabilities(needs: &Needs<'_>) -> rustix::io::Result<()> {
    let mut wanted = CapabilitySet::empty();
    if let Needs::Keeping { .. } = needs {
        // An export's socket is given to its user.
        wanted |= CapabilitySet::CHOWN;
    }
    if getrlimit(Resource::Memlock).current.is_some() {
        // Registered buffers are locked memory, and the limit could not be lifted.
        wanted |= CapabilitySet::IPC_LOCK;
    }
    let kept = wanted & rustix::thread::capabilities(None)?.permitted;
    set_no_new_privs(true)?;
    for capability in CapabilitySet::all().iter().filter(|c| !kept.contains(*c)) {
        // Only the privileged may and need; an older kernel knows fewer of them.
        let _ = remove_capability_from_bounding_set(capability);
    }
    let _ = clear_ambient_capability_set();
    set_capabilities(
        None,
        CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() },
    )
}

fn landlock(needs: &Needs<'_>) -> Result<(), String> {
    match to_folders(needs).map_err(|error| error.to_string())? {
        RulesetStatus::FullyEnforced => Ok(()),
        RulesetStatus::PartiallyEnforced => {
            tracing::info!("this kernel's landlock is older, and holds in part");
            Ok(())
        }
        RulesetStatus::NotEnforced => Err("this kernel has none".to_owned()),
    }
}

fn to_folders(needs: &Needs<'_>) -> Result<RulesetStatus, RulesetError> {
    let read: BitFlags<AccessFs> = AccessFs::ReadFile | AccessFs::ReadDir;
    let ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(WANTED))?
        .handle_access(AccessNet::from_all(WANTED))?
        .create()?;
    let ruleset = match needs {
        Needs::Serving { folders } => {
            ruleset.add_rules(path_beneath_rules(folders, AccessFs::RemoveFile))?
        }
        Needs::Keeping { folders } => ruleset
            .add_rules(path_beneath_rules(["/"], read))?
            .add_rules(path_beneath_rules(folders, AccessFs::from_all(WANTED)))?,
    };
    Ok(ruleset.restrict_self()?.ruleset)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<T>(result: std::io::Result<T>) -> bool {
        result.is_err_and(|e| e.kind() == std::io::ErrorKind::PermissionDenied)
    }

    /// On a thread of its own, which is confined and nobody else.
    fn confined<T: Send + 'static>(
        needs: impl FnOnce() -> Needs<'static> + Send + 'static,
        act: impl FnOnce() -> T + Send + 'static,
    ) -> (String, T) {
        std::thread::spawn(move || (confine(&needs()), act())).join().unwrap()
    }

    #[test]
    fn who_serves_opens_starts_and_calls_nothing_any_more() {
        let before = std::fs::File::open("/proc/self/exe").unwrap();
        let (held, done) = confined(
            || Needs::Serving { folders: Vec::new() },
            move || {
                let mut byte = [0];
                [
                    refused(std::fs::File::open("/etc/hostname")),
                    refused(std::fs::write("/tmp/confined", "x")),
                    refused(std::process::Command::new("/bin/true").spawn()),
                    refused(std::net::UdpSocket::bind("127.0.0.1:0")),
                    refused(std::net::TcpStream::connect("127.0.0.1:1")),
                    refused(std::os::unix::net::UnixStream::connect("/nowhere")),
                    CapabilitySet::IPC_LOCK
                        .contains(rustix::thread::capabilities(None).unwrap().permitted),
                    std::io::Read::read(&mut &before, &mut byte).is_ok(),
                ]
            },
        );
        assert!(held.contains("seccomp") && held.contains("few capabilities"), "{held}");
        assert_eq!(done, [true; 8]);
    }

    #[test]
    fn who_keeps_volumes_writes_in_its_folders_only() {
        let folder: &'static Path = Box::leak(tempfile::tempdir().unwrap().keep().into());
        let (held, done) = confined(
            || Needs::Keeping { folders: vec![folder] },
            || {
                [
                    std::fs::write(folder.join("own"), "x").is_ok(),
                    std::fs::read("/proc/self/status").is_ok(),
                    refused(std::process::Command::new("/bin/true").spawn()),
                    refused(std::net::UdpSocket::bind("127.0.0.1:0")),
                ]
            },
        );
        std::fs::remove_dir_all(folder).unwrap();
        assert!(held.contains("seccomp"), "{held}");
        assert_eq!(done, [true; 4]);
    }
}
