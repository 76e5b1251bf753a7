//! Tests that cannot run where they are.

use std::io::Write as _;

/// Says why a test does not run, and tells the runner (`HOSTPLANE_SKIPPED`).
pub fn skip(test: &str, reason: &str) {
    let line = format!("SKIPPED {test}: {reason}");
    eprintln!("{line}");
    if let Some(path) = std::env::var_os("HOSTPLANE_SKIPPED") {
        let file = std::fs::File::options().create(true).append(true).open(path);
        let told = file.and_then(|mut file| writeln!(file, "{line}"));
        assert!(told.is_ok(), "tell the runner: {told:?}");
    }
}
