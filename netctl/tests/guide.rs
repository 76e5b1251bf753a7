//! The guide says what `--help` says.

use std::fs;
use std::path::Path;

use netctl::reference;

#[test]
fn the_guides_reference_is_that_of_the_program() {
    let guide = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/guide/netctl.md");
    let text = fs::read_to_string(&guide).unwrap();
    let renewed = reference::renew(&text).expect("the guide has its line");
    for (line, (is, should)) in text.lines().zip(renewed.lines()).enumerate() {
        assert_eq!(is, should, "docs/guide/netctl.md:{}: run cargo xtask manual", line + 1);
    }
    assert_eq!(text.len(), renewed.len(), "docs/guide/netctl.md: run cargo xtask manual");
}

#[test]
fn every_command_has_an_example_and_every_argument_a_word() {
    fn walk(command: &clap::Command) {
        let name = command.get_bin_name().unwrap_or_default().to_owned();
        let subcommands: Vec<_> = command
            .get_subcommands()
            .filter(|c| !c.is_hide_set() && c.get_name() != "help")
            .collect();
        if subcommands.is_empty() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("EXAMPLES:"), "{name} has no example");
            assert!(help.contains("netctl"), "{name}");
        }
        for argument in command.get_arguments() {
            assert!(argument.get_help().is_some(), "{name}: {} says nothing", argument.get_id());
        }
        for sub in subcommands {
            walk(sub);
        }
    }
    walk(&reference::command());
}

/// clap propagates a global argument by its id into every command, over one that
/// has the same id there, and then `key create me` would speak of deployment `me`.
#[test]
fn no_commands_argument_has_the_id_of_a_global_one() {
    fn walk(command: &clap::Command, globals: &[String]) {
        for sub in command.get_subcommands() {
            for argument in sub.get_arguments() {
                let id = argument.get_id().to_string();
                assert!(!globals.contains(&id), "{} {id}", sub.get_name());
            }
            walk(sub, globals);
        }
    }
    let command = <netctl::cli::Cli as clap::CommandFactory>::command();
    let globals: Vec<String> = command
        .get_arguments()
        .filter(|a| a.is_global_set())
        .map(|a| a.get_id().to_string())
        .collect();
    assert!(globals.len() >= 4);
    walk(&command, &globals);
}
