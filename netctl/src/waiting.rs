//! Waiting for the machine to catch up with what was asked, with a spinner where
//! somebody watches.

use std::io::IsTerminal;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use crate::failure::{Failure, Outcome};

/// `control` answers from memory, so that looking often costs nothing.
const LOOK_EVERY: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub struct Look {
    pub is_done: bool,
    /// What was seen, for the spinner and for the error.
    pub seen: String,
}

/// Looks until it is done. `what` says what is waited for, such as `instance
/// i-…: wait for running`.
pub fn until(what: &str, patience: Duration, mut look: impl FnMut() -> Outcome<Look>) -> Outcome {
    let deadline = now() + patience;
    let spinner = spinner();
    loop {
        let Look { is_done, seen } = look()?;
        if is_done {
            spinner.finish_and_clear();
            return Ok(());
        }
        spinner.set_message(format!("{what}: {seen}"));
        if now() >= deadline {
            spinner.finish_and_clear();
            return Err(Failure::failed(format!(
                "{what}: not within {} s; it is {seen}",
                patience.as_secs()
            )));
        }
        std::thread::sleep(LOOK_EVERY);
    }
}

/// Shows that something goes on while `act` does; on a terminal only.
pub fn during<T>(what: &str, act: impl FnOnce() -> T) -> T {
    let spinner = spinner();
    spinner.set_message(what.to_owned());
    let result = act();
    spinner.finish_and_clear();
    result
}

/// Shown on a terminal only: a log file gets no moving pictures.
pub fn spinner() -> ProgressBar {
    if !std::io::stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

#[expect(clippy::disallowed_methods, reason = "waiting is a shell's work")]
pub fn now() -> Instant {
    Instant::now()
}
