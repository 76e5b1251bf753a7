//! The control socket: `rpc::block`, answered by the [`Depot`].

use std::path::Path;
use std::sync::Arc;

use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path as UrlPath, State};
use axum::routing::{get, put};
use axum::{Json, Router};
use model::VolumeId;
use rpc::Error;
use rpc::block::{Export, NewExport, NewVolume, Status, Volume};
use rpc::server::{ControlListener, Peer};

use crate::depot::Depot;

type Answer<T> = Result<Json<T>, Error>;

/// A body or a path that cannot be read gets our own error.
fn read<T>(body: Result<Json<T>, JsonRejection>) -> Result<T, Error> {
    body.map(|Json(value)| value).map_err(|e| Error::refused(e.body_text()))
}

fn named<T>(path: Result<UrlPath<T>, PathRejection>) -> Result<T, Error> {
    path.map(|UrlPath(value)| value).map_err(|e| Error::refused(e.body_text()))
}

pub fn router(depot: Arc<Depot>) -> Router {
    Router::new()
        .route("/metrics", get(metrics))
        .route("/v1/status", get(status))
        .route("/v1/volumes", get(volumes))
        .route("/v1/volumes/{id}", put(put_volume).delete(delete_volume))
        .route("/v1/exports", get(exports))
        .route("/v1/exports/{name}", put(put_export).delete(delete_export))
        .fallback(async || Error::not_found("there is no such call"))
        .with_state(depot)
}

/// Listens at `path`; the returned future serves.
pub fn listen(
    path: &Path,
    router: Router,
) -> std::io::Result<impl Future<Output = std::io::Result<()>> + use<>> {
    let listener = ControlListener::bind(path)?;
    let service = router.into_make_service_with_connect_info::<Peer>();
    Ok(async move { axum::serve(listener, service).await })
}

async fn status(State(depot): State<Arc<Depot>>) -> Answer<Status> {
    Ok(Json(depot.status().await))
}

async fn metrics(State(depot): State<Arc<Depot>>) -> String {
    depot.metrics().await
}

async fn volumes(State(depot): State<Arc<Depot>>) -> Answer<Vec<Volume>> {
    Ok(Json(depot.volumes().await))
}

async fn put_volume(
    State(depot): State<Arc<Depot>>,
    id: Result<UrlPath<VolumeId>, PathRejection>,
    new: Result<Json<NewVolume>, JsonRejection>,
) -> Answer<Volume> {
    depot.put_volume(named(id)?, read(new)?).await.map(Json)
}

async fn delete_volume(
    State(depot): State<Arc<Depot>>,
    id: Result<UrlPath<VolumeId>, PathRejection>,
) -> Answer<()> {
    depot.delete_volume(named(id)?).await.map(Json)
}

async fn exports(State(depot): State<Arc<Depot>>) -> Answer<Vec<Export>> {
    Ok(Json(depot.exports().await))
}

async fn put_export(
    State(depot): State<Arc<Depot>>,
    name: Result<UrlPath<String>, PathRejection>,
    new: Result<Json<NewExport>, JsonRejection>,
) -> Answer<Export> {
    depot.put_export(&named(name)?, read(new)?).await.map(Json)
}

async fn delete_export(
    State(depot): State<Arc<Depot>>,
    name: Result<UrlPath<String>, PathRejection>,
) -> Answer<()> {
    depot.delete_export(&named(name)?).await.map(Json)
}
