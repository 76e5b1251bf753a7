//! The owner between a block server, a dataplane and guests that are all in
//! memory: what comes and goes must not matter.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent::host::{Channels, Desk, Host, Memory, Message, report};
use agent::image::Store;
use agent::scripted::Scripted;
use agent::serve::{Reception, router};
use axum::extract::{Path, State};
use axum::routing::{get, put};
use axum::{Json, Router};
use model::{InstanceId, InstanceState, VolumeId, VolumeState};
use rpc::agent::ImportImage;
use rpc::block::{Export, NewExport, NewVolume, Quality, Volume, VolumeHealth};
use rpc::host::{Attachment, Desired, Instance, Observed, Run};
use rpc::{Client, Deployment, Error};
use tokio::sync::watch;
use tokio::task::JoinHandle;

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Default)]
struct Block {
    volumes: BTreeMap<VolumeId, Volume>,
    exports: BTreeMap<String, Export>,
}

type Shared = Arc<Mutex<Block>>;

async fn list_volumes(State(block): State<Shared>) -> Json<Vec<Volume>> {
    Json(block.lock().unwrap().volumes.values().cloned().collect())
}

async fn put_volume(
    State(block): State<Shared>,
    Path(id): Path<VolumeId>,
    Json(new): Json<NewVolume>,
) -> Json<Volume> {
    let volume = Volume {
        id,
        size_bytes: new.size_bytes,
        allocated_bytes: 0,
        state: VolumeHealth::Ready,
        quality: Quality::default(),
        limits: model::Limits::none(),
    };
    block.lock().unwrap().volumes.insert(id, volume.clone());
    Json(volume)
}

async fn delete_volume(
    State(block): State<Shared>,
    Path(id): Path<VolumeId>,
) -> Result<Json<()>, Error> {
    let mut block = block.lock().unwrap();
    if block.exports.values().any(|e| e.volume == id) {
        return Err(Error::conflict("it is exported"));
    }
    block.volumes.remove(&id);
    Ok(Json(()))
}

async fn list_exports(State(block): State<Shared>) -> Json<Vec<Export>> {
    Json(block.lock().unwrap().exports.values().cloned().collect())
}

async fn put_export(
    State(block): State<Shared>,
    Path(name): Path<String>,
    Json(new): Json<NewExport>,
) -> Result<Json<Export>, Error> {
    let mut block = block.lock().unwrap();
    if !block.volumes.contains_key(&new.volume) {
        return Err(Error::not_found("no such volume"));
    }
    let export = Export {
        name: name.clone(),
        volume: new.volume,
        read_only: new.read_only,
        generation: new.generation,
        owner_uid: new.owner_uid,
        socket: "/nonexistent".into(),
        vhost_user: None,
        connections: 0,
    };
    block.exports.insert(name, export.clone());
    Ok(Json(export))
}

async fn delete_export(State(block): State<Shared>, Path(name): Path<String>) -> Json<()> {
    block.lock().unwrap().exports.remove(&name);
    Json(())
}

struct World {
    _dir: tempfile::TempDir,
    deployment: Deployment,
    block: Shared,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let deployment =
            Deployment::new("hosttest", dir.path().join("state"), dir.path().join("run")).unwrap();
        std::fs::create_dir_all(deployment.run_dir()).unwrap();
        Self { _dir: dir, deployment, block: Shared::default() }
    }

    fn serve_block(&self) -> JoinHandle<()> {
        let router = Router::new()
            .route("/v1/volumes", get(list_volumes))
            .route("/v1/volumes/{id}", put(put_volume).delete(delete_volume))
            .route("/v1/exports", get(list_exports))
            .route("/v1/exports/{name}", put(put_export).delete(delete_export))
            .with_state(self.block.clone());
        let path = self.deployment.socket_of("block-server");
        tokio::spawn(async move { rpc::server::serve(&path, router).await.unwrap() })
    }

    fn agent(&self) -> (Desk, watch::Receiver<Observed>, JoinHandle<()>) {
        let channels = Channels::new();
        let desk = channels.desk();
        let guests = Scripted::new(7, channels.reports());
        let images = Store::open(self.deployment.state_of("agent").join("images")).unwrap();
        let memory = Memory::open(&self.deployment).unwrap();
        let (sender, observed) = watch::channel(Observed::default());
        let host =
            Host::new(self.deployment.clone(), images, memory, guests, channels, sender).unwrap();
        (desk, observed, tokio::spawn(host.run()))
    }

    /// The agent's own control socket, and its reports to control.
    fn serve_agent(&self, desk: Desk, observed: watch::Receiver<Observed>) -> [JoinHandle<()>; 2] {
        let (telling, known) = watch::channel(Vec::new());
        let reception = Reception {
            deployment: self.deployment.clone(),
            images: Store::open(self.deployment.state_of("agent").join("images")).unwrap(),
            packages: self.deployment.state_of("agent").join("packages"),
            desk,
            known,
        };
        let path = self.deployment.socket_of("agent");
        let control = Client::new(self.deployment.socket_of("control"));
        [
            tokio::spawn(
                async move { rpc::server::serve(&path, router(reception)).await.unwrap() },
            ),
            tokio::spawn(report(control, "h".to_owned(), observed, telling)),
        ]
    }

    /// A control that is slow to take a report.
    fn serve_control(&self, heard: Arc<Mutex<Observed>>) -> JoinHandle<()> {
        let take = |State(heard): State<Arc<Mutex<Observed>>>, Json(report): Json<Observed>| async move {
            tokio::time::sleep(Duration::from_millis(300)).await;
            *heard.lock().unwrap() = report;
            Json(())
        };
        let router = Router::new().route("/host/v1/{host}/observed", put(take)).with_state(heard);
        let path = self.deployment.socket_of("control");
        tokio::spawn(async move { rpc::server::serve(&path, router).await.unwrap() })
    }

    fn exported(&self) -> Vec<VolumeId> {
        self.block.lock().unwrap().exports.values().map(|e| e.volume).collect()
    }
}

async fn until(
    observed: &mut watch::Receiver<Observed>,
    what: &str,
    wanted: impl Fn(&Observed) -> bool,
) {
    let waited = tokio::time::timeout(PATIENCE, observed.wait_for(|o| wanted(o))).await.is_ok();
    assert!(waited, "not in time: {what}: {:#?}", observed.borrow());
}

fn state(observed: &Observed) -> Option<InstanceState> {
    observed.instances.first().map(|i| i.state)
}

fn desired(revision: u64, run: Run, deleted: bool) -> Desired {
    let volume = VolumeId::from_random(1);
    Desired {
        revision,
        instances: vec![Instance {
            id: InstanceId::from_random(1),
            run,
            starts: 1,
            reboots: 0,
            vcpus: 1,
            memory_mib: 128,
            image: "none".into(),
            interfaces: Vec::new(),
            volumes: vec![Attachment {
                volume,
                device: "/dev/xvda".into(),
                generation: 1,
                boot: true,
            }],
            volumes_max: 4,
        }],
        volumes: vec![rpc::host::Volume {
            id: volume,
            size_bytes: 4096,
            image: None,
            quality: Quality::default(),
            deleted,
        }],
        network: rpc::dataplane::Desired::default(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_lives_and_ends_though_others_come_and_go() {
    let world = World::new();
    // No control, no block server: the wish comes, and waits.
    let (desk, mut observed, agent) = world.agent();
    desk.tell(Message::Desired(Box::new(desired(1, Run::Running, false)))).await;
    until(&mut observed, "pending", |o| state(o) == Some(InstanceState::Pending)).await;
    let block = world.serve_block();
    until(&mut observed, "running", |o| state(o) == Some(InstanceState::Running)).await;
    assert_eq!(world.exported(), [VolumeId::from_random(1)]);

    // The agent dies. The next one needs no word from control.
    agent.abort();
    let (desk, mut observed, agent) = world.agent();
    until(&mut observed, "running again", |o| {
        o.revision == 1
            && state(o) == Some(InstanceState::Running)
            && o.volumes.iter().all(|v| v.state == VolumeState::Available)
    })
    .await;

    // An export that was lost is made again.
    world.block.lock().unwrap().exports.clear();
    tokio::time::timeout(PATIENCE, async {
        while world.exported().is_empty() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the export comes back");

    // A volume whose data is lost is an error, never a new empty disk.
    let kept = std::mem::take(&mut world.block.lock().unwrap().volumes);
    agent.abort();
    let (desk_again, mut observed, agent) = world.agent();
    drop(desk);
    until(&mut observed, "the loss", |o| o.volumes.iter().any(|v| v.state == VolumeState::Error))
        .await;
    assert!(world.block.lock().unwrap().volumes.is_empty());
    world.block.lock().unwrap().volumes = kept;

    // Terminated with its volume; then control wants to hear of it no more.
    desk_again.tell(Message::Desired(Box::new(desired(2, Run::Terminated, true)))).await;
    until(&mut observed, "terminated", |o| {
        state(o) == Some(InstanceState::Terminated) && o.volumes.is_empty()
    })
    .await;
    assert_eq!(world.exported(), []);
    assert!(world.block.lock().unwrap().volumes.is_empty());
    desk_again
        .tell(Message::Desired(Box::new(Desired { revision: 3, ..Desired::default() })))
        .await;
    until(&mut observed, "forgotten", |o| o.revision == 3 && o.instances.is_empty()).await;
    let left = std::fs::read_dir(world.deployment.state_of("agent").join("instances")).unwrap();
    assert_eq!(left.count(), 0);
    agent.abort();
    block.abort();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_a_new_image_may_register_it_at_once() {
    if std::process::Command::new("qemu-img").arg("--version").output().is_err() {
        let name = "who_has_a_new_image_may_register_it_at_once";
        sim::skip(name, "qemu-img is not installed");
        return;
    }
    let world = World::new();
    let (desk, observed, owner) = world.agent();
    let parts = world.serve_agent(desk, observed);
    let file = world.deployment.run_dir().join("disk.raw");
    std::fs::write(&file, [7; 8192]).unwrap();
    let client = Client::new(world.deployment.socket_of("agent"));
    while client.images().await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }

    // Control is away: the image is there all the same, if later.
    let import = |name: &str| ImportImage { file: file.clone(), name: name.to_owned() };
    client.import_image(&import("first")).await.unwrap();

    let heard = Arc::new(Mutex::new(Observed::default()));
    let control = world.serve_control(Arc::clone(&heard));
    for name in ["second", "third"] {
        let image = client.import_image(&import(name)).await.unwrap();
        assert!(heard.lock().unwrap().images.contains(&image), "control has not heard of {name}");
    }
    for task in parts.into_iter().chain([owner, control]) {
        task.abort();
    }
}
