//! Builds the eBPF object, and prints the path of the one that is taken.
//!
//! ```text
//!   HOSTPLANE_EBPF_OBJECT names one ─▶ that one
//!   a rustc with rust-src, and the tools of its LLVM ─▶ built: target/ebpf/hostplane.o
//!   else ─▶ ebpf/prebuilt/hostplane.o
//! ```
//! No nightly compiler is needed: `RUSTC_BOOTSTRAP=1` lets a stable one build `core`
//! for the BPF target. rustc hands its linker one file of bitcode (`lto = "fat"`); we
//! keep it, and the tools of the very same LLVM make the object of it. Paths are
//! remapped, so that two builds by the same versions are the same bytes.

use std::env;
use std::ffi::OsString;
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, bail};
use sha2::{Digest as _, Sha256};

/// Options of `cargo xtask build-ebpf`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Put the object that was built into ebpf/prebuilt/, to be committed.
    #[arg(long)]
    update_prebuilt: bool,
}

const TARGET: &str = "bpfel-unknown-none";
const PROGRAM: &str = "hostplane-ebpf";
/// What the "linker" does: keep the bitcode, and the names that must stay visible.
const KEEP_BITCODE: &str = r#"#!/bin/sh
set -e
input= symbols= output=
while [ $# -gt 0 ]; do
    case "$1" in
    --export-symbols) symbols=$2; shift ;;
    -o) output=$2; shift ;;
    -L | --cpu) shift ;;
    *.o | *.bc) input=$1 ;;
    esac
    shift
done
cp "$input" "$output"
cp "$symbols" "$(dirname "$0")/symbols"
"#;

pub fn run(args: Args) -> anyhow::Result<()> {
    if let Some(named) = env::var_os("HOSTPLANE_EBPF_OBJECT") {
        let path = PathBuf::from(named);
        let path = path.canonicalize().with_context(|| format!("find {}", path.display()))?;
        println!("{}", path.display());
        return Ok(());
    }
    let prebuilt = prebuilt();
    let toolchain = match Toolchain::find() {
        Ok(toolchain) => toolchain,
        Err(reason) if args.update_prebuilt => return Err(reason),
        Err(reason) => {
            eprintln!("eBPF: the prebuilt object is taken: {reason:#}");
            println!("{}", prebuilt.display());
            return Ok(());
        }
    };
    let object = toolchain.build(&target_dir().join("ebpf"))?;
    if args.update_prebuilt {
        fs::copy(&object, &prebuilt).with_context(|| format!("write {}", prebuilt.display()))?;
        let origin = toolchain.origin("prebuilt", &fs::read(&prebuilt)?);
        fs::write(prebuilt.with_extension("origin"), origin)?;
    }
    println!("{}", object.display());
    Ok(())
}

fn prebuilt() -> PathBuf {
    crate::root().join("ebpf/prebuilt/hostplane.o")
}

fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| crate::root().join("target"), PathBuf::from)
}

/// A compiler that has the source of `core`, and the tools of its LLVM.
struct Toolchain {
    rustc: PathBuf,
    cargo: PathBuf,
    sysroot: PathBuf,
    /// As `rustc -vV` says it.
    version: String,
    llvm: String,
    tools: Tools,
}

struct Tools {
    opt: PathBuf,
    llc: PathBuf,
    objcopy: PathBuf,
}

impl Toolchain {
    /// The first that serves. An error tells why each did not.
    fn find() -> anyhow::Result<Self> {
        let mut reasons = String::new();
        for rustc in Self::candidates() {
            match Self::probe(&rustc) {
                Ok(toolchain) => return Ok(toolchain),
                Err(reason) => write!(reasons, "; {}: {reason:#}", rustc.display())?,
            }
        }
        bail!("no compiler with rust-src and the tools of its LLVM{reasons}")
    }

    /// Debian's first: its LLVM tools are packages of the same version.
    fn candidates() -> Vec<PathBuf> {
        let rustup = |channel: &str| {
            let args = ["which", "--toolchain", channel, "rustc"];
            output(Command::new("rustup").args(args)).ok().map(|path| PathBuf::from(path.trim()))
        };
        let debian = Some(PathBuf::from("/usr/bin/rustc"));
        [debian, rustup("nightly"), rustup("stable")].into_iter().flatten().collect()
    }

    fn probe(rustc: &Path) -> anyhow::Result<Self> {
        let verbose = output(plain(rustc).arg("-vV"))?;
        let field = |name: &str| {
            let line = verbose.lines().find_map(|line| line.strip_prefix(name));
            line.map(str::to_owned).with_context(|| format!("`rustc -vV` has no line `{name}`"))
        };
        let llvm = field("LLVM version: ")?;
        let version = verbose.lines().next().unwrap_or_default().to_owned();
        let sysroot = PathBuf::from(output(plain(rustc).args(["--print", "sysroot"]))?.trim());
        if !sysroot.join("lib/rustlib/src/rust/library/core").exists() {
            bail!("it has no rust-src");
        }
        let cargo = rustc.with_file_name("cargo");
        if !cargo.exists() {
            bail!("it has no cargo beside it");
        }
        let tools = Tools::of(&llvm)?;
        Ok(Self { rustc: rustc.to_owned(), cargo, sysroot, version, llvm, tools })
    }

    fn build(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
        let bitcode = self.compile(folder)?;
        let object = folder.join("hostplane.o");
        let linked = folder.join("linked.o");
        self.link(folder, &bitcode, &linked)?;
        // The same bytes keep their file and its time: what embeds them is not built again.
        let bytes = fs::read(&linked).with_context(|| format!("read {}", linked.display()))?;
        if fs::read(&object).ok().as_ref() != Some(&bytes) {
            fs::rename(&linked, &object).with_context(|| format!("write {}", object.display()))?;
        }
        fs::write(object.with_extension("origin"), self.origin("built", &bytes))?;
        Ok(object)
    }

    fn compile(&self, folder: &Path) -> anyhow::Result<PathBuf> {
        let linker = folder.join("keep-bitcode");
        // Written once: a running build may have it open.
        if fs::read_to_string(&linker).ok().as_deref() != Some(KEEP_BITCODE) {
            fs::write(&linker, KEEP_BITCODE)?;
            fs::set_permissions(&linker, fs::Permissions::from_mode(0o755))?;
        }
        let mut cargo = plain(&self.cargo);
        cargo
            .current_dir(crate::root())
            .env("RUSTC", &self.rustc)
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_TARGET_DIR", folder)
            .env("CARGO_ENCODED_RUSTFLAGS", self.flags(&linker)?)
            .env("CARGO_PROFILE_RELEASE_LTO", "fat")
            .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
            .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
            .env("CARGO_PROFILE_RELEASE_DEBUG", "2")
            .args(["build", "--quiet", "--release", "-p", "ebpf", "--bin", PROGRAM])
            .args(["-Z", "build-std=core", "--target", TARGET])
            .stdout(Stdio::null());
        let status = cargo.status().context("run cargo")?;
        if !status.success() {
            bail!("eBPF: cargo failed: {status}");
        }
        Ok(folder.join(TARGET).join("release").join(PROGRAM))
    }

    fn flags(&self, linker: &Path) -> anyhow::Result<OsString> {
        let home = env::var_os("CARGO_HOME")
            .map(PathBuf::from)
            .or_else(|| env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")));
        let home = home.context("neither CARGO_HOME nor HOME is set")?;
        let mut flags = OsString::from("-Clinker=");
        flags.push(linker);
        for (from, to) in
            [(crate::root(), "/hostplane"), (home, "/cargo"), (self.sysroot.clone(), "/rust")]
        {
            flags.push("\x1f--remap-path-prefix=");
            flags.push(from);
            flags.push("=");
            flags.push(to);
        }
        Ok(flags)
    }

    fn link(&self, folder: &Path, bitcode: &Path, object: &Path) -> anyhow::Result<()> {
        let symbols = fs::read_to_string(folder.join("symbols")).context("read the symbols")?;
        // The compiler's own memory functions are inlined or linked, never exported.
        let kept: Vec<&str> = symbols.lines().filter(|s| !s.starts_with("mem")).collect();
        let (optimized, full) = (folder.join("optimized.bc"), folder.join("full.o"));
        let api = format!("--internalize-public-api-list={}", kept.join(","));
        let passes = "-passes=internalize,globaldce,default<O3>";
        output(
            Command::new(&self.tools.opt)
                .arg(passes)
                .arg(api)
                .arg(bitcode)
                .arg("-o")
                .arg(&optimized),
        )?;
        let machine = ["-march=bpfel", "-mcpu=v3", "-filetype=obj"];
        output(Command::new(&self.tools.llc).args(machine).arg(&optimized).arg("-o").arg(&full))?;
        output(Command::new(&self.tools.objcopy).arg("--strip-debug").arg(&full).arg(object))?;
        Ok(())
    }

    fn origin(&self, origin: &str, object: &[u8]) -> String {
        let digest = Sha256::digest(object).iter().fold(String::new(), |mut text, byte| {
            let _ = write!(text, "{byte:02x}");
            text
        });
        let Self { version, llvm, .. } = self;
        format!("origin: {origin}\nrustc: {version}\nllvm: {llvm}\nsha256: {digest}\n")
    }
}

impl Tools {
    /// Debian's names and folders, by the LLVM's major version.
    fn of(llvm: &str) -> anyhow::Result<Self> {
        let major = llvm.split('.').next().unwrap_or_default();
        let tool = |name: &str| {
            let path = PathBuf::from(format!("/usr/lib/llvm-{major}/bin/{name}"));
            if !path.exists() {
                bail!("{} is missing (package llvm-{major})", path.display());
            }
            Ok(path)
        };
        Ok(Self { opt: tool("opt")?, llc: tool("llc")?, objcopy: tool("llvm-objcopy")? })
    }
}

/// A command that does not inherit what the cargo that runs us was told.
fn plain(program: &Path) -> Command {
    let mut command = Command::new(program);
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let ours =
            text == "CARGO_HOME" || text.starts_with("CARGO_HTTP") || text.starts_with("CARGO_NET");
        if (text.starts_with("CARGO") || text.starts_with("RUST")) && !ours {
            command.env_remove(&name);
        }
    }
    command
}

/// What it prints; its complaint where it fails.
fn output(command: &mut Command) -> anyhow::Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command.output().with_context(|| format!("run {name}"))?;
    if !output.status.success() {
        bail!("{name}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_prebuilt_object_is_what_the_sources_build() {
        let name = "the_prebuilt_object_is_what_the_sources_build";
        let toolchain = match Toolchain::find() {
            Ok(toolchain) => toolchain,
            Err(reason) => return sim::skip(name, &format!("{reason:#}")),
        };
        let recorded = fs::read_to_string(prebuilt().with_extension("origin")).unwrap();
        let versions = format!("rustc: {}\nllvm: {}\n", toolchain.version, toolchain.llvm);
        if !recorded.contains(&versions) {
            return sim::skip(name, "the prebuilt object was made by other versions");
        }
        let built = toolchain.build(&target_dir().join("ebpf")).unwrap();
        let (built, prebuilt) = (fs::read(built).unwrap(), fs::read(prebuilt()).unwrap());
        assert_eq!(recorded, toolchain.origin("prebuilt", &prebuilt), "the text of origin");
        assert!(built == prebuilt, "run `cargo xtask build-ebpf --update-prebuilt` and commit");
    }
}
