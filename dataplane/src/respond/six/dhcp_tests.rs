use proptest::prelude::*;

use super::*;

const CLIENT: [u8; 10] = [0, 3, 0, 1, 2, 0, 0, 0, 0, 7];
const OWN: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 5);
const OTHER: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 6);

fn binding() -> Binding {
    Binding {
        addresses: vec![OWN],
        dns: vec!["fd00:ec2::253".parse().unwrap()],
        domain: "region-1.internal".into(),
    }
}

fn message(kind: u8, options: &[Vec<u8>]) -> Vec<u8> {
    [vec![kind, 1, 2, 3], options.concat()].concat()
}

fn client() -> Vec<u8> {
    option(OPT_CLIENT_ID, &CLIENT)
}

fn ours() -> Vec<u8> {
    option(OPT_SERVER_ID, &server_id())
}

fn association(id: u32, asked: &[Ipv6Addr]) -> Vec<u8> {
    let data = [id.to_be_bytes().to_vec(), vec![0; 8], addresses(asked, 0, 0)].concat();
    option(OPT_IA_NA, &data)
}

/// What a reply says: its kind and its options, read by the same few lines that read requests.
fn told(reply: &[u8]) -> (u8, Vec<(u16, Vec<u8>)>) {
    assert_eq!(reply[1..4], [1, 2, 3], "its number");
    let options = options(&reply[4..]).unwrap();
    (reply[0], options.into_iter().map(|(kind, data)| (kind, data.to_vec())).collect())
}

fn of(options: &[(u16, Vec<u8>)], wanted: u16) -> Vec<&[u8]> {
    options.iter().filter(|(kind, _)| *kind == wanted).map(|(_, data)| &data[..]).collect()
}

/// Addresses with their preferred and valid lifetimes, and statuses, of one association.
fn leased(data: &[u8]) -> (Vec<(Ipv6Addr, u32, u32)>, Vec<u16>) {
    let number = |b: &[u8]| u32::from_be_bytes(b.try_into().unwrap());
    let mut found = (Vec::new(), Vec::new());
    for (kind, data) in options(&data[12..]).unwrap() {
        match kind {
            OPT_IA_ADDRESS => {
                let address = Ipv6Addr::from(<[u8; 16]>::try_from(&data[..16]).unwrap());
                found.0.push((address, number(&data[16..20]), number(&data[20..24])));
            }
            OPT_STATUS => found.1.push(u16::from_be_bytes([data[0], data[1]])),
            other => panic!("option {other} in an association"),
        }
    }
    found
}

#[test]
fn an_address_is_offered_given_kept_and_given_back() {
    let asked = association(9, &[]);
    let offer = answer(&binding(), &message(SOLICIT, &[client(), asked.clone()])).unwrap();
    let given = message(REQUEST, &[client(), ours(), asked.clone()]);
    let kept = message(RENEW, &[client(), ours(), association(9, &[OWN])]);
    let anyones = message(REBIND, &[client(), association(9, &[OWN])]);
    let replies = [given, kept, anyones].map(|m| answer(&binding(), &m).unwrap());
    for (reply, kind) in std::iter::once((offer, ADVERTISE)).chain(replies.map(|r| (r, REPLY))) {
        let (told_kind, options) = told(&reply);
        assert_eq!(told_kind, kind);
        assert_eq!(of(&options, OPT_CLIENT_ID), [CLIENT]);
        assert_eq!(of(&options, OPT_SERVER_ID), [server_id()]);
        let [lease] = of(&options, OPT_IA_NA)[..] else { panic!("{options:?}") };
        assert_eq!(lease[..4], 9_u32.to_be_bytes());
        assert_eq!(leased(lease), (vec![(OWN, PREFERRED_S, VALID_S)], vec![]));
        assert_eq!(of(&options, OPT_DOMAIN_LIST), [b"\x08region-1\x08internal\0"]);
        assert_eq!(of(&options, OPT_DNS_SERVERS)[0].len(), 16);
    }
    for kind in [RELEASE, DECLINE] {
        let (_, options) =
            told(&answer(&binding(), &message(kind, &[client(), ours(), asked.clone()])).unwrap());
        assert_eq!(of(&options, OPT_STATUS), [[0, 0]]);
    }
}

#[test]
fn who_is_in_a_hurry_is_answered_at_once() {
    let quick = option(OPT_RAPID_COMMIT, &[]);
    let reply = answer(&binding(), &message(SOLICIT, &[client(), quick, association(1, &[])]));
    let (kind, options) = told(&reply.unwrap());
    assert_eq!((kind, of(&options, OPT_RAPID_COMMIT).len()), (REPLY, 1));
}

#[test]
fn an_address_that_the_interface_has_no_more_has_no_life_left() {
    let kept = message(RENEW, &[client(), ours(), association(1, &[OTHER, OWN])]);
    let (_, options) = told(&answer(&binding(), &kept).unwrap());
    let lease = leased(of(&options, OPT_IA_NA)[0]).0;
    assert_eq!(lease, [(OWN, PREFERRED_S, VALID_S), (OTHER, 0, 0)]);
}

#[test]
fn a_second_association_a_prefix_and_temporary_addresses_get_none() {
    let prefix = option(OPT_IA_PD, &[[0, 0, 0, 3].to_vec(), vec![0; 8]].concat());
    let temporary = option(OPT_IA_TA, &[0, 0, 0, 4]);
    let asked = [client(), association(1, &[]), association(2, &[]), prefix, temporary];
    let (_, options) = told(&answer(&binding(), &message(SOLICIT, &asked)).unwrap());
    let leases = of(&options, OPT_IA_NA);
    assert_eq!(leased(leases[0]).0.len(), 1);
    assert_eq!(leased(leases[1]), (vec![], vec![NO_ADDRESSES]));
    assert_eq!(leased(of(&options, OPT_IA_PD)[0]), (vec![], vec![NO_PREFIX]));
    assert_eq!(of(&options, OPT_IA_TA)[0][..4], [0, 0, 0, 4]);
    let none = Binding { addresses: vec![], ..binding() };
    let asked = message(SOLICIT, &[client(), association(1, &[])]);
    let (_, options) = told(&answer(&none, &asked).unwrap());
    assert_eq!(leased(of(&options, OPT_IA_NA)[0]), (vec![], vec![NO_ADDRESSES]));
}

#[test]
fn a_client_that_moved_hears_whether_it_is_still_on_its_link() {
    let status = |addresses: &[Ipv6Addr]| {
        let asked = message(CONFIRM, &[client(), association(1, addresses)]);
        answer(&binding(), &asked).map(|reply| of(&told(&reply).1, OPT_STATUS)[0].to_vec())
    };
    assert_eq!(status(&[OWN]), Ok(vec![0, 0]));
    assert_eq!(status(&[OTHER]), Ok(vec![0, NOT_ON_LINK as u8]));
    assert_eq!(status(&[]), Err(Silence::NotOurs));
}

#[test]
fn who_asks_for_information_gets_no_address_and_only_what_it_names() {
    let named = option(OPT_OPTION_REQUEST, &OPT_DOMAIN_LIST.to_be_bytes());
    let (kind, options) =
        told(&answer(&binding(), &message(INFORMATION_REQUEST, &[named])).unwrap());
    let kinds: Vec<u16> = options.iter().map(|(kind, _)| *kind).collect();
    assert_eq!((kind, kinds), (REPLY, vec![OPT_SERVER_ID, OPT_DOMAIN_LIST]));
    let asked = message(INFORMATION_REQUEST, &[client(), association(1, &[])]);
    assert_eq!(answer(&binding(), &asked), Err(Silence::Malformed));
}

#[test]
fn what_is_for_another_server_or_lacks_a_name_is_not_answered() {
    let another = option(OPT_SERVER_ID, &[0, 3, 0, 1, 1, 1, 1, 1, 1, 1]);
    let asked = association(1, &[OWN]);
    for kind in [REQUEST, RENEW, RELEASE, DECLINE] {
        let to_another = message(kind, &[client(), another.clone(), asked.clone()]);
        assert_eq!(answer(&binding(), &to_another), Err(Silence::NotOurs));
        let to_nobody = message(kind, &[client(), asked.clone()]);
        assert_eq!(answer(&binding(), &to_nobody), Err(Silence::Malformed));
        let by_nobody = message(kind, &[ours(), asked.clone()]);
        assert_eq!(answer(&binding(), &by_nobody), Err(Silence::Malformed));
    }
    for kind in [SOLICIT, CONFIRM, REBIND] {
        let to_us = message(kind, &[client(), ours(), asked.clone()]);
        assert_eq!(answer(&binding(), &to_us), Err(Silence::Malformed));
    }
    for kind in [0, ADVERTISE, REPLY, 10, 12, 13, 255] {
        let asked = message(kind, &[client(), ours(), asked.clone()]);
        assert_eq!(answer(&binding(), &asked), Err(Silence::Malformed));
    }
    let long = option(OPT_CLIENT_ID, &[1; DUID_BYTES_MAX + 1]);
    assert_eq!(answer(&binding(), &message(SOLICIT, &[long])), Err(Silence::Malformed));
}

#[test]
fn the_longest_answer_fits_into_the_least_mtu() {
    let many = |from: u16| (0..50).map(move |n| Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, from, n));
    let binding = Binding {
        addresses: many(1).collect(),
        dns: binding().dns,
        domain: ["a".repeat(63), "b".repeat(32)].join("."),
    };
    let client = option(OPT_CLIENT_ID, &[7; DUID_BYTES_MAX]);
    let kept = association(1, &many(2).collect::<Vec<_>>());
    let reply = answer(&binding, &message(REBIND, &[client, kept])).unwrap();
    let lease = leased(of(&told(&reply).1, OPT_IA_NA)[0]).0;
    assert_eq!(lease.len(), ADDRESSES_TOLD_MAX);
    assert!(reply.len() <= 1280 - 40 - 8, "{} bytes", reply.len());
}

proptest! {
    #[test]
    fn no_bytes_do_harm(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = answer(&binding(), &bytes);
    }

    #[test]
    fn no_options_do_harm(
        kind in 0..14_u8,
        parts in proptest::collection::vec((0..26_u16, proptest::collection::vec(any::<u8>(), 0..40)), 0..80),
        cut in 0..4_usize,
    ) {
        let parts: Vec<_> = parts.iter().map(|(kind, data)| option(*kind, data)).collect();
        let bytes = message(kind, &parts);
        if let Ok(reply) = answer(&binding(), &bytes[..bytes.len().saturating_sub(cut)]) {
            prop_assert!([ADVERTISE, REPLY].contains(&reply[0]));
            prop_assert!(options(&reply[4..]).is_some());
        }
    }
}
