//! `dataplane.sock`: packets. It knows interfaces, security groups and elastic
//! addresses, and nothing of EC2 or QEMU.
//!
//! | call | body → answer |
//! |---|---|
//! | `GET /v1/status` | → [`Status`] |
//! | `PUT /v1/desired` | [`Desired`] → [`Applied`]: the whole state, never a part |
//! | `GET /v1/desired` | → [`Desired`] as last accepted |
//! | `POST /v1/why` | [`Question`] → [`Verdict`]: runs the loaded program |
//! | `POST /v1/why-frame` | [`FrameQuestion`] → [`Explained`]: runs it on this very frame |
//! | `GET /v1/observe` | → [`Observed`], a JSON value a line, until either end has enough |
//! | `GET /v1/rules` | → [`RuleHits`] of every rule |
//! | `GET /v1/interfaces/ID/flows` | → [`MovedFlows`], for the host that it moves to |
//! | `PUT /v1/interfaces/ID/flows` | [`MovedFlows`] → [`Imported`] |

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use model::{
    Direction, GroupId, InterfaceId, Mac, NatGatewayId, NetworkAcl, NetworkAclId, PrefixList,
    PrefixListId, RouteTable, RouteTableId, RuleLimits, SecurityGroup, VpcId,
};
use serde::{Deserialize, Serialize};

use crate::{Client, Error};

/// What one more new interface may take: to attach a device is to wait for two or three grace
/// periods of the kernel, of some 10 to 30 ms each, one device after the other.
const ATTACH_MAX: Duration = Duration::from_millis(200);

/// The whole wish, at once. What is not in it is removed.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Desired {
    /// Grows with each change; an older one than the applied is refused.
    pub generation: u64,
    /// When the store began whose generations these are: a number that grows from one
    /// store to the next (milliseconds since 1970). The generations of a later epoch
    /// begin anew, and an earlier epoch is over.
    #[serde(default)]
    pub epoch: u64,
    pub uplink: Option<Uplink>,
    #[serde(default)]
    pub interfaces: Vec<Interface>,
    #[serde(default)]
    pub groups: Vec<SecurityGroup>,
    /// `None`: as many rules as an interface can have, in as many groups as it can have.
    #[serde(default)]
    pub rule_limits: Option<RuleLimits>,
    /// What rules may name instead of a network.
    #[serde(default)]
    pub prefix_lists: Vec<PrefixList>,
    #[serde(default)]
    pub route_tables: Vec<RouteTable>,
    #[serde(default)]
    pub network_acls: Vec<NetworkAcl>,
    #[serde(default)]
    pub nat_gateways: Vec<NatGateway>,
    /// Sources dropped on the uplink before anything else looks at them.
    #[serde(default)]
    pub blocklist: Vec<IpNet>,
    /// Where addresses that the world knows are taken from: what arrives on the uplink for
    /// one of these that no interface holds is dropped early. The host's own are left alone.
    #[serde(default)]
    pub elastic_ranges: Vec<IpNet>,
    /// Who is asked for names that are of no network here, in this order.
    #[serde(default)]
    pub name_servers: Vec<SocketAddr>,
    /// Records of what passed and what did not, to files.
    #[serde(default)]
    pub flow_log: Option<FlowLog>,
}

/// Flow logs: files of records, an interval's flows at its end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FlowLog {
    /// Where `flow.log` stands, and its predecessors `flow.log.1` and so on.
    pub directory: std::path::PathBuf,
    #[serde(default)]
    pub format: FlowLogFormat,
    /// Stands in every record.
    pub account: String,
    /// Aggregation interval; AWS has 60 and 600.
    pub interval_s: u32,
    /// Of one file, and how many are kept beside the one that is written.
    pub file_bytes_max: u64,
    pub files_kept: u32,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FlowLogFormat {
    /// AWS's version 2: fourteen fields with spaces between.
    #[default]
    Aws,
    /// The same fields, a JSON object a line.
    Json,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Uplink {
    /// The host's device towards the world.
    pub device: String,
    /// The next hop for all that leaves by it.
    pub gateway: Ipv4Addr,
    /// The same for IPv6, a link-local address as a rule. `None`: IPv6 stays on this host.
    #[serde(default)]
    pub gateway6: Option<Ipv6Addr>,
    /// Whether packets for nobody and from blocked sources are dropped by XDP in the
    /// device's driver, and not only by the program after it. `None`: unless the
    /// device is a veth, which has nothing to gain by it.
    #[serde(default)]
    pub early_drop: Option<bool>,
    /// Whether sources that cannot be in the internet (RFC 6890's and their like) are
    /// blocked, but for the networks that the gateway and the host itself are in.
    #[serde(default)]
    pub bogons: bool,
    /// Packets a second that may open a flow, of one source to all elastic addresses
    /// together. Looked at by the early drop alone.
    #[serde(default)]
    pub source_packets: Option<u64>,
    /// Whether packets of established flows are delivered by XDP.
    #[serde(default)]
    pub fast_path: FastPath,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FastPath {
    #[default]
    Off,
    /// The device hands over frames with complete checksums and without taking VLAN
    /// tags off them. A frame whose checksum was left to the hardware goes by tc.
    Declared,
}

/// What an interface may send and receive. `None`: as much as it can.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rates {
    /// Bits a second, of whole frames on the wire.
    #[serde(default)]
    pub incoming: Option<Allowance>,
    #[serde(default)]
    pub outgoing: Option<Allowance>,
    /// Packets a second, both ways together.
    #[serde(default)]
    pub packets: Option<Allowance>,
}

/// A rate for ever, and a greater one for as long as there are credits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allowance {
    /// A second. Credits grow by it.
    pub baseline: u64,
    /// A second, at most.
    pub peak: u64,
    /// Bits or packets that may be sent beyond the baseline after a quiet time.
    pub credit: u64,
}

/// Seconds for which a tracked flow may be silent, within EC2's ranges. `None`: EC2's
/// default.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct IdleTimeouts {
    /// 60 to 432 000.
    pub tcp_established: Option<u32>,
    /// 30 to 60: a UDP flow with packets one way, or one request and its answer.
    pub udp: Option<u32>,
    /// 60 to 180: a UDP flow that went on after the answer.
    pub udp_stream: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    pub id: InterfaceId,
    pub device: Device,
    pub mac: Mac,
    pub vpc: VpcId,
    /// The interface's private address, inside `subnet`.
    pub address: Ipv4Addr,
    pub subnet: Ipv4Net,
    /// Its IPv6 addresses: global, never translated, inside `subnet6`.
    #[serde(default)]
    pub ipv6: Vec<Ipv6Addr>,
    /// `None`: no IPv6 on this interface at all.
    #[serde(default)]
    pub subnet6: Option<Ipv6Net>,
    /// The 1:1 public address, answered for on the uplink.
    pub elastic: Option<Ipv4Addr>,
    /// Private addresses beside the first, inside `subnet` too.
    #[serde(default)]
    pub secondary: Vec<PrivateAddress>,
    pub groups: Vec<GroupId>,
    /// Off for guests that route for others.
    pub source_check: bool,
    /// Of its subnet. `None`: the network and the internet gateway, and nothing else.
    #[serde(default)]
    pub route_table: Option<RouteTableId>,
    /// Of its subnet. `None`: everything may cross its border.
    #[serde(default)]
    pub network_acl: Option<NetworkAclId>,
    #[serde(default)]
    pub rates: Rates,
    /// Another interface, whose rates hold for both together, as an instance type's do for
    /// all interfaces of an instance. This one has no `rates` then, and that one no `rates_of`.
    #[serde(default)]
    pub rates_of: Option<InterfaceId>,
    /// Whether its device takes frames from XDP. `None`: a tap of ours does; a veth only
    /// where its far end has GRO or a program of XDP.
    #[serde(default)]
    pub takes_frames: Option<bool>,
    #[serde(default)]
    pub idle: IdleTimeouts,
    /// Whether a TCP packet of no known flow may pick its connection up, where a rule
    /// permits the packet: after a host was lost with its flows.
    #[serde(default)]
    pub loose_tcp: bool,
    /// Whether flows of TCP and UDP that rules let everybody begin, and all of whose answers
    /// pass, are not tracked, as in EC2: they count for no limit, and end with their rule.
    #[serde(default)]
    pub untracked: bool,
    pub dhcp: Dhcp,
    /// What the metadata service answers: path below `/latest/` (or a dated
    /// version) → document, such as `meta-data/instance-id` → `i-…`. Folders
    /// are implied. `None`: no metadata service on this interface.
    ///
    /// - A path that is a document *and* a folder is a labelled folder: with
    ///   `meta-data/public-keys/0` → `my-key` and
    ///   `meta-data/public-keys/0/openssh-key` → `ssh-…`, `public-keys/` lists
    ///   `0=my-key` and `public-keys/0/` lists `openssh-key`.
    /// - A value that begins with `base64:` is served as the bytes that the rest
    ///   stands for; user data belongs into one, whatever it holds.
    pub metadata: Option<BTreeMap<String, String>>,
    /// How the host's own services treat it.
    #[serde(default)]
    pub services: Services,
}

impl Interface {
    /// An interface with nothing but what it must have: its fields' defaults are EC2's, but
    /// that all its flows are tracked.
    /// Whoever makes one names what differs, and ends with `..Interface::new(…)`.
    pub fn new(
        id: InterfaceId,
        device: Device,
        mac: Mac,
        vpc: VpcId,
        (address, subnet): (Ipv4Addr, Ipv4Net),
    ) -> Self {
        Self {
            id,
            device,
            mac,
            vpc,
            address,
            subnet,
            ipv6: Vec::new(),
            subnet6: None,
            elastic: None,
            secondary: Vec::new(),
            groups: Vec::new(),
            source_check: true,
            route_table: None,
            network_acl: None,
            rates: Rates::default(),
            rates_of: None,
            takes_frames: None,
            idle: IdleTimeouts::default(),
            loose_tcp: false,
            untracked: false,
            dhcp: Dhcp::default(),
            metadata: None,
            services: Services::default(),
        }
    }
}

/// What lets those behind route tables that name it open connections to the world, by one public
/// address and ports that it gives away, and lets nobody in (EC2's public NAT gateway).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatGateway {
    pub id: NatGatewayId,
    pub vpc: VpcId,
    /// Its private address, which no interface may have; nothing answers there.
    pub address: Ipv4Addr,
    /// Its public one, answered for on the uplink.
    pub elastic: Ipv4Addr,
    /// Ports that it gives away towards one peer, from 1024 on. `None`: all 64 512.
    #[serde(default)]
    pub ports_max: Option<u16>,
}

/// What a packet is to the world behind a NAT gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Translated {
    pub gateway: NatGatewayId,
    pub address: Ipv4Addr,
    /// Or the identifier of an ICMP request. `None`: it was dropped, or has none.
    pub port: Option<u16>,
}

/// A secondary private address of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrivateAddress {
    pub address: Ipv4Addr,
    /// Its own 1:1 public address.
    #[serde(default)]
    pub elastic: Option<Ipv4Addr>,
}

/// What the responder gives an interface beyond address and documents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Services {
    /// Told by DHCP: time servers and NetBIOS name servers, four of each at most.
    pub ntp: Vec<Ipv4Addr>,
    pub netbios: Vec<Ipv4Addr>,
    /// RFC 2132, 8.7: 1, 2, 4 or 8; EC2 recommends 2.
    pub netbios_node: Option<u8>,
    /// Routers that an answer of the metadata service may pass, from 1 to 64.
    pub metadata_hop_limit: u8,
    pub metadata_tokens: Tokens,
    /// Whether metadata is at `fd00:ec2::254` too, where the interface has IPv6.
    pub metadata_ipv6: bool,
    /// `None`: no names are resolved for it.
    pub dns: Option<Dns>,
}

/// Names are resolved at 169.254.169.253, at `fd00:ec2::253`, and at an address of the network's own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Dns {
    /// The network's own; with EC2 the base of its range plus two. DHCP tells it as
    /// the resolver where [`Dhcp::dns`] names none. No interface may have it.
    pub address: Option<Ipv4Addr>,
    /// What the interface's addresses are called inside its network; the first is what
    /// they are told to be called.
    pub names: Vec<String>,
}

impl Default for Services {
    fn default() -> Self {
        Self {
            ntp: Vec::new(),
            netbios: Vec::new(),
            netbios_node: None,
            metadata_hop_limit: 1,
            metadata_tokens: Tokens::Required,
            metadata_ipv6: false,
            dns: None,
        }
    }
}

/// Whether the metadata service answers those who bring no token.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Tokens {
    #[default]
    Required,
    Optional,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Device {
    /// A tap that the dataplane makes, and removes when the interface goes.
    Tap { name: String, owner_uid: u32 },
    /// A device that someone else made, named as this host sees it.
    Existing { name: String },
}

impl Device {
    pub fn name(&self) -> &str {
        match self {
            Self::Tap { name, .. } | Self::Existing { name } => name,
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dhcp {
    pub hostname: String,
    pub domain: String,
    pub dns: Vec<Ipv4Addr>,
    pub mtu: u16,
}

impl Default for Dhcp {
    fn default() -> Self {
        Self {
            hostname: "host".to_owned(),
            domain: "internal".to_owned(),
            dns: Vec::new(),
            mtu: 1500,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Applied {
    pub generation: u64,
    /// Map writes, devices made and removed.
    pub changes: usize,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    /// Where the eBPF object came from, and its digest.
    pub object: ObjectOrigin,
    /// Of the state in force; 0 while an accepted one is not applied whole.
    pub generation: u64,
    /// Whether the programs were found pinned at start, and taken over.
    pub adopted: bool,
    pub flows: u64,
    pub interfaces: Vec<InterfaceStatus>,
    /// Packets by reason, all interfaces and the uplink's early drops together.
    pub reasons: BTreeMap<String, u64>,
    #[serde(default)]
    pub nat_gateways: Vec<NatGatewayStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NatGatewayStatus {
    pub id: NatGatewayId,
    pub elastic: Ipv4Addr,
    /// Connections that hold a port, as the last pass over them counted.
    pub connections: u64,
    /// Packets by reason: those through it, and those that nobody behind it waits for.
    pub reasons: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectOrigin {
    /// `built`, `prebuilt`, or the path that the environment named.
    pub origin: String,
    pub sha256: String,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct InterfaceStatus {
    pub id: InterfaceId,
    pub device: String,
    pub address: Ipv4Addr,
    pub elastic: Option<Ipv4Addr>,
    #[serde(default)]
    pub secondary: Vec<PrivateAddress>,
    /// Packets by reason, drops and accepts alike.
    pub reasons: BTreeMap<String, u64>,
    /// Of its device, as the kernel counts them since it was made.
    #[serde(default)]
    pub traffic: Traffic,
    /// Tracked flows that it has now.
    #[serde(default)]
    pub flows: u64,
    #[serde(default)]
    pub rates: Rates,
    /// What is left of the rates' credits.
    #[serde(default)]
    pub credits: Credits,
}

/// Bits, bits and packets that may pass at once; `None`: without a limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credits {
    pub incoming: Option<u64>,
    pub outgoing: Option<u64>,
    pub packets: Option<u64>,
}

/// From the guest and to the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    pub from_packets: u64,
    pub from_bytes: u64,
    pub to_packets: u64,
    pub to_bytes: u64,
}

/// "What would you do with this packet?"
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Question {
    pub interface: InterfaceId,
    pub direction: Direction,
    /// Which of its addresses; `None`: the first of the remote one's family.
    #[serde(default)]
    pub local: Option<IpAddr>,
    pub protocol: u8,
    pub remote: IpAddr,
    pub remote_port: u16,
    pub local_port: u16,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Verdict {
    pub allowed: bool,
    pub reason: String,
    pub rule: Option<model::RuleId>,
    /// The route that was asked, where the sender is here and has a table.
    #[serde(default)]
    pub routed: Option<Routed>,
    /// The network ACL that denied it, if one did.
    #[serde(default)]
    pub denied: Option<AclDenied>,
    /// What it is to the world, where a NAT gateway translates it.
    #[serde(default)]
    pub translated: Option<Translated>,
    /// The entry of the prefix list that the rule names, if it names one.
    #[serde(default)]
    pub listed: Option<Listed>,
}

/// Which state of a prefix list let an address in, and by which entry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    pub list: PrefixListId,
    pub version: u64,
    pub net: IpNet,
    #[serde(default)]
    pub description: String,
}

impl std::fmt::Display for Listed {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} version {}, {}", self.list, self.version, self.net)?;
        if self.description.is_empty() { Ok(()) } else { write!(f, " ({})", self.description) }
    }
}

/// "What would you do with this frame, here?"
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrameQuestion {
    /// As this interface's guest would send it; `None`: as it arrives on the uplink.
    pub interface: Option<InterfaceId>,
    /// From the destination hardware address on.
    pub frame: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explained {
    /// Where it came in.
    pub device: String,
    pub allowed: bool,
    pub reason: String,
    /// The rules that let it out and in, where rules were asked.
    pub egress_rule: Option<model::RuleId>,
    pub ingress_rule: Option<model::RuleId>,
    /// Where it goes from here: an interface, the uplink by its next hop, or nowhere.
    pub route: String,
    /// Who it is for, where that is an interface of this host.
    pub receiver: Option<InterfaceId>,
    /// The route that was asked, where its sender has a table.
    #[serde(default)]
    pub routed: Option<Routed>,
    /// The network ACL that denied it, if one did.
    #[serde(default)]
    pub denied: Option<AclDenied>,
    /// What it is to the world, where a NAT gateway translates it.
    #[serde(default)]
    pub translated: Option<Translated>,
    /// Entries of prefix lists that its rules name.
    #[serde(default)]
    pub listed: Vec<Listed>,
}

/// What a network ACL did not let cross its subnet's border.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AclDenied {
    pub acl: NetworkAclId,
    /// The entry's number; `None`: no entry matched.
    pub entry: Option<u16>,
}

/// What a route table said of a destination.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Routed {
    pub table: RouteTableId,
    /// The longest prefix that contains it; `None`: the table has none.
    pub destination: Option<IpNet>,
}

/// One line of what is observed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[expect(clippy::large_enum_variant, reason = "nearly all are the one, on its way to a line")]
pub enum Observed {
    Seen(Seen),
    /// So many more were not told: there were too many at once.
    LeftOut(u64),
}

/// A packet that was dropped, or opened a flow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// Since 1970.
    pub time_ms: u64,
    /// Whom it concerns: the sender's interface, the receiver's, or both.
    pub interfaces: Vec<InterfaceId>,
    pub allowed: bool,
    pub reason: String,
    pub egress_rule: Option<model::RuleId>,
    pub ingress_rule: Option<model::RuleId>,
    /// The device by which it came.
    pub device: String,
    pub length: u32,
    /// None of it where it is no IP packet.
    pub protocol: Option<u8>,
    pub source: Option<std::net::IpAddr>,
    pub destination: Option<std::net::IpAddr>,
    pub source_port: Option<u16>,
    pub destination_port: Option<u16>,
    /// The route that was asked, where its sender has a table.
    #[serde(default)]
    pub routed: Option<Routed>,
    /// The network ACL that denied it, if one did.
    #[serde(default)]
    pub denied: Option<AclDenied>,
    /// What it is to the world, where a NAT gateway translates it.
    #[serde(default)]
    pub translated: Option<Translated>,
    /// Entries of prefix lists that its rules name.
    #[serde(default)]
    pub listed: Vec<Listed>,
}

/// How often a rule let a flow in, over all interfaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RuleHits {
    pub rule: model::RuleId,
    pub group: GroupId,
    pub direction: Direction,
    pub flows: u64,
}

/// The greatest version of [`MovedFlows`] that is understood, and the one written.
pub const MOVED_FLOWS_VERSION: u32 = 1;

/// An interface's flows on their way to another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedFlows {
    pub version: u32,
    pub interface: InterfaceId,
    pub flows: Vec<MovedFlow>,
    /// What is missing from its buckets, in bytes and packets, in the order in which
    /// the programs have them.
    #[serde(default)]
    pub missing: Vec<u64>,
    /// What its connections have at NAT gateways. An older host tells of none, and passes over
    /// them.
    #[serde(default)]
    pub ports: Vec<MovedPort>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedFlow {
    pub protocol: u8,
    /// Both of one family.
    pub local: IpAddr,
    pub remote: IpAddr,
    pub local_port: u16,
    pub remote_port: u16,
    pub phase: u8,
    pub flags: u8,
    /// How long it has been silent: clocks differ between hosts.
    pub silent_s: u32,
}

/// The port that stands for a connection at a NAT gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovedPort {
    pub gateway: NatGatewayId,
    /// The gateway's public one.
    pub address: Ipv4Addr,
    /// Of a ping its identifier, here and as `local_port`.
    pub port: u16,
    pub protocol: u8,
    pub local: Ipv4Addr,
    pub remote: Ipv4Addr,
    pub local_port: u16,
    pub remote_port: u16,
    /// Which directions are closed, and whether it was reset.
    pub flags: u16,
    pub silent_s: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// Those that were not there yet.
    pub flows: u64,
    /// Ports of NAT gateways that were taken for connections.
    #[serde(default)]
    pub ports: u64,
    /// Connections that lost their ports, by the reason. Their flows are there.
    #[serde(default)]
    pub left_out: BTreeMap<LeftOut, u64>,
}

/// Why a connection does not go on by its port at a NAT gateway.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LeftOut {
    /// The interface's network has no such gateway here, or one of another address.
    NoGateway,
    /// The interface does not have the private address here.
    NoAddress,
    /// The port is another connection's here.
    PortTaken,
    /// The connection has another port here already.
    OtherPort,
    /// It was silent too long.
    Silent,
    /// The interface, or the host, has as many connections as it may.
    NoRoom,
}

impl Client {
    pub async fn dataplane_explain(&self, question: &FrameQuestion) -> Result<Explained, Error> {
        self.post("/v1/why-frame", question).await
    }

    pub async fn dataplane_rules(&self) -> Result<Vec<RuleHits>, Error> {
        self.get("/v1/rules").await
    }

    /// Calls `each` with what is observed until it answers false. `drops`: only
    /// what was dropped.
    pub async fn dataplane_observe(
        &self,
        interface: Option<InterfaceId>,
        drops: bool,
        mut each: impl FnMut(Observed) -> bool,
    ) -> Result<(), Error> {
        let interface = interface.map(|i| format!("&interface={i}")).unwrap_or_default();
        let path = format!("/v1/observe?drops={drops}{interface}");
        self.lines(&path, |line| match serde_json::from_slice(line) {
            Ok(observed) => each(observed),
            Err(error) => {
                tracing::warn!(%error, "observe: a line that is none");
                true
            }
        })
        .await
    }

    pub async fn dataplane_export(&self, interface: InterfaceId) -> Result<MovedFlows, Error> {
        self.get(&format!("/v1/interfaces/{interface}/flows")).await
    }

    pub async fn dataplane_import(&self, flows: &MovedFlows) -> Result<Imported, Error> {
        self.put(&format!("/v1/interfaces/{}/flows", flows.interface), flows).await
    }

    pub async fn dataplane_status(&self) -> Result<Status, Error> {
        self.get("/v1/status").await
    }

    /// A state with many new interfaces is waited for longer: each has to be attached.
    pub async fn dataplane_apply(&self, desired: &Desired) -> Result<Applied, Error> {
        let interfaces = u32::try_from(desired.interfaces.len()).unwrap_or(u32::MAX);
        let patience = self.timeout().saturating_add(ATTACH_MAX.saturating_mul(interfaces));
        self.with_timeout(patience).put("/v1/desired", desired).await
    }

    pub async fn dataplane_why(&self, question: &Question) -> Result<Verdict, Error> {
        self.post("/v1/why", question).await
    }
}
