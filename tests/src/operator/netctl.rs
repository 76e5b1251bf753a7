//! Our own `netctl`, over the control socket.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, anyhow};
use serde_json::Value;

use super::{Address, Instance, Operator};
use crate::deployment::Deployment;
use crate::program;

/// Building an image is the longest of its commands.
const CALL_BOUND: Duration = Duration::from_secs(300);

#[derive(Debug)]
pub struct Netctl {
    program: PathBuf,
    environment: Vec<(String, PathBuf)>,
}

impl Netctl {
    pub fn new(deployment: &Deployment) -> Self {
        let command = deployment.netctl([]);
        let environment = command
            .get_envs()
            .filter_map(|(name, value)| Some((name.to_string_lossy().into_owned(), value?.into())))
            .collect();
        Self { program: command.get_program().into(), environment }
    }

    fn run(&self, format: &str, words: &[&str]) -> anyhow::Result<String> {
        let mut command = Command::new(&self.program);
        command.args(["-o", format]).args(words);
        command.envs(self.environment.iter().map(|(name, value)| (name, value)));
        program::output(&mut command, CALL_BOUND)
    }

    fn order(&self, words: &[&str]) -> anyhow::Result<()> {
        self.run("json", words).map(drop)
    }

    /// The one id that the command prints.
    fn id(&self, words: &[&str]) -> anyhow::Result<String> {
        Ok(self.run("id", words)?.trim().to_owned())
    }

    fn object(&self, words: &[&str]) -> anyhow::Result<Value> {
        let text = self.run("json", words)?;
        serde_json::from_str(&text).with_context(|| format!("netctl {}: {text}", words.join(" ")))
    }
}

fn text(object: &Value, key: &str) -> anyhow::Result<String> {
    object[key].as_str().map(str::to_owned).ok_or_else(|| anyhow!("no {key} in {object}"))
}

fn address(object: &Value, key: &str) -> Option<Ipv4Addr> {
    object[key].as_str()?.parse().ok()
}

impl Operator for Netctl {
    fn name(&self) -> &'static str {
        "netctl"
    }

    fn build_image(&self, name: &str) -> anyhow::Result<String> {
        self.id(&["image", "build", "tiny", "--as", name])
    }

    fn create_key(&self, name: &str, file: &Path) -> anyhow::Result<()> {
        self.order(&["key", "create", name, "--file", &file.to_string_lossy()])
    }

    fn create_group(&self, name: &str, description: &str) -> anyhow::Result<String> {
        self.id(&["group", "create", name, "--description", description])
    }

    fn authorize(&self, group: &str, protocol: &str, port: u16, cidr: &str) -> anyhow::Result<()> {
        let port = port.to_string();
        self.order(&[
            "group",
            "authorize",
            group,
            "--protocol",
            protocol,
            "--port",
            &port,
            "--cidr",
            cidr,
        ])
    }

    fn authorize_group(
        &self,
        group: &str,
        protocol: &str,
        port: u16,
        source: &str,
    ) -> anyhow::Result<()> {
        let port = port.to_string();
        self.order(&[
            "group",
            "authorize",
            group,
            "--protocol",
            protocol,
            "--port",
            &port,
            "--source",
            source,
        ])
    }

    fn revoke(&self, group: &str, protocol: &str, port: u16, cidr: &str) -> anyhow::Result<()> {
        let port = port.to_string();
        self.order(&[
            "group",
            "revoke",
            group,
            "--protocol",
            protocol,
            "--port",
            &port,
            "--cidr",
            cidr,
        ])
    }

    fn run_instance(
        &self,
        image: &str,
        kind: &str,
        key: &str,
        group: &str,
    ) -> anyhow::Result<String> {
        self.id(&[
            "instance", "launch", "--image", image, "--type", kind, "--key", key, "--group", group,
        ])
    }

    fn instance(&self, id: &str) -> anyhow::Result<Instance> {
        let found = self.object(&["instance", "show", id])?;
        Ok(Instance {
            id: text(&found, "id")?,
            state: text(&found, "state")?,
            private_address: address(&found, "private_address"),
            public_address: address(&found, "public_address"),
        })
    }

    fn stop(&self, id: &str) -> anyhow::Result<()> {
        self.order(&["instance", "stop", id])
    }

    fn start(&self, id: &str) -> anyhow::Result<()> {
        self.order(&["instance", "start", id])
    }

    fn reboot(&self, id: &str) -> anyhow::Result<()> {
        self.order(&["instance", "reboot", id])
    }

    fn terminate(&self, id: &str) -> anyhow::Result<()> {
        self.order(&["instance", "terminate", id])
    }

    fn console(&self, id: &str) -> anyhow::Result<String> {
        self.run("table", &["instance", "console", id])
    }

    fn allocate_address(&self) -> anyhow::Result<Address> {
        let made = self.object(&["address", "allocate"])?;
        let address = address(&made, "address").ok_or_else(|| anyhow!("no address in {made}"))?;
        Ok(Address { allocation: text(&made, "id")?, address })
    }

    fn associate(&self, address: &Address, instance: &str) -> anyhow::Result<()> {
        self.order(&["address", "associate", &address.allocation, instance])
    }

    fn release(&self, address: &Address) -> anyhow::Result<()> {
        self.order(&["address", "release", &address.allocation])
    }

    fn create_volume(&self, size_gib: u32) -> anyhow::Result<String> {
        self.id(&["volume", "create", "--size", &size_gib.to_string()])
    }

    fn grow_volume(&self, volume: &str, size_gib: u32) -> anyhow::Result<()> {
        self.order(&["volume", "modify", volume, "--size", &size_gib.to_string(), "--wait"])
    }

    fn volume_state(&self, volume: &str) -> anyhow::Result<String> {
        text(&self.object(&["volume", "show", volume])?, "state")
    }

    fn attach(&self, volume: &str, instance: &str, device: &str) -> anyhow::Result<()> {
        self.order(&["volume", "attach", volume, instance, "--device", device])
    }

    fn detach(&self, volume: &str) -> anyhow::Result<()> {
        self.order(&["volume", "detach", volume])
    }

    fn delete_volume(&self, volume: &str) -> anyhow::Result<()> {
        self.order(&["volume", "delete", volume])
    }
}
