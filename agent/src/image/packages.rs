//! Debian packages as files: fetched once into a cache, unpacked side by side,
//! never installed on the host.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Doing, Error, run};

/// What the user space of the tiny image is made of; what these need follows.
pub const USER_SPACE: [&str; 3] = ["busybox-static", "dropbear-bin", "e2fsprogs"];

/// Meta packages whose dependency is the distribution's kernel for guests, the first that exists.
pub const KERNELS: [&str; 3] =
    ["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"];

/// The names of packages that `roots` need, themselves included.
pub fn closure(roots: &[&str]) -> Result<BTreeSet<String>, Error> {
    let only_depends = ["recommends", "suggests", "conflicts", "breaks", "replaces", "enhances"];
    let mut command = Command::new("apt-cache");
    command.env("LC_ALL", "C").args(["depends", "--recurse"]);
    command.args(only_depends.map(|kind| format!("--no-{kind}"))).args(roots);
    let text = run(&mut command)?;
    // A package's own line begins at the margin; `<name>` is a virtual one.
    Ok(String::from_utf8_lossy(&text)
        .lines()
        .filter(|line| line.starts_with(|c: char| c.is_ascii_alphanumeric()))
        .filter(|line| !line.ends_with(":i386"))
        .map(|line| line.trim().to_owned())
        .collect())
}

/// The packages that hold the kernel image and its modules.
pub fn kernel() -> Result<Vec<String>, Error> {
    for meta in KERNELS {
        let mut command = Command::new("apt-cache");
        command.env("LC_ALL", "C").args(["depends", "--no-recommends", "--no-suggests", meta]);
        let Ok(text) = run(&mut command) else { continue };
        let text = String::from_utf8_lossy(&text).into_owned();
        let depends = text.lines().filter_map(|l| l.trim().strip_prefix("Depends: "));
        let Some(image) = depends.into_iter().find(|d| d.starts_with("linux-image-")) else {
            continue;
        };
        let mut found = vec![image.to_owned()];
        // Ubuntu keeps the modules in a package of their own.
        let version = image.trim_start_matches("linux-image-").trim_start_matches("unsigned-");
        let modules = format!("linux-modules-{version}");
        if run(Command::new("apt-cache").args(["show", &modules])).is_ok() {
            found.push(modules);
        }
        return Ok(found);
    }
    Err(Error::Program {
        program: "apt-cache".into(),
        cause: format!("none of {} is known; run `apt-get update`", KERNELS.join(", ")),
    })
}

/// Fetches each package that is not in the cache yet, and gives their files.
pub fn fetch(names: &BTreeSet<String>, cache: &Path) -> Result<Vec<PathBuf>, Error> {
    fs::create_dir_all(cache).doing("create folder", cache)?;
    let missing: Vec<&String> =
        names.iter().filter(|n| matches!(find(cache, n), Ok(None))).collect();
    if !missing.is_empty() {
        // Into a folder of its own first: a cache file is whole or not there.
        let pending = cache.join(".fetch");
        let _ = fs::remove_dir_all(&pending);
        fs::create_dir(&pending).doing("create folder", &pending)?;
        let mut command = Command::new("apt-get");
        command.current_dir(&pending).args(["-qq", "-o", "APT::Sandbox::User=root", "download"]);
        run(command.args(missing))?;
        for entry in fs::read_dir(&pending).doing("list", &pending)? {
            let entry = entry.doing("list", &pending)?;
            fs::rename(entry.path(), cache.join(entry.file_name())).doing("keep", entry.path())?;
        }
        fs::remove_dir(&pending).doing("remove", &pending)?;
    }
    names
        .iter()
        .map(|name| {
            find(cache, name)?.ok_or_else(|| Error::Program {
                program: "apt-get".into(),
                cause: format!("download {name}: no such file came"),
            })
        })
        .collect()
}

/// `name_version_arch.deb`, with or without the `:arch` that apt-cache may add.
fn find(cache: &Path, name: &str) -> Result<Option<PathBuf>, Error> {
    let prefix = format!("{}_", name.split(':').next().unwrap_or(name));
    for entry in fs::read_dir(cache).doing("list", cache)? {
        let path = entry.doing("list", cache)?.path();
        let matches = path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(&prefix));
        if matches && path.extension().is_some_and(|e| e == "deb") {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

pub fn unpack(package: &Path, into: &Path) -> Result<(), Error> {
    run(Command::new("dpkg-deb").arg("-x").arg(package).arg(into)).map(drop)
}
