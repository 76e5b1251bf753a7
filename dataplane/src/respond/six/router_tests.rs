use std::collections::VecDeque;

use proptest::prelude::*;

use super::*;

const GUEST: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0xff, 0xfe00, 7);
const ALL_ROUTERS: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 2);

fn binding() -> Binding {
    Binding {
        subnet: "2001:db8:1::/64".parse().unwrap(),
        mtu: 1400,
        dhcp: dhcp::Binding { addresses: vec![], dns: vec![], domain: String::new() },
    }
}

fn wire() -> Wire {
    Wire { incoming: None, outgoing: VecDeque::new(), mtu: 1400 }
}

fn solicitation(from: Ipv6Addr, hop_limit: u8) -> Vec<u8> {
    let message = Icmpv6Repr::Ndisc(NdiscRepr::RouterSolicit { lladdr: None });
    let ip = Ipv6Repr {
        src_addr: from,
        dst_addr: ALL_ROUTERS,
        next_header: IpProtocol::Icmpv6,
        payload_len: message.buffer_len(),
        hop_limit,
    };
    let mut bytes = vec![0; IPV6_HEADER_LEN + message.buffer_len()];
    ip.emit(&mut Ipv6Packet::new_unchecked(bytes.as_mut_slice()));
    let mut payload = Icmpv6Packet::new_unchecked(&mut bytes[IPV6_HEADER_LEN..]);
    message.emit(&from, &ALL_ROUTERS, &mut payload, &ChecksumCapabilities::default());
    bytes
}

/// Who is told, and what.
fn told(packet: &[u8]) -> (Ipv6Addr, NdiscRepr<'_>) {
    let ip = Ipv6Packet::new_checked(packet).unwrap();
    assert_eq!((ip.src_addr(), ip.hop_limit()), (ROUTER, LINK_HOP_LIMIT));
    let message = Icmpv6Packet::new_checked(&packet[IPV6_HEADER_LEN..]).unwrap();
    let (from, to) = (ip.src_addr(), ip.dst_addr());
    match Icmpv6Repr::parse(&from, &to, &message, &ChecksumCapabilities::default()).unwrap() {
        Icmpv6Repr::Ndisc(said) => (to, said),
        other => panic!("{other:?}"),
    }
}

fn answers(packet: &[u8]) -> Vec<Vec<u8>> {
    let (mut wire, mut counters) = (wire(), Counters::default());
    Router::new(binding(), Duration::ZERO).receive(packet, &mut wire, &mut counters);
    let told = counters.routers_told + counters.dhcp6_answered;
    assert_eq!(told, wire.outgoing.len() as u64);
    assert_eq!(told + counters.dhcp6_ignored + counters.ignored, 1, "each is counted once");
    wire.outgoing.into()
}

#[test]
fn who_asks_for_a_router_hears_of_one_and_to_ask_for_an_address() {
    let answers = answers(&solicitation(GUEST, LINK_HOP_LIMIT));
    let (to, said) = told(&answers[0]);
    assert_eq!(to, GUEST);
    let NdiscRepr::RouterAdvert { flags, router_lifetime, mtu, prefix_info, lladdr, .. } = said
    else {
        panic!("{said:?}");
    };
    assert_eq!(flags, NdiscRouterFlags::MANAGED | NdiscRouterFlags::OTHER);
    assert_eq!((router_lifetime.secs(), mtu), (ROUTER_LIFETIME_S, Some(1400)));
    assert_eq!(lladdr.unwrap().as_bytes(), ebpf::GATEWAY_MAC);
    let prefix = prefix_info.unwrap();
    assert_eq!(prefix.flags, NdiscPrefixInfoFlags::ON_LINK, "and not for making addresses");
    assert_eq!((prefix.prefix, prefix.prefix_len), (binding().subnet.network(), 64));
}

#[test]
fn who_has_no_address_yet_is_told_with_all() {
    let answers = answers(&solicitation(Ipv6Addr::UNSPECIFIED, LINK_HOP_LIMIT));
    assert_eq!(told(&answers[0]).0, ALL_NODES);
}

#[test]
fn who_is_not_on_the_link_is_not_told() {
    assert!(answers(&solicitation(GUEST, 64)).is_empty());
    assert!(answers(&solicitation("2001:db8:1::5".parse().unwrap(), 255)).is_empty());
    let mut broken = solicitation(GUEST, LINK_HOP_LIMIT);
    broken[IPV6_HEADER_LEN + 2] ^= 1;
    assert!(answers(&broken).is_empty(), "its checksum");
}

#[test]
fn unasked_it_speaks_three_times_soon_and_then_each_ten_minutes() {
    let (mut wire, mut counters) = (wire(), Counters::default());
    let mut router = Router::new(binding(), Duration::ZERO);
    let mut spoken = Vec::new();
    for second in 0..2000 {
        let now = Duration::from_secs(second);
        router.elapse(&mut wire, &mut counters, now);
        if wire.outgoing.pop_front().is_some() {
            spoken.push(second);
        }
    }
    assert_eq!(spoken, [2, 18, 34, 634, 1234, 1834]);
    let now = Duration::from_secs(2000);
    router.replace(binding(), now);
    assert_eq!(router.next_due(), Duration::from_secs(2434), "nothing has changed");
    router.replace(Binding { mtu: 1300, ..binding() }, now);
    assert_eq!(router.next_due(), now + BEGINS_AFTER);
}

proptest! {
    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        answers(&bytes);
    }

    #[test]
    fn no_change_of_a_question_does_harm(at in 0..48_usize, byte: u8) {
        let mut packet = solicitation(GUEST, LINK_HOP_LIMIT);
        packet[at] = byte;
        answers(&packet);
    }
}
