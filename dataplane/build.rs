//! Embeds the eBPF object: the one that `HOSTPLANE_EBPF_OBJECT` names, else the
//! prebuilt one. `cargo xtask build-ebpf` makes either, and writes a text of origin
//! beside it (`hostplane.o` and `hostplane.origin`).

use std::path::{Path, PathBuf};
use std::{env, fs};

use sha2::{Digest, Sha256};

fn main() {
    let named = env::var_os("HOSTPLANE_EBPF_OBJECT").map(PathBuf::from);
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let prebuilt = root.join("../ebpf/prebuilt/hostplane.o");
    let object = named.clone().unwrap_or(prebuilt);
    let bytes =
        fs::read(&object).unwrap_or_else(|e| panic!("eBPF object {}: read: {e}", object.display()));
    let origin = match &named {
        // Built a moment ago by `cargo xtask build-ebpf`, or someone's own.
        Some(path) if is_built(path) => "built".to_owned(),
        Some(path) => path.display().to_string(),
        None => "prebuilt".to_owned(),
    };
    let digest: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
    let path = object.canonicalize().unwrap_or(object);
    println!("cargo::rustc-env=HOSTPLANE_EBPF_EMBEDDED={}", path.display());
    println!("cargo::rustc-env=HOSTPLANE_EBPF_ORIGIN={origin}");
    println!("cargo::rustc-env=HOSTPLANE_EBPF_SHA256={digest}");
    println!("cargo::rerun-if-env-changed=HOSTPLANE_EBPF_OBJECT");
    println!("cargo::rerun-if-changed={}", path.display());
}

fn is_built(object: &Path) -> bool {
    fs::read_to_string(object.with_extension("origin"))
        .is_ok_and(|text| text.lines().any(|line| line == "origin: built"))
}
