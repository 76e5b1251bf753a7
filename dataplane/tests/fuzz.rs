//! Coverage-guided fuzzing of what a hostile guest says to the host's services: how it
//! is run and kept, `sim::Fuzz` says; what is tried and what must hold, `guest`.

#[path = "../fuzz/src/guest.rs"]
mod guest;
#[path = "../fuzz/src/heap.rs"]
mod heap;

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;

use dataplane::respond;
use guest::{
    ADDRESS, ADDRESS6, CONTINUED, HEARD, Host, MAC, MANY_TIMES, RESOLVER, SET_RIGHT, deed,
};
use sim::Fuzz;

/// Two processes of a quarter of a minute.
const FUZZ: Fuzz = Fuzz {
    manifest_dir: env!("CARGO_MANIFEST_DIR"),
    program: "respond",
    input_bytes_max: 2048,
    seconds: [15, 1800],
};

#[test]
fn what_fuzzing_the_services_found_before_holds_still() {
    let inputs = [FUZZ.known(), seeds()].concat();
    inputs.iter().for_each(|input| guest::hold(input));
    assert!(inputs.len() > 100, "{} inputs", inputs.len());
}

#[test]
fn half_a_minute_of_fuzzing_the_services_finds_nothing() {
    let work = tempfile::tempdir().unwrap();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let test = "half_a_minute_of_fuzzing_the_services_finds_nothing";
    FUZZ.run(test, &seeds(), target, work.path());
}

// Kinds of interfaces: all have an MTU of 1500.
const PLAIN: u8 = 2;
const WITH_IPV6: u8 = 2 | 4;
const WITHOUT_TOKENS: u8 = 2 | 64;

/// How a deed's kind says that 2187 ms pass.
const SECONDS_2: u8 = 7 << 4;

/// What well-behaved clients say, as the responders' own tests do.
fn seeds() -> Vec<Vec<u8>> {
    let input = |kind: u8, deeds: &[Vec<u8>]| [&[kind], deeds.concat().as_slice()].concat();
    let right = |frame: Vec<u8>| deed(SET_RIGHT, &frame);
    let link = "fe80::ff:fe00:7".parse().unwrap();
    let routers = "ff02::2".parse().unwrap();
    let solicit =
        [[0, 1, 0, 10].as_slice(), &[0, 3, 0, 1], &MAC.octets(), &[0, 3, 0, 12], &[9; 12]];
    let solicit = [&[1, 1, 2, 3], solicit.concat().as_slice()].concat();
    let time = |from, to: &str| ip(from, to.parse().unwrap(), udp(4000, 123, &ntp()));
    let mut seeds = vec![
        input(PLAIN, &[right(dhcp(1, &[])), right(dhcp(3, &[50, 4, 10, 0, 0, 5]))]),
        input(PLAIN | 8, &[right(dhcp(1, &[61, 3, 1, 2, 3])), right(dhcp(8, &[]))]),
        input(PLAIN, &[right(time(ADDRESS.into(), "169.254.169.123"))]),
        input(WITH_IPV6, &[right(time(ADDRESS6.into(), "fd00:ec2::123"))]),
        input(WITH_IPV6, &[right(ip(link, routers, (58, vec![133, 0, 0, 0, 0, 0, 0, 0])))]),
        input(WITH_IPV6, &[right(ip(link, routers, udp(546, 547, &solicit)))]),
    ];
    let [own, others] = ["i-7.r.internal", "a.example"].map(|name| {
        let asked = query(name);
        ip(ADDRESS.into(), RESOLVER.into(), udp(4000, 53, &asked))
    });
    let answer = [&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0][..], &ADDRESS_RECORD].concat();
    let heard = deed(HEARD, &answer);
    let again = right(others.clone());
    seeds.push(input(PLAIN, &[right(own), again.clone(), heard.clone(), again.clone()]));
    // Nobody answers; then many names, each with an answer.
    seeds.push(input(PLAIN, &[deed(SET_RIGHT | SECONDS_2, &others), deed(HEARD, &[])]));
    let counted = [&[0, 55][..], &others].concat();
    let many = deed(SET_RIGHT | MANY_TIMES, &counted);
    seeds.push(input(PLAIN, &[many, deed(HEARD | MANY_TIMES, &answer)]));
    seeds.push(hoard());
    let long = [&[61, 255], &[1; 255][..]].concat();
    seeds.push(input(8, &[right(dhcp(1, &long))]));
    let asked = query("a.example");
    let asked = [&(asked.len() as u16).to_be_bytes()[..], &asked].concat();
    let to = (RESOLVER, 53);
    seeds.push(input(PLAIN, &[open(to), say(to, &asked), vec![heard], say(to, &[])].concat()));

    let imds = (Ipv4Addr::new(169, 254, 169, 254), 80);
    let put = b"PUT /latest/api/token HTTP/1.1\r\nHost: h\r\n\
        X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n";
    let get = |path: &str, token: &str| {
        let head = format!("GET /latest/{path} HTTP/1.1\r\nHost: h\r\n");
        format!("{head}X-aws-ec2-metadata-token: {token}\r\n\r\n").into_bytes()
    };
    let plain = b"GET /latest/user-data HTTP/1.0\r\n\r\n";
    seeds.push(input(WITHOUT_TOKENS, &[open(imds), say(imds, plain), acknowledge(imds)].concat()));
    let first = [open(imds), say(imds, put)].concat();
    let token = token(&first);
    let second = say(imds, &get("meta-data/public-keys/", &token));
    seeds.push(input(PLAIN, &[first, second].concat()));
    let slow = deed(CONTINUED | 9 << 4, &segment(imds, ACK, b"GET /la"));
    seeds.push(input(PLAIN, &[open(imds), vec![slow]].concat()));
    // Many open, and begin to ask.
    let [opens, asks] = [(SET_RIGHT, SYN, &b""[..]), (CONTINUED, ACK, b"GET / HTTP/1.1\r\n")].map(
        |(kind, flags, bytes)| {
            deed(kind | MANY_TIMES, &[&[0, 34], segment(imds, flags, bytes).as_slice()].concat())
        },
    );
    seeds.push(input(PLAIN, &[opens, asks]));
    seeds
}

/// As many answers as are remembered, each as large as can be made of few bytes: a long
/// name, and records that point to it.
fn hoard() -> Vec<u8> {
    let mut input = vec![PLAIN];
    for first in "aAbBcC".chars() {
        let name = [first.to_string().repeat(60), "x".repeat(63), "y".repeat(63), "z".repeat(50)];
        let asked = ip(ADDRESS.into(), RESOLVER.into(), udp(4000, 53, &query(&name.join("."))));
        input.extend(deed(SET_RIGHT | MANY_TIMES, &[&[0, 55][..], &asked].concat()));
        let record = [0xc0, 12, 0, 2, 0, 1, 0, 0, 14, 16, 0, 2, 0xc0, 12];
        let header = [0x81, 0x80, 0, 1, 0, 120, 0, 0, 0, 0];
        input.extend(deed(HEARD | MANY_TIMES, &[&header[..], &record.repeat(120)].concat()));
    }
    input
}

/// What the metadata service gives to who asks for one in these deeds.
fn token(deeds: &[Vec<u8>]) -> String {
    let mut host = Host::new(PLAIN);
    for deed in deeds {
        host.suffer(deed[0], &deed[3..]);
    }
    let told = String::from_utf8(host.told).unwrap();
    assert!(told.starts_with("HTTP/1.1 200"), "{told}");
    told.rsplit("\r\n\r\n").next().unwrap().to_owned()
}

/// The name asked for, its address, and for how long that holds.
const ADDRESS_RECORD: [u8; 16] = [0xc0, 12, 0, 1, 0, 1, 0, 0, 14, 16, 0, 4, 192, 0, 2, 7];

const SYN: u8 = 2;
const ACK: u8 = 16;

type Service = (Ipv4Addr, u16);

fn open(to: Service) -> Vec<Vec<u8>> {
    vec![deed(SET_RIGHT, &segment(to, SYN, b"")), acknowledge(to)[0].clone()]
}

fn acknowledge(to: Service) -> Vec<Vec<u8>> {
    vec![deed(CONTINUED, &segment(to, ACK, b""))]
}

fn say(to: Service, bytes: &[u8]) -> Vec<Vec<u8>> {
    vec![deed(CONTINUED, &segment(to, ACK | 8, bytes))]
}

fn segment((to, port): Service, flags: u8, bytes: &[u8]) -> Vec<u8> {
    let ports = [40_000_u16.to_be_bytes(), port.to_be_bytes()].concat();
    let rest = [0, 0, 0, 1, 0, 0, 0, 0, 0x50, flags, 0xff, 0xff, 0, 0, 0, 0];
    ip(ADDRESS.into(), to.into(), (6, [&ports, &rest[..], bytes].concat()))
}

/// A frame with a packet of a protocol; its lengths and checksums are set right elsewhere.
fn ip(from: IpAddr, to: IpAddr, (protocol, payload): (u8, Vec<u8>)) -> Vec<u8> {
    let mut frame = [&[0; 6][..], &MAC.octets()].concat();
    match (from, to) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            frame.extend([8, 0, 0x45, 0, 0, 0, 0, 0, 0x40, 0, 64, protocol, 0, 0]);
            frame.extend([from.octets(), to.octets()].concat());
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 0, protocol, 255]);
            frame.extend([from.octets(), to.octets()].concat());
        }
        _ => panic!("both are of one family"),
    }
    [frame, payload].concat()
}

fn udp(from: u16, to: u16, message: &[u8]) -> (u8, Vec<u8>) {
    (17, [&from.to_be_bytes()[..], &to.to_be_bytes(), &[0; 4], message].concat())
}

fn dhcp(kind: u8, options: &[u8]) -> Vec<u8> {
    let mut message = [&[1, 1, 6, 0, 1, 2, 3, 4][..], &[0; 20], &MAC.octets()].concat();
    // RFC 2131: whoever informs itself has an address.
    if kind == 8 {
        message[12..16].copy_from_slice(&ADDRESS.octets());
    }
    message.resize(236, 0);
    message.extend([99, 130, 83, 99, 53, 1, kind]);
    message.extend([options, &[255]].concat());
    let (from, to) = (Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST);
    ip(from.into(), to.into(), udp(68, 67, &message))
}

fn ntp() -> [u8; 48] {
    let mut question = [0; 48];
    question[0] = 4 << 3 | 3;
    question
}

/// A question for a name's address.
fn query(name: &str) -> Vec<u8> {
    let mut message = vec![0, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in name.split('.') {
        message.push(label.len() as u8);
        message.extend(label.as_bytes());
    }
    [&message[..], &[0, 0, 1, 0, 1]].concat()
}
