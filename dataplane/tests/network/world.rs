//! One host with its uplink, an internet behind it, and guests on veths.
//!
//! ```text
//!  internet namespace          host namespace                     guest namespaces
//!  eth0 198.51.100.1/24 ─veth─ NAME-up   NAMEg1 ─veth─ eth0, as DHCP or the test sets it
//!                                        NAMEg2 ─veth─ eth0
//!                              the daemon, NAME-punt
//! ```

use std::io::{BufRead as _, BufReader};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::Instant;

use model::{
    GroupId, InterfaceId, Mac, Peer, PortRange, Protocol, Rule, RuleId, SecurityGroup, VpcId,
};
use rpc::Client;
use rpc::dataplane::{
    Applied, Desired, Device, Dhcp, Interface, Question, Status, Uplink, Verdict,
};

pub use sim::skip;

pub const INTERNET: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 1);

#[expect(clippy::disallowed_methods, reason = "a black-box test waits in real time")]
pub fn now() -> Instant {
    Instant::now()
}

pub fn group(n: u128, ingress: Vec<(Protocol, Peer)>) -> SecurityGroup {
    let rules = |rules: Vec<(Protocol, Peer)>, from: u128| {
        let rule = |(i, (protocol, peer))| Rule {
            id: RuleId::from_random(n * 1000 + from + i as u128),
            protocol,
            peer,
        };
        rules.into_iter().enumerate().map(rule).collect()
    };
    SecurityGroup {
        id: GroupId::from_random(n),
        vpc: VpcId::from_random(1),
        ingress: rules(ingress, 0),
        egress: rules(vec![(Protocol::Any, anywhere())], 500),
    }
}

pub fn anywhere() -> Peer {
    Peer::Cidr("0.0.0.0/0".parse().unwrap())
}

pub fn tcp(port: u16) -> Protocol {
    Protocol::Tcp(PortRange::single(port))
}

pub fn udp(port: u16) -> Protocol {
    Protocol::Udp(PortRange::single(port))
}

pub fn ping() -> Protocol {
    Protocol::Icmp { kind: Some(8), code: None }
}

pub struct World {
    pub name: String,
    pub dir: tempfile::TempDir,
    daemon: Option<Child>,
    namespaces: Vec<String>,
    runtime: tokio::runtime::Runtime,
    pub desired: Desired,
}

impl World {
    /// `None` where this machine cannot carry one; the test is skipped then.
    pub fn new(test: &str) -> Option<Self> {
        static WORLDS: AtomicU8 = AtomicU8::new(0);
        if !nix::unistd::Uid::effective().is_root() {
            skip(test, "it makes network namespaces and taps, which needs root");
            return None;
        }
        if !std::path::Path::new("/dev/net/tun").exists() {
            skip(test, "this kernel has no /dev/net/tun");
            return None;
        }
        let nth = WORLDS.fetch_add(1, Ordering::Relaxed);
        let letters = [nth / 26, nth % 26].map(|n| char::from(b'a' + n));
        let letters = String::from_iter(letters);
        let name = format!("w{:x}{letters}", std::process::id() & 0xf_ffff);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let mut world = Self {
            dir: tempfile::Builder::new().prefix(&name).tempdir().unwrap(),
            name,
            daemon: None,
            namespaces: Vec::new(),
            runtime,
            desired: Desired::default(),
        };
        world.build();
        Some(world)
    }

    fn build(&mut self) {
        let uplink = format!("{}-up", self.name);
        let (host, internet) = (self.add_namespace("host"), self.add_namespace("net"));
        self.ip(&format!(
            "link add {uplink} netns {host} type veth peer name eth0 netns {internet}"
        ));
        self.ip(&format!("-n {host} addr add 198.51.100.2/24 dev {uplink}"));
        self.ip(&format!("-n {host} link set {uplink} up"));
        self.ip(&format!("-n {internet} addr add {INTERNET}/24 dev eth0"));
        self.ip(&format!("-n {internet} link set eth0 up"));
        self.desired.uplink = Some(Uplink {
            device: uplink,
            gateway: INTERNET,
            gateway6: None,
            early_drop: None,
            bogons: false,
            source_packets: None,
            fast_path: Default::default(),
        });
        self.desired.elastic_ranges = vec!["198.51.100.128/25".parse().unwrap()];
    }

    fn add_namespace(&mut self, role: &str) -> String {
        let namespace = self.namespace(role);
        self.namespaces.push(namespace.clone());
        self.ip(&format!("netns add {namespace}"));
        self.ip(&format!("-n {namespace} link set lo up"));
        namespace
    }

    pub fn namespace(&self, role: &str) -> String {
        format!("{}-{role}", self.name)
    }

    /// A guest on a veth whose far end, `eth0` in the namespace `g{n}`, has the
    /// interface's hardware address and nothing else yet.
    pub fn add_guest(&mut self, n: u8, vpc: u128, address: &str) -> &mut Interface {
        let namespace = self.add_namespace(&format!("g{n}"));
        let host = self.namespace("host");
        let device = format!("{}g{n}", self.name);
        let mac = Mac([0x02, 0, 0, 0, 1, n]);
        self.ip(&format!(
            "link add {device} netns {host} type veth peer name eth0 netns {namespace}"
        ));
        self.ip(&format!("-n {namespace} link set eth0 address {mac}"));
        self.ip(&format!("-n {host} link set {device} up"));
        self.ip(&format!("-n {namespace} link set eth0 up"));
        let address: Ipv4Addr = address.parse().unwrap();
        let [a, b, c, _] = address.octets();
        let document = |path: &str, value: String| (path.to_owned(), value);
        let subnet = format!("{a}.{b}.{c}.0/24").parse().unwrap();
        let id = InterfaceId::from_random(n.into());
        let device = Device::Existing { name: device };
        self.desired.interfaces.push(Interface {
            dhcp: Dhcp {
                hostname: format!("host-{n}"),
                domain: "region-1.internal".into(),
                dns: vec![Ipv4Addr::new(a, b, c, 2)],
                mtu: 1400,
            },
            metadata: Some(
                [
                    document("meta-data/instance-id", format!("i-{n}")),
                    document("meta-data/public-keys/0", "my-key".into()),
                    document("meta-data/public-keys/0/openssh-key", "ssh-ed25519 AAAA".into()),
                    document("user-data", format!("base64:{}", big_user_data())),
                ]
                .into(),
            ),
            ..Interface::new(id, device, mac, VpcId::from_random(vpc), (address, subnet))
        });
        self.desired.interfaces.last_mut().unwrap()
    }

    /// Gives a guest its address by hand, for tests that are not about DHCP.
    pub fn configure_guest(&self, n: u8) {
        let interface = &self.desired.interfaces[usize::from(n) - 1];
        let namespace = self.namespace(&format!("g{n}"));
        let [a, b, c, _] = interface.address.octets();
        self.ip(&format!("-n {namespace} addr add {}/24 dev eth0", interface.address));
        self.ip(&format!("-n {namespace} route add default via {a}.{b}.{c}.1"));
    }

    fn ip(&self, arguments: &str) {
        run(Command::new("ip").args(arguments.split_whitespace()));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn dataplane(&self, deed: &str) -> Command {
        let mut command = Command::new("nsenter");
        // Only the network: the pins must lie in the bpffs that all share.
        command
            .arg(format!("--net=/run/netns/{}", self.namespace("host")))
            .args([env!("CARGO_BIN_EXE_dataplane"), deed, "--name", &self.name])
            .arg("--state-dir")
            .arg(self.path("state"))
            .arg("--run-dir")
            .arg(self.path("run"));
        command
    }

    /// Starts the daemon and waits for its `ready`.
    pub fn start(&mut self) {
        let log =
            std::fs::File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut child = self
            .dataplane("daemon")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        self.daemon = Some(child);
        assert_eq!(line, "ready\n", "the daemon did not come up");
    }

    /// Of the daemon: nsenter has become it.
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().unwrap().id()
    }

    /// Starts another of the same name, which must end by itself.
    pub fn try_second(&self) -> Output {
        self.dataplane("daemon").output().unwrap()
    }

    /// kill -9: without a pid namespace, nsenter has become the daemon.
    pub fn kill(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    pub fn terminate(&mut self) -> std::process::ExitStatus {
        let mut daemon = self.daemon.take().unwrap();
        let pid = nix::unistd::Pid::from_raw(daemon.id() as i32);
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        daemon.wait().unwrap()
    }

    pub fn teardown(&self) -> Output {
        self.dataplane("teardown").output().unwrap()
    }

    /// Asks the daemon anything.
    pub fn ask<T, F: Future<Output = T>>(&self, call: impl FnOnce(Client) -> F) -> T {
        self.runtime.block_on(call(self.client()))
    }

    pub fn client(&self) -> Client {
        Client::new(self.path("run/dataplane.sock"))
    }

    /// Applies `self.desired` as the next generation.
    pub fn apply(&mut self) -> Applied {
        self.desired.generation += 1;
        self.try_apply().unwrap()
    }

    pub fn try_apply(&mut self) -> Result<Applied, rpc::Error> {
        let client = self.client();
        self.runtime.block_on(client.dataplane_apply(&self.desired))
    }

    pub fn status(&self) -> Status {
        let client = self.client();
        self.runtime.block_on(client.dataplane_status()).unwrap()
    }

    pub fn why(&self, question: &Question) -> Verdict {
        let client = self.client();
        self.runtime.block_on(client.dataplane_why(question)).unwrap()
    }

    /// A command in one of this world's namespaces.
    pub fn command(&self, role: &str, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/run/netns/{}", self.namespace(role))).arg(program);
        command.stdin(Stdio::null());
        command
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.path("log")).unwrap_or_default()
    }
}

/// Bytes that are no text, longer than one TCP window of the metadata service.
pub const USER_DATA_BYTES: usize = 40_000;

fn big_user_data() -> String {
    // "/////" is 0xff…: four characters for three bytes.
    let whole = "////".repeat(USER_DATA_BYTES / 3);
    let rest = ["", "/w==", "//8="][USER_DATA_BYTES % 3];
    whole + rest
}

impl Drop for World {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- the daemon's log\n{}", self.log());
            let counters = self.runtime.block_on(self.client().dataplane_status());
            eprintln!("--- its status\n{counters:#?}");
        }
        if let Some(mut daemon) = self.daemon.take() {
            _ = daemon.kill();
            _ = daemon.wait();
        }
        let torn = self.teardown();
        for namespace in &self.namespaces {
            _ = Command::new("ip").args(["netns", "del", namespace]).status();
        }
        if !torn.status.success() && !std::thread::panicking() {
            panic!("teardown: {}", String::from_utf8_lossy(&torn.stderr));
        }
    }
}

/// Runs a command that must succeed and gives its standard output.
pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Whether a program is there; prints the skip where it is not.
pub fn has(test: &str, program: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|dir| dir.join(program).exists()));
    if !found {
        skip(test, &format!("`{program}` is not installed"));
    }
    found
}
