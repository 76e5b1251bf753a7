//! The control socket: agents ask and tell, administrators look in, and root
//! uses the EC2 API without a signature.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path, Query, State};
use axum::routing::{any, get, put};
use axum::{Json, Router};
use http_body_util::{BodyExt, Limited};
use rpc::control::{AccessKey, HostStatus, Status};
use rpc::host::{Desired, Observed};
use serde::Deserialize;

use crate::api::ApiError;
use crate::core;
use crate::credentials::Credentials;
use crate::front::{BODY_BYTES_MAX, Front, Origin, Request, refuse};

/// The longest that a host's question stays open.
const WAIT_MAX: Duration = Duration::from_secs(60);

/// A host with ten thousand volumes reports about 2 MiB.
const REPORT_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Transactions for one report; each takes up to a hundred records.
const ROUNDS_MAX: usize = 1000;

#[derive(Clone)]
pub struct Served {
    pub front: Arc<Front>,
    pub credentials: Credentials,
}

pub fn router(served: Served) -> Router {
    Router::new()
        .route("/", any(ec2))
        .route("/admin/v1/status", get(status))
        .route("/admin/v1/access-key", get(access_key))
        .route("/host/v1/{host}/desired", get(desired))
        .route("/host/v1/{host}/observed", put(observed))
        .layer(DefaultBodyLimit::max(REPORT_BYTES_MAX))
        .with_state(served)
}

async fn ec2(State(served): State<Served>, request: http::Request<Body>) -> http::Response<Body> {
    let (parts, body) = request.into_parts();
    let body = match Limited::new(body, BODY_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(e) => return refuse(&ApiError::new("MalformedRequest", e.to_string())),
    };
    let request = Request {
        method: parts.method,
        path: parts.uri.path().to_owned(),
        query: parts.uri.query().unwrap_or_default().to_owned(),
        headers: parts.headers,
        body,
    };
    served.front.answer(Origin::ControlSocket, request).await
}

async fn status(State(served): State<Served>) -> Json<Status> {
    let region = &served.front.region;
    let now_ms = region.now_ms();
    let (revision, desired_revision, mut names) = region.read(|c| {
        let names: Vec<String> = c.state.hosts.iter().map(|h| h.name.clone()).collect();
        (c.state.revision, c.state.desired_revision, names)
    });
    if !names.contains(&region.settings.host) {
        names.push(region.settings.host.clone());
    }
    let hosts = names.into_iter().map(|host| {
        let last = region.last_report(&host);
        HostStatus {
            observed_revision: last.map(|l| l.revision),
            desired_revision,
            last_report_ms_ago: last.map(|l| now_ms.saturating_sub(l.at_ms)),
            host,
        }
    });
    Json(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        region: region.settings.region.clone(),
        zone: region.settings.zone.clone(),
        endpoint: region.settings.endpoint.clone(),
        revision,
        store: region.store_name(),
        hosts: hosts.collect(),
    })
}

async fn access_key(State(served): State<Served>) -> Json<AccessKey> {
    Json(AccessKey {
        access_key_id: served.credentials.id.clone(),
        secret_access_key: served.credentials.secret.clone(),
        region: served.front.region.settings.region.clone(),
    })
}

#[derive(Deserialize)]
struct Wait {
    #[serde(default)]
    after: u64,
    #[serde(default)]
    wait_ms: u64,
}

async fn desired(
    State(served): State<Served>,
    Path(host): Path<String>,
    Query(wait): Query<Wait>,
) -> Json<Desired> {
    let region = &served.front.region;
    let patience = Duration::from_millis(wait.wait_ms).min(WAIT_MAX);
    region.await_desired(wait.after, patience).await;
    Json(region.read(|context| core::desired(context, &host)))
}

async fn observed(
    State(served): State<Served>,
    Path(host): Path<String>,
    Json(observed): Json<Observed>,
) -> Result<Json<()>, rpc::Error> {
    let region = &served.front.region;
    let lawful = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.' || c == '_';
    if host.is_empty() || host.len() > 255 || !host.chars().all(lawful) {
        return Err(rpc::Error::refused(format!("host {host}: report: not a host's name")));
    }
    for _ in 0..ROUNDS_MAX {
        let whole = region
            .write(|context, draft| Ok(core::observe(context, &host, &observed, draft)))
            .await
            .map_err(|e| rpc::Error::unavailable(format!("host {host}: report: {e}")))?;
        if whole {
            break;
        }
    }
    region.note_report(&host, observed.revision);
    Ok(Json(()))
}
