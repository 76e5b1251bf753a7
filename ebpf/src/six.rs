//! Where IPv6 enters the decision.
//!
//! Addresses are global and never translated. Own are those that `HOLDERS` gives
//! to the interface, and any link-local one but the router's, for each interface
//! is a link of its own; link-local packets are heard by the router alone.

use crate::decide::{
    Arrival, DNS_PORT, METADATA_PORT, Ports, Route, TIME_PORT, arrive, forward, hand_over,
};
use crate::ip::{Ip, V6};
use crate::layout::{DNS, Interface, METADATA6, RANGES_LATE, SOURCE_CHECK, Six};
use crate::neighbour::{ADVERTISEMENT, Message, ROUTER_SOLICITATION, SOLICITATION};
use crate::packet::{Frame, Head6, Kind, Packet, Part, mac_number};
use crate::punt::{ifindex_of_number, punt_number};
use crate::reason::Reason;
use crate::rewrite::Rewrite;
use crate::route::{Way, way};
use crate::tables::Tables;
use crate::verdict::{Action, PAYS_IN, PAYS_OUT, PAYS_SERVICE, Work};
use crate::{DNS_ADDRESS6, GATEWAY, METADATA_ADDRESS6, ROUTER_ADDRESS6, TIME_ADDRESS6};

/// `fd00:ec2::/32`, where EC2 has its services.
const SERVICES: u64 = 0xfd00_0ec2;

/// An IPv6 frame that a guest sent.
#[inline(always)]
pub fn from_instance6<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head6,
    arrival: &Arrival,
    work: &mut Work<V6>,
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
    head: &Head6,
    arrival: &Arrival,
    interface: &Interface,
    work: &mut Work<V6>,
) -> Result<(), Reason> {
    if arrival.vlan {
        return Err(Reason::Vlan);
    }
    if head.source_mac() != interface.mac_number() {
        return Err(Reason::SpoofedMac);
    }
    let six = tables.six(arrival.ifindex).ok_or(Reason::Ipv6)?;
    read(&mut work.packet, frame, head)?;
    let packet = &work.packet;
    if packet.kind == Kind::Link {
        return link_says(tables, frame, head, interface, work);
    }
    let on_link = is_on_link(packet.source);
    let held = holds(tables, interface, packet.source);
    if packet.is_dhcp6_request() && on_link {
        return punt(interface, head, Reason::PuntDhcp, work);
    }
    if packet.is_dhcp6_reply() {
        return Err(Reason::SpoofedDhcp);
    }
    if on_link {
        return Err(Reason::NoRoute);
    }
    let forwards = interface.flags & SOURCE_CHECK == 0 && !packet.source.is_unroutable();
    if !held && !forwards {
        return Err(Reason::SpoofedAddress);
    }
    if packet.destination.high >> 32 == SERVICES {
        return serve(interface, head, work);
    }
    let route = route(tables, interface, six, packet, held)?;
    forward(tables, frame, interface, &route, arrival.now_s, work)
}

/// [`Packet::parse6`], a function of its own in the kernel too: what it found is then
/// read back from memory, and the verifier need not follow each way to it further.
#[inline(always)]
pub fn read<F: Frame + ?Sized>(
    packet: &mut Packet<V6>,
    frame: &F,
    head: &Head6,
) -> Result<(), Reason> {
    match read_apart(packet, frame, head) {
        PARSED => Ok(()),
        MALFORMED => Err(Reason::Malformed),
        FRAGMENT => Err(Reason::Fragment),
        TINY => Err(Reason::FragmentTiny),
        EXTENSION => Err(Reason::ExtensionHeader),
        _ => Err(Reason::IcmpType),
    }
}

const PARSED: u32 = 0;
const MALFORMED: u32 = Reason::Malformed as u32;
const FRAGMENT: u32 = Reason::Fragment as u32;
const TINY: u32 = Reason::FragmentTiny as u32;
const EXTENSION: u32 = Reason::ExtensionHeader as u32;

/// A reason's number, or 0.
#[inline(never)]
fn read_apart<F: Frame + ?Sized>(packet: &mut Packet<V6>, frame: &F, head: &Head6) -> u32 {
    match packet.parse6(frame, head) {
        Ok(()) => PARSED,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn holds<T: Tables + ?Sized>(tables: &T, interface: &Interface, address: V6) -> bool {
    // Written so that no register is read before it is written: no device is 0.
    let ifindex = match tables.holder(&address) {
        Some(holder) => holder.ifindex,
        None => 0,
    };
    ifindex == interface.ifindex
}

#[inline(always)]
fn punt(
    interface: &Interface,
    head: &Head6,
    reason: Reason,
    work: &mut Work<V6>,
) -> Result<(), Reason> {
    if interface.punt == 0 {
        return Err(Reason::NoRoute);
    }
    if work.packet.part != Part::Whole {
        return Err(Reason::Fragment);
    }
    let verdict = &mut work.verdict;
    verdict.rewrite = Rewrite::of6(head);
    verdict.rewrite.destination_mac = punt_number(interface.ifindex);
    verdict.ifindex = interface.punt;
    verdict.pays = PAYS_SERVICE;
    verdict.accept(Action::Deliver, reason);
    Ok(())
}

/// What is sent to the host's own services, which are never out there: whoever is upstream
/// could answer. A function of its own in the kernel too, as [`link_says`] is.
#[inline(never)]
fn serve(interface: &Interface, head: &Head6, work: &mut Work<V6>) -> Result<(), Reason> {
    let packet = &work.packet;
    let (tcp, udp) = (packet.kind == Kind::Tcp, packet.kind == Kind::Udp);
    let (to, port) = (packet.destination, packet.destination_port);
    if to == METADATA_ADDRESS6 {
        if interface.flags & METADATA6 == 0 {
            return Err(Reason::NoMetadata);
        }
        if tcp && port == METADATA_PORT {
            return punt(interface, head, Reason::PuntMetadata, work);
        }
    }
    if to == TIME_ADDRESS6 && udp && port == TIME_PORT {
        return punt(interface, head, Reason::PuntTime, work);
    }
    let resolves = interface.flags & DNS != 0 && (tcp || udp);
    if to == DNS_ADDRESS6 && resolves && port == DNS_PORT {
        return punt(interface, head, Reason::PuntDns, work);
    }
    Err(Reason::NoRoute)
}

/// A link-local address of the guest's.
#[inline(always)]
fn is_on_link(address: V6) -> bool {
    address.is_link_local() && address != ROUTER_ADDRESS6
}

/// A message of the link. A function of its own in the kernel too: forwarding needs
/// its place on the stack.
#[inline(never)]
fn link_says<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head6,
    interface: &Interface,
    work: &mut Work<V6>,
) -> Result<(), Reason> {
    let kind = (work.packet.detail >> 8) as u8;
    match kind {
        ROUTER_SOLICITATION | SOLICITATION | ADVERTISEMENT => {}
        // Router advertisements and redirects: only the router may.
        134 | 137 => return Err(Reason::SpoofedNeighbour),
        _ => return Err(Reason::NeighbourIgnored),
    }
    let message = Message::parse(frame, head, &work.packet)?;
    let sender = work.packet.source;
    let own = is_on_link(sender) || sender.is_unspecified() || holds(tables, interface, sender);
    let false_mac = message.told_mac.is_some_and(|mac| mac != interface.mac_number());
    if !own || false_mac {
        return Err(Reason::SpoofedNeighbour);
    }
    if kind == ROUTER_SOLICITATION {
        return punt(interface, head, Reason::PuntRouter, work);
    }
    let target = message.target;
    let its_own = holds(tables, interface, target);
    if kind == ADVERTISEMENT {
        let may = its_own || target.is_link_local() && target != ROUTER_ADDRESS6;
        return Err(if may { Reason::NeighbourIgnored } else { Reason::SpoofedNeighbour });
    }
    let near = tables.six(interface.ifindex).is_some_and(|six| six.holds(target))
        || [METADATA_ADDRESS6, TIME_ADDRESS6, DNS_ADDRESS6].contains(&target);
    if its_own || target != ROUTER_ADDRESS6 && !near {
        return Err(Reason::NeighbourIgnored);
    }
    answer(head, target, GATEWAY, work);
    Ok(())
}

#[inline(always)]
fn answer(head: &Head6, target: V6, mac: u64, work: &mut Work<V6>) {
    work.verdict.rewrite = Rewrite {
        destination_mac: head.source_mac(),
        source_mac: mac,
        source: target,
        destination: head.source,
        ttl: 0,
    };
    // Like ARP, which costs nobody anything.
    work.verdict.pays = 0;
    work.verdict.accept(Action::AnswerNeighbour, Reason::Neighbour);
}

/// `held`: the packet's source is one of the interface's own addresses.
#[inline(always)]
fn route<T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    six: &Six,
    packet: &Packet<V6>,
    held: bool,
) -> Result<Route<V6>, Reason> {
    let to = packet.destination;
    let same_subnet = six.holds(to);
    let way = if same_subnet { Way::Local } else { way(tables, interface, to)? };
    if let Way::Interface(ifindex) = way {
        return Ok(Route::by_appliance(tables, interface, packet, ifindex, held));
    }
    // IPv6 is never translated.
    if let Way::Nat(_) = way {
        return Err(Reason::NoRoute);
    }
    let mut route = Route {
        ifindex: 0,
        next_hop: six.next_hop,
        source: packet.source,
        destination: to,
        sender_identity: 0,
        receiver_identity: 0,
        same_subnet,
        on_link: same_subnet,
        ports: Ports::default(),
    };
    if let Some(holder) = tables.holder(&to) {
        route.ifindex = holder.ifindex;
        if holder.vpc == interface.vpc && way != Way::Internet {
            route.sender_identity = if held { interface.identity } else { 0 };
            route.receiver_identity = holder.identity;
            return Ok(route);
        }
        // Of another network here: as by the world, without a way out of the host.
    } else if same_subnet || to.is_unroutable() {
        return Err(Reason::NoRoute);
    }
    // The table says that it is in the network, and there it is not.
    if way == Way::Local && !same_subnet {
        return Err(Reason::NoRoute);
    }
    route.same_subnet = false;
    route.on_link = false;
    // Nothing would come back to an address that no interface has.
    if !held {
        return Err(Reason::NoElastic);
    }
    if interface.uplink == 0 || six.next_hop.is_unspecified() {
        return Err(Reason::NoUplink);
    }
    Ok(route)
}

/// An IPv6 frame that came in by the uplink.
#[inline(always)]
pub fn from_world6<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head6,
    arrival: &Arrival,
    work: &mut Work<V6>,
) {
    work.begin();
    work.verdict.accept(Action::Pass, Reason::NotOurs);
    if arrival.vlan {
        return;
    }
    let config = tables.config();
    if !arrival.to_host {
        return asked_by_world(tables, frame, head, work);
    }
    if config.blocked6 != 0 && tables.blocked6(&head.source) {
        return work.verdict.refuse(Reason::Blocked);
    }
    let Some(holder) = tables.holder(&head.destination) else {
        if config.ranges6 == RANGES_LATE && tables.in_range6(&head.destination) {
            return work.verdict.refuse(Reason::UnknownElastic);
        }
        return asked_by_world(tables, frame, head, work);
    };
    let Some(receiver) = tables.interface(holder.ifindex) else { return };
    work.verdict.slots[0] = receiver.slot;
    work.verdict.bill(receiver, PAYS_IN);
    if let Err(reason) = world_sends(tables, frame, head, receiver, arrival.now_s, work) {
        work.verdict.refuse(reason);
    }
}

#[inline(always)]
fn world_sends<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head6,
    receiver: &Interface,
    now_s: u32,
    work: &mut Work<V6>,
) -> Result<(), Reason> {
    read(&mut work.packet, frame, head)?;
    if work.packet.kind == Kind::Link {
        return world_asks(tables, frame, head, work);
    }
    arrive(tables, frame, receiver, head.destination, now_s, work)
}

/// The uplink answers for the addresses that interfaces hold; all else of the link
/// is for the host's own stack.
#[inline(always)]
fn asked_by_world<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head6,
    work: &mut Work<V6>,
) {
    if head.next_header() == V6::ICMP && read(&mut work.packet, frame, head).is_ok() {
        let _ = world_asks(tables, frame, head, work);
    }
}

/// As for [`link_says`].
#[inline(never)]
fn world_asks<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head6,
    work: &mut Work<V6>,
) -> Result<(), Reason> {
    if work.packet.detail >> 8 != u16::from(SOLICITATION) {
        return Err(Reason::NeighbourIgnored);
    }
    let message = Message::parse(frame, head, &work.packet)?;
    if tables.holder(&message.target).is_none() {
        return Err(Reason::NeighbourIgnored);
    }
    answer(head, message.target, mac_number(tables.config().uplink_mac), work);
    Ok(())
}

/// An IPv6 frame that user space wrote into the punt device.
#[inline(always)]
pub fn from_punt6<T: Tables + ?Sized>(tables: &T, head: &Head6, work: &mut Work<V6>) {
    work.begin();
    work.verdict.refuse(Reason::PuntStray);
    let Some(interface) =
        ifindex_of_number(head.destination_mac()).and_then(|i| tables.interface(i))
    else {
        return;
    };
    let verdict = &mut work.verdict;
    verdict.slots[0] = interface.slot;
    verdict.rewrite = Rewrite::of6(head);
    verdict.rewrite.destination_mac = interface.mac_number();
    verdict.rewrite.source_mac = GATEWAY;
    verdict.ifindex = interface.ifindex;
    verdict.accept(hand_over(interface), Reason::PuntReply);
}
