//! `dataplane.sock`: the calls of `rpc::dataplane`, handed to the applier.

use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::{Bytes, HttpBody};
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body::Frame;
use rpc::Error;
use rpc::dataplane::{
    Applied, Desired, Explained, Imported, MovedFlows, Observed, Question, RuleHits, Status,
    Verdict,
};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use tokio::sync::broadcast::error::RecvError;

use crate::apply::Handle;

/// The largest desired state: ten thousand interfaces with their documents.
const BODY_BYTES_MAX: usize = 256 * 1024 * 1024;

pub fn router(handle: Handle) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/desired", get(accepted).put(apply))
        .route("/v1/why", post(why))
        .route("/v1/why-frame", post(explain))
        .route("/v1/observe", get(observe))
        .route("/v1/rules", get(rules))
        .route("/v1/interfaces/{id}/flows", get(export).put(import))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(handle)
}

async fn status(State(handle): State<Handle>) -> Result<Json<Status>, Error> {
    Ok(Json(handle.status().await?))
}

async fn accepted(State(handle): State<Handle>) -> Result<Json<Desired>, Error> {
    Ok(Json(handle.accepted().await?))
}

async fn apply(State(handle): State<Handle>, body: Bytes) -> Result<Json<Applied>, Error> {
    Ok(Json(handle.apply(read("desired state", &body)?).await?))
}

async fn why(State(handle): State<Handle>, body: Bytes) -> Result<Json<Verdict>, Error> {
    Ok(Json(handle.why(read::<Question>("question", &body)?).await?))
}

async fn explain(State(handle): State<Handle>, body: Bytes) -> Result<Json<Explained>, Error> {
    Ok(Json(handle.explain(read("frame", &body)?).await?))
}

async fn rules(State(handle): State<Handle>) -> Result<Json<Vec<RuleHits>>, Error> {
    Ok(Json(handle.rules().await?))
}

async fn export(
    State(handle): State<Handle>,
    Path(id): Path<String>,
) -> Result<Json<MovedFlows>, Error> {
    let id = id.parse().map_err(|e| Error::refused(format!("interface: export flows: {e}")))?;
    Ok(Json(handle.export(id).await?))
}

async fn import(
    State(handle): State<Handle>,
    Path(id): Path<String>,
    body: Bytes,
) -> Result<Json<Imported>, Error> {
    let moved: MovedFlows = read("flows", &body)?;
    if moved.interface.to_string() != id {
        let said = format!("interface {id}: import flows: they are of {}", moved.interface);
        return Err(Error::refused(said));
    }
    Ok(Json(handle.import(moved).await?))
}

/// Which events a listener wants.
#[derive(Deserialize)]
struct Wish {
    #[serde(default)]
    drops: bool,
    interface: Option<model::InterfaceId>,
}

impl Wish {
    fn fits(&self, observed: &Observed) -> bool {
        match observed {
            Observed::LeftOut(_) => true,
            Observed::Seen(seen) => {
                !(self.drops && seen.allowed)
                    && self.interface.is_none_or(|id| seen.interfaces.contains(&id))
            }
        }
    }
}

async fn observe(
    State(handle): State<Handle>,
    Query(wish): Query<Wish>,
) -> Result<axum::body::Body, Error> {
    let mut events = handle.listen().await?;
    let (lines, body) = tokio::sync::mpsc::channel::<Bytes>(LINES_MAX);
    tokio::spawn(async move {
        loop {
            let observed = tokio::select! {
                observed = events.recv() => match observed {
                    Ok(observed) => observed,
                    Err(RecvError::Lagged(missed)) => Observed::LeftOut(missed),
                    Err(RecvError::Closed) => return,
                },
                // The listener has gone, and nothing happens that would tell.
                () = lines.closed() => return,
            };
            if !wish.fits(&observed) {
                continue;
            }
            let mut line = serde_json::to_vec(&observed).unwrap_or_default();
            line.push(b'\n');
            if lines.send(line.into()).await.is_err() {
                return;
            }
        }
    });
    Ok(axum::body::Body::new(Lines(body)))
}

/// Lines that a listener may be behind before events are left out for it.
const LINES_MAX: usize = 256;

/// A body of lines as they come.
struct Lines(tokio::sync::mpsc::Receiver<Bytes>);

impl HttpBody for Lines {
    type Data = Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        self.0.poll_recv(context).map(|line| line.map(|line| Ok(Frame::data(line))))
    }
}

fn read<T: DeserializeOwned>(what: &str, body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|e| Error::refused(format!("{what}: read: {e}")))
}
