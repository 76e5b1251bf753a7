//! The first access key: made with the store, its secret kept in a file that
//! only root reads, in the form that AWS clients read.
//!
//! The store holds the public key only, from which nobody can sign.

use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use rand_chacha::ChaCha20Rng;
use rand_chacha::rand_core::RngCore;

use crate::front::Secrets;

#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    #[error("credentials {path}: {deed}: {cause}")]
    File { path: PathBuf, deed: &'static str, cause: std::io::Error },
    #[error("credentials {path}: no key pair stands in it")]
    Unreadable { path: PathBuf },
}

#[derive(Clone, PartialEq, Eq)]
pub struct Credentials {
    pub id: String,
    pub secret: String,
}

impl Secrets for Credentials {
    fn secret(&self, access_key: &str) -> Option<String> {
        (access_key == self.id).then(|| self.secret.clone())
    }
}

impl Credentials {
    fn make(rng: &mut ChaCha20Rng) -> Self {
        const LETTERS: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
        let letter = |byte: u8| char::from(LETTERS[usize::from(byte % 32)]);
        let (mut id, mut secret) = ([0; 16], [0; 30]);
        rng.fill_bytes(&mut id);
        rng.fill_bytes(&mut secret);
        let id = format!("AKIA{}", id.into_iter().map(letter).collect::<String>());
        Self { id, secret: STANDARD.encode(secret) }
    }

    /// Reads the file, or makes it.
    pub fn open(
        path: &Path,
        region: &str,
        rng: &mut ChaCha20Rng,
    ) -> Result<Self, CredentialsError> {
        let failed =
            |deed| move |cause| CredentialsError::File { path: path.to_owned(), deed, cause };
        match std::fs::read_to_string(path) {
            Ok(text) => {
                return Self::parse(&text)
                    .ok_or_else(|| CredentialsError::Unreadable { path: path.to_owned() });
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {}
            Err(e) => return Err(failed("read")(e)),
        }
        let made = Self::make(rng);
        let text = format!(
            "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\nregion = {region}\n",
            made.id, made.secret
        );
        // Written aside and moved: there is a whole file, or none.
        let pending = path.with_extension("new");
        let mut file = std::fs::OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&pending)
            .map_err(failed("create"))?;
        file.write_all(text.as_bytes()).map_err(failed("write"))?;
        file.sync_all().map_err(failed("sync"))?;
        std::fs::rename(&pending, path).map_err(failed("rename"))?;
        let folder = path.parent().unwrap_or(Path::new("/"));
        std::fs::File::open(folder)
            .and_then(|d| d.sync_all())
            .map_err(failed("sync its folder"))?;
        Ok(made)
    }

    fn parse(text: &str) -> Option<Self> {
        let value = |name: &str| {
            text.lines().find_map(|line| {
                let (key, value) = line.split_once('=')?;
                (key.trim() == name).then(|| value.trim().to_owned())
            })
        };
        Some(Self { id: value("aws_access_key_id")?, secret: value("aws_secret_access_key")? })
    }
}
