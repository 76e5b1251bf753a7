//! What goes in and out of a session: exports, requests, answers and pieces of output.

use serde::{Deserialize, Serialize};

use super::wire::{Error, can};

/// Bytes of the longest reply header: an extended one's (32) and the offset before its data (8).
pub(super) const HEADER_MAX: usize = 40;

/// What the server offers under one name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Export {
    pub size: u64,
    pub read_only: bool,
    pub description: String,
    /// Smallest unit of offsets and lengths.
    pub block_min: u32,
    /// Which the shell uses to find the volume; the session only carries it.
    pub key: u64,
}

impl Export {
    /// The preferred unit: a guest's page and our files' block.
    pub const BLOCK_PREFERRED: u32 = 4096;

    pub(super) fn flags(&self, structured: bool) -> u16 {
        let mut flags = can::HAS_FLAGS | can::FLUSH | can::FUA | can::MULTI_CONN | can::CACHE;
        if self.read_only {
            flags |= can::READ_ONLY;
        } else {
            flags |= can::TRIM | can::WRITE_ZEROES | can::FAST_ZERO;
        }
        if structured {
            flags |= can::DF;
        }
        flags
    }
}

/// The exports that a connection may see.
pub trait Exports {
    /// `""` is the default export, where there is one.
    fn find(&self, name: &str) -> Option<Export>;
    /// Names and descriptions.
    fn list(&self) -> Vec<(String, String)>;
}

/// Bytes that a reply carries, owned by whoever read them.
pub trait Payload {
    fn bytes(&self) -> &[u8];
}

impl Payload for Vec<u8> {
    fn bytes(&self) -> &[u8] {
        self
    }
}

/// Output that was handed out and is not sent yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[must_use = "the session counts it against the peer until `sent`"]
pub struct Held {
    pub(super) replies: usize,
    pub(super) bytes: u64,
}

/// A piece of output. Headers are kept inline: a reply allocates nothing.
#[derive(Debug)]
pub enum Chunk<P> {
    Header { bytes: [u8; HEADER_MAX], length: u8 },
    Bytes(Vec<u8>),
    Payload(P),
}

impl<P: Payload> Chunk<P> {
    pub fn bytes(&self) -> &[u8] {
        match self {
            Self::Header { bytes, length } => &bytes[..usize::from(*length)],
            Self::Bytes(bytes) => bytes,
            Self::Payload(payload) => payload.bytes(),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    Read,
    /// Its payload of `length` bytes follows in the stream.
    Write,
    Flush,
    Trim,
    Cache,
    /// `hole`: the range may become one; `fast`: fail rather than write zeros.
    WriteZeroes {
        hole: bool,
        fast: bool,
    },
    /// `one`: a single extent suffices.
    BlockStatus {
        one: bool,
    },
}

/// A request that was checked against the export: in bounds, aligned, allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    pub cookie: u64,
    pub command: Command,
    pub offset: u64,
    pub length: u64,
    pub fua: bool,
}

/// What an answer carries beside success.
#[derive(Debug)]
pub enum Answer<P> {
    Done,
    Data(P),
    /// For BLOCK_STATUS: (length, state) from the request's offset on.
    Extents(Vec<(u64, u32)>),
    Failed(Error),
}
