//! TLS 1.3 between a socket and its session: sealed bytes in, plain bytes out,
//! and back. It owns no socket and knows no clock; `worker` moves its bytes as it
//! moves a session's. A connection without TLS has none of this.
//!
//! ```text
//!  socket ──▶ space/received ──▶ advance ──▶ take ──▶ Session
//!  socket ◀── output/sent ◀──── seal ◀──────────────── Session
//! ```
//!
//! What may never be true: a byte that came before the handshake's end taken for
//! a request; memory that grows with what a peer sends (one [`INPUT_SPACE`] of
//! sealed bytes, and at most as much opened) or leaves unread ([`SEALED_MAX`]).

mod names;
mod settings;

use std::sync::Arc;

use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, InsufficientSizeError};

pub use names::Names;
pub use settings::{Error, Files, Server};

/// Sealed bytes that are taken at once: some records of the largest size (16 KiB).
const INPUT_SPACE: usize = 64 << 10;

/// Plain bytes that are sealed before the socket has taken what was sealed before.
pub const SEALED_MAX: usize = 256 << 10;

/// A record of 16 KiB grows by its header, its type and its tag.
const RECORD: usize = 16 << 10;
const RECORD_EXTRA: usize = 64;

/// One connection's TLS.
pub struct Layer {
    tls: UnbufferedServerConnection,
    input: Vec<u8>,
    filled: usize,
    plain: Vec<u8>,
    plain_taken: usize,
    /// Plain, and less than a record.
    gathered: Vec<u8>,
    /// Sealed, and not yet given to the kernel.
    pending: Sealed,
    /// The kernel reads from it: it is left alone until all of it is sent.
    sending: Sealed,
    sending_done: usize,
    failure: Option<rustls::Error>,
    closing: bool,
}

impl Layer {
    pub fn new(server: &Server) -> Result<Self, rustls::Error> {
        Ok(Self {
            tls: UnbufferedServerConnection::new(Arc::clone(server.config()))?,
            input: vec![0; INPUT_SPACE],
            filled: 0,
            plain: Vec::new(),
            plain_taken: 0,
            gathered: Vec::new(),
            pending: Sealed::default(),
            sending: Sealed::default(),
            sending_done: 0,
            failure: None,
            closing: false,
        })
    }

    /// Where the next sealed bytes go; empty until what was opened is taken.
    /// Its place stays until [`Self::received`].
    pub fn space(&mut self) -> &mut [u8] {
        if self.failure.is_some() || self.has_plain() {
            return &mut [];
        }
        &mut self.input[self.filled..]
    }

    /// `count` bytes came to the start of [`Self::space`]; they are opened at once.
    pub fn received(&mut self, count: usize) {
        self.filled += count;
        assert!(self.filled <= self.input.len(), "more received than there was space");
        self.advance();
    }

    fn advance(&mut self) {
        loop {
            let status = self.tls.process_tls_records(&mut self.input[..self.filled]);
            let discard = status.discard;
            let go_on = match status.state {
                Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                    while let Some(Ok(record)) = traffic.next_record() {
                        self.plain.extend_from_slice(record.payload);
                    }
                    true
                }
                Ok(ConnectionState::EncodeTlsData(mut data)) => {
                    self.pending.append(1 << 10, |place| {
                        data.encode(place).map_err(|error| match error {
                            EncodeError::InsufficientSize(size) => Some(size),
                            EncodeError::AlreadyEncoded => None,
                        })
                    });
                    true
                }
                Ok(ConnectionState::TransmitTlsData(data)) => {
                    data.done();
                    true
                }
                Ok(ConnectionState::PeerClosed) => true,
                Ok(_) => false,
                Err(error) => {
                    self.failure = Some(error);
                    true
                }
            };
            // Without new bytes nothing is discarded: so `write`, which also comes
            // here, moves nothing while the kernel writes behind `filled`.
            if discard > 0 {
                self.input.copy_within(discard..self.filled, 0);
                self.filled -= discard;
            }
            // After a failure only the alert that tells the peer is fetched.
            if !go_on || (self.failure.is_some() && !self.tls.wants_write()) {
                return;
            }
        }
    }

    fn has_plain(&self) -> bool {
        self.plain_taken < self.plain.len()
    }

    /// Moves opened bytes to the start of `target` and says how many.
    pub fn take(&mut self, target: &mut [u8]) -> usize {
        let left = &self.plain[self.plain_taken..];
        let count = left.len().min(target.len());
        target[..count].copy_from_slice(&left[..count]);
        self.plain_taken += count;
        if !self.has_plain() {
            self.plain.clear();
            self.plain_taken = 0;
        }
        count
    }

    /// Seals `plain`, up to what fills no record: [`Self::finish`] seals that. The caller
    /// minds [`Self::has_room`].
    pub fn seal(&mut self, mut plain: &[u8]) {
        // Each record costs both ends as much as a kilobyte or two: headers and short
        // payloads share one.
        if !self.gathered.is_empty() {
            let (first, rest) = plain.split_at(plain.len().min(RECORD - self.gathered.len()));
            self.gathered.extend_from_slice(first);
            plain = rest;
            if self.gathered.len() == RECORD {
                self.finish();
            }
        }
        let (whole, rest) = plain.split_at(plain.len() - plain.len() % RECORD);
        if !whole.is_empty() {
            self.encrypt(whole);
        }
        self.gathered.extend_from_slice(rest);
    }

    /// Seals what was gathered.
    pub fn finish(&mut self) {
        if !self.gathered.is_empty() {
            let mut gathered = std::mem::take(&mut self.gathered);
            self.encrypt(&gathered);
            gathered.clear();
            self.gathered = gathered;
        }
    }

    fn encrypt(&mut self, plain: &[u8]) {
        let sealed = plain.len() + (plain.len() / RECORD + 1) * RECORD_EXTRA;
        self.write(sealed, |traffic, place| traffic.encrypt(plain, place));
    }

    /// Says to the peer that this is the end and no cut.
    pub fn close(&mut self) {
        if !std::mem::replace(&mut self.closing, true) && !self.tls.is_handshaking() {
            self.write(RECORD_EXTRA, |traffic, place| traffic.queue_close_notify(place));
        }
    }

    fn write(
        &mut self,
        estimate: usize,
        mut write: impl FnMut(
            &mut rustls::unbuffered::WriteTraffic<'_, rustls::server::ServerConnectionData>,
            &mut [u8],
        ) -> Result<usize, EncryptError>,
    ) {
        if self.failure.is_some() {
            return;
        }
        // What came in between is opened first: only then the state is writable.
        self.advance();
        let status = self.tls.process_tls_records(&mut self.input[..self.filled]);
        let Ok(ConnectionState::WriteTraffic(mut traffic)) = status.state else {
            self.failure.get_or_insert(rustls::Error::HandshakeNotComplete);
            return;
        };
        let written = self.pending.append(estimate, |place| {
            write(&mut traffic, place).map_err(|error| match error {
                EncryptError::InsufficientSize(size) => Some(size),
                EncryptError::EncryptExhausted => None,
            })
        });
        if !written {
            self.failure = Some(rustls::Error::EncryptError);
        }
    }

    /// Whether more may be sealed before the socket takes what there is.
    pub fn has_room(&self) -> bool {
        self.failure.is_none() && self.pending.filled < SEALED_MAX
    }

    pub fn has_output(&self) -> bool {
        self.pending.filled > 0 || self.sending.filled > 0
    }

    /// What is to be sent next. It stays in its place until [`Self::sent`],
    /// whatever else is called meanwhile.
    pub fn output(&mut self) -> &[u8] {
        if self.sending.filled == 0 {
            std::mem::swap(&mut self.sending, &mut self.pending);
        }
        &self.sending.bytes[self.sending_done..self.sending.filled]
    }

    /// The socket took `count` bytes of [`Self::output`].
    pub fn sent(&mut self, count: usize) {
        self.sending_done += count;
        if self.sending_done == self.sending.filled {
            self.sending.filled = 0;
            self.sending_done = 0;
        }
    }

    pub fn is_handshaking(&self) -> bool {
        self.tls.is_handshaking()
    }

    pub fn failure(&self) -> Option<&rustls::Error> {
        self.failure.as_ref()
    }

    /// Who the peer is, by the certificate that was checked.
    pub fn names(&self) -> Names {
        self.tls
            .peer_certificates()
            .and_then(|chain| chain.first())
            .map_or_else(Names::default, |certificate| Names::of(certificate))
    }
}

/// Bytes for the socket. What was there before is written over and never cleared:
/// to clear the place for 256 KiB costs a tenth of sealing them.
#[derive(Default)]
struct Sealed {
    bytes: Vec<u8>,
    filled: usize,
}

impl Sealed {
    /// Lets `write` append; makes room once more where it asks for more than estimated.
    /// `false` where it cannot write at all.
    fn append(
        &mut self,
        estimate: usize,
        mut write: impl FnMut(&mut [u8]) -> Result<usize, Option<InsufficientSizeError>>,
    ) -> bool {
        let mut result = write(self.place(estimate));
        if let Err(Some(InsufficientSizeError { required_size })) = result {
            result = write(self.place(required_size));
        }
        self.filled += *result.as_ref().unwrap_or(&0);
        result.is_ok()
    }

    fn place(&mut self, size: usize) -> &mut [u8] {
        let end = self.filled + size;
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[self.filled..end]
    }
}
