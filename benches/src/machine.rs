//! What a table's reader must know of the machine and the programs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context;

/// Two lines: the machine, and how busy it is now.
pub fn describe() -> String {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpuinfo = read("/proc/cpuinfo");
    let cores = cpuinfo.lines().filter(|l| l.starts_with("processor")).count();
    let model = field(&cpuinfo, "model name").unwrap_or("unknown processor");
    let memory_kib: u64 = field(&read("/proc/meminfo"), "MemTotal")
        .and_then(|v| v.split_ascii_whitespace().next()?.parse().ok())
        .unwrap_or(0);
    let release = read("/proc/sys/kernel/osrelease");
    let load = read("/proc/loadavg");
    let load: Vec<&str> = load.split_ascii_whitespace().take(3).collect();
    format!(
        "machine: {cores} x {model}, {} GiB, Linux {}\nload at start (1, 5, 15 min): {}\n",
        memory_kib.div_ceil(1024 * 1024),
        release.trim(),
        load.join(" "),
    )
}

/// The value behind `name` in a `/proc` file of lines `name : value`.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key.trim() == name).then(|| value.trim())
    })
}

/// The first line of what the program says of its version; `None` where it is
/// not installed.
pub fn version(program: &str, flag: &str) -> Option<String> {
    let output = Command::new(program).arg(flag).output().ok()?;
    let text = if output.stdout.is_empty() { output.stderr } else { output.stdout };
    String::from_utf8_lossy(&text).lines().next().map(str::to_owned)
}

/// How this run was started, to be typed again.
pub fn command_line(question: &str) -> String {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    format!("sudo ./x bench {question} {}", arguments.join(" ")).trim_end().to_owned()
}

/// The commit that was measured, with a sign where the tree had changes on top.
pub fn revision() -> String {
    let git = |arguments: &[&str]| {
        let output = Command::new("git").args(arguments).output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        output.status.success().then(|| text.trim().to_owned())
    };
    match git(&["rev-parse", "--short=12", "HEAD"]) {
        None => "unknown (not in a git tree)".to_owned(),
        Some(commit) => match git(&["status", "--porcelain", "--untracked-files=no"]) {
            Some(changes) if changes.is_empty() => commit,
            _ => format!("{commit} and changes that are not committed"),
        },
    }
}

/// A program of ours: in the folder that `HOSTPLANE_BIN_DIR` names, or beside
/// this one. `None` where it has not been built.
pub fn own_program(name: &str) -> Option<PathBuf> {
    let directory = match std::env::var_os("HOSTPLANE_BIN_DIR") {
        Some(directory) => PathBuf::from(directory),
        None => own_folder().ok()?,
    };
    let path = directory.join(name);
    path.is_file().then_some(path)
}

/// The folder that this program was built into.
pub fn own_folder() -> anyhow::Result<PathBuf> {
    let program = std::env::current_exe().context("own path: read")?;
    Ok(program.parent().context("own path: no folder in it")?.to_owned())
}

/// Kind of file system and device below `directory`, from the mount table.
pub fn file_system(directory: &Path) -> String {
    let directory = directory.canonicalize().unwrap_or_else(|_| directory.to_owned());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    mount_of(&mounts, &directory).unwrap_or_else(|| "unknown file system".to_owned())
}

/// The mount whose point is the longest beginning of `directory`; of two on the
/// same point, the later covers the earlier.
fn mount_of(mounts: &str, directory: &Path) -> Option<String> {
    let fields = |line: &'_ str| {
        let mut fields = line.split(' ').map(str::to_owned);
        Some((fields.next()?, PathBuf::from(fields.next()?), fields.next()?))
    };
    let covering = mounts.lines().filter_map(fields).filter(|(_, on, _)| directory.starts_with(on));
    covering
        .max_by_key(|(_, on, _)| on.components().count())
        .map(|(device, _, kind)| format!("{kind} on {device}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_field_is_found_by_its_whole_name() {
        let text = "model\t: 5\nmodel name\t: Some CPU: fast\n";
        assert_eq!(field(text, "model name"), Some("Some CPU: fast"));
        assert_eq!(field(text, "name"), None);
    }

    #[test]
    fn a_folder_belongs_to_the_longest_mount_above_it() {
        let mounts =
            "/dev/vda / ext4 rw 0 0\ntmpfs /tmp tmpfs rw 0 0\n/dev/vdb /tmp/a xfs rw 0 0\n";
        let of = |path: &str| mount_of(mounts, Path::new(path)).unwrap();
        assert_eq!(of("/home/x"), "ext4 on /dev/vda");
        assert_eq!(of("/tmp/b"), "tmpfs on tmpfs");
        assert_eq!(of("/tmp/a/b"), "xfs on /dev/vdb");
        assert_eq!(of("/tmpa"), "ext4 on /dev/vda");
    }

    #[test]
    fn a_program_that_is_not_installed_has_no_version() {
        assert_eq!(version("hostplane-no-such-program", "--version"), None);
    }

    #[test]
    fn the_machine_is_described() {
        let text = describe();
        assert!(text.contains("Linux") && text.contains("load"), "{text}");
    }
}
