//! The stock `aws` client from PyPI, signing with SigV4 over TCP.

use std::fs;
use std::net::Ipv4Addr;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, anyhow};
use rpc::agent::BuildImage;
use rpc::control::AccessKey;
use serde_json::Value;

use super::{Address, Instance, Operator};
use crate::deployment::{Deployment, ask};
use crate::program::{self, Ended};

/// Starting Python costs seconds while a guest boots beside it.
const CALL_BOUND: Duration = Duration::from_secs(90);

#[derive(Debug)]
pub struct Aws {
    program: PathBuf,
    endpoint: String,
    key: AccessKey,
    zone: String,
    agent: rpc::Client,
}

impl Aws {
    /// `program` is the path of an installed `aws`.
    pub fn new(program: &Path, deployment: &Deployment) -> anyhow::Result<Self> {
        let status = ask(deployment.client("control").control_status())?;
        Ok(Self {
            program: program.to_owned(),
            endpoint: deployment.endpoint(),
            key: deployment.access_key()?,
            zone: status.zone,
            agent: deployment.client("agent"),
        })
    }

    /// The variables that `netctl up` tells its user to export.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("AWS_ENDPOINT_URL", self.endpoint.clone()),
            ("AWS_ACCESS_KEY_ID", self.key.access_key_id.clone()),
            ("AWS_SECRET_ACCESS_KEY", self.key.secret_access_key.clone()),
            ("AWS_DEFAULT_REGION", self.key.region.clone()),
        ]
    }

    /// `aws ec2 <words>`, whatever it answers.
    pub fn run(&self, words: &[&str]) -> anyhow::Result<Ended> {
        let mut command = Command::new(&self.program);
        command.arg("ec2").args(words).args(["--output", "json"]);
        command.envs(self.environment());
        // The user's own configuration must not reach into the test.
        command.env("AWS_CONFIG_FILE", "/dev/null").env("AWS_SHARED_CREDENTIALS_FILE", "/dev/null");
        command.env("AWS_EC2_METADATA_DISABLED", "true").env("AWS_PAGER", "");
        program::run(&mut command, &[], CALL_BOUND)
    }

    /// The same, where anything but success is an error.
    pub fn call(&self, words: &[&str]) -> anyhow::Result<Value> {
        let text = self.run(words)?.success()?;
        if text.trim().is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_str(&text).with_context(|| format!("aws ec2 {}: {text}", words.join(" ")))
    }
}

fn text(value: &Value, pointer: &str) -> anyhow::Result<String> {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .map(str::to_owned)
        .ok_or_else(|| anyhow!("no {pointer} in {value}"))
}

fn address(value: &Value, pointer: &str) -> Option<Ipv4Addr> {
    value.pointer(pointer)?.as_str()?.parse().ok()
}

impl Operator for Aws {
    fn name(&self) -> &'static str {
        "aws"
    }

    fn build_image(&self, name: &str) -> anyhow::Result<String> {
        // Building is the host's own act; EC2's API begins at registering.
        ask(self.agent.build_image(&BuildImage { recipe: "tiny".into(), name: name.into() }))?;
        let register = || {
            self.call(&[
                "register-image",
                "--name",
                name,
                "--image-location",
                name,
                "--root-device-name",
                "/dev/sda1",
            ])
        };
        // The host tells control of a new image at its next report.
        let answer = program::eventually("register the image", Duration::from_secs(20), register)?;
        text(&answer, "/ImageId")
    }

    fn create_key(&self, name: &str, file: &Path) -> anyhow::Result<()> {
        let answer =
            self.call(&["create-key-pair", "--key-name", name, "--key-type", "ed25519"])?;
        fs::write(file, text(&answer, "/KeyMaterial")?)?;
        fs::set_permissions(file, fs::Permissions::from_mode(0o600))?;
        Ok(())
    }

    fn create_group(&self, name: &str, description: &str) -> anyhow::Result<String> {
        let answer = self.call(&[
            "create-security-group",
            "--group-name",
            name,
            "--description",
            description,
        ])?;
        text(&answer, "/GroupId")
    }

    fn authorize(&self, group: &str, protocol: &str, port: u16, cidr: &str) -> anyhow::Result<()> {
        let port = port.to_string();
        self.call(&[
            "authorize-security-group-ingress",
            "--group-id",
            group,
            "--protocol",
            protocol,
            "--port",
            &port,
            "--cidr",
            cidr,
        ])
        .map(drop)
    }

    fn authorize_group(
        &self,
        group: &str,
        protocol: &str,
        port: u16,
        source: &str,
    ) -> anyhow::Result<()> {
        let port = port.to_string();
        self.call(&[
            "authorize-security-group-ingress",
            "--group-id",
            group,
            "--protocol",
            protocol,
            "--port",
            &port,
            "--source-group",
            source,
        ])
        .map(drop)
    }

    fn revoke(&self, group: &str, protocol: &str, port: u16, cidr: &str) -> anyhow::Result<()> {
        let port = port.to_string();
        self.call(&[
            "revoke-security-group-ingress",
            "--group-id",
            group,
            "--protocol",
            protocol,
            "--port",
            &port,
            "--cidr",
            cidr,
        ])
        .map(drop)
    }

    fn run_instance(
        &self,
        image: &str,
        kind: &str,
        key: &str,
        group: &str,
    ) -> anyhow::Result<String> {
        let answer = self.call(&[
            "run-instances",
            "--image-id",
            image,
            "--instance-type",
            kind,
            "--key-name",
            key,
            "--security-group-ids",
            group,
            "--count",
            "1",
        ])?;
        text(&answer, "/Instances/0/InstanceId")
    }

    fn instance(&self, id: &str) -> anyhow::Result<Instance> {
        let answer = self.call(&["describe-instances", "--instance-ids", id])?;
        let found = answer
            .pointer("/Reservations/0/Instances/0")
            .ok_or_else(|| anyhow!("{id} is not described: {answer}"))?;
        Ok(Instance {
            id: text(found, "/InstanceId")?,
            state: text(found, "/State/Name")?,
            private_address: address(found, "/PrivateIpAddress"),
            public_address: address(found, "/PublicIpAddress"),
        })
    }

    fn stop(&self, id: &str) -> anyhow::Result<()> {
        self.call(&["stop-instances", "--instance-ids", id]).map(drop)
    }

    fn start(&self, id: &str) -> anyhow::Result<()> {
        self.call(&["start-instances", "--instance-ids", id]).map(drop)
    }

    fn reboot(&self, id: &str) -> anyhow::Result<()> {
        self.call(&["reboot-instances", "--instance-ids", id]).map(drop)
    }

    fn terminate(&self, id: &str) -> anyhow::Result<()> {
        self.call(&["terminate-instances", "--instance-ids", id]).map(drop)
    }

    fn console(&self, id: &str) -> anyhow::Result<String> {
        let answer = self.call(&["get-console-output", "--instance-id", id])?;
        text(&answer, "/Output")
    }

    fn allocate_address(&self) -> anyhow::Result<Address> {
        let answer = self.call(&["allocate-address", "--domain", "vpc"])?;
        let address =
            address(&answer, "/PublicIp").ok_or_else(|| anyhow!("no PublicIp in {answer}"))?;
        Ok(Address { allocation: text(&answer, "/AllocationId")?, address })
    }

    fn associate(&self, address: &Address, instance: &str) -> anyhow::Result<()> {
        self.call(&[
            "associate-address",
            "--allocation-id",
            &address.allocation,
            "--instance-id",
            instance,
        ])
        .map(drop)
    }

    fn release(&self, address: &Address) -> anyhow::Result<()> {
        self.call(&["release-address", "--allocation-id", &address.allocation]).map(drop)
    }

    fn create_volume(&self, size_gib: u32) -> anyhow::Result<String> {
        let size = size_gib.to_string();
        let answer =
            self.call(&["create-volume", "--size", &size, "--availability-zone", &self.zone])?;
        text(&answer, "/VolumeId")
    }

    fn grow_volume(&self, volume: &str, size_gib: u32) -> anyhow::Result<()> {
        let size = size_gib.to_string();
        self.call(&["modify-volume", "--volume-id", volume, "--size", &size]).map(drop)
    }

    fn volume_state(&self, volume: &str) -> anyhow::Result<String> {
        text(&self.call(&["describe-volumes", "--volume-ids", volume])?, "/Volumes/0/State")
    }

    fn attach(&self, volume: &str, instance: &str, device: &str) -> anyhow::Result<()> {
        self.call(&[
            "attach-volume",
            "--volume-id",
            volume,
            "--instance-id",
            instance,
            "--device",
            device,
        ])
        .map(drop)
    }

    fn detach(&self, volume: &str) -> anyhow::Result<()> {
        self.call(&["detach-volume", "--volume-id", volume]).map(drop)
    }

    fn delete_volume(&self, volume: &str) -> anyhow::Result<()> {
        self.call(&["delete-volume", "--volume-id", volume]).map(drop)
    }
}
