//! What a chain of descriptors means: virtio-blk (virtio 1.2, 5.2).
//!
//! ```text
//!   readable: type u32, reserved u32, sector u64 │ data that is written
//!   writable: data that is read                  │ status u8
//! ```

use super::memory::{Fault, Memory};
use super::queue::{Chain, Segment};
use crate::volume::{Geometry, Kind};

/// What sectors are counted in, whatever the disk's own block is.
pub const SECTOR: u64 = 512;

/// Segments that a guest may use for one request's data: QEMU's own default, so
/// that a guest moved between the fronts sees the same disk.
pub const SEGMENTS_MAX: u32 = 126;

/// Bytes of one request: as much as the NBD front takes.
pub const REQUEST_BYTES_MAX: u64 = 32 << 20;

/// Sectors that one discard or write-zeroes may name: 1 GiB, a fraction of a
/// second of any file system's time.
pub const RANGE_SECTORS_MAX: u32 = (1 << 30) / SECTOR as u32;

/// Rings of one device; more than vCPUs are of no use, and all are served by
/// one thread.
pub const QUEUES_MAX: u16 = 64;

/// Bytes of an answer to "who are you".
pub const ID_BYTES: usize = 20;

/// Feature bits (5.2.3 and 6).
pub mod feature {
    pub const SEGMENTS: u64 = 1 << 2;
    pub const READ_ONLY: u64 = 1 << 5;
    pub const BLOCK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
    pub const TOPOLOGY: u64 = 1 << 10;
    pub const QUEUES: u64 = 1 << 12;
    pub const DISCARD: u64 = 1 << 13;
    pub const WRITE_ZEROES: u64 = 1 << 14;
    pub const INDIRECT: u64 = 1 << 28;
    pub const EVENT_INDEX: u64 = 1 << 29;
    pub const VERSION_1: u64 = 1 << 32;
}

/// How a request ended, for its status byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    IoError = 1,
    Unsupported = 2,
}

impl Status {
    pub fn of(errno: i32) -> Self {
        if errno == libc::EOPNOTSUPP { Self::Unsupported } else { Self::IoError }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    Volume(Kind),
    Identify,
    /// Answered so at once.
    Refuse(Status),
}

/// A chain that was understood. Where its data lies is left in the chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub head: u16,
    pub deed: Deed,
    pub offset: u64,
    pub length: u64,
    /// Where the status byte goes.
    pub status_at: u64,
}

/// A chain without room for what every request has; no answer can be given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("a request without a whole header")]
    Header,
    #[error("a request without room for its status")]
    Status,
    #[error(transparent)]
    Fault(#[from] Fault),
}

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const WRITE_ZEROES: u32 = 13;

const HEADER_BYTES: usize = 16;
const RANGE_BYTES: usize = 16;

/// The disk that a guest sees.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    pub geometry: Geometry,
    pub read_only: bool,
    pub queues: u16,
    pub id: [u8; ID_BYTES],
}

impl Disk {
    pub fn features(&self) -> u64 {
        use feature::{
            BLOCK_SIZE, DISCARD, EVENT_INDEX, FLUSH, INDIRECT, QUEUES, READ_ONLY, SEGMENTS,
            TOPOLOGY, VERSION_1, WRITE_ZEROES,
        };
        let all = SEGMENTS | BLOCK_SIZE | FLUSH | TOPOLOGY | QUEUES;
        let rings = INDIRECT | EVENT_INDEX | VERSION_1;
        all | rings | if self.read_only { READ_ONLY } else { DISCARD | WRITE_ZEROES }
    }

    /// `struct virtio_blk_config`, little-endian.
    pub fn config(&self) -> [u8; 60] {
        let mut config = [0; 60];
        let mut put = |at: usize, bytes: &[u8]| config[at..at + bytes.len()].copy_from_slice(bytes);
        let blocks_per_sector = u64::from(self.geometry.alignment) / SECTOR;
        put(0, &(self.geometry.size / SECTOR).to_le_bytes());
        put(12, &SEGMENTS_MAX.to_le_bytes());
        put(20, &(SECTOR as u32).to_le_bytes());
        put(24, &[blocks_per_sector.max(1).ilog2() as u8]);
        put(26, &(blocks_per_sector.max(1) as u16).to_le_bytes());
        put(32, &[1]); // writes are cached until a flush
        put(34, &self.queues.to_le_bytes());
        put(36, &RANGE_SECTORS_MAX.to_le_bytes());
        put(40, &1_u32.to_le_bytes());
        put(44, &(blocks_per_sector.max(1) as u32).to_le_bytes());
        put(48, &RANGE_SECTORS_MAX.to_le_bytes());
        put(52, &1_u32.to_le_bytes());
        put(56, &[1]); // zeroes may deallocate
        config
    }

    /// Takes the header and the status byte off the chain and leaves its data.
    pub fn understand(
        &self,
        memory: &impl Memory,
        chain: &mut Chain,
    ) -> Result<Request, Malformed> {
        let mut header = [0; HEADER_BYTES];
        if take_front(memory, &mut chain.readable, &mut header)? < HEADER_BYTES {
            return Err(Malformed::Header);
        }
        let status_at = take_status(&mut chain.writable).ok_or(Malformed::Status)?;
        let [k0, k1, k2, k3, _, _, _, _, sector @ ..] = header;
        let kind = u32::from_le_bytes([k0, k1, k2, k3]);
        let sector = u64::from_le_bytes(sector);
        let (deed, offset, length) = match self.judge(memory, kind, sector, chain) {
            Ok(lawful) => lawful,
            Err(Refusal::Fault(fault)) => return Err(fault.into()),
            Err(Refusal::Status(status)) => (Deed::Refuse(status), 0, 0),
        };
        Ok(Request { head: chain.head, deed, offset, length, status_at })
    }

    fn judge(
        &self,
        memory: &impl Memory,
        kind: u32,
        sector: u64,
        chain: &mut Chain,
    ) -> Result<(Deed, u64, u64), Refusal> {
        match kind {
            IN => self.transfer(Kind::Read, sector, &chain.writable),
            OUT => self.changing(self.transfer(Kind::Write, sector, &chain.readable)?),
            FLUSH => Ok((Deed::Volume(Kind::Flush), 0, 0)),
            GET_ID => Ok((Deed::Identify, 0, total(&chain.writable).min(ID_BYTES as u64))),
            DISCARD | WRITE_ZEROES => {
                let mut range = [0; RANGE_BYTES];
                let is_one = total(&chain.readable) == RANGE_BYTES as u64;
                if !is_one || take_front(memory, &mut chain.readable, &mut range)? < RANGE_BYTES {
                    return Err(Status::IoError.into());
                }
                self.changing(self.range(kind, range)?)
            }
            _ => Err(Status::Unsupported.into()),
        }
    }

    fn changing(&self, lawful: (Deed, u64, u64)) -> Result<(Deed, u64, u64), Refusal> {
        if self.read_only { Err(Status::IoError.into()) } else { Ok(lawful) }
    }

    fn transfer(
        &self,
        kind: Kind,
        sector: u64,
        data: &[Segment],
    ) -> Result<(Deed, u64, u64), Refusal> {
        let length = total(data);
        if length > REQUEST_BYTES_MAX || !length.is_multiple_of(SECTOR) {
            return Err(Status::IoError.into());
        }
        Ok((Deed::Volume(kind), self.offset(sector, length)?, length))
    }

    /// Where these bytes begin, if the disk has them.
    fn offset(&self, sector: u64, length: u64) -> Result<u64, Refusal> {
        sector
            .checked_mul(SECTOR)
            .filter(|offset| offset.checked_add(length).is_some_and(|e| e <= self.geometry.size))
            .ok_or(Refusal::Status(Status::IoError))
    }

    fn range(&self, kind: u32, range: [u8; RANGE_BYTES]) -> Result<(Deed, u64, u64), Refusal> {
        let [s0, s1, s2, s3, s4, s5, s6, s7, c0, c1, c2, c3, f0, f1, f2, f3] = range;
        let sector = u64::from_le_bytes([s0, s1, s2, s3, s4, s5, s6, s7]);
        let count = u32::from_le_bytes([c0, c1, c2, c3]);
        let flags = u32::from_le_bytes([f0, f1, f2, f3]);
        let kind = match (kind, flags) {
            (DISCARD, 0) => Kind::Trim,
            (WRITE_ZEROES, 0 | 1) => Kind::Zero { hole: flags == 1, fast: false },
            _ => return Err(Status::Unsupported.into()),
        };
        if count > RANGE_SECTORS_MAX {
            return Err(Status::IoError.into());
        }
        let length = u64::from(count) * SECTOR;
        Ok((Deed::Volume(kind), self.offset(sector, length)?, length))
    }
}

enum Refusal {
    Status(Status),
    Fault(Fault),
}

impl From<Status> for Refusal {
    fn from(status: Status) -> Self {
        Self::Status(status)
    }
}

impl From<Fault> for Refusal {
    fn from(fault: Fault) -> Self {
        Self::Fault(fault)
    }
}

fn total(segments: &[Segment]) -> u64 {
    segments.iter().map(|s| u64::from(s.length)).sum()
}

/// Moves bytes from the front of the segments, however they are cut, and says
/// how many there were.
fn take_front(
    memory: &impl Memory,
    segments: &mut Vec<Segment>,
    into: &mut [u8],
) -> Result<usize, Fault> {
    let (mut done, mut whole) = (0, 0);
    for segment in segments.iter_mut() {
        let here = (into.len() - done).min(segment.length as usize);
        memory.read(segment.at, &mut into[done..done + here])?;
        done += here;
        if here < segment.length as usize {
            segment.at += here as u64;
            segment.length -= here as u32;
            break;
        }
        whole += 1;
    }
    segments.drain(..whole);
    Ok(done)
}

/// Takes the last byte.
fn take_status(segments: &mut Vec<Segment>) -> Option<u64> {
    let last = segments.last_mut()?;
    last.length -= 1;
    let at = last.at + u64::from(last.length);
    if last.length == 0 {
        segments.pop();
    }
    Some(at)
}

/// What a volume is called by its disk: letters and digits of its name.
pub fn id_of(name: &str) -> [u8; ID_BYTES] {
    let mut id = [0; ID_BYTES];
    let letters = name.bytes().filter(u8::is_ascii_alphanumeric);
    for (place, letter) in id.iter_mut().zip(letters) {
        *place = letter;
    }
    id
}
