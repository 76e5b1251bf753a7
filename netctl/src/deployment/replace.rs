//! A daemon replaced by a newer one while it serves.
//!
//! ```text
//!   netctl up ─▶ SIGHUP ─▶ supervisor ─▶ starts the new one beside the old
//!       new one ready, old one gone ─▶ the pid file is renamed: replaced
//!       new one gone, old one there ─▶ as if nothing had been: refused
//! ```
//! Only the block server hands its connections on; the other daemons lose nothing
//! by a restart. Two pid files, so that no process is ever without one.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rpc::Deployment;
use rustix::process::Signal;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};
use tokio::time::{Instant, sleep_until, timeout};

use super::config::{Config, read_json};
use super::place::Files;
use super::process::{END_WITHIN, Identity, end_by_file};
use super::supervise::{DaemonPicture, Event, Keeper, LATE, Picture, describe, end_child};
use super::{report, up};
use crate::failure::{Failure, Outcome};
use crate::output;
use crate::waiting::now;

/// The daemon that takes over from the one before it.
pub const TAKES_OVER: &str = "block-server";

/// Beyond the daemon's own bound, for the supervisor to say how it ended.
const SLACK: Duration = Duration::from_secs(12);

/// The pid file of one that is not yet in its predecessor's place.
pub fn pid_file_of_next(deployment: &Deployment) -> PathBuf {
    deployment.pid_file(&format!("{TAKES_OVER}.next"))
}

pub type Said = Option<Lines<BufReader<ChildStdout>>>;

/// What the daemon says; its output is read once.
pub fn said(child: &mut Child) -> Said {
    child.stdout.take().map(|out| BufReader::new(out).lines())
}

/// Resolves when it says that it is ready.
pub async fn ready(said: &mut Said) {
    while let Some(lines) = said {
        match lines.next_line().await {
            Ok(Some(line)) if line.trim() == "ready" => return,
            Ok(Some(_)) => {}
            Ok(None) | Err(_) => *said = None,
        }
    }
    std::future::pending().await
}

/// How a replacement ended.
pub enum Replaced {
    By(Box<Child>, Said),
    /// The old one is as it was, or ends as it would have ended.
    Not,
    Stopped,
}

impl Keeper {
    /// Starts a successor beside `old` and waits until one of them is over.
    pub async fn replace(&mut self, old: &mut Child) -> Replaced {
        let pid_file = pid_file_of_next(&self.deployment);
        let refused = |keeper: &Self, how: String| {
            let _ = std::fs::remove_file(&pid_file);
            keeper.tell(Event::Refused { how });
            Replaced::Not
        };
        let mut new = match self.spawn(&pid_file) {
            Ok(new) => new,
            Err(e) => return refused(self, format!("cannot start: {e}")),
        };
        let within = Duration::from_secs(self.config.ready_within_s);
        let deadline = Instant::now() + within;
        let mut said = said(&mut new);
        tokio::select! {
            () = ready(&mut said) => {}
            end = new.wait() => return refused(self, describe(end)),
            () = sleep_until(deadline) => {
                end_child(&mut new).await;
                return refused(self, format!("{LATE} {} s", within.as_secs()));
            }
            _ = self.stopped.changed() => {
                end_child(&mut new).await;
                end_child(old).await;
                return Replaced::Stopped;
            }
        }
        if timeout(END_WITHIN, old.wait()).await.is_err() {
            // It serves no more, and holds on to something.
            end_child(old).await;
        }
        if let Err(e) = std::fs::rename(&pid_file, self.deployment.pid_file(self.daemon)) {
            eprintln!("supervisor: {}: {e}", pid_file.display());
        }
        self.tell(Event::Replaced { pid: new.id() });
        Replaced::By(Box::new(new), said)
    }
}

/// What a supervisor finds that comes after one which was killed: at most one of
/// them, in its place, to be taken over from.
pub fn settle(deployment: &Deployment) -> Outcome {
    let (own, next) = (deployment.pid_file(TAKES_OVER), pid_file_of_next(deployment));
    let is_alive = |file: &Path| Identity::read(file).ok().flatten().is_some_and(|i| i.is_alive());
    if is_alive(&own) || !is_alive(&next) {
        return end_by_file(&next).map(drop);
    }
    std::fs::rename(&next, &own)
        .map_err(|e| Failure::failed(format!("file {}: rename: {e}", next.display())))
}

/// A predecessor that is not our child, if one lives.
pub fn predecessor(deployment: &Deployment) -> bool {
    let identity = Identity::read(&deployment.pid_file(TAKES_OVER)).ok().flatten();
    identity.is_some_and(|i| i.is_alive())
}

/// Whether what runs is another file than what is installed now.
fn is_outdated(deployment: &Deployment, config: &Config) -> Outcome<bool> {
    use std::os::unix::fs::MetadataExt;
    let Some(identity) = Identity::read(&deployment.pid_file(TAKES_OVER))? else {
        return Ok(false);
    };
    if !identity.is_alive() {
        return Ok(false);
    }
    let inode = |path: &Path| std::fs::metadata(path).map(|m| (m.dev(), m.ino()));
    // This link leads to the file that runs, also when its name is another's by now.
    let runs = inode(Path::new(&format!("/proc/{}/exe", identity.pid)));
    let installed = inode(&config.executable(TAKES_OVER));
    Ok(matches!((runs, installed), (Ok(runs), Ok(installed)) if runs != installed))
}

/// Has a running deployment's block server replaced where a newer one is
/// installed, and waits for it.
pub fn replace_outdated(deployment: &Deployment, config: &Config) -> Outcome {
    let _alone = up::lock(deployment)?;
    if !is_outdated(deployment, config)? {
        return Ok(());
    }
    let Some(before) = picture_of(deployment)? else { return Ok(()) };
    let failed = |cause: String| Failure::failed(format!("daemon {TAKES_OVER}: replace: {cause}"));
    let supervisor = before.0.supervisor.find();
    let Some(supervisor) = supervisor.filter(|_| before.0.replaces) else {
        output::note("another block-server is installed; it serves after netctl down and up");
        return Ok(());
    };
    supervisor.signal(Signal::HUP).map_err(|e: io::Error| failed(e.to_string()))?;
    let deadline = now() + Duration::from_secs(config.ready_within_s) + SLACK;
    while now() < deadline {
        let Some((_, daemon)) = picture_of(deployment)? else { break };
        if daemon.replaced > before.1.replaced {
            output::note("block-server: replaced by the one that is installed now");
            return Ok(());
        }
        if daemon.refused > before.1.refused {
            let how = daemon.last_refusal.unwrap_or_default();
            let log = deployment.log_of(TAKES_OVER);
            return Err(failed(format!(
                "{how}; the one that ran before serves on; the log is {}{}",
                log.display(),
                report::quote_log(&log)
            )));
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(failed("the supervisor does not say how it ended".to_owned()))
}

fn picture_of(deployment: &Deployment) -> Outcome<Option<(Picture, DaemonPicture)>> {
    let picture: Option<Picture> = read_json(&deployment.status_file())?;
    Ok(picture.and_then(|picture| {
        let daemon = picture.daemons.iter().find(|d| d.name == TAKES_OVER)?.clone();
        Some((picture, daemon))
    }))
}
