//! The EC2 Query API over HTTP: from a request's bytes to an answer's.
//!
//! Order of checks: signature, rate, action, parameters, existence, DryRun,
//! state. Nothing is changed before all of them have passed.

mod guard;
mod listen;

use std::sync::Arc;

use axum::body::Body;
use bytes::Bytes;
use http::{HeaderMap, Method, StatusCode, header};
use rand_chacha::rand_core::RngCore;

use crate::api::{ApiError, Params, Struct, answer_matches, error_document, read_params};
use crate::auth::{self, Head, KeyMaterial, Signature};
use crate::core::{self, Action, Deed};
use crate::query::{Tree, grow, parse_form};
use crate::region::{Region, entropy};

pub use guard::{BURST, Guard};
pub use listen::{BODY_BYTES_MAX, BODY_TIMEOUT, listen};

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// Anyone who can reach the port: must have signed.
    Network,
    /// A connection on the control socket: the kernel vouches for root.
    ControlSocket,
}

/// What knows the secrets of the access keys.
pub trait Secrets: Send + Sync {
    fn secret(&self, access_key: &str) -> Option<String>;
}

pub struct Front {
    pub region: Arc<Region>,
    pub agent: rpc::Client,
    pub secrets: Arc<dyn Secrets>,
    pub guard: Guard,
}

/// A request whose body was read.
pub struct Request {
    pub method: Method,
    pub path: String,
    pub query: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Front {
    /// Never fails: what goes wrong is an answer too.
    pub async fn answer(&self, origin: Origin, request: Request) -> http::Response<Body> {
        let id = request_id();
        match self.perform(origin, request).await {
            Ok((action, answer)) => xml(StatusCode::OK, answer.document(action, &id)),
            Err(error) => {
                tracing::info!(request = id, code = %error.code, message = error.message, "refused");
                refusal(&error, &id)
            }
        }
    }

    async fn perform(
        &self,
        origin: Origin,
        request: Request,
    ) -> Result<(&'static str, Struct), ApiError> {
        if request.method != Method::POST && request.method != Method::GET {
            return Err(ApiError::new("InvalidAction", "Use POST or GET.")
                .with_status(StatusCode::METHOD_NOT_ALLOWED));
        }
        let signature = match origin {
            Origin::Network => Some(self.authenticate(&request)?),
            Origin::ControlSocket => None,
        };
        if let Some(signature) = &signature {
            self.guard.admit(&signature.access_key, self.region.now_ms())?;
        }
        let mut pairs = parse_form(request.query.as_bytes())?;
        if request.method == Method::POST {
            pairs.extend(parse_form(&request.body)?);
        }
        let tree = grow(pairs)?;
        let name = match tree.get("Action") {
            Some(Tree::Leaf(name)) => name.clone(),
            _ => {
                return Err(ApiError::new(
                    "MissingAction",
                    "The request must contain the parameter Action",
                ));
            }
        };
        let action = Action::find(&name).ok_or_else(|| {
            let name: String = name.chars().take(100).collect();
            ApiError::new(
                "InvalidAction",
                format!("The action {name} is not valid for this web service."),
            )
        })?;
        let params = read_params(action.name, tree)?;
        let others = params.names().find(|n| *n != "DryRun" && !action.params.contains(n));
        if let Some(other) = others {
            return Err(ApiError::new(
                "UnsupportedOperation",
                format!("The parameter {other} of {} is not supported.", action.name),
            ));
        }
        if let Some(signature) = signature.filter(|_| !action.reads()) {
            self.guard.fresh(&signature.digest, signature.ends_ms, self.region.now_ms())?;
        }
        let answer = self.run(action, &params).await?;
        if cfg!(debug_assertions)
            && let Err(what) = answer_matches(action.name, &answer)
        {
            tracing::error!(what, "an answer does not match the model");
            return Err(ApiError::internal(format!("the answer does not match the model: {what}")));
        }
        Ok((action.name, answer))
    }

    fn authenticate(&self, request: &Request) -> Result<Signature, ApiError> {
        let head = Head {
            method: request.method.as_str(),
            path: &request.path,
            query: &request.query,
            headers: &request.headers,
        };
        let region = &self.region;
        auth::verify(head, &request.body, &region.settings.region, region.now_ms(), |id| {
            let public_key =
                region.read(|c| c.state.access_keys.get(id).map(|k| k.public_key.clone()))?;
            Some(KeyMaterial { secret: self.secrets.secret(id), public_key })
        })
    }

    async fn run(&self, action: &'static Action, params: &Params) -> Result<Struct, ApiError> {
        let dry = params.flag("DryRun") == Some(true);
        match &action.deed {
            Deed::Read(read) => {
                let answer = self.region.read(|context| read(context, params))?;
                if dry { Err(ApiError::dry_run()) } else { Ok(answer) }
            }
            Deed::Write(write) => {
                let mut material = self.key_material(action, params).await?;
                let answer = self
                    .region
                    .write(|context, draft| {
                        draft.key_material = material.take();
                        let answer = write(context, params, draft)?;
                        if dry { Err(ApiError::dry_run()) } else { Ok(answer) }
                    })
                    .await?;
                tracing::info!(action = action.name, "done");
                Ok(self.region.read(|context| answer(context)))
            }
            Deed::Console => {
                let instance = self.region.read(|context| core::console_of(context, params))?;
                if dry {
                    return Err(ApiError::dry_run());
                }
                let console = match self.agent.console(instance).await {
                    Ok(console) => Some(console),
                    Err(e) if e.kind == rpc::Kind::NotFound => None,
                    Err(e) => {
                        tracing::warn!(%instance, error = %e, "the agent gave no console");
                        return Err(ApiError::unavailable(
                            "The instance's host does not answer; try again.",
                        ));
                    }
                };
                Ok(core::console_answer(instance, console, self.region.now_ms()))
            }
        }
    }

    /// Made on a thread of its own, as it takes long; not at all where the name
    /// is taken already.
    async fn key_material(
        &self,
        action: &Action,
        params: &Params,
    ) -> Result<Option<core::KeyMaterial>, ApiError> {
        if action.name != "CreateKeyPair" {
            return Ok(None);
        }
        let row = format!("key-pair/{}", params.text("KeyName").unwrap_or_default());
        if self.region.read(|c| c.state.names.get(&row).is_some()) {
            return Ok(None);
        }
        let kind = params.text("KeyType").unwrap_or("rsa").to_owned();
        let mut rng = entropy().map_err(|e| ApiError::internal(e.to_string()))?;
        let made = tokio::task::spawn_blocking(move || core::generate_key(&kind, &mut rng)).await;
        match made {
            Ok(Ok(material)) => Ok(Some(material)),
            Ok(Err(error)) => Err(ApiError::internal(error.to_string())),
            Err(error) => Err(ApiError::internal(format!("key pair: its thread ended: {error}"))),
        }
    }
}

/// Random: it identifies, it says nothing.
fn request_id() -> String {
    let Ok(mut rng) = entropy() else { return "00000000-0000-0000-0000-000000000000".to_owned() };
    let (a, b) = (rng.next_u64(), rng.next_u64());
    format!(
        "{:08x}-{:04x}-4{:03x}-{:04x}-{:012x}",
        a >> 32,
        a >> 16 & 0xffff,
        a & 0xfff,
        b >> 48 & 0x3fff | 0x8000,
        b & 0xffff_ffff_ffff
    )
}

pub fn refusal(error: &ApiError, id: &str) -> http::Response<Body> {
    xml(error.status, error_document(&error.code, &error.message, id))
}

pub fn refuse(error: &ApiError) -> http::Response<Body> {
    refusal(error, &request_id())
}

fn xml(status: StatusCode, text: String) -> http::Response<Body> {
    let mut response = http::Response::new(Body::from(text));
    *response.status_mut() = status;
    let kind = header::HeaderValue::from_static("text/xml;charset=UTF-8");
    response.headers_mut().insert(header::CONTENT_TYPE, kind);
    response
}
