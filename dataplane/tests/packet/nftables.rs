//! A desired state as a ruleset of nftables, on a router of its own between taps.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::IpAddr;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::time::Duration;

use ebpf::GATEWAY_MAC;
use etherparse::PacketBuilder;
use ipnet::IpNet;
use model::{Direction, Mac, Peer, PortRange, Protocol, Rule};
use nix::sched::{CloneFlags, unshare};
use rpc::dataplane::{Desired, Interface};

use crate::world::{UPLINK, UPLINK_MAC};

/// Each packet carries a number of its own, by which it is known where it arrives.
pub const TAG_LEN: usize = 8;
/// Where marks go: packets that pass always, so that what comes before one has come.
const MARK_TO: [u8; 4] = [192, 0, 2, 250];
const MARK_TAG: u64 = 0x6d61_726b_0000_0000;
/// As a rule a mark is there when it was sent; else it is looked for this often, each
/// millisecond.
const LOOKS: u32 = 30_000;

fn device(interface: &Interface) -> String {
    crate::world::guest(usize::from(interface.mac.octets()[5]))
}

/// What a rule says of a packet; several lines, for a peer may have addresses of both
/// families.
fn matches(rule: &Rule, direction: Direction, desired: &Desired) -> Vec<String> {
    let end = match direction {
        Direction::Ingress => "saddr",
        Direction::Egress => "daddr",
    };
    let peers = peers(&rule.peer, desired);
    let protocol = protocol(rule.protocol);
    let line = |net: &IpNet| match net {
        IpNet::V4(net) if net.prefix_len() == 0 => format!("meta nfproto ipv4 {protocol}"),
        IpNet::V6(net) if net.prefix_len() == 0 => format!("meta nfproto ipv6 {protocol}"),
        IpNet::V4(net) => format!("ip {end} {net} {protocol}"),
        IpNet::V6(net) => format!("ip6 {end} {net} {protocol}"),
    };
    peers.iter().map(line).collect()
}

fn peers(peer: &Peer, desired: &Desired) -> Vec<IpNet> {
    match peer {
        Peer::Cidr(net) => vec![*net],
        Peer::Group(id) => desired
            .interfaces
            .iter()
            .filter(|i| i.groups.contains(id))
            .flat_map(addresses)
            .map(IpNet::from)
            .collect(),
        Peer::PrefixList(id) => desired
            .prefix_lists
            .iter()
            .filter(|list| list.id == *id)
            .flat_map(|list| list.entries.iter().map(|entry| entry.net))
            .collect(),
    }
}

fn addresses(interface: &Interface) -> Vec<IpAddr> {
    let six = interface.ipv6.iter().map(|a| IpAddr::V6(*a));
    std::iter::once(IpAddr::V4(interface.address)).chain(six).collect()
}

fn protocol(protocol: Protocol) -> String {
    let ports = |name: &str, ports: PortRange| match ports {
        PortRange::ALL => format!("meta l4proto {name}"),
        _ => format!("{name} dport {}-{}", ports.first(), ports.last()),
    };
    let icmp = |name: &str, match_name: &str, kind: Option<u8>, code: Option<u8>| {
        let mut text = format!("meta l4proto {name}");
        if let Some(kind) = kind {
            let _ = write!(text, " {match_name} type {kind}");
            if let Some(code) = code {
                let _ = write!(text, " {match_name} code {code}");
            }
        }
        text
    };
    match protocol {
        Protocol::Any => String::new(),
        Protocol::Tcp(range) => ports("tcp", range),
        Protocol::Udp(range) => ports("udp", range),
        Protocol::Icmp { kind, code } => icmp("1", "icmp", kind, code),
        Protocol::Icmpv6 { kind, code } => icmp("58", "icmpv6", kind, code),
        Protocol::Number(number) => format!("meta l4proto {number}"),
    }
}

/// A guest's chains: who may leave it goes on to the receiver's, who may enter it is through.
fn chains(text: &mut String, interface: &Interface, desired: &Desired) {
    let name = device(interface);
    let groups = || desired.groups.iter().filter(|g| interface.groups.contains(&g.id));
    let mut chain = |way: &str, direction, then: &str| {
        let _ = writeln!(text, "  chain {way}_{name} {{");
        for group in groups() {
            let rules = match direction {
                Direction::Ingress => &group.ingress,
                Direction::Egress => &group.egress,
            };
            for line in rules.iter().flat_map(|rule| matches(rule, direction, desired)) {
                let _ = writeln!(text, "    {line} {then}");
            }
        }
        text.push_str("    drop\n  }\n");
    };
    chain("to", Direction::Ingress, "accept");
    chain("from", Direction::Egress, "goto inward");
}

pub fn ruleset(desired: &Desired) -> String {
    let mut text = String::from("table inet oracle {\n");
    // A chain is named after it is made.
    text.push_str("  chain inward { }\n");
    let (mut ways, mut receivers) = (String::new(), String::new());
    let (mut dnat, mut snat) = (String::new(), String::new());
    for interface in &desired.interfaces {
        chains(&mut text, interface, desired);
        let name = device(interface);
        let _ = writeln!(ways, "    iifname {name} goto from_{name}");
        let _ = writeln!(receivers, "    oifname {name} goto to_{name}");
        if let (Some(elastic), own) = (interface.elastic, interface.address) {
            let _ = writeln!(dnat, "    iifname {UPLINK} ip daddr {elastic} dnat ip to {own}");
            let _ = writeln!(snat, "    oifname {UPLINK} ip saddr {own} snat ip to {elastic}");
            let _ = writeln!(receivers, "    oifname {UPLINK} ip saddr {own} accept");
        }
    }
    let mark = std::net::Ipv4Addr::from(MARK_TO);
    let _ = write!(
        text,
        "  chain inward {{
{receivers}    oifname {UPLINK} meta nfproto ipv6 accept
    drop
  }}
  chain arriving {{
    type nat hook prerouting priority dstnat; policy accept;
{dnat}  }}
  chain leaving {{
    type nat hook postrouting priority srcnat; policy accept;
{snat}  }}
  chain forward {{
    type filter hook forward priority filter; policy drop;
    ip daddr {mark} accept
    ct state established,related accept
    ct state invalid drop
    iifname {UPLINK} goto inward
{ways}  }}
}}
"
    );
    text
}

/// A namespace that routes between taps by a ruleset.
pub struct Router {
    taps: BTreeMap<String, File>,
    marks: u64,
}

impl Router {
    /// The namespace lives as long as the taps are open.
    pub fn new(desired: &Desired, ruleset: &str) -> Self {
        let taps = std::thread::scope(|scope| {
            scope.spawn(|| build(desired, ruleset)).join().expect("the router stands")
        });
        Self { taps, marks: 0 }
    }

    /// Sends a frame in by a device; what came out anywhere with this tag.
    pub fn send(&mut self, device: &str, frame: &[u8], tag: [u8; TAG_LEN]) -> Option<Vec<u8>> {
        self.write(device, frame);
        self.marks += 1;
        let mark = (MARK_TAG | self.marks).to_be_bytes();
        let mut bytes = Vec::new();
        PacketBuilder::ethernet2([2, 0, 0, 0, 8, 8], UPLINK_MAC.octets())
            .ipv4([203, 0, 113, 9], MARK_TO, 64)
            .udp(9, 9)
            .write(&mut bytes, &mark)
            .unwrap();
        self.write(UPLINK, &bytes);
        let mut found = None;
        for _ in 0..LOOKS {
            let mut marked = false;
            for frame in self.arrived() {
                match frame.ends_with(&mark) {
                    true => marked = true,
                    false if frame.ends_with(&tag) => found = Some(frame),
                    // The kernel's own, as it looks for neighbours.
                    false => {}
                }
            }
            // A tap that was read before the mark's may have had the frame since.
            if marked {
                return found.or_else(|| self.arrived().find(|f| f.ends_with(&tag)));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("a mark did not arrive");
    }

    fn write(&mut self, device: &str, frame: &[u8]) {
        self.taps.get_mut(device).expect("a tap of that name").write_all(frame).unwrap();
    }

    fn arrived(&mut self) -> impl Iterator<Item = Vec<u8>> + use<> {
        let mut all = Vec::new();
        for tap in self.taps.values_mut() {
            let mut buffer = [0; 2048];
            loop {
                match tap.read(&mut buffer) {
                    Ok(length) => all.push(buffer[..length].to_vec()),
                    Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                    Err(e) => panic!("a tap cannot be read: {e}"),
                }
            }
        }
        all.into_iter()
    }
}

/// `struct ifreq` as `TUNSETIFF` reads it: the name, the flags, the rest of the union.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

nix::ioctl_write_ptr_bad!(
    set_interface,
    nix::request_code_write!(b'T', 202, size_of::<libc::c_int>()),
    Request
);

/// A tap in this thread's namespace, as long as it is open.
fn open_tap(name: &str) -> File {
    let mut options = File::options();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    let file = options.open("/dev/net/tun").unwrap();
    let flags = (libc::IFF_TAP | libc::IFF_NO_PI) as u16;
    let mut request = Request { name: [0; 16], flags, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: TUNSETIFF reads and writes one ifreq, which lives beyond the call.
    unsafe { set_interface(file.as_raw_fd(), &raw const request) }.unwrap();
    file
}

fn build(desired: &Desired, ruleset: &str) -> BTreeMap<String, File> {
    unshare(CloneFlags::CLONE_NEWNET).unwrap();
    let names = desired.interfaces.iter().map(device).chain([UPLINK.to_owned()]);
    let taps: BTreeMap<String, File> = names.map(|name| (name.clone(), open_tap(&name))).collect();
    for (path, value) in [
        ("ipv4/ip_forward", "1"),
        ("ipv4/conf/all/rp_filter", "0"),
        ("ipv4/conf/default/rp_filter", "0"),
        ("ipv6/conf/all/forwarding", "1"),
    ] {
        std::fs::write(format!("/proc/sys/net/{path}"), value).unwrap();
    }
    let mut text = format!("link set lo up\nlink set {UPLINK} address {UPLINK_MAC} up\n");
    for name in taps.keys() {
        std::fs::write(format!("/proc/sys/net/ipv4/conf/{name}/rp_filter"), "0").unwrap();
    }
    let gateway = Mac(GATEWAY_MAC);
    for interface in &desired.interfaces {
        let (name, mac) = (device(interface), interface.mac);
        let _ = writeln!(text, "link set {name} address {gateway} up");
        for address in addresses(interface) {
            let _ = writeln!(text, "route add {address} dev {name}");
            let _ = writeln!(text, "neigh add {address} lladdr {mac} dev {name} nud permanent");
        }
    }
    let first = device(&desired.interfaces[0]);
    let mark = std::net::Ipv4Addr::from(MARK_TO);
    let _ = write!(
        text,
        "address add 198.51.100.1/24 dev {UPLINK}
route add default via 198.51.100.254 dev {UPLINK}
neigh add 198.51.100.254 lladdr 02:00:00:00:08:08 dev {UPLINK} nud permanent
route add default via fe80::1 dev {UPLINK}
neigh add fe80::1 lladdr 02:00:00:00:08:08 dev {UPLINK} nud permanent
route add {mark} dev {first}
neigh add {mark} lladdr 02:00:00:00:09:09 dev {first} nud permanent
"
    );
    told("ip", &["-batch", "-"], &text);
    told("nft", &["-f", "-"], ruleset);
    taps
}

fn told(program: &str, args: &[&str], text: &str) {
    let mut child = Command::new(program).args(args).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{program} refused\n{text}");
}
