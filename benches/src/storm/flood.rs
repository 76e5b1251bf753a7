//! Openings from everywhere, as quickly as one core can make them.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use super::now;
use super::scene::{FLOOD_CPU, FLOODED, FLOODED_PORT, Scene, inside_on, joined};
use crate::packet::bpf::Sender;
use crate::packet::contender::ends;
use crate::packet::frame::{Ends, Template};
use crate::packet::scene::UPLINK_INDEX;

/// How many openings there are before one comes again.
const OPENINGS: u32 = 1 << 30;
/// Of one call, which takes a while to get going.
const BATCH: u32 = 1 << 18;

pub struct Flood {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<anyhow::Result<(u64, f64)>>,
}

impl Flood {
    pub fn begin(scene: &Scene) -> anyhow::Result<Self> {
        let ends = Ends { server_port: FLOODED_PORT, ..ends(FLOODED.elastic) };
        let sender = Sender::new(&Template::opening(ends), OPENINGS, None)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = inside_on(&scene.host, FLOOD_CPU, move || {
            let (mut frames, begun) = (0, now());
            while !stopped.load(Ordering::Relaxed) {
                sender.send(UPLINK_INDEX, BATCH)?;
                frames += u64::from(BATCH);
            }
            Ok((frames, frames as f64 / begun.elapsed().as_secs_f64()))
        })?;
        Ok(Self { stop, thread })
    }

    /// How many frames there were, and how many a second.
    pub fn end(self) -> anyhow::Result<(u64, f64)> {
        self.stop.store(true, Ordering::Relaxed);
        joined(self.thread)
    }
}
