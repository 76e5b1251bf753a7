//! One vhost-user connection: a guest's disk, its rings and its memory.

use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::rc::Rc;
use std::time::Instant;

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::Slots;
use super::connection::{Chosen, Closing};
use crate::engine::{Buffer, FileId, Io};
use crate::vhost::inflight::Part;
use crate::vhost::memory::{GuestMemory, Mapping};
use crate::vhost::protocol::{Marks, Protocol};
use crate::vhost::queue::Queue;
use crate::vhost::wire::{FDS_MAX, HEADER_BYTES, Header};
use crate::volume::{Kind, Ticket};

/// One ring as the shell holds it.
#[derive(Default)]
pub(super) struct RingState {
    /// While it is started, and has broken no rule.
    pub queue: Option<Queue>,
    pub part: Option<Part>,
    /// Taken by a server before us and not answered: done first.
    pub left: Vec<u16>,
    pub kick: Option<Rc<OwnedFd>>,
    /// The kick that an operation reads now, and where to.
    pub listening: Option<Rc<OwnedFd>>,
    pub kick_count: Box<[u8; 8]>,
    pub call: Option<Rc<OwnedFd>>,
    /// The call that an operation rings now.
    pub calling: Option<Rc<OwnedFd>>,
    /// Something was answered since the guest was last called.
    pub has_answers: bool,
    /// The guest is called whatever its ring says: it may have missed answers.
    pub must_call: bool,
    pub error: Option<OwnedFd>,
    /// Counts the ring's beginnings: an answer is for the ring that was asked.
    pub epoch: u32,
    /// Requests of it that the volume has, and the one that waits for its limits.
    pub running: u32,
    pub held: Option<Ticket>,
}

pub(super) struct Device {
    pub socket: OwnedFd,
    pub listener: u32,
    /// Which came first.
    pub born: u64,
    pub chosen: Chosen,
    pub protocol: Protocol,
    pub memory: Rc<GuestMemory>,
    pub marks: Option<(Marks, Mapping)>,
    pub channel: Option<OwnedFd>,
    pub rings: Vec<RingState>,
    /// The ring that must run dry before a message is answered.
    pub stopping: Option<u16>,
    pub is_polled: bool,
    pub is_readable: bool,
    pub closing: Closing,
    pub deadline: Option<Instant>,
    pub is_busy: bool,
    /// Bytes of buffers where the guest's own memory would not do.
    pub bounced: u64,
    input: Vec<u8>,
    fds: Vec<OwnedFd>,
}

/// Why nothing more comes.
pub(super) enum Ended {
    HungUp,
    Unlawful,
}

impl Device {
    pub fn new(
        socket: OwnedFd,
        listener: u32,
        born: u64,
        chosen: Chosen,
        protocol: Protocol,
    ) -> Self {
        let rings = (0..protocol.rings()).map(|_| RingState::default()).collect();
        Self {
            socket,
            listener,
            born,
            chosen,
            protocol,
            memory: Rc::default(),
            marks: None,
            channel: None,
            rings,
            stopping: None,
            is_polled: false,
            is_readable: false,
            closing: Closing::No,
            deadline: None,
            is_busy: false,
            bounced: 0,
            input: Vec::new(),
            fds: Vec::new(),
        }
    }

    /// The next whole message; `None`: it has not come yet.
    #[expect(clippy::type_complexity, reason = "a message is just this")]
    pub fn next_message(&mut self) -> Result<Option<(Header, Vec<u8>, Vec<OwnedFd>)>, Ended> {
        loop {
            let wanted = match self.input.first_chunk::<HEADER_BYTES>() {
                None => HEADER_BYTES,
                Some(bytes) => {
                    let header = Header::read(*bytes).ok_or(Ended::Unlawful)?;
                    if self.input.len() == HEADER_BYTES + header.size {
                        let payload = self.input.split_off(HEADER_BYTES);
                        self.input.clear();
                        return Ok(Some((header, payload, std::mem::take(&mut self.fds))));
                    }
                    HEADER_BYTES + header.size
                }
            };
            if !self.receive(wanted - self.input.len())? {
                return Ok(None);
            }
        }
    }

    /// At most so many bytes, so that descriptors stay with their message.
    fn receive(&mut self, count: usize) -> Result<bool, Ended> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut bytes = vec![0; count];
        let mut slices = [std::io::IoSliceMut::new(&mut bytes)];
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(&self.socket, &mut slices, &mut ancillary, flags) {
            Ok(received) => received,
            Err(Errno::AGAIN | Errno::INTR) => return Ok(false),
            Err(error) => {
                tracing::warn!("a hypervisor's message cannot be received: {error}");
                return Err(Ended::HungUp);
            }
        };
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        if received.bytes == 0 {
            return Err(Ended::HungUp);
        }
        if received.flags.contains(ReturnFlags::CTRUNC) || self.fds.len() > FDS_MAX {
            return Err(Ended::Unlawful);
        }
        bytes.truncate(received.bytes);
        self.input.extend(bytes);
        Ok(true)
    }

    /// A front reads each reply before it asks again: one that cannot be sent at
    /// once has no reader.
    pub fn send(&self, bytes: &[u8], fd: Option<&OwnedFd>) -> bool {
        send(&self.socket, bytes, fd)
    }

    /// Tells a front that listens that the disk has changed, so that it asks.
    pub fn tell_config_changed(&self) {
        if let Some(channel) = &self.channel {
            let message = crate::vhost::wire::tell(crate::vhost::wire::CONFIG_CHANGED);
            if !send(channel, &message, None) {
                tracing::warn!("a guest's disk grew, and its hypervisor cannot be told");
            }
        }
    }

    pub fn running(&self) -> u32 {
        self.rings.iter().map(|ring| ring.running).sum()
    }

    pub fn held(&self) -> u32 {
        self.rings.iter().filter(|ring| ring.held.is_some()).count() as u32
    }

    /// Whether the engine still knows something of ours.
    pub fn has_operations(&self) -> bool {
        self.is_polled || self.rings.iter().any(|r| r.listening.is_some() || r.calling.is_some())
    }
}

fn send(socket: &OwnedFd, bytes: &[u8], fd: Option<&OwnedFd>) -> bool {
    use std::os::fd::AsFd;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = fd.map(|fd| [fd.as_fd()]);
    if let Some(fds) = &fds {
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(fds)), "there is room for one");
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    let sent = sendmsg(socket, &[std::io::IoSlice::new(bytes)], &mut ancillary, flags);
    sent.is_ok_and(|count| count == bytes.len())
}

/// Where a request's data is for the file operation.
pub(super) enum Payload {
    None,
    /// In the guest's memory, as it is.
    Direct,
    /// The guest's memory is not laid out as the file wants it.
    Bounced {
        buffer: Buffer,
        at: usize,
    },
}

impl Payload {
    /// Bytes of buffers that it holds.
    pub fn bounced(&self) -> u64 {
        match self {
            Self::None | Self::Direct => 0,
            Self::Bounced { buffer, .. } => buffer.capacity() as u64,
        }
    }
}

/// A guest's request that the volume has.
pub(super) struct GuestRequest {
    pub device: u32,
    pub ring: u16,
    pub epoch: u32,
    pub head: u16,
    pub volume: u32,
    pub kind: Kind,
    pub offset: u64,
    pub length: u64,
    pub fua: bool,
    pub generation: Option<u64>,
    pub status_at: u64,
    pub payload: Payload,
    /// Where its data lies, mapped by `memory`, which stays as long.
    pub pieces: Vec<libc::iovec>,
    /// The rest of `pieces` that a short transfer left.
    pub cut: Vec<libc::iovec>,
    pub memory: Rc<GuestMemory>,
    pub arrived: Instant,
    /// When it was let on to its volume, and when its first operation began.
    pub admitted: Instant,
    pub begun: Instant,
}

impl GuestRequest {
    /// The pieces of `length` bytes from `at`. They stay in place until the next
    /// call: at most one operation of a request runs.
    pub fn vectors(&mut self, at: usize, length: usize) -> &[libc::iovec] {
        if at == 0 && length as u64 == self.length {
            return &self.pieces;
        }
        self.cut.clear();
        let (mut skip, mut left) = (at, length);
        for piece in &self.pieces {
            let skipped = skip.min(piece.iov_len);
            skip -= skipped;
            let here = (piece.iov_len - skipped).min(left);
            left -= here;
            if here > 0 {
                // SAFETY: within the piece, as its length was just found to allow.
                let start = unsafe { piece.iov_base.cast::<u8>().add(skipped) };
                self.cut.push(libc::iovec { iov_base: start.cast(), iov_len: here });
            }
        }
        &self.cut
    }

    /// What the guest wrote, to the buffer that is written from.
    pub fn gather(&mut self) {
        let Payload::Bounced { buffer, at } = &mut self.payload else { return };
        let mut target = &mut buffer.bytes_mut()[*at..*at + self.length as usize];
        for piece in &self.pieces {
            let (here, rest) = target.split_at_mut(piece.iov_len);
            // SAFETY: the piece lies in memory that `self.memory` keeps mapped.
            // The guest may change it meanwhile: then a mix is written, as with
            // any disk.
            unsafe {
                std::ptr::copy_nonoverlapping(
                    piece.iov_base.cast(),
                    here.as_mut_ptr(),
                    piece.iov_len,
                );
            }
            target = rest;
        }
    }

    /// What was read, to where the guest wants it.
    pub fn scatter(&self) {
        let Payload::Bounced { buffer, at } = &self.payload else { return };
        let mut source = &buffer.bytes()[*at..*at + self.length as usize];
        for piece in &self.pieces {
            let (here, rest) = source.split_at(piece.iov_len);
            // SAFETY: as in `gather`.
            unsafe {
                std::ptr::copy_nonoverlapping(here.as_ptr(), piece.iov_base.cast(), piece.iov_len);
            }
            source = rest;
        }
    }
}

/// What the volume's operations are to the engine, for guests' requests. Memory
/// that they name stays until the request is answered.
impl Slots<GuestRequest> {
    fn begin(&mut self, index: u32, now: Instant) -> &mut GuestRequest {
        let Some(request) = self.get_mut(index) else {
            unreachable!("an operation's request is in flight")
        };
        if request.begun == request.admitted {
            request.begun = now;
        }
        request
    }

    pub fn read(
        &mut self,
        (index, now): (u32, Instant),
        file: FileId,
        at: usize,
        offset: u64,
        length: usize,
    ) -> Io {
        let request = self.begin(index, now);
        if let Payload::Bounced { buffer, .. } = &mut request.payload {
            let into = buffer.bytes_mut()[at..at + length].as_mut_ptr();
            return Io::Read { file, into, length, offset };
        }
        match request.vectors(at, length) {
            [one] => Io::Read { file, into: one.iov_base.cast(), length, offset },
            all => Io::ReadVectored { file, into: all.as_ptr(), count: all.len(), offset },
        }
    }

    pub fn write(
        &mut self,
        (index, now): (u32, Instant),
        file: FileId,
        at: usize,
        offset: u64,
        length: usize,
        durable: bool,
    ) -> Io {
        let request = self.begin(index, now);
        if let Payload::Bounced { buffer, .. } = &mut request.payload {
            let from = buffer.bytes_mut()[at..at + length].as_ptr();
            return Io::Write { file, from, length, offset, durable };
        }
        match request.vectors(at, length) {
            [one] => Io::Write { file, from: one.iov_base.cast(), length, offset, durable },
            all => {
                let (from, count) = (all.as_ptr(), all.len());
                Io::WriteVectored { file, from, count, offset, durable }
            }
        }
    }

    pub fn copy(&mut self, (index, now): (u32, Instant), from: usize, to: usize, length: usize) {
        let Payload::Bounced { buffer, .. } = &mut self.begin(index, now).payload else {
            unreachable!("only whole blocks go straight")
        };
        buffer.bytes_mut().copy_within(from..from + length, to);
    }

    pub fn fill(&mut self, (index, now): (u32, Instant), at: usize, length: usize) {
        let Payload::Bounced { buffer, .. } = &mut self.begin(index, now).payload else {
            unreachable!("a part of a block is zeroed in a buffer")
        };
        buffer.bytes_mut()[at..at + length].fill(0);
    }
}
