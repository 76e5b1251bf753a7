//! One volume on its way into a guest and out of it.
//!
//! ```text
//!   wanted:      export ──▶ node ──▶ device                 (attached)
//!   not wanted:  device ──▶ node ──▶ export ──▶ gone        (detached)
//! ```
//! What is there is three facts; the next step follows from them and from
//! whether the volume is wanted. A guest that refuses to release a disk leaves
//! `device` true, and is asked again.

use std::time::Duration;

use super::{RELEASE_AGAIN, backoff};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DiskOp {
    Export,
    AddNode,
    AddDevice,
    /// Until the guest has released it.
    Release,
    DeleteNode,
    Unexport,
}

impl DiskOp {
    /// Whether QEMU does it; such a step is void when QEMU ends.
    pub const fn is_machines(self) -> bool {
        !matches!(self, Self::Export | Self::Unexport)
    }
}

#[derive(Debug, Clone, PartialEq)]
pub struct Disk {
    /// Of the attachment that this disk serves; a later attachment begins anew.
    pub generation: u64,
    pub boot: bool,
    pub slot: Option<u32>,
    pub export: bool,
    pub node: bool,
    pub device: bool,
    pub op: Option<DiskOp>,
    pub tries: u32,
    pub retry_at: Duration,
    pub trouble: Option<String>,
}

impl Disk {
    pub const fn new(generation: u64, boot: bool) -> Self {
        Self {
            generation,
            boot,
            slot: None,
            export: false,
            node: false,
            device: false,
            op: None,
            tries: 0,
            retry_at: Duration::ZERO,
            trouble: None,
        }
    }

    /// What to do now, if anything.
    pub fn next(&self, wanted: bool, machine_up: bool, now: Duration) -> Option<DiskOp> {
        if now < self.retry_at || (self.op.is_some() && self.op != Some(DiskOp::Release)) {
            return None;
        }
        let step = match (wanted, self.export, self.node, self.device) {
            // A release that has begun is finished first.
            _ if self.op == Some(DiskOp::Release) && self.device => DiskOp::Release,
            (true, false, _, _) => DiskOp::Export,
            (true, true, false, _) => DiskOp::AddNode,
            (true, true, true, false) => DiskOp::AddDevice,
            (true, true, true, true) => return None,
            (false, _, _, true) => DiskOp::Release,
            (false, _, true, false) => DiskOp::DeleteNode,
            (false, true, false, false) => DiskOp::Unexport,
            (false, false, false, false) => return None,
        };
        (machine_up || !step.is_machines()).then_some(step)
    }

    pub fn begin(&mut self, op: DiskOp, now: Duration) {
        self.op = Some(op);
        if op == DiskOp::Release {
            self.retry_at = now + RELEASE_AGAIN;
        }
    }

    /// Takes the result of `op`; false if that was not asked for.
    pub fn end(&mut self, op: DiskOp, result: Result<(), String>, now: Duration) -> bool {
        if self.op != Some(op) {
            return false;
        }
        match result {
            Ok(()) => {
                match op {
                    DiskOp::Export => self.export = true,
                    DiskOp::AddNode => self.node = true,
                    DiskOp::AddDevice => self.device = true,
                    // Asked only; `released` ends it.
                    DiskOp::Release => return true,
                    DiskOp::DeleteNode => self.node = false,
                    DiskOp::Unexport => self.export = false,
                }
                self.op = None;
                self.tries = 0;
                self.trouble = None;
            }
            Err(trouble) => {
                self.tries += 1;
                self.retry_at = now + backoff(self.tries);
                self.trouble = Some(trouble);
                if op == DiskOp::AddDevice {
                    // The slot is free again, for this disk or for another.
                    self.slot = None;
                }
                if op != DiskOp::Release {
                    self.op = None;
                }
            }
        }
        true
    }

    /// The guest let go of it, asked or not.
    pub fn released(&mut self) {
        self.device = false;
        self.slot = None;
        if self.op == Some(DiskOp::Release) {
            self.op = None;
        }
        self.tries = 0;
        self.retry_at = Duration::ZERO;
        self.trouble = None;
    }

    /// QEMU has ended: nothing is plugged in any more.
    pub fn machine_ended(&mut self) {
        self.device = false;
        self.node = false;
        self.slot = None;
        if self.op.is_some_and(DiskOp::is_machines) {
            self.op = None;
        }
        self.retry_at = Duration::ZERO;
    }

    pub const fn is_gone(&self) -> bool {
        !self.export && !self.node && !self.device && self.op.is_none()
    }
}
