//! The DHCP server of one interface (RFC 2131, 2132, 3442, 6842), as a core:
//! message in, message out.
//!
//! An interface has one address for life, so there is no pool and no lease
//! table: the answer follows from the binding and the question alone, and a
//! restart forgets nothing.
//!
//! ```text
//! DISCOVER                                  → OFFER
//! REQUEST, our server id (selecting)        → ACK, or NAK where it asks for another address
//! REQUEST, no server id (init-reboot,
//!   renewing, rebinding)                    → ACK, or NAK where it names another address
//! REQUEST, another server's id              → silence: it chose that server
//! INFORM                                    → ACK without address and lease
//! RELEASE, DECLINE                          → silence, counted
//! all else                                  → silence, counted
//! ```

use std::net::Ipv4Addr;

use ipnet::Ipv4Net;
use model::Mac;
use smoltcp::wire::{
    ArpHardware, DhcpFlags, DhcpMessageType, DhcpOpCode, DhcpOption, DhcpPacket, DhcpRepr,
    EthernetAddress, Ipv4Address,
};

/// EC2's lease is an hour; the address never changes, so any figure would do.
const LEASE_S: u32 = 3600;

/// When a client renews and when it asks anyone (RFC 2131, 4.4.5: 1/2 and 7/8).
const RENEW_S: u32 = LEASE_S / 2;
const REBIND_S: u32 = LEASE_S / 8 * 7;

// Options by number (RFC 2132; the last RFC 3442).
const OPT_SUBNET_MASK: u8 = 1;
const OPT_ROUTER: u8 = 3;
const OPT_DOMAIN_NAME_SERVER: u8 = 6;
const OPT_HOST_NAME: u8 = 12;
const OPT_DOMAIN_NAME: u8 = 15;
const OPT_INTERFACE_MTU: u8 = 26;
const OPT_BROADCAST_ADDRESS: u8 = 28;
const OPT_NTP_SERVERS: u8 = 42;
const OPT_NETBIOS_SERVERS: u8 = 44;
const OPT_NETBIOS_NODE: u8 = 46;
const OPT_REQUESTED_IP: u8 = 50;
const OPT_IP_LEASE_TIME: u8 = 51;
const OPT_DHCP_MESSAGE_TYPE: u8 = 53;
const OPT_SERVER_IDENTIFIER: u8 = 54;
const OPT_PARAMETER_REQUEST_LIST: u8 = 55;
const OPT_RENEWAL_TIME_VALUE: u8 = 58;
const OPT_REBINDING_TIME_VALUE: u8 = 59;
const OPT_CLIENT_ID: u8 = 61;
const OPT_CLASSLESS_STATIC_ROUTE: u8 = 121;

/// A BOOTP message has at least 300 bytes, and old relays and clients drop
/// shorter ones (RFC 1542, 2.1).
const MESSAGE_LENGTH_MIN: usize = 300;

/// What every client takes of options, from the magic number to the end (RFC 2131, 2).
const OPTIONS_BYTES_MAX: usize = 312;

/// Resolvers that are told; more would not make a client faster.
const DNS_SERVERS_MAX: usize = 3;

/// Time servers and NetBIOS name servers that are told (EC2: four of each).
pub const SERVERS_MAX: usize = 4;

/// The longest host name (RFC 1035) and domain: together with the rest, and with any
/// client's usual identifier, they fit [`OPTIONS_BYTES_MAX`].
pub const HOSTNAME_LENGTH_MAX: usize = 63;
pub const DOMAIN_LENGTH_MAX: usize = 96;

/// Where the metadata service is, for the route that leads there.
const METADATA_ADDRESS: Ipv4Addr = Ipv4Addr::from_bits(ebpf::METADATA_ADDRESS);

/// What one interface is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Binding {
    pub mac: Mac,
    pub address: Ipv4Addr,
    pub subnet: Ipv4Net,
    /// The subnet's router, which is also the server's identifier.
    pub router: Ipv4Addr,
    pub hostname: String,
    pub domain: String,
    pub dns: Vec<Ipv4Addr>,
    pub mtu: u16,
    pub ntp: Vec<Ipv4Addr>,
    pub netbios: Vec<Ipv4Addr>,
    pub netbios_node: Option<u8>,
}

/// An answer and where it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reply {
    pub message: Vec<u8>,
    pub destination: Ipv4Addr,
    /// To the link's broadcast address, or to the client's own.
    pub broadcast: bool,
}

/// Why there was no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// Not a DHCP message of a client on Ethernet, or one for another machine.
    Malformed,
    /// The client chose another server.
    NotOurs,
    /// RELEASE or DECLINE: heard, and no answer is due.
    Heard,
}

/// The fields of a request that decide, in any order and with any options between.
struct Request<'a> {
    kind: DhcpMessageType,
    requested: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
    client_id: Option<&'a [u8]>,
    wanted: Option<&'a [u8]>,
}

impl<'a> Request<'a> {
    fn parse(packet: &'a DhcpPacket<&'a [u8]>) -> Option<Self> {
        let address = |data: &[u8]| <[u8; 4]>::try_from(data).ok().map(Ipv4Addr::from);
        let mut kind = None;
        let mut request = Self {
            kind: DhcpMessageType::Unknown(0),
            requested: None,
            server: None,
            client_id: None,
            wanted: None,
        };
        for DhcpOption { kind: option, data } in packet.options() {
            match option {
                OPT_DHCP_MESSAGE_TYPE => kind = data.first().map(|&b| DhcpMessageType::from(b)),
                OPT_REQUESTED_IP => request.requested = address(data),
                OPT_SERVER_IDENTIFIER => request.server = address(data),
                OPT_CLIENT_ID => request.client_id = Some(data),
                OPT_PARAMETER_REQUEST_LIST => request.wanted = Some(data),
                _ => {}
            }
        }
        request.kind = kind?;
        Some(request)
    }

    /// Whether the client asked for an option; one that names none gets all.
    fn wants(&self, option: u8) -> bool {
        self.wanted.is_none_or(|list| list.contains(&option))
    }
}

/// Answers one message, the UDP payload of a frame from the interface.
pub fn answer(binding: &Binding, message: &[u8]) -> Result<Reply, Silence> {
    let packet = DhcpPacket::new_checked(message).map_err(|_| Silence::Malformed)?;
    let from_client = packet.opcode() == DhcpOpCode::Request
        && packet.hardware_type() == ArpHardware::Ethernet
        && packet.hardware_len() == 6
        && packet.magic_number() == MAGIC
        && packet.client_hardware_address() == EthernetAddress(binding.mac.octets())
        // A relay would stand between us and the client; none can, on a tap.
        && packet.relay_agent_ip().is_unspecified();
    if !from_client {
        return Err(Silence::Malformed);
    }
    let request = Request::parse(&packet).ok_or(Silence::Malformed)?;
    let kind = match request.kind {
        DhcpMessageType::Discover => DhcpMessageType::Offer,
        DhcpMessageType::Request => judge(binding, &request, packet.client_ip())?,
        DhcpMessageType::Inform if !packet.client_ip().is_unspecified() => DhcpMessageType::Ack,
        DhcpMessageType::Release | DhcpMessageType::Decline => return Err(Silence::Heard),
        _ => return Err(Silence::Malformed),
    };
    Ok(compose(binding, &packet, &request, kind))
}

/// The four bytes that make BOOTP's vendor area DHCP's options (RFC 2131, 3).
const MAGIC: u32 = 0x6382_5363;

fn judge(
    binding: &Binding,
    request: &Request<'_>,
    client: Ipv4Addr,
) -> Result<DhcpMessageType, Silence> {
    if request.server.is_some_and(|server| server != binding.router) {
        return Err(Silence::NotOurs);
    }
    let asked = request.requested.unwrap_or(client);
    Ok(if asked == binding.address { DhcpMessageType::Ack } else { DhcpMessageType::Nak })
}

fn compose(
    binding: &Binding,
    packet: &DhcpPacket<&[u8]>,
    request: &Request<'_>,
    kind: DhcpMessageType,
) -> Reply {
    let refused = kind == DhcpMessageType::Nak;
    let informed = request.kind == DhcpMessageType::Inform;
    let leased = !refused && !informed;
    let mut options = Options::new();
    if leased {
        options.push(OPT_IP_LEASE_TIME, &LEASE_S.to_be_bytes());
        options.push(OPT_RENEWAL_TIME_VALUE, &RENEW_S.to_be_bytes());
        options.push(OPT_REBINDING_TIME_VALUE, &REBIND_S.to_be_bytes());
    }
    if let Some(id) = request.client_id {
        options.push(OPT_CLIENT_ID, id);
    }
    if !refused {
        options.describe(binding, request);
    }
    let listed: Vec<DhcpOption<'_>> =
        options.told.iter().map(|(kind, data)| DhcpOption { kind: *kind, data }).collect();
    let repr = DhcpRepr {
        message_type: kind,
        transaction_id: packet.transaction_id(),
        secs: 0,
        client_hardware_address: packet.client_hardware_address(),
        client_ip: if refused { Ipv4Address::UNSPECIFIED } else { packet.client_ip() },
        your_ip: if leased { binding.address } else { Ipv4Address::UNSPECIFIED },
        server_ip: Ipv4Address::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Address::UNSPECIFIED,
        broadcast: packet.flags().contains(DhcpFlags::BROADCAST),
        requested_ip: None,
        client_identifier: None,
        server_identifier: Some(binding.router),
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &listed,
    };
    let mut message = vec![0; repr.buffer_len().max(MESSAGE_LENGTH_MIN)];
    let emitted = repr.emit(&mut DhcpPacket::new_unchecked(message.as_mut_slice()));
    assert!(emitted.is_ok(), "the buffer has the length that the message asked for");
    // RFC 2131, 4.1: to `ciaddr` where the client has one; a refusal to all. Who informs
    // himself may have another of his own; all others have what they were leased.
    let client = packet.client_ip();
    let has_address = !refused && (client == binding.address || informed);
    let broadcast = !has_address && (refused || repr.broadcast);
    let destination = match (has_address, broadcast) {
        (true, _) => client,
        (false, true) => Ipv4Addr::BROADCAST,
        (false, false) => binding.address,
    };
    Reply { message, destination, broadcast }
}

struct Options {
    told: Vec<(u8, Vec<u8>)>,
    bytes_left: usize,
}

impl Options {
    fn new() -> Self {
        // The magic number, the message's type, the server and the end.
        Self { told: Vec::new(), bytes_left: OPTIONS_BYTES_MAX - (4 + 3 + 6 + 1) }
    }

    /// What there is no room for is left out: the most needed come first, and only
    /// a client with a long name of its own misses any.
    fn push(&mut self, kind: u8, data: &[u8]) {
        if let Some(left) = self.bytes_left.checked_sub(2 + data.len()) {
            self.told.push((kind, data.to_vec()));
            self.bytes_left = left;
        }
    }

    fn describe(&mut self, binding: &Binding, request: &Request<'_>) {
        let mut tell = |kind: u8, data: &[u8]| {
            if request.wants(kind) && !data.is_empty() {
                self.push(kind, data);
            }
        };
        tell(OPT_SUBNET_MASK, &binding.subnet.netmask().octets());
        // A client that understands option 121 ignores option 3 (RFC 3442), so
        // the default route stands in both.
        tell(OPT_CLASSLESS_STATIC_ROUTE, &classless_routes(binding.router));
        tell(OPT_ROUTER, &binding.router.octets());
        tell(OPT_DOMAIN_NAME_SERVER, &octets(&binding.dns, DNS_SERVERS_MAX));
        tell(OPT_HOST_NAME, binding.hostname.as_bytes());
        tell(OPT_DOMAIN_NAME, binding.domain.as_bytes());
        tell(OPT_INTERFACE_MTU, &binding.mtu.to_be_bytes());
        tell(OPT_BROADCAST_ADDRESS, &binding.subnet.broadcast().octets());
        tell(OPT_NTP_SERVERS, &octets(&binding.ntp, SERVERS_MAX));
        tell(OPT_NETBIOS_SERVERS, &octets(&binding.netbios, SERVERS_MAX));
        tell(OPT_NETBIOS_NODE, binding.netbios_node.as_slice());
    }
}

fn octets(addresses: &[Ipv4Addr], max: usize) -> Vec<u8> {
    addresses.iter().take(max).flat_map(Ipv4Addr::octets).collect()
}

/// `169.254.169.254/32` and the default route, both by the router.
fn classless_routes(router: Ipv4Addr) -> Vec<u8> {
    let mut data = vec![32];
    data.extend(METADATA_ADDRESS.octets());
    data.extend(router.octets());
    data.push(0);
    data.extend(router.octets());
    data
}

#[cfg(test)]
#[path = "dhcp_tests.rs"]
mod tests;
