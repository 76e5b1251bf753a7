//! The control socket: `rpc::block`, answered by the [`Depot`].

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path as UrlPath, State};
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use axum::routing::{delete, get, put};
use axum::{Json, Router};
use model::VolumeId;
use rpc::Error;
use rpc::block::{
    Connection, Export, NewExport, NewSize, NewVolume, Quality, Quiesce, SlowLog, Status, Volume,
    VolumeStatistics,
};
use rpc::server::{ControlListener, Peer};

use crate::depot::Depot;
use crate::exposition::METRICS_TYPE;

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
        .route("/v1/volumes/{id}/quality", put(set_quality))
        .route("/v1/volumes/{id}/size", put(resize))
        .route("/v1/volumes/{id}/quiesced", put(quiesce).delete(resume))
        .route("/v1/exports/{name}/drained", put(drain).delete(undrain))
        .route("/v1/connections", get(connections))
        .route("/v1/connections/{id}", delete(disconnect))
        .route("/v1/statistics", get(statistics))
        .route("/v1/slow-log", put(slow_log))
        .route("/v1/exports", get(exports))
        .route("/v1/exports/{name}", put(put_export).delete(delete_export))
        .fallback(async || Error::not_found("there is no such call"))
        .with_state(depot)
}

/// Serves at a socket that listens at `path`; the returned future does it.
pub fn listen(
    socket: OwnedFd,
    path: &Path,
    router: Router,
) -> std::io::Result<impl Future<Output = std::io::Result<()>> + use<>> {
    let listener = ControlListener::adopt(socket, path)?;
    let service = router.into_make_service_with_connect_info::<Peer>();
    Ok(async move { axum::serve(listener, service).await })
}

async fn status(State(depot): State<Arc<Depot>>) -> Answer<Status> {
    Ok(Json(depot.status().await))
}

async fn metrics(State(depot): State<Arc<Depot>>) -> impl IntoResponse {
    ([(CONTENT_TYPE, METRICS_TYPE)], depot.metrics().await)
}

async fn set_quality(
    State(depot): State<Arc<Depot>>,
    id: Result<UrlPath<VolumeId>, PathRejection>,
    quality: Result<Json<Quality>, JsonRejection>,
) -> Answer<Volume> {
    depot.set_quality(named(id)?, read(quality)?).await.map(Json)
}

async fn resize(
    State(depot): State<Arc<Depot>>,
    id: Result<UrlPath<VolumeId>, PathRejection>,
    size: Result<Json<NewSize>, JsonRejection>,
) -> Answer<Volume> {
    depot.resize(named(id)?, read(size)?).await.map(Json)
}

async fn quiesce(
    State(depot): State<Arc<Depot>>,
    id: Result<UrlPath<VolumeId>, PathRejection>,
    quiesce: Result<Json<Quiesce>, JsonRejection>,
) -> Answer<()> {
    depot.quiesce(named(id)?, read(quiesce)?).await.map(Json)
}

async fn resume(
    State(depot): State<Arc<Depot>>,
    id: Result<UrlPath<VolumeId>, PathRejection>,
) -> Answer<()> {
    depot.resume(named(id)?).await.map(Json)
}

async fn drain(
    State(depot): State<Arc<Depot>>,
    name: Result<UrlPath<String>, PathRejection>,
) -> Answer<()> {
    depot.drain(&named(name)?, true).await.map(Json)
}

async fn undrain(
    State(depot): State<Arc<Depot>>,
    name: Result<UrlPath<String>, PathRejection>,
) -> Answer<()> {
    depot.drain(&named(name)?, false).await.map(Json)
}

async fn connections(State(depot): State<Arc<Depot>>) -> Answer<Vec<Connection>> {
    depot.connections().await.map(Json)
}

async fn disconnect(
    State(depot): State<Arc<Depot>>,
    id: Result<UrlPath<u64>, PathRejection>,
) -> Answer<()> {
    depot.disconnect(named(id)?).map(Json)
}

async fn statistics(State(depot): State<Arc<Depot>>) -> Answer<Vec<VolumeStatistics>> {
    Ok(Json(depot.statistics().await))
}

async fn slow_log(slow: Result<Json<SlowLog>, JsonRejection>) -> Answer<()> {
    let ms = read(slow)?.threshold_ms;
    crate::worker::set_slow_log((ms > 0).then(|| Duration::from_millis(ms)));
    Ok(Json(()))
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
