//! Runs other programs, with a bound on their time and with errors that show
//! what they said.

use std::io::{Read, Write};
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// How often a running program or an awaited condition is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// What a program that ended left behind.
#[derive(Debug)]
pub struct Ended {
    pub line: String,
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// Its output, or an error that shows all of it.
    pub fn success(self) -> anyhow::Result<String> {
        if self.status.success() {
            return Ok(self.stdout);
        }
        bail!("`{}`: {}\n{}{}", self.line, self.status, self.stdout, self.stderr)
    }
}

/// Runs `command` with `input` on its standard input and kills it after `bound`.
pub fn run(command: &mut Command, input: &[u8], bound: Duration) -> anyhow::Result<Ended> {
    let line = shown(command);
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("start `{line}`"))?;
    let mut stdin = child.stdin.take().context("no standard input")?;
    let input = input.to_owned();
    // A program that does not read its input must not block us; its broken pipe is no error of ours.
    let writer = thread::spawn(move || drop(stdin.write_all(&input)));
    let stdout = drain(child.stdout.take().context("no standard output")?);
    let stderr = drain(child.stderr.take().context("no standard error")?);
    let deadline = Instant::now() + bound;
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break Some(status);
        }
        if Instant::now() > deadline {
            child.kill()?;
            child.wait()?;
            break None;
        }
        thread::sleep(LOOK_EVERY);
    };
    let collect = |handle: thread::JoinHandle<Vec<u8>>| {
        String::from_utf8_lossy(&handle.join().unwrap_or_default()).into_owned()
    };
    let (stdout, stderr) = (collect(stdout), collect(stderr));
    drop(writer.join());
    match status {
        Some(status) => Ok(Ended { line, status, stdout, stderr }),
        None => bail!("`{line}`: no end within {} s\n{stdout}{stderr}", bound.as_secs()),
    }
}

/// Runs `command` and gives its standard output; anything but success is an error.
pub fn output(command: &mut Command, bound: Duration) -> anyhow::Result<String> {
    run(command, &[], bound)?.success()
}

/// Waits until `condition` holds, and fails with its last error after `bound`.
pub fn eventually<T>(
    what: &str,
    bound: Duration,
    mut condition: impl FnMut() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let deadline = Instant::now() + bound;
    loop {
        match condition() {
            Ok(value) => return Ok(value),
            Err(error) if Instant::now() > deadline => {
                return Err(error.context(format!("{what}: not within {} s", bound.as_secs())));
            }
            Err(_) => thread::sleep(LOOK_EVERY * 2),
        }
    }
}

fn drain(mut pipe: impl Read + Send + 'static) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        // What was read before an error is still worth showing.
        drop(pipe.read_to_end(&mut bytes));
        bytes
    })
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy().into_owned()).collect::<Vec<_>>().join(" ")
}
