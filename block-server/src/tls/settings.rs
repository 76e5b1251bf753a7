//! A listener's certificate, key and the authority of its clients.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, pem};
use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, crypto};

/// Where PEM files lie.
#[derive(Debug, Clone, PartialEq, Eq, serde::Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Files {
    /// The server's certificate, and those between it and the root.
    pub certificate: PathBuf,
    pub key: PathBuf,
    /// Clients must show a certificate of one of these.
    pub client_ca: PathBuf,
    /// What those authorities revoked, one list or several.
    #[serde(default)]
    pub client_crl: Option<PathBuf>,
}

impl Files {
    /// The names that QEMU, libnbd and nbdkit use in a folder.
    pub fn of_folder(folder: &Path) -> Self {
        Self {
            certificate: folder.join("server-cert.pem"),
            key: folder.join("server-key.pem"),
            client_ca: folder.join("ca-cert.pem"),
            client_crl: Some(folder.join("ca-crl.pem")).filter(|list| list.exists()),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{}: read the {what}: {cause}", path.display())]
    Read { path: PathBuf, what: &'static str, cause: pem::Error },
    #[error("{}: it holds no certificate; give one in PEM", path.display())]
    Empty { path: PathBuf },
    #[error("{}: take it as an authority of clients: {cause}", path.display())]
    Authority { path: PathBuf, cause: String },
    #[error("{}: it holds no revocation list; give one in PEM, or leave it out", path.display())]
    NoList { path: PathBuf },
    #[error("{} with the lists of {}: use them to check clients: {cause}", authority.display(), lists.display())]
    Lists { authority: PathBuf, lists: PathBuf, cause: String },
    #[error("{} and {}: use them as certificate and key: {cause}", certificate.display(), key.display())]
    Pair { certificate: PathBuf, key: PathBuf, cause: rustls::Error },
}

/// What every connection of a listener shares.
#[derive(Debug)]
pub struct Server {
    config: Arc<ServerConfig>,
}

impl Server {
    pub fn load(files: &Files) -> Result<Arc<Self>, Error> {
        let provider = Arc::new(provider());
        let verifier = verifier(files, Arc::clone(&provider))?;
        let chain = certificates(&files.certificate, "certificate")?;
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|cause| Error::Read {
            path: files.key.clone(),
            what: "key",
            cause,
        })?;
        let pair = |cause| Error::Pair {
            certificate: files.certificate.clone(),
            key: files.key.clone(),
            cause,
        };
        let mut config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(pair)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(pair)?;
        config.ignore_client_order = true;
        // A connection lasts for days: there is nothing to gain from resuming one,
        // and a certificate is looked at anew each time.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(Arc::new(Self { config: Arc::new(config) }))
    }

    pub(super) fn config(&self) -> &Arc<ServerConfig> {
        &self.config
    }
}

/// The suites of TLS 1.3 in the order of what they cost this processor, whatever a client
/// names first. AES-128 does ten rounds where AES-256 does fourteen, and is what TLS 1.3
/// itself demands; ChaCha is for processors without instructions for either.
fn provider() -> crypto::CryptoProvider {
    use crypto::ring::cipher_suite::{
        TLS13_AES_128_GCM_SHA256 as AES_128, TLS13_AES_256_GCM_SHA384 as AES_256,
        TLS13_CHACHA20_POLY1305_SHA256 as CHACHA,
    };
    let has_aes = std::arch::is_x86_feature_detected!("aes")
        && std::arch::is_x86_feature_detected!("pclmulqdq");
    let cipher_suites =
        if has_aes { vec![AES_128, AES_256, CHACHA] } else { vec![CHACHA, AES_128, AES_256] };
    crypto::CryptoProvider { cipher_suites, ..crypto::ring::default_provider() }
}

/// Who may come in. With lists, the status of every certificate of a client's
/// chain must be known: one whose issuer has no list here is refused.
fn verifier(
    files: &Files,
    provider: Arc<crypto::CryptoProvider>,
) -> Result<Arc<dyn ClientCertVerifier>, Error> {
    let path = &files.client_ca;
    let mut roots = RootCertStore::empty();
    for authority in certificates(path, "clients' authority")? {
        roots
            .add(authority)
            .map_err(|e| Error::Authority { path: path.clone(), cause: e.to_string() })?;
    }
    let builder = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
    let Some(lists) = &files.client_crl else {
        return builder
            .build()
            .map_err(|e| Error::Authority { path: path.clone(), cause: e.to_string() });
    };
    builder.with_crls(revocations(lists)?).build().map_err(|e| Error::Lists {
        authority: path.clone(),
        lists: lists.clone(),
        cause: e.to_string(),
    })
}

fn revocations(path: &Path) -> Result<Vec<CertificateRevocationListDer<'static>>, Error> {
    let failed = |cause| Error::Read { path: path.to_owned(), what: "revocation lists", cause };
    let found: Vec<_> = CertificateRevocationListDer::pem_file_iter(path)
        .map_err(failed)?
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    // Nothing revoked is an empty list; no list at all is a mistake that would let all in.
    if found.is_empty() {
        return Err(Error::NoList { path: path.to_owned() });
    }
    Ok(found)
}

fn certificates(path: &Path, what: &'static str) -> Result<Vec<CertificateDer<'static>>, Error> {
    let failed = |cause| Error::Read { path: path.to_owned(), what, cause };
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(failed)?
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    if found.is_empty() {
        return Err(Error::Empty { path: path.to_owned() });
    }
    Ok(found)
}
