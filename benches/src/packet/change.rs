//! How long after the rules' change is a packet judged by them?
//!
//! A thread asks the uplink's program about one packet without a pause; the clock runs
//! from the moment that the new tables are handed over until its answer is another.
//! That is of the interface whose record is written last, where many share a group.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::Context;
use dataplane::compile::compile;
use dataplane::load::Loaded;

use crate::packet::bpf::Sender;
use crate::packet::contender::ends;
use crate::packet::frame::{Client, Template};
use crate::packet::namespace::Namespace;
use crate::packet::ours;
use crate::packet::program::Hook;
use crate::packet::scene::{Scene, TAP_INDEX, UPLINK_INDEX};
use crate::packet::world::World;
use crate::statistic::Sample;

/// Whose rules are changed, and how long it took.
#[derive(Debug, Clone)]
pub struct Change {
    pub interfaces: usize,
    /// From new tables to the first packet judged by them.
    pub visible_us: Sample,
    /// The same with compiling the desired state before it.
    pub whole_ms: Sample,
}

const TC_REDIRECT: u32 = 7;
const FIRST_PORT: u16 = 7000;
/// How often it is asked before the clock runs: until nothing of it is cold any more.
const ASKED_BEFORE: usize = 100;
const VISIBLE_WITHIN: Duration = Duration::from_secs(10);

/// `interfaces` that share groups of a thousand rules, of which one changes each round.
pub fn run(interfaces: usize, rounds: usize) -> anyhow::Result<Change> {
    let world = World::sharing(interfaces);
    let scene = Scene::build(world.measured())?;
    scene.router.within(|| rules_change(&world, rounds))
}

#[expect(clippy::disallowed_methods, reason = "it measures time")]
fn rules_change(world: &World, rounds: usize) -> anyhow::Result<Change> {
    let mut loaded = Loaded::open(&ours::deployment()?)?;
    let count = world.instances.len();
    let mut change =
        Change { interfaces: count, visible_us: Sample::default(), whole_ms: Sample::default() };
    // Nothing arrives by the others' devices, so there are none.
    let devices = ours::imagined(world)?;
    let last = devices.last.clone();
    put(&mut loaded, world, &devices, FIRST_PORT)?;
    let program = loaded.program_number("uplink_ingress")?;
    let elastic =
        world.instances.iter().find(|i| i.device == last).context("the last interface")?.elastic;
    for round in 0..=rounds {
        let port = FIRST_PORT + 1 + round as u16;
        let template = Template::new(
            crate::packet::frame::Ends { server_port: port, ..ends(elastic) },
            Client::Sends,
        );
        let watch = Watch::start(&template, program)?;
        let begun = Instant::now();
        let tables = compiled(&loaded, world, &devices, port)?;
        let handed = Instant::now();
        loaded.update(tables)?;
        let seen = watch.seen()?;
        if round > 0 {
            change.visible_us.push((seen - handed).as_secs_f64() * 1e6);
            change.whole_ms.push((seen - begun).as_secs_f64() * 1e3);
        }
    }
    Ok(change)
}

fn put(
    loaded: &mut Loaded,
    world: &World,
    devices: &ours::Imagined,
    port: u16,
) -> anyhow::Result<()> {
    let tables = compiled(loaded, world, devices, port)?;
    loaded.update(tables)?;
    Ok(())
}

fn compiled(
    loaded: &Loaded,
    world: &World,
    devices: &ours::Imagined,
    port: u16,
) -> anyhow::Result<dataplane::compile::Tables> {
    let desired = ours::desired_sharing(world, port)?;
    let mut tables = compile(&desired, &devices.devices, loaded.tables())?;
    tables.attachments.retain(|ifindex, _| [UPLINK_INDEX, TAP_INDEX].contains(ifindex));
    Ok(tables)
}

/// Asks until the packet passes.
struct Watch {
    stop: Arc<AtomicBool>,
    answer: mpsc::Receiver<anyhow::Result<Instant>>,
}

impl Watch {
    /// It asks without a pause when this returns, and is refused: a thread that had yet to
    /// come to its processor would see a change later than it was made.
    fn start(template: &Template, program: u32) -> anyhow::Result<Self> {
        let sender = Sender::for_alone(Hook::Tc, template, Some(program))?;
        let namespace = Namespace::current()?;
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, (told, answer)) = (stop.clone(), mpsc::channel());
        let (ready, begun) = mpsc::channel();
        std::thread::spawn(move || {
            let seen = namespace.enter().and_then(|()| ask(&sender, &stopped, &ready));
            _ = told.send(seen);
        });
        match begun.recv_timeout(VISIBLE_WITHIN) {
            Ok(()) => Ok(Self { stop, answer }),
            Err(_) => {
                Err(Self { stop, answer }.seen().err().context("the asking thread is late")?)
            }
        }
    }

    fn seen(self) -> anyhow::Result<Instant> {
        let seen = self.answer.recv_timeout(VISIBLE_WITHIN);
        self.stop.store(true, Ordering::Relaxed);
        match seen {
            Ok(seen) => seen,
            Err(RecvTimeoutError::Timeout) => anyhow::bail!("no packet passed by the new rule"),
            Err(RecvTimeoutError::Disconnected) => anyhow::bail!("the asking thread has ended"),
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "it measures time")]
fn ask(sender: &Sender, stop: &AtomicBool, ready: &mpsc::Sender<()>) -> anyhow::Result<Instant> {
    leave_the_processor()?;
    for _ in 0..ASKED_BEFORE {
        let (_, code) = sender.alone(Hook::Tc, UPLINK_INDEX, 1)?;
        anyhow::ensure!(code != TC_REDIRECT, "the packet passes before its rule is there");
    }
    _ = ready.send(());
    while !stop.load(Ordering::Relaxed) {
        let (_, code) = sender.alone(Hook::Tc, UPLINK_INDEX, 1)?;
        if code == TC_REDIRECT {
            return Ok(Instant::now());
        }
    }
    anyhow::bail!("stopped")
}

/// The one that asks must not stand in the way of the one that changes, nor wait for it: where
/// both share a processor, what is seen is when the other one sleeps.
fn leave_the_processor() -> anyhow::Result<()> {
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::{Pid, SysconfVar, sysconf};
    let of_the_other = sched_getaffinity(Pid::from_raw(0))?;
    let count = sysconf(SysconfVar::_NPROCESSORS_ONLN)?.context("the number of processors")?;
    let mut others = CpuSet::new();
    for cpu in 0..usize::try_from(count)?.min(CpuSet::count()) {
        if !of_the_other.is_set(cpu)? {
            others.set(cpu)?;
        }
    }
    sched_setaffinity(Pid::from_raw(0), &others).context("a second processor is needed")
}
