//! A peer's side of one NBD connection, for the tests of the session and its
//! fuzzing: what may be said, how it is served, and what must come back.

#![allow(dead_code, reason = "each program uses a part of it")]

use super::nbd::session::{Answer, IN_FLIGHT_MAX, PAYLOAD_MAX, TRANSMISSION_SPACE};
use super::nbd::{Command, Export, Exports, Request, Session};

pub const SIZE: u64 = 128 << 10;

/// One volume of [`SIZE`], by two names.
pub struct One;

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

    fn list(&self) -> Vec<(String, String)> {
        vec![("disk".to_owned(), "a disk".to_owned())]
    }
}

/// How replies look, by what the client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Simple,
    Structured,
    Extended,
}

/// What a peer does that sends `input` in these pieces and reads all: the
/// requests that came through, and the bytes that went back. `piece` is told
/// what has been sent so far. `patience` requests are left unanswered while more
/// come; then they are answered, the last first.
pub fn converse(
    input: &[u8],
    patience: usize,
    mut piece: impl FnMut(usize) -> usize,
) -> (Vec<Request>, Vec<u8>) {
    let mut session: Session<Vec<u8>> = Session::new();
    let (mut requests, mut output, mut at) = (Vec::new(), Vec::new(), 0_usize);
    let mut pending = Vec::new();
    loop {
        let end = at.saturating_add(piece(at).max(1)).min(input.len());
        let taken = session.receive(&input[at..end]);
        at += taken;
        let before = (output.len(), pending.len(), requests.len());
        take_requests(&mut session, &mut requests, &mut pending, patience);
        assert!(session.in_flight() <= IN_FLIGHT_MAX, "{} in flight", session.in_flight());
        assert!(session.space().len() <= TRANSMISSION_SPACE, "the input grew");
        if taken == 0 && pending.len() == before.1 {
            answer_all(&mut session, &mut pending);
        }
        let mut chunks = Vec::new();
        let held = session.transmit(&mut chunks);
        for chunk in &chunks {
            output.extend_from_slice(chunk.bytes());
        }
        session.sent(held);
        let still = (output.len(), pending.len(), requests.len()) == before && taken == 0;
        if still && (at == input.len() || session.is_closed()) {
            // A write whose payload never came is the only one left.
            assert!(session.in_flight() <= 1, "{} never answered", session.in_flight());
            return (requests, output);
        }
    }
}

/// A write is pending once all its payload is there.
pub fn take_requests(
    session: &mut Session<Vec<u8>>,
    requests: &mut Vec<Request>,
    pending: &mut Vec<Request>,
    patience: usize,
) {
    loop {
        if pending.len() > patience {
            answer_all(session, pending);
        }
        let mut sink = [0; 4096];
        let was_short = session.payload_left() > 0;
        while session.take_payload(&mut sink) > 0 {}
        if session.payload_left() > 0 {
            return;
        }
        if was_short {
            pending.extend(requests.last());
            continue;
        }
        let Some(request) = session.next_request(&One) else { return };
        check(&request);
        requests.push(request);
        if session.payload_left() == 0 {
            pending.push(request);
        }
    }
}

pub fn answer_all(session: &mut Session<Vec<u8>>, pending: &mut Vec<Request>) {
    for request in pending.drain(..).rev() {
        session.answer(&request, answer_to(&request));
    }
}

/// A volume may trust what the session lets through.
fn check(request: &Request) {
    let end = request.offset.checked_add(request.length);
    assert!(end.is_some_and(|end| end <= SIZE), "out of bounds: {request:?}");
    let carries = matches!(request.command, Command::Read | Command::Write);
    assert!(!carries || request.length <= u64::from(PAYLOAD_MAX), "oversize: {request:?}");
}

fn answer_to(request: &Request) -> Answer<Vec<u8>> {
    match request.command {
        Command::Read => Answer::Data(vec![request.offset as u8; request.length as usize]),
        Command::BlockStatus { .. } => Answer::Extents(vec![(request.length, 0)]),
        _ => Answer::Done,
    }
}

/// One reply of the transmission phase.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reply {
    pub cookie: u64,
    /// Of an error, else zero.
    pub error: u32,
    /// Bytes of data.
    pub length: u64,
}

fn be(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte))
}

/// Reads what a server sent as a client does, from its first byte to its last.
/// `requests` tell how much data a simple reply carries.
pub fn replies(output: &[u8], requests: &[Request]) -> Result<Vec<Reply>, String> {
    let mut rest = after_handshake(output)?;
    let mut found = Vec::new();
    while !rest.is_empty() {
        let cut =
            || format!("{} bytes are no reply: {:x?}", rest.len(), &rest[..rest.len().min(40)]);
        let field = |from: usize, to: usize| rest.get(from..to).map(be).ok_or_else(cut);
        let (header, reply) = match field(0, 4)? {
            0x6744_6698 => {
                let (error, cookie) = (field(4, 8)? as u32, field(8, 16)?);
                let read =
                    requests.iter().find(|r| r.cookie == cookie && r.command == Command::Read);
                let length = if error == 0 { read.map_or(0, |r| r.length) } else { 0 };
                (16, Reply { cookie, error, length })
            }
            magic @ (0x668e_33ef | 0x6e8a_278c) => {
                let header = if magic == 0x668e_33ef { 20 } else { 32 };
                let length = field(header - if header == 20 { 4 } else { 8 }, header)?;
                if field(4, 6)? != 1 {
                    return Err("a reply of several chunks".to_owned());
                }
                let failed = field(6, 8)? == 0x8001;
                if field(6, 8)? == 1 && length <= 8 {
                    return Err("a chunk of data without any".to_owned());
                }
                let error = if failed { field(header, header + 4)? as u32 } else { 0 };
                (header, Reply { cookie: field(8, 16)?, error, length })
            }
            magic => return Err(format!("{magic:x} begins no reply")),
        };
        rest = rest.get(header + reply.length as usize..).ok_or_else(cut)?;
        found.push(reply);
    }
    Ok(found)
}

/// Skips the greeting and the options' replies.
fn after_handshake(output: &[u8]) -> Result<&[u8], String> {
    let mut rest = output.strip_prefix(b"NBDMAGICIHAVEOPT\0\x03").ok_or("no greeting")?;
    while rest.len() >= 20 && be(&rest[..8]) == 0x0003_e889_0455_65a9 {
        let length = be(&rest[16..20]) as usize;
        rest = rest.get(20 + length..).ok_or("an option's reply is cut")?;
    }
    // The old way in: size, flags, and zeros where they were not waived.
    if rest.len() >= 10 && be(&rest[..8]) == SIZE {
        rest = &rest[10..];
        rest = rest.strip_prefix(&[0; 124]).unwrap_or(rest);
    }
    Ok(rest)
}

/// Each request that came through has one reply, and what was sent is replies
/// and nothing else. Replies to what was refused are beside them.
///
/// A client that uses a cookie twice cannot tell its replies apart, nor can we.
pub fn holds(requests: &[Request], output: &[u8]) -> Result<(), String> {
    let cookies: std::collections::BTreeSet<u64> = requests.iter().map(|r| r.cookie).collect();
    if cookies.len() < requests.len() {
        return Ok(());
    }
    let mut left = replies(output, requests)?;
    // The last write's payload may be missing.
    let waits = requests.last().filter(|r| r.command == Command::Write && r.length > 0);
    for request in requests {
        // A refused one may have the same cookie.
        match left.iter().position(|r| r.cookie == request.cookie && r.error == 0) {
            Some(at) => {
                left.swap_remove(at);
            }
            None if waits == Some(request) => {}
            None => return Err(format!("never answered: {request:?}")),
        }
    }
    match left.iter().find(|r| r.error == 0) {
        Some(reply) => Err(format!("nobody asked for {reply:?}")),
        None => Ok(()),
    }
}

/// What fuzzing tries: two bytes say how it is sent and answered, the rest is sent.
pub fn hold(input: &[u8]) {
    let [patience, piece, rest @ ..] = input else { return };
    let piece = if *piece == 0 { usize::MAX } else { usize::from(*piece) };
    let (requests, output) = converse(rest, usize::from(patience % 8), |_| piece);
    if let Err(told) = holds(&requests, &output) {
        panic!("{told}");
    }
}

pub fn option(number: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT", &number.to_be_bytes()[..], &(data.len() as u32).to_be_bytes(), data].concat()
}

pub fn go(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = (name.len() as u32).to_be_bytes().to_vec();
    data.extend_from_slice(name.as_bytes());
    data.extend_from_slice(&(infos.len() as u16).to_be_bytes());
    for info in infos {
        data.extend_from_slice(&info.to_be_bytes());
    }
    option(7, &data)
}

pub fn request(flags: u16, kind: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
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

pub fn extended_request(flags: u16, kind: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
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

/// Everything that a client may say, lawful and not, in one conversation of some
/// kilobytes.
pub fn talk(mode: Mode, long_option: usize) -> Vec<u8> {
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    bytes.extend(option(99, b"whatever"));
    bytes.extend(option(5, b""));
    bytes.extend(option(3, b""));
    bytes.extend(option(3, b"no data belongs here"));
    bytes.extend(option(77, &vec![1; long_option]));
    match mode {
        Mode::Simple => {}
        Mode::Structured => {
            bytes.extend(option(8, b""));
            bytes.extend(option(8, b""));
        }
        Mode::Extended => {
            bytes.extend(option(11, b""));
            bytes.extend(option(8, b""));
        }
    }
    if mode != Mode::Simple {
        bytes.extend(option(9, b"\0\0\0\0\0\0\0\0"));
        bytes.extend(option(10, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation"));
    }
    bytes.extend(go("nowhere", &[]));
    bytes.extend(option(7, b"\0\0\0\x09short"));
    bytes.extend(go("disk", &[3, 1, 2]));
    let ask = |flags, kind, cookie, offset, length: u32| match mode {
        // A write says that its length is its payload's.
        Mode::Extended => {
            let flags = if kind == 1 { flags | 1 << 5 } else { flags };
            extended_request(flags, kind, cookie, offset, u64::from(length))
        }
        _ => request(flags, kind, cookie, offset, length),
    };
    bytes.extend(ask(0, 0, 1, 0, 4096));
    bytes.extend(ask(1, 1, 2, 4096, 8192));
    bytes.extend(vec![0x25; 8192]);
    bytes.extend(ask(0, 3, 3, 0, 0));
    bytes.extend(ask(0, 1, 4, SIZE - 512, 1024));
    bytes.extend(vec![0x25; 1024]);
    bytes.extend(ask(0, 0, 5, 100, 512));
    bytes.extend(ask(0, 0, 6, u64::MAX - 100, 512));
    bytes.extend(ask(0, 0, 7, 0, u32::MAX));
    bytes.extend(ask(0x8000, 0, 8, 0, 512));
    bytes.extend(ask(0, 4, 9, 0, 4096));
    bytes.extend(ask(2, 6, 10, 0, 4096));
    bytes.extend(ask(0, 7, 11, 0, 4096));
    bytes.extend(ask(0, 5, 12, 0, 4096));
    bytes.extend(ask(0, 4242, 13, 0, 0));
    bytes
}
