//! Whoever gives the orders in a story. `./x demo` speaks through `netctl`, the
//! end-to-end tests through the stock `aws` client; the story is the same.

mod aws;
mod netctl;

use std::net::Ipv4Addr;
use std::path::Path;

pub use aws::Aws;
pub use netctl::Netctl;

/// What the story asks of an instance's description.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Instance {
    pub id: String,
    pub state: String,
    pub private_address: Option<Ipv4Addr>,
    pub public_address: Option<Ipv4Addr>,
}

/// An elastic address and the name of its allocation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub allocation: String,
    pub address: Ipv4Addr,
}

/// The orders of a story, in EC2's terms. Ids are plain text here, as they are
/// for a user who copies them from one command to the next.
pub trait Operator: Send {
    /// How this operator is called in the narration.
    fn name(&self) -> &'static str;
    /// Gives the id of the image that was registered.
    fn build_image(&self, name: &str) -> anyhow::Result<String>;
    /// Writes the private key to `file`.
    fn create_key(&self, name: &str, file: &Path) -> anyhow::Result<()>;
    fn create_group(&self, name: &str, description: &str) -> anyhow::Result<String>;
    fn authorize(&self, group: &str, protocol: &str, port: u16, cidr: &str) -> anyhow::Result<()>;
    fn authorize_group(
        &self,
        group: &str,
        protocol: &str,
        port: u16,
        source: &str,
    ) -> anyhow::Result<()>;
    fn revoke(&self, group: &str, protocol: &str, port: u16, cidr: &str) -> anyhow::Result<()>;
    fn run_instance(
        &self,
        image: &str,
        kind: &str,
        key: &str,
        group: &str,
    ) -> anyhow::Result<String>;
    fn instance(&self, id: &str) -> anyhow::Result<Instance>;
    fn stop(&self, id: &str) -> anyhow::Result<()>;
    fn start(&self, id: &str) -> anyhow::Result<()>;
    fn reboot(&self, id: &str) -> anyhow::Result<()>;
    fn terminate(&self, id: &str) -> anyhow::Result<()>;
    fn console(&self, id: &str) -> anyhow::Result<String>;
    fn allocate_address(&self) -> anyhow::Result<Address>;
    fn associate(&self, address: &Address, instance: &str) -> anyhow::Result<()>;
    fn release(&self, address: &Address) -> anyhow::Result<()>;
    fn create_volume(&self, size_gib: u32) -> anyhow::Result<String>;
    fn grow_volume(&self, volume: &str, size_gib: u32) -> anyhow::Result<()>;
    fn volume_state(&self, volume: &str) -> anyhow::Result<String>;
    fn attach(&self, volume: &str, instance: &str, device: &str) -> anyhow::Result<()>;
    fn detach(&self, volume: &str) -> anyhow::Result<()>;
    fn delete_volume(&self, volume: &str) -> anyhow::Result<()>;
}
