//! Metrics of a stand-alone server, for Prometheus: `GET /metrics`, nothing else.

use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use axum::Router;
use axum::http::header::CONTENT_TYPE;
use axum::routing::get;

use crate::metrics::{self, Counters};
use crate::socket;

/// The text format's own type (Prometheus, "Exposition formats").
pub const METRICS_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// Where metrics are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    Tcp(SocketAddr),
    /// For root and our own user.
    Unix(PathBuf),
}

impl std::str::FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(address) => Ok(Self::Tcp(address)),
            Err(_) if text.contains('/') => Ok(Self::Unix(text.into())),
            Err(_) => Err("write ADDRESS:PORT or a socket's PATH with a `/`".to_owned()),
        }
    }
}

impl Place {
    pub fn bind(&self) -> anyhow::Result<OwnedFd> {
        match self {
            Self::Tcp(address) => Ok(std::net::TcpListener::bind(address)
                .with_context(|| format!("metrics: cannot bind {address}"))?
                .into()),
            Self::Unix(path) => Ok(socket::listen(path, &[])?),
        }
    }
}

/// Serves on a socket that was bound for that place.
pub async fn serve(
    place: Place,
    listener: OwnedFd,
    volumes: Vec<(String, Arc<Counters>)>,
) -> std::io::Result<()> {
    let text = move || {
        let text = metrics::text(volumes.iter().map(|(name, c)| (name.clone(), &**c)));
        std::future::ready(([(CONTENT_TYPE, METRICS_TYPE)], text))
    };
    let router = Router::new().route("/metrics", get(text));
    rustix::io::ioctl_fionbio(&listener, true)?;
    match place {
        Place::Tcp(_) => {
            axum::serve(tokio::net::TcpListener::from_std(listener.into())?, router).await
        }
        Place::Unix(_) => {
            axum::serve(tokio::net::UnixListener::from_std(listener.into())?, router).await
        }
    }
}
