//! The decision on a packet: pure, the same in the kernel, in the model test and
//! behind `netctl why`.
//!
//! ```text
//!  (IPv6 enters by `six`, and goes on here in `forward` and `arrive`; what is dropped before
//!  anything is spent on it, is in `early`.)
//!  from_instance   anti-spoof ▶ punt? ▶ route ▶ egress ▶ ingress of a local receiver ▶ go on
//!  from_world      ours? ▶ ingress ▶ go on        (else the host's own stack)
//!  from_punt       which guest? ▶ go on
//! ```
//! A packet is judged once, where it enters: the sender's device or the uplink.
//! What comes from a guest never reaches the host's own stack.

use crate::acl::{enters, leaves};
use crate::arp::{arp_from_instance, arp_from_world};
use crate::fragment::follows;
use crate::icmp::Tell;
use crate::ip::Ip;
use crate::judge::{Ask, judge, related, sent_by_instance, sent_by_remote};
use crate::layout::{
    DNS, Elastic, FlowKey, Interface, LocalKey, METADATA, RANGES_LATE, RESOLVER, SECONDARIES,
    SOURCE_CHECK, TO_NAMESPACE,
};
use crate::packet::{ARP, Frame, Head, IPV4, Kind, Packet, Part, VLAN, VLAN_OUTER};
use crate::punt::{ifindex_of_number, punt_number};
use crate::reason::Reason;
use crate::rewrite::Rewrite;
use crate::route::{Way, way};
use crate::tables::Tables;
use crate::verdict::{
    Action, FlowWrite, PAYS_IN, PAYS_IN_SECOND, PAYS_OUT, PAYS_SERVICE, Verdict, Work,
};
use crate::{DNS_ADDRESS, GATEWAY, METADATA_ADDRESS, TIME_ADDRESS};

pub(crate) const METADATA_PORT: u16 = 80;
pub(crate) const TIME_PORT: u16 = 123;
pub(crate) const DNS_PORT: u16 = 53;

/// Where a frame came in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrival {
    pub ifindex: u32,
    /// Whether the device took a VLAN tag off.
    pub vlan: bool,
    /// Whether the frame was addressed to the device itself.
    pub to_host: bool,
    pub now_s: u32,
}

/// A frame that a guest sent.
#[inline(always)]
pub fn from_instance<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head,
    arrival: &Arrival,
    work: &mut Work,
) {
    work.begin();
    let Some(interface) = tables.interface(arrival.ifindex) else {
        return work.verdict.refuse(Reason::NoInterface);
    };
    work.verdict.slots[0] = interface.slot;
    work.verdict.bill(interface, PAYS_OUT);
    if let Err(reason) = instance_sends(tables, frame, head, arrival, interface, work) {
        work.verdict.refuse(reason);
    }
}

#[inline(always)]
fn instance_sends<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head,
    arrival: &Arrival,
    interface: &Interface,
    work: &mut Work,
) -> Result<(), Reason> {
    if arrival.vlan {
        return Err(Reason::Vlan);
    }
    if head.source_mac() != interface.mac_number() {
        return Err(Reason::SpoofedMac);
    }
    match head.ether_type {
        IPV4 => {}
        ARP => return arp_from_instance(tables, frame, interface, work),
        VLAN | VLAN_OUTER => return Err(Reason::Vlan),
        _ => return Err(Reason::EtherType),
    }
    work.packet.parse(frame, head)?;
    let packet = &work.packet;
    if packet.is_dhcp_request() {
        if packet.source != interface.address && packet.source != 0 {
            return Err(Reason::SpoofedAddress);
        }
        return punt(interface, head, Reason::PuntDhcp, work);
    }
    if packet.is_dhcp_reply() {
        return Err(Reason::SpoofedDhcp);
    }
    let source = own(tables, interface, packet.source);
    if !source.is() && interface.flags & SOURCE_CHECK != 0 {
        return Err(Reason::SpoofedAddress);
    }
    if packet.destination == METADATA_ADDRESS {
        if interface.flags & METADATA == 0 {
            return Err(Reason::NoMetadata);
        }
        if packet.kind != Kind::Tcp || packet.destination_port != METADATA_PORT {
            return Err(Reason::NoRoute);
        }
        return punt(interface, head, Reason::PuntMetadata, work);
    }
    let asks_time = packet.kind == Kind::Udp && packet.destination_port == TIME_PORT;
    if asks_time && packet.destination == TIME_ADDRESS {
        return punt(interface, head, Reason::PuntTime, work);
    }
    if packet.destination_port == DNS_PORT && asks_name(tables, interface, packet) {
        return punt(interface, head, Reason::PuntDns, work);
    }
    let Some(route) = route(tables, interface, source, work)? else { return Ok(()) };
    forward(tables, frame, interface, &route, arrival.now_s, work)
}

/// Of a packet to port 53: whether it is for us.
#[inline(always)]
fn asks_name<T: Tables + ?Sized>(tables: &T, interface: &Interface, packet: &Packet) -> bool {
    let transport = packet.kind == Kind::Udp || packet.kind == Kind::Tcp;
    if !transport || interface.flags & DNS == 0 {
        return false;
    }
    let address = packet.destination;
    let key = LocalKey { vpc: interface.vpc, address, zero: 0 };
    address == DNS_ADDRESS || tables.local(&key).is_some_and(|local| local.service == RESOLVER)
}

/// Whether a private address is the interface's own, and the elastic one that stands for
/// it (0: none); in one register, for the verifier takes no half of a pair that was
/// never written.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Own(u64);

impl Own {
    #[inline(always)]
    pub const fn is(self) -> bool {
        self.0 != 0
    }

    #[inline(always)]
    const fn elastic(self) -> u32 {
        self.0 as u32
    }
}

#[inline(always)]
pub fn own<T: Tables + ?Sized>(tables: &T, interface: &Interface, address: u32) -> Own {
    const IS: u64 = 1 << 32;
    if address == interface.address {
        return Own(IS | u64::from(interface.elastic));
    }
    if interface.flags & SECONDARIES == 0 {
        return Own(0);
    }
    match tables.local(&LocalKey { vpc: interface.vpc, address, zero: 0 }) {
        Some(local) if local.ifindex == interface.ifindex => Own(IS | u64::from(local.elastic)),
        _ => Own(0),
    }
}

#[inline(always)]
fn punt(interface: &Interface, head: &Head, reason: Reason, work: &mut Work) -> Result<(), Reason> {
    if interface.punt == 0 {
        return Err(Reason::NoRoute);
    }
    if work.packet.part != Part::Whole {
        return Err(Reason::Fragment);
    }
    let verdict = &mut work.verdict;
    verdict.rewrite = Rewrite::of(head);
    verdict.rewrite.destination_mac = punt_number(interface.ifindex);
    verdict.ifindex = interface.punt;
    verdict.pays = PAYS_SERVICE;
    verdict.accept(Action::Deliver, reason);
    Ok(())
}

/// The way of a guest's packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Route<A = u32> {
    /// The local receiver's device, or 0: out by the uplink.
    pub ifindex: u32,
    /// Of the uplink.
    pub next_hop: A,
    /// Addresses as the next party sees them.
    pub source: A,
    pub destination: A,
    /// What the receiver's group rules know the sender by.
    pub sender_identity: u64,
    /// What the sender's group rules know the receiver by.
    pub receiver_identity: u64,
    pub same_subnet: bool,
    /// The next party is in the sender's subnet: no network ACL is asked.
    pub on_link: bool,
    /// Looked at only behind a NAT gateway.
    pub ports: Ports,
}

/// Ports as the next party sees them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ports {
    pub source: u16,
    pub destination: u16,
}

impl<A: Ip> Route<A> {
    /// To an appliance, which receives what is addressed to another. Neither end's groups
    /// know the other as a member beyond it, as EC2 has it; the appliance itself is
    /// reached by its sender directly.
    #[inline(always)]
    pub fn by_appliance<T: Tables + ?Sized>(
        tables: &T,
        sender: &Interface,
        packet: &Packet<A>,
        ifindex: u32,
        own_source: bool,
    ) -> Self {
        Self {
            ifindex,
            next_hop: A::zeroed(),
            source: packet.source,
            destination: packet.destination,
            sender_identity: if own_source { sender.identity } else { 0 },
            receiver_identity: 0,
            same_subnet: false,
            on_link: match tables.interface(ifindex) {
                Some(to) => to.vpc == sender.vpc && to.address & sender.mask == sender.subnet,
                None => false,
            },
            ports: Ports::default(),
        }
    }
}

/// `source`: the packet's. `None`: a NAT gateway goes on with it.
#[inline(always)]
fn route<T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    source: Own,
    work: &mut Work,
) -> Result<Option<Route>, Reason> {
    let packet = &work.packet;
    let to = packet.destination;
    let same_subnet = to & interface.mask == interface.subnet;
    let way = if same_subnet { Way::Local } else { way(tables, interface, to)? };
    if let Way::Interface(ifindex) = way {
        let own_source = source.is();
        return Ok(Some(Route::by_appliance(tables, interface, packet, ifindex, own_source)));
    }
    if let Way::Nat(gateway) = way {
        // Whatever else an appliance passes on, nothing would bring the answer back by it.
        if !source.is() {
            return Err(Reason::NatUnsupported);
        }
        return translate(gateway, work);
    }
    if way != Way::Internet
        && let Some(local) = tables.local(&LocalKey { vpc: interface.vpc, address: to, zero: 0 })
    {
        // Known, but on another host: no way there yet.
        if local.ifindex == 0 {
            return Err(Reason::NoRoute);
        }
        return Ok(Some(Route {
            ifindex: local.ifindex,
            next_hop: 0,
            source: packet.source,
            destination: to,
            sender_identity: if source.is() { interface.identity } else { 0 },
            receiver_identity: local.identity,
            same_subnet,
            on_link: same_subnet,
            ports: Ports::default(),
        }));
    }
    if way == Way::Local || to.is_unroutable() {
        return Err(Reason::NoRoute);
    }
    // Only the interface's own addresses have public ones.
    let elastic = source.elastic();
    if elastic == 0 {
        return Err(Reason::NoElastic);
    }
    let mut out = Route {
        ifindex: 0,
        next_hop: interface.next_hop,
        source: elastic,
        destination: to,
        sender_identity: 0,
        receiver_identity: 0,
        same_subnet: false,
        on_link: false,
        ports: Ports::default(),
    };
    // Another interface here holds that elastic address: there and back by the
    // public addresses, without a way out of the host.
    if let Some(elastic) = tables.elastic(to) {
        if elastic.nat != 0 {
            return translate(to, work);
        }
        out.ifindex = elastic.interface.ifindex;
        out.destination = elastic.address;
    } else if interface.uplink == 0 {
        return Err(Reason::NoUplink);
    }
    Ok(Some(out))
}

/// Leaves the packet to [`crate::nat`].
#[inline(always)]
fn translate(gateway: u32, work: &mut Work) -> Result<Option<Route>, Reason> {
    work.nat.gateway = gateway;
    work.verdict.action = Action::Translate;
    Ok(None)
}

#[inline(always)]
pub fn forward<A: Ip, T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    sender: &Interface,
    route: &Route<A>,
    now_s: u32,
    work: &mut Work<A>,
) -> Result<(), Reason> {
    forward_as::<false, A, T, F>(tables, frame, sender, route, now_s, work)
}

/// What stands in the work space is from here on as if it were just read: the compiler loads
/// it anew, and the verifier, which knows values of registers and of the stack, knows none
/// of these. It walks on from here once, and not once for each way that led here.
#[inline(always)]
fn forget<A>(work: &mut Work<A>) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: there is no instruction.
    unsafe {
        core::arch::asm!("# {0}", in(reg) core::ptr::from_mut(work));
    }
    #[cfg(not(target_arch = "bpf"))]
    let _ = work;
}

/// `NAT`: the next party sees the route's ports, and not the packet's.
#[inline(always)]
pub fn forward_as<const NAT: bool, A: Ip, T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    sender: &Interface,
    route: &Route<A>,
    now_s: u32,
    work: &mut Work<A>,
) -> Result<(), Reason> {
    work.route = *route;
    forget(work);
    let Work { packet, inner, verdict, route, .. } = work;
    if !route.on_link {
        leaves(tables, sender, packet, packet.destination, &mut verdict.egress_rule)?;
    }
    let is_error = packet.kind == Kind::IcmpError;
    if is_error {
        A::parse_inner(inner, frame, packet)?;
    }
    let change = &mut verdict.sender;
    let (sent, rule) = if is_error {
        change.key = sent_by_remote(sender.id, inner);
        related(tables, sender, &change.key, now_s)?
    } else if packet.kind == Kind::Later {
        follows(tables, (sender.id, sender.slot), packet, now_s)?;
        (Reason::FragmentFollows, 0)
    } else {
        change.key = FlowKey {
            interface: sender.id,
            local: packet.source,
            remote: packet.destination,
            local_port: packet.source_port,
            remote_port: packet.destination_port,
            protocol: packet.protocol,
            zero: [0; 3],
        };
        let ask =
            Ask { identity: route.receiver_identity, now_s, from_instance: true, tracked: NAT };
        judge(tables, sender, packet, &ask, change).split()?
    };
    if packet.ttl <= 1 && !route.same_subnet {
        return Err(expired(packet, A::router(sender), verdict));
    }
    verdict.egress_rule = rule;
    verdict.rewrite = Rewrite {
        destination_mac: 0,
        source_mac: GATEWAY,
        source: route.source,
        destination: route.destination,
        ttl: if route.same_subnet { packet.ttl } else { packet.ttl - 1 },
    };
    if route.ifindex == 0 {
        if packet.exceeds(frame, sender.uplink_mtu) {
            return Err(too_big(packet, A::router(sender), sender.uplink_mtu, verdict));
        }
        if is_error {
            // What stands for the packet's source in the world does not for another address.
            let source = route.source;
            if source != packet.source && inner.destination != packet.source {
                return Err(Reason::Unrelated);
            }
            A::rewrite_inner(work, None, Some(source));
        }
        work.verdict.ifindex = sender.uplink;
        work.verdict.next_hop = work.route.next_hop;
        work.verdict.accept(Action::Leave, sent);
        work.verdict.keep(&work.packet, sender.id);
        return Ok(());
    }
    let received = receive::<NAT, A, T, F>(tables, frame, sender, now_s, work);
    if received.is_err() {
        // What nobody receives opens nothing.
        work.verdict.sender.write = FlowWrite::Nothing;
    }
    let received = received?;
    let new = received.opens();
    work.verdict.reason = if new { received } else { sent };
    work.verdict.keep(&work.packet, sender.id);
    Ok(())
}

#[inline(always)]
pub fn hand_over(receiver: &Interface) -> Action {
    if receiver.flags & TO_NAMESPACE != 0 { Action::Enter } else { Action::Deliver }
}

/// The local receiver's side of a guest's packet.
#[inline(always)]
fn receive<const NAT: bool, A: Ip, T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    sender: &Interface,
    now_s: u32,
    work: &mut Work<A>,
) -> Result<Reason, Reason> {
    let receiver = tables.interface(work.route.ifindex).ok_or(Reason::NoRoute)?;
    work.verdict.slots[1] = receiver.slot;
    work.verdict.bill(receiver, PAYS_IN_SECOND);
    work.verdict.action = hand_over(receiver);
    work.verdict.ifindex = receiver.ifindex;
    work.verdict.rewrite.destination_mac = receiver.mac_number();
    if !work.route.on_link {
        let Work { packet, verdict, route, .. } = work;
        enters(tables, receiver, packet, route.source, &mut verdict.ingress_rule)?;
    }
    if work.packet.kind == Kind::IcmpError {
        // The packet inside travelled the other way: its source is the receiver.
        let route = work.route;
        let by_receiver = work.inner.source == work.packet.destination;
        let to_sender = work.inner.destination == work.packet.source;
        let source = if by_receiver { Some(route.destination) } else { None };
        let destination = if to_sender { Some(route.source) } else { None };
        A::rewrite_inner(work, source, destination);
        let key = &mut work.verdict.receiver.key;
        *key = sent_by_instance(receiver.id, &work.inner);
        key.local = source.unwrap_or(key.local);
        key.remote = destination.unwrap_or(key.remote);
        if NAT {
            (key.local_port, key.remote_port) = (route.ports.destination, route.ports.source);
        }
        return related(tables, receiver, key, now_s).map(|(reason, _)| reason);
    }
    let Work { packet, verdict, route, .. } = work;
    // The receiver was asked about the first one.
    if packet.kind == Kind::Later {
        return match packet.exceeds(frame, receiver.mtu) {
            true => Err(too_big(packet, A::router(sender), receiver.mtu, verdict)),
            false => Ok(Reason::FragmentFollows),
        };
    }
    verdict.receiver.key = FlowKey {
        interface: receiver.id,
        local: route.destination,
        remote: route.source,
        local_port: packet.destination_port,
        remote_port: packet.source_port,
        protocol: packet.protocol,
        zero: [0; 3],
    };
    if NAT {
        let key = &mut verdict.receiver.key;
        (key.local_port, key.remote_port) = (route.ports.destination, route.ports.source);
        if matches!(packet.kind, Kind::Tcp | Kind::Udp) {
            packet.detail = route.ports.destination;
        }
    }
    let ask = Ask { identity: route.sender_identity, now_s, from_instance: false, tracked: NAT };
    let (reason, rule) = judge(tables, receiver, packet, &ask, &mut verdict.receiver).split()?;
    if packet.exceeds(frame, receiver.mtu) {
        return Err(too_big(packet, A::router(sender), receiver.mtu, verdict));
    }
    verdict.ingress_rule = rule;
    Ok(reason)
}

/// A frame that came in by the uplink.
#[inline(always)]
pub fn from_world<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head,
    arrival: &Arrival,
    work: &mut Work,
) {
    work.begin();
    work.verdict.accept(Action::Pass, Reason::NotOurs);
    if arrival.vlan {
        return;
    }
    if head.ether_type == ARP {
        return arp_from_world(tables, frame, work);
    }
    if head.ether_type != IPV4 || !arrival.to_host {
        return;
    }
    let config = tables.config();
    if config.blocked != 0 && tables.blocked(head.source) {
        return work.verdict.refuse(Reason::Blocked);
    }
    let Some(elastic) = tables.elastic(head.destination) else {
        if config.ranges == RANGES_LATE && tables.in_elastic_range(head.destination) {
            work.verdict.refuse(Reason::UnknownElastic);
        }
        return;
    };
    if elastic.nat != 0 {
        work.nat.gateway = head.destination;
        work.verdict.action = Action::Translate;
        return;
    }
    work.verdict.slots[0] = elastic.interface.slot;
    work.verdict.bill(&elastic.interface, PAYS_IN);
    if let Err(reason) = world_sends(tables, frame, head, elastic, arrival.now_s, work) {
        work.verdict.refuse(reason);
    }
}

#[inline(always)]
fn world_sends<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head,
    elastic: &Elastic,
    now_s: u32,
    work: &mut Work,
) -> Result<(), Reason> {
    work.packet.parse(frame, head)?;
    arrive(tables, frame, &elastic.interface, elastic.address, now_s, work)
}

/// The receiver's side of a packet from the world, where it is known as `address`.
#[inline(always)]
pub fn arrive<A: Ip, T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    receiver: &Interface,
    address: A,
    now_s: u32,
    work: &mut Work<A>,
) -> Result<(), Reason> {
    arrive_at::<false, A, T, F>(tables, frame, receiver, (address, 0), now_s, work)
}

/// `NAT`: where it is known by another port too.
#[inline(always)]
pub fn arrive_at<const NAT: bool, A: Ip, T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    receiver: &Interface,
    (address, port): (A, u16),
    now_s: u32,
    work: &mut Work<A>,
) -> Result<(), Reason> {
    let Work { packet, inner, verdict, .. } = work;
    if packet.source.is_unroutable() {
        return Err(Reason::Martian);
    }
    enters(tables, receiver, packet, packet.source, &mut verdict.ingress_rule)?;
    let is_error = packet.kind == Kind::IcmpError;
    let change = &mut verdict.receiver;
    let (reason, rule) = if is_error {
        A::parse_inner(inner, frame, packet)?;
        // The packet inside left with the elastic address as its source.
        if inner.source != packet.destination {
            return Err(Reason::Unrelated);
        }
        change.key = sent_by_instance(receiver.id, inner);
        change.key.local = address;
        if NAT {
            change.key.local_port = port;
        }
        related(tables, receiver, &change.key, now_s)?
    } else if packet.kind == Kind::Later {
        follows(tables, (receiver.id, receiver.slot), packet, now_s)?;
        (Reason::FragmentFollows, 0)
    } else {
        change.key = FlowKey {
            interface: receiver.id,
            local: address,
            remote: packet.source,
            local_port: packet.destination_port,
            remote_port: packet.source_port,
            protocol: packet.protocol,
            zero: [0; 3],
        };
        let ask = Ask { identity: 0, now_s, from_instance: false, tracked: NAT };
        judge(tables, receiver, packet, &ask, change).split()?
    };
    // An address of ours cannot be out there.
    if reason.opens() && packet.source.is_ours(tables) {
        verdict.receiver.write = FlowWrite::Nothing;
        return Err(Reason::SpoofedAddress);
    }
    if packet.ttl <= 1 {
        return Err(expired(packet, A::host(tables, packet.destination), verdict));
    }
    if packet.exceeds(frame, receiver.mtu) {
        let host = A::host(tables, packet.destination);
        return Err(too_big(packet, host, receiver.mtu, verdict));
    }
    verdict.ingress_rule = rule;
    verdict.rewrite = Rewrite {
        destination_mac: receiver.mac_number(),
        source_mac: GATEWAY,
        source: packet.source,
        destination: address,
        ttl: packet.ttl - 1,
    };
    verdict.ifindex = receiver.ifindex;
    verdict.accept(hand_over(receiver), reason);
    verdict.keep(packet, receiver.id);
    if is_error {
        A::rewrite_inner(work, Some(address), None);
    }
    Ok(())
}

/// A router drops what has no hop left. Whoever may not pass is not told: that a packet
/// has no hop left is looked at when all rules have let it through.
#[inline(always)]
fn expired<A: Ip>(packet: &Packet<A>, teller: A, verdict: &mut Verdict<A>) -> Reason {
    tell(packet, Tell::TimeExceeded, teller, verdict);
    Reason::TtlExpired
}

#[inline(always)]
fn too_big<A: Ip>(packet: &Packet<A>, teller: A, mtu: u16, verdict: &mut Verdict<A>) -> Reason {
    verdict.told_mtu = mtu;
    tell(packet, Tell::TooBig, teller, verdict);
    Reason::TooBig
}

/// What is dropped opens nothing and keeps nothing alive. Nobody is told about an
/// ICMP error or a later fragment, nor is one who is not there (RFC 1122, 3.2.2; RFC 4443, 2.4).
#[inline(always)]
fn tell<A: Ip>(packet: &Packet<A>, what: Tell, teller: A, verdict: &mut Verdict<A>) {
    verdict.sender.write = FlowWrite::Nothing;
    verdict.receiver.write = FlowWrite::Nothing;
    let silent = matches!(packet.kind, Kind::IcmpError | Kind::Later);
    let hears = !silent && !packet.source.is_unroutable();
    if hears && !teller.is_none() {
        verdict.tell = what;
        verdict.teller = teller;
    }
}

/// A frame that user space wrote into the punt device.
#[inline(always)]
pub fn from_punt<T: Tables + ?Sized>(tables: &T, head: &Head, work: &mut Work) {
    work.begin();
    work.verdict.refuse(Reason::PuntStray);
    if head.ether_type != IPV4 {
        return;
    }
    let Some(interface) =
        ifindex_of_number(head.destination_mac()).and_then(|i| tables.interface(i))
    else {
        return;
    };
    let verdict = &mut work.verdict;
    verdict.slots[0] = interface.slot;
    verdict.rewrite = Rewrite::of(head);
    verdict.rewrite.destination_mac = interface.mac_number();
    verdict.rewrite.source_mac = GATEWAY;
    verdict.ifindex = interface.ifindex;
    verdict.accept(hand_over(interface), Reason::PuntReply);
}
