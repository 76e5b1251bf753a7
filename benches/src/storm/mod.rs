//! What do connections lose while the host is flooded, its daemon killed, and its
//! programs exchanged?
//!
//! Called by `src/bin/storm.rs`. Connections through elastic addresses stand and
//! work while openings from a million sources arrive as quickly as the machine can
//! make them; then, with ours, while the daemon is killed and replaced.
//!
//! ```text
//!  flood:    talkers, sleepers, a bulk transfer ─▶ quiet ─▶ flood ─▶ quiet ─▶ who is left?
//!  guest:    a guest's own TCP, through its elastic address and by plain routing, in turn
//!  restart:  talkers, datagrams ─▶ kill -9 and start, three times ─▶ another layout, twice
//! ```

mod flood;
mod guest;
mod keeper;
mod report;
mod scene;
mod traffic;

use std::time::{Duration, Instant};

use anyhow::Context;

pub use self::guest::{Carried, carry};
pub use self::keeper::Keeper;
pub use self::report::text;

use self::flood::Flood;
use self::keeper::Host;
use self::scene::{FLOODED, NEIGHBOUR, Scene};
use self::traffic::{Bulk, Datagrams, Newcomers, Sleeper, Talker};
use crate::statistic::Sample;

/// Connections of each kind to each of both instances.
const CONNECTIONS: usize = 25;
/// The bulk transfer alone, before and after the flood.
const QUIET: Duration = Duration::from_secs(10);
const SECOND: Duration = Duration::from_secs(1);
const KILLS: usize = 3;
const LAYOUTS: usize = 2;
/// Between a deed to the daemon and the next.
const AFTERWARDS: Duration = Duration::from_millis(1500);

#[expect(clippy::disallowed_methods, reason = "this program asks what time things take")]
fn now() -> Instant {
    Instant::now()
}

/// What the flood did to those who had no part in it.
#[derive(Debug, Clone)]
pub struct Flooded {
    pub keeper: Keeper,
    pub seconds: u64,
    /// Frames a second.
    pub rate: f64,
    pub frames: u64,
    /// Of so many connections that spoke all the time, and that were silent.
    pub connections: usize,
    pub talkers_lost: Vec<String>,
    pub sleepers_lost: Vec<String>,
    /// New connections to the neighbour that came about, of those tried.
    pub opened: usize,
    pub tried: usize,
    /// MB/s to the neighbour, second by second.
    pub quiet: Sample,
    pub flooded: Sample,
}

pub fn flood(keeper: Keeper, length: Duration) -> anyhow::Result<Flooded> {
    let scene = Scene::build()?;
    let _host = Host::start(keeper, &scene)?;
    let targets = [FLOODED, NEIGHBOUR].iter().flat_map(|i| [i; CONNECTIONS]);
    let talkers =
        targets.clone().map(|i| Talker::open(&scene, i)).collect::<Result<Vec<_>, _>>()?;
    let sleepers = targets.map(|i| Sleeper::open(&scene, i)).collect::<Result<Vec<_>, _>>()?;
    let bulk = Bulk::start(&scene, &NEIGHBOUR)?;

    let mut quiet = bulk.watch(QUIET)?;
    let flood = Flood::begin(&scene)?;
    let newcomers = Newcomers::begin(&scene, &NEIGHBOUR)?;
    let flooded = bulk.watch(length)?;
    let (opened, tried) = newcomers.finish();
    let (frames, rate) = flood.end()?;
    std::thread::sleep(SECOND);
    quiet.extend(bulk.watch(QUIET)?);

    Ok(Flooded {
        keeper,
        seconds: length.as_secs(),
        rate,
        frames,
        connections: 2 * CONNECTIONS,
        talkers_lost: talkers.into_iter().filter_map(|t| t.finish().err()).collect(),
        sleepers_lost: sleepers.into_iter().filter_map(|s| s.wake().err()).collect(),
        opened,
        tried,
        quiet: quiet.into_iter().collect(),
        flooded: flooded.into_iter().collect(),
    })
}

/// What a daemon that is killed and replaced did to its traffic.
#[derive(Debug, Clone)]
pub struct Replaced {
    pub kills: usize,
    pub layouts: usize,
    pub connections: usize,
    pub connections_lost: Vec<String>,
    /// Datagrams sent, and answers to them heard.
    pub sent: u64,
    pub heard: u64,
    /// Until the daemon says that it is ready again.
    pub ready_ms: Sample,
}

pub fn replace() -> anyhow::Result<Replaced> {
    let scene = Scene::build()?;
    let mut host = Host::start(Keeper::Ours, &scene)?;
    let targets = [FLOODED, NEIGHBOUR].iter().flat_map(|i| [i; CONNECTIONS]);
    let talkers = targets.map(|i| Talker::open(&scene, i)).collect::<Result<Vec<_>, _>>()?;
    let datagrams = Datagrams::begin(&scene, &NEIGHBOUR)?;
    let mut ready_ms = Sample::default();
    for deed in 0..KILLS + LAYOUTS {
        std::thread::sleep(AFTERWARDS);
        host.kill().context("daemon: kill")?;
        if deed >= KILLS {
            host.estrange(deed)?;
        }
        std::thread::sleep(AFTERWARDS);
        ready_ms.push(host.begin()?);
    }
    std::thread::sleep(AFTERWARDS);
    let (sent, heard) = datagrams.finish();
    Ok(Replaced {
        kills: KILLS,
        layouts: LAYOUTS,
        connections: talkers.len(),
        connections_lost: talkers.into_iter().filter_map(|t| t.finish().err()).collect(),
        sent,
        heard,
        ready_ms,
    })
}
