//! A world from a seed: for trying crashes, lost writes and failing disks by
//! the thousand a second. It knows nothing of ours; a test adapts a core to it.
//!
//! - [`Random`]: one `u64` reproduces a history.
//! - [`Swarm`]: the mix of operations is itself drawn, since a fixed mix visits
//!   the same streets in every history.
//! - [`Disk`]: forgets, tears and reorders what was not synced.
//! - [`Marks`]: which states a campaign has reached, so that one which never
//!   reaches them fails.
//! - [`Fuzz`]: where a seed's luck is not enough, libFuzzer looks for what was not
//!   reached yet.

#![forbid(unsafe_code)]

mod disk;
mod fuzz;
mod marks;
mod random;
mod skip;
mod swarm;

pub use disk::{Disk, Done, Fault, Faults, Op, SECTOR};
pub use fuzz::Fuzz;
pub use marks::Marks;
pub use random::{Random, is_full, seed_from_environment};
pub use skip::skip;
pub use swarm::Swarm;
