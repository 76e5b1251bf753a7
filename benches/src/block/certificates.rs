//! An authority, a server and a client that it vouches for, by openssl(1), in one folder
//! that QEMU, nbdkit, libnbd and we read alike.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::process;

/// Where libnbd looks for certificates, below the home of whoever is not root. It takes a
/// folder in a URI from nobody who does not expect one, and fio does not.
const BELOW_HOME: &str = ".pki/libnbd";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certificates {
    home: PathBuf,
}

impl Certificates {
    /// In the folder of `file`, where they are made once.
    pub fn beside(file: &Path) -> anyhow::Result<Self> {
        let home = file.with_file_name("home");
        let certificates = Self { home };
        if !certificates.folder().exists() {
            certificates.make()?;
        }
        Ok(certificates)
    }

    pub fn folder(&self) -> PathBuf {
        self.home.join(BELOW_HOME)
    }

    /// The home of a client that finds them.
    pub fn home(&self) -> &Path {
        &self.home
    }

    fn make(&self) -> anyhow::Result<()> {
        std::fs::create_dir_all(self.folder())?;
        const CURVE: &str = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
        self.openssl(&format!(
            "req -x509 {CURVE} -days 2 -subj /CN=bench -keyout ca-key.pem -out ca-cert.pem \
             -addext basicConstraints=critical,CA:TRUE -addext keyUsage=keyCertSign"
        ))?;
        for who in ["server", "client"] {
            let extensions = format!(
                "extendedKeyUsage={who}Auth\nbasicConstraints=CA:FALSE\nsubjectAltName=DNS:localhost\n"
            );
            std::fs::write(self.folder().join("extensions"), extensions)?;
            self.openssl(&format!(
                "req {CURVE} -subj /CN=localhost -keyout {who}-key.pem -out request"
            ))?;
            self.openssl(&format!(
                "x509 -req -in request -CA ca-cert.pem -CAkey ca-key.pem -days 2 \
                 -CAcreateserial -extfile extensions -out {who}-cert.pem"
            ))?;
        }
        // The client is not root.
        for entry in std::fs::read_dir(self.folder())? {
            std::fs::set_permissions(entry?.path(), PermissionsExt::from_mode(0o644))?;
        }
        if let Some(folder) = self.home.parent() {
            std::fs::set_permissions(folder, PermissionsExt::from_mode(0o711))?;
        }
        Ok(())
    }

    fn openssl(&self, arguments: &str) -> anyhow::Result<()> {
        let mut command = Command::new("openssl");
        command.args(arguments.split_whitespace()).current_dir(self.folder());
        process::output(&mut command).map(drop)
    }
}
