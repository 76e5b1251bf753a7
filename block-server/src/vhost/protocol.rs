//! One vhost-user conversation as a state machine: a message and its descriptors
//! in, a deed out; what became of the deed in, a reply out.
//!
//! ```text
//!  bytes, descriptors ─▶ Protocol::receive ─▶ Deed ─▶ shell ─▶ Protocol::answer ─▶ reply
//! ```
//!
//! One message at a time: the next is received when this one is answered. A ring
//! is walked from its kick descriptor (which starts it) to GET_VRING_BASE (which
//! is answered when nothing of it is in flight), while it is enabled.
//!
//! `F` is a descriptor, which this machine only carries.

use super::block::{Disk, QUEUES_MAX};
use super::inflight;
use super::memory::{REGIONS_MAX, Span};
use super::queue::{Agreed, SIZE_MAX};
use super::wire::{self, Header, Numbers, ask, protocol};
use crate::vhost::block::feature;

/// Bytes of configuration space that a front may ask for.
const CONFIG_BYTES_MAX: usize = 256;

/// Regions in one SET_MEM_TABLE: as many as a message carries descriptors.
const TABLE_REGIONS_MAX: usize = wire::FDS_MAX;

/// Why a conversation ends.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("a message that is none of vhost-user's first version")]
    Header,
    #[error("request {0}: its payload is not as the protocol has it")]
    Payload(u32),
    #[error("request {0}: it needs {1} descriptors")]
    Descriptors(u32, usize),
    #[error("request {0} is not spoken here")]
    Unknown(u32),
    #[error("request {request}: ring {ring}: there is none, or it cannot be so")]
    Ring { request: u32, ring: u32 },
    #[error("features {0:#x} were accepted and never offered")]
    Features(u64),
    #[error("request {0}: it came after the ring was started")]
    TooLate(u32),
}

/// Rings' places, by addresses of the front's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UserPlaces {
    pub descriptors: u64,
    pub available: u64,
    pub used: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ring {
    pub size: u16,
    pub base: u16,
    pub places: Option<UserPlaces>,
    pub is_enabled: bool,
    pub is_started: bool,
}

/// A region of in-flight marks: which part of it belongs to which ring.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Marks {
    pub length: u64,
    pub offset: u64,
    pub queues: u16,
    pub size: u16,
}

impl Marks {
    pub const fn part_at(&self, ring: u16) -> u64 {
        inflight::part_bytes(self.size) * ring as u64
    }

    const fn wanted(queues: u16, size: u16) -> u64 {
        inflight::part_bytes(size) * queues as u64
    }

    fn payload(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(self.length.to_ne_bytes());
        bytes.extend(self.offset.to_ne_bytes());
        bytes.extend(self.queues.to_ne_bytes());
        bytes.extend(self.size.to_ne_bytes());
        bytes
    }
}

/// What the shell is to do. It answers each with [`Protocol::answer`].
#[derive(Debug, PartialEq, Eq)]
pub enum Deed<F> {
    Nothing,
    /// This is all the memory.
    Map(Vec<(Span, F)>),
    Add(Span, F),
    Remove(Span),
    /// Listen for kicks here; the ring starts.
    Start(u16, F),
    /// Answer with the base when nothing is in flight.
    Stop(u16),
    Call(u16, Option<F>),
    Error(u16, Option<F>),
    /// Whether the ring may be walked has changed.
    Enable(u16),
    /// All rings end, as after a reset.
    Reset,
    MakeMarks(Marks),
    TakeMarks(Marks, F),
    Channel(F),
}

/// What became of a deed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Done,
    Failed,
    /// A stopped ring's next request.
    Base(u16),
}

#[derive(Debug)]
struct Pending {
    request: u32,
    wants_reply: bool,
    /// The payload of its own reply, where it has one.
    payload: Option<Vec<u8>>,
}

#[derive(Debug)]
pub struct Protocol {
    disk: Disk,
    features: u64,
    protocol_features: u64,
    rings: Vec<Ring>,
    pending: Option<Pending>,
}

const OFFERED: u64 = protocol::QUEUES
    | protocol::REPLY_ACK
    | protocol::BACKEND_REQ
    | protocol::CONFIG
    | protocol::INFLIGHT
    | protocol::MEM_SLOTS;

impl Protocol {
    pub fn new(disk: Disk) -> Self {
        let rings = vec![Ring::default(); usize::from(disk.queues.min(QUEUES_MAX))];
        Self { disk, features: 0, protocol_features: 0, rings, pending: None }
    }

    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    pub fn disk_mut(&mut self) -> &mut Disk {
        &mut self.disk
    }

    pub fn ring(&self, ring: u16) -> Ring {
        self.rings[usize::from(ring)]
    }

    pub fn rings(&self) -> u16 {
        self.rings.len() as u16
    }

    pub fn agreed(&self) -> Agreed {
        Agreed {
            event_index: self.features & feature::EVENT_INDEX != 0,
            indirect: self.features & feature::INDIRECT != 0,
        }
    }

    /// A guest that was not offered flushes, or wants none, trusts every write.
    pub fn is_write_through(&self) -> bool {
        self.features & feature::FLUSH == 0
    }

    pub fn hears_config_changes(&self) -> bool {
        self.protocol_features & protocol::BACKEND_REQ != 0
    }

    /// Whether a message waits for its answer.
    pub fn is_pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Takes one whole message. What it asks for is answered before the next.
    pub fn receive<F>(
        &mut self,
        header: Header,
        payload: &[u8],
        fds: Vec<F>,
    ) -> Result<Deed<F>, Violation> {
        assert!(self.pending.is_none(), "one message at a time");
        let mut pending =
            Pending { request: header.request, wants_reply: header.wants_reply, payload: None };
        let deed = self.understand(header.request, payload, fds, &mut pending.payload)?;
        self.pending = Some(pending);
        Ok(deed)
    }

    /// The reply to the message that waits, where one is due.
    pub fn answer(&mut self, outcome: Outcome) -> Option<Vec<u8>> {
        let Some(Pending { request, wants_reply, payload }) = self.pending.take() else {
            unreachable!("a deed is answered once")
        };
        if let Some(mut payload) = payload {
            match (outcome, request) {
                (Outcome::Base(base), _) => {
                    payload[4..8].copy_from_slice(&u32::from(base).to_ne_bytes());
                }
                // Without a region of its own the front goes on with none.
                (Outcome::Failed, ask::GET_INFLIGHT_FD) => payload.fill(0),
                _ => {}
            }
            return Some(wire::reply(request, &payload));
        }
        let acknowledged = wants_reply && self.protocol_features & protocol::REPLY_ACK != 0;
        let failed = u64::from(outcome == Outcome::Failed);
        acknowledged.then(|| wire::reply(request, &failed.to_ne_bytes()))
    }

    fn understand<F>(
        &mut self,
        request: u32,
        payload: &[u8],
        fds: Vec<F>,
        reply: &mut Option<Vec<u8>>,
    ) -> Result<Deed<F>, Violation> {
        let bad = Violation::Payload(request);
        let mut numbers = Numbers(payload);
        let number = |reply: &mut Option<Vec<u8>>, value: u64| {
            *reply = Some(value.to_ne_bytes().to_vec());
            Ok(Deed::Nothing)
        };
        match request {
            ask::GET_FEATURES => number(reply, self.disk.features() | wire::PROTOCOL_FEATURES),
            ask::GET_PROTOCOL_FEATURES => number(reply, OFFERED),
            ask::GET_QUEUE_NUM => number(reply, u64::from(self.rings())),
            ask::GET_MAX_MEM_SLOTS => number(reply, REGIONS_MAX as u64),
            ask::SET_FEATURES => self.set_features(numbers.u64().ok_or(bad)?),
            ask::SET_PROTOCOL_FEATURES => {
                let accepted = numbers.u64().ok_or(bad)?;
                if accepted & !OFFERED != 0 {
                    return Err(Violation::Features(accepted));
                }
                self.protocol_features = accepted;
                Ok(Deed::Nothing)
            }
            ask::SET_OWNER => Ok(Deed::Nothing),
            ask::RESET_OWNER => {
                self.rings.fill(Ring::default());
                Ok(Deed::Reset)
            }
            ask::SET_MEM_TABLE => memory_table(payload, fds),
            ask::ADD_MEM_REG => {
                let span = numbers.u64().and_then(|_| span(&mut numbers)).ok_or(bad)?;
                Ok(Deed::Add(span, only(request, fds)?))
            }
            ask::REM_MEM_REG => {
                let span = numbers.u64().and_then(|_| span(&mut numbers)).ok_or(bad)?;
                Ok(Deed::Remove(span))
            }
            ask::GET_CONFIG => self.get_config(payload, reply),
            // Nothing of the configuration is the guest's to set.
            ask::SET_CONFIG => Ok(Deed::Nothing),
            ask::SET_BACKEND_REQ_FD => Ok(Deed::Channel(only(request, fds)?)),
            ask::GET_INFLIGHT_FD => {
                let asked = self.marks(request, payload)?;
                let length = Marks::wanted(asked.queues, asked.size);
                let marks = Marks { length, offset: 0, ..asked };
                // QEMU pads the structure and looks at the size; others do not.
                let mut bytes = marks.payload();
                bytes.resize(payload.len(), 0);
                *reply = Some(bytes);
                Ok(Deed::MakeMarks(marks))
            }
            ask::SET_INFLIGHT_FD => {
                let marks = self.marks(request, payload)?;
                if marks.length < Marks::wanted(marks.queues, marks.size) {
                    return Err(Violation::Payload(request));
                }
                Ok(Deed::TakeMarks(marks, only(request, fds)?))
            }
            _ => self.understand_ring(request, payload, fds, reply),
        }
    }

    fn set_features<F>(&mut self, accepted: u64) -> Result<Deed<F>, Violation> {
        if accepted & !(self.disk.features() | wire::PROTOCOL_FEATURES) != 0 {
            return Err(Violation::Features(accepted));
        }
        if self.rings.iter().any(|r| r.is_started) && accepted != self.features {
            return Err(Violation::TooLate(ask::SET_FEATURES));
        }
        self.features = accepted;
        if accepted & wire::PROTOCOL_FEATURES == 0 {
            // Such a front has no message to enable a ring.
            self.rings.iter_mut().for_each(|ring| ring.is_enabled = true);
        }
        Ok(Deed::Nothing)
    }

    fn get_config<F>(
        &self,
        payload: &[u8],
        reply: &mut Option<Vec<u8>>,
    ) -> Result<Deed<F>, Violation> {
        let bad = Violation::Payload(ask::GET_CONFIG);
        let mut numbers = Numbers(payload);
        let (Some(offset), Some(size), Some(_)) = (numbers.u32(), numbers.u32(), numbers.u32())
        else {
            return Err(bad);
        };
        let (offset, size) = (offset as usize, size as usize);
        if size > CONFIG_BYTES_MAX || offset > CONFIG_BYTES_MAX || numbers.0.len() != size {
            return Err(bad);
        }
        let mut space = [0; 2 * CONFIG_BYTES_MAX];
        let config = self.disk.config();
        space[..config.len()].copy_from_slice(&config);
        let mut bytes = payload.to_vec();
        bytes[12..].copy_from_slice(&space[offset..offset + size]);
        *reply = Some(bytes);
        Ok(Deed::Nothing)
    }

    fn marks(&self, request: u32, payload: &[u8]) -> Result<Marks, Violation> {
        let mut numbers = Numbers(payload);
        let mut read = || {
            Some(Marks {
                length: numbers.u64()?,
                offset: numbers.u64()?,
                queues: numbers.u16()?,
                size: numbers.u16()?,
            })
        };
        read()
            .filter(|m| m.queues <= self.rings() && m.queues > 0)
            .filter(|m| m.size <= SIZE_MAX && m.size > 0)
            .ok_or(Violation::Payload(request))
    }

    fn understand_ring<F>(
        &mut self,
        request: u32,
        payload: &[u8],
        fds: Vec<F>,
        reply: &mut Option<Vec<u8>>,
    ) -> Result<Deed<F>, Violation> {
        let bad = Violation::Payload(request);
        let mut numbers = Numbers(payload);
        if let ask::SET_VRING_KICK | ask::SET_VRING_CALL | ask::SET_VRING_ERR = request {
            let (number, fd) = bell(request, numbers.u64().ok_or(bad)?, fds)?;
            let index = self.index(request, number)?;
            return match (request, fd) {
                (ask::SET_VRING_KICK, Some(fd)) => self.start(index, fd),
                // It would have us look at the ring all the time.
                (ask::SET_VRING_KICK, None) => Err(Violation::Descriptors(request, 1)),
                (ask::SET_VRING_CALL, fd) => Ok(Deed::Call(index, fd)),
                (_, fd) => Ok(Deed::Error(index, fd)),
            };
        }
        let is_of_ring = matches!(
            request,
            ask::SET_VRING_NUM
                | ask::SET_VRING_ADDR
                | ask::SET_VRING_BASE
                | ask::GET_VRING_BASE
                | ask::SET_VRING_ENABLE
        );
        if !is_of_ring {
            return Err(Violation::Unknown(request));
        }
        let (number, value) = numbers.u32().zip(numbers.u32()).ok_or(bad)?;
        let index = self.index(request, number)?;
        let ring = &mut self.rings[usize::from(index)];
        let unlawful = Violation::Ring { request, ring: number };
        match request {
            ask::SET_VRING_NUM => {
                let size = u16::try_from(value).ok().filter(|s| s.is_power_of_two());
                ring.size = size.filter(|s| *s <= SIZE_MAX).ok_or(unlawful)?;
                Ok(Deed::Nothing)
            }
            ask::SET_VRING_BASE => {
                ring.base = u16::try_from(value).map_err(|_| unlawful)?;
                Ok(Deed::Nothing)
            }
            ask::SET_VRING_ADDR => {
                let mut address = || numbers.u64().ok_or(Violation::Payload(request));
                let (descriptors, used, available) = (address()?, address()?, address()?);
                ring.places = Some(UserPlaces { descriptors, available, used });
                Ok(Deed::Nothing)
            }
            ask::SET_VRING_ENABLE => {
                ring.is_enabled = value == 1;
                Ok(Deed::Enable(index))
            }
            _ => {
                ring.is_started = false;
                *reply = Some(payload[..8].to_vec());
                Ok(Deed::Stop(index))
            }
        }
    }

    fn start<F>(&mut self, index: u16, fd: F) -> Result<Deed<F>, Violation> {
        let ring = &mut self.rings[usize::from(index)];
        if ring.size == 0 || ring.places.is_none() {
            let ring = u32::from(index);
            return Err(Violation::Ring { request: ask::SET_VRING_KICK, ring });
        }
        ring.is_started = true;
        Ok(Deed::Start(index, fd))
    }

    fn index(&self, request: u32, ring: u32) -> Result<u16, Violation> {
        if (ring as usize) < self.rings.len() {
            Ok(ring as u16)
        } else {
            Err(Violation::Ring { request, ring })
        }
    }
}

fn only<F>(request: u32, mut fds: Vec<F>) -> Result<F, Violation> {
    if fds.len() > 1 {
        return Err(Violation::Descriptors(request, 1));
    }
    fds.pop().ok_or(Violation::Descriptors(request, 1))
}

/// A ring's number and a descriptor, or a bit that says that there is none.
fn bell<F>(request: u32, value: u64, fds: Vec<F>) -> Result<(u32, Option<F>), Violation> {
    const NO_DESCRIPTOR: u64 = 1 << 8;
    let ring = (value & 0xff) as u32;
    if value & NO_DESCRIPTOR != 0 {
        return Ok((ring, None));
    }
    only(request, fds).map(|fd| (ring, Some(fd)))
}

fn span(numbers: &mut Numbers<'_>) -> Option<Span> {
    let (guest, length, user, offset) =
        (numbers.u64()?, numbers.u64()?, numbers.u64()?, numbers.u64()?);
    Some(Span { guest, user, length, offset })
}

fn memory_table<F>(payload: &[u8], fds: Vec<F>) -> Result<Deed<F>, Violation> {
    let bad = Violation::Payload(ask::SET_MEM_TABLE);
    let mut numbers = Numbers(payload);
    let (count, _) = numbers.u32().zip(numbers.u32()).ok_or(bad.clone())?;
    if count as usize > TABLE_REGIONS_MAX {
        return Err(bad);
    }
    if fds.len() != count as usize {
        return Err(Violation::Descriptors(ask::SET_MEM_TABLE, count as usize));
    }
    fds.into_iter()
        .map(|fd| Ok((span(&mut numbers).ok_or(bad.clone())?, fd)))
        .collect::<Result<_, _>>()
        .map(Deed::Map)
}
