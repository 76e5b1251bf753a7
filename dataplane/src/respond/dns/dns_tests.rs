//! The forwarder against servers that answer, lie, cut short and keep silent.

use std::net::SocketAddr;
use std::time::Duration;

use domain::base::iana::{Class, Rcode, Rtype};
use domain::base::{Message, MessageBuilder, Record, ToName as _, Ttl};
use domain::rdata::{A, AllRecordData, Soa, Txt};
use proptest::prelude::*;

use super::*;

const NOW: Duration = Duration::from_secs(100);
const ONE: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)), 53);
const TWO: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 0, 2, 2)), 53);

fn client(ifindex: u32) -> Client {
    let server = Ipv4Addr::new(10, 0, 0, 2);
    Client {
        ifindex,
        origin: Origin::Datagram {
            server: server.into(),
            asker: (Ipv4Addr::new(10, 0, 0, 5), 4000).into(),
            bytes_max: 1472,
        },
    }
}

fn streaming(ifindex: u32) -> Client {
    Client { ifindex, origin: Origin::Stream(1) }
}

fn forwarder() -> Forwarder {
    let mut n = 0x9e37_79b9_7f4a_7c15_u128;
    let mut forwarder = Forwarder::new(move || {
        n = n.wrapping_mul(0x2360_ed05_1fc6_5da4_4385_df64_9fcc_f645) + 7;
        n >> 32
    });
    forwarder.configure(vec![ONE, TWO], |_| true);
    forwarder
}

fn host(last: u8) -> Resolved {
    Resolved {
        vpc: VpcId::from_random(1),
        server: Some(Ipv4Addr::new(10, 0, 0, 2)),
        names: [format!("ip-10-0-0-{last}.r.internal"), format!("i-{last}.r.internal")]
            .map(|n| n.parse().unwrap())
            .into(),
        addresses: vec![
            Ipv4Addr::new(10, 0, 0, last).into(),
            format!("2001:db8::{last}").parse().unwrap(),
        ],
        subnet: "10.0.0.0/24".parse().unwrap(),
    }
}

fn zone() -> Zone {
    let mut zone = Zone::default();
    for last in [5, 6] {
        zone.add(&host(last));
    }
    zone
}

fn query(id: u16, name: &str, kind: Rtype) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(id);
    builder.header_mut().set_rd(true);
    let mut question = builder.question();
    question.push((&name.parse::<Owned>().unwrap(), kind)).unwrap();
    question.finish()
}

/// What a server says to `question`: `count` addresses.
fn answer(question: &[u8], count: u8, change: impl FnOnce(&mut domain::base::Header)) -> Vec<u8> {
    let question = Message::from_slice(question).unwrap();
    let mut builder = MessageBuilder::new_vec();
    let header = builder.header_mut();
    header.set_id(question.header().id());
    header.set_qr(true);
    change(header);
    let asked = question.sole_question().unwrap();
    let name: Owned = asked.qname().to_vec();
    let mut told = builder.question();
    told.push(asked).unwrap();
    let mut told = told.answer();
    for n in 0..count {
        let data = A::new(Ipv4Addr::new(203, 0, 113, n));
        told.push(Record::new(&name, Class::IN, Ttl::from_secs(300), data)).unwrap();
    }
    told.finish()
}

/// What is to be sent next.
fn sent(forwarder: &mut Forwarder) -> (u64, SocketAddr, bool, Vec<u8>) {
    loop {
        match forwarder.next_action() {
            Some(Action::Send { token, server, stream, message }) => {
                return (token, server, stream, message);
            }
            Some(Action::Close { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// What the guest is told next.
fn told(forwarder: &mut Forwarder) -> Message<Vec<u8>> {
    loop {
        match forwarder.next_action() {
            Some(Action::Answer { message, .. }) => return Message::from_octets(message).unwrap(),
            Some(Action::Close { .. }) => {}
            other => panic!("{other:?}"),
        }
    }
}

fn data(message: &Message<Vec<u8>>) -> Vec<String> {
    let records = message.answer().unwrap().map(|r| r.unwrap());
    records
        .map(|r| {
            let r = r.to_any_record::<AllRecordData<_, _>>().unwrap();
            format!("{} {} {}", r.owner(), r.ttl().as_secs(), r.data())
        })
        .collect()
}

fn ask_own(name: &str, kind: Rtype) -> (Rcode, Vec<String>) {
    let mut forwarder = forwarder();
    forwarder.ask(client(1), &query(1, name, kind), Some(&zone()), NOW);
    let message = told(&mut forwarder);
    assert!(message.header().aa());
    (message.header().rcode(), data(&message))
}

#[test]
fn a_networks_own_names_are_told_forward_and_back_and_none_beside_them() {
    let own = |name, kind| ask_own(name, kind);
    let a = (Rcode::NOERROR, vec!["ip-10-0-0-5.r.internal 60 10.0.0.5".to_owned()]);
    assert_eq!(own("ip-10-0-0-5.r.internal", Rtype::A), a);
    let (_, turned) = own("IP-10-0-0-5.r.INTERNAL", Rtype::A);
    assert_eq!(turned, ["IP-10-0-0-5.r.INTERNAL 60 10.0.0.5"]);
    assert_eq!(own("i-6.r.internal", Rtype::A).1, ["i-6.r.internal 60 10.0.0.6"]);
    assert_eq!(own("i-6.r.internal", Rtype::AAAA).1, ["i-6.r.internal 60 2001:db8::6"]);
    assert_eq!(own("i-6.r.internal", Rtype::MX), (Rcode::NOERROR, vec![]));
    let back = own("6.0.0.10.in-addr.arpa", Rtype::PTR).1;
    assert_eq!(back, ["6.0.0.10.in-addr.arpa 60 ip-10-0-0-6.r.internal."]);
    let six = "5.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.b.d.0.1.0.0.2.ip6.arpa";
    assert_eq!(own(six, Rtype::PTR).1.len(), 1);
    for none in ["i-9.r.internal", "a.i-6.r.internal", "9.0.0.10.in-addr.arpa"] {
        assert_eq!(own(none, Rtype::A), (Rcode::NXDOMAIN, vec![]), "{none}");
    }
    assert_eq!(own("r.internal", Rtype::A), (Rcode::NOERROR, vec![]));
}

#[test]
fn who_has_a_short_name_does_not_own_all_beside_it() {
    let mut zone = Zone::default();
    zone.add(&Resolved { names: vec!["box.lan".parse().unwrap()], ..host(5) });
    let mut forwarder = forwarder();
    forwarder.ask(client(1), &query(1, "box.lan", Rtype::A), Some(&zone), NOW);
    assert_eq!(data(&told(&mut forwarder)), ["box.lan 60 10.0.0.5"]);
    forwarder.ask(client(1), &query(1, "printer.lan", Rtype::A), Some(&zone), NOW);
    sent(&mut forwarder);
}

#[test]
fn a_servers_answer_is_told_and_remembered_for_its_asker_alone() {
    let mut forwarder = forwarder();
    forwarder.ask(client(1), &query(7, "a.Example", Rtype::A), None, NOW);
    let (token, server, stream, message) = sent(&mut forwarder);
    assert_eq!((server, stream), (ONE, false));
    assert_ne!(Message::from_slice(&message).unwrap().header().id(), 7);
    // The same question again, while the first is on its way.
    forwarder.ask(client(1), &query(7, "a.Example", Rtype::A), None, NOW);
    assert_eq!(forwarder.next_action(), None);
    forwarder.hear(token, &answer(&message, 1, |_| {}), NOW);
    let first = told(&mut forwarder);
    assert_eq!((first.header().id(), data(&first)), (7, vec!["a.Example 300 203.0.113.0".into()]));
    let later = NOW + Duration::from_secs(100);
    forwarder.ask(client(1), &query(8, "A.example", Rtype::A), None, later);
    let again = told(&mut forwarder);
    assert_eq!((again.header().id(), data(&again).len()), (8, 1));
    assert!(data(&again)[0].contains(" 200 "), "{:?}", data(&again));
    assert_eq!(forwarder.counters(1).remembered, 1);
    forwarder.ask(client(2), &query(7, "a.example", Rtype::A), None, later);
    sent(&mut forwarder);
    // And no longer than the servers said.
    forwarder.ask(
        client(1),
        &query(9, "a.example", Rtype::A),
        None,
        NOW + Duration::from_secs(300),
    );
    sent(&mut forwarder);
}

#[test]
fn that_there_is_nothing_is_remembered_as_long_as_the_zone_says() {
    let mut forwarder = forwarder();
    forwarder.ask(client(1), &query(1, "no.example", Rtype::A), None, NOW);
    let (token, _, _, message) = sent(&mut forwarder);
    let plain = answer(&message, 0, |h| h.set_rcode(Rcode::NXDOMAIN));
    let plain = Message::from_octets(plain).unwrap();
    let mut builder = MessageBuilder::new_vec();
    *builder.header_mut() = plain.header();
    let mut question = builder.question();
    question.push(plain.sole_question().unwrap()).unwrap();
    let mut authority = question.authority();
    let zone: Owned = "example".parse().unwrap();
    let time = Ttl::from_secs(3600);
    let minimum = Ttl::from_secs(30);
    let serial = domain::base::Serial(1);
    let soa = Soa::new(zone.clone(), zone.clone(), serial, time, time, time, minimum);
    authority.push(Record::new(&zone, Class::IN, time, soa)).unwrap();
    forwarder.hear(token, &authority.finish(), NOW);
    assert_eq!(told(&mut forwarder).header().rcode(), Rcode::NXDOMAIN);
    forwarder.ask(
        client(1),
        &query(2, "no.example", Rtype::A),
        None,
        NOW + Duration::from_secs(29),
    );
    assert_eq!(told(&mut forwarder).header().rcode(), Rcode::NXDOMAIN);
    forwarder.ask(
        client(1),
        &query(3, "no.example", Rtype::A),
        None,
        NOW + Duration::from_secs(30),
    );
    sent(&mut forwarder);
}

#[test]
fn a_silent_server_gives_way_to_the_next_which_is_asked_first_from_then_on() {
    let mut forwarder = forwarder();
    forwarder.ask(client(1), &query(1, "a.example", Rtype::A), None, NOW);
    let (_, first, ..) = sent(&mut forwarder);
    let due = forwarder.next_due().unwrap();
    forwarder.elapse(due - Duration::from_millis(1));
    assert_eq!(forwarder.next_action(), None);
    forwarder.elapse(due);
    let (token, second, _, message) = sent(&mut forwarder);
    assert_eq!((first, second), (ONE, TWO));
    forwarder.hear(token, &answer(&message, 1, |_| {}), due);
    assert_eq!(data(&told(&mut forwarder)).len(), 1);
    forwarder.ask(client(1), &query(2, "b.example", Rtype::A), None, due);
    assert_eq!(sent(&mut forwarder).1, TWO);
}

#[test]
fn where_no_server_answers_the_guest_is_told_so_before_it_gives_up() {
    for refuse in [false, true] {
        let mut forwarder = forwarder();
        forwarder.ask(client(1), &query(1, "a.example", Rtype::A), None, NOW);
        let mut servers = Vec::new();
        let mut now = NOW;
        for _ in 0..3 {
            let (token, server, _, message) = sent(&mut forwarder);
            servers.push(server);
            now = if refuse { now } else { forwarder.next_due().unwrap() };
            match refuse {
                true => {
                    let refusal = answer(&message, 0, |h| h.set_rcode(Rcode::REFUSED));
                    forwarder.hear(token, &refusal, now);
                }
                false => forwarder.elapse(now),
            }
        }
        assert_eq!(servers, [ONE, TWO, ONE]);
        assert_eq!(told(&mut forwarder).header().rcode(), Rcode::SERVFAIL);
        assert!(now - NOW < Duration::from_secs(5), "{:?}", now - NOW);
        assert_eq!((forwarder.next_due(), forwarder.counters(1).failed), (None, 1));
    }
}

#[test]
fn what_is_not_the_answer_is_not_taken_for_it() {
    let mut forwarder = forwarder();
    forwarder.ask(client(1), &query(1, "name.example", Rtype::A), None, NOW);
    let (token, _, _, message) = sent(&mut forwarder);
    let right = answer(&message, 1, |_| {});
    let strays = [
        answer(&message, 1, |h| h.set_id(h.id() ^ 1)),
        answer(&message, 1, |h| h.set_qr(false)),
        answer(&query(0, "other.example", Rtype::A), 1, |h| {
            h.set_id(Message::from_slice(&message).unwrap().header().id());
        }),
        right[..20].to_vec(),
        Vec::new(),
    ];
    for stray in strays {
        forwarder.hear(token, &stray, NOW);
        assert_eq!(forwarder.next_action(), None);
    }
    forwarder.hear(token + 1, &right, NOW);
    assert_eq!(forwarder.next_action(), None);
    // In other letters: perhaps a server that turns them, perhaps a stranger.
    let lower = right.iter().map(|b| if *b == b'N' { b'n' } else { *b });
    let mut lower: Vec<u8> = lower.collect();
    if lower == right {
        lower = right.iter().map(|b| if *b == b'n' { b'N' } else { *b }).collect();
    }
    forwarder.hear(token, &lower, NOW);
    let (token, server, stream, message) = sent(&mut forwarder);
    assert_eq!((server, stream), (ONE, true));
    forwarder.hear(token, &answer(&message, 1, |_| {}), NOW);
    assert_eq!(data(&told(&mut forwarder)).len(), 1);
}

#[test]
fn letters_and_ids_differ_from_question_to_question() {
    let mut forwarder = forwarder();
    let names = (0..20).map(|n| {
        forwarder.ask(client(n), &query(1, "abcdefghijklmnop.example", Rtype::A), None, NOW);
        let message = sent(&mut forwarder).3;
        let message = Message::from_octets(message).unwrap();
        let name = message.sole_question().unwrap().qname().to_vec();
        (message.header().id(), name.as_slice().to_vec())
    });
    let names: std::collections::BTreeSet<_> = names.collect();
    assert!(names.len() >= 19, "{}", names.len());
}

#[test]
fn a_truncated_answer_is_fetched_by_a_stream_and_told_as_far_as_it_fits() {
    let mut forwarder = forwarder();
    for (client, whole) in [(client(1), false), (streaming(2), true)] {
        forwarder.ask(client, &query(1, "many.example", Rtype::A), None, NOW);
        let (token, _, stream, message) = sent(&mut forwarder);
        assert!(!stream);
        forwarder.hear(token, &answer(&message, 3, |h| h.set_tc(true)), NOW);
        let (token, server, stream, message) = sent(&mut forwarder);
        assert_eq!((server, stream), (ONE, true));
        forwarder.hear(token, &answer(&message, 200, |_| {}), NOW);
        let told = told(&mut forwarder);
        assert_eq!(told.header().tc(), !whole);
        assert_eq!(told.as_slice().len() <= 512, !whole);
        assert_eq!(data(&told).len() == 200, whole);
    }
}

#[test]
fn an_interface_has_its_share_of_what_is_in_flight_and_no_more() {
    let mut forwarder = forwarder();
    let ask = |forwarder: &mut Forwarder, ifindex: u32, n: u32| {
        let name = format!("n{n}.example");
        forwarder.ask(client(ifindex), &query(1, &name, Rtype::A), None, NOW);
        forwarder.next_action()
    };
    let is_sent = |action: Option<Action>| matches!(action, Some(Action::Send { .. }));
    for ifindex in 1..=8 {
        assert!((0..32).all(|n| is_sent(ask(&mut forwarder, ifindex, n))));
        assert!(!is_sent(ask(&mut forwarder, ifindex, 32)), "the 33rd is refused");
    }
    // All 256 are taken: whoever has most gives way, down to equal shares.
    for n in 0..20 {
        let closed = ask(&mut forwarder, 9, n);
        assert!(matches!(closed, Some(Action::Close { .. })), "{closed:?}");
        assert_eq!(told(&mut forwarder).header().rcode(), Rcode::SERVFAIL);
        sent(&mut forwarder);
    }
    let fair = (20..40).take_while(|n| {
        let closed = matches!(ask(&mut forwarder, 9, *n), Some(Action::Close { .. }));
        while forwarder.next_action().is_some() {}
        closed
    });
    assert!(fair.count() < 12, "a newcomer never takes more than others have");
}

#[test]
fn what_is_no_ordinary_query_is_refused_or_not_heard() {
    let mut forwarder = forwarder();
    let mut rcode = |message: &[u8]| {
        forwarder.ask(client(1), message, Some(&zone()), NOW);
        match forwarder.next_action() {
            Some(Action::Answer { message, .. }) => {
                Some(Message::from_octets(message).unwrap().header().rcode())
            }
            None => None,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(rcode(&query(1, "example", Rtype::AXFR)), Some(Rcode::NOTIMP));
    assert_eq!(rcode(&query(1, "example", Rtype::ANY)), Some(Rcode::NOTIMP));
    let mut update = query(1, "example", Rtype::A);
    update[2] |= 5 << 3;
    assert_eq!(rcode(&update), Some(Rcode::NOTIMP));
    let mut chaos = query(1, "example", Rtype::A);
    *chaos.last_mut().unwrap() = 3;
    assert_eq!(rcode(&chaos), Some(Rcode::REFUSED));
    let mut alone = query(1, "example", Rtype::A);
    alone[2] &= !1;
    assert_eq!(rcode(&alone), Some(Rcode::REFUSED), "no recursion wanted");
    let mut two = query(1, "example", Rtype::A);
    two[5] = 2;
    assert_eq!(rcode(&two), Some(Rcode::FORMERR));
    let mut answer = query(1, "example", Rtype::A);
    answer[2] |= 0x80;
    assert_eq!(rcode(&answer), None, "an answer is never answered");
    assert_eq!(rcode(&[0; 11]), None);
    // A name that points to itself.
    let mut circle = query(1, "a.example", Rtype::A);
    (circle[12], circle[13]) = (0xc0, 12);
    assert_eq!(rcode(&circle), Some(Rcode::FORMERR));
}

#[test]
fn without_name_servers_a_name_of_others_fails_at_once() {
    let mut forwarder = forwarder();
    forwarder.configure(Vec::new(), |_| true);
    forwarder.ask(client(1), &query(1, "a.example", Rtype::A), Some(&zone()), NOW);
    assert_eq!(told(&mut forwarder).header().rcode(), Rcode::SERVFAIL);
}

#[test]
fn what_an_interface_asked_goes_with_it() {
    let mut forwarder = forwarder();
    forwarder.ask(client(1), &query(1, "a.example", Rtype::A), None, NOW);
    let (token, _, _, message) = sent(&mut forwarder);
    forwarder.configure(vec![ONE, TWO], |ifindex| ifindex != 1);
    assert_eq!(forwarder.next_action(), Some(Action::Close { token }));
    forwarder.hear(token, &answer(&message, 1, |_| {}), NOW);
    assert_eq!(forwarder.next_action(), None);
}

#[test]
fn edns_is_answered_and_a_newer_version_refused() {
    let asked = |version: u8| {
        let mut builder = MessageBuilder::new_vec();
        builder.header_mut().set_rd(true);
        let mut question = builder.question();
        question.push((&"i-6.r.internal".parse::<Owned>().unwrap(), Rtype::A)).unwrap();
        let mut additional = question.additional();
        additional
            .opt(|opt| {
                opt.set_version(version);
                opt.set_udp_payload_size(4096);
                Ok(())
            })
            .unwrap();
        let mut forwarder = forwarder();
        forwarder.ask(client(1), &additional.finish(), Some(&zone()), NOW);
        told(&mut forwarder)
    };
    let known = asked(0);
    assert_eq!((data(&known).len(), known.opt().unwrap().udp_payload_size()), (1, 1232));
    assert_eq!(u16::from(asked(1).opt_rcode()), 16);
}

#[test]
fn a_records_text_survives_as_it_is() {
    let mut forwarder = forwarder();
    forwarder.ask(client(1), &query(1, "t.example", Rtype::TXT), None, NOW);
    let (token, _, _, message) = sent(&mut forwarder);
    let question = Message::from_slice(&message).unwrap();
    let mut builder = MessageBuilder::new_vec();
    builder.header_mut().set_id(question.header().id());
    builder.header_mut().set_qr(true);
    let asked = question.sole_question().unwrap();
    let name: Owned = asked.qname().to_vec();
    let mut told_back = builder.question();
    told_back.push(asked).unwrap();
    let mut records = told_back.answer();
    let text = Txt::<Vec<u8>>::build_from_slice(b"v=1; \xff \"quoted\"").unwrap();
    records.push(Record::new(&name, Class::IN, Ttl::from_secs(1), text)).unwrap();
    forwarder.hear(token, &records.finish(), NOW);
    let message = told(&mut forwarder);
    let found = message.as_slice().windows(15).any(|w| w == b"v=1; \xff \"quoted\"");
    assert!(found, "{:?}", message.as_slice());
}

proptest! {
    #[test]
    fn any_bytes_as_query_or_answer_do_no_harm(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..80),
        flips in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        answers in 0u8..30,
    ) {
        let zone = zone();
        let mut forwarder = forwarder();
        forwarder.ask(client(1), &bytes, Some(&zone), NOW);
        let mut near = query(1, "i-6.r.internal", Rtype::A);
        for (at, byte) in &flips {
            let length = near.len();
            near[at.index(length)] = *byte;
        }
        forwarder.ask(client(2), &near, Some(&zone), NOW);
        while forwarder.next_action().is_some() {}
        forwarder.ask(client(3), &query(1, "a.example", Rtype::A), Some(&zone), NOW);
        let (token, _, _, message) = sent(&mut forwarder);
        // The right beginning, so that the rest is read as well.
        let mut false_answer = answer(&message, answers, |_| {});
        for (at, byte) in &flips {
            let length = false_answer.len();
            false_answer[at.index(length)] = *byte;
        }
        forwarder.hear(token, &false_answer, NOW);
        bytes.truncate(60);
        forwarder.hear(token, &[&message[..2], &[0x80, 0], &bytes[..]].concat(), NOW);
        while let Some(action) = forwarder.next_action() {
            if let Action::Answer { client, message } = action {
                prop_assert!(client.ifindex == 3 && message.len() <= 512);
            }
        }
    }
}
