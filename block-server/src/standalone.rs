//! `block-server serve`: plain NBD for anyone, without catalogue or control.

use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU32;

use anyhow::{Context, ensure};
use tokio::sync::mpsc::unbounded_channel;

use crate::backing::{Backing, Cache};
use crate::socket;
use crate::worker::{Access, EngineChoice, Handle, NewVolume, Served};

#[derive(Debug, clap::Args)]
pub struct Options {
    /// A file or block device, served as the default export.
    #[arg(long, value_name = "PATH")]
    file: Option<PathBuf>,
    /// A further export; may be given several times.
    #[arg(long, value_name = "NAME=PATH", value_parser = named)]
    export: Vec<(String, PathBuf)>,
    /// The unix socket to listen on.
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// The TCP address to listen on. There is no encryption: stay on loopback
    /// or a network that you trust.
    #[arg(long, value_name = "ADDRESS:PORT")]
    tcp: Option<SocketAddr>,
    /// Refuse every change.
    #[arg(long)]
    read_only: bool,
    /// Whether file operations go through the kernel's page cache.
    #[arg(long, value_enum, default_value = "none")]
    cache: Cache,
    #[arg(long, value_enum, default_value = "auto")]
    engine: EngineChoice,
}

fn named(text: &str) -> Result<(String, PathBuf), String> {
    let (name, path) = text.split_once('=').ok_or("write NAME=PATH")?;
    Ok((name.to_owned(), path.into()))
}

/// Serves until `stop` resolves.
pub async fn run(options: Options, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
    ensure!(options.file.is_some() || !options.export.is_empty(), "name a --file or an --export");
    let mut listeners = socket::inherited();
    ensure!(
        options.socket.is_some() || options.tcp.is_some() || !listeners.is_empty(),
        "name a --socket or a --tcp address, or pass a socket as systemd does"
    );
    let (events, _) = unbounded_channel();
    let worker = Handle::start(0, options.engine, events).context("cannot start the I/O engine")?;
    let mut exports = Vec::new();
    let all = options.file.map(|path| (String::new(), path)).into_iter().chain(options.export);
    for (name, path) in all {
        exports.push(add(&worker, name, &path, options.read_only, options.cache).await?);
    }
    if let Some(path) = &options.socket {
        listeners.push(socket::listen(path, None)?);
    }
    if let Some(address) = options.tcp {
        let listener =
            TcpListener::bind(address).with_context(|| format!("cannot bind {address}"))?;
        listeners.push(listener.into());
    }
    for listener in listeners {
        worker.add_listener(listener, Access::Anyone, exports.clone()).await?;
    }
    tracing::info!(engine = worker.engine(), exports = exports.len(), "serving");
    println!("ready");
    stop.await;
    tokio::task::block_in_place(|| {
        worker.begin_stop();
        worker.await_stop();
    });
    if let Some(path) = &options.socket {
        let _ = std::fs::remove_file(path);
    }
    Ok(())
}

async fn add(
    worker: &Handle,
    name: String,
    path: &Path,
    read_only: bool,
    cache: Cache,
) -> anyhow::Result<Served> {
    let backing = Backing::open_cached(path, read_only, cache)?;
    let size = backing.geometry.size;
    let volume = NewVolume {
        name: path.display().to_string(),
        fd: backing.fd,
        geometry: backing.geometry,
        generation: 0,
        failed: None,
        counters: Arc::default(),
    };
    Ok(Served {
        name,
        volume: worker.add_volume(volume).await?,
        size,
        read_only,
        generation: 0,
        description: path.display().to_string(),
        connections: Arc::new(AtomicU32::new(0)),
    })
}
