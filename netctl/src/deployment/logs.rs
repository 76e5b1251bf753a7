//! `netctl logs`: what a daemon wrote.

use std::fs;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::PossibleValuesParser;

use super::place::Place;
use super::report::end_of;
use crate::failure::{Failure, Outcome};

/// Of each log, without `--follow` as with it: enough for the last hours of a quiet
/// daemon, and it scrolls by in a moment.
const SHOWN_BYTES: u64 = 64 << 10;

/// How often a followed log is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(200);

const SOURCES: [&str; 5] = ["supervisor", "block-server", "dataplane", "control", "agent"];

#[derive(Debug, Args)]
#[command(after_help = "EXAMPLES:
  netctl logs agent
  netctl logs dataplane --follow")]
pub struct Logs {
    /// Whose log; all of them without it
    #[arg(value_parser = PossibleValuesParser::new(SOURCES))]
    pub daemon: Option<String>,

    /// Go on as lines are written, until interrupted
    #[arg(long, short)]
    pub follow: bool,
}

struct Followed {
    path: PathBuf,
    offset: u64,
}

pub fn run(place: &Place, logs: &Logs) -> Outcome {
    let deployment = place.deployment()?;
    let sources: Vec<&str> = match &logs.daemon {
        Some(daemon) => vec![daemon],
        None => SOURCES.to_vec(),
    };
    let mut followed = Vec::new();
    let mut found = false;
    for source in &sources {
        let path = deployment.log_of(source);
        let text = end_of(&path, SHOWN_BYTES).unwrap_or_default();
        let offset = fs::metadata(&path).map_or(0, |m| m.len());
        found |= path.exists();
        if sources.len() > 1 && path.exists() {
            say(&format!("==> {source} <==\n"))?;
        }
        say(&text)?;
        followed.push(Followed { path, offset });
    }
    if !found {
        return Err(Failure::failed(format!(
            "deployment {}: it has no log under {}",
            deployment.name(),
            deployment.run_dir().join("log").display()
        ))
        .hint(format!("sudo netctl up{}", place.as_options())));
    }
    if !logs.follow {
        return Ok(());
    }
    loop {
        std::thread::sleep(LOOK_EVERY);
        for log in &mut followed {
            say(&log.news())?;
        }
    }
}

impl Followed {
    /// What was written since the last look. A log that became shorter was set
    /// aside, so the new one is read from its beginning.
    fn news(&mut self) -> String {
        let mut read = || -> std::io::Result<Vec<u8>> {
            let mut file = fs::File::open(&self.path)?;
            if file.metadata()?.len() < self.offset {
                self.offset = 0;
            }
            file.seek(SeekFrom::Start(self.offset))?;
            let mut bytes = Vec::new();
            file.read_to_end(&mut bytes)?;
            self.offset += bytes.len() as u64;
            Ok(bytes)
        };
        String::from_utf8_lossy(&read().unwrap_or_default()).into_owned()
    }
}

fn say(text: &str) -> Outcome {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())
        .and_then(|()| out.flush())
        .map_err(|e| Failure::failed(format!("log: show: {e}")))
}
