//! The first half of a connection: the client's flags, then options until one
//! of them begins transmission. An option is
//!
//! ```text
//! IHAVEOPT (8) │ option (4) │ length (4) │ data (length)
//! ```
//! and each reply `magic (8) │ option (4) │ type (4) │ length (4) │ data`.

use serde::{Deserialize, Serialize};

use super::context;
use super::input::Input;
use super::session::{Export, Exports, HANDSHAKE_SPACE, Mode, PAYLOAD_MAX, Transmission};
use super::wire::{self, info, option, rep};

const OPTION_HEADER: usize = 16;

/// The longest option that is read; a name has at most 4096 bytes by the document.
const OPTION_MAX: u32 = (HANDSHAKE_SPACE - OPTION_HEADER) as u32;

/// Longer options are skipped with an error; beyond this the peer is not one of ours.
const OPTION_SKIP_MAX: u32 = 1 << 20;

/// The document's bound on any string.
const NAME_MAX: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Handshake {
    greeted: bool,
    fixed: bool,
    no_zeroes: bool,
    mode: Mode,
    /// The export that contexts were set for, and which.
    contexts: Option<(String, context::Chosen)>,
    skip: u32,
    tls: Tls,
}

/// Whether this connection is to be, or is, inside TLS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Tls {
    NotOffered,
    /// The document's FORCEDTLS: nothing else before it.
    Required,
    Established,
}

pub(super) enum Step {
    /// More bytes are needed.
    Wait,
    Again,
    Close,
    /// The client may now begin TLS, and what it says next is sealed.
    Secure,
    Begin(Transmission),
}

/// Reads big-endian fields off the front of an option's data.
struct Fields<'a>(&'a [u8]);

impl<'a> Fields<'a> {
    fn take(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, tail) = self.0.split_at_checked(count)?;
        self.0 = tail;
        Some(head)
    }

    fn u16(&mut self) -> Option<u16> {
        self.take(2).map(|b| u16::from_be_bytes([b[0], b[1]]))
    }

    fn u32(&mut self) -> Option<u32> {
        self.take(4).map(|b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]))
    }

    fn string(&mut self) -> Option<&'a str> {
        let length = usize::try_from(self.u32()?).ok().filter(|l| *l <= NAME_MAX)?;
        std::str::from_utf8(self.take(length)?).ok()
    }

    fn end(&self) -> Option<()> {
        self.0.is_empty().then_some(())
    }
}

struct Replies<'a> {
    option: u32,
    out: &'a mut Vec<u8>,
}

impl Replies<'_> {
    fn send(&mut self, kind: u32, data: &[u8]) {
        self.out.extend_from_slice(&wire::OPTION_REPLY_MAGIC.to_be_bytes());
        self.out.extend_from_slice(&self.option.to_be_bytes());
        self.out.extend_from_slice(&kind.to_be_bytes());
        self.out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        self.out.extend_from_slice(data);
    }

    fn ack(&mut self) {
        self.send(rep::ACK, &[]);
    }

    /// The text is for people who read a trace.
    fn error(&mut self, kind: u32, text: &str) {
        self.send(kind, text.as_bytes());
    }
}

/// Until TLS is there, a client may begin it or leave; all else, known or
/// unknown, is told that TLS is required.
fn before_tls(option: u32, data: &[u8], replies: &mut Replies<'_>) -> Step {
    match option {
        option::STARTTLS if data.is_empty() => {
            replies.ack();
            return Step::Secure;
        }
        option::STARTTLS => replies.error(rep::ERR_INVALID, "this option takes no data"),
        option::ABORT => {
            replies.ack();
            return Step::Close;
        }
        option::EXPORT_NAME => return Step::Close,
        _ => replies.error(rep::ERR_TLS_REQD, "begin TLS first (NBD_OPT_STARTTLS)"),
    }
    Step::Again
}

impl Handshake {
    pub(super) fn new(tls: Tls) -> Self {
        Self {
            greeted: false,
            fixed: false,
            no_zeroes: false,
            mode: Mode::Simple,
            contexts: None,
            skip: 0,
            tls,
        }
    }

    pub(super) fn awaits_tls(&self) -> bool {
        self.tls == Tls::Required
    }

    /// Inside TLS negotiation begins anew, but for the client's flags: what was
    /// said outside might have been put in by a third party.
    pub(super) fn inside_tls(&self) -> Self {
        Self {
            greeted: self.greeted,
            fixed: self.fixed,
            no_zeroes: self.no_zeroes,
            ..Self::new(Tls::Established)
        }
    }

    pub(super) fn greeting() -> Vec<u8> {
        let mut bytes = wire::MAGIC.to_be_bytes().to_vec();
        bytes.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES).to_be_bytes());
        bytes
    }

    pub(super) fn step(
        &mut self,
        input: &mut Input,
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Step {
        if self.skip > 0 {
            let count = input.bytes().len().min(self.skip as usize);
            input.consume(count);
            self.skip -= count as u32;
            return if self.skip > 0 { Step::Wait } else { Step::Again };
        }
        if !self.greeted {
            return self.client_flags(input);
        }
        let bytes = input.bytes();
        let Some((header, rest)) = bytes.split_at_checked(OPTION_HEADER) else { return Step::Wait };
        let mut fields = Fields(header);
        let (Some(magic), Some(option), Some(length)) =
            (fields.take(8), fields.u32(), fields.u32())
        else {
            return Step::Wait;
        };
        if magic != wire::OPTION_MAGIC.to_be_bytes() {
            return Step::Close;
        }
        if length > OPTION_MAX {
            if length > OPTION_SKIP_MAX || option == option::EXPORT_NAME {
                return Step::Close;
            }
            Replies { option, out }.error(rep::ERR_TOO_BIG, "this option is too long");
            input.consume(OPTION_HEADER);
            self.skip = length;
            return Step::Again;
        }
        let Some(data) = rest.get(..length as usize) else { return Step::Wait };
        let step = self.option(option, data, exports, out);
        input.consume(OPTION_HEADER + length as usize);
        step
    }

    fn client_flags(&mut self, input: &mut Input) -> Step {
        let Some(flags) = Fields(input.bytes()).u32() else { return Step::Wait };
        input.consume(4);
        if flags & !(wire::CLIENT_FIXED_NEWSTYLE | wire::CLIENT_NO_ZEROES) != 0 {
            return Step::Close;
        }
        self.fixed = flags & wire::CLIENT_FIXED_NEWSTYLE != 0;
        self.no_zeroes = flags & wire::CLIENT_NO_ZEROES != 0;
        self.greeted = true;
        Step::Again
    }

    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        exports: &dyn Exports,
        out: &mut Vec<u8>,
    ) -> Step {
        if !self.fixed && option != option::EXPORT_NAME {
            // Without fixed newstyle there is no way to refuse.
            return Step::Close;
        }
        let mut replies = Replies { option, out };
        if self.tls == Tls::Required {
            return before_tls(option, data, &mut replies);
        }
        match option {
            option::EXPORT_NAME => return self.export_name(data, exports, out),
            option::ABORT => {
                replies.ack();
                return Step::Close;
            }
            option::LIST if data.is_empty() => {
                for (name, description) in exports.list() {
                    let mut entry = (name.len() as u32).to_be_bytes().to_vec();
                    entry.extend_from_slice(name.as_bytes());
                    entry.extend_from_slice(description.as_bytes());
                    replies.send(rep::SERVER, &entry);
                }
                replies.ack();
            }
            option::INFO | option::GO => return self.go(data, exports, &mut replies),
            option::STRUCTURED_REPLY if data.is_empty() => match self.mode {
                Mode::Simple => {
                    self.mode = Mode::Structured;
                    replies.ack();
                }
                Mode::Structured => {
                    replies.error(rep::ERR_INVALID, "structured replies are agreed on already");
                }
                Mode::Extended => {
                    replies.error(rep::ERR_EXT_HEADER_REQD, "extended headers are agreed on");
                }
            },
            option::EXTENDED_HEADERS if data.is_empty() => {
                if self.mode == Mode::Extended {
                    replies.error(rep::ERR_INVALID, "extended headers are agreed on already");
                } else {
                    self.mode = Mode::Extended;
                    replies.ack();
                }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                if self.meta_context(data, exports, &mut replies).is_none() {
                    replies.error(rep::ERR_INVALID, "this option's data is malformed");
                }
            }
            option::LIST | option::STRUCTURED_REPLY | option::EXTENDED_HEADERS => {
                replies.error(rep::ERR_INVALID, "this option takes no data");
            }
            option::STARTTLS if !data.is_empty() => {
                replies.error(rep::ERR_INVALID, "this option takes no data");
            }
            option::STARTTLS if self.tls == Tls::Established => {
                replies.error(rep::ERR_INVALID, "TLS is established already");
            }
            option::STARTTLS => replies.error(rep::ERR_POLICY, "TLS is not offered here"),
            _ => replies.error(rep::ERR_UNSUP, "this option is unknown"),
        }
        Step::Again
    }

    fn begin(&self, export: Export, name: &str, told_block_size: bool) -> Step {
        let set = self.contexts.as_ref().filter(|(of, _)| self.mode > Mode::Simple && of == name);
        let contexts = set.map_or_else(context::Chosen::default, |(_, chosen)| *chosen);
        Step::Begin(Transmission { export, mode: self.mode, contexts, told_block_size })
    }

    /// The old way: no reply but the export's description, no way to refuse but to hang up.
    fn export_name(&self, data: &[u8], exports: &dyn Exports, out: &mut Vec<u8>) -> Step {
        let found = std::str::from_utf8(data).ok().and_then(|n| Some((n, exports.find(n)?)));
        let Some((name, export)) = found.filter(|_| self.mode != Mode::Extended) else {
            return Step::Close;
        };
        out.extend_from_slice(&export.size.to_be_bytes());
        out.extend_from_slice(&export.flags(self.mode > Mode::Simple).to_be_bytes());
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        self.begin(export, name, false)
    }

    fn go(&self, data: &[u8], exports: &dyn Exports, replies: &mut Replies<'_>) -> Step {
        let parse = || {
            let mut fields = Fields(data);
            let name = fields.string()?;
            let count = fields.u16()?;
            let wanted = (0..count).map(|_| fields.u16()).collect::<Option<Vec<_>>>()?;
            fields.end()?;
            Some((name, wanted))
        };
        let Some((name, wanted)) = parse() else {
            replies.error(rep::ERR_INVALID, "this option's data is malformed");
            return Step::Again;
        };
        let Some(export) = exports.find(name) else {
            replies.error(rep::ERR_UNKNOWN, "there is no export of that name");
            return Step::Again;
        };
        let mut about = info::EXPORT.to_be_bytes().to_vec();
        about.extend_from_slice(&export.size.to_be_bytes());
        about.extend_from_slice(&export.flags(self.mode > Mode::Simple).to_be_bytes());
        replies.send(rep::INFO, &about);
        let text = |kind: u16, text: &str| [&kind.to_be_bytes(), text.as_bytes()].concat();
        if wanted.contains(&info::NAME) {
            replies.send(rep::INFO, &text(info::NAME, name));
        }
        if wanted.contains(&info::DESCRIPTION) && !export.description.is_empty() {
            replies.send(rep::INFO, &text(info::DESCRIPTION, &export.description));
        }
        // Told even to those who did not ask; only those who asked must obey.
        let told = wanted.contains(&info::BLOCK_SIZE);
        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
        for size in [if told { export.block_min } else { 1 }, Export::BLOCK_PREFERRED, PAYLOAD_MAX]
        {
            sizes.extend_from_slice(&size.to_be_bytes());
        }
        replies.send(rep::INFO, &sizes);
        replies.ack();
        if replies.option == option::GO { self.begin(export, name, told) } else { Step::Again }
    }

    /// `None` where the data is malformed; a `SET` then leaves no context selected.
    fn meta_context(
        &mut self,
        data: &[u8],
        exports: &dyn Exports,
        replies: &mut Replies<'_>,
    ) -> Option<()> {
        let setting = replies.option == option::SET_META_CONTEXT;
        if setting {
            self.contexts = None;
        }
        let mut fields = Fields(data);
        let name = fields.string()?;
        let count = fields.u32()?;
        // Each query has at least its length, so the data bounds their number.
        if count as usize > data.len() / 4 {
            return None;
        }
        let queries = (0..count).map(|_| fields.string()).collect::<Option<Vec<_>>>()?;
        fields.end()?;
        if self.mode == Mode::Simple {
            return None;
        }
        if exports.find(name).is_none() {
            replies.error(rep::ERR_UNKNOWN, "there is no export of that name");
            return Some(());
        }
        let chosen = if setting {
            context::Chosen::named(&queries)
        } else {
            context::Chosen::listed(&queries)
        };
        for (number, context) in chosen.names() {
            let number = if setting { number } else { 0 };
            replies.send(rep::META_CONTEXT, &[&number.to_be_bytes(), context.as_bytes()].concat());
        }
        if setting {
            self.contexts = Some((name.to_owned(), chosen));
        }
        replies.ack();
        Some(())
    }
}
