//! Mistakes planted in the core on purpose, so that the crash test shows that it would find
//! them. Outside of tests there are none, at no cost.

use super::Core;

/// Deliberate mistakes, for the crash test to find.
#[cfg(test)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mistake {
    FlushWithoutSync,
    FlushJoinsRunningSync,
    FuaIgnored,
    FuaZeroesNotSynced,
    OverlapsUnordered,
    WaitersPassEachOther,
    SyncFailureForgotten,
    FailedSyncAcknowledged,
    DurableFailureForgotten,
    ShortWriteAcknowledged,
    FenceIgnored,
    FencedWaiterRuns,
    HeadNotMerged,
    TailNotMerged,
    EdgeNotMerged,
}

#[cfg(test)]
impl Mistake {
    pub const ALL: [Self; 15] = [
        Self::FlushWithoutSync,
        Self::FlushJoinsRunningSync,
        Self::FuaIgnored,
        Self::FuaZeroesNotSynced,
        Self::OverlapsUnordered,
        Self::WaitersPassEachOther,
        Self::SyncFailureForgotten,
        Self::FailedSyncAcknowledged,
        Self::DurableFailureForgotten,
        Self::ShortWriteAcknowledged,
        Self::FenceIgnored,
        Self::FencedWaiterRuns,
        Self::HeadNotMerged,
        Self::TailNotMerged,
        Self::EdgeNotMerged,
    ];
}

/// Whether a mistake was planted here.
macro_rules! planted {
    ($core:expr, $mistake:ident) => {{
        #[cfg(test)]
        let found = $core.mistake == Some($crate::volume::core::mistake::Mistake::$mistake);
        #[cfg(not(test))]
        let found = false;
        found
    }};
}
pub(super) use planted;

/// What the flush that was planted wrong does; `false` where none was.
#[cfg(test)]
impl Core {
    pub(super) fn is_mistaken_flush(&mut self, id: u32) -> bool {
        match (self.mistake, &mut self.syncing) {
            (Some(Mistake::FlushWithoutSync), _) => {
                let ticket = self.job(id).request.ticket;
                self.remove(id);
                self.reply(ticket, Ok(Vec::new()));
                true
            }
            (Some(Mistake::FlushJoinsRunningSync), Some(covered)) => {
                covered.push(id);
                true
            }
            _ => false,
        }
    }
}

#[cfg(not(test))]
impl Core {
    pub(super) const fn is_mistaken_flush(&self, _: u32) -> bool {
        false
    }
}
