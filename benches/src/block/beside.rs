//! Who else asks the same server, at another export, while one is measured.

use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;

use super::address::Address;
use super::client::{self, Client};
use super::load::{Deed, Done, Load};
use super::storm::Storm;

/// The export of those who stand beside.
pub const EXPORT: &str = "beside";

/// As much as it can, from the same disk.
const FLOOD: Load = Load { deed: Deed::Read, block_bytes: 1 << 20, depth: 16, connections: 4 };

/// Connections that come, say nothing and stay.
const CROWD: usize = 10_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    Nobody,
    /// One who reads 1 MiB at a time, as fast as the server lets it.
    Flood,
    /// Strangers who connect, say nothing and wait.
    Crowd,
    /// One who means ill.
    Storm(Storm),
}

impl Beside {
    /// Measures `load` on the default export, with the others there.
    pub fn run(self, address: &Address, load: Load, duration: Duration) -> anyhow::Result<Done> {
        match self {
            Self::Nobody => client::run(address, load, duration),
            Self::Flood => beside_flood(address, load, duration),
            Self::Crowd => beside_crowd(address, load, duration),
            Self::Storm(storm) => beside_storm(storm, address, load, duration),
        }
    }
}

/// What the others of such a row are held against: measured as there, with nobody else.
pub fn alone(address: &Address, load: Load, duration: Duration) -> anyhow::Result<Done> {
    first(|| client::run(address, load, duration))
}

/// Runs `measured` before all others on its processor: else its own wait for one is
/// taken for the server's.
fn first<T: Send>(measured: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            let priority = libc::sched_param { sched_priority: 1 };
            // SAFETY: the parameter is read during the call alone, and is this thread's own.
            let set = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &priority) };
            if set != 0 {
                eprintln!("not before others: {}", std::io::Error::last_os_error());
            }
            measured()
        });
        running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn beside_flood(address: &Address, load: Load, duration: Duration) -> anyhow::Result<Done> {
    let (measured, flood) =
        (Client::open(address, "", load)?, Client::open(address, EXPORT, FLOOD)?);
    std::thread::scope(|scope| {
        // It begins before and ends after.
        let flooding = scope.spawn(|| flood.run(duration + Duration::from_millis(200)));
        std::thread::sleep(Duration::from_millis(100));
        let done = first(|| measured.run(duration));
        let flooded = flooding.join();
        let flooded = flooded.map_err(|_| anyhow::anyhow!("the flood's thread panicked"))??;
        let mb = flooded.iops * f64::from(FLOOD.block_bytes) / 1e6;
        eprintln!("the volume beside read {mb:.0} MB/s");
        done
    })
}

fn beside_crowd(address: &Address, load: Load, duration: Duration) -> anyhow::Result<Done> {
    crate::process::allow_files(CROWD as u64 + 100)?;
    let measured = Client::open(address, "", load)?;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut crowd = Vec::new();
            while crowd.len() < CROWD && !is_over.load(Ordering::Relaxed) {
                // One that was hung up on stands there as well as one that was let in.
                crowd.extend(address.connect());
            }
            while !is_over.load(Ordering::Relaxed) {
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        let done = first(|| measured.run(duration));
        is_over.store(true, Ordering::Relaxed);
        done
    })
}

fn beside_storm(
    storm: Storm,
    address: &Address,
    load: Load,
    duration: Duration,
) -> anyhow::Result<Done> {
    let measured = Client::open(address, "", load)?;
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let raging = scope.spawn(|| storm.rage(address, &is_over));
        std::thread::sleep(Duration::from_millis(20));
        let done = first(|| measured.run(duration));
        is_over.store(true, Ordering::Relaxed);
        let raged = raging.join().map_err(|_| anyhow::anyhow!("the storm's thread panicked"))?;
        raged.with_context(|| storm.to_string())?;
        done
    })
}

impl fmt::Display for Beside {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody => Ok(()),
            Self::Flood => write!(f, ", beside another volume's {FLOOD}"),
            Self::Crowd => write!(f, ", beside {CROWD} connections that say nothing"),
            Self::Storm(storm) => write!(f, ", beside {storm}"),
        }
    }
}
