//! The messages between two servers, each on a stream socket as
//!
//! ```text
//! length of the JSON (4, little endian) │ length of the bytes (8) │ JSON │ bytes
//! ```
//! with at most one descriptor, which comes with the first byte. A short message is one
//! call to the kernel, so that it is there whole or not at all.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::io::retry_on_intr;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use crate::nbd::Terms;
use crate::worker::Carried;

/// Names and terms; nothing that grows with what a peer sends.
const JSON_MAX: usize = 64 << 10;

/// More than a connection can have received and unsent.
const BYTES_MAX: usize = 256 << 20;

const HEADER: usize = 12;

#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Message {
    Hello {
        version: u32,
        kind: String,
    },
    Refused {
        reason: String,
    },
    /// With a descriptor.
    Socket {
        name: String,
    },
    /// With the old process's pidfd.
    Welcome,
    Prepared,
    Volume {
        name: String,
        carried: Carried,
    },
    /// With a descriptor, and `input` bytes that were received, then those unsent.
    Connection {
        socket: String,
        export: Option<(String, Option<u64>)>,
        terms: Box<Terms>,
        input: usize,
    },
    End {
        connections: usize,
    },
    Ready,
    Go,
    Begun,
}

pub(super) struct Received {
    pub message: Message,
    pub bytes: Vec<u8>,
    pub fd: Option<OwnedFd>,
}

pub(super) struct Channel {
    stream: UnixStream,
}

impl Channel {
    pub(super) fn new(stream: UnixStream) -> Self {
        Self { stream }
    }

    pub(super) fn wait_at_most(&self, time: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(time))?;
        self.stream.set_write_timeout(Some(time))
    }

    pub(super) fn send(&mut self, message: &Message) -> io::Result<()> {
        self.send_with(message, &[], None)
    }

    pub(super) fn send_with(
        &mut self,
        message: &Message,
        bytes: &[u8],
        fd: Option<BorrowedFd<'_>>,
    ) -> io::Result<()> {
        let json = serde_json::to_vec(message)?;
        let mut text = Vec::with_capacity(HEADER + json.len());
        text.extend_from_slice(&(json.len() as u32).to_le_bytes());
        text.extend_from_slice(&(bytes.len() as u64).to_le_bytes());
        text.extend_from_slice(&json);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if let Some(fd) = &fd {
            control.push(SendAncillaryMessage::ScmRights(std::slice::from_ref(fd)));
        }
        let slices = [IoSlice::new(&text)];
        let sent =
            retry_on_intr(|| sendmsg(&self.stream, &slices, &mut control, SendFlags::NOSIGNAL))?;
        self.stream.write_all(&text[sent..])?;
        self.stream.write_all(bytes)
    }

    /// From now on the other side's sending fails; what it has sent is still there to
    /// be received.
    pub(super) fn hear_no_more(&self) -> io::Result<()> {
        self.stream.shutdown(Shutdown::Read)
    }

    pub(super) fn receive(&mut self) -> io::Result<Received> {
        let mut header = [0; HEADER];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut header)];
        // With a time limit on the socket the kernel does not begin again by itself.
        let got = retry_on_intr(|| {
            recvmsg(&self.stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC)
        })?
        .bytes;
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let fd = control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        });
        self.stream.read_exact(&mut header[got..])?;
        let (json, bytes) = header.split_at(4);
        let json = u32::from_le_bytes(json.try_into().unwrap_or_default()) as usize;
        let length = u64::from_le_bytes(bytes.try_into().unwrap_or_default());
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        if json > JSON_MAX || length > BYTES_MAX {
            return Err(io::Error::other("a message is longer than any of ours"));
        }
        let mut text = vec![0; json];
        self.stream.read_exact(&mut text)?;
        let mut bytes = vec![0; length];
        self.stream.read_exact(&mut bytes)?;
        Ok(Received { message: serde_json::from_slice(&text)?, bytes, fd })
    }
}
