//! The session against bytes: any split of a conversation is the same
//! conversation, and no bytes whatever break it.

use block_server::nbd::session::{Answer, HANDSHAKE_SPACE, IN_FLIGHT_MAX, TRANSMISSION_SPACE};
use block_server::nbd::{Command, Export, Exports, Request, Session};
use proptest::prelude::*;

const SIZE: u64 = 1 << 20;

struct One;

impl Exports for One {
    fn find(&self, name: &str) -> Option<Export> {
        (name.is_empty() || name == "disk").then(|| Export {
            size: SIZE,
            read_only: false,
            description: "a disk".to_owned(),
            block_min: 512,
            key: 0,
        })
    }

    fn names(&self) -> Vec<String> {
        vec!["disk".to_owned()]
    }
}

/// What a peer does that sends `input` in these pieces and reads all: the
/// requests that came through, and the bytes that went back.
fn converse(input: &[u8], piece: impl Fn(usize) -> usize) -> (Vec<Request>, Vec<u8>) {
    let mut session: Session<Vec<u8>> = Session::new();
    let (mut requests, mut output, mut at, mut turn) = (Vec::new(), Vec::new(), 0_usize, 0);
    loop {
        let end = at.saturating_add(piece(turn).max(1)).min(input.len());
        turn += 1;
        let taken = session.receive(&input[at..end]);
        at += taken;
        serve(&mut session, &mut requests);
        let before = output.len();
        let mut chunks = Vec::new();
        let held = session.transmit(&mut chunks);
        for chunk in &chunks {
            output.extend_from_slice(chunk.bytes());
        }
        session.sent(held);
        let stuck = taken == 0 && output.len() == before;
        if stuck && (at == input.len() || session.is_closed()) {
            return (requests, output);
        }
    }
}

fn serve(session: &mut Session<Vec<u8>>, requests: &mut Vec<Request>) {
    loop {
        let mut sink = [0; 4096];
        while session.take_payload(&mut sink) > 0 {}
        if session.payload_left() > 0 {
            return;
        }
        if let Some(request) = requests.last().filter(|_| session.in_flight() > 0).copied() {
            let answer = match request.command {
                Command::Read => Answer::Data(vec![request.offset as u8; request.length as usize]),
                Command::BlockStatus { .. } => Answer::Extents(vec![(request.length, 0)]),
                _ => Answer::Done,
            };
            session.answer(&request, answer);
        }
        match session.next_request(&One) {
            Some(request) => requests.push(request),
            None => return,
        }
    }
}

fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

fn go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    for info in infos {
        data.extend_from_slice(&info.to_be_bytes());
    }
    option(7, &data)
}

fn request(flags: u16, kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    [
        &0x2560_9513_u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

fn extended_request(flags: u16, kind: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    [
        &0x21e4_1c71_u32.to_be_bytes()[..],
        &flags.to_be_bytes(),
        &kind.to_be_bytes(),
        &cookie.to_be_bytes(),
        &offset.to_be_bytes(),
        &length.to_be_bytes(),
    ]
    .concat()
}

/// Everything that a client may say, lawful and not, in one conversation.
fn conversation(structured: bool) -> Vec<u8> {
    let mut bytes = talk(structured);
    bytes.extend(request(0, 1, 14, 0, 33 << 20));
    bytes.extend(vec![0; 33 << 20]);
    bytes.extend(request(0, 0, 15, 512, 512));
    bytes.extend(request(0, 2, 16, 0, 0));
    bytes.extend(b"nobody reads this");
    bytes
}

/// The part before the long payload.
fn talk(structured: bool) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option(99, b"whatever"));
    bytes.extend(option(5, b""));
    bytes.extend(option(3, b""));
    bytes.extend(option(3, b"no data belongs here"));
    bytes.extend(option(77, &vec![1; HANDSHAKE_SPACE + 100]));
    if structured {
        bytes.extend(option(8, b""));
        bytes.extend(option(8, b""));
        bytes.extend(option(9, b"\0\0\0\0\0\0\0\0"));
        bytes.extend(option(10, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation"));
    }
    bytes.extend(go("nowhere", &[]));
    bytes.extend(option(7, b"\0\0\0\x09short"));
    bytes.extend(go("disk", &[3, 1, 2]));
    bytes.extend(request(0, 0, 1, 0, 4096));
    bytes.extend(request(1, 1, 2, 4096, 8192));
    bytes.extend(vec![0x25; 8192]);
    bytes.extend(request(0, 3, 3, 0, 0));
    bytes.extend(request(0, 1, 4, SIZE - 512, 1024));
    bytes.extend(vec![0x25; 1024]);
    bytes.extend(request(0, 0, 5, 100, 512));
    bytes.extend(request(0, 0, 6, u64::MAX - 100, 512));
    bytes.extend(request(0, 0, 7, 0, u32::MAX));
    bytes.extend(request(0x8000, 0, 8, 0, 512));
    bytes.extend(request(0, 4, 9, 0, 4096));
    bytes.extend(request(2, 6, 10, 0, 4096));
    bytes.extend(request(0, 7, 11, 0, 4096));
    bytes.extend(request(0, 5, 12, 0, 4096));
    bytes.extend(request(0, 4242, 13, 0, 0));
    bytes
}

#[test]
fn every_request_is_answered_once_and_in_its_own_terms() {
    let (requests, output) = converse(&conversation(false), |_| usize::MAX);
    let cookies: Vec<u64> = requests.iter().map(|r| r.cookie).collect();
    assert_eq!(cookies, [1, 2, 3, 9, 10, 12, 15]);
    // After the handshake, simple replies only: error and cookie of each.
    let marker = 0x6744_6698_u32.to_be_bytes();
    let replies: Vec<(u32, u64)> = output
        .windows(16)
        .filter(|w| w[..4] == marker)
        .map(|w| {
            (
                u32::from_be_bytes(w[4..8].try_into().unwrap()),
                u64::from_be_bytes(w[8..16].try_into().unwrap()),
            )
        })
        .collect();
    let expected = [
        (0, 1),
        (0, 2),
        (0, 3),
        (28, 4),
        (22, 5),
        (22, 6),
        (22, 7),
        (22, 8),
        (0, 9),
        (0, 10),
        (22, 11),
        (0, 12),
        (22, 13),
        (28, 14),
        (0, 15),
    ];
    assert_eq!(replies, expected);
}

#[test]
fn extended_headers_carry_lengths_of_64_bits() {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option(11, b""));
    bytes.extend(option(10, b"\0\0\0\0\0\0\0\x01\0\0\0\x0fbase:allocation"));
    bytes.extend(go("", &[3]));
    bytes.extend(extended_request(0, 0, 1, 512, 1024));
    bytes.extend(extended_request(1 << 5, 1, 2, 0, 512));
    bytes.extend(vec![7; 512]);
    bytes.extend(extended_request(0, 7, 3, 0, SIZE));
    bytes.extend(extended_request(0, 0, 4, 0, 5 << 32));
    let (requests, output) = converse(&bytes, |_| 7);
    assert_eq!(requests.iter().map(|r| r.cookie).collect::<Vec<_>>(), [1, 2, 3]);
    let marker = 0x6e8a_278c_u32.to_be_bytes();
    let chunks: Vec<(u16, u64, u64)> = output
        .windows(32)
        .filter(|w| w[..4] == marker)
        .map(|w| {
            (
                u16::from_be_bytes(w[6..8].try_into().unwrap()),
                u64::from_be_bytes(w[8..16].try_into().unwrap()),
                u64::from_be_bytes(w[24..32].try_into().unwrap()),
            )
        })
        .collect();
    assert_eq!(chunks, [(1, 1, 8 + 1024), (0, 2, 0), (6, 3, 4 + 4 + 16), (0x8001, 4, 6)]);
}

#[test]
fn the_old_way_in_gets_its_124_zeros_unless_it_waives_them() {
    for (flags, zeros) in [(1_u32, 124), (3, 0)] {
        let mut bytes = flags.to_be_bytes().to_vec();
        bytes.extend(option(1, b"disk"));
        bytes.extend(request(0, 0, 1, 1, 3));
        let (requests, output) = converse(&bytes, |_| 3);
        assert_eq!(output.len(), 18 + 10 + zeros + 16 + 3);
        // Who was told no block size may ask for any byte.
        assert_eq!((requests[0].offset, requests[0].length), (1, 3));
    }
}

#[test]
fn a_session_that_stops_finishes_the_write_it_has_begun_and_begins_no_other() {
    let mut session: Session<Vec<u8>> = Session::new();
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(go("disk", &[]));
    bytes.extend(request(0, 1, 1, 0, 1024));
    bytes.extend(vec![5; 600]);
    session.receive(&bytes);
    let first = session.next_request(&One).unwrap();
    let mut payload = [0; 1024];
    let taken = session.take_payload(&mut payload);
    session.stop_reading();
    session.receive(&[vec![5; 424], request(0, 1, 2, 0, 512)].concat());
    assert_eq!(session.take_payload(&mut payload[taken..]), 424);
    assert_eq!(payload, [5; 1024]);
    assert_eq!(session.payload_left(), 0);
    assert_eq!(session.next_request(&One), None);
    session.answer(&first, Answer::Done);
    assert!(session.has_output() && session.in_flight() == 0);
}

#[test]
fn a_peer_that_never_reads_is_not_listened_to_for_long() {
    let mut session: Session<Vec<u8>> = Session::new();
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(go("disk", &[]));
    assert_eq!(session.receive(&bytes), bytes.len());
    let mut taken = 0_usize;
    let mut answered = 0_usize;
    let mut chunks = Vec::new();
    for cookie in 0..100_000 {
        // Every fourth is refused, which takes a reply as well.
        let offset = if cookie % 4 == 0 { SIZE } else { 0 };
        taken += session.receive(&request(0, 0, cookie, offset, 4096));
        // The kernel's buffer is full: handed out, but never sent.
        let _ = session.transmit(&mut chunks);
        while let Some(request) = session.next_request(&One) {
            session.answer(&request, Answer::Data(vec![0; 4096]));
            answered += 1;
        }
    }
    assert!(answered < IN_FLIGHT_MAX, "{answered}");
    assert!(chunks.len() <= 2 * IN_FLIGHT_MAX + 8, "{}", chunks.len());
    assert!(taken <= TRANSMISSION_SPACE + HANDSHAKE_SPACE + IN_FLIGHT_MAX * 28, "{taken}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 8, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_split_is_the_same_conversation(
        structured in any::<bool>(),
        pieces in prop::collection::vec(1_usize..60_000, 1..20),
        tiny in 1_usize..40,
    ) {
        let bytes = conversation(structured);
        let whole = converse(&bytes, |_| usize::MAX);
        // Small pieces where the talk is, large ones for the long payload.
        let split = converse(&bytes, |turn| {
            if turn < 900 { tiny } else { pieces[turn % pieces.len()] }
        });
        prop_assert_eq!(whole.0, split.0);
        prop_assert!(whole.1 == split.1);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_bytes_break_it(
        noise in prop::collection::vec(any::<u8>(), 0..300),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..12),
        structured in any::<bool>(),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = talk(structured);
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        let at = cut.index(bytes.len());
        bytes.splice(at..at, noise);
        converse(&bytes, |_| usize::MAX);
    }
}
