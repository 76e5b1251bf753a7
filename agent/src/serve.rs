//! The agent's control socket (`rpc::agent`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, State};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use base64::Engine;
use model::InstanceId;
use rpc::agent::{BuildImage, Console, Image, ImportImage, Status};
use rpc::{Deployment, Error};
use tokio::sync::watch;

use crate::host::{Desk, Message};
use crate::image::{self, Store};
use crate::qemu::{Places, console};

/// How long a caller with a new image waits for control to hear of it. Where
/// control is away it has its image all the same, and control hears of it later.
const KNOWN_PATIENCE: Duration = Duration::from_secs(4);

pub struct Reception {
    pub deployment: Deployment,
    pub images: Store,
    /// Where packages are kept between builds.
    pub packages: PathBuf,
    pub desk: Desk,
    /// The images that control has heard of.
    pub known: watch::Receiver<Vec<Image>>,
}

impl Reception {
    /// Returns when control knows the image: who asked for it registers it next.
    async fn made_known(&self, image: &Image) {
        self.desk.tell(Message::ImagesChanged).await;
        let mut known = self.known.clone();
        let heard = known.wait_for(|images| images.contains(image));
        if !matches!(tokio::time::timeout(KNOWN_PATIENCE, heard).await, Ok(Ok(_))) {
            tracing::warn!(image = image.name, "control has not heard of it yet");
        }
    }
}

type Shared = State<Arc<Reception>>;

pub fn router(reception: Reception) -> Router {
    Router::new()
        .route("/v1/status", get(status))
        .route("/v1/instances/{id}/console", get(read_console))
        .route("/v1/images", get(list_images))
        .route("/v1/images/build", post(build_image))
        .route("/v1/images/import", post(import_image))
        .route("/v1/images/{name}", delete(delete_image))
        .with_state(Arc::new(reception))
}

async fn status(State(reception): Shared) -> Result<Json<Status>, Error> {
    let status = reception.desk.status().await;
    status.map(Json).ok_or_else(|| Error::unavailable("agent: it is ending"))
}

async fn read_console(
    State(reception): Shared,
    Path(id): Path<String>,
) -> Result<Json<Console>, Error> {
    let id: InstanceId =
        id.parse().map_err(|e: model::MalformedId| Error::refused(e.to_string()))?;
    let places = Places::of(&reception.deployment, id);
    if !places.state.is_dir() {
        return Err(Error::not_found(format!(
            "instance {id}: read its console: it is not on this host"
        )));
    }
    let path = places.console();
    blocking(move || {
        let output = console::read(&path)
            .map_err(|e| Error::unavailable(format!("instance {id}: read its console: {e}")))?;
        let changed = std::fs::metadata(&path).and_then(|m| m.modified()).ok();
        let since_epoch = changed.and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok());
        Ok(Console {
            output_base64: base64::engine::general_purpose::STANDARD.encode(output),
            changed_at_s: since_epoch.map_or(0, |d| d.as_secs()),
        })
    })
    .await
}

async fn list_images(State(reception): Shared) -> Result<Json<Vec<Image>>, Error> {
    blocking(move || Ok(reception.images.list()?.into_iter().map(Into::into).collect())).await
}

async fn build_image(
    State(reception): Shared,
    Json(build): Json<BuildImage>,
) -> Result<Json<Image>, Error> {
    if build.recipe != "tiny" {
        return Err(Error::refused(format!(
            "image {}: build: there is no recipe `{}`; there is `tiny`",
            build.name, build.recipe
        )));
    }
    let at_work = Arc::clone(&reception);
    let made = blocking(move || {
        Ok(image::build_tiny(&at_work.images, &build.name, &at_work.packages)?.into())
    })
    .await?;
    reception.made_known(&made).await;
    Ok(made)
}

async fn import_image(
    State(reception): Shared,
    Json(import): Json<ImportImage>,
) -> Result<Json<Image>, Error> {
    let at_work = Arc::clone(&reception);
    let made =
        blocking(move || Ok(image::import(&at_work.images, &import.file, &import.name)?.into()))
            .await?;
    reception.made_known(&made).await;
    Ok(made)
}

async fn delete_image(
    State(reception): Shared,
    Path(name): Path<String>,
) -> Result<Json<()>, Error> {
    let desk = reception.desk.clone();
    let gone = blocking(move || Ok(reception.images.delete(&name)?)).await?;
    desk.tell(Message::ImagesChanged).await;
    Ok(gone)
}

/// Files and programs are waited for away from the event loop.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<Json<T>, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map(Json),
        Err(e) => Err(Error::unavailable(format!("agent: the work was broken off: {e}"))),
    }
}
