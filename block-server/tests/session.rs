//! The session against bytes: any split of a conversation is the same
//! conversation, and no bytes whatever break it.

mod talk;

use block_server::nbd;
use block_server::nbd::Session;
use block_server::nbd::session::{Answer, HANDSHAKE_SPACE, IN_FLIGHT_MAX, TRANSMISSION_SPACE};
use proptest::prelude::*;
use sim::{Random, seed_from_environment};
use talk::{
    Mode, One, Reply, SIZE, converse, extended_request, go, holds, option, replies, request, talk,
};

/// All of a client's talk, then a payload that is too long, and more behind it.
fn conversation(mode: Mode) -> Vec<u8> {
    let mut bytes = talk(mode, HANDSHAKE_SPACE + 100);
    bytes.extend(request(0, 1, 14, 0, 33 << 20));
    bytes.extend(vec![0; 33 << 20]);
    bytes.extend(request(0, 0, 15, 512, 512));
    bytes.extend(request(0, 2, 16, 0, 0));
    bytes.extend(b"nobody reads this");
    bytes
}

fn mode_of(structured: bool) -> Mode {
    if structured { Mode::Structured } else { Mode::Simple }
}

#[test]
fn every_request_is_answered_once_and_in_its_own_terms() {
    let (requests, output) = converse(&conversation(Mode::Simple), 0, |_| usize::MAX);
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
    let (requests, output) = converse(&bytes, 0, |_| 7);
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

/// A read of nothing succeeds, and has no chunk of data: libnbd ends the
/// connection at one that carries none.
#[test]
fn a_read_of_nothing_is_answered_without_data() {
    for mode in [Mode::Simple, Mode::Structured, Mode::Extended] {
        let mut bytes = 3_u32.to_be_bytes().to_vec();
        match mode {
            Mode::Simple => {}
            Mode::Structured => bytes.extend(option(8, b"")),
            Mode::Extended => bytes.extend(option(11, b"")),
        }
        bytes.extend(go("", &[3]));
        bytes.extend(match mode {
            Mode::Extended => extended_request(0, 0, 9, 512, 0),
            Mode::Simple | Mode::Structured => request(0, 0, 9, 512, 0),
        });
        let (requests, output) = converse(&bytes, 0, |_| usize::MAX);
        assert_eq!(requests.len(), 1);
        let replies = replies(&output, &requests).unwrap();
        assert_eq!(replies, [Reply { cookie: 9, error: 0, length: 0 }], "{mode:?}");
    }
}

/// A client that lists the exports is told what each is.
#[test]
fn a_list_tells_names_and_descriptions() {
    let bytes = [&3_u32.to_be_bytes()[..], &option(3, b"")].concat();
    let (_, output) = converse(&bytes, 0, |_| usize::MAX);
    let entry = b"\0\0\0\x02\0\0\0\x0e\0\0\0\x04diska disk";
    assert!(output.windows(entry.len()).any(|w| w == entry), "{output:x?}");
}

#[test]
fn the_old_way_in_gets_its_124_zeros_unless_it_waives_them() {
    for (flags, zeros) in [(1_u32, 124), (3, 0)] {
        let mut bytes = flags.to_be_bytes().to_vec();
        bytes.extend(option(1, b"disk"));
        bytes.extend(request(0, 0, 1, 1, 3));
        let (requests, output) = converse(&bytes, 0, |_| 3);
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
        let bytes = conversation(mode_of(structured));
        let whole = converse(&bytes, 0, |_| usize::MAX);
        // Small pieces where the talk is, large ones for the long payload.
        let mut turn = 0;
        let split = converse(&bytes, 0, |_| {
            turn += 1;
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
        let mut bytes = talk(mode_of(structured), HANDSHAKE_SPACE + 100);
        for (index, byte) in changes {
            let at = index.index(bytes.len());
            bytes[at] = byte;
        }
        let at = cut.index(bytes.len());
        bytes.splice(at..at, noise);
        let (requests, output) = converse(&bytes, 3, |_| usize::MAX);
        holds(&requests, &output).unwrap();
    }
}

/// Found by fuzzing: added to what was in flight, such a length overflowed.
#[test]
fn a_length_of_any_64_bits_is_refused_beside_what_is_in_flight() {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option(11, b""));
    bytes.extend(go("disk", &[3]));
    bytes.extend(extended_request(0, 0, 1, 0, 4096));
    bytes.extend(extended_request(0, 0, 2, 0, u64::MAX));
    bytes.extend(extended_request(0, 0, 3, 0, 512));
    let (requests, output) = converse(&bytes, 7, |_| usize::MAX);
    assert_eq!(requests.iter().map(|r| r.cookie).collect::<Vec<_>>(), [1, 3]);
    holds(&requests, &output).unwrap();
}

const MODES: [Mode; 3] = [Mode::Simple, Mode::Structured, Mode::Extended];

/// Cut in two at each of its places, and sent byte by byte, a conversation is
/// the same conversation.
#[test]
fn a_cut_at_any_place_changes_nothing() {
    for mode in MODES {
        let bytes = talk(mode, 300);
        let whole = converse(&bytes, 0, |_| usize::MAX);
        holds(&whole.0, &whole.1).unwrap();
        assert!(whole.0.len() >= 6, "{mode:?}: {:?}", whole.0);
        for cut in 1..bytes.len() {
            let split = converse(&bytes, 0, |at| if at < cut { cut - at } else { usize::MAX });
            assert!(whole == split, "{mode:?}: cut at {cut}");
        }
        assert!(whole == converse(&bytes, 0, |_| 1), "{mode:?}: byte by byte");
    }
}

/// What a flipped bit on the wire may do. The protocol has no checksum, so a
/// flip in an offset, a length within bounds, a flag, a cookie or the payload is
/// a different lawful request: only TLS, or the guest's own file system, can
/// tell. What can be told must be told: a flip in a magic number closes the
/// connection, one that makes a request unlawful is answered with an error, and
/// none reaches another connection, a byte beyond the volume, or a panic.
#[test]
fn ten_thousand_flipped_bits_harm_their_own_connection_at_most() {
    let seed = seed_from_environment();
    eprintln!("SEED={seed}");
    let mut random = Random::new(seed);
    let (mut same, mut other, mut magic) = (0, 0, 0);
    for round in 0..10_000 {
        let mode = MODES[round % 3];
        let mut bytes = talk(mode, 40);
        let whole = converse(&bytes, 0, |_| usize::MAX);
        let mut at = random.below(bytes.len() as u64) as usize;
        // One in four falls anywhere, the others beside the payload.
        while round % 4 != 0 && bytes[at] == 0x25 {
            at = random.below(bytes.len() as u64) as usize;
        }
        let header = [&b"IHAVEOPT"[..], &[0x25, 0x60, 0x95, 0x13], &[0x21, 0xe4, 0x1c, 0x71]]
            .into_iter()
            .any(|magic| (0..magic.len()).any(|i| at >= i && bytes[at - i..].starts_with(magic)));
        bytes[at] ^= 1 << random.below(8);
        let flipped = converse(&bytes, random.below(4) as usize, |_| usize::MAX);
        holds(&flipped.0, &flipped.1).unwrap_or_else(|e| panic!("{mode:?}: bit at {at}: {e}"));
        if header {
            magic += 1;
            let before = whole.0.len();
            assert!(flipped.0.len() < before || flipped.1.len() < whole.1.len(), "{mode:?}: {at}");
        }
        if flipped.0 == whole.0 { same += 1 } else { other += 1 }
    }
    eprintln!("{magic} in magic numbers; requests unchanged {same} times, changed {other} times");
    assert!(magic > 100 && same > 0 && other > 0);
}

/// Put down and taken up again after each byte, as plain data and by its JSON, a
/// conversation is the same conversation.
#[test]
fn put_down_and_taken_up_at_any_place_a_conversation_is_the_same() {
    for mode in MODES {
        let bytes = talk(mode, 300);
        let (_, whole) = converse(&bytes, 0, |_| usize::MAX);
        let mut session: Session<Vec<u8>> = Session::new();
        let (mut requests, mut pending) = (Vec::new(), Vec::new());
        let mut output: Vec<u8> = Vec::new();
        let mut put_down = 0;
        for byte in &bytes {
            assert!(session.is_closed() || session.receive(&[*byte]) == 1);
            talk::take_requests(&mut session, &mut requests, &mut pending, 0);
            talk::answer_all(&mut session, &mut pending);
            if put_down % 3 == 0 {
                let mut chunks = Vec::new();
                let held = session.transmit(&mut chunks);
                output.extend(chunks.iter().flat_map(|chunk| chunk.bytes()));
                session.sent(held);
            }
            if session.in_flight() > 0 {
                continue;
            }
            let mut frozen = session.freeze(None).unwrap();
            let terms = serde_json::to_string(&frozen.terms).unwrap();
            frozen.terms = serde_json::from_str(&terms).unwrap();
            session = Session::thaw(frozen);
            put_down += 1;
        }
        let mut chunks = Vec::new();
        let _ = session.transmit(&mut chunks);
        output.extend(chunks.iter().flat_map(|chunk| chunk.bytes()));
        assert!(put_down > 100 && output == whole, "{mode:?}");
    }
}
