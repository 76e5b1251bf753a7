//! What the metadata service answers to a well-formed request.
//!
//! ```text
//! PUT  /latest/api/token, ttl 1–21600, not forwarded  → 200 and a token
//!      ttl missing or out of bounds                   → 400
//!      with X-Forwarded-For (a proxy stands between)  → 403
//! GET, HEAD any path, without a good token            → 401, or, where tokens are optional
//!                                                       and none was brought, as with one
//!      with one: a document or a folder               → 200
//!      nothing of that name                           → 404
//! any other method, or a path that it does not have   → 405
//! ```

use std::time::Duration;

use model::InterfaceId;
use rpc::dataplane::Tokens;

use super::documents::Documents;
use super::token::{LIFETIME_S_MAX, LIFETIME_S_MIN, TokenKey};

const TOKEN_PATH: &str = "/latest/api/token";

/// A request whose head was read whole. Header names are compared without case.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    pub method: &'a str,
    /// Decoded, and without query.
    pub path: &'a str,
    pub headers: &'a [(&'a str, &'a [u8])],
}

impl<'a> Request<'a> {
    /// The only value of a header; `None` where it is missing or stands twice.
    fn header(&self, name: &str) -> Option<&'a [u8]> {
        let mut values = self.headers.iter().filter(|(n, _)| n.eq_ignore_ascii_case(name));
        values.next().filter(|_| values.next().is_none()).map(|(_, value)| *value)
    }

    fn has(&self, name: &str) -> bool {
        self.headers.iter().any(|(n, _)| n.eq_ignore_ascii_case(name))
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Response {
    pub status: Status,
    pub body: Vec<u8>,
    /// `X-Aws-Ec2-Metadata-Token-Ttl-Seconds`: what is left of the token.
    pub token_lifetime_s: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Status {
    Ok,
    BadRequest,
    Unauthorized,
    Forbidden,
    NotFound,
    /// With what the path does allow.
    MethodNotAllowed(&'static str),
    RequestTimeout,
    ContentTooLarge,
    UriTooLong,
    HeaderFieldsTooLarge,
    NotImplemented,
    VersionNotSupported,
}

impl Status {
    pub const fn line(self) -> &'static str {
        match self {
            Self::Ok => "200 OK",
            Self::BadRequest => "400 Bad Request",
            Self::Unauthorized => "401 Unauthorized",
            Self::Forbidden => "403 Forbidden",
            Self::NotFound => "404 Not Found",
            Self::MethodNotAllowed(_) => "405 Method Not Allowed",
            Self::RequestTimeout => "408 Request Timeout",
            Self::ContentTooLarge => "413 Content Too Large",
            Self::UriTooLong => "414 URI Too Long",
            Self::HeaderFieldsTooLarge => "431 Request Header Fields Too Large",
            Self::NotImplemented => "501 Not Implemented",
            Self::VersionNotSupported => "505 HTTP Version Not Supported",
        }
    }
}

impl Response {
    pub fn plain(status: Status) -> Self {
        let body = if status == Status::Ok { Vec::new() } else { status.line().into() };
        Self { status, body, token_lifetime_s: None }
    }
}

/// The service of one interface.
pub struct Service {
    interface: InterfaceId,
    documents: Documents,
    key: TokenKey,
    nonce: u128,
    tokens: Tokens,
}

impl Service {
    /// `nonce` is random; each token takes the next one.
    pub fn new(interface: InterfaceId, documents: Documents, key: TokenKey, nonce: u128) -> Self {
        Self { interface, documents, key, nonce, tokens: Tokens::Required }
    }

    /// New documents; tokens and connections stay good.
    pub fn replace(&mut self, documents: Documents, tokens: Tokens) {
        self.documents = documents;
        self.tokens = tokens;
    }

    pub fn answer(&mut self, request: &Request<'_>, now: Duration) -> Response {
        match (request.method, request.path) {
            ("PUT", TOKEN_PATH) => self.give_token(request, now),
            (_, TOKEN_PATH) => Response::plain(Status::MethodNotAllowed("PUT")),
            ("GET" | "HEAD", path) => self.read(request, path, now),
            _ => Response::plain(Status::MethodNotAllowed("GET, HEAD")),
        }
    }

    fn give_token(&mut self, request: &Request<'_>, now: Duration) -> Response {
        if request.has("x-forwarded-for") {
            return Response::plain(Status::Forbidden);
        }
        let lifetime_s = request
            .header("x-aws-ec2-metadata-token-ttl-seconds")
            .and_then(decimal)
            .filter(|s| (LIFETIME_S_MIN..=LIFETIME_S_MAX).contains(s));
        let Some(lifetime_s) = lifetime_s else {
            return Response::plain(Status::BadRequest);
        };
        self.nonce = self.nonce.wrapping_add(1);
        let token = self.key.seal(self.interface, lifetime_s, self.nonce, now);
        Response {
            status: Status::Ok,
            body: token.into_bytes(),
            token_lifetime_s: Some(lifetime_s.into()),
        }
    }

    fn read(&self, request: &Request<'_>, path: &str, now: Duration) -> Response {
        const TOKEN: &str = "x-aws-ec2-metadata-token";
        let left_s =
            request.header(TOKEN).and_then(|token| self.key.open(self.interface, token, now));
        // Who brings a token is held to it, wanted or not.
        let without = self.tokens == Tokens::Optional && !request.has(TOKEN);
        if left_s.is_none() && !without {
            return Response::plain(Status::Unauthorized);
        }
        match self.documents.find(path) {
            Some(body) => Response { status: Status::Ok, body, token_lifetime_s: left_s },
            None => Response::plain(Status::NotFound),
        }
    }
}

/// Digits and nothing else: no sign, no blank within, no overflow.
pub fn decimal(text: &[u8]) -> Option<u32> {
    let text = text.trim_ascii();
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(77);
    const TTL: &str = "X-aws-ec2-metadata-token-ttl-seconds";

    fn service(interface: u128) -> Service {
        let map = [("meta-data/instance-id".to_owned(), format!("i-{interface}"))].into();
        Service::new(
            InterfaceId::from_random(interface),
            Documents::parse(&map).unwrap(),
            TokenKey::new([1; 32]),
            0,
        )
    }

    fn ask(service: &mut Service, method: &str, path: &str, headers: &[(&str, &[u8])]) -> Response {
        service.answer(&Request { method, path, headers }, NOW)
    }

    #[test]
    fn a_token_opens_the_documents_of_the_interface_that_asked() {
        let (mut one, mut two) = (service(1), service(2));
        let token = ask(&mut one, "PUT", TOKEN_PATH, &[(TTL, b"60")]);
        assert_eq!((token.status, token.token_lifetime_s), (Status::Ok, Some(60)));
        let with = [("x-aws-ec2-metadata-token", token.body.as_slice())];
        let path = "/latest/meta-data/instance-id";
        assert_eq!(ask(&mut one, "GET", path, &with).body, b"i-1");
        assert_eq!(ask(&mut two, "GET", path, &with).status, Status::Unauthorized);
        assert_eq!(ask(&mut one, "GET", path, &[]).status, Status::Unauthorized);
        assert_eq!(ask(&mut one, "GET", "/latest/none", &with).status, Status::NotFound);
        assert_eq!(
            ask(&mut one, "POST", path, &with).status,
            Status::MethodNotAllowed("GET, HEAD")
        );
        assert_eq!(ask(&mut one, "GET", TOKEN_PATH, &with).status, Status::MethodNotAllowed("PUT"));
        let twice = [with[0], with[0]];
        assert_eq!(ask(&mut one, "GET", path, &twice).status, Status::Unauthorized);
    }

    #[test]
    fn a_lifetime_outside_its_bounds_is_refused() {
        let mut service = service(1);
        for bad in ["0", "21601", "-1", "+5", "1.5", "x", "", "99999999999", "6 0"] {
            let answer = ask(&mut service, "PUT", TOKEN_PATH, &[(TTL, bad.as_bytes())]);
            assert_eq!(answer.status, Status::BadRequest, "{bad}");
        }
        for good in ["1", "21600", " 60 "] {
            let answer = ask(&mut service, "PUT", TOKEN_PATH, &[(TTL, good.as_bytes())]);
            assert_eq!(answer.status, Status::Ok, "{good}");
        }
        assert_eq!(ask(&mut service, "PUT", TOKEN_PATH, &[]).status, Status::BadRequest);
    }

    #[test]
    fn where_tokens_are_optional_only_a_wrong_one_is_refused() {
        let mut service = service(1);
        let documents = service.documents.clone();
        service.replace(documents.clone(), Tokens::Optional);
        let path = "/latest/meta-data/instance-id";
        let plain = ask(&mut service, "GET", path, &[]);
        assert_eq!((plain.status, plain.token_lifetime_s), (Status::Ok, None));
        let forged: [(&str, &[u8]); 1] = [("X-aws-ec2-metadata-token", b"forged")];
        assert_eq!(ask(&mut service, "GET", path, &forged).status, Status::Unauthorized);
        service.replace(documents, Tokens::Required);
        assert_eq!(ask(&mut service, "GET", path, &[]).status, Status::Unauthorized);
    }

    #[test]
    fn a_proxy_gets_no_token() {
        let headers: [(&str, &[u8]); 2] = [(TTL, b"60"), ("x-forwarded-FOR", b"10.0.0.9")];
        assert_eq!(ask(&mut service(1), "PUT", TOKEN_PATH, &headers).status, Status::Forbidden);
    }
}
