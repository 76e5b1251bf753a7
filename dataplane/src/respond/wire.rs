//! The device that an interface's smoltcp runs on: bare IP, one packet in at a
//! time, a bounded queue out; and how a datagram is put together.

use std::collections::VecDeque;
use std::net::SocketAddr;

use smoltcp::phy::{self, ChecksumCapabilities, Device, DeviceCapabilities, Medium};
use smoltcp::time::Instant;
use smoltcp::wire::{
    IPV4_HEADER_LEN, IPV6_HEADER_LEN, IpProtocol, IpRepr, UDP_HEADER_LEN, UdpPacket, UdpRepr,
};

/// Frames that wait to be written in one turn; more are lost as on any wire.
const FRAMES_OUT_MAX: usize = 256;

pub struct Wire {
    pub incoming: Option<Vec<u8>>,
    pub outgoing: VecDeque<Vec<u8>>,
    pub mtu: usize,
}

impl Wire {
    /// Queues a packet; what the queue has no room for is lost, as on any wire.
    pub fn push(&mut self, packet: Vec<u8>) {
        if self.outgoing.len() < FRAMES_OUT_MAX {
            self.outgoing.push_back(packet);
        }
    }
}

pub struct Incoming(Vec<u8>);
pub struct Outgoing<'a>(&'a mut Wire);

impl phy::RxToken for Incoming {
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        f(&self.0)
    }
}

impl phy::TxToken for Outgoing<'_> {
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, length: usize, f: F) -> R {
        let mut packet = vec![0; length];
        let result = f(&mut packet);
        self.0.push(packet);
        result
    }
}

impl Device for Wire {
    type RxToken<'a> = Incoming;
    type TxToken<'a> = Outgoing<'a>;

    fn receive(&mut self, _: Instant) -> Option<(Incoming, Outgoing<'_>)> {
        let packet = self.incoming.take()?;
        Some((Incoming(packet), Outgoing(self)))
    }

    fn transmit(&mut self, _: Instant) -> Option<Outgoing<'_>> {
        (self.outgoing.len() < FRAMES_OUT_MAX).then_some(Outgoing(self))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ip;
        capabilities.max_transmission_unit = self.mtu;
        capabilities
    }
}

/// Of answers over UDP.
const HOP_LIMIT: u8 = 64;

/// An IP packet with `message` in UDP; both ends are of one family.
pub fn datagram(from: SocketAddr, to: SocketAddr, message: &[u8]) -> Vec<u8> {
    let checksums = ChecksumCapabilities::default();
    let (source, destination) = (from.ip().into(), to.ip().into());
    let length = UDP_HEADER_LEN + message.len();
    let ip = IpRepr::new(source, destination, IpProtocol::Udp, length, HOP_LIMIT);
    let mut packet = vec![0; ip.buffer_len()];
    ip.emit(packet.as_mut_slice(), &checksums);
    UdpRepr { src_port: from.port(), dst_port: to.port() }.emit(
        &mut UdpPacket::new_unchecked(&mut packet[ip.header_len()..]),
        &source,
        &destination,
        message.len(),
        |payload| payload.copy_from_slice(message),
        &checksums,
    );
    packet
}

/// Bytes of a message to `to` that fit into one packet.
pub fn room_for_message(mtu: usize, to: SocketAddr) -> usize {
    let header = if to.is_ipv4() { IPV4_HEADER_LEN } else { IPV6_HEADER_LEN };
    mtu - header - UDP_HEADER_LEN
}
