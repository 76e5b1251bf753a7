//! `dataplane.sock`: the calls of `rpc::dataplane`, handed to the applier.

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::routing::{get, post};
use axum::{Json, Router};
use rpc::Error;
use rpc::dataplane::{Applied, Desired, Question, Status, Verdict};
use serde::de::DeserializeOwned;

use crate::apply::Handle;

/// The largest desired state: ten thousand interfaces with their documents.
const BODY_BYTES_MAX: usize = 256 * 1024 * 1024;

pub fn router(handle: Handle) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/desired", get(accepted).put(apply))
        .route("/v1/why", post(why))
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

fn read<T: DeserializeOwned>(what: &str, body: &[u8]) -> Result<T, Error> {
    serde_json::from_slice(body).map_err(|e| Error::refused(format!("{what}: read: {e}")))
}
