//! The port: connections, their bounds in time, number and size.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use http_body_util::{BodyExt, LengthLimitError, Limited};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use super::{Front, Origin, Request, refuse};
use crate::api::ApiError;

/// The longest lawful request, RunInstances with user data and every list full,
/// stays below.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;

/// A client that sends slower than this holds a place that others want.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(20);
const HEADER_TIMEOUT: Duration = Duration::from_secs(20);

/// Connections at once; the next wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 512;

const HEADER_BYTES_MAX: usize = 64 * 1024;

pub async fn listen(listener: TcpListener, front: Arc<Front>) -> Infallible {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // The semaphore is never closed.
        let Ok(place) = Arc::clone(&places).acquire_owned().await else { continue };
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Out of file descriptors, most likely: wait for some to come back.
                tracing::error!(%error, "cannot accept");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let front = Arc::clone(&front);
        tokio::spawn(async move {
            let service = service_fn(|request| serve(Arc::clone(&front), request));
            let served = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(HEADER_BYTES_MAX)
                // A client that has said all it will say still waits for its answer.
                .half_close(true)
                .serve_connection(TokioIo::new(stream), service)
                .await;
            if let Err(error) = served {
                tracing::debug!(%error, "a connection ended badly");
            }
            drop(place);
        });
    }
}

async fn serve(
    front: Arc<Front>,
    request: http::Request<Incoming>,
) -> Result<http::Response<Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let read = tokio::time::timeout(BODY_TIMEOUT, Limited::new(body, BODY_BYTES_MAX).collect());
    let body = match read.await {
        Ok(Ok(body)) => body.to_bytes(),
        Ok(Err(error)) if error.is::<LengthLimitError>() => {
            let error = ApiError::new(
                "RequestEntityTooLarge",
                format!("A request has at most {BODY_BYTES_MAX} bytes."),
            );
            return Ok(refuse(&error.with_status(http::StatusCode::PAYLOAD_TOO_LARGE)));
        }
        Ok(Err(error)) => {
            return Ok(refuse(&ApiError::new(
                "MalformedRequest",
                format!("The body cannot be read: {error}"),
            )));
        }
        Err(_) => {
            let error = ApiError::new("RequestTimeout", "The body did not arrive in time.");
            return Ok(refuse(&error.with_status(http::StatusCode::REQUEST_TIMEOUT)));
        }
    };
    if parts.uri.path() != "/" {
        let error = ApiError::new("InvalidAction", "The API is served at / only.");
        return Ok(refuse(&error.with_status(http::StatusCode::NOT_FOUND)));
    }
    let request = Request {
        method: parts.method,
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers: parts.headers,
        body,
    };
    Ok(front.answer(Origin::Network, request).await)
}
