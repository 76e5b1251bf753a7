//! What the dataplane was told last. Always the whole: it compares for itself.

use std::time::Duration;

use rpc::{dataplane, host};

use crate::lifecycle::backoff;

/// The longest pause between tries: a dataplane that was mended serves all guests
/// that wait for it, and a refused try costs little.
const RETRY_LAST: Duration = Duration::from_secs(2);

#[derive(Debug, Default)]
pub struct Network {
    wanted: dataplane::Desired,
    applied: Option<dataplane::Desired>,
    busy: bool,
    tries: u32,
    retry_at: Duration,
    trouble: Option<String>,
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
                self.trouble = None;
                self.applied = Some(asked);
            }
            Err(error) => {
                self.tries += 1;
                self.retry_at = now + backoff(self.tries).min(RETRY_LAST);
                tracing::warn!(%error, tries = self.tries, "network not applied; trying again");
                self.trouble = Some(error);
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

    /// Whether every interface of the instance has been made, or why not.
    pub fn serves(&self, instance: &host::Instance) -> Result<(), String> {
        let all = instance.interfaces.iter().all(|wanted| {
            self.applied.as_ref().is_some_and(|applied| {
                applied
                    .interfaces
                    .iter()
                    .any(|i| i.id == wanted.id && i.device.name() == wanted.device)
            })
        });
        match &self.trouble {
            _ if all => Ok(()),
            Some(trouble) => Err(trouble.clone()),
            None => Err("the dataplane is at it".to_owned()),
        }
    }

    pub fn generation(&self) -> u64 {
        self.applied.as_ref().map_or(0, |a| a.generation)
    }
}

#[cfg(test)]
mod tests {
    use model::{InstanceId, InterfaceId, Mac};

    use super::*;

    fn waiting() -> host::Instance {
        host::Instance {
            id: InstanceId::from_random(1),
            run: host::Run::Running,
            starts: 1,
            reboots: 0,
            vcpus: 1,
            memory_mib: 128,
            image: "none".to_owned(),
            interfaces: vec![host::AttachedInterface {
                id: InterfaceId::from_random(1),
                device: "tap1".to_owned(),
                mac: Mac([2, 0, 0, 0, 0, 1]),
            }],
            volumes: Vec::new(),
            volumes_max: 1,
        }
    }

    #[test]
    fn a_refusal_is_told_to_those_who_wait_and_tried_again_soon_however_old() {
        let mut network = Network::default();
        network.wish(dataplane::Desired { generation: 1, ..dataplane::Desired::default() });
        let mut now = Duration::ZERO;
        for _ in 0..30 {
            let asked = network.next(now).expect("tried again within two seconds");
            network.applied(asked, Err("planted".to_owned()), now);
            assert_eq!(network.serves(&waiting()), Err("planted".to_owned()));
            now += Duration::from_secs(2);
        }
        let asked = network.next(now).unwrap();
        network.applied(asked, Ok(1), now);
        assert!(network.serves(&waiting()).is_err_and(|cause| cause != "planted"));
        assert_eq!(network.next(now), None);
    }
}
