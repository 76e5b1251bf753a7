//! What goes through a NAT gateway: the decision goes on here, in programs of its own.
//!
//! ```text
//!  from_guest   to the world, or to an elastic address of this host ▶ port found ▶ forward
//!               to the gateway's address, by who was reached so ▶ whose port? ▶ forward
//!  from_outside to the gateway's address ▶ whose port? ▶ arrive
//! ```
//! The instance's groups, its subnet's network ACL and its flows know the connection by its
//! private address and its own port: they are asked as ever. Only who is beyond the gateway
//! sees the public address and the port that was found. What is refused takes no port. A TCP
//! connection that goes on without a port is answered by a RST, if all that is asked lets it pass.

use crate::decide::{Arrival, Ports, Route, arrive_at, forward_as};
use crate::flow::ICMP;
use crate::icmp::Tell;
use crate::ip::Ip;
use crate::judge::sent_by_remote;
use crate::layout::{Elastic, FlowKey, Interface, LocalKey};
use crate::packet::{Frame, Head, Inner, Kind, Packet, Part};
use crate::port::{CONNECTIONS_AN_INTERFACE_MAX, PortHolder, PortKey, Translation, start};
use crate::reason::Reason;
use crate::tables::Tables;
use crate::verdict::{Action, NatWork, NatWrite, PAYS_IN, PAYS_OUT, PIECE, PortChange, Work};

/// Forgets the packet before; the gateway stays.
#[inline(always)]
fn begin(work: &mut Work) {
    work.begin();
    work.nat.write = NatWrite::Nothing;
    work.nat.piece = 0;
    work.nat.slot = 0;
    work.nat.lost = false;
    work.nat.ports = PortChange::NONE;
}

#[inline(always)]
fn refuse(work: &mut Work, reason: Reason) {
    work.verdict.refuse(reason);
    work.nat.write = NatWrite::Nothing;
    work.nat.piece = 0;
    work.nat.ports = PortChange::NONE;
}

/// A guest's packet that was parsed, and routed to the gateway in `work`.
#[inline(always)]
pub fn from_guest<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    arrival: &Arrival,
    work: &mut Work,
) {
    ask_for_guest(tables, frame, arrival, work);
    end_lost(work);
}

/// [`from_guest`] without its end.
#[inline(always)]
pub fn ask_for_guest<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    arrival: &Arrival,
    work: &mut Work,
) {
    begin(work);
    let Some(interface) = tables.interface(arrival.ifindex) else {
        return work.verdict.refuse(Reason::NoInterface);
    };
    work.verdict.slots[0] = interface.slot;
    work.verdict.bill(interface, PAYS_OUT);
    let Some(gateway) = tables.elastic(work.nat.gateway).filter(|gateway| gateway.nat != 0) else {
        return work.verdict.refuse(Reason::NoRoute);
    };
    work.nat.slot = gateway.interface.slot;
    let route = match work.packet.destination == work.nat.gateway {
        true => back(tables, frame, interface, gateway, arrival.now_s, work),
        false => out(tables, frame, interface, gateway, arrival.now_s, work),
    };
    let sent = match route {
        Ok(route) => {
            forward_as::<true, u32, T, F>(tables, frame, interface, &route, arrival.now_s, work)
        }
        Err(reason) => Err(reason),
    };
    if let Err(reason) = sent {
        refuse(work, reason);
    }
}

/// What was let through and has no port any more ends here, and its sender is told, as EC2's
/// gateway does (docs/adr/0028). After [`ask_for_guest`], and once for all ways through it.
#[inline(always)]
pub fn end_lost(work: &mut Work) {
    if work.nat.lost && work.verdict.action != Action::Drop {
        work.verdict.exceed(Reason::NoFlow, work.verdict.counted);
        work.verdict.tell = Tell::Reset;
        work.verdict.teller = work.packet.destination;
        refuse(work, Reason::NoFlow);
    }
}

#[inline(always)]
fn out<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    interface: &Interface,
    gateway: &Elastic,
    now_s: u32,
    work: &mut Work,
) -> Result<Route, Reason> {
    let to = work.packet.destination;
    if to.is_unroutable() {
        return Err(Reason::NoRoute);
    }
    let mut route = Route {
        ifindex: 0,
        next_hop: interface.next_hop,
        source: work.nat.gateway,
        destination: to,
        sender_identity: 0,
        receiver_identity: 0,
        same_subnet: false,
        on_link: false,
        ports: Ports { source: 0, destination: work.packet.destination_port },
    };
    match tables.elastic(to) {
        Some(near) if near.nat != 0 => return Err(Reason::NatUnsolicited),
        Some(near) => {
            route.ifindex = near.interface.ifindex;
            route.destination = near.address;
        }
        None if interface.uplink == 0 => return Err(Reason::NoUplink),
        None => {}
    }
    let port = match work.packet.kind {
        Kind::Tcp | Kind::Udp | Kind::IcmpRequest => {
            let port = own_port(tables, interface, gateway, now_s, work)?;
            work.nat.ports = of_source(&work.packet, port);
            port
        }
        Kind::IcmpError => {
            u32::parse_inner(&mut work.inner, frame, &work.packet)?;
            work.nat.key = sent_by_remote(interface.id, &work.inner);
            let port = match tables.translation(&work.nat.key) {
                Some(found) if found.public == work.nat.gateway => found.port,
                _ => return Err(Reason::Unrelated),
            };
            route.ports.destination = work.inner.source_port;
            work.nat.ports = of_inner(frame, &work.packet, &work.inner, false, port)?;
            port
        }
        Kind::Later => 0,
        _ => return Err(Reason::NatUnsupported),
    };
    route.ports.source = port;
    Ok(route)
}

/// The port that stands for the packet's own; what is to be written goes into `work.nat`.
#[inline(always)]
fn own_port<T: Tables + ?Sized>(
    tables: &T,
    interface: &Interface,
    gateway: &Elastic,
    now_s: u32,
    work: &mut Work,
) -> Result<u16, Reason> {
    let Work { packet, nat, .. } = work;
    nat.key = FlowKey {
        interface: interface.id,
        local: packet.source,
        remote: packet.destination,
        local_port: packet.source_port,
        remote_port: packet.destination_port,
        protocol: packet.protocol,
        zero: [0; 3],
    };
    if let Some(found) = tables.translation(&nat.key)
        && found.public == nat.gateway
        && holds(tables, packet, nat, &found, now_s)
    {
        return Ok(found.port);
    }
    if packet.kind == Kind::Tcp && !packet.opens_tcp() {
        nat.lost = packet.may_be_reset();
        return if nat.lost { Ok(packet.source_port) } else { Err(Reason::NoFlow) };
    }
    if tables.translations_open(interface.slot) >= u64::from(CONNECTIONS_AN_INTERFACE_MAX) {
        return Err(Reason::FlowQuota);
    }
    nat.port_key = PortKey::of(&nat.key, nat.gateway, 0);
    let begin = start(&nat.key, tables.config().seed);
    let port = tables.free_port(&nat.port_key, gateway.nat, begin);
    if port == 0 {
        return Err(Reason::NatNoPort);
    }
    nat.port_key.port = port;
    nat.holder = PortHolder::of(&nat.key, now_s);
    nat.translation = Translation { public: nat.gateway, seen_s: now_s, port, zero: [0; 6] };
    nat.write = NatWrite::Open;
    Ok(port)
}

/// Whether the connection still holds the port that was found. Written once a second at most
/// while nothing else changes.
#[inline(always)]
fn holds<T: Tables + ?Sized>(
    tables: &T,
    packet: &Packet,
    nat: &mut NatWork,
    found: &Translation,
    now_s: u32,
) -> bool {
    let begins = packet.opens_tcp();
    if found.seen_s == now_s && !begins && !packet.is_fin() && !packet.is_rst() {
        return true;
    }
    nat.port_key = PortKey::of(&nat.key, found.public, found.port);
    match tables.port_holder(&nat.port_key) {
        Some(holder) if holder.is_of(&nat.key) && (begins || holder.alive(now_s)) => {
            nat.holder = holder.step(packet, true, now_s);
            nat.translation = Translation { seen_s: now_s, ..*found };
            nat.write = NatWrite::Out;
            true
        }
        _ => false,
    }
}

/// From an interface that was reached through the gateway by its elastic address.
#[inline(always)]
fn back<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    interface: &Interface,
    gateway: &Elastic,
    now_s: u32,
    work: &mut Work,
) -> Result<Route, Reason> {
    let key = LocalKey { vpc: interface.vpc, address: work.packet.source, zero: 0 };
    let elastic = match tables.local(&key) {
        Some(local) if local.ifindex == interface.ifindex => local.elastic,
        _ => 0,
    };
    if elastic == 0 {
        return Err(Reason::NoElastic);
    }
    if work.packet.kind == Kind::IcmpError {
        u32::parse_inner(&mut work.inner, frame, &work.packet)?;
        if work.inner.destination != work.packet.source {
            return Err(Reason::Unrelated);
        }
    }
    let (ifindex, port) = whose(tables, gateway, elastic, now_s, work)?;
    let mut route = Route {
        ifindex,
        next_hop: 0,
        source: elastic,
        destination: work.nat.holder.local,
        sender_identity: 0,
        receiver_identity: 0,
        same_subnet: false,
        on_link: false,
        ports: Ports { source: work.packet.source_port, destination: port },
    };
    work.nat.ports = match work.packet.kind {
        Kind::IcmpError => {
            route.ports.source = work.inner.destination_port;
            of_inner(frame, &work.packet, &work.inner, true, port)?
        }
        Kind::Later => PortChange::NONE,
        _ => of_destination(&work.packet, port),
    };
    Ok(route)
}

/// A packet of the world to the gateway's address.
#[inline(always)]
pub fn from_outside<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head,
    arrival: &Arrival,
    work: &mut Work,
) {
    begin(work);
    work.nat.gateway = head.destination;
    let Some(gateway) = tables.elastic(head.destination).filter(|gateway| gateway.nat != 0) else {
        return work.verdict.refuse(Reason::UnknownElastic);
    };
    // Until it is known whose it is.
    work.verdict.slots[0] = gateway.interface.slot;
    if let Err(reason) = outside_sends(tables, frame, head, gateway, arrival.now_s, work) {
        refuse(work, reason);
    }
}

#[inline(always)]
fn outside_sends<T: Tables + ?Sized, F: Frame + ?Sized>(
    tables: &T,
    frame: &F,
    head: &Head,
    gateway: &Elastic,
    now_s: u32,
    work: &mut Work,
) -> Result<(), Reason> {
    work.packet.parse(frame, head)?;
    let mut peer = work.packet.source;
    if work.packet.kind == Kind::IcmpError {
        u32::parse_inner(&mut work.inner, frame, &work.packet)?;
        peer = work.inner.destination;
    }
    let (ifindex, port) = whose(tables, gateway, peer, now_s, work)?;
    let receiver = tables.interface(ifindex).ok_or(Reason::NatUnsolicited)?;
    work.verdict.slots[0] = receiver.slot;
    work.nat.slot = gateway.interface.slot;
    work.verdict.bill(receiver, PAYS_IN);
    work.nat.ports = match work.packet.kind {
        Kind::IcmpError => of_inner(frame, &work.packet, &work.inner, true, port)?,
        Kind::Later => PortChange::NONE,
        _ => of_destination(&work.packet, port),
    };
    if work.nat.ports.at != 0 && work.packet.kind != Kind::IcmpError {
        work.packet.destination_port = port;
        if work.packet.kind != Kind::IcmpReply {
            work.packet.detail = port;
        }
    }
    let local = (work.nat.holder.local, port);
    arrive_at::<true, u32, T, F>(tables, frame, receiver, local, now_s, work)
}

/// For a packet to the gateway's address: the device of the interface whose port that is,
/// and its own port. The holder, and what is to be written, go into `work.nat`.
#[inline(always)]
fn whose<T: Tables + ?Sized>(
    tables: &T,
    gateway: &Elastic,
    peer: u32,
    now_s: u32,
    work: &mut Work,
) -> Result<(u32, u16), Reason> {
    let Work { packet, inner, nat, .. } = work;
    let later = packet.kind == Kind::Later;
    let (port, peer_port, protocol) = match packet.kind {
        Kind::Tcp | Kind::Udp | Kind::IcmpReply if !packet.opens_tcp() => {
            (packet.destination_port, packet.source_port, packet.protocol)
        }
        Kind::IcmpError if inner.source == nat.gateway => {
            (inner.source_port, inner.destination_port, inner.protocol)
        }
        Kind::IcmpError => return Err(Reason::Unrelated),
        Kind::Later => (packet.fragment_id as u16, 0, packet.protocol),
        _ => return Err(Reason::NatUnsolicited),
    };
    nat.port_key = PortKey { public: nat.gateway, peer, port, peer_port, protocol, zero: [0; 3] };
    let found = match later {
        true => tables.piece_holder(&nat.port_key),
        false => tables.port_holder(&nat.port_key),
    };
    let Some(holder) = found.filter(|holder| holder.alive(now_s)) else {
        return Err(if later { Reason::FragmentLost } else { Reason::NatUnsolicited });
    };
    nat.holder = holder;
    if matches!(packet.kind, Kind::Tcp | Kind::Udp | Kind::IcmpReply) {
        nat.holder = holder.step(packet, false, now_s);
        if nat.holder != holder {
            nat.write = NatWrite::In;
        }
        if packet.part == Part::First {
            nat.piece = PIECE | packet.fragment_id & 0xffff;
        }
    }
    let key = LocalKey { vpc: gateway.interface.vpc, address: holder.local, zero: 0 };
    let ifindex = tables.local(&key).map_or(0, |local| local.ifindex);
    // Whoever has the address now is not who opened the connection.
    match tables.interface(ifindex) {
        Some(receiver) if receiver.id == holder.interface => Ok((ifindex, holder.local_port)),
        _ => Err(Reason::NatUnsolicited),
    }
}

/// Another source port, or another identifier of an ICMP request.
#[inline(always)]
fn of_source(packet: &Packet, new: u16) -> PortChange {
    of_transport(packet, 0, packet.source_port, new)
}

#[inline(always)]
fn of_destination(packet: &Packet, new: u16) -> PortChange {
    of_transport(packet, 2, packet.destination_port, new)
}

#[inline(always)]
fn of_transport(packet: &Packet, place: u32, old: u16, new: u16) -> PortChange {
    let (place, checksum) = match packet.kind {
        Kind::Tcp => (place, 16),
        Kind::Udp => (place, 6),
        _ => (4, 2),
    };
    if old == new {
        return PortChange { new, ..PortChange::NONE };
    }
    PortChange {
        at: packet.transport + place,
        checksum_at: packet.transport + checksum,
        old,
        new,
        udp: packet.kind == Kind::Udp,
    }
}

/// Another port in the packet inside an ICMP error: its source's or its destination's. The sum
/// over the message changes with it.
#[inline(always)]
fn of_inner<F: Frame + ?Sized>(
    frame: &F,
    packet: &Packet,
    inner: &Inner,
    source: bool,
    new: u16,
) -> Result<PortChange, Reason> {
    let h: [u8; 2] = frame.load(inner.offset).ok_or(Reason::Unrelated)?;
    let place = match (inner.protocol, source) {
        (ICMP, _) => 4,
        (_, true) => 0,
        (_, false) => 2,
    };
    let old = if source { inner.source_port } else { inner.destination_port };
    if old == new {
        return Ok(PortChange::NONE);
    }
    Ok(PortChange {
        at: inner.offset + u32::from(h[0] & 0x0f) * 4 + place,
        checksum_at: packet.transport + 2,
        old,
        new,
        udp: false,
    })
}
