use proptest::prelude::*;
use smoltcp::wire::Ipv4Address;

use super::*;

const MAC: Mac = Mac([2, 0, 0, 0, 0, 7]);

fn binding() -> Binding {
    Binding {
        mac: MAC,
        address: Ipv4Addr::new(10, 0, 1, 5),
        subnet: "10.0.1.0/24".parse().unwrap(),
        router: Ipv4Addr::new(10, 0, 1, 1),
        hostname: "ip-10-0-1-5".into(),
        domain: "region-1.compute.internal".into(),
        dns: vec![Ipv4Addr::new(10, 0, 0, 2)],
        mtu: 1500,
        ntp: vec![Ipv4Addr::new(169, 254, 169, 123)],
        netbios: vec![Ipv4Addr::new(10, 0, 0, 9)],
        netbios_node: Some(2),
    }
}

fn message(kind: DhcpMessageType, change: impl FnOnce(&mut DhcpRepr<'_>)) -> Vec<u8> {
    let mut repr = DhcpRepr {
        message_type: kind,
        transaction_id: 0xfeed,
        secs: 3,
        client_hardware_address: EthernetAddress(MAC.octets()),
        client_ip: Ipv4Address::UNSPECIFIED,
        your_ip: Ipv4Address::UNSPECIFIED,
        server_ip: Ipv4Address::UNSPECIFIED,
        router: None,
        subnet_mask: None,
        relay_agent_ip: Ipv4Address::UNSPECIFIED,
        broadcast: false,
        requested_ip: None,
        client_identifier: None,
        server_identifier: None,
        parameter_request_list: None,
        dns_servers: None,
        max_size: None,
        lease_duration: None,
        renew_duration: None,
        rebind_duration: None,
        additional_options: &[],
    };
    change(&mut repr);
    let mut bytes = vec![0; repr.buffer_len()];
    repr.emit(&mut DhcpPacket::new_unchecked(bytes.as_mut_slice())).unwrap();
    bytes
}

fn answered(message: &[u8]) -> (DhcpMessageType, Ipv4Addr, Reply) {
    let reply = answer(&binding(), message).unwrap();
    let packet = DhcpPacket::new_checked(reply.message.as_slice()).unwrap();
    let repr = DhcpRepr::parse(&packet).unwrap();
    (repr.message_type, repr.your_ip, reply.clone())
}

fn option(reply: &Reply, wanted: u8) -> Option<Vec<u8>> {
    let packet = DhcpPacket::new_checked(reply.message.as_slice()).unwrap();
    packet.options().find(|o| o.kind == wanted).map(|o| o.data.to_vec())
}

#[test]
fn a_discover_is_offered_the_one_address_and_told_the_subnet() {
    let (kind, address, reply) = answered(&message(DhcpMessageType::Discover, |_| {}));
    assert_eq!((kind, address), (DhcpMessageType::Offer, binding().address));
    assert_eq!((reply.destination, reply.broadcast), (binding().address, false));
    assert_eq!(option(&reply, OPT_SUBNET_MASK).unwrap(), [255, 255, 255, 0]);
    assert_eq!(option(&reply, OPT_ROUTER).unwrap(), [10, 0, 1, 1]);
    assert_eq!(option(&reply, OPT_HOST_NAME).unwrap(), b"ip-10-0-1-5");
    assert_eq!(option(&reply, OPT_INTERFACE_MTU).unwrap(), [5, 220]);
    assert_eq!(option(&reply, OPT_IP_LEASE_TIME).unwrap(), LEASE_S.to_be_bytes());
    assert_eq!(
        option(&reply, OPT_CLASSLESS_STATIC_ROUTE).unwrap(),
        [32, 169, 254, 169, 254, 10, 0, 1, 1, 0, 10, 0, 1, 1]
    );
    assert!(reply.message.len() >= MESSAGE_LENGTH_MIN);
}

#[test]
fn a_client_that_cannot_hear_unicast_yet_is_answered_by_broadcast() {
    let (_, _, reply) = answered(&message(DhcpMessageType::Discover, |r| r.broadcast = true));
    assert_eq!((reply.destination, reply.broadcast), (Ipv4Addr::BROADCAST, true));
}

#[test]
fn a_request_is_acknowledged_for_the_own_address_and_refused_for_another() {
    let ours = Some(Ipv4Address::new(10, 0, 1, 1));
    for (requested, server, expected) in [
        (Some(Ipv4Address::new(10, 0, 1, 5)), ours, DhcpMessageType::Ack),
        (Some(Ipv4Address::new(10, 0, 1, 5)), None, DhcpMessageType::Ack),
        (Some(Ipv4Address::new(10, 0, 1, 6)), ours, DhcpMessageType::Nak),
        (Some(Ipv4Address::new(10, 0, 9, 5)), None, DhcpMessageType::Nak),
        (None, None, DhcpMessageType::Nak),
    ] {
        let asked = message(DhcpMessageType::Request, |r| {
            r.requested_ip = requested;
            r.server_identifier = server;
        });
        let (kind, address, reply) = answered(&asked);
        assert_eq!(kind, expected, "{requested:?} {server:?}");
        if kind == DhcpMessageType::Nak {
            assert!(address.is_unspecified());
            assert!(reply.broadcast);
            assert!(option(&reply, OPT_IP_LEASE_TIME).is_none());
        }
    }
}

#[test]
fn a_request_to_another_server_is_left_to_it() {
    let asked = message(DhcpMessageType::Request, |r| {
        r.requested_ip = Some(Ipv4Address::new(10, 0, 1, 5));
        r.server_identifier = Some(Ipv4Address::new(10, 0, 1, 9));
    });
    assert_eq!(answer(&binding(), &asked), Err(Silence::NotOurs));
}

#[test]
fn a_renewal_comes_back_to_the_address_that_asked() {
    let asked = message(DhcpMessageType::Request, |r| r.client_ip = binding().address);
    let (kind, _, reply) = answered(&asked);
    assert_eq!((kind, reply.destination), (DhcpMessageType::Ack, binding().address));
    let wrong = message(DhcpMessageType::Request, |r| r.client_ip = Ipv4Address::new(10, 0, 1, 77));
    assert_eq!(answered(&wrong).0, DhcpMessageType::Nak);
}

#[test]
fn an_inform_is_told_options_and_leased_nothing() {
    let asked = message(DhcpMessageType::Inform, |r| r.client_ip = binding().address);
    let (kind, address, reply) = answered(&asked);
    assert_eq!(kind, DhcpMessageType::Ack);
    assert!(address.is_unspecified());
    assert!(option(&reply, OPT_IP_LEASE_TIME).is_none());
    assert!(option(&reply, OPT_ROUTER).is_some());
}

#[test]
fn release_and_decline_are_heard_in_silence() {
    for kind in [DhcpMessageType::Release, DhcpMessageType::Decline] {
        assert_eq!(answer(&binding(), &message(kind, |_| {})), Err(Silence::Heard));
    }
}

#[test]
fn only_what_was_asked_for_is_told_and_the_client_id_comes_back() {
    let mac = EthernetAddress(MAC.octets());
    let asked = message(DhcpMessageType::Discover, |r| {
        r.parameter_request_list = Some(&[OPT_SUBNET_MASK, OPT_DOMAIN_NAME_SERVER]);
        r.client_identifier = Some(mac);
    });
    let (_, _, reply) = answered(&asked);
    assert!(option(&reply, OPT_SUBNET_MASK).is_some());
    assert!(option(&reply, OPT_DOMAIN_NAME_SERVER).is_some());
    assert!(option(&reply, OPT_HOST_NAME).is_none());
    assert_eq!(option(&reply, OPT_CLIENT_ID).unwrap(), [1, 2, 0, 0, 0, 0, 7]);
}

#[test]
fn another_machines_message_and_a_relayed_one_are_ignored() {
    let stranger = message(DhcpMessageType::Discover, |r| {
        r.client_hardware_address = EthernetAddress([2, 0, 0, 0, 0, 8]);
    });
    assert_eq!(answer(&binding(), &stranger), Err(Silence::Malformed));
    let relayed = message(DhcpMessageType::Discover, |r| {
        r.relay_agent_ip = Ipv4Address::new(192, 0, 2, 1);
    });
    assert_eq!(answer(&binding(), &relayed), Err(Silence::Malformed));
    let reply = message(DhcpMessageType::Offer, |_| {});
    assert_eq!(answer(&binding(), &reply), Err(Silence::Malformed));
}

#[test]
fn the_longest_names_fit_what_every_client_takes() {
    let long = Binding {
        hostname: "h".repeat(HOSTNAME_LENGTH_MAX),
        domain: "d".repeat(DOMAIN_LENGTH_MAX),
        dns: vec![Ipv4Addr::LOCALHOST; 9],
        ..binding()
    };
    let reply = answer(&long, &message(DhcpMessageType::Discover, |_| {})).unwrap();
    // RFC 2131, 2: 236 bytes and 312 of options.
    assert!(reply.message.len() <= 548, "{}", reply.message.len());
}

#[test]
fn a_client_with_a_long_name_of_its_own_misses_what_is_least_needed() {
    let full = Binding {
        hostname: "h".repeat(HOSTNAME_LENGTH_MAX),
        domain: "d".repeat(DOMAIN_LENGTH_MAX),
        dns: vec![binding().router; DNS_SERVERS_MAX],
        ntp: vec![binding().router; SERVERS_MAX],
        netbios: vec![binding().router; SERVERS_MAX],
        ..binding()
    };
    for (bytes, told) in [(24, true), (255, false)] {
        let id = vec![7; bytes];
        let mut asked = message(DhcpMessageType::Discover, |_| {});
        assert_eq!(asked.pop(), Some(255), "the end");
        asked.extend([&[OPT_CLIENT_ID, bytes as u8], id.as_slice(), &[255]].concat());
        let reply = answer(&full, &asked).unwrap();
        // The least IPv4 packet that all take, less its headers.
        assert!(reply.message.len() <= 576 - 20 - 8, "{} bytes", reply.message.len());
        assert_eq!(option(&reply, OPT_CLIENT_ID), Some(id));
        assert!(option(&reply, OPT_CLASSLESS_STATIC_ROUTE).is_some());
        assert_eq!(option(&reply, OPT_NETBIOS_NODE).is_some(), told, "{bytes}");
    }
}

#[test]
fn who_says_another_address_is_answered_at_the_one_it_has() {
    let stale = message(DhcpMessageType::Discover, |repr| {
        repr.client_ip = Ipv4Addr::new(10, 32, 0, 5);
    });
    assert_eq!(answer(&binding(), &stale).unwrap().destination, binding().address);
}

proptest! {
    #[test]
    fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
        let _ = answer(&binding(), &bytes);
    }

    #[test]
    fn a_damaged_message_never_leases_another_address(
        at in 0usize..300, to in any::<u8>(), cut in 0usize..300,
    ) {
        let mut bytes = message(DhcpMessageType::Discover, |r| {
            r.parameter_request_list = Some(&[1, 3, 6, 12, 15, 26, 121]);
            r.requested_ip = Some(Ipv4Address::new(10, 0, 1, 5));
        });
        let length = bytes.len();
        bytes[at % length] = to;
        bytes.truncate(length - cut % length);
        if let Ok(reply) = answer(&binding(), &bytes) {
            let packet = DhcpPacket::new_checked(reply.message.as_slice()).unwrap();
            let leased = packet.your_ip();
            prop_assert!(leased.is_unspecified() || leased == binding().address);
            prop_assert_eq!(packet.client_hardware_address().0, MAC.octets());
        }
    }
}
