//! Stands in for each of the four daemons in the tests of `netctl up` and
//! `down`: it is copied under their names, says `ready`, and serves just enough
//! for `netctl` to speak with it.
//!
//! A file `<name>.does` beside it makes it misbehave: `hang` (never ready),
//! `crash` (ends at once), `deaf` (heeds no SIGTERM), `idle` (a dataplane that applies
//! nothing), `fail-teardown`.

#![forbid(unsafe_code)]

use std::path::{Path, PathBuf};

use axum::Json;
use axum::Router;
use axum::routing::get;
use serde_json::json;
use tokio::signal::unix::{SignalKind, signal};

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    let program = PathBuf::from(&arguments[0]);
    let name = program.file_name().unwrap().to_string_lossy().into_owned();
    let does = std::fs::read_to_string(program.with_extension("does")).unwrap_or_default();
    let option = |option: &str| {
        let at = arguments.iter().position(|a| a == option).unwrap();
        arguments[at + 1].clone()
    };
    match arguments[1].as_str() {
        "--version" => println!("{name} {}", env!("CARGO_PKG_VERSION")),
        "daemon" => daemon(&name, Path::new(&option("--run-dir")), &does).await,
        "teardown" if does == "fail-teardown" => {
            eprintln!("{name}: the tap is stuck");
            std::process::exit(1);
        }
        "teardown" => {
            // The order in which the tests expect to be torn down.
            let log = Path::new(&option("--state-dir")).join("teardowns");
            let before = std::fs::read_to_string(&log).unwrap_or_default();
            std::fs::write(log, format!("{before}{name}\n")).unwrap();
        }
        other => panic!("{name}: unknown act {other}"),
    }
}

/// As a block server does: asks the one that serves to end, and listens for the
/// next. Without `--take-over` it finds its place taken.
fn take_over(run_dir: &Path) -> tokio::net::UnixListener {
    let path = run_dir.join("block-server-take-over.sock");
    if let Ok(mut old) = std::os::unix::net::UnixStream::connect(&path) {
        assert!(std::env::args().any(|a| a == "--take-over"), "another one serves");
        std::io::copy(&mut old, &mut std::io::sink()).unwrap();
        std::fs::write(run_dir.join("took-over"), "").unwrap();
    }
    let _ = std::fs::remove_file(&path);
    tokio::net::UnixListener::bind(&path).unwrap()
}

async fn daemon(name: &str, run_dir: &Path, does: &str) {
    eprintln!("{name}: starting");
    let mut terminate = signal(SignalKind::terminate()).unwrap();
    match does {
        "crash" => {
            eprintln!("{name}: cannot find my glasses");
            std::process::exit(3);
        }
        "hang" => {
            terminate.recv().await;
            return;
        }
        _ => {}
    }
    let asked = (name == "block-server").then(|| take_over(run_dir));
    let version = env!("CARGO_PKG_VERSION");
    let status = match name {
        "block-server" => {
            json!({ "version": version, "engine": "none", "volumes": 0, "exports": 0, "connections": 0 })
        }
        "dataplane" => json!({
            "version": version, "object": { "origin": "prebuilt", "sha256": "00ff" }, "generation": 0,
            "adopted": false, "flows": 0, "reasons": {},
            "interfaces": if does == "idle" {
                json!([{ "id": "eni-00000000000000001", "device": "t", "address": "10.0.0.1",
                         "elastic": null, "reasons": {} }])
            } else {
                json!([])
            },
        }),
        "control" => json!({
            "version": version, "region": "local-1", "zone": "local-1a", "endpoint": "http://127.0.0.1:1",
            "revision": 1, "store": "none", "hosts": [],
        }),
        _ => json!({
            "version": version, "accelerator": "tcg", "accelerator_reason": "a stand-in", "instances": [],
        }),
    };
    let key = json!({ "access_key_id": "AKIDSTANDIN", "secret_access_key": "s3cret", "region": "local-1" });
    let path = if name == "control" { "/admin/v1/status" } else { "/v1/status" };
    let router = Router::new()
        .route(path, get(|| async { Json(status) }))
        .route("/admin/v1/access-key", get(|| async { Json(key) }));
    let listener =
        rpc::server::ControlListener::bind(&run_dir.join(format!("{name}.sock"))).unwrap();
    println!("ready");
    let serving =
        axum::serve(listener, router.into_make_service_with_connect_info::<rpc::server::Peer>());
    tokio::select! {
        _ = async { serving.await } => {}
        _ = async {
            match &asked {
                // Whoever asks may have it all: it sees our end.
                Some(asked) => asked.accept().await,
                None => std::future::pending().await,
            }
        } => {}
        () = async {
            terminate.recv().await;
            if does == "deaf" {
                std::future::pending::<()>().await;
            }
        } => {}
    }
}
