//! All of a process's threads stand still, and what they lay down is gathered.

use std::io;
use std::time::Duration;

use tokio::time::timeout;

use super::Load;
use crate::worker::{Gone, Handle, Parked};

/// How long the disk may take to end what is in flight. A successor waits longer.
const STILL_MAX: Duration = Duration::from_secs(20);

/// One group after the other, each group's threads at the same time. `name` says what the
/// listener is called that a connection of a thread came in by; threads count through all
/// groups. On an error the caller has all go on, those with nothing to take up, too:
/// a thread that stands still later than that finds nobody waiting, and goes on by itself.
pub async fn gather(
    groups: &[&[Handle]],
    mut name: impl FnMut(usize, Parked) -> Option<(String, Parked)>,
) -> Result<Load, (io::Error, Load)> {
    let gone = |Gone| io::Error::other("a worker thread has ended");
    let mut load = Load::default();
    let all = async {
        let mut first = 0;
        for group in groups {
            let asked: Result<Vec<_>, _> = group.iter().map(Handle::begin_park).collect();
            for (worker, answer) in (first..).zip(asked.map_err(gone)?) {
                let still = answer.await.map_err(|_| gone(Gone))?;
                load.volumes.extend(still.volumes);
                let named = still.connections.into_iter().filter_map(|c| name(worker, c));
                load.connections.extend(named);
            }
            first += group.len();
        }
        Ok(())
    };
    let stood = timeout(STILL_MAX, all).await.unwrap_or_else(|_| {
        let seconds = STILL_MAX.as_secs();
        Err(io::Error::other(format!("the disk did not answer within {seconds} s")))
    });
    match stood {
        Ok(()) => Ok(load),
        Err(error) => Err((error, load)),
    }
}
