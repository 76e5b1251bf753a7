//! Connections with a purpose, from the world through elastic addresses.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::Duration;

use anyhow::Context;

use super::now;
use super::scene::{Instance, SPOKEN_PORT, Scene, inside, joined};

/// A connection that hears nothing for so long is lost.
const PATIENCE: Duration = Duration::from_secs(20);
/// Between two questions of a talker's.
const PAUSE: Duration = Duration::from_millis(50);
const NEWCOMER_EVERY: Duration = Duration::from_millis(100);
/// A newcomer that waits longer was not let in: the kernel has asked twice by then.
const NEWCOMER_WAITS: Duration = Duration::from_secs(3);
const DATAGRAM_EVERY: Duration = Duration::from_millis(1);
const SAID: [u8; 100] = [0x5a; 100];
const BULK_PIECE: usize = 256 * 1024;

fn address(instance: &Instance) -> SocketAddr {
    (instance.elastic, SPOKEN_PORT).into()
}

/// Each instance says back what it hears, once the first connection is wanted.
fn echo(scene: &Scene, instance: &Instance) -> anyhow::Result<()> {
    let bind = || TcpListener::bind((Ipv4Addr::UNSPECIFIED, SPOKEN_PORT)).map_err(Into::into);
    let listener: TcpListener = match scene.of(instance).within(bind) {
        Ok(listener) => listener,
        // It listens already.
        Err(_) => return Ok(()),
    };
    inside(scene.of(instance), move || {
        for stream in listener.incoming() {
            let mut stream = stream?;
            std::thread::spawn(move || {
                let mut heard = [0; SAID.len()];
                while stream.read_exact(&mut heard).is_ok() && stream.write_all(&heard).is_ok() {}
            });
        }
        Ok(())
    })?;
    Ok(())
}

fn exchange(stream: &mut TcpStream) -> anyhow::Result<()> {
    stream.write_all(&SAID)?;
    let mut heard = [0; SAID.len()];
    stream.read_exact(&mut heard)?;
    anyhow::ensure!(heard == SAID, "what came back is not what was said");
    Ok(())
}

/// A connection whose first word was answered.
fn connected(to: SocketAddr) -> anyhow::Result<TcpStream> {
    let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("connect")?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    exchange(&mut stream)?;
    Ok(stream)
}

/// A connection that says something all the time and wants it back.
pub struct Talker {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<()>>,
}

impl Talker {
    pub fn open(scene: &Scene, instance: &Instance) -> anyhow::Result<Self> {
        echo(scene, instance)?;
        let to = address(instance);
        let mut stream = joined(inside(&scene.world, move || connected(to))?)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = inside(&scene.world, move || {
            while !stopped.load(Ordering::Relaxed) {
                exchange(&mut stream)?;
                sleep(PAUSE);
            }
            Ok(())
        })?;
        Ok(Self { stop, thread })
    }

    pub fn finish(self) -> Result<(), String> {
        self.stop.store(true, Ordering::Relaxed);
        joined(self.thread).map_err(|e| format!("{e:#}"))
    }
}

/// A connection that was used once and is silent until it is woken.
pub struct Sleeper(TcpStream);

impl Sleeper {
    pub fn open(scene: &Scene, instance: &Instance) -> anyhow::Result<Self> {
        echo(scene, instance)?;
        let to = address(instance);
        Ok(Self(joined(inside(&scene.world, move || connected(to))?)?))
    }

    pub fn wake(mut self) -> Result<(), String> {
        exchange(&mut self.0).map_err(|e| format!("{e:#}"))
    }
}

/// One connection that carries as much as it can.
pub struct Bulk {
    arrived: Arc<AtomicU64>,
}

impl Bulk {
    pub fn start(scene: &Scene, instance: &Instance) -> anyhow::Result<Self> {
        let port = SPOKEN_PORT + 1;
        let listener = scene
            .of(instance)
            .within(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).context("bulk: listen"))?;
        let arrived = Arc::new(AtomicU64::new(0));
        let counted = arrived.clone();
        inside(scene.of(instance), move || {
            let (mut stream, _) = listener.accept()?;
            let mut piece = vec![0; BULK_PIECE];
            loop {
                match stream.read(&mut piece)? {
                    0 => return Ok(()),
                    n => counted.fetch_add(n as u64, Ordering::Relaxed),
                };
            }
        })?;
        let to = (instance.elastic, port).into();
        inside(&scene.world, move || {
            let mut stream = TcpStream::connect_timeout(&to, PATIENCE).context("bulk: connect")?;
            let piece = vec![0x5a; BULK_PIECE];
            loop {
                stream.write_all(&piece)?;
            }
            #[expect(unreachable_code, reason = "the thread ends with the connection")]
            Ok(())
        })?;
        let bulk = Self { arrived };
        bulk.watch(Duration::from_secs(1))?;
        Ok(bulk)
    }

    /// MB/s, second by second.
    pub fn watch(&self, length: Duration) -> anyhow::Result<Vec<f64>> {
        let mut rates = Vec::new();
        for _ in 0..length.as_secs().max(1) {
            let (before, begun) = (self.arrived.load(Ordering::Relaxed), now());
            sleep(Duration::from_secs(1));
            let arrived = self.arrived.load(Ordering::Relaxed) - before;
            rates.push(arrived as f64 / 1e6 / begun.elapsed().as_secs_f64());
        }
        Ok(rates)
    }
}

/// Those who want a new connection, one after the other.
pub struct Newcomers {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<(usize, usize)>>,
}

impl Newcomers {
    pub fn begin(scene: &Scene, instance: &Instance) -> anyhow::Result<Self> {
        let to = address(instance);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = inside(&scene.world, move || {
            let (mut opened, mut tried) = (0, 0);
            while !stopped.load(Ordering::Relaxed) {
                tried += 1;
                opened += usize::from(TcpStream::connect_timeout(&to, NEWCOMER_WAITS).is_ok());
                sleep(NEWCOMER_EVERY);
            }
            Ok((opened, tried))
        })?;
        Ok(Self { stop, thread })
    }

    /// How many were let in, of how many.
    pub fn finish(self) -> (usize, usize) {
        self.stop.store(true, Ordering::Relaxed);
        joined(self.thread).unwrap_or_default()
    }
}

/// A stream of datagrams, each answered.
pub struct Datagrams {
    stop: Arc<AtomicBool>,
    sender: JoinHandle<anyhow::Result<u64>>,
    hearer: JoinHandle<anyhow::Result<u64>>,
}

impl Datagrams {
    pub fn begin(scene: &Scene, instance: &Instance) -> anyhow::Result<Self> {
        let bind = || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, SPOKEN_PORT)).context("bind");
        let server = scene.of(instance).within(bind)?;
        inside(scene.of(instance), move || {
            let mut datagram = [0; 64];
            loop {
                let (length, from) = server.recv_from(&mut datagram)?;
                server.send_to(&datagram[..length], from)?;
            }
            #[expect(unreachable_code, reason = "the thread ends with the process")]
            Ok(())
        })?;
        let socket = scene.world.within(bind)?;
        socket.connect(address(instance))?;
        socket.set_read_timeout(Some(Duration::from_secs(2)))?;
        let ear = socket.try_clone()?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let sender = inside(&scene.world, move || {
            let mut sent: u64 = 0;
            while !stopped.load(Ordering::Relaxed) {
                socket.send(&sent.to_be_bytes())?;
                sent += 1;
                sleep(DATAGRAM_EVERY);
            }
            Ok(sent)
        })?;
        let hearer = inside(&scene.world, move || {
            let (mut heard, mut datagram) = (0, [0; 64]);
            // It ends when nothing comes any more.
            while ear.recv(&mut datagram).is_ok() {
                heard += 1;
            }
            Ok(heard)
        })?;
        Ok(Self { stop, sender, hearer })
    }

    /// How many were sent, and how many answers came.
    pub fn finish(self) -> (u64, u64) {
        self.stop.store(true, Ordering::Relaxed);
        let sent = joined(self.sender).unwrap_or_default();
        (sent, joined(self.hearer).unwrap_or_default())
    }
}
