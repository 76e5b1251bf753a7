//! Checks what no compiler checks:
//!
//! - every arrow between our crates is one that ARCHITECTURE.md allows;
//! - no leftover marker of unfinished work stands in a tracked file;
//! - no file of code is named after no duty (`util`, `common`, …);
//! - every relative link and every named test or benchmark in the docs exists.
//!
//! Each finding is one line, `path:line: what`; any finding fails the run.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

/// What each crate of ours may depend on. Crates on one floor never import
/// each other; `*` stands for the roof, which may use anything.
const ARROWS: &[(&str, &[&str])] = &[
    ("model", &[]),
    ("ebpf", &[]),
    ("sim", &[]),
    ("rpc", &["model"]),
    ("store", &["model"]),
    ("dataplane", &["rpc", "store", "model", "ebpf"]),
    ("block-server", &["rpc", "store", "model"]),
    ("agent", &["rpc", "store", "model"]),
    ("control", &["rpc", "store", "model"]),
    ("netctl", &["rpc", "model"]),
    ("tests", &["*"]),
    ("benches", &["*"]),
    ("xtask", &["*"]),
];

/// Tests of any crate may use the simulator.
const ARROWS_OF_TESTS: &[&str] = &["sim", "model"];

/// Assembled from halves, so that this file does not find itself.
const MARKERS: &[(&str, &str)] = &[
    ("TO", "DO"),
    ("FIX", "ME"),
    ("XX", "X"),
    ("unimple", "mented!("),
    ("#[ign", "ore"),
    ("dbg", "!("),
];

/// Names that say that a duty has not been named yet.
const NAMELESS: &[&str] =
    &["util", "utils", "common", "helper", "helpers", "manager", "types", "misc"];

pub fn run() -> anyhow::Result<()> {
    let root = crate::root();
    let mut findings = Vec::new();
    findings.extend(forbidden_arrows(&dependencies(&root)?));
    for path in tracked_files(&root)? {
        findings.extend(nameless(&path));
        // Only text has lines to look at; images and objects are passed over.
        if let Ok(text) = std::fs::read_to_string(root.join(&path)) {
            findings.extend(leftovers(&path, &text));
            if path.ends_with(".md") {
                findings.extend(dead_links(&root, &path, &text));
            }
            if path == "SPECIFICATION.md" {
                findings.extend(unknown_tests(&root, &path, &text)?);
            }
        }
    }
    for finding in &findings {
        eprintln!("{finding}");
    }
    if !findings.is_empty() {
        bail!("tidy: {} finding(s)", findings.len());
    }
    println!("tidy: clean");
    Ok(())
}

#[derive(Debug, PartialEq, Eq)]
struct Arrow {
    from: String,
    to: String,
    of_tests: bool,
}

/// The arrows between members of the workspace, as cargo sees them.
fn dependencies(root: &Path) -> anyhow::Result<Vec<Arrow>> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--format-version=1", "--no-deps"])
        .current_dir(root)
        .output()
        .context("run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: serde_json::Value = serde_json::from_slice(&output.stdout)?;
    let mut arrows = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            // Only a dependency by path is one of ours.
            if dependency["path"].is_string() {
                arrows.push(Arrow {
                    from: package["name"].as_str().unwrap_or_default().to_owned(),
                    to: dependency["name"].as_str().unwrap_or_default().to_owned(),
                    of_tests: dependency["kind"] == "dev",
                });
            }
        }
    }
    Ok(arrows)
}

fn forbidden_arrows(arrows: &[Arrow]) -> Vec<String> {
    let lawful: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    arrows
        .iter()
        .filter(|arrow| match lawful.get(arrow.from.as_str()) {
            None => true,
            Some(to) => {
                !(to.contains(&"*")
                    || to.contains(&arrow.to.as_str())
                    || (arrow.of_tests && ARROWS_OF_TESTS.contains(&arrow.to.as_str())))
            }
        })
        .map(|arrow| {
            let Arrow { from, to, .. } = arrow;
            format!("{from}/Cargo.toml: `{from}` may not depend on `{to}` (see ARCHITECTURE.md, \"Floors\")")
        })
        .collect()
}

fn tracked_files(root: &Path) -> anyhow::Result<Vec<String>> {
    let output = Command::new("git")
        .arg("ls-files")
        .current_dir(root)
        .output()
        .context("run git ls-files")?;
    if !output.status.success() {
        bail!("git ls-files: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?.lines().map(str::to_owned).collect())
}

fn leftovers(path: &str, text: &str) -> Vec<String> {
    if path == "Cargo.lock" || path.starts_with("LICENSE") || path.ends_with(".json") {
        return Vec::new();
    }
    let mut findings = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for (head, tail) in MARKERS {
            let marker = format!("{head}{tail}");
            if line.match_indices(&marker).any(|(at, _)| stands_alone(line, at, &marker)) {
                findings.push(format!("{path}:{}: leftover marker `{marker}`", number + 1));
            }
        }
    }
    findings
}

/// Whether the marker at `at` is a word of its own: `mktemp XXXXXX` is none.
fn stands_alone(line: &str, at: usize, marker: &str) -> bool {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let before = line[..at].chars().next_back();
    let after = line[at + marker.len()..].chars().next();
    let opens = marker.ends_with('(');
    !before.is_some_and(is_word) && (opens || !after.is_some_and(is_word))
}

fn nameless(path: &str) -> Option<String> {
    let file = Path::new(path);
    let code = path.ends_with(".rs") || path.ends_with(".py") || path.ends_with(".sh");
    let named = |part: &str| NAMELESS.contains(&part);
    let stem = file.file_stem().and_then(|s| s.to_str()).is_some_and(named);
    let folder = path.split('/').any(named);
    (code && (stem || folder)).then(|| format!("{path}: its name says no duty"))
}

/// Relative links of Markdown that lead nowhere.
fn dead_links(root: &Path, path: &str, text: &str) -> Vec<String> {
    let folder = Path::new(path).parent().map(|p| root.join(p)).unwrap_or_else(|| root.to_owned());
    let mut findings = Vec::new();
    for (number, line) in text.lines().enumerate() {
        for rest in line.split("](").skip(1) {
            let Some(target) = rest.split(')').next() else { continue };
            let file = target.split('#').next().unwrap_or_default();
            if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
                continue;
            }
            if !folder.join(file).exists() {
                findings.push(format!("{path}:{}: the link `{target}` leads nowhere", number + 1));
            }
        }
    }
    findings
}

/// Tests that SPECIFICATION.md names as `crate::…::test_name` in backticks in
/// its last column, and that no source file defines.
fn unknown_tests(root: &Path, path: &str, text: &str) -> anyhow::Result<Vec<String>> {
    let mut sources = String::new();
    for file in tracked_files(root)?.iter().filter(|f| f.ends_with(".rs")) {
        sources.push_str(&std::fs::read_to_string(root.join(file)).unwrap_or_default());
    }
    let mut findings = Vec::new();
    for (number, line) in text.lines().enumerate().filter(|(_, l)| l.starts_with('|')) {
        let held_by = line.trim_end_matches('|').rsplit('|').next().unwrap_or_default();
        for (index, name) in held_by.split('`').enumerate() {
            if index % 2 == 0 || !name.contains("::") {
                continue;
            }
            let function = name.rsplit("::").next().unwrap_or_default();
            if !sources.contains(&format!("fn {function}(")) {
                findings.push(format!("{path}:{}: no test `{name}` exists", number + 1));
            }
        }
    }
    Ok(findings)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arrow(from: &str, to: &str, of_tests: bool) -> Arrow {
        Arrow { from: from.into(), to: to.into(), of_tests }
    }

    #[test]
    fn an_arrow_between_rooms_of_one_floor_is_found() {
        assert_eq!(forbidden_arrows(&[arrow("agent", "dataplane", false)]).len(), 1);
        assert_eq!(forbidden_arrows(&[arrow("model", "rpc", false)]).len(), 1);
        assert_eq!(forbidden_arrows(&[arrow("block-server", "sim", false)]).len(), 1);
        assert_eq!(forbidden_arrows(&[arrow("newcomer", "model", false)]).len(), 1);
        assert!(forbidden_arrows(&[arrow("agent", "rpc", false)]).is_empty());
        assert!(forbidden_arrows(&[arrow("block-server", "sim", true)]).is_empty());
    }

    #[test]
    fn a_marker_is_found_as_a_word_and_not_inside_one() {
        let marker = format!("{}{}", "XX", "X");
        assert_eq!(leftovers("a.rs", &format!("// {marker}: later")).len(), 1);
        assert!(leftovers("a.sh", &format!("mktemp /tmp/a.{marker}{marker}")).is_empty());
    }

    #[test]
    fn a_file_without_a_duty_in_its_name_is_found() {
        assert!(nameless("agent/src/util.rs").is_some());
        assert!(nameless("agent/src/helpers/a.rs").is_some());
        assert!(nameless("agent/src/lifecycle.rs").is_none());
    }

    #[test]
    fn a_link_that_leads_nowhere_is_found() {
        let text = "[a](Cargo.toml) [b](no-such-file.md) [c](https://example.org/x)";
        assert_eq!(dead_links(&crate::root(), "README.md", text).len(), 1);
    }
}
