//! The bytes of vhost-user: a header of request, flags and size, then a payload.
//! Numbers are in the host's own order, since both ends share the host.

/// Bytes of a message's header.
pub const HEADER_BYTES: usize = 12;

/// Bytes of a payload that we take: the longest is a memory table.
pub const PAYLOAD_MAX: usize = 4096;

/// Descriptors of one message (`VHOST_USER_MAX_FDS` of the document).
pub const FDS_MAX: usize = 8;

/// What the front asks for.
pub mod ask {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

/// What we tell of our own accord.
pub const CONFIG_CHANGED: u32 = 2;

/// Protocol features, by bit.
pub mod protocol {
    pub const QUEUES: u64 = 1 << 0;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const CONFIG: u64 = 1 << 9;
    pub const INFLIGHT: u64 = 1 << 12;
    pub const MEM_SLOTS: u64 = 1 << 15;
}

/// Among the device's features: there are protocol features.
pub const PROTOCOL_FEATURES: u64 = 1 << 30;

const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const IS_REPLY: u32 = 1 << 2;
const WANTS_REPLY: u32 = 1 << 3;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub request: u32,
    pub wants_reply: bool,
    pub size: usize,
}

impl Header {
    /// `None` for what no front of this protocol sends.
    pub fn read(bytes: [u8; HEADER_BYTES]) -> Option<Self> {
        let [r0, r1, r2, r3, f0, f1, f2, f3, s0, s1, s2, s3] = bytes;
        let flags = u32::from_ne_bytes([f0, f1, f2, f3]);
        let size = u32::from_ne_bytes([s0, s1, s2, s3]) as usize;
        let lawful =
            flags & VERSION_MASK == VERSION && flags & IS_REPLY == 0 && size <= PAYLOAD_MAX;
        lawful.then_some(Self {
            request: u32::from_ne_bytes([r0, r1, r2, r3]),
            wants_reply: flags & WANTS_REPLY != 0,
            size,
        })
    }
}

fn message(request: u32, flags: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
    for number in [request, flags, payload.len() as u32] {
        bytes.extend(number.to_ne_bytes());
    }
    bytes.extend(payload);
    bytes
}

pub fn reply(request: u32, payload: &[u8]) -> Vec<u8> {
    message(request, VERSION | IS_REPLY, payload)
}

/// A message of our own, which asks for no reply.
pub fn tell(request: u32) -> Vec<u8> {
    message(request, VERSION, &[])
}

/// Takes numbers off a payload.
pub struct Numbers<'a>(pub &'a [u8]);

impl Numbers<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (front, rest) = self.0.split_first_chunk::<N>()?;
        self.0 = rest;
        Some(*front)
    }

    pub fn u16(&mut self) -> Option<u16> {
        self.take().map(u16::from_ne_bytes)
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_ne_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_ne_bytes)
    }
}
