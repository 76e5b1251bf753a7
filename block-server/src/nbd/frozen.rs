//! A session put down as plain data between two requests, to be taken up again
//! by another worker or another process: what was negotiated, what was received
//! and not yet used, what is still to be sent.
//!
//! A request that no volume has seen yet, since its payload is still arriving or
//! since it waits for its turn, is put back into the input, header and all: then
//! nothing waits for a peer or a limit before a session can be put down.

use serde::{Deserialize, Serialize};

use super::handshake::Handshake;
use super::session::{Command, Request, Transmission};
use super::wire::{self, command, flag};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frozen {
    pub terms: Terms,
    /// Received, and no request yet.
    pub input: Vec<u8>,
    /// Replies, or a part of one, that the peer has not got.
    pub output: Vec<u8>,
}

/// What both sides agreed on so far, and how far the stream was read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Terms {
    pub(super) stage: Stage,
    /// Payload of a refused write that is still to be dropped.
    pub(super) unwanted: u64,
    pub(super) refusing: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Stage {
    Handshake(Handshake),
    Transmission(Transmission),
    Closed,
}

impl Terms {
    /// What the client was told of its export, once it has chosen one.
    pub fn export(&self) -> Option<&super::Export> {
        match &self.stage {
            Stage::Transmission(transmission) => Some(&transmission.export),
            Stage::Handshake(_) | Stage::Closed => None,
        }
    }

    /// Whether nothing may be served before TLS is there.
    pub fn awaits_tls(&self) -> bool {
        matches!(&self.stage, Stage::Handshake(handshake) if handshake.awaits_tls())
    }

    /// The export's key is the shell's, and another shell has other keys.
    pub fn set_export_key(&mut self, key: u64) {
        if let Stage::Transmission(transmission) = &mut self.stage {
            transmission.export.key = key;
        }
    }
}

impl Transmission {
    /// The bytes that a request came as, but for what makes no difference here.
    pub(super) fn encode(&self, request: &Request) -> Vec<u8> {
        let (kind, mut flags) = match request.command {
            Command::Read => (command::READ, 0),
            Command::Write => {
                (command::WRITE, if self.is_extended() { flag::PAYLOAD_LEN } else { 0 })
            }
            Command::Flush => (command::FLUSH, 0),
            Command::Trim => (command::TRIM, 0),
            Command::Cache => (command::CACHE, 0),
            Command::WriteZeroes { hole, fast } => {
                let no_hole = if hole { 0 } else { flag::NO_HOLE };
                (command::WRITE_ZEROES, no_hole | if fast { flag::FAST_ZERO } else { 0 })
            }
            Command::BlockStatus { one } => {
                (command::BLOCK_STATUS, if one { flag::REQ_ONE } else { 0 })
            }
        };
        flags |= if request.fua { flag::FUA } else { 0 };
        let magic =
            if self.is_extended() { wire::EXTENDED_REQUEST_MAGIC } else { wire::REQUEST_MAGIC };
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&request.cookie.to_be_bytes());
        bytes.extend_from_slice(&request.offset.to_be_bytes());
        if self.is_extended() {
            bytes.extend_from_slice(&request.length.to_be_bytes());
        } else {
            bytes.extend_from_slice(&(request.length as u32).to_be_bytes());
        }
        bytes
    }
}
