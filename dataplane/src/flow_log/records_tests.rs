use bytemuck::Zeroable as _;
use ebpf::event::SIX;
use ebpf::layout::{Elastic, Interface as Record, Local};

use super::*;
use crate::compile::Tables;

const A: [u8; 4] = [10, 0, 0, 10];
const B: [u8; 4] = [10, 0, 0, 11];
const ELASTIC: [u8; 4] = [198, 51, 100, 200];
const NAT: [u8; 4] = [198, 51, 100, 201];
const WORLD: [u8; 4] = [203, 0, 113, 9];

/// Interface 1 has device 11, slot 1 and an elastic address; interface 2 device 12, slot 2.
fn directory() -> Directory {
    let mut tables = Tables::default();
    for (n, address, elastic) in [(1_u32, A, ELASTIC), (2, B, [0; 4])] {
        let record = Record {
            id: n.into(),
            ifindex: 10 + n,
            slot: n,
            address: u32::from_be_bytes(address),
            elastic: u32::from_be_bytes(elastic),
            subnet: u32::from_be_bytes([10, 0, 0, 0]),
            mask: 0xffff_ff00,
            ..Record::zeroed()
        };
        tables.interfaces.insert(10 + n, record);
        let Record { vpc, identity, ifindex, address, elastic, .. } = record;
        let key = LocalKey { vpc, address, zero: 0 };
        tables.locals.insert(key, Local { identity, ifindex, service: 0, elastic, zero: 0 });
        if elastic != 0 {
            tables.elastics.insert(elastic, Elastic { interface: record, address, nat: 0 });
        }
        tables.names.interfaces.insert(10 + n, InterfaceId::from_random(n.into()));
    }
    let gateway = Record { slot: 3, ..Record::zeroed() };
    let address = u32::from_be_bytes([10, 0, 0, 9]);
    tables
        .elastics
        .insert(u32::from_be_bytes(NAT), Elastic { interface: gateway, address, nat: 4 });
    Directory::new(&tables)
}

fn tally(
    ifindex: u32,
    slots: [u32; 2],
    (from, to): (impl Into<IpAddr>, impl Into<IpAddr>),
    ports: (u16, u16),
    accepted: bool,
) -> (TallyKey, Tally) {
    let to = to.into();
    let bytes = |address| match address {
        IpAddr::V4(four) => {
            let [a, b, c, d] = four.octets();
            [a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]
        }
        IpAddr::V6(six) => six.octets(),
    };
    let key = TallyKey {
        ifindex,
        slots,
        source: bytes(from.into()),
        destination: bytes(to),
        source_port: ports.0,
        destination_port: ports.1,
        protocol: 6,
        accepted: accepted.into(),
        family: if to.is_ipv4() { FOUR } else { SIX },
        zero: 0,
    };
    (key, Tally { packets: 20, bytes: 4249, first_s: 10, last_s: 30 })
}

fn told(tallies: &[(TallyKey, Tally)], skipped: bool) -> Vec<String> {
    let interval =
        Interval { start: 1_418_530_010, end: 1_418_530_070, boot: 1_418_530_010, skipped };
    records(&directory(), tallies, interval, FlowLogFormat::Aws, "123456789010")
}

#[test]
fn records_have_awss_fields_in_awss_order() {
    let lines = told(&[tally(11, [1, 0], (A, WORLD), (20641, 22), true)], false);
    assert_eq!(
        lines,
        [
            "2 123456789010 eni-00000000000000001 10.0.0.10 203.0.113.9 20641 22 6 20 4249 \
             1418530020 1418530040 ACCEPT OK",
            "2 123456789010 eni-00000000000000002 - - - - - - - 1418530010 1418530070 - NODATA",
        ]
    );
    let json = records(
        &directory(),
        &[tally(11, [1, 0], (A, WORLD), (20641, 22), true)],
        Interval { start: 0, end: 60, boot: 0, skipped: false },
        FlowLogFormat::Json,
        "unknown",
    );
    let value: serde_json::Value = serde_json::from_str(&json[0]).unwrap();
    assert_eq!((&value["srcport"], &value["action"]), (&20641.into(), &"ACCEPT".into()));
}

#[test]
fn what_came_by_the_elastic_address_is_recorded_under_the_private_one() {
    let lines = told(&[tally(3, [1, 0], (WORLD, ELASTIC), (5000, 80), false)], false);
    assert!(lines[0].contains("eni-00000000000000001 203.0.113.9 10.0.0.10 5000 80"), "{lines:?}");
    assert!(lines[0].ends_with("REJECT OK"), "{lines:?}");
}

#[test]
fn what_came_by_a_nat_gateway_is_recorded_under_the_private_address() {
    let lines = told(&[tally(3, [2, 0], (WORLD, NAT), (443, 5000), true)], false);
    assert!(lines[0].contains("eni-00000000000000002 203.0.113.9 10.0.0.11 443 5000"), "{lines:?}");
    // Whom nobody waits for is nobody's.
    let lines = told(&[tally(3, [3, 0], (WORLD, NAT), (443, 5000), false)], false);
    assert!(lines.iter().all(|l| l.ends_with("NODATA")), "{lines:?}");
}

#[test]
fn between_two_guests_each_has_its_own_record_and_the_one_that_refused_says_so() {
    let lines = told(&[tally(11, [1, 2], (A, B), (5000, 80), false)], false);
    assert!(lines[0].contains("eni-00000000000000001 10.0.0.10 10.0.0.11"), "{lines:?}");
    assert!(lines[0].ends_with("ACCEPT OK"), "it left: {lines:?}");
    assert!(lines[1].contains("eni-00000000000000002 10.0.0.10 10.0.0.11"), "{lines:?}");
    assert!(lines[1].ends_with("REJECT OK"), "{lines:?}");
}

#[test]
fn what_a_guest_asks_of_the_host_is_not_recorded() {
    let host = [169, 254, 169, 254];
    let mut dhcp = tally(11, [1, 0], ([0; 4], [255; 4]), (68, 67), true);
    dhcp.0.protocol = 17;
    let asked = [
        dhcp,
        tally(11, [1, 0], (A, host), (5000, 80), true),
        tally(9, [1, 0], (host, A), (80, 5000), true),
        tally(11, [1, 0], (A, [10, 0, 0, 2]), (5000, 53), true),
        tally(11, [1, 0], (A, [169, 254, 169, 123]), (123, 123), true),
    ];
    let lines = told(&asked, false);
    assert!(lines.iter().all(|l| l.ends_with("NODATA")), "{lines:?}");
    assert_eq!(lines.len(), 2);
}

#[test]
fn what_found_no_place_is_said_to_be_skipped() {
    let lines = told(&[tally(11, [1, 0], (A, WORLD), (1, 2), true)], true);
    assert_eq!(lines.iter().filter(|l| l.ends_with("- SKIPDATA")).count(), 2, "{lines:?}");
    assert_eq!(lines.len(), 3);
}

#[test]
fn records_of_ipv6_have_the_packets_own_addresses() {
    let [a, b, world] = ["2001:db8:1::a", "2001:db8:1::b", "2001:db8:ffff::9"]
        .map(|text| text.parse::<Ipv6Addr>().unwrap());
    let lines = told(&[tally(3, [1, 0], (world, a), (5000, 80), false)], false);
    let record = "eni-00000000000000001 2001:db8:ffff::9 2001:db8:1::a 5000 80 6 20 4249";
    assert!(lines[0].contains(record) && lines[0].ends_with("REJECT OK"), "{lines:?}");
    let lines = told(&[tally(11, [1, 2], (a, b), (5000, 80), false)], false);
    assert!(lines[0].ends_with("ACCEPT OK") && lines[1].ends_with("REJECT OK"), "{lines:?}");
    assert!(lines[1].contains("eni-00000000000000002 2001:db8:1::a 2001:db8:1::b"), "{lines:?}");
    let text = |text: &str| text.parse::<Ipv6Addr>().unwrap();
    let of_the_link = [
        (text("fe80::1"), text("ff02::1"), (0, 0)),
        (text("fe80::1"), text("ff02::1:2"), (546, 547)),
        (a, text("fe80::2"), (0, 0)),
        (a, text("fd00:ec2::254"), (5000, 80)),
    ];
    let asked = of_the_link.map(|(from, to, ports)| tally(11, [1, 0], (from, to), ports, true));
    let lines = told(&asked, false);
    assert!(lines.iter().all(|l| l.ends_with("NODATA")), "{lines:?}");
}
