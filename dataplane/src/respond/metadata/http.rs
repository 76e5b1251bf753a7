//! HTTP/1.1 for one connection, as a core: bytes in, one answer after another out.
//!
//! Only what the metadata service needs, and no guess where a message is
//! ambiguous (RFC 9112): whatever cannot be read for certain is answered with
//! its error and ends the connection. However the bytes are split on their way,
//! the answers are the same.
//!
//! ```text
//! head: read ≤ 8 KiB → one answer → body: ≤ 1 KiB, thrown away → head
//!          └ too long, malformed, ambiguous → error → closed
//! ```

use std::time::Duration;

use super::service::{Request, Response, Service, Status, decimal};

/// The longest request line with all headers; EC2's own clients need under 1 KiB.
pub const HEAD_BYTES_MAX: usize = 8 * 1024;

/// The longest path; the longest that there is has about 150 bytes.
const PATH_BYTES_MAX: usize = 2 * 1024;

/// Headers a request may have; browsers send twenty.
const HEADERS_MAX: usize = 64;

/// The longest body; no request of this service has one that matters.
const BODY_BYTES_MAX: usize = 1024;

#[derive(Debug, Default)]
pub struct Session {
    input: Vec<u8>,
    /// Bytes of the last request's body that are still to come.
    body_left: usize,
    closing: bool,
}

/// What the head says about the connection and the body.
struct Framing {
    length: usize,
    body: usize,
    keep_alive: bool,
    head_only: bool,
}

impl Session {
    /// How much more it takes in before an answer was fetched.
    pub fn room(&self) -> usize {
        if self.closing { 0 } else { HEAD_BYTES_MAX - self.input.len() }
    }

    /// Takes in bytes, at most [`Self::room`] of them, and says how many.
    pub fn receive(&mut self, bytes: &[u8]) -> usize {
        let taken = bytes.len().min(self.room());
        self.input.extend_from_slice(&bytes[..taken]);
        taken
    }

    /// Whether the connection ends after the answers given so far.
    pub fn closing(&self) -> bool {
        self.closing
    }

    /// Whether a request has begun that is not answered yet.
    pub fn in_request(&self) -> bool {
        !self.input.is_empty()
    }

    /// The answer to the next whole request, if there is one.
    pub fn next_answer(&mut self, service: &mut Service, now: Duration) -> Option<Vec<u8>> {
        if self.closing {
            return None;
        }
        let body = self.body_left.min(self.input.len());
        self.input.drain(..body);
        self.body_left -= body;
        if self.body_left > 0 {
            return None;
        }
        match read_head(&self.input, service, now) {
            Ok(None) if self.input.len() >= HEAD_BYTES_MAX => {
                Some(self.fail(too_long(&self.input)))
            }
            Ok(None) => None,
            Ok(Some((framing, response))) => {
                self.input.drain(..framing.length);
                self.body_left = framing.body;
                self.closing = !framing.keep_alive;
                Some(write(&response, self.closing, framing.head_only))
            }
            Err(status) => Some(self.fail(status)),
        }
    }

    /// The peer was too slow: the answer that ends the connection.
    pub fn time_out(&mut self) -> Vec<u8> {
        self.fail(Status::RequestTimeout)
    }

    fn fail(&mut self, status: Status) -> Vec<u8> {
        self.closing = true;
        self.input = Vec::new();
        write(&Response::plain(status), true, false)
    }
}

/// No line end in all that room: it is the path that is too long.
fn too_long(input: &[u8]) -> Status {
    if input.contains(&b'\n') { Status::HeaderFieldsTooLarge } else { Status::UriTooLong }
}

fn read_head(
    input: &[u8],
    service: &mut Service,
    now: Duration,
) -> Result<Option<(Framing, Response)>, Status> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Request::new(&mut headers);
    let length = match head.parse(input) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Status::HeaderFieldsTooLarge),
        Err(httparse::Error::Version) => return Err(Status::VersionNotSupported),
        Err(_) => return Err(Status::BadRequest),
    };
    let (Some(method), Some(target), Some(version)) = (head.method, head.path, head.version) else {
        return Err(Status::BadRequest);
    };
    let headers: Vec<(&str, &[u8])> = head.headers.iter().map(|h| (h.name, h.value)).collect();
    let framing = frame(length, method, version, &headers)?;
    let path = path_of(target)?;
    let response = service.answer(&Request { method, path: &path, headers: &headers }, now);
    Ok(Some((framing, response)))
}

fn frame(
    length: usize,
    method: &str,
    version: u8,
    headers: &[(&str, &[u8])],
) -> Result<Framing, Status> {
    let values = |name: &'static str| {
        headers.iter().filter(move |(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| *value)
    };
    // RFC 9112, 3.2: a 1.1 request has one Host.
    let hosts = values("host").count();
    if hosts > 1 || (version == 1 && hosts == 0) {
        return Err(Status::BadRequest);
    }
    if values("transfer-encoding").next().is_some() {
        return Err(Status::NotImplemented);
    }
    let mut lengths = values("content-length");
    let body = match (lengths.next(), lengths.next()) {
        (None, _) => 0,
        (Some(value), None) if value.iter().all(u8::is_ascii_digit) && !value.is_empty() => {
            // More digits than fit are too many bytes.
            decimal(value).map_or(usize::MAX, |n| n as usize)
        }
        _ => return Err(Status::BadRequest),
    };
    if body > BODY_BYTES_MAX {
        return Err(Status::ContentTooLarge);
    }
    let says = |word: &str| {
        values("connection").any(|value| {
            value
                .split(|&b| b == b',')
                .any(|v| v.trim_ascii().eq_ignore_ascii_case(word.as_bytes()))
        })
    };
    let keep_alive = !says("close") && (version == 1 || says("keep-alive"));
    Ok(Framing { length, body, keep_alive, head_only: method == "HEAD" })
}

/// The path of a target in origin or absolute form, decoded, without its query.
fn path_of(target: &str) -> Result<String, Status> {
    if target.len() > PATH_BYTES_MAX {
        return Err(Status::UriTooLong);
    }
    let path = match target.strip_prefix("http://") {
        Some(rest) => rest.find('/').map_or("/", |at| &rest[at..]),
        None => target,
    };
    if !path.starts_with('/') {
        return Err(Status::BadRequest);
    }
    let path = path.split(['?', '#']).next().unwrap_or(path);
    let mut decoded = Vec::with_capacity(path.len());
    let mut bytes = path.bytes();
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let digit = |b: Option<u8>| (b? as char).to_digit(16);
                match (digit(bytes.next()), digit(bytes.next())) {
                    (Some(high), Some(low)) => (high * 16 + low) as u8,
                    _ => return Err(Status::BadRequest),
                }
            }
            other => other,
        });
    }
    String::from_utf8(decoded).map_err(|_| Status::BadRequest)
}

fn write(response: &Response, closing: bool, head_only: bool) -> Vec<u8> {
    let mut head = format!(
        "HTTP/1.1 {}\r\nServer: Hostplane\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\
         Connection: {}\r\n",
        response.status.line(),
        response.body.len(),
        if closing { "close" } else { "keep-alive" },
    );
    if let Some(left_s) = response.token_lifetime_s {
        head.push_str(&format!("X-Aws-Ec2-Metadata-Token-Ttl-Seconds: {left_s}\r\n"));
    }
    if let Status::MethodNotAllowed(allowed) = response.status {
        head.push_str(&format!("Allow: {allowed}\r\n"));
    }
    head.push_str("\r\n");
    let mut bytes = head.into_bytes();
    if !head_only {
        bytes.extend_from_slice(&response.body);
    }
    bytes
}

#[cfg(test)]
#[path = "http_tests.rs"]
mod tests;
