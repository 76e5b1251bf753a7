//! `netctl status`: which daemons run, what is wrong, and what to do about it.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::path::Path;
use std::time::Duration;

use clap::Args;
use rpc::{Client, Deployment};
use serde::Serialize;

use super::config::{Config, read_json};
use super::place::{DAEMONS, Files, Place};
use super::process::Identity;
use super::restart::STEADY_AFTER;
use super::supervise::{Phase, Picture, now_s};
use crate::failure::{Failure, Outcome};
use crate::output::{self, Format};

/// A daemon that is well answers at once.
const ASK_WITHIN: Duration = Duration::from_secs(5);

/// How much of a log's end is quoted, in lines and in bytes.
const QUOTE_LINES: usize = 8;
const QUOTE_BYTES: u64 = 8 << 10;

#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:
  netctl status
  netctl status -o json

EXIT STATUS: 0 all is well; 1 something is not, or nothing is up.")]
pub struct Status {}

#[derive(Debug, Serialize)]
struct Report {
    name: String,
    up: bool,
    endpoint: Option<String>,
    supervisor_pid: Option<i32>,
    daemons: Vec<DaemonReport>,
    troubles: Vec<Trouble>,
}

#[derive(Debug, Serialize)]
struct DaemonReport {
    name: String,
    /// `ready`, `starting`, `waiting`, `ended`, or `unsupervised`.
    state: String,
    pid: Option<i32>,
    restarts: u32,
    version: Option<String>,
    detail: Option<String>,
}

#[derive(Debug, Serialize)]
struct Trouble {
    what: String,
    next: String,
}

pub fn run(place: &Place, format: Format) -> Outcome {
    let deployment = place.deployment()?;
    let Some(config) = Config::read(&deployment)? else {
        if format == Format::Json {
            output::json(&Report {
                name: deployment.name().to_owned(),
                up: false,
                endpoint: None,
                supervisor_pid: None,
                daemons: vec![],
                troubles: vec![],
            })?;
        }
        return Err(Failure::failed(format!(
            "deployment {}: it is not up ({} is not there)",
            deployment.name(),
            deployment.config_file().display()
        ))
        .hint(format!("sudo netctl up{}", place.as_options())));
    };
    let report = look(&deployment, &config, place)?;
    if format == Format::Json {
        output::json(&report)?;
    } else {
        show(&report);
    }
    match report.troubles.len() {
        0 => Ok(()),
        n => Err(Failure::failed(format!(
            "deployment {}: {n} thing{} wrong, see above",
            report.name,
            if n == 1 { " is" } else { "s are" }
        ))),
    }
}

fn look(deployment: &Deployment, config: &Config, place: &Place) -> Outcome<Report> {
    let mut troubles = Vec::new();
    let picture: Option<Picture> = read_json(&deployment.status_file())?;
    let supervisor = Identity::read(&deployment.pid_file("supervisor"))?.filter(Identity::is_alive);
    if supervisor.is_none() {
        troubles.push(Trouble {
            what: "the supervisor is not running, so nobody restarts a daemon that ends".to_owned(),
            next: format!("sudo netctl up{}", place.as_options()),
        });
    }
    let daemons = DAEMONS
        .iter()
        .map(|name| {
            let seen = picture.as_ref().and_then(|p| p.daemons.iter().find(|d| d.name == *name));
            let identity = Identity::read(&deployment.pid_file(name)).ok().flatten();
            let alive = identity.filter(Identity::is_alive);
            let state = match (&supervisor, seen, &alive) {
                (Some(_), Some(seen), _) => seen.phase.name(),
                (_, _, Some(_)) => "unsupervised",
                (_, _, None) => "ended",
            };
            let answer = match &alive {
                Some(_) if state == Phase::Ready.name() || state == "unsupervised" => {
                    Some(ask(deployment, name))
                }
                _ => None,
            };
            let log = deployment.log_of(name);
            if let Some(seen) = seen
                && supervisor.is_some()
                && seen.phase != Phase::Ready
            {
                let end = seen.last_end.as_deref().unwrap_or("it has not said `ready` yet");
                let loops = if seen.looping { "crashes again and again" } else { "is not ready" };
                troubles.push(Trouble {
                    what: format!("daemon {name} {loops}: {end}{}", quote_log(&log)),
                    next: format!("netctl logs {name}{}", place.as_options()),
                });
            }
            if let Some(seen) = seen
                && supervisor.is_some()
                && seen.phase == Phase::Ready
                && seen.looping
                && now_s().saturating_sub(seen.since_s) < STEADY_AFTER.as_secs()
            {
                let end = seen.last_end.as_deref().unwrap_or_default();
                troubles.push(Trouble {
                    what: format!(
                        "daemon {name} crashes again and again after its start: {end}{}",
                        quote_log(&log)
                    ),
                    next: format!("netctl logs {name}{}", place.as_options()),
                });
            }
            if let Some(Err(error)) = &answer {
                troubles.push(Trouble {
                    what: format!("daemon {name} runs and does not answer: {error}"),
                    next: format!("netctl logs {name}{}", place.as_options()),
                });
            }
            let answer = answer.and_then(Result::ok);
            if let Some(trouble) = answer.as_ref().and_then(|a| a.trouble) {
                troubles.push(Trouble {
                    what: format!("daemon {name}: {trouble}{}", quote_log(&log)),
                    next: format!("netctl logs {name}{}", place.as_options()),
                });
            }
            DaemonReport {
                name: (*name).to_owned(),
                state: state.to_owned(),
                pid: alive.map(|a| a.pid),
                restarts: seen.map_or(0, |s| s.restarts),
                version: answer.as_ref().map(|a| a.version.clone()),
                detail: answer.map(|a| a.detail),
            }
        })
        .collect::<Vec<_>>();
    let own = env!("CARGO_PKG_VERSION");
    for daemon in &daemons {
        if daemon.version.as_deref().is_some_and(|v| v != own) {
            troubles.push(Trouble {
                what: format!(
                    "daemon {} is version {}, and netctl is {own}",
                    daemon.name,
                    daemon.version.as_deref().unwrap_or_default()
                ),
                next: format!("sudo netctl down{0} && sudo netctl up{0}", place.as_options()),
            });
        }
    }
    Ok(Report {
        name: deployment.name().to_owned(),
        up: supervisor.is_some(),
        endpoint: Some(format!("http://{}", config.listen)),
        supervisor_pid: supervisor.map(|s| s.pid),
        daemons,
        troubles,
    })
}

struct Answer {
    version: String,
    detail: String,
    /// What the daemon itself knows to be wrong.
    trouble: Option<&'static str>,
}

fn ask(deployment: &Deployment, daemon: &str) -> Result<Answer, rpc::Error> {
    let client = Client::new(deployment.socket_of(daemon)).with_timeout(ASK_WITHIN);
    crate::wait_for(async {
        Ok(match daemon {
            "block-server" => {
                let s = client.block_status().await?;
                Answer {
                    version: s.version,
                    detail: format!(
                        "engine {}, {} volumes, {} exports, {} connections",
                        s.engine, s.volumes, s.exports, s.connections
                    ),
                    trouble: None,
                }
            }
            "dataplane" => {
                let s = client.dataplane_status().await?;
                Answer {
                    version: s.version,
                    detail: format!(
                        "programs {}{}, generation {}, {} interfaces, {} flows",
                        s.object.origin,
                        if s.adopted { " (adopted)" } else { "" },
                        s.generation,
                        s.interfaces.len(),
                        s.flows
                    ),
                    // It says 0 while an accepted state is not applied whole.
                    trouble: (s.generation == 0 && !s.interfaces.is_empty()).then_some(
                        "it cannot apply what is asked of it; guests wait for their network",
                    ),
                }
            }
            "control" => {
                let s = client.control_status().await?;
                Answer {
                    version: s.version,
                    detail: format!(
                        "{} {}, store {} at revision {}, {} hosts",
                        s.region,
                        s.endpoint,
                        s.store,
                        s.revision,
                        s.hosts.len()
                    ),
                    trouble: None,
                }
            }
            _ => {
                let s = client.agent_status().await?;
                Answer {
                    version: s.version,
                    detail: format!(
                        "{} ({}), {} instances",
                        s.accelerator,
                        s.accelerator_reason,
                        s.instances.len()
                    ),
                    trouble: None,
                }
            }
        })
    })
}

fn show(report: &Report) {
    let rows: Vec<Vec<String>> = report
        .daemons
        .iter()
        .map(|d| {
            vec![
                d.name.clone(),
                d.state.clone(),
                d.pid.map(|p| p.to_string()).unwrap_or_default(),
                d.restarts.to_string(),
                d.version.clone().unwrap_or_default(),
                d.detail.clone().unwrap_or_default(),
            ]
        })
        .collect();
    output::table(&["DAEMON", "STATE", "PID", "RESTARTS", "VERSION", "DETAIL"], &rows);
    for trouble in &report.troubles {
        output::line(&format!("\n! {}\n  next: {}", trouble.what, trouble.next));
    }
}

/// The last lines of a log, indented, to stand below a message; empty where
/// there are none.
pub fn quote_log(log: &Path) -> String {
    let Ok(text) = end_of(log, QUOTE_BYTES) else { return String::new() };
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(QUOTE_LINES)..]
        .iter()
        .map(|line| format!("\n    | {line}"))
        .collect()
}

/// The last `bytes_max` of a file, from the first whole line on.
pub fn end_of(path: &Path, bytes_max: u64) -> std::io::Result<String> {
    let mut file = fs::File::open(path)?;
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(bytes_max)))?;
    let mut bytes = Vec::new();
    file.take(bytes_max).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    Ok(if length > bytes_max {
        text.split_once('\n').map_or(String::new(), |(_, rest)| rest.to_owned())
    } else {
        text
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_quoted_by_its_last_whole_lines() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("x.log");
        assert_eq!(quote_log(&log), "");
        let text: String = (0..5000).map(|n| format!("line {n}\n")).collect();
        fs::write(&log, text).unwrap();
        let quote = quote_log(&log);
        assert!(quote.ends_with("\n    | line 4999"), "{quote}");
        assert_eq!(quote.lines().count(), QUOTE_LINES + 1);
        assert!(end_of(&log, 100).unwrap().starts_with("line "));
    }
}
