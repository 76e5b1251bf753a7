//! The questions, one a row, and the goals that stand beside them.

use std::fmt;

use super::address::Transport;
use super::beside::Beside;
use super::contender::{Contender, Medium};
use super::load::{Deed, Load};
use super::storm::Storm;

/// Who makes the load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Client {
    /// Our own, which leaves the cores to the server.
    Lean,
    /// fio's `nbd` engine: somebody else's opinion, at more CPU than most servers.
    Fio,
}

/// What a goal speaks of: ours by the best peer's of the row, or by raw fio's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ratio {
    Operations,
    OfRaw,
    Cpu,
    P50,
    P99,
}

impl Ratio {
    /// Whether more is better.
    pub fn is_at_least(self) -> bool {
        matches!(self, Self::Operations | Self::OfRaw)
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// For `--rows`.
    pub id: &'static str,
    pub load: Load,
    pub transport: Transport,
    pub medium: Medium,
    pub client: Client,
    /// Who else asks the server meanwhile.
    pub beside: Beside,
    pub goals: &'static [(Ratio, f64)],
}

impl Row {
    /// In the order of the report.
    pub fn contenders(&self) -> &'static [Contender] {
        use Contender::{Alone, Nbdkit, Ours, QemuNative, QemuUring, RawFile};
        if self.beside != Beside::Nobody {
            return &[Alone, Ours];
        }
        match self.medium {
            // qemu-nbd's `native` needs O_DIRECT.
            Medium::PageCache => &[QemuUring, Nbdkit, Ours],
            // The file below is the same whatever stands before it: measured once.
            Medium::Disk if self.transport == Transport::Unix && self.load.connections == 1 => {
                &[RawFile, QemuUring, QemuNative, Ours]
            }
            Medium::Disk => &[QemuUring, QemuNative, Ours],
        }
    }
}

const fn load(deed: Deed, block_bytes: u32, depth: u32, connections: u32) -> Load {
    Load { deed, block_bytes, depth, connections }
}

const READ_4K: Load = load(Deed::Read, 4096, 64, 1);
const WRITE_4K: Load = load(Deed::Write, 4096, 64, 1);
const READ_4K_FOUR: Load = load(Deed::Read, 4096, 16, 4);
const READ_4K_ONE: Load = load(Deed::Read, 4096, 1, 1);
const READ_1M: Load = load(Deed::Read, 1 << 20, 8, 1);
const WRITE_1M: Load = load(Deed::Write, 1 << 20, 8, 1);

const fn disk(
    id: &'static str,
    load: Load,
    transport: Transport,
    goals: &'static [(Ratio, f64)],
) -> Row {
    Row {
        id,
        load,
        transport,
        medium: Medium::Disk,
        client: Client::Lean,
        beside: Beside::Nobody,
        goals,
    }
}

const fn cached(
    id: &'static str,
    load: Load,
    transport: Transport,
    goals: &'static [(Ratio, f64)],
) -> Row {
    Row {
        id,
        load,
        transport,
        medium: Medium::PageCache,
        client: Client::Lean,
        beside: Beside::Nobody,
        goals,
    }
}

use Ratio::{Cpu, OfRaw, Operations, P50, P99};
use Transport::{Tcp, Unix};

/// TLS costs the load as much as the server: fio's is GnuTLS.
const fn sealed(id: &'static str, load: Load) -> Row {
    Row { client: Client::Fio, ..cached(id, load, Transport::Tls, &[]) }
}

/// One who reads beside others.
const fn beside(id: &'static str, beside: Beside) -> Row {
    Row { beside, ..disk(id, READ_4K_ONE, Transport::Unix, &[(Ratio::P99, 1.5)]) }
}

pub const ROWS: [Row; 26] = [
    disk("read-unix", READ_4K, Unix, &[(Operations, 1.4), (Cpu, 0.33), (OfRaw, 0.75), (P99, 0.85)]),
    disk("read-tcp", READ_4K, Tcp, &[(Operations, 1.6), (Cpu, 0.33), (OfRaw, 0.75), (P99, 0.85)]),
    disk("write-unix", WRITE_4K, Unix, &[(Operations, 1.4), (Cpu, 0.33), (OfRaw, 0.80)]),
    disk("write-tcp", WRITE_4K, Tcp, &[(Operations, 1.5), (Cpu, 0.33), (OfRaw, 0.80)]),
    disk("four-unix", READ_4K_FOUR, Unix, &[(Operations, 1.35), (Cpu, 0.30)]),
    disk("four-tcp", READ_4K_FOUR, Tcp, &[(Operations, 1.35), (Cpu, 0.30)]),
    cached("cached-unix", READ_4K, Unix, &[(Operations, 1.6), (Cpu, 0.5)]),
    cached("cached-tcp", READ_4K, Tcp, &[(Operations, 2.5), (Cpu, 0.5)]),
    cached("one-cached", READ_4K_ONE, Unix, &[(P50, 0.85)]),
    disk("one-disk", READ_4K_ONE, Unix, &[(P50, 1.0)]),
    disk("large-write-unix", WRITE_1M, Unix, &[(Operations, 1.6), (OfRaw, 0.90), (Cpu, 0.35)]),
    disk("large-write-tcp", WRITE_1M, Tcp, &[(Operations, 1.6), (OfRaw, 0.90), (Cpu, 0.35)]),
    disk("large-read-unix", READ_1M, Unix, &[(Operations, 1.1), (Cpu, 0.8), (P99, 1.0)]),
    disk("large-read-tcp", READ_1M, Tcp, &[(Operations, 1.1), (Cpu, 0.8), (P99, 1.0)]),
    Row { client: Client::Fio, ..disk("fio-read-unix", READ_4K, Unix, &[]) },
    Row { client: Client::Fio, ..disk("fio-write-unix", WRITE_4K, Unix, &[]) },
    sealed("tls-cached", READ_4K),
    sealed("tls-large-read", READ_1M),
    beside("beside-flood", Beside::Flood),
    beside("beside-crowd", Beside::Crowd),
    beside("beside-connections", Beside::Storm(Storm::Connections)),
    beside("beside-half", Beside::Storm(Storm::HalfRequests)),
    beside("beside-slow", Beside::Storm(Storm::SlowReaders)),
    beside("beside-trims", Beside::Storm(Storm::Trims)),
    beside("beside-oversize", Beside::Storm(Storm::OversizeWrites)),
    beside("beside-unknown", Beside::Storm(Storm::Unknown)),
];

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let medium = match self.medium {
            Medium::Disk => "past the page cache",
            Medium::PageCache => "from the page cache",
        };
        let client = match self.client {
            Client::Lean => "",
            Client::Fio => ", fio as the client",
        };
        let Self { id, load, transport, beside, .. } = self;
        write!(f, "{id}: {load}, {medium}, {transport}{client}{beside}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_goal_has_what_it_is_compared_with() {
        for row in &ROWS {
            for (ratio, bound) in row.goals {
                let is_sound = ratio.is_at_least() == (*bound > 1.0 || *ratio == OfRaw)
                    || *bound == 1.0
                    || row.beside != Beside::Nobody;
                assert!(*bound > 0.0 && is_sound);
                let is_raw_measured = ROWS
                    .iter()
                    .any(|r| r.load == row.load && r.contenders().contains(&Contender::RawFile));
                assert!(*ratio != OfRaw || is_raw_measured, "{}", row.id);
            }
            assert!(row.contenders().iter().any(|c| c.is_peer(row.medium)), "{}", row.id);
        }
    }
}
