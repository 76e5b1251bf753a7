//! Who keeps the host: our daemon as a user runs it alone, or nftables.

use std::fmt::{self, Write as _};
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::Context;

use super::now;
use super::scene::{FLOODED, FLOODED_PORT, Instance, NEIGHBOUR, SPOKEN_PORT, Scene};
use crate::machine;
use crate::packet::namespace::Namespace;
use crate::packet::scene::{UPLINK, nft};
use crate::packet::world::{CLIENT, mac_text};
use crate::process;

const NAME: &str = "storm";
const PINS: &str = "/sys/fs/bpf/hostplane-storm";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keeper {
    Ours,
    Nftables,
}

impl fmt::Display for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ours => "hostplane",
            Self::Nftables => "nftables",
        })
    }
}

/// A host under its keeper.
pub struct Host<'a> {
    namespace: &'a Namespace,
    folder: tempfile::TempDir,
    daemon: Option<Child>,
}

impl<'a> Host<'a> {
    pub fn start(keeper: Keeper, scene: &'a Scene) -> anyhow::Result<Self> {
        match keeper {
            Keeper::Ours => Self::ours(&scene.host, &INSTANCES),
            Keeper::Nftables => {
                scene.host.within(|| nft(&ruleset()))?;
                Self::new(&scene.host)
            }
        }
    }

    fn new(namespace: &'a Namespace) -> anyhow::Result<Self> {
        let folder = tempfile::tempdir().context("folder for the host: make")?;
        Ok(Self { namespace, folder, daemon: None })
    }

    /// Ours, before those instances.
    pub fn ours(namespace: &'a Namespace, instances: &[&Instance]) -> anyhow::Result<Self> {
        let mut host = Self::new(namespace)?;
        std::fs::write(host.file(), toml(instances)).context("firewall.toml: write")?;
        host.begin()?;
        Ok(host)
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("firewall.toml")
    }

    /// Starts the daemon; milliseconds until it is ready.
    pub fn begin(&mut self) -> anyhow::Result<f64> {
        let mut command = self.dataplane("serve")?;
        command.arg(self.file());
        process::end_with_us(&mut command);
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))?;
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log);
        let begun = now();
        let mut daemon =
            self.namespace.within(|| command.spawn().context("dataplane serve: start"))?;
        let mut line = String::new();
        let said = daemon.stdout.take().context("dataplane serve: no output")?;
        BufReader::new(said).read_line(&mut line)?;
        let ready = begun.elapsed().as_secs_f64() * 1e3;
        self.daemon = Some(daemon);
        let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default();
        anyhow::ensure!(line == "ready\n", "dataplane serve: `{}` {}", line.trim(), log());
        Ok(ready)
    }

    fn dataplane(&self, deed: &str) -> anyhow::Result<Command> {
        let program = machine::own_program("dataplane")
            .context("dataplane: not beside this program: build it, or set HOSTPLANE_BIN_DIR")?;
        let mut command = Command::new(program);
        command.arg(deed);
        command.arg("--state-dir").arg(self.folder.path().join("state"));
        command.arg("--run-dir").arg(self.folder.path().join("run"));
        Ok(command)
    }

    /// kill -9.
    pub fn kill(&mut self) -> anyhow::Result<()> {
        let mut daemon = self.daemon.take().context("no daemon")?;
        daemon.kill()?;
        daemon.wait()?;
        Ok(())
    }

    /// What is pinned belongs to another layout from now on.
    pub fn estrange(&self, nth: usize) -> anyhow::Result<()> {
        let entries = std::fs::read_dir(PINS).with_context(|| format!("{PINS}: read"))?;
        let maps = entries
            .flatten()
            .find(|e| e.file_name().to_string_lossy().starts_with("maps-"))
            .with_context(|| format!("{PINS}: no maps"))?;
        let other = Path::new(PINS).join(format!("maps-{nth:016x}"));
        std::fs::rename(maps.path(), &other).context("maps: rename")
    }
}

impl Drop for Host<'_> {
    fn drop(&mut self) {
        if self.kill().is_ok()
            && let Ok(mut remove) = self.dataplane("remove")
        {
            remove.args(["--name", NAME]).stdout(Stdio::null());
            _ = self.namespace.within(|| process::output(&mut remove));
        }
    }
}

const INSTANCES: [&Instance; 2] = [&FLOODED, &NEIGHBOUR];

fn toml(instances: &[&Instance]) -> String {
    let bulk = SPOKEN_PORT + 1;
    let mut text = format!(
        "name = \"{NAME}\"\n\
         [uplink]\n\
         device = \"{UPLINK}\"\n\
         gateway = \"{CLIENT}\"\n\
         ranges = [\"203.0.113.0/24\"]\n\
         [group.open]\n\
         ingress = [\n\
           {{ protocol = \"tcp\", ports = {FLOODED_PORT}, from = \"0.0.0.0/0\" }},\n\
           {{ protocol = \"tcp\", ports = \"{SPOKEN_PORT}-{bulk}\", from = \"0.0.0.0/0\" }},\n\
           {{ protocol = \"udp\", ports = {SPOKEN_PORT}, from = \"0.0.0.0/0\" }},\n\
         ]\n"
    );
    for Instance { device, mac, address, elastic, .. } in instances {
        let mac = mac_text(*mac);
        _ = write!(
            text,
            "[interface.{device}]\n\
             device = \"{device}\"\n\
             mac = \"{mac}\"\n\
             address = \"{address}/24\"\n\
             groups = [\"open\"]\n\
             elastic = \"{elastic}\"\n"
        );
    }
    text
}

fn ruleset() -> String {
    let elements = |each: &dyn Fn(&Instance) -> String| INSTANCES.map(each).join(", ");
    let inward = elements(&|i| format!("{} : {}", i.elastic, i.address));
    let outward = elements(&|i| format!("{} : {}", i.address, i.elastic));
    let bulk = SPOKEN_PORT + 1;
    format!(
        "table ip hostplane {{
  map inward {{ type ipv4_addr : ipv4_addr; elements = {{ {inward} }} }}
  map outward {{ type ipv4_addr : ipv4_addr; elements = {{ {outward} }} }}
  chain arriving {{
    type nat hook prerouting priority dstnat; policy accept;
    iif {UPLINK} dnat to ip daddr map @inward
  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
    oif {UPLINK} snat to ip saddr map @outward
  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ct state vmap {{ established : accept, related : accept, invalid : drop }}
    iif != {UPLINK} accept
    tcp dport {{ {FLOODED_PORT}, {SPOKEN_PORT}-{bulk} }} accept
    udp dport {SPOKEN_PORT} accept
  }}
}}
"
    )
}
