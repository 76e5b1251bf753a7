//! What an instance is told, and what it asks for.

use std::collections::{BTreeMap, BTreeSet};

use model::VolumeId;
use rpc::host;

use super::Record;

#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// What control wants, whole.
    Wish(Box<host::Instance>),
    /// Whether the dataplane has made this instance's interfaces, or why not.
    Network(Result<(), String>),
    Exported(VolumeId, Result<(), String>),
    Unexported(VolumeId, Result<(), String>),
    /// The block server has lost an export that we had.
    ExportLost(VolumeId),
    Machine {
        epoch: u64,
        event: MachineEvent,
    },
    /// Time has passed.
    Tick,
}

#[derive(Debug, Clone, PartialEq)]
pub enum MachineEvent {
    /// QEMU answers, first or again; this is all that it holds.
    Seen(Seen),
    /// No QEMU of this instance runs on this host. Answers `Adopt`.
    Absent,
    /// There may be one, but that cannot be told now. Answers `Adopt`.
    Unclear(String),
    /// QEMU could not be started; none of ours runs.
    StartFailed(String),
    /// The process has ended.
    Exited,
    /// The guest has powered itself off; QEMU waits.
    GuestOff,
    ResetDone(Result<(), String>),
    NodeAdded(VolumeId, Result<(), String>),
    DeviceAdded(VolumeId, Result<(), String>),
    /// The guest was asked to release the disk, or could not be asked.
    ReleaseAsked(VolumeId, Result<(), String>),
    /// The guest has released it.
    DeviceGone(VolumeId),
    NodeDeleted(VolumeId, Result<(), String>),
    CleanedUp(Result<(), String>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestRun {
    Running,
    /// Powered off; QEMU keeps the process.
    Off,
    /// After a reset, before it was told to go on.
    Paused,
}

/// Where a disk is plugged in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sight {
    pub slot: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub run: GuestRun,
    pub devices: BTreeMap<VolumeId, Sight>,
    pub nodes: BTreeSet<VolumeId>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StartDisk {
    pub volume: VolumeId,
    pub slot: u32,
    pub boot: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Make this durable before any later effect begins.
    Remember(Record),
    Export {
        volume: VolumeId,
        generation: u64,
    },
    Unexport {
        volume: VolumeId,
    },
    /// Look for a QEMU that an earlier agent started. Answered by `Seen`, `Absent` or `Unclear`.
    Adopt {
        epoch: u64,
    },
    /// Answered by `Seen`, `StartFailed` or `Exited`.
    Start {
        epoch: u64,
        wish: Box<host::Instance>,
        disks: Vec<StartDisk>,
    },
    /// Press the power button. Not answered.
    PowerDown,
    /// Reset and go on. Answered by `ResetDone`.
    Reset,
    /// Not answered, but by `Exited`.
    Quit,
    Kill,
    AddNode {
        volume: VolumeId,
    },
    AddDevice {
        volume: VolumeId,
        slot: u32,
        boot: bool,
    },
    DeleteDevice {
        volume: VolumeId,
    },
    DeleteNode {
        volume: VolumeId,
    },
    /// Have the guest see this size, where it sees a smaller one. Not answered.
    ShowSize {
        volume: VolumeId,
        size: u64,
    },
    /// Remove the control group and the run files.
    CleanUp,
}
