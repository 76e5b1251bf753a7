//! What makes changes durable: syncs that several flushes share, and what becomes of the
//! volume when one fails.

use super::mistake::planted;
use super::{Core, EIO, SYNC_TOKEN};
use crate::volume::request::{Op, Outcome, Token, Trouble};

impl Core {
    pub(super) fn make_durable(&mut self, id: u32) {
        if self.is_mistaken_flush(id) {
            return;
        }
        if self.failed.is_some() {
            let ticket = self.job(id).request.ticket;
            self.remove(id);
            return self.reply(ticket, Err(EIO));
        }
        self.sync_next.push(id);
        self.start_sync();
    }

    pub(super) fn start_sync(&mut self) {
        if self.syncing.is_none() && !self.sync_next.is_empty() {
            self.syncing = Some(std::mem::take(&mut self.sync_next));
            self.ops.push_back((Token(SYNC_TOKEN), Op::Sync));
        }
    }

    pub(super) fn synced(&mut self, outcome: Outcome) {
        let Some(covered) = self.syncing.take() else { unreachable!("no sync was running") };
        let result = match outcome {
            Outcome::Failed(errno) => {
                if !planted!(self, SyncFailureForgotten) {
                    self.fail_volume(&format!("a sync failed with errno {errno}"));
                }
                if planted!(self, FailedSyncAcknowledged) { Ok(Vec::new()) } else { Err(EIO) }
            }
            // A durable write that failed meanwhile used up the error that was this sync's too.
            _ if self.failed.is_some() && !planted!(self, SyncFailureForgotten) => Err(EIO),
            _ => Ok(Vec::new()),
        };
        for id in covered {
            let ticket = self.job(id).request.ticket;
            self.remove(id);
            self.reply(ticket, result.clone());
        }
        self.start_sync();
    }

    /// Keeps what is there: nothing is tried again, and nothing new begun.
    pub(super) fn fail_volume(&mut self, reason: &str) {
        if self.failed.is_none() {
            self.failed = Some(reason.to_owned());
            self.troubles.push_back(Trouble::Failed { reason: reason.to_owned() });
        }
        for range in std::mem::take(&mut self.waiting) {
            let ticket = self.job(range.job).request.ticket;
            self.remove(range.job);
            self.reply(ticket, Err(EIO));
        }
        for id in std::mem::take(&mut self.sync_next) {
            let ticket = self.job(id).request.ticket;
            self.remove(id);
            self.reply(ticket, Err(EIO));
        }
    }
}
