//! Asks a daemon over its control socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::error::Error;

/// How long a call may take unless the caller names another bound.
pub const CALL_TIMEOUT: Duration = Duration::from_secs(30);

/// A daemon at the other end of a unix socket. Cheap to make and to clone: each
/// call opens a connection of its own, so a restarted daemon is met at once.
#[derive(Debug, Clone)]
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
}

impl Client {
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), timeout: CALL_TIMEOUT }
    }

    /// The same daemon, asked with more or less patience.
    pub fn with_timeout(&self, timeout: Duration) -> Self {
        Self { socket: self.socket.clone(), timeout }
    }

    pub fn timeout(&self) -> Duration {
        self.timeout
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }

    pub async fn get<A: DeserializeOwned>(&self, path: &str) -> Result<A, Error> {
        self.call(Method::GET, path, &()).await
    }

    pub async fn put<Q: Serialize, A: DeserializeOwned>(
        &self,
        path: &str,
        body: &Q,
    ) -> Result<A, Error> {
        self.call(Method::PUT, path, body).await
    }

    pub async fn post<Q: Serialize, A: DeserializeOwned>(
        &self,
        path: &str,
        body: &Q,
    ) -> Result<A, Error> {
        self.call(Method::POST, path, body).await
    }

    pub async fn delete<A: DeserializeOwned>(&self, path: &str) -> Result<A, Error> {
        self.call(Method::DELETE, path, &()).await
    }

    async fn call<Q: Serialize, A: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &Q,
    ) -> Result<A, Error> {
        let body = serde_json::to_vec(body).map_err(|e| {
            Error::refused(format!("{method} {path}: cannot write the request: {e}"))
        })?;
        let request = Request::builder()
            .method(method.clone())
            .uri(path)
            .header(http::header::HOST, "localhost")
            .header(http::header::CONTENT_TYPE, "application/json")
            .body(Full::new(Bytes::from(body)))
            .map_err(|e| Error::refused(format!("{method} {path}: {e}")))?;
        let (status, answer) = self.send(request).await?;
        if status.is_success() {
            return serde_json::from_slice(&answer).map_err(|e| {
                self.unavailable(format_args!("{method} {path}: cannot read the answer: {e}"))
            });
        }
        Err(serde_json::from_slice(&answer).unwrap_or_else(|_| {
            let text = String::from_utf8_lossy(&answer);
            self.unavailable(format_args!("{method} {path}: {status}: {}", text.trim()))
        }))
    }

    /// Sends any HTTP request; for those whose body is not JSON.
    pub async fn send(&self, request: Request<Full<Bytes>>) -> Result<(StatusCode, Bytes), Error> {
        let exchange = async {
            let stream = UnixStream::connect(&self.socket).await.map_err(|e| {
                self.unavailable(format_args!(
                    "cannot connect: {e}; is the daemon running? (`netctl status`)"
                ))
            })?;
            let (mut sender, connection) =
                hyper::client::conn::http1::handshake(TokioIo::new(stream))
                    .await
                    .map_err(|e| self.unavailable(format_args!("{e}")))?;
            let connection = tokio::spawn(connection);
            let answer = async {
                let response = sender.send_request(request).await?;
                let status = response.status();
                Ok::<_, hyper::Error>((status, response.into_body().collect().await?.to_bytes()))
            }
            .await
            .map_err(|e| self.unavailable(format_args!("{e}")));
            connection.abort();
            answer
        };
        tokio::time::timeout(self.timeout, exchange).await.map_err(|_| {
            self.unavailable(format_args!("no answer within {} s", self.timeout.as_secs()))
        })?
    }

    /// Asks for a stream and gives `each` its lines until that answers false or the
    /// stream ends. Only its beginning must come in time.
    pub async fn lines(
        &self,
        path: &str,
        mut each: impl FnMut(&[u8]) -> bool,
    ) -> Result<(), Error> {
        let broken = |e: hyper::Error| self.unavailable(format_args!("GET {path}: {e}"));
        let request = Request::get(path)
            .header(http::header::HOST, "localhost")
            .body(Full::new(Bytes::new()))
            .map_err(|e| Error::refused(format!("GET {path}: {e}")))?;
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|e| self.unavailable(format_args!("cannot connect: {e}")))?;
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.map_err(broken)?;
        let connection = tokio::spawn(connection);
        let answer = tokio::time::timeout(self.timeout, sender.send_request(request));
        let response = answer
            .await
            .map_err(|_| self.unavailable(format_args!("GET {path}: no answer")))?
            .map_err(broken)?;
        if !response.status().is_success() {
            let status = response.status();
            let text = response.into_body().collect().await.map_err(broken)?.to_bytes();
            let said = String::from_utf8_lossy(&text).into_owned();
            return Err(serde_json::from_slice(&text).unwrap_or_else(|_| {
                self.unavailable(format_args!("GET {path}: {status}: {said}"))
            }));
        }
        let mut body = response.into_body();
        let mut pending = Vec::new();
        while let Some(frame) = body.frame().await {
            pending.extend_from_slice(frame.map_err(broken)?.data_ref().unwrap_or(&Bytes::new()));
            while let Some(end) = pending.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                if !each(&line[..end]) {
                    connection.abort();
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    fn unavailable(&self, cause: std::fmt::Arguments<'_>) -> Error {
        Error::unavailable(format!("{}: {cause}", self.socket.display()))
    }
}
