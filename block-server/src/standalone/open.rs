//! All that `serve` opens before anybody is served: files and their locks, sockets,
//! certificates. What can fail for what the user wrote fails here.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};

use crate::backing::{self, Backing};
use crate::handover::Sockets;
use crate::holding::Held;
use crate::plan::{ACTIVATED, Export, Listen, Place, Plan};
use crate::worker::{Access, Front};
use crate::{socket, tls};

/// How long `--check` waits for who has just ended.
const CHECK_MAX: Duration = Duration::from_millis(200);

/// The name of the socket that metrics are asked at.
pub(super) const METRICS: &str = "metrics";

/// The name of the socket that successors ask at.
pub(super) const UPGRADES: &str = "take-over";

/// All that can fail for what the user wrote, before anybody is served.
pub struct Opened {
    pub exports: Vec<(Export, Backing)>,
    pub held: Held,
    /// Of block devices, by the name that a successor gets them by.
    pub claims: BTreeMap<String, OwnedFd>,
    pub listeners: Vec<Listener>,
    /// Where another server may ask for all this.
    pub upgrades: Option<OwnedFd>,
    pub metrics: Option<OwnedFd>,
}

pub struct Listener {
    /// What a successor knows it by.
    pub name: String,
    pub front: Front,
    pub access: Access,
    pub socket: OwnedFd,
}

/// `old`: sockets that a predecessor hands on.
pub fn open(
    plan: &Plan,
    take_over: Option<&Path>,
    activated: Vec<OwnedFd>,
    old: &mut Sockets,
) -> anyhow::Result<Opened> {
    let tls = load_tls(plan)?;
    let claims = claim_devices(plan, old)?;
    let (held, exports) = Held::open(&plan.exports, old, backing::FREED_WITHIN)?;
    let mut listeners = Vec::new();
    for listen in &plan.listeners {
        let access = access(listen, tls.as_ref());
        for (name, socket) in sockets_of(&listen.place, &activated, old)? {
            let front = listen.place.front();
            listeners.push(Listener { name, front, access: access.clone(), socket });
        }
    }
    let upgrades = match (old.listening.remove(UPGRADES), take_over) {
        (Some(socket), Some(_)) => Some(socket),
        (_, Some(path)) => Some(socket::listen(path, &[])?),
        (_, None) => None,
    };
    let metrics = match (&plan.metrics, old.listening.remove(METRICS)) {
        (Some(_), Some(socket)) => Some(socket),
        (Some(place), None) => Some(place.bind()?),
        (None, _) => None,
    };
    Ok(Opened { exports, held, claims, listeners, upgrades, metrics })
}

/// The sockets of one place, taken over, passed on or bound.
fn sockets_of(
    place: &Place,
    activated: &[OwnedFd],
    old: &mut Sockets,
) -> anyhow::Result<Vec<(String, OwnedFd)>> {
    let name = place.to_string();
    if let Some(socket) = old.listening.remove(&name) {
        if let Place::Unix(path, users) | Place::VhostUser(path, users) = place {
            socket::set_users(path, users)?;
        }
        return Ok(vec![(name, socket)]);
    }
    let bound = match place {
        Place::Unix(path, users) | Place::VhostUser(path, users) => socket::listen(path, users)?,
        Place::Tcp(address) => {
            socket::bind(*address).with_context(|| format!("cannot bind {address}"))?.into()
        }
        Place::Activated(_) => return passed_on(activated, old),
    };
    Ok(vec![(name, bound)])
}

fn passed_on(activated: &[OwnedFd], old: &mut Sockets) -> anyhow::Result<Vec<(String, OwnedFd)>> {
    let name = |index: usize| format!("{ACTIVATED} {index}");
    let mut found = Vec::new();
    while let Some(socket) = old.listening.remove(&name(found.len())) {
        found.push((name(found.len()), socket));
    }
    if found.is_empty() {
        for (index, socket) in activated.iter().enumerate() {
            found.push((name(index), socket.try_clone()?));
        }
    }
    ensure!(!found.is_empty(), "no socket was passed on (LISTEN_FDS)");
    Ok(found)
}

fn load_tls(plan: &Plan) -> anyhow::Result<Option<Arc<tls::Server>>> {
    plan.tls.as_ref().map(tls::Server::load).transpose().context("TLS")
}

/// Claims each device that is written to, once; a predecessor hands its claims on.
fn claim_devices(plan: &Plan, old: &mut Sockets) -> anyhow::Result<BTreeMap<String, OwnedFd>> {
    let mut claims = BTreeMap::new();
    for export in plan.exports.iter().filter(|export| !export.read_only) {
        let named = || format!("export {:?}: {}", export.name, export.path.display());
        let path = std::fs::canonicalize(&export.path).with_context(named)?;
        let name = format!("claim {}", path.display());
        if claims.contains_key(&name) {
            continue;
        }
        let claim = match old.listening.remove(&name) {
            Some(handed_on) => Some(handed_on),
            None => backing::claim(&path).with_context(named)?,
        };
        claims.extend(claim.map(|claim| (name, claim)));
    }
    Ok(claims)
}

fn access(listen: &Listen, tls: Option<&Arc<tls::Server>>) -> Access {
    match (tls, &listen.place) {
        (Some(server), _) if listen.tls => Access::Certificate(Arc::clone(server)),
        (_, Place::Unix(_, users) | Place::VhostUser(_, users)) => {
            Access::Users(users.as_slice().into())
        }
        (_, Place::Activated(users)) if !users.is_empty() => Access::Users(users.as_slice().into()),
        (_, Place::Tcp(_) | Place::Activated(_)) => Access::Anyone,
    }
}

/// Where a predecessor may run, it has the devices' claims and the files' locks.
pub fn check(plan: &Plan, may_run: bool) -> anyhow::Result<()> {
    load_tls(plan)?;
    let nobody = &mut Sockets::default();
    if may_run {
        for export in &plan.exports {
            Backing::open_cached(&export.path, export.read_only, export.cache)
                .with_context(|| format!("export {:?}", export.name))?;
        }
    } else {
        claim_devices(plan, nobody)?;
        Held::open(&plan.exports, nobody, CHECK_MAX)?;
    }
    let (exports, sockets) = (plan.exports.len(), plan.listeners.len());
    println!("{exports} exports on {sockets} sockets: all could be served");
    Ok(())
}
