//! Links as the kernel's routing netlink has them: look up, bring up, remove.
//!
//! Synchronous, one socket a value; a request and its answer, nothing more.

use std::io;

use model::Mac;
use netlink_packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, Nla as _};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoTun, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use super::Error;

/// The longest answer about one link; the kernel's is under 4 KiB.
const ANSWER_BYTES_MAX: usize = 32 * 1024;

/// `IFLA_TUN_OWNER` (linux/if_link.h).
const IFLA_TUN_OWNER: u16 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    pub ifindex: u32,
    pub mac: Mac,
    pub mtu: u32,
    pub kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// A tun or tap device and its owner.
    Tun {
        owner_uid: Option<u32>,
    },
    /// One end of a pair, the other in this namespace too.
    Veth,
    /// One end of a pair whose other end is in another namespace.
    VethToNamespace,
    Other,
}

pub struct Links(Socket);

impl Links {
    pub fn open() -> Result<Self, Error> {
        let socket = Socket::new(NETLINK_ROUTE).map_err(Error::Netlink)?;
        Ok(Self(socket))
    }

    /// The link of that name in this network namespace.
    pub fn find(&self, name: &str) -> Result<Option<Link>, Error> {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::IfName(name.to_owned()));
        match self.ask(RouteNetlinkMessage::GetLink(message), NLM_F_REQUEST) {
            Ok(Some(RouteNetlinkMessage::NewLink(link))) => Ok(Some(read(&link))),
            Ok(_) => Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
            Err(cause) => Err(Error::Link { device: name.to_owned(), deed: "look up", cause }),
        }
    }

    pub fn bring_up(&self, name: &str, ifindex: u32) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = ifindex;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        self.change(name, "bring up", RouteNetlinkMessage::SetLink(message))
    }

    /// Brings up a link on which the host's own stack keeps silent: no ARP.
    pub fn bring_up_silent(&self, name: &str, ifindex: u32, mtu: u32) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = ifindex;
        message.header.flags = LinkFlags::Up | LinkFlags::Noarp;
        message.header.change_mask = LinkFlags::Up | LinkFlags::Noarp;
        message.attributes.push(LinkAttribute::Mtu(mtu));
        self.change(name, "bring up", RouteNetlinkMessage::SetLink(message))
    }

    pub fn remove(&self, name: &str, ifindex: u32) -> Result<(), Error> {
        let mut message = LinkMessage::default();
        message.header.index = ifindex;
        self.change(name, "remove", RouteNetlinkMessage::DelLink(message))
    }

    fn change(
        &self,
        name: &str,
        deed: &'static str,
        request: RouteNetlinkMessage,
    ) -> Result<(), Error> {
        match self.ask(request, NLM_F_REQUEST | NLM_F_ACK) {
            Ok(_) => Ok(()),
            Err(cause) => Err(Error::Link { device: name.to_owned(), deed, cause }),
        }
    }

    /// One request, one answer: a message, or `None` for a bare acknowledgement.
    fn ask(
        &self,
        request: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Option<RouteNetlinkMessage>> {
        let mut message = NetlinkMessage::from(request);
        message.header.flags = flags;
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.0.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
        // A `&mut Vec` is written at its spare capacity.
        let mut answer = Vec::with_capacity(ANSWER_BYTES_MAX);
        self.0.recv_from(&mut answer, 0)?;
        let answer = <NetlinkMessage<RouteNetlinkMessage>>::deserialize(&answer)
            .map_err(|e| io::Error::new(io::ErrorKind::InvalidData, e.to_string()))?;
        match answer.payload {
            NetlinkPayload::InnerMessage(inner) => Ok(Some(inner)),
            NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
            _ => Ok(None),
        }
    }
}

fn read(message: &LinkMessage) -> Link {
    let mut link =
        Link { ifindex: message.header.index, mac: Mac([0; 6]), mtu: 0, kind: Kind::Other };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::Address(bytes) => {
                if let Ok(octets) = bytes.as_slice().try_into() {
                    link.mac = Mac(octets);
                }
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Tun)) => {
                link.kind = Kind::Tun { owner_uid: owner(infos) };
            }
            LinkAttribute::LinkInfo(infos) if infos.contains(&LinkInfo::Kind(InfoKind::Veth)) => {
                // The kernel tells the other end's namespace where it is not this one.
                let elsewhere = |a: &LinkAttribute| matches!(a, LinkAttribute::LinkNetNsId(_));
                link.kind = match message.attributes.iter().any(elsewhere) {
                    true => Kind::VethToNamespace,
                    false => Kind::Veth,
                };
            }
            _ => {}
        }
    }
    link
}

fn owner(infos: &[LinkInfo]) -> Option<u32> {
    infos
        .iter()
        .filter_map(|info| match info {
            LinkInfo::Data(InfoData::Tun(data)) => Some(data),
            _ => None,
        })
        .flatten()
        .find_map(|nla: &InfoTun| {
            let mut value = vec![0; nla.value_len()];
            nla.emit_value(&mut value);
            let uid = value.try_into().map(u32::from_ne_bytes).ok()?;
            (nla.kind() == IFLA_TUN_OWNER).then_some(uid)
        })
}
