//! One interface's responder: DHCP at once, metadata over a TCP of its own.
//!
//! smoltcp runs here on bare IP: the program on the tap has let only the
//! interface's own addresses through, and the frame that goes back is addressed
//! by ifindex, so there is no neighbour to ask for and none to be fooled by.
//!
//! Checksums are verified on the way in and computed on the way out. A guest
//! that leaves them to its network card sends partial ones; the kernel completes
//! them before it hands a frame to a tap that was opened without
//! `TUNSETOFFLOAD`, as the punt device is.

use std::collections::VecDeque;
use std::net::Ipv4Addr;
use std::time::Duration;

use model::InterfaceId;
use smoltcp::iface::{Config, Interface, SocketHandle, SocketSet};
use smoltcp::phy::{self, Device, DeviceCapabilities, Medium};
use smoltcp::socket::tcp;
use smoltcp::time::Instant;
use smoltcp::wire::{
    EthernetAddress, EthernetFrame, EthernetProtocol, HardwareAddress, IpAddress, IpCidr,
    IpProtocol, Ipv4Packet, Ipv4Repr, TcpPacket, UdpPacket, UdpRepr,
};

use super::Served;
use super::dhcp::{self, METADATA_ADDRESS, Silence};
use super::limit::Bucket;
use super::metadata::{Service, Session, TokenKey};

const METADATA_PORT: u16 = 80;

/// Metadata connections an interface may hold; a client needs one or two. At
/// the limit the one that has been quiet longest gives way.
const CONNECTIONS_MAX: usize = 16;

/// A connection's buffers: a request head and a half, and one full user-data
/// document. With [`CONNECTIONS_MAX`] an interface holds under 512 KiB.
const RECEIVE_BYTES: usize = 4 * 1024;
const SEND_BYTES: usize = 16 * 1024;

/// How long a connection may be quiet, and a request may take to arrive whole.
const PATIENCE: Duration = Duration::from_secs(10);

/// The metadata service is never more than one hop away, so an answer that is
/// forwarded dies (EC2's default hop limit).
const HOP_LIMIT: u8 = 1;

/// DHCP answers may cross what a guest puts between (its own bridge), no router.
const DHCP_HOP_LIMIT: u8 = 64;

/// Frames that wait to be written in one turn; more are lost as on any wire.
const FRAMES_OUT_MAX: usize = 256;

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    pub dhcp_answered: u64,
    /// Malformed, or not ours to answer.
    pub dhcp_ignored: u64,
    pub metadata_answered: u64,
    /// Neither DHCP nor metadata, or not from the interface's own addresses.
    pub ignored: u64,
    /// Beyond the rate that an interface has.
    pub limited: u64,
}

impl Counters {
    /// As `status` names them.
    pub fn named(&self) -> impl Iterator<Item = (&'static str, u64)> {
        [
            ("respond-dhcp-answered", self.dhcp_answered),
            ("respond-dhcp-ignored", self.dhcp_ignored),
            ("respond-metadata-answered", self.metadata_answered),
            ("respond-ignored", self.ignored),
            ("respond-limited", self.limited),
        ]
        .into_iter()
    }
}

pub struct Responder {
    served: Served,
    bucket: Bucket,
    counters: Counters,
    wire: Wire,
    metadata: Option<Metadata>,
}

impl Responder {
    pub fn new(
        served: Served,
        key: &TokenKey,
        random: &mut impl FnMut() -> u128,
        now: Duration,
    ) -> Self {
        let mtu = usize::from(served.binding.mtu);
        let mut responder = Self {
            served: Served { metadata: None, ..served.clone() },
            bucket: Bucket::full(now),
            counters: Counters::default(),
            wire: Wire { incoming: None, outgoing: VecDeque::new(), mtu },
            metadata: None,
        };
        responder.replace(served, key, random, now);
        responder
    }

    pub fn interface(&self) -> InterfaceId {
        self.served.interface
    }

    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// New answers for the same interface; connections stay where they can.
    pub fn replace(
        &mut self,
        served: Served,
        key: &TokenKey,
        random: &mut impl FnMut() -> u128,
        now: Duration,
    ) {
        self.wire.mtu = usize::from(served.binding.mtu);
        match (&served.metadata, &mut self.metadata) {
            (None, metadata) => *metadata = None,
            (Some(documents), Some(metadata)) => metadata.service.replace(documents.clone()),
            (Some(documents), metadata @ None) => {
                let service =
                    Service::new(served.interface, documents.clone(), key.clone(), random());
                *metadata = Some(Metadata::new(service, &mut self.wire, random(), now));
            }
        }
        self.served = served;
    }

    /// Takes a frame without its destination address, as the guest sent it.
    pub fn receive(&mut self, rest: &[u8], now: Duration) {
        if !self.bucket.admit(now) {
            self.counters.limited += 1;
            return;
        }
        match Question::parse(rest, &self.served) {
            Some(Question::Dhcp(message)) => self.answer_dhcp(message),
            Some(Question::Metadata(packet)) => match &mut self.metadata {
                Some(metadata) => {
                    self.wire.incoming = Some(packet.to_vec());
                    metadata.turn(&mut self.wire, &mut self.counters, now);
                }
                None => self.counters.ignored += 1,
            },
            None => self.counters.ignored += 1,
        }
    }

    pub fn elapse(&mut self, now: Duration) {
        if let Some(metadata) = &mut self.metadata {
            metadata.turn(&mut self.wire, &mut self.counters, now);
        }
    }

    pub fn next_due(&mut self, now: Duration) -> Option<Duration> {
        self.metadata.as_mut()?.next_due(now)
    }

    /// Moves what is to be sent into `out`, as frames to `destination`.
    pub fn drain(&mut self, destination: [u8; 6], out: &mut Vec<Vec<u8>>) {
        for packet in self.wire.outgoing.drain(..) {
            let mut frame = Vec::with_capacity(14 + packet.len());
            frame.extend(destination);
            frame.extend(ebpf::GATEWAY_MAC);
            frame.extend(u16::from(EthernetProtocol::Ipv4).to_be_bytes());
            frame.extend(packet);
            out.push(frame);
        }
    }

    fn answer_dhcp(&mut self, message: &[u8]) {
        match dhcp::answer(&self.served.binding, message) {
            Ok(reply) => {
                self.counters.dhcp_answered += 1;
                self.wire.push(dhcp_packet(self.served.binding.router, &reply));
            }
            Err(silence) => {
                self.counters.dhcp_ignored += 1;
                if silence == Silence::Heard {
                    tracing::debug!(interface = %self.served.interface, "released its address");
                }
            }
        }
    }
}

/// What a frame asks, once its layers were found whole and its sender right.
enum Question<'a> {
    /// The UDP payload.
    Dhcp(&'a [u8]),
    /// The IPv4 packet.
    Metadata(&'a [u8]),
}

impl<'a> Question<'a> {
    /// `rest` is the frame from its source address on.
    fn parse(rest: &'a [u8], served: &Served) -> Option<Self> {
        const SOURCE_AND_TYPE: usize = 8;
        let (head, packet) = rest.split_first_chunk::<SOURCE_AND_TYPE>()?;
        let source = EthernetAddress::from_bytes(&head[..6]);
        let ipv4 = u16::from(EthernetProtocol::Ipv4).to_be_bytes();
        if source.0 != served.binding.mac.octets() || head[6..] != ipv4 {
            return None;
        }
        let ip = Ipv4Packet::new_checked(packet).ok()?;
        // RFC 2131 and TCP both begin with whole datagrams.
        if ip.more_frags() || ip.frag_offset() != 0 || !ip.verify_checksum() {
            return None;
        }
        let own = ip.src_addr() == served.binding.address;
        match ip.next_header() {
            IpProtocol::Udp if own || ip.src_addr().is_unspecified() => {
                let length = usize::from(ip.total_len());
                let header = usize::from(ip.header_len());
                let udp = UdpPacket::new_checked(packet.get(header..length)?).ok()?;
                let (from, to) = (ip.src_addr().into(), ip.dst_addr().into());
                let dhcp = udp.dst_port() == smoltcp::wire::DHCP_SERVER_PORT
                    && udp.verify_checksum(&from, &to);
                dhcp.then(|| udp.payload()).map(Self::Dhcp)
            }
            IpProtocol::Tcp if own && ip.dst_addr() == METADATA_ADDRESS => {
                let length = usize::from(ip.total_len());
                let tcp = packet.get(usize::from(ip.header_len())..length)?;
                let tcp = TcpPacket::new_checked(tcp).ok()?;
                (tcp.dst_port() == METADATA_PORT).then(|| Self::Metadata(&packet[..length]))
            }
            _ => None,
        }
    }
}

fn dhcp_packet(server: Ipv4Addr, reply: &dhcp::Reply) -> Vec<u8> {
    let checksums = phy::ChecksumCapabilities::default();
    let udp = UdpRepr {
        src_port: smoltcp::wire::DHCP_SERVER_PORT,
        dst_port: smoltcp::wire::DHCP_CLIENT_PORT,
    };
    let ip = Ipv4Repr {
        src_addr: server,
        dst_addr: reply.destination,
        next_header: IpProtocol::Udp,
        payload_len: udp.header_len() + reply.message.len(),
        hop_limit: DHCP_HOP_LIMIT,
    };
    let mut bytes = vec![0; ip.buffer_len() + ip.payload_len];
    let mut packet = Ipv4Packet::new_unchecked(bytes.as_mut_slice());
    ip.emit(&mut packet, &checksums);
    udp.emit(
        &mut UdpPacket::new_unchecked(packet.payload_mut()),
        &IpAddress::Ipv4(server),
        &IpAddress::Ipv4(reply.destination),
        reply.message.len(),
        |payload| payload.copy_from_slice(&reply.message),
        &checksums,
    );
    bytes
}

/// The metadata service behind its TCP: one spare listener while there is room.
struct Metadata {
    service: Service,
    stack: Interface,
    sockets: SocketSet<'static>,
    connections: Vec<Connection>,
}

struct Connection {
    handle: SocketHandle,
    session: Session,
    /// What is written but does not fit the socket's buffer yet.
    unsent: VecDeque<u8>,
    /// Since when it has been quiet, or since when its request has been coming.
    since: Duration,
    /// Whether a peer has come.
    taken: bool,
}

impl Metadata {
    fn new(service: Service, wire: &mut Wire, seed: u128, now: Duration) -> Self {
        let mut config = Config::new(HardwareAddress::Ip);
        // Initial sequence numbers come from it; the lower half is as random as the whole.
        config.random_seed = seed as u64;
        let mut stack = Interface::new(config, wire, instant(now));
        stack.update_ip_addrs(|addresses| {
            let pushed = addresses.push(IpCidr::new(IpAddress::Ipv4(METADATA_ADDRESS), 32));
            assert!(pushed.is_ok(), "a new interface has room for one address");
        });
        let mut metadata =
            Self { service, stack, sockets: SocketSet::new(Vec::new()), connections: Vec::new() };
        metadata.listen(now);
        metadata
    }

    /// One turn of the stack: packets in, requests answered, packets out.
    fn turn(&mut self, wire: &mut Wire, counters: &mut Counters, now: Duration) {
        loop {
            self.stack.poll(instant(now), wire, &mut self.sockets);
            let mut moved = false;
            for connection in &mut self.connections {
                let socket = self.sockets.get_mut::<tcp::Socket<'_>>(connection.handle);
                moved |= connection.turn(socket, &mut self.service, counters, now);
            }
            if !moved {
                break;
            }
        }
        self.reap();
        self.listen(now);
    }

    /// Forgets connections that have ended.
    fn reap(&mut self) {
        let sockets = &mut self.sockets;
        self.connections.retain(|connection| {
            let ended = !sockets.get::<tcp::Socket<'_>>(connection.handle).is_open();
            if ended {
                sockets.remove(connection.handle);
            }
            !ended
        });
    }

    /// Keeps one listener spare, at the cost of the quietest connection.
    fn listen(&mut self, now: Duration) {
        if self.connections.iter().any(|c| !c.taken) {
            return;
        }
        if self.connections.len() >= CONNECTIONS_MAX {
            let quietest = self.connections.iter().enumerate().min_by_key(|(_, c)| c.since);
            if let Some((at, _)) = quietest {
                let connection = self.connections.swap_remove(at);
                self.sockets.remove(connection.handle);
            }
        }
        let mut socket = tcp::Socket::new(
            tcp::SocketBuffer::new(vec![0; RECEIVE_BYTES]),
            tcp::SocketBuffer::new(vec![0; SEND_BYTES]),
        );
        socket.set_hop_limit(Some(HOP_LIMIT));
        socket.set_nagle_enabled(false);
        socket.set_ack_delay(None);
        // A peer that no longer acknowledges is given up after this long.
        socket.set_timeout(Some(duration(PATIENCE)));
        let listening = socket.listen((METADATA_ADDRESS, METADATA_PORT));
        assert!(listening.is_ok(), "a new socket may listen on a port that is not zero");
        self.connections.push(Connection {
            handle: self.sockets.add(socket),
            session: Session::default(),
            unsent: VecDeque::new(),
            since: now,
            taken: false,
        });
    }

    fn next_due(&mut self, now: Duration) -> Option<Duration> {
        let stack = self
            .stack
            .poll_at(instant(now), &self.sockets)
            .map(|at| Duration::from_micros(at.total_micros().max(0).unsigned_abs()));
        let patience = self.connections.iter().filter(|c| c.taken).map(|c| c.since + PATIENCE);
        stack.into_iter().chain(patience).min()
    }
}

impl Connection {
    /// Moves bytes both ways; whether anything moved, so that the stack has more to do.
    fn turn(
        &mut self,
        socket: &mut tcp::Socket<'_>,
        service: &mut Service,
        counters: &mut Counters,
        now: Duration,
    ) -> bool {
        if !self.taken && socket.state() != tcp::State::Listen {
            (self.taken, self.since) = (true, now);
        }
        if !self.taken || !socket.is_open() {
            return false;
        }
        if now >= self.since + PATIENCE {
            return self.give_up(socket, now);
        }
        let mut moved = self.flush(socket);
        // One answer at a time: nothing is read while the last is still here.
        while self.unsent.is_empty() {
            let read = self.read(socket, now);
            match self.session.next_answer(service, now) {
                Some(answer) => {
                    counters.metadata_answered += 1;
                    self.unsent.extend(answer);
                    self.since = now;
                    self.flush(socket);
                    moved = true;
                }
                None if read => moved = true,
                None => break,
            }
        }
        let peer_done = !socket.may_recv() && socket.recv_queue() == 0;
        let over = self.session.closing() || peer_done;
        if over && self.unsent.is_empty() && socket.may_send() {
            socket.close();
            moved = true;
        }
        moved
    }

    fn read(&mut self, socket: &mut tcp::Socket<'_>, now: Duration) -> bool {
        if self.session.closing() || !socket.can_recv() {
            return false;
        }
        let fresh = !self.session.in_request();
        let session = &mut self.session;
        let taken = socket.recv(|bytes| {
            let taken = session.receive(bytes);
            (taken, taken)
        });
        // The request's time runs from its first byte; later ones do not extend it.
        if fresh {
            self.since = now;
        }
        taken.is_ok_and(|n| n > 0)
    }

    fn flush(&mut self, socket: &mut tcp::Socket<'_>) -> bool {
        if self.unsent.is_empty() {
            return false;
        }
        let sent = socket.send_slice(self.unsent.make_contiguous()).unwrap_or(0);
        self.unsent.drain(..sent);
        sent > 0
    }

    /// Its time is up: told so where it was in the middle of a request, and closed.
    fn give_up(&mut self, socket: &mut tcp::Socket<'_>, now: Duration) -> bool {
        if self.session.in_request() && !self.session.closing() && self.unsent.is_empty() {
            self.unsent.extend(self.session.time_out());
            self.flush(socket);
            socket.close();
            self.since = now;
        } else {
            socket.abort();
        }
        true
    }
}

/// The device that smoltcp sees: at most one packet in, a bounded queue out.
struct Wire {
    incoming: Option<Vec<u8>>,
    outgoing: VecDeque<Vec<u8>>,
    mtu: usize,
}

impl Wire {
    fn push(&mut self, packet: Vec<u8>) {
        if self.outgoing.len() < FRAMES_OUT_MAX {
            self.outgoing.push_back(packet);
        }
    }
}

struct Incoming(Vec<u8>);
struct Outgoing<'a>(&'a mut Wire);

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

fn instant(now: Duration) -> Instant {
    Instant::from_micros(i64::try_from(now.as_micros()).unwrap_or(i64::MAX))
}

fn duration(d: Duration) -> smoltcp::time::Duration {
    smoltcp::time::Duration::from_micros(u64::try_from(d.as_micros()).unwrap_or(u64::MAX))
}

/// Where a frame's payload begins; pinned, because `receive` is given the frame
/// without its destination.
const _: () = assert!(EthernetFrame::<&[u8]>::header_len() == 14);
