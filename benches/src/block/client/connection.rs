//! One connection in transmission: requests that wait to be sent, replies that
//! are being read. A cookie is the request's slot.
//!
//! ```text
//! request  magic (4) │ flags (2) │ type (2) │ cookie (8) │ offset (8) │ length (4) │ payload
//! reply    magic (4) │ error (4) │ cookie (8) │ payload
//! ```

use std::fs::File;
use std::io::{self, ErrorKind, IoSlice, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use anyhow::{Context, ensure};
use hdrhistogram::Histogram;

use super::handshake;
use crate::block::address::Address;
use crate::block::load::{Deed, Load};

const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;
const COMMAND_DISC: u16 = 2;
const REQUEST_BYTES: usize = 28;
pub const REPLY_BYTES: usize = 16;

/// Read at once: sixty-four replies of 4 KiB, and small enough for a core's own cache.
const INPUT_BYTES: usize = 320 << 10;

/// Slices in one writev(2).
const SLICES_MAX: usize = 128;

pub type Header = [u8; REQUEST_BYTES];

pub struct Connection {
    socket: File,
    load: Load,
    blocks: u64,
    random: u64,
    free: Vec<u16>,
    asked_at: Vec<Instant>,
    /// Not wholly sent, and what is sent of the first with its payload.
    output: Vec<Header>,
    output_sent: usize,
    payload: Vec<u8>,
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// The request whose answer is being read, and its payload that is still to come.
    answering: Option<u16>,
    skip: usize,
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Connection {
    pub fn open(address: &Address, export: &str, load: Load, index: u64) -> anyhow::Result<Self> {
        let mut socket = address.connect()?;
        let size = handshake::begin(&mut socket, export).context("handshake")?;
        let blocks = size / u64::from(load.block_bytes);
        ensure!(blocks > 0, "the export has {size} bytes, less than one block");
        let flags = nix::fcntl::OFlag::O_NONBLOCK;
        nix::fcntl::fcntl(&socket, nix::fcntl::FcntlArg::F_SETFL(flags))?;
        let payload: Vec<u8> = match load.deed {
            Deed::Read => Vec::new(),
            Deed::Write => (0..load.block_bytes).map(|i| ((i / 7) ^ i) as u8).collect(),
        };
        Ok(Self {
            socket,
            load,
            blocks,
            random: 0x9e37_79b9_7f4a_7c15 ^ (index + 1),
            free: (0..load.depth as u16).rev().collect(),
            asked_at: vec![Instant::now(); load.depth as usize],
            output: Vec::new(),
            output_sent: 0,
            payload,
            input: vec![0; INPUT_BYTES],
            start: 0,
            end: 0,
            answering: None,
            skip: 0,
        })
    }

    pub fn in_flight(&self) -> usize {
        self.load.depth as usize - self.free.len()
    }

    /// Makes a request for each free slot, and sends.
    pub fn ask(&mut self, now: Instant) -> io::Result<()> {
        while let Some(slot) = self.free.pop() {
            self.random = crate::block::file::xorshift(self.random);
            let offset = self.random % self.blocks * u64::from(self.load.block_bytes);
            self.asked_at[usize::from(slot)] = now;
            let command = self.load.deed.command();
            self.output.push(header(command, slot, offset, self.load.block_bytes));
        }
        self.send()
    }

    /// As much as the socket takes.
    pub fn send(&mut self) -> io::Result<()> {
        while !self.output.is_empty() {
            let mut slices = [IoSlice::new(&[]); SLICES_MAX];
            let count = self.slices(&mut slices);
            match (&self.socket).write_vectored(&slices[..count]) {
                Ok(written) => self.was_sent(written),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether requests wait for room in the socket.
    pub fn is_blocked(&self) -> bool {
        !self.output.is_empty()
    }

    fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>; SLICES_MAX]) -> usize {
        let (mut count, mut skip) = (0, self.output_sent);
        for header in self.output.iter().take(SLICES_MAX / 2) {
            for part in [&header[..], &self.payload[..]] {
                let rest = &part[skip.min(part.len())..];
                skip -= part.len() - rest.len();
                if !rest.is_empty() {
                    slices[count] = IoSlice::new(rest);
                    count += 1;
                }
            }
        }
        count
    }

    fn was_sent(&mut self, written: usize) {
        let whole = REQUEST_BYTES + self.payload.len();
        let sent = self.output_sent + written;
        self.output.drain(..sent / whole);
        self.output_sent = sent % whole;
    }

    /// Reads once; whether more may be there already.
    pub fn receive(&mut self) -> anyhow::Result<bool> {
        self.input.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let space = &mut self.input[self.end..];
        let room = space.len();
        match self.socket.read(space) {
            Ok(0) => anyhow::bail!("the server closed the connection"),
            Ok(count) => {
                self.end += count;
                Ok(count == room)
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes every whole reply; each frees its slot.
    pub fn parse(&mut self, now: Instant, latencies: &mut Histogram<u64>) -> anyhow::Result<()> {
        loop {
            let skipped = self.skip.min(self.end - self.start);
            self.start += skipped;
            self.skip -= skipped;
            if self.skip > 0 {
                return Ok(());
            }
            if let Some(slot) = self.answering.take() {
                let took = now - self.asked_at[usize::from(slot)];
                latencies.saturating_record(took.as_nanos() as u64);
                self.free.push(slot);
            }
            let Some(reply) = self.input[self.start..self.end].first_chunk::<REPLY_BYTES>() else {
                return Ok(());
            };
            let word = |at: usize| u32::from_be_bytes(std::array::from_fn(|i| reply[at + i]));
            let (magic, error, high, slot) = (word(0), word(4), word(8), word(12));
            ensure!(magic == REPLY_MAGIC, "this is no reply: {magic:#x}");
            ensure!(error == 0, "the server answers with error {error}");
            ensure!(high == 0 && slot < self.load.depth, "an answer to what was not asked");
            self.start += REPLY_BYTES;
            self.answering = Some(slot as u16);
            if self.load.deed == Deed::Read {
                self.skip = self.load.block_bytes as usize;
            }
        }
    }

    /// Says goodbye, so that the server logs no lost client.
    pub fn close(mut self) -> io::Result<()> {
        self.socket.write_all(&header(COMMAND_DISC, 0, 0, 0))
    }
}

pub fn header(command: u16, slot: u16, offset: u64, length: u32) -> Header {
    let mut header = [0; REQUEST_BYTES];
    header[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    header[6..8].copy_from_slice(&command.to_be_bytes());
    header[14..16].copy_from_slice(&slot.to_be_bytes());
    header[16..24].copy_from_slice(&offset.to_be_bytes());
    header[24..].copy_from_slice(&length.to_be_bytes());
    header
}
