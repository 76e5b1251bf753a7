use model::InterfaceId;
use proptest::prelude::*;

use super::super::documents::Documents;
use super::super::token::TokenKey;
use super::*;

const NOW: Duration = Duration::from_secs(5);

fn service() -> Service {
    let map = [("user-data", "#!/bin/sh\n"), ("meta-data/instance-id", "i-1")]
        .map(|(k, v)| (k.to_owned(), v.to_owned()));
    Service::new(
        InterfaceId::from_random(1),
        Documents::parse(&map.into()).unwrap(),
        TokenKey::new([3; 32]),
        0,
    )
}

/// Everything that a connection answers to `bytes`, fed in pieces that end at `cuts`.
fn converse(bytes: &[u8], cuts: &[usize]) -> (Vec<u8>, bool) {
    let (mut service, mut session, mut answers) = (service(), Session::default(), Vec::new());
    let mut cuts: Vec<usize> = cuts.iter().map(|c| c % (bytes.len() + 1)).collect();
    cuts.push(bytes.len());
    cuts.sort_unstable();
    let mut at = 0;
    for cut in cuts {
        while at < cut {
            let taken = session.receive(&bytes[at..cut]);
            at += taken;
            while let Some(answer) = session.next_answer(&mut service, NOW) {
                answers.extend(answer);
            }
            if session.closing() {
                return (answers, true);
            }
            assert!(taken > 0, "a session that takes nothing must have answered");
        }
    }
    (answers, session.closing())
}

fn status(request: &str) -> String {
    let (answer, _) = converse(request.as_bytes(), &[]);
    let text = String::from_utf8(answer).unwrap();
    text.split_whitespace().nth(1).unwrap_or("none").to_owned()
}

fn token() -> String {
    TokenKey::new([3; 32]).seal(InterfaceId::from_random(1), 60, 9, NOW)
}

/// A keep-alive conversation: token, document, HEAD, a PUT with a body, close.
fn conversation() -> Vec<u8> {
    let token = token();
    format!(
        "PUT /latest/api/token HTTP/1.1\r\nHost: 169.254.169.254\r\n\
         X-aws-ec2-metadata-token-ttl-seconds: 60\r\nContent-Length: 5\r\n\r\nhello\
         GET /latest/user-data?x=1 HTTP/1.1\r\nHost: h\r\nX-aws-ec2-metadata-token: {token}\r\n\r\n\
         HEAD /latest/meta-data/instance-id HTTP/1.1\r\nhost: h\r\nx-aws-ec2-metadata-token: {token}\r\n\r\n\
         GET http://h/latest/meta%2Ddata/ HTTP/1.1\r\nHost: h\r\nX-AWS-EC2-METADATA-TOKEN: {token}\r\n\
         Connection: close\r\n\r\n"
    )
    .into_bytes()
}

#[test]
fn a_kept_connection_answers_in_turn_and_ends_when_told() {
    let (answers, closed) = converse(&conversation(), &[]);
    let text = String::from_utf8(answers).unwrap();
    assert!(closed);
    assert_eq!(text.matches("HTTP/1.1 200 OK").count(), 4, "{text}");
    assert!(text.contains("\r\n\r\n#!/bin/sh\nHTTP/1.1"), "{text}");
    assert!(text.contains("Content-Length: 3\r\nConnection: keep-alive"), "{text}");
    assert!(text.ends_with("\r\n\r\ninstance-id"), "{text}");
}

#[test]
fn each_fault_gets_its_own_status_and_ends_the_connection() {
    let long = "a".repeat(10_000);
    for (request, expected) in [
        ("GET / HTTP/1.1\r\nHost: h\r\n\r\n", "401"),
        ("GET / HTTP/1.0\r\n\r\n", "401"),
        ("GET / HTTP/1.1\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "400"),
        ("GET / HTTP/2.0\r\n\r\n", "505"),
        ("\x16\x03\x01\x02\x00 \r\n\r\n", "400"),
        ("GET noslash HTTP/1.1\r\nHost: h\r\n\r\n", "400"),
        ("GET /%zz HTTP/1.1\r\nHost: h\r\n\r\n", "400"),
        ("GET /%ff HTTP/1.1\r\nHost: h\r\n\r\n", "400"),
        ("PUT / HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "501"),
        ("PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 1025\r\n\r\n", "413"),
        ("PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 99999999999999999999\r\n\r\n", "413"),
        ("PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: -1\r\n\r\n", "400"),
        ("PUT / HTTP/1.1\r\nHost: h\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n", "400"),
        ("DELETE / HTTP/1.1\r\nHost: h\r\n\r\n", "405"),
        (&format!("GET /{long} HTTP/1.1\r\nHost: h\r\n\r\n"), "414"),
        (&format!("GET /{} HTTP/1.1\r\nHost: h\r\n\r\n", &long[..3000]), "414"),
        (&format!("GET / HTTP/1.1\r\nHost: {long}\r\n\r\n"), "431"),
        (&format!("GET / HTTP/1.1\r\nHost: h\r\n{}\r\n", "a: b\r\n".repeat(65)), "431"),
    ] {
        assert_eq!(status(request), expected, "{}", &request[..request.len().min(80)]);
    }
}

#[test]
fn a_slow_request_is_timed_out_with_its_status() {
    let mut session = Session::default();
    session.receive(b"GET /latest");
    assert!(session.in_request());
    assert!(session.time_out().starts_with(b"HTTP/1.1 408 "));
    assert!(session.closing());
    assert_eq!(session.receive(b"more"), 0);
}

#[test]
fn every_single_cut_gives_the_same_answers() {
    let bytes = conversation();
    let whole = converse(&bytes, &[]);
    for cut in 0..bytes.len() {
        assert_eq!(converse(&bytes, &[cut]), whole, "cut at {cut}");
    }
    let every: Vec<usize> = (0..bytes.len()).collect();
    assert_eq!(converse(&bytes, &every), whole, "byte by byte");
}

proptest! {
    #[test]
    fn any_splits_give_the_same_answers(
        cuts in proptest::collection::vec(any::<usize>(), 0..12),
        damage in proptest::option::of((any::<usize>(), any::<u8>())),
    ) {
        let mut bytes = conversation();
        if let Some((at, to)) = damage {
            let length = bytes.len();
            bytes[at % length] = to;
        }
        prop_assert_eq!(converse(&bytes, &cuts), converse(&bytes, &[]));
    }

    #[test]
    fn garbage_never_panics_and_never_opens_a_document(
        bytes in proptest::collection::vec(any::<u8>(), 0..20_000),
        cuts in proptest::collection::vec(any::<usize>(), 0..6),
    ) {
        let (answers, _) = converse(&bytes, &cuts);
        let opened = answers.windows(15).any(|w| w == b"HTTP/1.1 200 OK");
        prop_assert!(!opened);
    }
}
