//! The two conversations with control: what should be, and what is. Each goes on
//! by itself and for ever; control may come and go.

use std::time::Duration;

use rpc::Client;
use rpc::agent::Image;
use rpc::host::Observed;
use tokio::sync::watch;

use super::{Desk, Message};
use crate::lifecycle::backoff;

/// How long one question may stay open at control.
const WAIT_MS: u64 = 20_000;
/// Beyond that, the way is broken.
const POLL_TIMEOUT: Duration = Duration::from_secs(30);
/// Control hears from us at least so often, changed or not.
const REPORT_EVERY: Duration = Duration::from_secs(5);
/// Many changes within so short a time are told as one.
const REPORT_PAUSE: Duration = Duration::from_millis(20);

/// Asks what should be, again and again.
pub async fn poll(control: Client, host: String, desk: Desk) {
    let control = control.with_timeout(POLL_TIMEOUT);
    // The first question asks for whatever there is: what is on disk may be of another life.
    let (mut after, mut wait, mut tries) = (0, 0, 0);
    loop {
        match control.host_desired(&host, after, wait).await {
            Ok(desired) => {
                if tries > 0 {
                    tracing::info!("control is back");
                }
                tries = 0;
                (after, wait) = (desired.revision, WAIT_MS);
                desk.tell(Message::Desired(Box::new(desired))).await;
            }
            Err(error) => {
                tries += 1;
                if tries == 1 {
                    tracing::warn!(%error, "control is not there; going on with its last word");
                }
                tokio::time::sleep(backoff(tries).min(Duration::from_secs(2))).await;
            }
        }
    }
}

/// Tells what is, on each change and now and then; `known` are the images that
/// control has heard of.
pub async fn report(
    control: Client,
    host: String,
    mut observed: watch::Receiver<Observed>,
    known: watch::Sender<Vec<Image>>,
) {
    let mut tries = 0;
    loop {
        let now = observed.borrow_and_update().clone();
        match control.host_observed(&host, &now).await {
            Ok(()) => {
                tries = 0;
                known.send_replace(now.images);
            }
            Err(error) => {
                tries += 1;
                if tries == 1 {
                    tracing::warn!(%error, "control does not hear what is; trying again");
                }
                tokio::time::sleep(backoff(tries).min(Duration::from_secs(2))).await;
                continue;
            }
        }
        match tokio::time::timeout(REPORT_EVERY, observed.changed()).await {
            Ok(Err(_)) => return,
            Ok(Ok(())) => tokio::time::sleep(REPORT_PAUSE).await,
            Err(_) => {}
        }
    }
}
