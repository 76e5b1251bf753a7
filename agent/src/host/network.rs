//! What the dataplane was told last. Always the whole: it compares for itself.

use std::time::Duration;

use rpc::{dataplane, host};

use crate::lifecycle::backoff;

#[derive(Debug, Default)]
pub struct Network {
    wanted: dataplane::Desired,
    applied: Option<dataplane::Desired>,
    busy: bool,
    tries: u32,
    retry_at: Duration,
}

impl Network {
    pub fn wish(&mut self, wanted: dataplane::Desired) {
        if wanted != self.wanted {
            self.retry_at = Duration::ZERO;
            self.wanted = wanted;
        }
    }

    /// What to apply now, if anything.
    pub fn next(&mut self, now: Duration) -> Option<dataplane::Desired> {
        // Generation 0 is the wish of a control that has not spoken yet.
        let needed = self.wanted.generation > 0 && self.applied.as_ref() != Some(&self.wanted);
        if !needed || self.busy || now < self.retry_at {
            return None;
        }
        self.busy = true;
        Some(self.wanted.clone())
    }

    pub fn applied(
        &mut self,
        asked: dataplane::Desired,
        result: Result<u64, String>,
        now: Duration,
    ) {
        self.busy = false;
        match result {
            Ok(generation) => {
                tracing::info!(generation, "network applied");
                self.tries = 0;
                self.applied = Some(asked);
            }
            Err(error) => {
                self.tries += 1;
                self.retry_at = now + backoff(self.tries);
                tracing::warn!(%error, tries = self.tries, "network not applied; trying again");
            }
        }
    }

    /// The generation that the dataplane says it has; another than ours means
    /// that it began anew or that someone else spoke to it.
    pub fn found(&mut self, generation: u64) {
        if self.applied.as_ref().is_some_and(|a| a.generation != generation) && !self.busy {
            tracing::warn!(generation, "the dataplane has another generation; applying ours again");
            self.applied = None;
        }
    }

    /// Whether every interface of the instance has been made.
    pub fn serves(&self, instance: &host::Instance) -> bool {
        instance.interfaces.iter().all(|wanted| {
            self.applied.as_ref().is_some_and(|applied| {
                applied
                    .interfaces
                    .iter()
                    .any(|i| i.id == wanted.id && i.device.name() == wanted.device)
            })
        })
    }

    pub fn generation(&self) -> u64 {
        self.applied.as_ref().map_or(0, |a| a.generation)
    }
}
