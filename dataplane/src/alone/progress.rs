//! How far an application has come, for whoever waits at a terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// Fewer changes are done before anybody has read the line.
const CHANGES_WORTH_IT: usize = 100;

/// A bar on standard error, which the library hides where that is no terminal; gone with the
/// last change.
#[derive(Default)]
pub struct Progress(Option<ProgressBar>);

impl Progress {
    /// After each change: so many of `all` are done.
    pub fn tell(&mut self, done: usize, all: usize) {
        if all < CHANGES_WORTH_IT {
            return;
        }
        let bar = self.0.get_or_insert_with(|| {
            let bar = ProgressBar::new(all as u64);
            let template = "{wide_bar} {pos} of {len} changes, {eta} left";
            match ProgressStyle::with_template(template) {
                Ok(style) => bar.with_style(style),
                Err(_) => bar,
            }
        });
        bar.set_position(done as u64);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}
