//! The eBPF object in the kernel: loaded or adopted, pinned, changed, read.
//!
//! Called by `apply` and `serve`, from one thread. All of it may block for
//! milliseconds; none of it is on the packet path, and no packet waits for it.
//!
//! ```text
//!           maps of this layout pinned?
//!   open ──── yes ─▶ adopt: read the tables back, exchange the programs in the pinned links
//!        └─── no ──▶ new maps; what stands in those of another layout is carried over
//!                    (`carry`), and the links exchanged, by the first update
//!   update ──▶ diff ──▶ maps, then links
//! ```
//! Dropping [`Loaded`] detaches nothing. Only [`teardown`] does.

mod announce;
mod ask;
mod carry;
mod holder;
mod links;
mod mapped;
mod maps;
mod moved;
mod nat;
mod object;
mod pins;
mod rate;
mod shape;
mod support;
mod sweep;
mod syscall;
mod watch;
mod why;

use std::collections::BTreeMap;
use std::fmt;

use aya::maps::{MapData, RingBuf};
use aya::{Ebpf, EbpfLoader};
use ebpf::Reason;
use ebpf::layout::Interface;
use ebpf::port::{PortHolder, PortKey};
use model::InterfaceId;
use nix::sys::resource::{RLIM_INFINITY, Resource, setrlimit};
use rpc::Deployment;
use rpc::dataplane::{
    Credits, Explained, FrameQuestion, Imported, MOVED_FLOWS_VERSION, MovedFlows, Question, Verdict,
};

use crate::compile::Tables;
use crate::diff::{Change, diff, records};

use announce::Announcer;
use carry::{Carried, Carry};
use maps::Maps;
use pins::Pins;
use sweep::Sweep;

pub use holder::Holder;
pub use object::origin;
pub use sweep::Swept;
pub use watch::{Hits, Watch, named_rule};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("eBPF {object}: {deed}: {cause}")]
    Kernel { deed: &'static str, object: String, cause: String },
    #[error("{0}")]
    Unsupported(String),
    #[error(transparent)]
    Refused(#[from] Refused),
}

/// What was asked cannot be done as it was asked.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Refused(pub String);

impl Error {
    /// The whole chain of causes: the verifier's log is in it.
    fn new(deed: &'static str, object: impl fmt::Display, cause: impl std::error::Error) -> Self {
        let mut text = cause.to_string();
        let mut source = cause.source();
        while let Some(deeper) = source {
            let deeper_text = deeper.to_string();
            if !text.contains(&deeper_text) {
                text = format!("{text}: {deeper_text}");
            }
            source = deeper.source();
        }
        Self::Kernel { deed, object: object.to_string(), cause: text }
    }
}

/// Packets by reason name, of one interface or of the uplink.
pub type Reasons = BTreeMap<String, u64>;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    pub interfaces: BTreeMap<InterfaceId, Reasons>,
    /// What arrived on the uplink and met no interface.
    pub uplink: Reasons,
}

/// The loaded programs and maps. Dropping it detaches nothing.
#[derive(Debug)]
pub struct Loaded {
    bpf: Ebpf,
    maps: Maps,
    pins: Pins,
    tables: Tables,
    adopted: bool,
    /// Links that still run programs of another layout.
    outdated: bool,
    /// The hidden half may differ from the one in force.
    astray: bool,
    sweep: Sweep,
    ports: nat::Sweep,
    announcer: Announcer,
    pub watch: Watch,
}

impl Loaded {
    /// Adopts what is pinned under `Deployment::bpf_dir()`, or loads and pins anew.
    pub fn open(deployment: &Deployment) -> Result<Self, Error> {
        support::check()?;
        if let Err(cause) = setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY) {
            // Kernels since 5.11 account maps to the control group instead.
            tracing::debug!(%cause, "RLIMIT_MEMLOCK: not raised");
        }
        let pins = Pins::of(deployment);
        let same_layout = pins.has_maps();
        pins.prepare()?;
        // Also of an upgrade that was cut short: links may run either's programs then.
        let others = !pins.other_maps()?.is_empty();
        let mut bpf = load(&pins)?;
        links::load_programs(&mut bpf)?;
        let maps = Maps::open(&bpf)?;
        let mut tables = maps.read_back(maps.in_force()?)?;
        let adopted = !pins.pinned_links()?.is_empty();
        let outdated = others || adopted && !same_layout;
        carry::describe(&pins)?;
        if !outdated {
            links::exchange(&mut bpf, &pins)?;
            tables.attachments = links::attachments(&pins)?;
        }
        let sweep = Sweep::default();
        let watch = Watch::open(&bpf)?;
        let astray = true;
        let ports = nat::Sweep::default();
        let announcer = Announcer::default();
        Ok(Self {
            watch,
            bpf,
            maps,
            pins,
            tables,
            adopted,
            outdated,
            astray,
            sweep,
            ports,
            announcer,
        })
    }

    /// Whether pinned programs were found at `open` and taken over.
    pub fn adopted(&self) -> bool {
        self.adopted
    }

    /// What the kernel decides by now (after adoption: as read back).
    pub fn tables(&self) -> &Tables {
        &self.tables
    }

    /// Makes the kernel's tables and attachments into `next`; answers how many
    /// changes it took. Where one fails, what was changed before it stays, and
    /// [`Loaded::tables`] is read back from the kernel.
    ///
    /// Packets meet the old records until all of the new ones stand in the hidden half, and
    /// then the new ones at once. When this returns, no packet is judged by the old ones.
    pub fn update(&mut self, next: Tables) -> Result<usize, Error> {
        self.update_watched(next, &mut |_, _, _| {})
    }

    /// [`Loaded::update`], and `watch` is called after every change, with those that are done
    /// and how many there are: for whoever waits, and for the proof that no packet meets a mixture.
    pub fn update_watched(
        &mut self,
        next: Tables,
        watch: &mut dyn FnMut(&Self, &[Change], usize),
    ) -> Result<usize, Error> {
        self.bring_home()?;
        let changes = diff(&self.tables, &next);
        if let Err(error) = self.apply(&changes, watch) {
            self.astray = true;
            let names = std::mem::take(&mut self.tables.names);
            self.tables = Tables { names, ..self.maps.read_back(self.maps.in_force()?)? };
            self.tables.attachments = links::attachments(&self.pins)?;
            return Err(error);
        }
        let renamed = self.renamed(&next, &changes);
        if renamed {
            self.watch.harvest(&self.tables)?;
        }
        self.announcer.note(&self.tables, &next);
        self.tables = next;
        self.repeat(&changes)?;
        if self.outdated {
            self.take_over()?;
        }
        // A crash may have left a device half attached that is wanted no more.
        links::detach_others(&self.pins, &self.tables.attachments)?;
        Ok(changes.len() + usize::from(renamed))
    }

    /// Whether rules have other names, and nothing else of them changed: no record says so.
    fn renamed(&self, next: &Tables, changes: &[Change]) -> bool {
        let rules = &self.tables.names.rules;
        !changes.contains(&Change::Publish) && !rules.is_empty() && *rules != next.names.rules
    }

    /// From programs of another layout, which go on until ours know what they know.
    fn take_over(&mut self) -> Result<(), Error> {
        let mut carry = Carry::open(&self.pins, &self.tables)?;
        carry.before(&self.maps, &self.watch)?;
        links::exchange(&mut self.bpf, &self.pins)?;
        let Carried { flows, half_flows } = carry.after(&self.maps)?;
        self.pins.remove_other_maps()?;
        self.outdated = false;
        tracing::info!(flows, half_flows, "took over from another layout");
        Ok(())
    }

    /// Makes the hidden half what the one in force is, whatever it was.
    fn bring_home(&mut self) -> Result<(), Error> {
        if self.astray {
            let hidden = self.maps.hidden()?;
            self.maps.apply(&Change::AwaitReaders, hidden)?;
            for change in records(&self.maps.read_back(hidden)?, &self.tables) {
                self.maps.apply(&change, hidden)?;
            }
            self.astray = false;
        }
        Ok(())
    }

    /// What was published is repeated in the half that was left, where nobody reads any more.
    fn repeat(&mut self, changes: &[Change]) -> Result<(), Error> {
        if !changes.contains(&Change::Publish) {
            return Ok(());
        }
        self.astray = true;
        let hidden = self.maps.hidden()?;
        for change in changes.iter().filter(|change| change.is_halved()) {
            self.maps.apply(change, hidden)?;
        }
        self.astray = false;
        Ok(())
    }

    fn apply(
        &mut self,
        changes: &[Change],
        watch: &mut dyn FnMut(&Self, &[Change], usize),
    ) -> Result<(), Error> {
        let hidden = self.maps.hidden()?;
        for (at, change) in changes.iter().enumerate() {
            match change {
                Change::Publish => {
                    self.maps.publish(hidden)?;
                    // Not before it: packets do not wait for the counts.
                    self.watch.harvest(&self.tables)?;
                }
                Change::Attach { ifindex, attachment } => {
                    links::attach(&mut self.bpf, &self.pins, *ifindex, attachment)?;
                }
                Change::Detach { ifindex, attachment } => {
                    links::detach(&self.pins, *ifindex, attachment.role)?;
                }
                change => self.maps.apply(change, hidden)?,
            }
            watch(self, &changes[..=at], changes.len());
        }
        Ok(())
    }

    /// Tells the uplink's neighbours of addresses that have come to this host, each for the
    /// next of its times; call it after [`Loaded::update`] and then about once a second.
    pub fn announce(&mut self) -> Result<(), Error> {
        let frames = self.announcer.frames(&self.tables);
        let uplink = self.tables.config.uplink;
        frames.iter().try_for_each(|frame| announce::send(&self.bpf, uplink, frame))
    }

    pub fn counters(&self) -> Result<Counters, Error> {
        let mut counters =
            Counters { uplink: named(&self.maps.counters(0)?), interfaces: BTreeMap::new() };
        for (ifindex, interface) in &self.tables.interfaces {
            if let Some(id) = self.tables.names.interfaces.get(ifindex) {
                counters.interfaces.insert(*id, named(&self.maps.counters(interface.slot)?));
            }
        }
        Ok(counters)
    }

    /// Ages flows and ports of NAT gateways: a bounded slice of each at each call; call it
    /// about once a second.
    pub fn sweep(&mut self) -> Result<Swept, Error> {
        self.ports.slice(&self.maps, &self.tables)?;
        self.sweep.slice(&self.maps, &self.tables)
    }

    /// Ages all flows at once, for whoever has no daemon that does it each second.
    pub fn sweep_all(&mut self) -> Result<u64, Error> {
        let mut removed = 0;
        for _ in 0..=ebpf::layout::FLOWS_MAX {
            let (swept, done) = self.sweep.whole_slice(&self.maps, &self.tables)?;
            removed += swept.removed;
            if done {
                break;
            }
        }
        self.sweep_ports()?;
        Ok(removed)
    }

    /// Ages all ports of NAT gateways at once; answers how many were given back.
    pub fn sweep_ports(&mut self) -> Result<u64, Error> {
        let mut removed = 0;
        for _ in 0..=ebpf::port::CONNECTIONS_MAX {
            let (some, done) = self.ports.slice(&self.maps, &self.tables)?;
            removed += some;
            if done {
                break;
            }
        }
        Ok(removed)
    }

    /// What a NAT gateway has given away and counted, by its public address.
    pub fn nat_gateway(&self, public: u32) -> Result<(u64, Reasons), Error> {
        let found = self.tables.nat_gateways().find(|(address, _)| *address == public);
        let reasons = match found {
            Some((_, gateway)) => named(&self.maps.counters(gateway.slot)?),
            None => Reasons::new(),
        };
        Ok((self.ports.connections(public), reasons))
    }

    /// Who holds which ports of NAT gateways, as the maps have it.
    pub fn ports(&self) -> Result<Vec<(PortKey, PortHolder)>, Error> {
        self.maps.nat_ports.entries().map_err(|e| Error::new("read", "NAT_PORTS", e))
    }

    /// Connections through gateways that an interface has open, as its quota counts them.
    pub fn translations_open(&self, id: InterfaceId) -> Result<u64, Error> {
        let slot = self.interface(id)?.1.slot;
        let count = |map: &syscall::Map<u32, u64>| map.get(&slot).map(|n| n.unwrap_or(0));
        let failed = |e| Error::new("read", "NAT_OPENED", e);
        let opened = count(&self.maps.nat_opened).map_err(failed)?;
        Ok(opened.saturating_sub(count(&self.maps.nat_swept).map_err(failed)?))
    }

    /// Runs the loaded program on a packet made for the question. Leaves no trace
    /// in flows or counters.
    pub fn why(&self, question: &Question) -> Result<Verdict, Error> {
        why::answer(&self.bpf, &self.tables, question)
    }

    /// Runs the loaded program that serves `ifindex`'s incoming frames on `frame`.
    /// `mark` is `ebpf::ASK_MARK` to leave no trace, `ebpf::TRACE_MARK` to leave what
    /// a real packet would.
    pub fn run(&self, ifindex: u32, frame: &[u8], mark: u32) -> Result<Run, Error> {
        why::run(&self.bpf, &self.tables, ifindex, frame, mark)
    }

    /// The kernel's number for the classifier of that name.
    pub fn program_number(&self, name: &'static str) -> Result<u32, Error> {
        why::classifier(&self.bpf, name)?
            .info()
            .map(|info| info.id())
            .map_err(|e| Error::new("look at", name, e))
    }

    /// The record of an interface that is loaded.
    pub fn interface(&self, id: InterfaceId) -> Result<(u32, &Interface), Error> {
        let named = self.tables.names.interfaces.iter().find(|(_, named)| **named == id);
        named
            .and_then(|(ifindex, _)| Some((*ifindex, self.tables.interfaces.get(ifindex)?)))
            .ok_or_else(|| Refused(format!("interface {id}: it is not on this host")).into())
    }

    /// Tracked flows of an interface.
    pub fn flows_open(&self, id: InterfaceId) -> Result<u64, Error> {
        self.maps.flows_open(self.interface(id)?.1.slot)
    }

    /// What is left of an interface's credits.
    pub fn credits(&self, id: InterfaceId) -> Result<Credits, Error> {
        let slot = self.interface(id)?.1.slot;
        rate::credits(&self.maps, slot).map_err(|e| Error::new("read", "LEVELS", e))
    }

    pub fn export(&self, id: InterfaceId) -> Result<MovedFlows, Error> {
        let interface = self.interface(id)?.1;
        let flows = moved::export(&self.maps, interface)?;
        let missing = rate::missing(&self.maps, interface.slot);
        let missing = missing.map_err(|e| Error::new("export", "LEVELS", e))?.to_vec();
        let ports = moved::export_ports(&self.maps, &self.tables, interface)?;
        Ok(MovedFlows { version: MOVED_FLOWS_VERSION, interface: id, flows, missing, ports })
    }

    pub fn import(&self, moved: &MovedFlows) -> Result<Imported, Error> {
        moved::import(&self.maps, &self.tables, self.interface(moved.interface)?.1, moved)
    }

    /// Runs the loaded program on a frame as it came in, and says what it did.
    pub fn explain(&self, question: &FrameQuestion) -> Result<Explained, Error> {
        why::explain(&self.bpf, &self.tables, question)
    }

    /// The ring that the programs tell events by; once.
    pub fn ring(&mut self) -> Result<RingBuf<MapData>, Error> {
        watch::ring(&mut self.bpf, "EVENT_RING")
    }

    /// What becomes of fragments that overtake their first; once.
    pub fn holder(&mut self) -> Result<Holder, Error> {
        Holder::open(&mut self.bpf)
    }

    /// Runs the uplink's early program on `frame`: its answer (1 drop, 2 pass, 4 redirect)
    /// and the frame after it.
    pub fn run_early_frame(&self, frame: &[u8]) -> Result<(u32, Vec<u8>), Error> {
        why::run_early_frame(&self.bpf, frame)
    }

    /// How long a run of a guest's program takes on a frame that it drops.
    pub fn time(
        &self,
        ifindex: u32,
        frame: &[u8],
        times: u32,
    ) -> Result<std::time::Duration, Error> {
        why::time(&self.bpf, ifindex, frame, times)
    }

    /// Runs the uplink's early program on `frame`: whether it passes.
    pub fn run_early(&self, frame: &[u8]) -> Result<bool, Error> {
        why::run_early(&self.bpf, frame)
    }
}

/// What a program did with a frame.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub reason: Option<Reason>,
    pub egress_rule: u16,
    pub ingress_rule: u16,
    /// As tc knows it: 2 drop, 7 redirect, -1 pass.
    pub code: i32,
    pub frame: Vec<u8>,
    /// A NAT gateway was asked, and found this port (0: none).
    pub translated: Option<u16>,
    /// By the kernel's clock.
    pub took: std::time::Duration,
}

fn load(pins: &Pins) -> Result<Ebpf, Error> {
    let mut loader = EbpfLoader::new();
    for name in maps::NAMES {
        loader.map_pin_path(name, pins.map(name));
    }
    loader.load(object::bytes()).map_err(|e| Error::new("load", "object", e))
}

fn named(counts: &[u64]) -> Reasons {
    Reason::ALL
        .iter()
        .map(|reason| (reason.name().to_owned(), counts[*reason as usize]))
        .filter(|(_, count)| *count > 0)
        .collect()
}

/// What is in force, looked at without touching it: no program is loaded or
/// exchanged, and a daemon that is alive is not disturbed.
#[derive(Debug)]
pub struct Look {
    maps: Maps,
    pub tables: Tables,
}

impl Look {
    /// `None` where nothing of this layout is pinned.
    pub fn open(deployment: &Deployment) -> Result<Option<Self>, Error> {
        let pins = Pins::of(deployment);
        if !pins.has_maps() {
            return Ok(None);
        }
        let maps = Maps::open_pinned(&pins)?;
        let mut tables = maps.read_back(maps.in_force()?)?;
        tables.attachments = links::pinned_attachments(&pins)?;
        Ok(Some(Self { maps, tables }))
    }

    /// Packets by reason of a counter slot; 0 is the uplink's.
    pub fn reasons(&self, slot: u32) -> Result<Reasons, Error> {
        Ok(named(&self.maps.counters(slot)?))
    }

    /// Tracked flows of the interface with this slot.
    pub fn flows(&self, slot: u32) -> Result<u64, Error> {
        self.maps.flows_open(slot)
    }
}

/// Removes every program, map and link of this deployment; also when no daemon lives.
pub fn teardown(deployment: &Deployment) -> Result<(), Error> {
    Pins::of(deployment).remove()
}
