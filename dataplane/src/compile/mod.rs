//! From the desired state and what the host says of its devices to tables.
//!
//! Pure. Called by `apply` for every new desired state, by `why`, and by tests.

use std::collections::BTreeMap;

use model::Mac;
use rpc::dataplane::Desired;

/// A network device as the host has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceFact {
    pub ifindex: u32,
    pub mac: Mac,
}

/// What `compile` needs to know of the host: every device that `Desired` names,
/// and the punt device's name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Devices {
    pub by_name: BTreeMap<String, DeviceFact>,
    /// Name of the punt device (`Deployment::punt_device`), also in `by_name`.
    pub punt: Option<String>,
}

/// What the programs decide by, all of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tables {}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("interface {interface}: compile: device `{device}` is not on this host")]
    UnknownDevice { interface: String, device: String },
}

/// `loaded` is what the kernel has now: what stays keeps its place there.
pub fn compile(desired: &Desired, devices: &Devices, loaded: &Tables) -> Result<Tables, Error> {
    let _ = (desired, devices, loaded);
    Ok(Tables {})
}
