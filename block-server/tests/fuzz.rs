//! Coverage-guided fuzzing of handshake and transmission: how it is run and kept,
//! `sim::Fuzz` says.

mod talk;

use std::path::Path;

use block_server::nbd;
use sim::Fuzz;
use talk::Mode;

/// Two processes of half a minute make the minute.
const FUZZ: Fuzz = Fuzz {
    manifest_dir: env!("CARGO_MANIFEST_DIR"),
    program: "session",
    input_bytes_max: 1024,
    seconds: [30, 3600],
};

/// The whole talk of each mode.
fn seeds() -> Vec<Vec<u8>> {
    let modes = [Mode::Simple, Mode::Structured, Mode::Extended];
    modes.map(|mode| [vec![1, 0], talk::talk(mode, 20)].concat()).into()
}

#[test]
fn what_fuzzing_found_before_holds_still() {
    let inputs = [FUZZ.known(), seeds()].concat();
    assert!(inputs.len() > 100, "{} inputs", inputs.len());
    inputs.iter().for_each(|input| talk::hold(input));
}

#[test]
fn a_minute_of_fuzzing_finds_nothing() {
    let work = tempfile::tempdir().unwrap();
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    FUZZ.run("a_minute_of_fuzzing_finds_nothing", &seeds(), target, work.path());
}
