//! `netctl`: see the library's page.

#![forbid(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;
use netctl::cli::Cli;

fn main() -> ExitCode {
    match Cli::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            netctl::output::note(&failure.to_string());
            ExitCode::from(failure.exit_code())
        }
    }
}
