//! The guide's reference: every command's `--help`, as Markdown.
//!
//! `cargo xtask manual` writes it into `docs/guide/netctl.md` below a line that
//! says so, and a test compares the two: help and guide cannot drift apart.

use clap::{Command, CommandFactory};

use crate::cli::Cli;

/// The line in the guide below which everything is generated.
pub const BELOW: &str =
    "<!-- Below this line `cargo xtask manual` writes every command's --help. -->";

/// As wide as a code block is readable, whatever the terminal.
const WIDTH: usize = 100;

pub fn command() -> Command {
    let mut command = Cli::command().term_width(WIDTH);
    command.build();
    command
}

/// The whole reference.
pub fn markdown() -> String {
    let mut text = String::new();
    write(&mut text, &command(), true);
    text
}

/// What every command takes is said once, at the root.
fn write(text: &mut String, command: &Command, is_root: bool) {
    let mut help = command.clone().term_width(WIDTH);
    if !is_root {
        help = help.mut_args(|a| if a.is_global_set() { a.hide(true) } else { a });
    }
    let name = command.get_bin_name().unwrap_or(command.get_name()).to_owned();
    let body: Vec<String> =
        help.render_long_help().to_string().lines().map(|l| l.trim_end().to_owned()).collect();
    text.push_str(&format!("\n### {name}\n\n```text\n{}\n```\n", body.join("\n").trim_end()));
    for sub in command.get_subcommands().filter(|c| !c.is_hide_set() && c.get_name() != "help") {
        write(text, sub, false);
    }
}

/// The guide with its generated part renewed; `None` where it lacks the line.
pub fn renew(guide: &str) -> Option<String> {
    let (head, _) = guide.split_once(BELOW)?;
    Some(format!("{head}{BELOW}\n{}", markdown()))
}
