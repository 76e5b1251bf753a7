//! The second half of a connection: requests, checked, and their replies.
//!
//! ```text
//! request          magic (4) │ flags (2) │ type (2) │ cookie (8) │ offset (8) │ length (4)
//! extended request magic (4) │ flags (2) │ type (2) │ cookie (8) │ offset (8) │ length (8)
//! simple reply     magic (4) │ error (4) │ cookie (8) │ data
//! structured chunk magic (4) │ flags (2) │ type (2) │ cookie (8) │ length (4) │ data
//! extended chunk   magic (4) │ flags (2) │ type (2) │ cookie (8) │ offset (8) │ length (8) │ data
//! ```

use std::collections::VecDeque;

use super::session::{
    Answer, Chunk, Command, HEADER_MAX, Mode, PAYLOAD_MAX, Payload, Request, Transmission,
};
use super::wire::{self, Error, chunk, command, flag};

/// Payload of a refused write is read and dropped up to this size (a client
/// that ignores the limit by a factor of four is answered); beyond it the
/// connection is closed.
pub(super) const SKIP_MAX: u64 = 4 * PAYLOAD_MAX as u64;

/// Extents in one BLOCK_STATUS reply: bounds its size to some tens of KiB.
pub const EXTENTS_MAX: usize = 2048;

/// What a request's header says, before anything is checked.
#[derive(Debug, Clone, Copy)]
pub(super) struct Header {
    pub flags: u16,
    pub kind: u16,
    pub cookie: u64,
    pub offset: u64,
    pub length: u64,
    /// Bytes that follow in the stream.
    pub payload: u64,
}

pub(super) enum Parsed {
    Short,
    Damaged,
    Header(Header),
}

/// Bytes of I/O buffer that a request occupies until it is answered.
pub(super) fn occupied(request: &Request) -> u64 {
    match request.command {
        Command::Read | Command::Write => request.length,
        _ => 0,
    }
}

pub(super) fn parse(mode: Mode, bytes: &[u8]) -> Parsed {
    let (magic, length) = match mode {
        Mode::Extended => (wire::EXTENDED_REQUEST_MAGIC, wire::EXTENDED_REQUEST_LENGTH),
        Mode::Simple | Mode::Structured => (wire::REQUEST_MAGIC, wire::REQUEST_LENGTH),
    };
    let have = bytes.len().min(4);
    if bytes[..have] != magic.to_be_bytes()[..have] {
        return Parsed::Damaged;
    }
    let Some(b) = bytes.get(..length) else { return Parsed::Short };
    let u16_at = |at: usize| u16::from_be_bytes([b[at], b[at + 1]]);
    let u32_at = |at: usize| u32::from_be_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
    let u64_at = |at: usize| (u64::from(u32_at(at)) << 32) | u64::from(u32_at(at + 4));
    let (flags, kind) = (u16_at(4), u16_at(6));
    let length = if mode == Mode::Extended { u64_at(24) } else { u64::from(u32_at(24)) };
    let carries = kind == command::WRITE
        || (mode == Mode::Extended && flags & flag::PAYLOAD_LEN != 0 && kind != command::READ);
    Parsed::Header(Header {
        flags,
        kind,
        cookie: u64_at(8),
        offset: u64_at(16),
        length,
        payload: if carries { length } else { 0 },
    })
}

impl Transmission {
    pub(super) fn is_extended(&self) -> bool {
        self.mode == Mode::Extended
    }

    pub(super) fn header_length(&self) -> usize {
        if self.mode == Mode::Extended {
            wire::EXTENDED_REQUEST_LENGTH
        } else {
            wire::REQUEST_LENGTH
        }
    }

    /// Turns a header into a request that the volume may trust, or says why not.
    pub(super) fn check(&self, header: &Header) -> Result<Request, Error> {
        let &Header { flags, kind, cookie, offset, length, .. } = header;
        let changes = matches!(kind, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        // FUA without effect is lawful on every command (the document, "FUA").
        let mut lawful = flag::FUA;
        let command = match kind {
            command::READ => {
                lawful |= if self.mode > Mode::Simple { flag::DF } else { 0 };
                Command::Read
            }
            command::WRITE => {
                lawful |= if self.mode == Mode::Extended { flag::PAYLOAD_LEN } else { 0 };
                if self.mode == Mode::Extended && flags & flag::PAYLOAD_LEN == 0 {
                    return Err(Error::Invalid);
                }
                Command::Write
            }
            command::FLUSH => Command::Flush,
            command::TRIM => Command::Trim,
            command::CACHE => Command::Cache,
            command::WRITE_ZEROES => {
                lawful |= flag::NO_HOLE | flag::FAST_ZERO;
                Command::WriteZeroes {
                    hole: flags & flag::NO_HOLE == 0,
                    fast: flags & flag::FAST_ZERO != 0,
                }
            }
            command::BLOCK_STATUS if !self.contexts.is_empty() => {
                lawful |= flag::REQ_ONE;
                Command::BlockStatus { one: flags & flag::REQ_ONE != 0 }
            }
            _ => return Err(Error::Invalid),
        };
        if flags & !lawful != 0 {
            return Err(Error::Invalid);
        }
        if changes && self.export.read_only {
            return Err(Error::Perm);
        }
        let request = Request { cookie, command, offset, length, fua: flags & flag::FUA != 0 };
        if command == Command::Flush {
            let zero = Request { offset: 0, length: 0, ..request };
            return if offset == 0 && length == 0 { Ok(zero) } else { Err(Error::Invalid) };
        }
        let in_bounds = offset.checked_add(length).is_some_and(|end| end <= self.export.size);
        if !in_bounds {
            return Err(if changes && command != Command::Trim {
                Error::NoSpace
            } else {
                Error::Invalid
            });
        }
        let carries = matches!(command, Command::Read | Command::Write);
        if carries && length > u64::from(PAYLOAD_MAX) {
            return Err(if command == Command::Read { Error::Overflow } else { Error::Invalid });
        }
        if matches!(command, Command::BlockStatus { .. }) && length == 0 {
            return Err(Error::Invalid);
        }
        if self.told_block_size
            && !(offset | length).is_multiple_of(u64::from(self.export.block_min))
        {
            return Err(Error::Invalid);
        }
        Ok(request)
    }

    pub(super) fn reply<P: Payload>(
        &self,
        request: &Request,
        answer: Answer<P>,
        out: &mut VecDeque<Chunk<P>>,
    ) {
        let &Request { cookie, offset, .. } = request;
        match answer {
            Answer::Failed(error) => {
                let kind = match request.command {
                    Command::Read => command::READ,
                    Command::BlockStatus { .. } => command::BLOCK_STATUS,
                    _ => command::WRITE,
                };
                self.reply_error(cookie, kind, offset, error, out);
            }
            Answer::Done => out.push_back(match self.mode {
                Mode::Extended => self.chunk(cookie, chunk::NONE, offset, 0, &[]),
                // Lawful for all but READ, and four bytes shorter.
                Mode::Simple | Mode::Structured => simple(cookie, 0),
            }),
            // A chunk of data has some; libnbd ends the connection at one that has none.
            Answer::Data(data) if data.bytes().is_empty() && self.mode != Mode::Simple => {
                out.push_back(self.chunk(cookie, chunk::NONE, offset, 0, &[]));
            }
            Answer::Data(data) => {
                out.push_back(match self.mode {
                    Mode::Simple => simple(cookie, 0),
                    Mode::Structured | Mode::Extended => {
                        let length = 8 + data.bytes().len() as u64;
                        self.chunk(
                            cookie,
                            chunk::OFFSET_DATA,
                            offset,
                            length,
                            &offset.to_be_bytes(),
                        )
                    }
                });
                out.push_back(Chunk::Payload(data));
            }
            Answer::Extents(extents) => self.reply_extents(request, &extents, out),
        }
    }

    /// A chunk for each context: its number, then one descriptor an extent.
    fn reply_extents<P: Payload>(
        &self,
        request: &Request,
        extents: &[(u64, u32)],
        out: &mut VecDeque<Chunk<P>>,
    ) {
        let one = request.command == Command::BlockStatus { one: true };
        let count_max = if one { 1 } else { EXTENTS_MAX };
        let kind = if self.is_extended() { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let mut views = self.contexts.views(extents).peekable();
        while let Some((context, mut view)) = views.next() {
            view.truncate(count_max);
            let data = self.extents_data(context, &view);
            let flags = if views.peek().is_none() { chunk::DONE } else { 0 };
            let &Request { cookie, offset, .. } = request;
            out.push_back(self.part(flags, cookie, kind, offset, data.len() as u64, &[]));
            out.push_back(Chunk::Bytes(data));
        }
    }

    fn extents_data(&self, context: u32, extents: &[(u64, u32)]) -> Vec<u8> {
        let mut data = context.to_be_bytes().to_vec();
        if self.is_extended() {
            data.extend_from_slice(&(extents.len() as u32).to_be_bytes());
        }
        for &(length, state) in extents {
            if self.is_extended() {
                data.extend_from_slice(&length.to_be_bytes());
                data.extend_from_slice(&u64::from(state).to_be_bytes());
            } else {
                // A compact request's length has 32 bits, and so has each extent's.
                data.extend_from_slice(&(length as u32).to_be_bytes());
                data.extend_from_slice(&state.to_be_bytes());
            }
        }
        data
    }

    pub(super) fn reply_error<P: Payload>(
        &self,
        cookie: u64,
        kind: u16,
        offset: u64,
        error: Error,
        out: &mut VecDeque<Chunk<P>>,
    ) {
        let must_be_structured = matches!(kind, command::READ | command::BLOCK_STATUS);
        let simple_will_do =
            self.mode == Mode::Simple || (self.mode == Mode::Structured && !must_be_structured);
        if simple_will_do {
            out.push_back(simple(cookie, error as u32));
            return;
        }
        // The error, and an empty message.
        let mut data = [0; 6];
        data[..4].copy_from_slice(&(error as u32).to_be_bytes());
        out.push_back(self.chunk(cookie, chunk::ERROR, offset, 6, &data));
    }

    /// The header of a reply's only chunk, with the first bytes of its data.
    fn chunk<P>(&self, cookie: u64, kind: u16, offset: u64, length: u64, data: &[u8]) -> Chunk<P> {
        self.part(chunk::DONE, cookie, kind, offset, length, data)
    }

    fn part<P>(
        &self,
        flags: u16,
        cookie: u64,
        kind: u16,
        offset: u64,
        length: u64,
        data: &[u8],
    ) -> Chunk<P> {
        let mut writer = HeaderWriter::new();
        let extended = self.mode == Mode::Extended;
        let magic =
            if extended { wire::EXTENDED_REPLY_MAGIC } else { wire::STRUCTURED_REPLY_MAGIC };
        writer.put(&magic.to_be_bytes());
        writer.put(&flags.to_be_bytes());
        writer.put(&kind.to_be_bytes());
        writer.put(&cookie.to_be_bytes());
        if extended {
            writer.put(&offset.to_be_bytes());
            writer.put(&length.to_be_bytes());
        } else {
            writer.put(&(length as u32).to_be_bytes());
        }
        writer.put(data);
        writer.finish()
    }
}

fn simple<P>(cookie: u64, error: u32) -> Chunk<P> {
    let mut writer = HeaderWriter::new();
    writer.put(&wire::SIMPLE_REPLY_MAGIC.to_be_bytes());
    writer.put(&error.to_be_bytes());
    writer.put(&cookie.to_be_bytes());
    writer.finish()
}

struct HeaderWriter {
    bytes: [u8; HEADER_MAX],
    length: u8,
}

impl HeaderWriter {
    fn new() -> Self {
        Self { bytes: [0; HEADER_MAX], length: 0 }
    }

    fn put(&mut self, field: &[u8]) {
        let at = usize::from(self.length);
        self.bytes[at..at + field.len()].copy_from_slice(field);
        self.length += field.len() as u8;
    }

    fn finish<P>(self) -> Chunk<P> {
        Chunk::Header { bytes: self.bytes, length: self.length }
    }
}
