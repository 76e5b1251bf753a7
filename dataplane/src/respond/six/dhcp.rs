//! The DHCPv6 server of one interface (RFC 8415, 3646), as a core: message in, message out.
//!
//! As its older sister it keeps no leases: the answer follows from the binding and the
//! question alone, and a restart forgets nothing.
//!
//! ```text
//! SOLICIT                          → ADVERTISE; REPLY where the client asks to be quick
//! REQUEST, RENEW (our id), REBIND  → REPLY: the interface's addresses; others with no life left
//! CONFIRM                          → REPLY: whether its addresses are this link's
//! RELEASE, DECLINE (our id)        → REPLY: heard
//! INFORMATION-REQUEST              → REPLY without addresses
//! another server's id              → silence: it chose that server
//! all else                         → silence, counted
//! ```

use std::net::Ipv6Addr;

use smoltcp::wire::EthernetAddress;

pub const CLIENT_PORT: u16 = 546;
pub const SERVER_PORT: u16 = 547;

/// As instances in EC2 are told: an address that was taken away is gone from its guest soon.
const PREFERRED_S: u32 = 140;
const VALID_S: u32 = 450;
/// RFC 8415 section 14.2: half and four fifths of the least preferred lifetime.
const RENEW_S: u32 = PREFERRED_S / 2;
const REBIND_S: u32 = PREFERRED_S / 5 * 4;

/// Addresses in one message, so that it fits into the least MTU with all else.
pub const ADDRESSES_TOLD_MAX: usize = 32;
/// Options of a message, and of one within; more are no client's.
const OPTIONS_MAX: usize = 64;
/// RFC 8415 section 11.1.
const DUID_BYTES_MAX: usize = 130;

// Messages by number (RFC 8415 section 7.3).
const SOLICIT: u8 = 1;
const ADVERTISE: u8 = 2;
const REQUEST: u8 = 3;
const CONFIRM: u8 = 4;
const RENEW: u8 = 5;
const REBIND: u8 = 6;
const REPLY: u8 = 7;
const RELEASE: u8 = 8;
const DECLINE: u8 = 9;
const INFORMATION_REQUEST: u8 = 11;

// Options by number (RFC 8415 section 21; 23 and 24: RFC 3646).
const OPT_CLIENT_ID: u16 = 1;
const OPT_SERVER_ID: u16 = 2;
const OPT_IA_NA: u16 = 3;
const OPT_IA_TA: u16 = 4;
const OPT_IA_ADDRESS: u16 = 5;
const OPT_OPTION_REQUEST: u16 = 6;
const OPT_STATUS: u16 = 13;
const OPT_RAPID_COMMIT: u16 = 14;
const OPT_DNS_SERVERS: u16 = 23;
const OPT_DOMAIN_LIST: u16 = 24;
const OPT_IA_PD: u16 = 25;

// RFC 8415 section 21.13.
const SUCCESS: u16 = 0;
const NO_ADDRESSES: u16 = 2;
const NOT_ON_LINK: u16 = 4;
const NO_PREFIX: u16 = 6;

/// What one interface is told.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Binding {
    pub addresses: Vec<Ipv6Addr>,
    pub dns: Vec<Ipv6Addr>,
    pub domain: String,
}

/// Why there was no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Silence {
    /// Not a message that a client may send.
    Malformed,
    /// The client chose another server, or asks about nothing.
    NotOurs,
}

/// Our identifier, DUID-LL (RFC 8415 section 11.4): the router's, on every link.
fn server_id() -> [u8; 10] {
    let mut id = [0, 3, 0, 1, 0, 0, 0, 0, 0, 0];
    id[4..].copy_from_slice(EthernetAddress(ebpf::GATEWAY_MAC).as_bytes());
    id
}

/// Addresses, temporary ones or prefixes that the client wants, under its number.
struct Association {
    kind: u16,
    id: [u8; 4],
    addresses: Vec<Ipv6Addr>,
}

struct Request<'a> {
    kind: u8,
    transaction: [u8; 3],
    client: Option<&'a [u8]>,
    server: Option<&'a [u8]>,
    quick: bool,
    /// Options that it names; one that names none gets all.
    wanted: Option<&'a [u8]>,
    associations: Vec<Association>,
}

impl<'a> Request<'a> {
    fn parse(message: &'a [u8]) -> Option<Self> {
        let (&[kind, t0, t1, t2], rest) = message.split_first_chunk()?;
        let mut request = Self {
            kind,
            transaction: [t0, t1, t2],
            client: None,
            server: None,
            quick: false,
            wanted: None,
            associations: Vec::new(),
        };
        for (option, data) in options(rest)? {
            match option {
                OPT_CLIENT_ID if !(1..=DUID_BYTES_MAX).contains(&data.len()) => return None,
                OPT_CLIENT_ID => request.client = Some(data),
                OPT_SERVER_ID => request.server = Some(data),
                OPT_RAPID_COMMIT => request.quick = true,
                OPT_OPTION_REQUEST => request.wanted = Some(data),
                OPT_IA_NA | OPT_IA_TA | OPT_IA_PD => {
                    request.associations.push(Association::parse(option, data)?);
                }
                _ => {}
            }
        }
        Some(request)
    }

    fn wants(&self, option: u16) -> bool {
        self.wanted.is_none_or(|list| list.chunks_exact(2).any(|o| o == option.to_be_bytes()))
    }
}

impl Association {
    fn parse(kind: u16, data: &[u8]) -> Option<Self> {
        let (id, _) = data.split_first_chunk::<4>()?;
        let head = if kind == OPT_IA_TA { 4 } else { 12 };
        let mut addresses = Vec::new();
        for (option, data) in options(data.get(head..)?)? {
            if option == OPT_IA_ADDRESS {
                let (address, _) = data.split_first_chunk::<16>()?;
                data.get(..24)?;
                addresses.push(Ipv6Addr::from(*address));
            }
        }
        Some(Self { kind, id: *id, addresses })
    }
}

/// Options one after the other; `None` where one is cut short or they are too many.
fn options(mut bytes: &[u8]) -> Option<Vec<(u16, &[u8])>> {
    let mut options = Vec::new();
    while !bytes.is_empty() {
        let (&[k0, k1, l0, l1], rest) = bytes.split_first_chunk()?;
        let length = usize::from(u16::from_be_bytes([l0, l1]));
        options.push((u16::from_be_bytes([k0, k1]), rest.get(..length)?));
        bytes = &rest[length..];
        if options.len() > OPTIONS_MAX {
            return None;
        }
    }
    Some(options)
}

/// Answers one message, the UDP payload of a packet from the interface.
pub fn answer(binding: &Binding, message: &[u8]) -> Result<Vec<u8>, Silence> {
    let request = Request::parse(message).ok_or(Silence::Malformed)?;
    may_ask(&request)?;
    let quick = request.kind == SOLICIT && request.quick;
    let kind = if request.kind == SOLICIT && !quick { ADVERTISE } else { REPLY };
    let mut reply = Message::new(kind, &request);
    if quick {
        reply.option(OPT_RAPID_COMMIT, &[]);
    }
    match request.kind {
        CONFIRM => {
            let mut asked = request.associations.iter().flat_map(|a| &a.addresses).peekable();
            if asked.peek().is_none() {
                return Err(Silence::NotOurs);
            }
            let ours = asked.all(|address| binding.addresses.contains(address));
            reply.status(if ours { SUCCESS } else { NOT_ON_LINK });
        }
        RELEASE | DECLINE => reply.status(SUCCESS),
        _ => {
            reply.lease(binding, &request);
            reply.describe(binding, &request);
        }
    }
    Ok(reply.0)
}

/// RFC 8415 sections 16.2 to 16.12: which identifiers a message must have and must not.
fn may_ask(request: &Request<'_>) -> Result<(), Silence> {
    let known = request.client.is_some();
    let right = match (request.kind, request.server) {
        (SOLICIT | CONFIRM | REBIND, server) => known && server.is_none(),
        (REQUEST | RENEW | RELEASE | DECLINE, Some(_)) => known,
        (INFORMATION_REQUEST, _) => request.associations.is_empty(),
        _ => false,
    };
    match request.server {
        _ if !right => Err(Silence::Malformed),
        Some(server) if server != server_id() => Err(Silence::NotOurs),
        _ => Ok(()),
    }
}

struct Message(Vec<u8>);

impl Message {
    fn new(kind: u8, request: &Request<'_>) -> Self {
        let [t0, t1, t2] = request.transaction;
        let mut message = Self(vec![kind, t0, t1, t2]);
        if let Some(client) = request.client {
            message.option(OPT_CLIENT_ID, client);
        }
        message.option(OPT_SERVER_ID, &server_id());
        message
    }

    fn option(&mut self, kind: u16, data: &[u8]) {
        self.0.extend(option(kind, data));
    }

    fn status(&mut self, code: u16) {
        self.option(OPT_STATUS, &code.to_be_bytes());
    }

    /// All addresses go to the first association that may have them.
    fn lease(&mut self, binding: &Binding, request: &Request<'_>) {
        let mut left = &binding.addresses[..binding.addresses.len().min(ADDRESSES_TOLD_MAX)];
        for association in &request.associations {
            let mut data = association.id.to_vec();
            if association.kind != OPT_IA_TA {
                let (renew, rebind) = if left.is_empty() { (0, 0) } else { (RENEW_S, REBIND_S) };
                data.extend([renew, rebind].map(u32::to_be_bytes).concat());
            }
            match association.kind {
                OPT_IA_NA if !left.is_empty() => {
                    let mut told = addresses(left, PREFERRED_S, VALID_S);
                    if matches!(request.kind, RENEW | REBIND) {
                        let gone = association.addresses.iter().filter(|a| !left.contains(a));
                        let gone: Vec<_> =
                            gone.take(ADDRESSES_TOLD_MAX - left.len()).copied().collect();
                        told.extend(addresses(&gone, 0, 0));
                    }
                    data.extend(told);
                    left = &[];
                }
                OPT_IA_PD => data.extend(option(OPT_STATUS, &NO_PREFIX.to_be_bytes())),
                _ => data.extend(option(OPT_STATUS, &NO_ADDRESSES.to_be_bytes())),
            }
            self.option(association.kind, &data);
        }
    }

    fn describe(&mut self, binding: &Binding, request: &Request<'_>) {
        let servers: Vec<u8> = binding.dns.iter().flat_map(Ipv6Addr::octets).collect();
        let domain = labels(&binding.domain);
        for (kind, data) in [(OPT_DNS_SERVERS, servers), (OPT_DOMAIN_LIST, domain)] {
            if !data.is_empty() && request.wants(kind) {
                self.option(kind, &data);
            }
        }
    }
}

fn option(kind: u16, data: &[u8]) -> Vec<u8> {
    let length = data.len() as u16;
    [&kind.to_be_bytes(), &length.to_be_bytes(), data].concat()
}

fn addresses(addresses: &[Ipv6Addr], preferred_s: u32, valid_s: u32) -> Vec<u8> {
    let one = |address: &Ipv6Addr| {
        let lives = [preferred_s, valid_s].map(u32::to_be_bytes).concat();
        option(OPT_IA_ADDRESS, &[&address.octets()[..], &lives].concat())
    };
    addresses.iter().flat_map(one).collect()
}

/// RFC 1035 section 3.1, uncompressed; nothing of a name that cannot be written so.
fn labels(name: &str) -> Vec<u8> {
    let labels: Vec<&str> = name.split('.').filter(|label| !label.is_empty()).collect();
    if labels.is_empty() || labels.iter().any(|label| label.len() > 63) {
        return Vec::new();
    }
    let written = labels.iter().flat_map(|l| std::iter::once(l.len() as u8).chain(l.bytes()));
    written.chain([0]).collect()
}

#[cfg(test)]
#[path = "dhcp_tests.rs"]
mod tests;
