//! Messages (RFC 1035, 6891), taken apart and put together.

use domain::base::iana::{Class, Opcode, OptRcode, Rcode, Rtype};
use domain::base::message::RecordSection;
use domain::base::message_builder::{AdditionalBuilder, MessageBuilder, TreeCompressor};
use domain::base::name::{FlattenInto as _, ParsedName, ToName as _};
use domain::base::rdata::ComposeRecordData as _;
use domain::base::{Message, Record, Ttl};
use domain::rdata::AllRecordData;

use super::names::Owned;

pub type Stored = Record<Owned, AllRecordData<Vec<u8>, Owned>>;

/// What every client takes by UDP without EDNS (RFC 1035, 4.2.1).
const DATAGRAM_BYTES: u16 = 512;
/// What passes every link unfragmented (RFC 9715): asked of servers, given to guests.
pub const DATAGRAM_BYTES_MAX: u16 = 1232;
/// An OPT record without options.
const OPT_BYTES: usize = 11;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Edns {
    pub bytes_max: u16,
    pub dnssec: bool,
}

/// What a guest asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Query {
    pub id: u16,
    /// In the guest's own letters.
    pub name: Owned,
    pub kind: Rtype,
    pub recursion: bool,
    /// CD: signatures are the guest's own business.
    pub unchecked: bool,
    pub edns: Option<Edns>,
}

/// What is known, of whoever told it.
#[derive(Debug, Clone)]
pub struct Answer {
    pub rcode: Rcode,
    pub authoritative: bool,
    /// AD: the server checked its signatures.
    pub checked: bool,
    pub answers: Vec<Stored>,
    pub authority: Vec<Stored>,
    pub additional: Vec<Stored>,
}

impl Answer {
    pub fn new(rcode: Rcode) -> Self {
        let (answers, authority, additional) = Default::default();
        Self { rcode, authoritative: false, checked: false, answers, authority, additional }
    }

    /// Seconds for which it holds: as long as its shortest record, and where there is
    /// nothing, as long as its SOA says (RFC 2308, 5); else not at all.
    pub fn life_s(&self) -> u32 {
        let shown = self.answers.iter().chain(&self.authority).map(|record| {
            let minimum = match record.data() {
                AllRecordData::Soa(soa) if self.answers.is_empty() => soa.minimum(),
                _ => record.ttl(),
            };
            seconds(minimum.min(record.ttl()))
        });
        shown.min().unwrap_or(0)
    }

    /// What its records hold.
    pub fn held_bytes(&self) -> usize {
        let records = [&self.answers, &self.authority, &self.additional].into_iter().flatten();
        let bytes = records.map(|record| {
            let data = record.data().rdlen(false).map_or(usize::from(u16::MAX), usize::from);
            size_of::<Stored>() + record.owner().len() + data
        });
        bytes.sum()
    }
}

/// A time with the greatest bit set stands for none (RFC 2181, 8).
fn seconds(ttl: Ttl) -> u32 {
    Some(ttl.as_secs()).filter(|s| *s <= i32::MAX as u32).unwrap_or(0)
}

/// Types that stand for a transfer, a signature or several types at once.
const META_KINDS: std::ops::RangeInclusive<u16> = 249..=255;

/// Reads a guest's query. What is none is answered with `Some` refusal, or with nothing.
pub fn read(message: &[u8]) -> Result<Query, Option<Vec<u8>>> {
    let message = Message::from_slice(message).map_err(|_| None)?;
    let header = message.header();
    // Whoever answers answers could be made to answer itself.
    if header.qr() {
        return Err(None);
    }
    let refused = |rcode| Err(Some(bare(header.id(), header.opcode(), rcode)));
    if header.opcode() != Opcode::QUERY {
        return refused(Rcode::NOTIMP);
    }
    let Ok(question) = message.sole_question() else { return refused(Rcode::FORMERR) };
    // All of it is read, that no junk is taken for a query.
    let whole = message.iter().all(|record| record.is_ok());
    let bare_of_records = message.header_counts().ancount() == 0;
    if !whole || !bare_of_records || message.header_counts().arcount() > 4 {
        return refused(Rcode::FORMERR);
    }
    let opt = message.opt();
    let query = Query {
        id: header.id(),
        name: question.qname().to_vec(),
        kind: question.qtype(),
        recursion: header.rd(),
        unchecked: header.cd(),
        edns: opt
            .as_ref()
            .map(|opt| Edns { bytes_max: opt.udp_payload_size(), dnssec: opt.dnssec_ok() }),
    };
    let known = opt.is_none_or(|opt| opt.version() == 0);
    if !known {
        let newer = compose(&query, &Answer::new(Rcode::NOERROR), 0, 512, OptRcode::BADVERS);
        return Err(Some(newer));
    }
    if META_KINDS.contains(&query.kind.to_int()) {
        return Err(Some(refuse(&query, Rcode::NOTIMP)));
    }
    if question.qclass() != Class::IN {
        return Err(Some(refuse(&query, Rcode::REFUSED)));
    }
    Ok(query)
}

/// A header alone, for a message whose question cannot be told back.
fn bare(id: u16, opcode: Opcode, rcode: Rcode) -> Vec<u8> {
    let mut builder = MessageBuilder::new_vec();
    let header = builder.header_mut();
    header.set_id(id);
    header.set_qr(true);
    header.set_opcode(opcode);
    header.set_rcode(rcode);
    builder.finish()
}

pub fn refuse(query: &Query, rcode: Rcode) -> Vec<u8> {
    reply(query, &Answer::new(rcode), 0, usize::from(DATAGRAM_BYTES))
}

impl Query {
    /// The longest answer that the guest takes by UDP.
    pub fn datagram_bytes_max(&self) -> usize {
        let said = self.edns.map_or(DATAGRAM_BYTES, |edns| edns.bytes_max);
        said.clamp(DATAGRAM_BYTES, DATAGRAM_BYTES_MAX).into()
    }
}

/// The answer as the guest is told it, `age_s` after it was heard. What does not fit
/// `bytes_max` is left out, and the guest told to ask by a stream.
pub fn reply(query: &Query, answer: &Answer, age_s: u32, bytes_max: usize) -> Vec<u8> {
    compose(query, answer, age_s, bytes_max, OptRcode::from_rcode(answer.rcode))
}

type Composed = AdditionalBuilder<TreeCompressor<Vec<u8>>>;

fn compose(query: &Query, answer: &Answer, age: u32, bytes_max: usize, rcode: OptRcode) -> Vec<u8> {
    let mut builder = fresh();
    let header = builder.header_mut();
    header.set_id(query.id);
    header.set_qr(true);
    header.set_aa(answer.authoritative);
    header.set_rd(query.recursion);
    header.set_ra(true);
    header.set_ad(answer.checked);
    header.set_cd(query.unchecked);
    header.set_rcode(rcode.rcode());
    let opt_bytes = if query.edns.is_some() { OPT_BYTES } else { 0 };
    builder.set_push_limit(bytes_max - opt_bytes);
    let mut question = builder.question();
    // A question has at most 259 bytes.
    let asked = question.push((&query.name, query.kind));
    assert!(asked.is_ok(), "the least message has room for a question");
    let mut records = question.answer();
    let told = answer.answers.iter().try_for_each(|r| records.push(aged(query, r, age)));
    let mut records = records.authority();
    let told = told
        .and_then(|()| answer.authority.iter().try_for_each(|r| records.push(aged(query, r, age))));
    let mut records = records.additional();
    // What is additional may be missing without a word.
    _ = told.and_then(|()| {
        answer.additional.iter().try_for_each(|r| records.push(aged(query, r, age)))
    });
    records.header_mut().set_tc(told.is_err());
    records.clear_push_limit();
    if query.edns.is_some() {
        push_opt(&mut records, query.edns.is_some_and(|edns| edns.dnssec), rcode);
    }
    records.finish().into_target()
}

fn fresh() -> MessageBuilder<TreeCompressor<Vec<u8>>> {
    match MessageBuilder::from_target(TreeCompressor::new(Vec::new())) {
        Ok(builder) => builder,
        Err(_) => panic!("a vector has room for a header"),
    }
}

fn push_opt(records: &mut Composed, dnssec: bool, rcode: OptRcode) {
    let pushed = records.opt(|opt| {
        opt.set_udp_payload_size(DATAGRAM_BYTES_MAX);
        opt.set_dnssec_ok(dnssec);
        opt.set_rcode(rcode);
        Ok(())
    });
    assert!(pushed.is_ok(), "a vector has room for one more record");
}

type Aged<'a> = (&'a Owned, Class, Ttl, &'a AllRecordData<Vec<u8>, Owned>);

/// A record as it is told: the name that was asked for in the guest's own letters.
fn aged<'a>(query: &'a Query, record: &'a Stored, age_s: u32) -> Aged<'a> {
    let ttl = Ttl::from_secs(seconds(record.ttl()).saturating_sub(age_s));
    let asked = *record.owner() == query.name;
    let owner = if asked { &query.name } else { record.owner() };
    (owner, record.class(), ttl, record.data())
}

/// A question on its way to a server: a stranger must guess its id, its letters, and
/// the port that it left by.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    pub id: u16,
    /// The name with letters turned at random (draft-vixie-dnsext-dns0x20).
    pub name: Vec<u8>,
    pub message: Vec<u8>,
}

impl Asked {
    pub fn new(query: &Query, random: &mut impl FnMut() -> u128) -> Self {
        let id = random() as u16;
        let mut bits = random();
        let mut letters = query.name.as_slice().to_vec();
        // A label's length is below 64, which is no letter's number.
        for byte in letters.iter_mut().filter(|b| b.is_ascii_alphabetic()) {
            *byte =
                if bits & 1 == 0 { byte.to_ascii_lowercase() } else { byte.to_ascii_uppercase() };
            bits = bits.rotate_right(1);
        }
        let name = Owned::from_octets(letters.clone()).unwrap_or_else(|_| query.name.clone());
        let mut builder = fresh();
        let header = builder.header_mut();
        header.set_id(id);
        header.set_rd(true);
        header.set_cd(query.unchecked);
        let mut question = builder.question();
        let pushed = question.push((&name, query.kind));
        assert!(pushed.is_ok(), "a vector has room for a question");
        let mut records = question.additional();
        push_opt(&mut records, query.edns.is_some_and(|e| e.dnssec), OptRcode::NOERROR);
        Self { id, name: letters, message: records.finish().into_target() }
    }
}

/// What came back.
#[derive(Debug)]
pub enum Heard {
    /// Not the answer to this: whoever sent it, the right one may still come.
    Stray,
    /// The answer, as it seems, but not in our letters: a stream will tell.
    Turned,
    /// The rest has to be fetched by a stream.
    Truncated,
    /// The server cannot or will not.
    Failed,
    Answer(Answer),
}

pub fn hear(bytes: &[u8], asked: &Asked, query: &Query) -> Heard {
    let Ok(message) = Message::from_slice(bytes) else { return Heard::Stray };
    let header = message.header();
    let Ok(question) = message.sole_question() else { return Heard::Stray };
    let name: Owned = question.qname().to_vec();
    let ours = header.qr()
        && header.id() == asked.id
        && header.opcode() == Opcode::QUERY
        && question.qtype() == query.kind
        && question.qclass() == Class::IN
        && name == query.name;
    if !ours {
        return Heard::Stray;
    }
    if name.as_slice() != asked.name {
        return Heard::Turned;
    }
    if header.tc() {
        return Heard::Truncated;
    }
    if ![Rcode::NOERROR, Rcode::NXDOMAIN].contains(&header.rcode()) {
        return Heard::Failed;
    }
    match sections(message) {
        Some([answers, authority, additional]) => {
            let (rcode, checked) = (header.rcode(), header.ad());
            let authoritative = false;
            Heard::Answer(Answer { rcode, authoritative, checked, answers, authority, additional })
        }
        None => Heard::Failed,
    }
}

fn sections(message: &Message<[u8]>) -> Option<[Vec<Stored>; 3]> {
    let answers = message.answer().ok()?;
    let authority = answers.next_section().ok()??;
    let additional = authority.next_section().ok()??;
    Some([stored(answers)?, stored(authority)?, stored(additional)?])
}

/// The records of a section, but for what is of the message itself (OPT, TSIG).
fn stored(section: RecordSection<'_, [u8]>) -> Option<Vec<Stored>> {
    let mut all = Vec::new();
    for record in section {
        let record = record.ok()?;
        if record.class() != Class::IN || record.rtype() == Rtype::OPT {
            continue;
        }
        let read = record.to_any_record::<AllRecordData<&[u8], ParsedName<&[u8]>>>().ok()?;
        all.push(read.try_flatten_into().ok()?);
    }
    all.shrink_to_fit();
    Some(all)
}
