//! A guest, seen from the internet over SSH.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::ensure;

use crate::internet::Internet;
use crate::program;

/// A guest emulated instruction by instruction answers slowly while others boot.
pub const SSH_BOUND: Duration = Duration::from_secs(60);

#[derive(Debug, Clone)]
pub struct Guest {
    internet: Internet,
    pub address: Ipv4Addr,
    from: Ipv4Addr,
    key: PathBuf,
}

impl Guest {
    /// The guest at `address`, spoken to from the client address `from`.
    pub fn new(internet: &Internet, address: Ipv4Addr, from: Ipv4Addr, key: &Path) -> Self {
        Self { internet: internet.clone(), address, from, key: key.to_owned() }
    }

    /// Runs a shell script in the guest; an exit status other than 0 is an error.
    pub fn sh(&self, script: &str) -> anyhow::Result<String> {
        self.sh_within(script, SSH_BOUND)
    }

    pub fn sh_within(&self, script: &str, bound: Duration) -> anyhow::Result<String> {
        let mut ssh = self.internet.command("ssh");
        ssh.arg("-i").arg(&self.key);
        ssh.args(["-b", &self.from.to_string()]);
        // The guest's host key is new at each boot of a new instance.
        ssh.args(["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null"]);
        ssh.args(["-o", "BatchMode=yes", "-o", "LogLevel=ERROR", "-o", "ConnectTimeout=10"]);
        ssh.args(["-o", "IdentitiesOnly=yes", "-F", "/dev/null"]);
        ssh.arg(format!("root@{}", self.address)).arg(script);
        Ok(program::output(&mut ssh, bound)?.trim_end().to_owned())
    }

    /// Asks the metadata service as a user's script would, by busybox' `nc`.
    pub fn imds(&self, request: &str) -> anyhow::Result<String> {
        self.sh(&format!("printf '{request}' | nc -w 5 169.254.169.254 80"))
    }

    /// The answer, head and all, to one who has a token.
    pub fn metadata(&self, path: &str) -> anyhow::Result<String> {
        let answer = self.imds(
            "PUT /latest/api/token HTTP/1.0\\r\\nHost: x\\r\\n\
             X-aws-ec2-metadata-token-ttl-seconds: 60\\r\\n\\r\\n",
        )?;
        ensure!(answer.contains(" 200 "), "the token's answer: {answer}");
        let token = answer.lines().last().unwrap_or_default().trim().to_owned();
        self.imds(&format!(
            "GET /latest/meta-data/{path} HTTP/1.0\\r\\nHost: x\\r\\n\
             X-aws-ec2-metadata-token: {token}\\r\\n\\r\\n"
        ))
    }

    /// Starts a shell script in the guest that goes on when we have left.
    pub fn background(&self, script: &str) -> anyhow::Result<()> {
        self.sh(&format!("setsid sh -c '{script}' >/dev/null 2>&1 </dev/null &")).map(drop)
    }

    /// Waits until the guest lets us in.
    pub fn await_ssh(&self, bound: Duration) -> anyhow::Result<()> {
        program::eventually(&format!("SSH to {}", self.address), bound, || {
            self.sh_within("true", Duration::from_secs(20)).map(drop)
        })
    }

    /// The block device whose serial is that of `volume`, once the guest sees it.
    pub fn await_disk(&self, volume: &str) -> anyhow::Result<String> {
        let serial = volume.replace('-', "");
        let script = format!(
            "for d in /sys/block/*; do [ \"$(cat $d/serial 2>/dev/null)\" = {serial} ] && echo /dev/${{d##*/}} && exit; done; exit 1"
        );
        program::eventually(&format!("a disk with serial {serial} in the guest"), SSH_BOUND, || {
            self.sh(&script)
        })
    }

    /// Waits until no device with the serial of `volume` is left.
    pub fn await_no_disk(&self, volume: &str) -> anyhow::Result<()> {
        let serial = volume.replace('-', "");
        let script = format!("! grep -q {serial} /sys/block/*/serial");
        program::eventually(
            &format!("no disk with serial {serial} in the guest"),
            SSH_BOUND,
            || self.sh(&script).map(drop),
        )
    }
}
