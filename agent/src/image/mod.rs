//! Machine images of this host: a root disk, and where the image is ours a
//! kernel that QEMU loads itself.
//!
//! ```text
//!   <state>/agent/images/<name>/manifest.json    what is here, and its digest
//!                               root.raw         sparse
//!                               vmlinuz, initrd  only with direct boot
//! ```
//! An image is made under another name and moved into place: whoever lists
//! images sees whole ones only. Called by the control socket and by tests.

mod archive;
mod elf;
mod import;
mod kernel;
mod packages;
mod store;
mod tiny;

pub use import::import;
pub use store::{Manifest, Store};
pub use tiny::build as build_tiny;

use std::path::PathBuf;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The request or the file is wrong as it stands.
    #[error("image {name}: {cause}")]
    Refused { name: String, cause: String },
    #[error("image {name}: it exists already")]
    Exists { name: String },
    #[error("image {name}: there is none of that name")]
    Missing { name: String },
    #[error("{program}: {cause}")]
    Program { program: String, cause: String },
    #[error("{deed} {}: {cause}", path.display())]
    File { deed: &'static str, path: PathBuf, cause: std::io::Error },
    #[error("image {name}: {cause}")]
    Damaged { name: String, cause: String },
}

impl From<Error> for rpc::Error {
    fn from(error: Error) -> Self {
        let kind = match &error {
            Error::Refused { .. } => rpc::Kind::Refused,
            Error::Exists { .. } => rpc::Kind::Conflict,
            Error::Missing { .. } => rpc::Kind::NotFound,
            Error::Program { .. } | Error::File { .. } => rpc::Kind::Unavailable,
            Error::Damaged { .. } => rpc::Kind::Damaged,
        };
        Self::new(kind, error.to_string())
    }
}

/// Attaches the deed and the path to an I/O error.
trait Doing<T> {
    fn doing(self, deed: &'static str, path: impl Into<PathBuf>) -> Result<T, Error>;
}

impl<T> Doing<T> for std::io::Result<T> {
    fn doing(self, deed: &'static str, path: impl Into<PathBuf>) -> Result<T, Error> {
        self.map_err(|cause| Error::File { deed, path: path.into(), cause })
    }
}

/// Runs a program to its end and gives what it printed.
fn run(program: &mut std::process::Command) -> Result<Vec<u8>, Error> {
    let name = program.get_program().to_string_lossy().into_owned();
    let output = program.stdin(std::process::Stdio::null()).output().map_err(|e| {
        Error::Program { program: name.clone(), cause: format!("cannot run it: {e}") }
    })?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let last: Vec<&str> = said.trim().lines().rev().take(3).collect();
    Err(Error::Program {
        program: name,
        cause: format!(
            "{}: {}",
            output.status,
            last.into_iter().rev().collect::<Vec<_>>().join("; ")
        ),
    })
}
