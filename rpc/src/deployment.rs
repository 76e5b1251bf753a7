//! Where one Hostplane on this host keeps its things.
//!
//! Several may run side by side (tests do), each with a name of its own; every
//! path, device and pin is derived from it, so that one never touches another's.

use std::path::{Path, PathBuf};

use crate::error::Error;

/// A network device's name has at most 15 bytes (`IFNAMSIZ`, linux/if.h); the
/// longest suffix that we add is seven.
pub const NAME_LENGTH_MAX: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Deployment {
    name: String,
    state_dir: PathBuf,
    run_dir: PathBuf,
}

impl Deployment {
    /// `name` is one to eight of `a-z`, `0-9`, and does not begin with a digit.
    pub fn new(
        name: &str,
        state_dir: impl Into<PathBuf>,
        run_dir: impl Into<PathBuf>,
    ) -> Result<Self, Error> {
        let lawful = !name.is_empty()
            && name.len() <= NAME_LENGTH_MAX
            && name.starts_with(|c: char| c.is_ascii_lowercase())
            && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        if !lawful {
            return Err(Error::refused(format!(
                "deployment name `{name}`: use one to {NAME_LENGTH_MAX} of a-z and 0-9, a letter first"
            )));
        }
        Ok(Self { name: name.to_owned(), state_dir: state_dir.into(), run_dir: run_dir.into() })
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// What must outlive a reboot: volumes, images, the store.
    pub fn state_dir(&self) -> &Path {
        &self.state_dir
    }

    /// Sockets and pid files; gone after a reboot.
    pub fn run_dir(&self) -> &Path {
        &self.run_dir
    }

    /// A daemon's own part of the state directory.
    pub fn state_of(&self, daemon: &str) -> PathBuf {
        self.state_dir.join(daemon)
    }

    /// A daemon's control socket.
    pub fn socket_of(&self, daemon: &str) -> PathBuf {
        self.run_dir.join(format!("{daemon}.sock"))
    }

    /// A daemon's log.
    pub fn log_of(&self, daemon: &str) -> PathBuf {
        self.run_dir.join("log").join(format!("{daemon}.log"))
    }

    /// The bpffs folder that holds the pinned programs, maps and links.
    pub fn bpf_dir(&self) -> PathBuf {
        Path::new("/sys/fs/bpf").join(format!("hostplane-{}", self.name))
    }

    /// The host's end of the uplink that `netctl up` makes for itself.
    pub fn own_uplink(&self) -> String {
        format!("{}-up", self.name)
    }

    /// The namespace behind that uplink, which plays the internet.
    pub fn internet_namespace(&self) -> String {
        format!("{}-internet", self.name)
    }

    /// The device by which the dataplane hears DHCP and metadata requests.
    pub fn punt_device(&self) -> String {
        format!("{}-punt", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_that_cannot_stand_in_a_device_name_is_refused() {
        for name in ["", "Nine", "ninechars", "1st", "a-b", "a/b"] {
            assert!(Deployment::new(name, "/s", "/r").is_err(), "{name}");
        }
        assert!(Deployment::new("hp", "/s", "/r").is_ok());
    }
}
