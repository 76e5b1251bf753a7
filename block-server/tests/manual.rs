//! The page block-server(8) is true: it names every option of `serve`, and the
//! file that it shows is one that is understood.

use std::path::Path;
use std::process::Command;

use block_server::plan::Plan;

const PAGE: &str = include_str!("../../docs/man/block-server.8");

#[test]
fn the_page_names_every_option_and_no_other() {
    let help = Command::new(env!("CARGO_BIN_EXE_block-server"))
        .args(["serve", "--help"])
        .output()
        .unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let page = PAGE.replace("\\-", "-");
    let options = |text: &str| -> std::collections::BTreeSet<String> {
        text.split("--")
            .skip(1)
            .map(|rest| rest.chars().take_while(|c| c.is_ascii_lowercase() || *c == '-').collect())
            .collect()
    };
    let mut told = options(&help);
    told.remove("help");
    let mut named = options(&page);
    // The daemon's own.
    for daemons in ["name", "state-dir", "run-dir"] {
        named.remove(daemons);
    }
    assert_eq!(named, told);
}

#[test]
fn the_file_on_the_page_is_understood() {
    let (_, rest) = PAGE.split_once(".SH FILE\n.nf\n").unwrap();
    let (file, _) = rest.split_once(".fi").unwrap();
    let plan = Plan::parse(Path::new("page"), file).unwrap();
    assert_eq!((plan.listeners.len(), plan.exports.len()), (2, 1));
}
